#include "cpu/rows/row_ops.h"

#include <cstring>
#include <limits>

#include "core/dtype.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/rows/row_ops.cc"
#include <hwy/foreach_target.h>  // compiles the section below once for each instruction set

#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace cutloss::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
using Tag = hn::ScalableTag<T>;

// Makes e^x for x <= 0; a NaN stays a NaN, and -inf makes 0. Cody-Waite reduction and a minimax
// polynomial of degree 6 on [-ln2/2, ln2/2] (relative error 3e-9): within 2 ulp. Results under
// 2^-125 are 0: beside a row's maximum, which contributes 1, they count for nothing.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp_nonpositive(D d, V x) {
  if constexpr (std::is_same_v<hn::TFromD<D>, double>) {
    return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x));
  } else {
    const hn::RebindToSigned<D> di;
    const V n = hn::Round(hn::Mul(x, hn::Set(d, 1.44269504f)));
    V r = hn::NegMulAdd(n, hn::Set(d, 0.693145752f), x);  // ln 2, its first 16 bits
    r = hn::NegMulAdd(n, hn::Set(d, 1.42860677e-6f), r);  // and the rest
    V p = hn::Set(d, 1.38145988e-3f);
    p = hn::MulAdd(p, r, hn::Set(d, 8.36871658e-3f));
    p = hn::MulAdd(p, r, hn::Set(d, 4.16683890e-2f));
    p = hn::MulAdd(p, r, hn::Set(d, 1.66665211e-1f));
    p = hn::MulAdd(p, r, hn::Set(d, 0.49999994f));
    p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
    p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
    // p is in (0.7, 1.5): adding n to its exponent is the multiplication by 2^n.
    const auto exponent = hn::ShiftLeft<23>(hn::ConvertTo(di, n));
    const V scaled = hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
    const V tiny = hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -86.6f)), scaled);
    return hn::IfThenElse(hn::IsNaN(x), x, tiny);
  }
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V tanh_keeping_nan(D d, V x) {
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Tanh(d, x));
}

// Calls body(i, valid) for each vector of a row; valid is less than a whole one only at the end.
template <class D, class Body>
HWY_INLINE void for_each_vector(D d, std::int64_t count, Body body) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(i, lanes);
  if (i < count) body(i, count - i);
}

template <class D, class T = hn::TFromD<D>>
HWY_INLINE hn::Vec<D> load(D d, const T* from, std::int64_t valid, T pad) {
  if (valid == static_cast<std::int64_t>(hn::Lanes(d))) return hn::LoadU(d, from);
  HWY_ALIGN T buffer[HWY_MAX_BYTES / sizeof(T)];
  for (std::size_t i = 0; i < hn::Lanes(d); ++i) {
    buffer[i] = static_cast<std::int64_t>(i) < valid ? from[i] : pad;
  }
  return hn::Load(d, buffer);
}

template <class D, class T = hn::TFromD<D>>
HWY_INLINE void store(D d, hn::Vec<D> v, T* to, std::int64_t valid) {
  if (valid == static_cast<std::int64_t>(hn::Lanes(d))) return hn::StoreU(v, d, to);
  HWY_ALIGN T buffer[HWY_MAX_BYTES / sizeof(T)];
  hn::Store(v, d, buffer);
  std::memcpy(to, buffer, static_cast<std::size_t>(valid) * sizeof(T));
}

// Rounds to nearest even; a NaN stays a NaN.
template <class D>
HWY_INLINE auto to_bf16(D /*d*/, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<std::uint16_t, D> d16;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fffu)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x400000u));
  const auto kept = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), quiet, rounded);
  return hn::TruncateTo(d16, hn::ShiftRight<16>(kept));
}

template <class D>
HWY_INLINE hn::Vec<D> from_bf16(D d, hn::Vec<hn::Rebind<std::uint16_t, D>> v) {
  const hn::RebindToUnsigned<D> du;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, v)));
}

// Calls use(pointer to the element type) of a type that is T's own, or bf16 where T is float.
template <class T, class Use>
HWY_INLINE void for_element(DType type, Use use) {
  if constexpr (std::is_same_v<T, float>) {
    if (type == DType::bf16) return use(static_cast<std::uint16_t*>(nullptr));
  }
  use(static_cast<T*>(nullptr));
}

