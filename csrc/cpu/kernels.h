// What happens to a tile while it is in cache: exponentials, sums, conversions, transpositions. kernels.cpp is compiled
// once per instruction set; `path()` has the fastest of them that this machine runs (or the one that L3M_CPU names).
#pragma once

#include <cstdint>

namespace l3m::cpu {

// Numbers of 16 bits by their bits: the compiler of a kernel needs no library for them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A number that an Acc would round: high + low. A factor of all logits but the target's, which is computed in double:
// rounded, it would give log-likelihoods at one temperature errors of one direction.
template <typename Acc>
struct Factor {
  Acc high, low;
};

// logit = softcap * tanh(z / softcap) / temperature, without the softcap where it is 0: `outer` times tanh(`inner` z), or
// `outer` z.
template <typename Acc>
struct Transform {
  bool capped;
  Factor<Acc> inner, outer;
};

// A product's element that stands for "leave this one out", where there is a softcap: -inf would become -softcap.
template <typename Acc>
inline constexpr Acc kMasked = Acc(-3.0e38);

// Tiles are (rows of the vocabulary) x (columns: rows of the batch), `ld` apart.
template <typename Acc>
struct TileKernels {
  // z -> exp(logit - reference[column]), in place; sums[column] += it.
  // `slope`: times d logit / d z * temperature afterwards.
  void (*exponentials)(Acc* z, int64_t ld, int64_t rows, int64_t columns, const Acc* bias, const Acc* reference,
                       Acc* sums, const Transform<Acc>& transform, bool slope);
  // maximum[column] = max(itself, logits of the column); a NaN stays.
  void (*maxima)(const Acc* z, int64_t ld, int64_t rows, int64_t columns, const Acc* bias, Acc* maximum,
                 const Transform<Acc>& transform);
  // to[j * ld_to + i] = from[i * ld + j]
  void (*transpose)(const Acc* from, int64_t ld, int64_t rows, int64_t columns, Acc* to, int64_t ld_to);
  // out[row] += sum over columns of tile * factor
  void (*weighted_sums)(const Acc* tile, int64_t ld, int64_t rows, int64_t columns, const Acc* factor, Acc* out);
};

// Operands of a product of 16-bit numbers hold pairs of consecutive k in one word, the even k in its low half:
// (k / 2, n) words.
struct PairKernels {
  // Rows of exponentials, even in number -> bf16 rows, and (rows / 2, ld_pairs) words of two rows each where `pairs` is
  // given. `stream`: `to` is not read again soon, and need not pass through the cache.
  void (*narrow)(const float* tile, int64_t ld, int64_t rows, int64_t columns, BFloat16* to, int64_t ld_to,
                 uint32_t* pairs, int64_t ld_pairs, bool stream);
  // Two rows -> words; `odd` may be null (zeros).
  void (*interleave)(const BFloat16* even, const BFloat16* odd, int64_t count, uint32_t* to);
  // Two rows times a factor each -> words; a null row gives zeros.
  void (*interleave_scaled)(const BFloat16* even, float even_factor, const BFloat16* odd, float odd_factor,
                            int64_t count, uint32_t* to);
  void (*transpose)(const uint32_t* from, int64_t ld, int64_t rows, int64_t columns, uint32_t* to, int64_t ld_to);
  void (*weighted_sums)(const BFloat16* tile, int64_t ld, int64_t rows, int64_t columns, const float* factor,
                        float* out);
  // fp32 sums in two arrays of their halves, of which the high one is a bf16 number. Sums = `from`, or += it.
  void (*add_to_halves)(const float* from, int64_t count, bool first, BFloat16* high, uint16_t* low);
  // high = bf16((sum + from) * factor)
  void (*narrow_halves)(const float* from, int64_t count, float factor, BFloat16* high, const uint16_t* low);
};

// Rows of a tensor of type T, computed with in Acc.
template <typename T, typename Acc>
struct RowKernels {
  void (*widen)(const T* from, int64_t count, Acc factor, Acc* to);
  void (*narrow)(const Acc* from, int64_t count, Acc factor, T* to);
  void (*add_scaled)(const T* from, int64_t count, Acc factor, Acc* to);
  double (*dot)(const T* a, const T* b, int64_t count);
};

struct Kernels {
  const char* name;
  TileKernels<float> tile_float;
  TileKernels<double> tile_double;
  PairKernels pair;
  RowKernels<BFloat16, float> rows_bfloat16;
  RowKernels<Float16, float> rows_float16;
  RowKernels<float, float> rows_float;
  RowKernels<double, double> rows_double;
};

namespace generic {
const Kernels& table();
}
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}

// What the arithmetic runs on here.
struct Path {
  const Kernels* kernels;
  bool brgemm_float;     // oneDNN's small products of fp32 tiles; otherwise the BLAS's
  bool brgemm_bfloat16;  // and of bf16 tiles (AVX512_BF16 or AMX); otherwise, as fp16 always, they are widened to fp32
  bool amx;              // the latter on AMX
  const char* name;      // "generic", "avx2", "avx512", "avx512_bf16", "amx"
};

// The path in use: the fastest that the machine has, or the one named by the environment variable L3M_CPU (read once).
// Throws std::runtime_error where that is not one this machine can run.
const Path& path();

}  // namespace l3m::cpu
