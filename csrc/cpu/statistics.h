// The pass over the vocabulary: log-likelihoods of a batch, d hidden, and what d weight needs of each row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/tiles.h"

namespace l3m::cpu {

template <typename In, typename Out, typename Mul, typename Acc>
class Statistics {
  using Tiles = cpu::Tiles<In, Out, Mul, Acc>;
  using Batch = typename Tiles::Batch;
  using Scratch = typename Tiles::Scratch;

 public:
  Statistics(const HeadProblem<In, Out, Acc>& problem, Tiles& tiles)
      : p_(problem), D_(problem.hidden_size), V_(problem.vocabulary), t_(tiles) {}

  Batch make_batch(std::vector<int64_t> rows, bool gradient, Acc scale) const {
    std::vector<Block> blocks = cut(rows.size(), t_.tiling.block, t_.threads);
    const int64_t columns = blocks.empty() ? 0 : blocks.back().offset + blocks.back().width;
    const int64_t slices = blocks.empty() ? 1
                                          : std::min(ceil_div(t_.threads, blocks.size()),
                                                     std::max<int64_t>(V_ / (4 * t_.tiling.panel), 1));
    return {std::move(rows), gradient, scale, std::move(blocks), columns, slices, RowState<Acc>(columns, slices)};
  }

  // Statistics and d hidden of a batch.
  void run(const Batch& batch) {
    const int64_t blocks = batch.blocks.size(), slices = batch.slices;
    const bool need_hidden = batch.gradient && (p_.d_hidden || p_.d_hidden_sums);
    Buffer<Acc> partial;
    const int64_t part = t_.tiling.block * t_.ld_sums;
    if (need_hidden && slices > 1) partial = Buffer<Acc>(blocks * slices * part);
    t_.in_parallel(blocks, [&](int64_t i, Scratch&) { prepare(batch, batch.blocks[i]); });
    std::vector<char> again(blocks, 1);
    for (int round = 0; round < 2; ++round) {
      std::vector<int64_t> items;
      for (int64_t i = 0; i < blocks; ++i) {
        if (!std::exchange(again[i], 0)) continue;
        for (int64_t slice = 0; slice < slices; ++slice) items.push_back(i * slices + slice);
      }
      if (items.empty()) break;
      const auto whole = [&](int64_t i, const Acc* sums, Scratch& scratch) {
        if (round == 0 && out_of_range(batch, batch.blocks[i])) {
          move_references(batch, batch.blocks[i], scratch);
          again[i] = 1;
          return;
        }
        complete(batch, batch.blocks[i]);
        if (need_hidden) finish_hidden(batch, batch.blocks[i], sums, scratch);
      };
      t_.in_parallel(items.size(), [&](int64_t k, Scratch& scratch) {
        const int64_t i = items[k] / slices, slice = items[k] % slices;
        Acc* sums = !need_hidden ? nullptr
                    : slices > 1 ? partial.get() + items[k] * part
                                 : at_least(scratch.d_hidden, part);
        pass(batch, batch.blocks[i], slice, scratch, sums);
        if (slices == 1) whole(i, sums, scratch);
      });
      if (slices == 1) continue;
      t_.in_parallel(items.size() / slices, [&](int64_t k, Scratch& scratch) {
        const int64_t i = items[k * slices] / slices, size = batch.blocks[i].count * t_.ld_sums;
        Acc* sums = need_hidden ? partial.get() + i * slices * part : nullptr;
        for (int64_t slice = 1; need_hidden && slice < slices; ++slice) {
          row_kernels<Acc>(t_.kernels).add_scaled(sums + slice * part, size, Acc(1), sums);
        }
        whole(i, sums, scratch);
      });
    }
  }

 private:
  static constexpr bool kPairs = Tiles::kPairs;
  // exp(z - z_t) is used as it is while its sum is below this: far from overflow, products with it too.
  static constexpr double kLargestSum = std::is_same_v<Acc, double> ? 1e100 : 1e16;

  int64_t slice_begin(const Batch& batch, int64_t slice) const {
    return std::min(round_up(ceil_div(V_ * slice, batch.slices), t_.tiling.panel), V_);
  }

