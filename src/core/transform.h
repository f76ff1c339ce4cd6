// From a (a product's sum, its scale and bias included) to the logit z, and the derivative of that:
//   z = softcap tanh(x) inv_temperature,   x = a / softcap      (without one a inv_temperature)
//   dz/da = 4 u / (1 + u)^2 inv_temperature,   u = e^(-2|x|)    (without one inv_temperature)
// once for host and device. Engines vectorise both, and take what is done once a row from here.
//
// The derivative is made of x, never of z. 1 - tanh^2 is the same on paper, but where tanh is
// rounded to a number near 1 it has lost its digits, and from |x| = 9 on, in fp32, it is 0. So who
// wants the derivative has to have a: it is kept, or made again, where z alone would not do.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace cutloss {

// The derivative of tanh at x.
template <class T>
CUTLOSS_HOST_DEVICE T tanh_slope(T x) {
  const T u = std::exp(T(-2) * std::fabs(x));
  const T over = T(1) / (T(1) + u);
  return T(4) * u * over * over;
}

// Multiplies and rounds: nvcc would fuse the product with a subtraction that follows, and a logit
// that backward makes again would differ from forward's.
template <class T>
CUTLOSS_HOST_DEVICE T rounded_product(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(double)) {
    return __dmul_rn(a, b);
  } else {
    return __fmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

// Makes z of a. tanh itself is the library's: tanh x = (1 - u) / (1 + u) would lose the digits of a
// small x.
template <class T>
CUTLOSS_HOST_DEVICE T transformed(T a, T softcap, T inv_temperature) {
  if (softcap != T(0)) a = softcap * std::tanh(a * (T(1) / softcap));
  return rounded_product(a, inv_temperature);
}

// Makes dz/da.
template <class T>
CUTLOSS_HOST_DEVICE T transform_slope(T a, T softcap, T inv_temperature) {
  if (softcap == T(0)) return inv_temperature;
  return tanh_slope(a * (T(1) / softcap)) * inv_temperature;
}

}  // namespace cutloss
