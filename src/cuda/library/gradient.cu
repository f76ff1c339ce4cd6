// Backward's row pass, which makes g of a block from logits or from what forward kept.
#include "cuda/library/piece.cuh"

namespace cutloss::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

// The row and piece of a warp. Pieces of a row lie beside each other.
struct Place {
  std::int64_t row;
  int piece;
};
__device__ __forceinline__ Place place_of(int pieces) {
  const unsigned warp = blockIdx.x * kWarps + threadIdx.x / 32;
  const auto each = static_cast<unsigned>(pieces);
  return {static_cast<std::int64_t>(warp / each), static_cast<int>(warp % each)};
}

template <class T, class G>
__global__ void __launch_bounds__(kThreads) gradient_kernel(SlabGradient<T> s, int pieces) {
  using P = Piece<T>;
  const auto [row, piece] = place_of(pieces);
  if (row >= s.block.rows) return;
  const int first = piece * kPieceColumns<T>;
  const int columns = s.block.columns - first;
  const std::int64_t entry = s.block.first_entry + row;
  G* to = static_cast<G*>(s.g) + row * s.g_stride + first;
  T z[P::kValues];
  if (s.block.table.row[entry] < 0) {
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) z[i] = T(0);
    store_piece(z, to, columns);
    return;
  }
  const RowGradient<T> k = s.gradients[row];
  load_piece(s.block.z + row * s.block.stride + first, columns, z);
  const T cap = s.block.softcap;
  const T* bias = s.block.bias == nullptr ? nullptr : s.block.bias + first;
  if (cap != T(0)) {
    add_bias(z, bias, columns);  // the slope is made of a, and z follows on the way
  } else if (!s.transformed) {
    transform_piece(z, bias, T(0), k.inv_temperature, columns);
  }
  int target = s.block.table.target[entry] - s.block.first_column - first;
  if (target >= kPieceColumns<T> || target >= columns) target = -1;

  // Instructions bound this pass, so what few losses want is behind branches that a piece takes
  // whole.
  T g_target = 0;
  if (target >= 0) {
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) {
      if (P::column(i) == target) {
        g_target = k.target_g * transform_slope(z[i], cap, k.inv_temperature);
      }
    }
  }
  if (k.d_entropy == T(0) && k.zbar == T(0) && cap == T(0)) {
    const T factor = k.a * k.inv_temperature;
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) {
      z[i] = std::exp((z[i] - k.row_max) - k.log_sum) * factor;
    }
  } else {
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) {
      const T logit = cap == T(0) ? z[i] : transformed(z[i], cap, k.inv_temperature);
      const T t = (logit - k.row_max) - k.log_sum;
      const T p = std::exp(t);
      T g = p * k.a;
      if (k.d_entropy != T(0) && p != T(0)) g -= p * k.d_entropy * (t + k.entropy);
      if (k.zbar != T(0)) {
        const int column = P::column(i);
        g += s.class_weight == nullptr ? k.zbar
             : column < columns        ? k.zbar * s.class_weight[first + column]
                                       : T(0);
      }
      z[i] = g * transform_slope(z[i], cap, k.inv_temperature);
    }
  }
  if (target >= 0) {
#pragma unroll
    for (int i = 0; i < P::kValues; ++i) {
      if (P::column(i) == target) z[i] = g_target;
    }
  }
  store_piece(z, to, columns);
}

