// Tiles of the matrix of logits: their operands, and exp(logit - reference) of them. On these stand the passes over a
// batch, statistics.h and weight_gradient.h.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/batch.h"
#include "cpu/head.h"
#include "cpu/product.h"

namespace l3m::cpu {

template <typename T>
const auto& row_kernels(const Kernels& kernels) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return kernels.rows_bfloat16;
  else if constexpr (std::is_same_v<T, Float16>)
    return kernels.rows_float16;
  else if constexpr (std::is_same_v<T, float>)
    return kernels.rows_float;
  else
    return kernels.rows_double;
}

template <typename In, typename Out, typename Mul, typename Acc>
class Tiles {
 public:
  using Problem = HeadProblem<In, Out, Acc>;
  using Batch = cpu::Batch<Mul, Acc>;
  using Scratch = cpu::Scratch<Mul, Acc>;

  // In pairs of 16-bit numbers, or as they are.
  static constexpr int64_t kLine = 64 / sizeof(Mul);  // elements
  static constexpr bool kPairs = std::is_same_v<Mul, BFloat16>;
  static constexpr bool kDirect = std::is_same_v<In, Mul>;  // operands may be read where the caller holds them

  static Factor<Acc> factor(double value) { return {Acc(value), Acc(value - double(Acc(value)))}; }

  explicit Tiles(const Problem& problem)
      : p_(problem),
        D_(problem.hidden_size),
        V_(problem.vocabulary),
        threads(at::get_num_threads()),
        kernels(*path().kernels),
        product(path().brgemm_float, path().amx),
        tiling(D_, sizeof(Mul), sizeof(Acc)),
        ld_sums(D_ + 64 / int64_t(sizeof(Acc))),
        transform{p_.softcap != 0, factor(p_.softcap ? 1 / p_.softcap : 0),
                  factor((p_.softcap ? p_.softcap : 1) / p_.temperature)},
        scratch_(threads) {
    if (!p_.bias) return;
    bias_ = Buffer<Acc>(V_);
    row_kernels<In>(kernels).widen(p_.bias, V_, Acc(1), bias_.get());
  }

  // ---- work on all threads ----

