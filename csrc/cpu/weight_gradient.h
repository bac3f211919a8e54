// d weight and d bias: the exponentials of a batch times its hidden states, for some tokens at a time. How much of the
// exponentials is kept from the first pass, and how much computed again, is what the workspace decides.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/statistics.h"

namespace l3m::cpu {

// A sum that knows what its additions have rounded away (Knuth's TwoSum).
template <typename Acc>
class Compensated {
 public:
  void add(Acc term) {
    const Acc sum = sum_ + term, added = sum - sum_;
    lost_ += (sum_ - (sum - added)) + (term - added);
    sum_ = sum;
  }
  Acc value() const { return std::isfinite(sum_) ? sum_ + lost_ : sum_; }

 private:
  Acc sum_ = 0, lost_ = 0;
};

template <typename In, typename Out, typename Mul, typename Acc>
class WeightGradient {
  using Tiles = cpu::Tiles<In, Out, Mul, Acc>;
  using Batch = typename Tiles::Batch;
  using Scratch = typename Tiles::Scratch;

 public:
  WeightGradient(const HeadProblem<In, Out, Acc>& problem, Tiles& tiles)
      : p_(problem), D_(problem.hidden_size), V_(problem.vocabulary), t_(tiles) {
    if (!p_.d_bias) return;
    d_bias_ = Buffer<Acc>(V_);
    std::fill(d_bias_.get(), d_bias_.get() + V_, Acc(0));
  }

  // How many rows go through together: all, or as many as have their exponentials kept.
  int64_t rows_per_chunk() const {
    const int64_t n = p_.gradient_rows.size();
    const int64_t row = (V_ + 1) * int64_t(sizeof(Mul)) * (t_.tiling.block + Tiles::kLine) / t_.tiling.block,
                  operands = std::max<int64_t>(p_.workspace / 2 / bytes_per_row(), t_.tiling.block);
    if constexpr (kPairs) {
      // Products of 16-bit numbers are so cheap that for few rows logits are computed again sooner than sums are read
      // and written once more.
      const int64_t most = budget(true) / (V_ * int64_t(sizeof(Mul)) + bytes_per_row());
      for (int64_t chunks = 1; most >= kLeastSummed || chunks == 1; ++chunks) {
        const int64_t rows = ceil_div(n, chunks);
        if (chunks > 1 && rows < kLeastSummed) break;
        if (fits(rows, chunks > 1)) return rows;
      }
      return std::min(n, operands);
    }
    if (p_.low_memory || n * (row + bytes_per_row()) <= budget(false)) return std::min(n, operands);
    const int64_t fit = std::clamp(budget(true) / (row + bytes_per_row()), t_.tiling.block, operands);
    const int64_t whole = t_.tiling.block * t_.threads;  // full blocks for all threads
    return fit < whole ? fit : fit / whole * whole;
  }

  // Memory for the operands of d weight, and for the exponentials of as many blocks as the budget allows.
  void keep(Batch& batch) {
    batch.scaled = Buffer<Mul>(batch.columns * D_);
    const bool several = p_.gradient_rows.size() > batch.rows.size();
    int64_t left = budget(several) - batch.columns * bytes_per_row();
    if (retained_) left = std::min(left, room_);
    for (const Block& block : batch.blocks) {
      left -= t_.kept_elements(block) * int64_t(sizeof(Mul));
      if (left < 0) break;
      batch.kept = block.offset + block.width;
    }
    const int64_t halves = kHalves && several && p_.d_weight ? round_up(V_ * D_, 32) : 0;
    if (!retained_) {  // for the first batch, the largest, and all that follow
      room_ = t_.kept_before(batch.blocks, batch.kept) * int64_t(sizeof(Mul));
      retained_.emplace(room_ + halves * int64_t(sizeof(uint16_t)));
    }
    batch.exponentials = reinterpret_cast<Mul*>(retained_->as<uint16_t>() + halves);
    if (batch.kept == batch.columns) return;
    batch.packed = Buffer<Mul>((batch.columns - batch.kept) * D_);
    t_.in_parallel(batch.blocks.size(), [&](int64_t i, Scratch& scratch) {
      const Block& block = batch.blocks[i];
      if (block.offset < batch.kept) return;
      t_.pack_hidden(batch, block, scratch, batch.packed.get() + (block.offset - batch.kept) * D_);
    });
  }