  // Sums of one block over one slice of the vocabulary; where `d_hidden` is given, d hidden (count, D) without the
  // factor goes there.
  void pass(const Batch& batch, const Block& block, int64_t slice, Scratch& scratch, Acc* d_hidden) {
    const Mul* hidden = t_.packed_hidden(batch, block, scratch);
    double* others = batch.state.others.get() + slice * batch.columns + block.offset;
    std::fill(others, others + block.width, 0.0);
    const int64_t begin = slice_begin(batch, slice), end = slice_begin(batch, slice + 1);
    Mul* by_row = d_hidden ? at_least(scratch.by_row, t_.tiling.block * t_.by_row_ld()) : nullptr;
    for (int64_t v = begin; v < end; v += t_.tiling.panel) {
      const int64_t rows = std::min(t_.tiling.panel, end - v);
      int64_t ld, ld_tile;
      const Mul* weight = t_.weight_operand(v, rows, scratch, &ld);
      Mul* tile = t_.tile_of(batch, block, v, scratch, &ld_tile);
      t_.panel(batch, block, hidden, v, rows, weight, ld, scratch, others, tile, ld_tile, by_row);
      if (d_hidden) add_to_hidden(block, v, rows, weight, ld, by_row, v > begin, scratch, d_hidden);
    }
    if (d_hidden && begin == end) std::fill(d_hidden, d_hidden + block.count * t_.ld_sums, Acc(0));
  }

  // d_hidden (count, D) (+)= E^T W over a panel.
  void add_to_hidden(const Block& block, int64_t v, int64_t rows, const Mul* weight, int64_t ld, const Mul* by_row,
                     bool add, Scratch& scratch, Acc* d_hidden) {
    const int64_t even = round_up(rows, 2);
    for (int64_t n = 0; n < D_; n += t_.tiling.columns) {
      const int64_t count = std::min(t_.tiling.columns, D_ - n);
      if constexpr (kPairs) {
        // Pairs of rows of the weight, a few products' worth at a time: long runs of a row for the prefetcher.
        constexpr int64_t kProducts = 4;
        Mul* words = at_least(scratch.weight, (t_.tiling.panel + 1) * t_.tiling.columns * kProducts);
        const int64_t part = n / t_.tiling.columns % kProducts;
        if (part == 0) {
          for (int64_t i = 0; i < rows; i += 2) {
            for (int64_t k = 0; k < kProducts && n + k * t_.tiling.columns < D_; ++k) {
              const int64_t from = n + k * t_.tiling.columns, length = std::min(t_.tiling.columns, D_ - from);
              const BFloat16* next = i + 1 < rows ? t_.weight_row(v + i + 1) + from : nullptr;
              t_.kernels.pair.interleave(
                  t_.weight_row(v + i) + from, next, length,
                  reinterpret_cast<uint32_t*>(words + k * even * t_.tiling.columns + i * length));
            }
          }
        }
        t_.product(block.count, count, even, by_row, t_.by_row_ld(), words + part * even * t_.tiling.columns, count,
                   d_hidden + n, t_.ld_sums, add);
      } else {
        t_.product(block.count, count, rows, by_row, t_.by_row_ld(), weight + n, ld, d_hidden + n, t_.ld_sums, add);
      }
    }
  }

  // Largest logit of each row of a block, for the rows whose sum was out of range.
  void find_maxima(const Batch& batch, const Block& block, Scratch& scratch, Acc* maximum) {
    const int64_t width = block.width;
    const Mul* hidden = t_.packed_hidden(batch, block, scratch);
    Acc* z = at_least(scratch.tile, (t_.tiling.strip + 1) * t_.tiling.block);
    std::fill(maximum, maximum + width, -std::numeric_limits<Acc>::infinity());
    for (int64_t v = 0; v < V_; v += t_.tiling.strip) {
      const int64_t rows = std::min(t_.tiling.strip, V_ - v);
      int64_t ld;
      const Mul* weight = t_.weight_operand(v, rows, scratch, &ld);
      t_.product(rows, width, D_, weight, ld, hidden, width, z, width, false);
      t_.tile_kernels().maxima(z, width, rows, width, t_.bias_at(v), maximum, t_.transform);
    }
  }

  // ---- per row ----