  template <typename Work>
  void in_parallel(int64_t items, const Work& work) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min(threads, items), 1, [&](int64_t begin, int64_t end) {
      const ProductThread<Mul> guard;
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t item = next++; item < items; item = next++) work(item, scratch_[thread]);
      }
    });
  }

  // ---- operands ----

  const In* hidden_row(int64_t row) const { return p_.hidden + row * p_.hidden_stride; }
  const In* weight_row(int64_t v) const { return p_.weight + v * p_.weight_stride; }

  // hidden^T of a block: (D, width), columns beyond the block's rows zero. Rows are gathered sixteen at a time.
  void pack_hidden(const Batch& batch, const Block& block, Scratch& scratch, Mul* to) {
    constexpr int64_t kGathered = 16;
    const int64_t width = block.width;
    if constexpr (kPairs) {
      auto* words = reinterpret_cast<uint32_t*>(to);
      uint32_t* rows = at_least(scratch.gathered_pairs, kGathered * (D_ / 2));
      for (int64_t m = 0; m < width; m += kGathered) {
        for (int64_t k = 0; k < kGathered; ++k) {
          uint32_t* row = rows + k * (D_ / 2);
          if (m + k < block.count)
            std::memcpy(row, hidden_row(batch.rows[block.first + m + k]), D_ * sizeof(Mul));
          else
            std::fill(row, row + D_ / 2, 0u);
        }
        kernels.pair.transpose(rows, D_ / 2, kGathered, D_ / 2, words + m, width);
      }
    } else {
      Acc* rows = at_least(scratch.gathered, kGathered * D_);
      for (int64_t m = 0; m < width; m += kGathered) {
        for (int64_t k = 0; k < kGathered; ++k) {
          Acc* row = rows + k * D_;
          if (m + k < block.count)
            row_kernels<In>(kernels).widen(hidden_row(batch.rows[block.first + m + k]), D_, Acc(1), row);
          else
            std::fill(row, row + D_, Acc(0));
        }
        tile_kernels().transpose(rows, D_, kGathered, D_, to + m, width);
      }
    }
  }

  // The same, where it is at hand already, or packed now.
  const Mul* packed_hidden(const Batch& batch, const Block& block, Scratch& scratch) {
    if (batch.packed && block.offset >= batch.kept) return batch.packed.get() + (block.offset - batch.kept) * D_;
    Mul* to = at_least(scratch.packed, D_ * tiling.block);
    pack_hidden(batch, block, scratch, to);
    return to;
  }

  // Rows of the weight as the first operand of a product; `ld` is set.
  const Mul* weight_operand(int64_t v, int64_t rows, Scratch& scratch, int64_t* ld) {
    if constexpr (kDirect) {
      *ld = p_.weight_stride;
      return weight_row(v);
    } else {
      *ld = D_;
      Mul* to = at_least(scratch.weight, std::max(tiling.panel, tiling.weight) * D_);
      for (int64_t i = 0; i < rows; ++i) row_kernels<In>(kernels).widen(weight_row(v + i), D_, Acc(1), to + i * D_);
      return to;
    }
  }

  // ---- tiles ----

  // Whether a target is in another part of the vocabulary.
  bool elsewhere(int64_t target) const { return p_.known_token && (target < 0 || target >= V_); }

  const Acc* bias_at(int64_t v) const { return p_.bias ? bias_.get() + v : nullptr; }

  // Products (rows, width), `ld` apart, of a strip of the vocabulary -> exponentials, the targets' left out.
  // Adds them to `others` where it is given.
  void exponentials(const Batch& batch, const Block& block, int64_t v, int64_t rows, Acc* z, int64_t ld,
                    Scratch& scratch, double* others) {
    const int64_t width = block.width;
    const Acc mask = p_.softcap ? kMasked<Acc> : -std::numeric_limits<Acc>::infinity();
    for (int64_t m = 0; m < block.count; ++m) {
      const int64_t inside = p_.targets[batch.rows[block.first + m]] - v;
      if (0 <= inside && inside < rows) z[inside * ld + m] = mask;
    }
    Acc* sums = at_least(scratch.sums, tiling.block);
    std::fill(sums, sums + width, Acc(0));
    tile_kernels().exponentials(z, ld, rows, width, bias_at(v), batch.state.reference.get() + block.offset, sums,
                                transform, batch.gradient);
    // Beyond the block's rows hidden is 0, and 0 times an infinite weight is NaN.
    for (int64_t i = 0; block.count < width && i < rows; ++i)
      std::fill(z + i * ld + block.count, z + i * ld + width, Acc(0));
    if (others) {
      for (int64_t m = 0; m < width; ++m) others[m] += sums[m];
    }
  }

  const TileKernels<Acc>& tile_kernels() const {
    if constexpr (std::is_same_v<Acc, double>)
      return kernels.tile_double;
    else
      return kernels.tile_float;
  }

  // Exponentials of a panel as the operand (rows, width) of a product, `ld_to` apart.
  // And transposed, (count, rows), where given.
  void panel(const Batch& batch, const Block& block, const Mul* hidden, int64_t v, int64_t rows, const Mul* weight,
             int64_t ld, Scratch& scratch, double* others, Mul* to, int64_t ld_to, Mul* by_row) {
    const int64_t width = block.width;
    for (int64_t s = 0; s < rows; s += tiling.strip) {
      const int64_t count = std::min(tiling.strip, rows - s);
      if constexpr (kPairs) {
        Acc* z = at_least(scratch.tile, (tiling.strip + 1) * tiling.block);
        product(count, width, D_, weight + s * ld, ld, hidden, width, z, width, false);
        exponentials(batch, block, v + s, count, z, width, scratch, others);
        if (!batch.gradient) continue;
        const int64_t even = round_up(count, 2);
        if (count % 2) std::fill(z + count * width, z + even * width, Acc(0));
        uint32_t* pairs = by_row ? at_least(scratch.pairs, (tiling.strip + 1) / 2 * tiling.block) : nullptr;
        kernels.pair.narrow(z, width, even, width, to + s * ld_to, ld_to, pairs, width, block.offset < batch.kept);
        if (by_row) {
          kernels.pair.transpose(pairs, width, even / 2, block.count, reinterpret_cast<uint32_t*>(by_row + s),
                                 by_row_ld() / 2);
        }
      } else {
        Acc* z = to + s * ld_to;
        product(count, width, D_, weight + s * ld, ld, hidden, width, z, ld_to, false);
        exponentials(batch, block, v + s, count, z, ld_to, scratch, others);
        if (by_row) tile_kernels().transpose(z, ld_to, count, block.count, by_row + s, by_row_ld());
      }
    }
  }

  int64_t by_row_ld() const { return tiling.panel + 32; }

  // Distance of the rows of a tile: whole cache lines, so that they can be streamed to memory; but a power of 2 apart
  // they would share a set of the cache.
  static int64_t tile_ld(int64_t width) {
    const int64_t ld = round_up(width, kLine);
    return ld * sizeof(Mul) % 128 ? ld : ld + kLine;
  }

  // Where a block's exponentials of token v go: kept, or a tile of the thread's. `ld` is set.
  Mul* tile_of(const Batch& batch, const Block& block, int64_t v, Scratch& scratch, int64_t* ld) {
    *ld = tile_ld(block.width);
    if (block.offset < batch.kept) return batch.exponentials + kept_before(batch.blocks, block.offset) + v * *ld;
    // Rows of the widest block: `tile_ld` never falls as a block gets wider.
    return at_least(scratch.by_vocabulary, (std::max(tiling.panel, tiling.weight) + 1) * tile_ld(tiling.block));
  }

  // Elements of a block's exponentials, and of all those of the blocks before a column.
  // Each block's begin a cache line.
  int64_t kept_elements(const Block& block) const { return round_up((V_ + 1) * tile_ld(block.width), kLine); }
  int64_t kept_before(const std::vector<Block>& blocks, int64_t column) const {
    int64_t elements = 0;
    for (const Block& block : blocks) elements += block.offset < column ? kept_elements(block) : 0;
    return elements;
  }

 private:
  const Problem& p_;
  const int64_t D_, V_;

 public:
  const int64_t threads;
  const Kernels& kernels;
  const Product<Mul, Acc> product;
  const Tiling tiling;
  const int64_t ld_sums;  // of sums with D columns: a power of 2 apart, rows would share a set of the cache
  const Transform<Acc> transform;

 private:
  std::vector<Scratch> scratch_;
  Buffer<Acc> bias_;
};

}  // namespace l3m::cpu