  // Adds the gradient of a batch whose statistics are known, one of several unless it is both the first and the last.
  void add(const Batch& batch, bool first, bool last) {
    if (!last && p_.d_weight && !kInPlace && !kHalves && !sums_) sums_ = Buffer<Acc>(V_ * D_);
    std::vector<std::pair<int64_t, int64_t>> targets;  // (token, column), for the rows' own terms
    std::vector<int64_t> row_of(batch.columns);
    for (const Block& block : batch.blocks) {
      for (int64_t m = 0; m < block.count; ++m) {
        row_of[block.offset + m] = batch.rows[block.first + m];
        targets.emplace_back(p_.targets[row_of[block.offset + m]], block.offset + m);
      }
    }
    std::sort(targets.begin(), targets.end());
    t_.in_parallel(batch.blocks.size(), [&](int64_t i, Scratch&) { scale_hidden(batch, batch.blocks[i]); });
    t_.in_parallel(ceil_div(V_, t_.tiling.weight), [&](int64_t item, Scratch& scratch) {
      const int64_t v = item * t_.tiling.weight, rows = std::min(t_.tiling.weight, V_ - v);
      const Sums total = sums_of(v, scratch);
      int64_t ld = 0, ld_tile = 0;
      const Mul* weight = batch.kept < batch.columns ? t_.weight_operand(v, rows, scratch, &ld) : nullptr;
      for (const Block& block : batch.blocks) {
        Mul* tile = t_.tile_of(batch, block, v, scratch, &ld_tile);
        if (block.offset >= batch.kept) {
          const Mul* hidden = t_.packed_hidden(batch, block, scratch);
          t_.panel(batch, block, hidden, v, rows, weight, ld, scratch, nullptr, tile, ld_tile, nullptr);
        }
        const bool add = block.offset > 0 || (kInPlace && !first);
        add_to_weight(batch, tile, ld_tile, v, rows, block.offset, block.width, add, total);
      }
      Compensated<Acc> own;
      const auto from = std::lower_bound(targets.begin(), targets.end(), std::pair<int64_t, int64_t>(v, 0));
      for (auto it = from; it != targets.end() && it->first < v + rows; ++it) {
        const Acc coefficient = batch.state.coefficient.get()[it->second];
        if (total.data) {
          row_kernels<In>(t_.kernels)
              .add_scaled(t_.hidden_row(row_of[it->second]), D_, coefficient, total.data + (it->first - v) * total.ld);
        }
        if (p_.d_bias) {
          // Many rows may have one target, and equal terms: added up one by one they are all rounded the same way.
          own.add(coefficient);
          if (it + 1 == targets.end() || it[1].first != it->first) {
            d_bias_.get()[it->first] += own.value();
            own = {};
          }
        }
      }
      if constexpr (!kInPlace) {
        for (int64_t i = 0; total.data && i < rows; ++i) store(batch, total.data + i * total.ld, v + i, first, last);
      }
    });
  }

  // After the last batch, if there was one.
  void finish(int64_t batches, Acc scale) {
    if (batches == 0 && p_.d_weight) std::fill(p_.d_weight, p_.d_weight + V_ * D_, Out{});
    if (p_.d_bias) row_kernels<Out>(t_.kernels).narrow(d_bias_.get(), V_, scale, p_.d_bias);
  }

 private:
  int64_t bytes_per_row() const { return int64_t(sizeof(Mul)) * D_ * 2 + int64_t(sizeof(double)) * 6; }

  // Of `rows` that go through together: whether all exponentials and operands fit.
  bool fits(int64_t rows, bool several) const {
    const std::vector<Block> blocks = cut(rows, t_.tiling.block, t_.threads);
    const int64_t columns = blocks.empty() ? 0 : blocks.back().offset + blocks.back().width;
    return t_.kept_before(blocks, columns) * int64_t(sizeof(Mul)) + columns * bytes_per_row() <= budget(several);
  }

  int64_t thread_bytes() const {
    return t_.threads *
           (t_.tiling.block * D_ * int64_t(sizeof(Mul) + sizeof(Acc)) +
            2 * t_.tiling.panel * D_ * int64_t(sizeof(Mul)) + t_.tiling.weight * D_ * int64_t(sizeof(Acc)));
  }

  // What may hold exponentials. Where the weight is of 16 bits, an fp32 accumulator of its gradient may be held too:
  // what is not needed of it, that much more of the exponentials.
  int64_t budget(bool accumulator) const {
    if (p_.low_memory) return 0;
    const int64_t bytes = !accumulator ? int64_t(sizeof(Acc)) : kHalves ? int64_t(sizeof(Out)) : 0;
    const int64_t spare = kInPlace ? 0 : V_ * D_ * bytes;
    const int64_t left = std::max<int64_t>(p_.workspace + spare - thread_bytes(), 0);
    return kPairs ? std::min(left, kMostKept) : left;
  }