// K: of what is kept, and of g.
template <class T, class K>
__global__ void __launch_bounds__(kThreads)
    from_exponentials_kernel(SlabGradient<T> s, Kept<T> kept, std::int64_t slab,
                             int pieces_per_slab, int pieces) {
  constexpr int kVector = 16 / sizeof(K);
  constexpr int kVectors = kPieceColumns<T> / (32 * kVector);
  using Vector = Pack<K, kVector>;
  const auto [row, piece] = place_of(pieces);
  if (row >= s.block.rows) return;
  // Columns from the block's first on: a slab's last piece may be a part of one.
  const std::int64_t slab_begin = piece / pieces_per_slab * slab;
  const std::int64_t first = slab_begin + piece % pieces_per_slab * kPieceColumns<T>;
  const std::int64_t slab_end =
      slab_begin + slab < s.block.columns ? slab_begin + slab : s.block.columns;
  const int columns = static_cast<int>(slab_end - first);
  if (columns <= 0) return;
  const std::int64_t entry = s.block.first_entry + row;
  const K* from = static_cast<const K*>(kept.data) + row * kept.stride + first;
  K* to = static_cast<K*>(s.g) + row * s.g_stride + first;
  const bool empty = s.block.table.row[entry] < 0;
  RowGradient<T> k{};
  T factor = 0;
  int target = -1;
  constexpr T kScale = std::is_same_v<K, __half> ? T(kept_scale(DType::f16)) : T(1);
  if (!empty) {
    k = s.gradients[row];
    const T top = kept.maxima[row * kept.maxima_stride + piece];
    const T p_scale = top == -infinity<T>() ? T(0) : std::exp((top - k.row_max) - k.log_sum);
    factor = p_scale * k.a * k.inv_temperature / kScale;
    target = s.block.table.target[entry] - s.block.first_column - static_cast<int>(first);
  }
  const T zbar = k.zbar * k.inv_temperature;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int column = (j * 32 + lane) * kVector;
    if (column >= columns) continue;
    Vector vector{};
    if (!empty) {
      vector = *reinterpret_cast<const Vector*>(from + column);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const T x = widen<T>(vector.value[i]);
        T g = x * factor;
        if (zbar != T(0) && column + i < columns) {
          g += s.class_weight == nullptr ? zbar : zbar * s.class_weight[first + column + i];
        }
        // Without a softcap the slope is known exactly, whatever it was rounded to.
        if (column + i == target) {
          g = k.target_g * k.inv_temperature * (s.block.softcap == T(0) ? T(1) : x / kScale);
        }
        vector.value[i] = narrow<K>(g);
      }
    }
    *reinterpret_cast<Vector*>(to + column) = vector;
  }
}

// The number of blocks, with a warp to a piece. Pieces are counted in 32 bits, which suffices for
// 2^41 logits.
std::int64_t blocks_for(std::int64_t rows, std::int64_t pieces) {
  if (rows * pieces > 0x7fffffff) {
    throw Error(ErrorCode::unsupported,
                text("a block of ", rows, " rows in ", pieces, " pieces is too large"));
  }
  return divide_up(rows * pieces, kWarps);
}

template <class T, class G>
void run(const SlabGradient<T>& s, cudaStream_t stream) {
  const std::int64_t pieces = divide_up(s.block.columns, kPieceColumns<T>);
  launch(gradient_kernel<T, G>, "row_gradient", blocks_for(s.block.rows, pieces), kThreads, stream,
         s, static_cast<int>(pieces));
}

template <class T, class K>
void run(const SlabGradient<T>& s, const Kept<T>& kept, std::int64_t slab, cudaStream_t stream) {
  const std::int64_t per_slab = divide_up(slab, kPieceColumns<T>);
  const std::int64_t pieces = divide_up(s.block.columns, slab) * per_slab;
  launch(from_exponentials_kernel<T, K>, "row_gradient_from_exponentials",
         blocks_for(s.block.rows, pieces), kThreads, stream, s, kept, slab,
         static_cast<int>(per_slab), static_cast<int>(pieces));
}

}  // namespace

template <class T>
void row_gradient(const SlabGradient<T>& s, cudaStream_t stream) {
  for_stored_type<T>(s.g_type, [&]<class G>(G*) { run<T, G>(s, stream); });
}

template <class T>
void row_gradient_from_exponentials(const SlabGradient<T>& s, const Kept<T>& kept,
                                    std::int64_t slab, cudaStream_t stream) {
  for_stored_type<T>(s.g_type, [&]<class G>(G*) { run<T, G>(s, kept, slab, stream); });
}

#define CUTLOSS_INSTANCES(T)                                                           \
  template void row_gradient(const SlabGradient<T>&, cudaStream_t);                    \
  template void row_gradient_from_exponentials(const SlabGradient<T>&, const Kept<T>&, \
                                               std::int64_t, cudaStream_t);
CUTLOSS_INSTANCES(float)
CUTLOSS_INSTANCES(double)

}  // namespace cutloss::cuda