template <class D, class E>
HWY_INLINE hn::Vec<D> load_as(D d, const E* from, std::int64_t valid) {
  if constexpr (std::is_same_v<E, std::uint16_t>) {
    return from_bf16(d, load(hn::Rebind<std::uint16_t, D>(), from, valid, std::uint16_t{0}));
  } else {
    return load(d, from, valid, E(0));
  }
}

template <class D, class E>
HWY_INLINE void store_as(D d, hn::Vec<D> v, E* to, std::int64_t valid) {
  if constexpr (std::is_same_v<E, std::uint16_t>) {
    store(hn::Rebind<std::uint16_t, D>(), to_bf16(d, v), to, valid);
  } else {
    store(d, v, to, valid);
  }
}

template <class T>
void write_element(T* to, T value) {
  *to = value;
}
void write_element(std::uint16_t* to, float value) { *to = cutloss::float_to_bf16(value); }
float read_element(std::uint16_t value) { return cutloss::bf16_to_float(value); }
template <class T>
T read_element(T value) {
  return value;
}

// The derivative of tanh at x, as transform.h has it.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V tanh_slope_of(D d, V x) {
  const V one = hn::Set(d, hn::TFromD<D>(1));
  const V u = exp_nonpositive(d, hn::Mul(hn::Set(d, hn::TFromD<D>(-2)), hn::Abs(x)));
  const V over = hn::Div(one, hn::Add(one, u));
  return hn::Mul(hn::Mul(hn::Set(d, hn::TFromD<D>(4)), u), hn::Mul(over, over));
}

// `slopes` is null, or where the softcap's slopes go.
template <class T>
void apply_transform(T* z, std::int64_t columns, const RowTransform<T>& transform, T* slopes) {
  const Tag<T> d;
  const auto inv_temperature = hn::Set(d, transform.inv_temperature);
  const auto softcap = hn::Set(d, transform.softcap);
  const auto inv_softcap = hn::Set(d, transform.softcap == T(0) ? T(0) : T(1) / transform.softcap);
  for_each_vector(d, columns, [&](std::int64_t i, std::int64_t valid) {
    auto v = load(d, z + i, valid, T(0));
    if (transform.bias != nullptr) v = hn::Add(v, load(d, transform.bias + i, valid, T(0)));
    if (transform.softcap != T(0)) {
      const auto x = hn::Mul(v, inv_softcap);
      if (slopes != nullptr) store(d, tanh_slope_of(d, x), slopes + i, valid);
      v = hn::Mul(softcap, tanh_keeping_nan(d, x));
    }
    store(d, hn::Mul(v, inv_temperature), z + i, valid);
  });
}

// Adds columns to a state's zbar, relative to `shift`. `weight` is null for 1.
template <class T>
void add_zbar(RowState<T>& state, const T* z, const T* weight, std::int64_t columns, T shift) {
  const Tag<T> d;
  const auto shift_v = hn::Set(d, shift);
  auto total = hn::Zero(d);
  auto weights = hn::Zero(d);
  for_each_vector(d, columns, [&](std::int64_t i, std::int64_t valid) {
    const auto v = hn::Sub(load(d, z + i, valid, shift), shift_v);
    if (weight == nullptr) {
      total = hn::Add(total, v);
    } else {
      const auto w = load(d, weight + i, valid, T(0));
      total = hn::MulAdd(v, w, total);
      weights = hn::Add(weights, w);
    }
  });
  state.zbar += hn::GetLane(hn::SumOfLanes(d, total));
  state.weight_seen +=
      weight == nullptr ? static_cast<T>(columns) : hn::GetLane(hn::SumOfLanes(d, weights));
}

template <class T>
T maximum(const T* z, std::int64_t columns) {
  const Tag<T> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  constexpr T inf = std::numeric_limits<T>::infinity();
  auto top0 = hn::Set(d, -inf);
  auto top1 = top0;
  std::int64_t i = 0;
  for (; i + 2 * lanes <= columns; i += 2 * lanes) {
    top0 = hn::Max(top0, hn::LoadU(d, z + i));
    top1 = hn::Max(top1, hn::LoadU(d, z + i + lanes));
  }
  for (; i < columns; i += lanes) {
    const std::int64_t valid = columns - i < lanes ? columns - i : lanes;
    top0 = hn::Max(top0, load(d, z + i, valid, -inf));
  }
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(top0, top1)));
}