  // hidden times the rows' factors, as the second operand (columns, D) of d weight, in strips of the hidden size.
  void scale_hidden(const Batch& batch, const Block& block) {
    const Acc* factors = batch.state.factor.get() + block.offset;
    for (int64_t n = 0; n < D_; n += t_.tiling.weight_columns) {
      const int64_t count = std::min(t_.tiling.weight_columns, D_ - n);
      Mul* strip = batch.scaled.get() + n * batch.columns + block.offset * count;
      for (int64_t m = 0; m < block.width; m += kPairs ? 2 : 1) {
        const auto row = [&](int64_t k) {
          return k < block.count ? t_.hidden_row(batch.rows[block.first + k]) + n : nullptr;
        };
        if constexpr (kPairs) {
          t_.kernels.pair.interleave_scaled(row(m), factors[m], row(m + 1), factors[m + 1], count,
                                            reinterpret_cast<uint32_t*>(strip + m * count));
        } else if (row(m)) {
          row_kernels<In>(t_.kernels).widen(row(m), count, factors[m], strip + m * count);
        } else {
          std::fill(strip + m * count, strip + (m + 1) * count, Mul(0));
        }
      }
    }
  }

  // Where the products of tokens from v on are summed up: in d weight itself, or for a chunk at a time.
  struct Sums {
    Acc* data;
    int64_t ld;
  };
  Sums sums_of(int64_t v, Scratch& scratch) {
    if (!p_.d_weight) return {nullptr, 0};
    if constexpr (kInPlace)
      return {p_.d_weight + v * D_, D_};
    else
      return {at_least(scratch.d_weight, t_.tiling.weight * t_.ld_sums), t_.ld_sums};
  }

  // total (rows, D) (+)= E X, and d_bias, over columns from `offset` on, for tokens from v on.
  void add_to_weight(const Batch& batch, const Mul* tile, int64_t ld, int64_t v, int64_t rows, int64_t offset,
                     int64_t width, bool add, const Sums& total) {
    for (int64_t n = 0; total.data && n < D_; n += t_.tiling.weight_columns) {
      const int64_t count = std::min(t_.tiling.weight_columns, D_ - n);
      const Mul* strip = batch.scaled.get() + n * batch.columns + offset * count;
      t_.product(rows, count, width, tile, ld, strip, count, total.data + n, total.ld, add);
    }
    if (!p_.d_bias) return;
    const Acc* factors = batch.state.factor.get() + offset;
    if constexpr (kPairs)
      t_.kernels.pair.weighted_sums(tile, ld, rows, width, factors, d_bias_.get() + v);
    else
      t_.tile_kernels().weighted_sums(tile, ld, rows, width, factors, d_bias_.get() + v);
  }

  // A row of d weight, of one chunk of several.
  void store(const Batch& batch, const Acc* row, int64_t v, bool first, bool last) {
    Out* out = p_.d_weight + v * D_;
    if (first && last) {
      row_kernels<Out>(t_.kernels).narrow(row, D_, batch.scale, out);
      return;
    }
    if constexpr (kHalves) {
      uint16_t* low = retained_->as<uint16_t>() + v * D_;
      if (last)
        t_.kernels.pair.narrow_halves(row, D_, batch.scale, out, low);
      else
        t_.kernels.pair.add_to_halves(row, D_, first, out, low);
    } else {
      Acc* sum = sums_.get() + v * D_;
      if (first)
        row_kernels<Acc>(t_.kernels).widen(row, D_, Acc(1), sum);
      else
        row_kernels<Acc>(t_.kernels).add_scaled(row, D_, Acc(1), sum);
      if (last) row_kernels<Out>(t_.kernels).narrow(sum, D_, batch.scale, out);
    }
  }

  static constexpr bool kPairs = Tiles::kPairs;
  static constexpr bool kInPlace = std::is_same_v<Acc, Out>;  // d weight has the sums' type: the scale is 1
  // The high halves of fp32 sums are bf16 numbers: d weight holds these until the last batch, and half an accumulator
  // is room for more exponentials, so for fewer and larger batches.
  static constexpr bool kHalves = std::is_same_v<Out, BFloat16>;
  // Rows of a batch from which on adding to the sums pays. Of the time of computing logits once more it took (processor
  // time, one thread):
  //   0.89 at 512 rows    V = 128256, D = 512, n = 1024
  //   0.56 at 1,639 rows  V = 32000, D = 1024, n = 8192
  static constexpr int64_t kLeastSummed = 512;
  // Beyond what a shared cache may hold, 16-bit products may make exponentials sooner than memory gives them back.
  // `l3ms bench`, two threads:
  //   V = 128256, D = 512, n = 1024: 373 ms with all 262 MB kept, 291 with this limit (both before the memory of freed
  //     gradients was used again; 273 since)
  //   V = 32000, D = 1024, n = 2048: 131 MB are worth it, 203 against 280 ms
  static constexpr int64_t kMostKept = int64_t(160) << 20;
  const HeadProblem<In, Out, Acc>& p_;
  const int64_t D_, V_;
  Tiles& t_;
  Buffer<Acc> d_bias_, sums_;         // sums: (V, D), of several batches where d_weight itself cannot hold them
  std::optional<Retained> retained_;  // the low halves of such sums (V, D), then the exponentials of a batch
  int64_t room_ = 0;                  // bytes for the latter
};

}  // namespace l3m::cpu