  void prepare(const Batch& batch, const Block& block) {
    for (int64_t m = 0; m < block.width; ++m) {
      const int64_t column = block.offset + m;
      Acc& reference = batch.state.reference.get()[column];
      if (m >= block.count) {
        reference = std::numeric_limits<Acc>::infinity();  // of exponentials 0
        batch.state.factor.get()[column] = 0;
        continue;
      }
      const int64_t row = batch.rows[block.first + m], target = p_.targets[row];
      if (t_.elsewhere(target)) {
        reference = p_.known_lse[row];
        batch.state.target_logit.get()[column] = -std::numeric_limits<double>::infinity();
        batch.state.slope.get()[column] = 0;
        continue;
      }
      double z = row_kernels<In>(t_.kernels).dot(t_.hidden_row(row), t_.weight_row(target), D_);
      if (p_.bias) z += *t_.bias_at(target);
      double slope = 1;
      if (p_.softcap) {
        const double ratio = std::tanh(z / p_.softcap);
        slope = (1 - ratio) * (1 + ratio);
        z = p_.softcap * ratio;
      }
      z /= p_.temperature;
      batch.state.target_logit.get()[column] = z;
      batch.state.slope.get()[column] = slope;
      reference = p_.known_lse ? p_.known_lse[row] : Acc(z);
    }
  }

  double sum_of_others(const Batch& batch, int64_t column) const {
    double sum = 0;
    for (int64_t slice = 0; slice < batch.slices; ++slice)
      sum += batch.state.others.get()[slice * batch.columns + column];
    return sum;
  }

  // Whether a row's exponentials are too large, or not finite, with its target's logit for a reference.
  bool out_of_range(const Batch& batch, int64_t column) const { return !(sum_of_others(batch, column) < kLargestSum); }

  bool out_of_range(const Batch& batch, const Block& block) const {
    if (p_.known_lse) return false;
    for (int64_t m = 0; m < block.count; ++m) {
      if (out_of_range(batch, block.offset + m)) return true;
    }
    return false;
  }

  void move_references(const Batch& batch, const Block& block, Scratch& scratch) {
    Buffer<Acc> maximum(block.width);
    find_maxima(batch, block, scratch, maximum.get());
    for (int64_t m = 0; m < block.count; ++m) {
      if (out_of_range(batch, block.offset + m)) batch.state.reference.get()[block.offset + m] = maximum.get()[m];
    }
  }

  // The sums are known: log-likelihoods, and what the gradients are multiplied by.
  void complete(const Batch& batch, const Block& block) {
    for (int64_t m = 0; m < block.count; ++m) {
      const int64_t column = block.offset + m, row = batch.rows[block.first + m];
      const double others = sum_of_others(batch, column), reference = batch.state.reference.get()[column];
      const double shifted = batch.state.target_logit.get()[column] - reference;
      const double total = others + std::exp(shifted);  // with a known lse, 1 but for that number's rounding
      const double log_sum = std::log1p(others + std::expm1(shifted));
      if (p_.token) p_.token[row] = Acc(std::min(shifted - log_sum, 0.0));
      if (p_.lse) p_.lse[row] = Acc(reference + log_sum);
      if (!batch.gradient) continue;
      const double upstream = double(p_.upstream[row]) / (p_.temperature * batch.scale);
      if (p_.known_token) {  // these rows' exponentials are a part of the sum, and 1 - p_t is of all
        const double rest = -std::expm1(double(p_.known_token[row]));
        batch.state.factor.get()[column] = Acc(-upstream);
        batch.state.coefficient.get()[column] = Acc(upstream * rest * batch.state.slope.get()[column]);
        continue;
      }
      batch.state.factor.get()[column] = Acc(-upstream / total);
      batch.state.coefficient.get()[column] = Acc(upstream * (others / total) * batch.state.slope.get()[column]);
    }
  }

  void finish_hidden(const Batch& batch, const Block& block, const Acc* sums, Scratch& scratch) {
    Acc* row = at_least(scratch.row, D_);
    for (int64_t m = 0; m < block.count; ++m) {
      const int64_t column = block.offset + m, index = batch.rows[block.first + m];
      row_kernels<Acc>(t_.kernels).widen(sums + m * t_.ld_sums, D_, batch.state.factor.get()[column], row);
      if (const int64_t target = p_.targets[index]; !t_.elsewhere(target)) {
        row_kernels<In>(t_.kernels).add_scaled(t_.weight_row(target), D_, batch.state.coefficient.get()[column], row);
      }
      if (p_.d_hidden_sums)
        row_kernels<Acc>(t_.kernels).widen(row, D_, batch.scale, p_.d_hidden_sums + index * D_);
      else
        row_kernels<Out>(t_.kernels).narrow(row, D_, batch.scale, p_.d_hidden + index * D_);
    }
  }

  const HeadProblem<In, Out, Acc>& p_;
  const int64_t D_, V_;
  Tiles& t_;
};

}  // namespace l3m::cpu
