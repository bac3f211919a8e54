// Single numbers: exp, tanh, and the 16-bit formats, without branches, so that a loop over them becomes vectors.
// Included by kernels.cpp alone, and in the namespace of its instruction set: each has its own copy.
#pragma once

#include "cpu/kernels.h"

namespace l3m::cpu::L3M_ISA {
namespace {

template <typename Acc>
struct Constants;

template <>
struct Constants<float> {
  using Bits = int32_t;
  using Unsigned = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;
};

template <>
struct Constants<double> {
  using Bits = int64_t;
  using Unsigned = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLog2E = 1.4426950408889634074, kLn2High = 6.93145751953125e-1,
                          kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLowest = -746.0, kHighest = 710.0;
};

inline float polynomial(float r) {  // exp on [-ln2/2, ln2/2], Cephes' expf
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r) + 1.0f;
}

inline double polynomial(double r) {  // Taylor's, to r^13: the next term is 4e-18
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  return (p * r * r + r) + 1.0;
}

// exp to an ulp: 0 and inf where they belong, NaN for NaN.
template <typename Acc>
inline Acc exponential(Acc x) {
  using C = Constants<Acc>;
  x = x < C::kLowest ? C::kLowest : x;
  x = x > C::kHighest ? C::kHighest : x;
  const Acc shifted = x * C::kLog2E + C::kRound;
  const Acc whole = shifted - C::kRound;
  const Acc r = (x - whole * C::kLn2High) - whole * C::kLn2Low;
  // 2^n in two factors: n = -150 and n = 128 are no exponents of a number.
  using Bits = typename C::Bits;
  const Bits n = __builtin_bit_cast(Bits, shifted) - __builtin_bit_cast(Bits, C::kRound);
  const Bits half = n >> 1;
  const Acc low = __builtin_bit_cast(Acc, (half + C::kBias) << C::kMantissa);
  const Acc high = __builtin_bit_cast(Acc, (n - half + C::kBias) << C::kMantissa);
  return polynomial(r) * low * high;
}

inline float odd_tanh(float x) {  // |x| < 0.625, Cephes' tanhf
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  return p * s * x + x;
}

inline double odd_tanh(double x) {  // Cephes' tanh
  const double s = x * x;
  const double p = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3;
  const double q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3;
  return x * s * (p / q) + x;
}

template <typename Acc>
inline Acc tanh(Acc x) {
  const Acc size = x < 0 ? -x : x;
  const Acc far = Acc(1) - Acc(2) / (exponential(size + size) + Acc(1));
  return size < Acc(0.625) ? odd_tanh(x) : (x < 0 ? -far : far);
}

inline float widened(BFloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

inline uint32_t bfloat16_bits(float x) {  // to nearest, ties to even
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? 0x7fc0u : rounded;
}

inline float widened(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // Exponent and mantissa moved up, then the bias put right by a product, which normalises subnormals too.
  const float value = __builtin_bit_cast(float, magnitude << 13) * 0x1p+112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : __builtin_bit_cast(uint32_t, value);
  return __builtin_bit_cast(float, sign | special);
}

inline uint16_t float16_bits(float x) {  // to nearest, ties to even
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  const uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the subnormal number in the lowest bits, rounded.
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, size) + 0.5f) - __builtin_bit_cast(uint32_t, 0.5f);
  uint32_t result = size < 0x38800000u ? subnormal : normal;
  result = size >= 0x477ff000u ? 0x7c00u : result;
  result = size > 0x7f800000u ? 0x7e00u : result;
  return uint16_t(sign | result);
}

inline float widened(float x) { return x; }
inline double widened(double x) { return x; }
inline void store(BFloat16* to, float x) { to->bits = uint16_t(bfloat16_bits(x)); }
inline void store(Float16* to, float x) { to->bits = float16_bits(x); }
inline void store(float* to, float x) { *to = x; }
inline void store(double* to, double x) { *to = x; }

}  // namespace
}  // namespace l3m::cpu::L3M_ISA