template <class T>
std::int64_t first_equal(const T* z, T value, std::int64_t columns) {
  const Tag<T> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto wanted = hn::Set(d, value);
  std::int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) {
    const auto found = hn::FindFirstTrue(d, hn::Eq(hn::LoadU(d, z + i), wanted));
    if (found >= 0) return i + found;
  }
  for (; i < columns; ++i) {
    if (z[i] == value) return i;
  }
  return 0;  // the row holds a NaN
}

// `slopes` is room for the softcap's slopes where exponentials are kept beside one, and else null.
template <class T>
void row_statistics_with(StatisticsRow<T>& row, RowState<T>& state, T* slopes) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  const Tag<T> d;
  if (!row.transform.identity()) apply_transform(row.z, row.columns, row.transform, slopes);
  const std::int64_t at = row.target - row.first_column;
  const bool here = at >= 0 && at < row.columns;
  RowState<T> part;
  if (here) {
    part.target_logit = row.z[at];
    row.z[at] = -inf;
  }
  const T top = maximum(row.z, row.columns);
  row.slab_max = top;
  // Nothing but -inf sums to nothing; a shift of 0 keeps -inf - (-inf) out of it.
  const T shift = top == -inf ? T(0) : top;
  const auto shift_v = hn::Set(d, shift);
  if (row.zbar) {  // of the columns on both sides of the target
    const std::int64_t before = here ? at : row.columns, after = here ? at + 1 : row.columns;
    const T* weight = row.class_weight;
    add_zbar(part, row.z, weight, before, shift);
    add_zbar(part, row.z + after, weight == nullptr ? nullptr : weight + after, row.columns - after,
             shift);
  }
  auto sum = hn::Zero(d);
  auto weighted = hn::Zero(d);

  const auto plain = [&](std::int64_t i, std::int64_t valid) {
    const auto z = load(d, row.z + i, valid, -inf);
    sum = hn::Add(sum, exp_nonpositive(d, hn::Sub(z, shift_v)));
  };
  const auto with_entropy = [&](std::int64_t i, std::int64_t valid) {
    const auto t = hn::Sub(load(d, row.z + i, valid, -inf), shift_v);
    const auto e = exp_nonpositive(d, t);
    sum = hn::Add(sum, e);
    const auto term = hn::Mul(e, t);  // 0 * -inf is 0 here
    weighted = hn::Add(weighted, hn::IfThenZeroElse(hn::Eq(e, hn::Zero(d)), term));
  };
  // What is kept serves g: the sums take the exponential as it is, the copy has the softcap's slope
  // in it.
  const auto kept_value = [&](std::int64_t i, std::int64_t valid) {
    const auto z = load(d, row.z + i, valid, -inf);
    const auto t = hn::Sub(z, shift_v);
    const auto e = exp_nonpositive(d, t);
    const auto none = hn::Eq(e, hn::Zero(d));
    sum = hn::Add(sum, e);
    if (row.entropy) weighted = hn::Add(weighted, hn::IfThenZeroElse(none, hn::Mul(e, t)));
    return slopes == nullptr ? e : hn::Mul(e, load(d, slopes + i, valid, T(0)));
  };
  if (row.exponentials != nullptr) {
    for_element<T>(row.exponentials_type, [&]<class E>(E*) {
      E* kept = static_cast<E*>(row.exponentials);
      for_each_vector(d, row.columns, [&](std::int64_t i, std::int64_t valid) {
        store_as(d, kept_value(i, valid), kept + i, valid);
      });
    });
  } else if (row.entropy) {
    for_each_vector(d, row.columns, with_entropy);
  } else {
    for_each_vector(d, row.columns, plain);
  }
  // Columns come in their order: only a larger logit can be the first of the largest.
  if (row.argmax && top > state.max) {
    part.argmax = row.first_column + first_equal(row.z, top, row.columns);
  }
  if (here) {
    row.z[at] = part.target_logit;
    const T slope = (slopes == nullptr ? T(1) : slopes[at]) * row.transform.inv_temperature;
    if (row.exponentials != nullptr) {
      for_element<T>(row.exponentials_type, [&]<class E>(E*) {
        write_element(static_cast<E*>(row.exponentials) + at, slope);
      });
    }
  }
  part.max = top;
  part.sum = hn::GetLane(hn::SumOfLanes(d, sum));
  part.weighted_sum = hn::GetLane(hn::SumOfLanes(d, weighted));
  merge(state, part);
}

template <class T>
HWY_NOINLINE void row_statistics_with_slopes(StatisticsRow<T>& row, RowState<T>& state) {
  HWY_ALIGN T slopes[kMostColumns];
  row_statistics_with(row, state, slopes);
}

