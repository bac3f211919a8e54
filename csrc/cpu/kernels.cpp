// The kernels of kernels.h in plain loops that the compiler turns into vectors; this file is compiled once per
// instruction set, in a namespace of its own (L3M_ISA). It includes nothing with inline functions: the linker keeps one
// copy of such a function, and that could be the one compiled for the largest set.
#include "cpu/kernels.h"

#include "cpu/numbers.h"

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#define L3M_TEXT_(x) #x
#define L3M_TEXT(x) L3M_TEXT_(x)

namespace l3m::cpu::L3M_ISA {
namespace {

// ---- tiles ----

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// x times a factor in two parts. The low one is below half an ulp of a rounded product: it counts where that product is
// not rounded. Where it is no number (x is infinite, or the whole product is beyond all numbers), the high one says it all:
// an infinity and one of the other sign would be NaN.
template <typename Acc>
inline Acc times(const Factor<Acc>& factor, Acc x) {
  constexpr Acc kInfinity = Acc(__builtin_inf());
  const Acc low = x * factor.low;
  const Acc rest = (low < 0 ? -low : low) < kInfinity ? low : Acc(0);
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMAF)
  return fused(x, factor.high, rest);
#else
  return Acc(double(x) * double(factor.high) + double(rest));  // of two float the product is exact
#endif
}

enum class Form { plain, scaled, capped };  // of a logit: z, or `outer` times z, or times a tanh

template <Form kForm, typename Acc>
inline Acc logit(Acc z, const Transform<Acc>& t) {
  if constexpr (kForm == Form::plain) return z;
  if constexpr (kForm == Form::capped) z = tanh(times(t.inner, z));
  return times(t.outer, z);
}

template <typename Acc>
Form form_of(const Transform<Acc>& t) {
  if (t.capped) return Form::capped;
  return t.outer.high == 1 && t.outer.low == 0 ? Form::plain : Form::scaled;
}

template <Form kForm, bool kSlope, typename Acc>
void exponentials_of(Acc* z, int64_t ld, int64_t rows, int64_t columns, const Acc* bias, const Acc* reference,
                     Acc* sums, Transform<Acc> t) {
  for (int64_t v = 0; v < rows; ++v) {
    Acc* __restrict row = z + v * ld;
    const Acc b = bias ? bias[v] : Acc(0);
    for (int64_t m = 0; m < columns; ++m) {
      const Acc raw = row[m] + b;
      Acc e = exponential(logit<kForm>(raw, t) - reference[m]);
      if constexpr (kForm == Form::capped) e = row[m] == kMasked<Acc> ? Acc(0) : e;
      sums[m] += e;
      if constexpr (kSlope) {
        const Acc ratio = tanh(times(t.inner, raw));
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
  const Form form = form_of(t);
  if (form == Form::plain) {
    exponentials_of<Form::plain, false>(z, ld, rows, columns, bias, reference, sums, t);
  } else if (form == Form::scaled) {
    exponentials_of<Form::scaled, false>(z, ld, rows, columns, bias, reference, sums, t);
  } else if (slope) {
    exponentials_of<Form::capped, true>(z, ld, rows, columns, bias, reference, sums, t);
  } else {
    exponentials_of<Form::capped, false>(z, ld, rows, columns, bias, reference, sums, t);
  }
}

template <Form kForm, typename Acc>
void maxima_of(const Acc* z, int64_t ld, int64_t rows, int64_t columns, const Acc* bias, Acc* maximum,
               Transform<Acc> t) {
  for (int64_t v = 0; v < rows; ++v) {
    const Acc* row = z + v * ld;
    const Acc b = bias ? bias[v] : Acc(0);
    for (int64_t m = 0; m < columns; ++m) {
      const Acc x = logit<kForm>(row[m] + b, t);
      maximum[m] = maximum[m] >= x || maximum[m] != maximum[m] ? maximum[m] : x;
    }
  }
}

template <typename Acc>
void maxima(const Acc* z, int64_t ld, int64_t rows, int64_t columns, const Acc* bias, Acc* maximum,
            const Transform<Acc>& t) {
  const Form form = form_of(t);
  const auto of_form = form == Form::plain    ? maxima_of<Form::plain, Acc>
                       : form == Form::scaled ? maxima_of<Form::scaled, Acc>
                                              : maxima_of<Form::capped, Acc>;
  of_form(z, ld, rows, columns, bias, maximum, t);
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

inline float joined(BFloat16 high, uint16_t low) {
  return __builtin_bit_cast(float, uint32_t(high.bits) << 16 | uint32_t(low));
}

void add_to_halves(const float* __restrict from, int64_t count, bool first, BFloat16* __restrict high,
                   uint16_t* __restrict low) {
  const auto split = [&](int64_t k, float sum) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, sum);
    high[k].bits = uint16_t(bits >> 16);
    low[k] = uint16_t(bits);
  };
  if (first) {
    for (int64_t k = 0; k < count; ++k) split(k, from[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) split(k, joined(high[k], low[k]) + from[k]);
  }
}

void narrow_halves(const float* __restrict from, int64_t count, float factor, BFloat16* __restrict high,
                   const uint16_t* __restrict low) {
  for (int64_t k = 0; k < count; ++k)
    high[k].bits = uint16_t(bfloat16_bits((joined(high[k], low[k]) + from[k]) * factor));
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
    {narrow_tile, interleave, interleave_scaled, transpose<uint32_t>, weighted_sums<BFloat16, float>, add_to_halves,
     narrow_halves},
    kRows<BFloat16, float>,
    kRows<Float16, float>,
    kRows<float, float>,
    kRows<double, double>,
};

}  // namespace

const Kernels& table() { return kTable; }

}  // namespace l3m::cpu::L3M_ISA
