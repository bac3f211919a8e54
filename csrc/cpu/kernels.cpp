// The kernels of kernels.h in plain loops that the compiler turns into vectors; this file is compiled once per
// instruction set, in a namespace of its own (L3M_ISA). It includes nothing with inline functions: the linker keeps one
// copy of such a function, and that could be the one compiled for the largest set.
#include "cpu/kernels.h"

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#define L3M_TEXT_(x) #x
#define L3M_TEXT(x) L3M_TEXT_(x)

namespace l3m::cpu::L3M_ISA {
namespace {

// ---- numbers ----

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

// ---- tiles ----

template <bool kSoftcap, typename Acc>
inline Acc logit(Acc z, const Transform<Acc>& t) {
  if constexpr (kSoftcap) {
    z = t.softcap * tanh(z * t.inverse_softcap);
  }
  return z * t.inverse_temperature;
}

template <bool kSoftcap, bool kSlope, typename Acc>
void exponentials_of(Acc* z, int64_t ld, int64_t rows, int64_t columns, const Acc* bias, const Acc* reference,
                     Acc* sums, Transform<Acc> t) {
  for (int64_t v = 0; v < rows; ++v) {
    Acc* __restrict row = z + v * ld;
    const Acc b = bias ? bias[v] : Acc(0);
    for (int64_t m = 0; m < columns; ++m) {
      const Acc raw = row[m] + b;
      Acc e = exponential(logit<kSoftcap>(raw, t) - reference[m]);
      if constexpr (kSoftcap) e = row[m] == kMasked<Acc> ? Acc(0) : e;
      sums[m] += e;
      if constexpr (kSlope) {
        const Acc ratio = tanh(raw * t.inverse_softcap);
        row[m] = e * ((Acc(1) - ratio) * (Acc(1) + ratio));
      } else {
        row[m] = e;
      }
    }
  }
}

template <typename Acc>
void exponentials(Acc* z, int64_t ld, int64_t rows, int64_t columns, const Acc* bias, const Acc* reference, Acc* sums,
                  const Transform<Acc>& t, bool slope) {
  if (t.softcap == 0) {
    exponentials_of<false, false>(z, ld, rows, columns, bias, reference, sums, t);
  } else if (slope) {
    exponentials_of<true, true>(z, ld, rows, columns, bias, reference, sums, t);
  } else {
    exponentials_of<true, false>(z, ld, rows, columns, bias, reference, sums, t);
  }
}

template <bool kSoftcap, typename Acc>
void maxima_of(const Acc* z, int64_t ld, int64_t rows, int64_t columns, const Acc* bias, Acc* maximum,
               Transform<Acc> t) {
  for (int64_t v = 0; v < rows; ++v) {
    const Acc* row = z + v * ld;
    const Acc b = bias ? bias[v] : Acc(0);
    for (int64_t m = 0; m < columns; ++m) {
      const Acc x = logit<kSoftcap>(row[m] + b, t);
      maximum[m] = maximum[m] >= x || maximum[m] != maximum[m] ? maximum[m] : x;
    }
  }
}

template <typename Acc>
void maxima(const Acc* z, int64_t ld, int64_t rows, int64_t columns, const Acc* bias, Acc* maximum,
            const Transform<Acc>& t) {
  (t.softcap == 0 ? maxima_of<false, Acc> : maxima_of<true, Acc>)(z, ld, rows, columns, bias, maximum, t);
}

template <typename T>
void transpose(const T* from, int64_t ld, int64_t rows, int64_t columns, T* to, int64_t ld_to) {
  constexpr int64_t kSide = 16;
  for (int64_t i = 0; i < rows; i += kSide) {
    const int64_t height = rows - i < kSide ? rows - i : kSide;
    for (int64_t j = 0; j < columns; j += kSide) {
      const int64_t width = columns - j < kSide ? columns - j : kSide;
      if (height == kSide && width == kSide) {
        T block[kSide][kSide];
        for (int64_t a = 0; a < kSide; ++a) {
          for (int64_t b = 0; b < kSide; ++b) block[a][b] = from[(i + a) * ld + j + b];
        }
        for (int64_t b = 0; b < kSide; ++b) {
          for (int64_t a = 0; a < kSide; ++a) to[(j + b) * ld_to + i + a] = block[a][b];
        }
      } else {
        for (int64_t a = 0; a < height; ++a) {
          for (int64_t b = 0; b < width; ++b) to[(j + b) * ld_to + i + a] = from[(i + a) * ld + j + b];
        }
      }
    }
  }
}

template <typename T, typename Acc>
void weighted_sums(const T* tile, int64_t ld, int64_t rows, int64_t columns, const Acc* factor, Acc* out) {
  constexpr int64_t kLanes = 16;
  for (int64_t v = 0; v < rows; ++v) {
    const T* row = tile + v * ld;
    Acc lanes[kLanes] = {};
    int64_t m = 0;
    for (; m + kLanes <= columns; m += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += widened(row[m + k]) * factor[m + k];
    }
    for (; m < columns; ++m) lanes[0] += widened(row[m]) * factor[m];
    Acc sum = 0;
    for (Acc lane : lanes) sum += lane;
    out[v] += sum;
  }
}

// ---- pairs of 16-bit numbers ----

#ifdef __AVX512BW__
// Sixteen numbers to bf16 in the low halves of the words.
inline __m512i bfloat16_words(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}

inline void store_line(uint16_t* to, __m512i line, bool stream) {
  if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
  else
    _mm512_storeu_si512(to, line);
}
#endif

void narrow_tile(const float* tile, int64_t ld, int64_t rows, int64_t columns, BFloat16* to, int64_t ld_to,
                 uint32_t* pairs, int64_t ld_pairs, bool stream) {
  for (int64_t v = 0; v < rows; v += 2) {
    const float* __restrict first = tile + v * ld;
    const float* __restrict second = first + ld;
    uint16_t* __restrict low = reinterpret_cast<uint16_t*>(to + v * ld_to);
    uint16_t* __restrict high = low + ld_to;
    uint32_t* __restrict words = pairs ? pairs + v / 2 * ld_pairs : nullptr;
    int64_t m = 0;
#ifdef __AVX512BW__
    // Halves of 32 words in their order: what permutex2var picks from two vectors.
    const __m512i halves = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                            24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const bool aligned = reinterpret_cast<uintptr_t>(low) % 64 == 0 && ld_to % 32 == 0;
    for (; m + 32 <= columns; m += 32) {
      const __m512i a0 = bfloat16_words(_mm512_loadu_ps(first + m)),
                    a1 = bfloat16_words(_mm512_loadu_ps(first + m + 16));
      const __m512i b0 = bfloat16_words(_mm512_loadu_ps(second + m)),
                    b1 = bfloat16_words(_mm512_loadu_ps(second + m + 16));
      store_line(low + m, _mm512_permutex2var_epi16(a0, halves, a1), stream && aligned);
      store_line(high + m, _mm512_permutex2var_epi16(b0, halves, b1), stream && aligned);
      if (words) {
        _mm512_storeu_si512(words + m, _mm512_or_si512(a0, _mm512_slli_epi32(b0, 16)));
        _mm512_storeu_si512(words + m + 16, _mm512_or_si512(a1, _mm512_slli_epi32(b1, 16)));
      }
    }
#endif
    (void)stream;
    for (; m < columns; ++m) {
      const uint32_t a = bfloat16_bits(first[m]), b = bfloat16_bits(second[m]);
      low[m] = uint16_t(a);
      high[m] = uint16_t(b);
      if (words) words[m] = a | b << 16;
    }
  }
}

void interleave(const BFloat16* even, const BFloat16* odd, int64_t count, uint32_t* __restrict to) {
  if (odd) {
    for (int64_t k = 0; k < count; ++k) to[k] = uint32_t(even[k].bits) | uint32_t(odd[k].bits) << 16;
  } else {
    for (int64_t k = 0; k < count; ++k) to[k] = even[k].bits;
  }
}

void interleave_scaled(const BFloat16* even, float even_factor, const BFloat16* odd, float odd_factor, int64_t count,
                       uint32_t* __restrict to) {
  if (odd) {
    for (int64_t k = 0; k < count; ++k) {
      to[k] = bfloat16_bits(widened(even[k]) * even_factor) | bfloat16_bits(widened(odd[k]) * odd_factor) << 16;
    }
  } else {
    for (int64_t k = 0; k < count; ++k) to[k] = even ? bfloat16_bits(widened(even[k]) * even_factor) : 0;
  }
}

// ---- rows ----

template <typename T, typename Acc>
void widen(const T* from, int64_t count, Acc factor, Acc* __restrict to) {
  for (int64_t k = 0; k < count; ++k) to[k] = widened(from[k]) * factor;
}

template <typename T, typename Acc>
void narrow(const Acc* from, int64_t count, Acc factor, T* __restrict to) {
  for (int64_t k = 0; k < count; ++k) store(to + k, from[k] * factor);
}

template <typename T, typename Acc>
void add_scaled(const T* from, int64_t count, Acc factor, Acc* __restrict to) {
  for (int64_t k = 0; k < count; ++k) to[k] += widened(from[k]) * factor;
}

template <typename T>
double dot(const T* a, const T* b, int64_t count) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += double(widened(a[k + j])) * double(widened(b[k + j]));
  }
  for (; k < count; ++k) lanes[0] += double(widened(a[k])) * double(widened(b[k]));
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

template <typename Acc>
constexpr TileKernels<Acc> kTile{exponentials<Acc>, maxima<Acc>, transpose<Acc>, weighted_sums<Acc, Acc>};
template <typename T, typename Acc>
constexpr RowKernels<T, Acc> kRows{widen<T, Acc>, narrow<T, Acc>, add_scaled<T, Acc>, dot<T>};

constexpr Kernels kTable{
    L3M_TEXT(L3M_ISA),
    kTile<float>,
    kTile<double>,
    {narrow_tile, interleave, interleave_scaled, transpose<uint32_t>, weighted_sums<BFloat16, float>},
    kRows<BFloat16, float>,
    kRows<Float16, float>,
    kRows<float, float>,
    kRows<double, double>,
};

}  // namespace

const Kernels& table() { return kTable; }

}  // namespace l3m::cpu::L3M_ISA