template <class T>
void row_statistics_impl(StatisticsRow<T>& row, RowState<T>& state) {
  if (row.exponentials != nullptr && row.transform.softcap != T(0)) {
    row_statistics_with_slopes(row, state);
  } else {
    row_statistics_with<T>(row, state, nullptr);
  }
}

// Calls write(i, valid, g) for each vector of the row's g. Returns g at the target, which the
// caller writes over what stands there.
template <class T, class Write>
HWY_INLINE T make_gradient(const GradientRow<T>& row, T* z, const RowTransform<T>* transform,
                           Write write) {
  const Tag<T> d;
  const RowCoefficients<T>& k = row.coefficients;
  const bool capped = k.softcap != T(0);
  // With a softcap g is made of x = a / softcap, since the slope is: z follows from it on the way.
  const T* bias = capped ? transform->bias : nullptr;
  T at_target = 0;
  if (row.target >= 0) {
    const T a = z[row.target] + (bias == nullptr ? T(0) : bias[row.target]);
    at_target = row.target_g * transform_slope(a, k.softcap, k.inv_temperature);
  }
  if (!capped && transform != nullptr && !transform->identity()) {
    apply_transform<T>(z, row.columns, *transform, nullptr);
  }
  const auto row_max = hn::Set(d, k.row_max);
  const auto log_sum = hn::Set(d, k.log_sum);
  const auto scale = hn::Set(d, k.a * k.inv_temperature);
  if (k.d_entropy == T(0) && k.zbar == T(0) && !capped) {
    for_each_vector(d, row.columns, [&](std::int64_t i, std::int64_t valid) {
      const auto t = hn::Sub(hn::Sub(load(d, z + i, valid, T(0)), row_max), log_sum);
      write(i, valid, hn::Mul(exp_nonpositive(d, t), scale));
    });
    return at_target;
  }
  const auto a = hn::Set(d, k.a);
  const auto d_entropy = hn::Set(d, k.d_entropy);
  const auto entropy = hn::Set(d, k.entropy);
  const auto zbar = hn::Set(d, k.zbar);
  const auto inv_temperature = hn::Set(d, k.inv_temperature);
  const auto softcap = hn::Set(d, k.softcap);
  const auto inv_softcap = hn::Set(d, capped ? T(1) / k.softcap : T(0));
  for_each_vector(d, row.columns, [&](std::int64_t i, std::int64_t valid) {
    auto v = load(d, z + i, valid, T(0));
    auto slope = inv_temperature;
    if (capped) {
      if (bias != nullptr) v = hn::Add(v, load(d, bias + i, valid, T(0)));
      const auto x = hn::Mul(v, inv_softcap);
      slope = hn::Mul(tanh_slope_of(d, x), inv_temperature);
      v = hn::Mul(hn::Mul(softcap, tanh_keeping_nan(d, x)), inv_temperature);
    }
    const auto t = hn::Sub(hn::Sub(v, row_max), log_sum);
    const auto p = exp_nonpositive(d, t);
    auto g = hn::Mul(p, a);
    if (k.d_entropy != T(0)) {
      const auto term = hn::Mul(hn::Mul(p, d_entropy), hn::Add(t, entropy));
      g = hn::Sub(g, hn::IfThenZeroElse(hn::Eq(p, hn::Zero(d)), term));
    }
    if (k.zbar != T(0)) {
      g = row.class_weight == nullptr
              ? hn::Add(g, zbar)
              : hn::MulAdd(zbar, load(d, row.class_weight + i, valid, T(0)), g);
    }
    write(i, valid, hn::Mul(g, slope));
  });
  return at_target;
}

template <class T>
void row_gradient_impl(const GradientRow<T>& row, T* z, const RowTransform<T>* transform,
                       DType type, void* g) {
  for_element<T>(type, [&]<class E>(E*) {
    E* to = static_cast<E*>(g);
    const T at_target = make_gradient(
        row, z, transform,
        [&](std::int64_t i, std::int64_t valid, auto v) { store_as(Tag<T>(), v, to + i, valid); });
    if (row.target >= 0) write_element(to + row.target, at_target);
  });
}

template <class T>
void row_gradient_from_exponentials_impl(const GradientRow<T>& row, const void* exponentials,
                                         T slab_max, DType type, void* g) {
  const Tag<T> d;
  const RowCoefficients<T>& k = row.coefficients;
  const T p_scale = slab_max == -std::numeric_limits<T>::infinity()
                        ? T(0)
                        : std::exp((slab_max - k.row_max) - k.log_sum);
  const auto scale = hn::Set(d, p_scale * k.a * k.inv_temperature);
  const auto zbar = hn::Set(d, k.zbar * k.inv_temperature);
  for_element<T>(type, [&]<class E>(E*) {
    const E* from = static_cast<const E*>(exponentials);
    E* to = static_cast<E*>(g);
    for_each_vector(d, row.columns, [&](std::int64_t i, std::int64_t valid) {
      auto v = hn::Mul(load_as(d, from + i, valid), scale);
      if (k.zbar != T(0)) {
        v = row.class_weight == nullptr
                ? hn::Add(v, zbar)
                : hn::MulAdd(zbar, load(d, row.class_weight + i, valid, T(0)), v);
      }
      store_as(d, v, to + i, valid);
    });
    if (row.target < 0) return;
    // Without a softcap the slope is known exactly, whatever it was rounded to.
    const T slope = k.softcap == T(0) ? k.inv_temperature : T(read_element(from[row.target]));
    write_element(to + row.target, row.target_g * slope);
  });
}

void bf16_to_float_impl(const std::uint16_t* from, float* to, std::int64_t count) {
  const Tag<float> d;
  for_each_vector(d, count, [&](std::int64_t i, std::int64_t valid) {
    store(d, load_as(d, from + i, valid), to + i, valid);
  });
}

void float_to_bf16_impl(const float* from, std::uint16_t* to, std::int64_t count) {
  const Tag<float> d;
  for_each_vector(d, count, [&](std::int64_t i, std::int64_t valid) {
    store_as(d, load(d, from + i, valid, 0.0f), to + i, valid);
  });
}

template <class T>
void add_impl(DType type, const void* values, std::int64_t first, T* sums, std::int64_t count) {
  const Tag<T> d;
  for_element<T>(type, [&]<class E>(E*) {
    const E* from = static_cast<const E*>(values) + first;
    for_each_vector(d, count, [&](std::int64_t i, std::int64_t valid) {
      const auto sum = hn::Add(load(d, sums + i, valid, T(0)), load_as(d, from + i, valid));
      store(d, sum, sums + i, valid);
    });
  });
}

template <class T>
const RowOps<T>& row_ops_impl() {
  static constexpr RowOps<T> ops{row_statistics_impl<T>, row_gradient_impl<T>,
                                 row_gradient_from_exponentials_impl<T>, add_impl<T>};
  return ops;
}
const RowOps<float>& row_ops_f32() { return row_ops_impl<float>(); }
const RowOps<double>& row_ops_f64() { return row_ops_impl<double>(); }

const char* vector_target_impl() { return hwy::TargetName(HWY_TARGET); }

}  // namespace cutloss::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace cutloss::cpu {

HWY_EXPORT(row_ops_f32);
HWY_EXPORT(row_ops_f64);
HWY_EXPORT(bf16_to_float_impl);
HWY_EXPORT(float_to_bf16_impl);
HWY_EXPORT(vector_target_impl);

template <>
const RowOps<float>& row_ops() {
  return HWY_DYNAMIC_DISPATCH(row_ops_f32)();
}
template <>
const RowOps<double>& row_ops() {
  return HWY_DYNAMIC_DISPATCH(row_ops_f64)();
}
void bf16_to_float(const std::uint16_t* from, float* to, std::int64_t count) {
  HWY_DYNAMIC_DISPATCH(bf16_to_float_impl)(from, to, count);
}
void float_to_bf16(const float* from, std::uint16_t* to, std::int64_t count) {
  HWY_DYNAMIC_DISPATCH(float_to_bf16_impl)(from, to, count);
}
// f16 is only stored and never computed with, so converting one value at a time is enough.
void f16_to_float(const std::uint16_t* from, float* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = cutloss::f16_to_float(from[i]);
}
void float_to_f16(const float* from, std::uint16_t* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = cutloss::float_to_f16(from[i]);
}

// Highway gives better instruction sets lower bits.
void forbid_avx512() { hwy::DisableTargets(HWY_AVX2 - 1); }

const char* vector_target() { return HWY_DYNAMIC_DISPATCH(vector_target_impl)(); }

}  // namespace cutloss::cpu
#endif  // HWY_ONCE
