#include "cpu/head.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <type_traits>
#include <utility>

#include "cpu/plan.h"
#include "cpu/product.h"

namespace l3m::cpu {
namespace {

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
class Head {
 public:
  explicit Head(const HeadProblem<In, Out, Acc>& problem)
      : p_(problem),
        D_(problem.hidden_size),
        V_(problem.vocabulary),
        threads_(at::get_num_threads()),
        kernels_(*path().kernels),
        product_(path().brgemm_float),
        tiling_(D_, sizeof(Mul), sizeof(Acc)),
        ld_(D_ + 64 / int64_t(sizeof(Acc))),
        transform_{Acc(p_.softcap), Acc(p_.softcap ? 1 / p_.softcap : 0), Acc(1 / p_.temperature)} {
    for (int64_t i = 0; i < threads_; ++i) scratch_.emplace_back();
    if (p_.bias) {
      bias_ = Buffer<Acc>(V_);
      row_kernels<In>(kernels_).widen(p_.bias, V_, Acc(1), bias_.get());
    }
  }

  void run() {
    forward_only();
    gradients();
  }

 private:
  // In pairs of 16-bit numbers, or as they are.
  static constexpr bool kPairs = std::is_same_v<Mul, BFloat16>;
  static constexpr bool kDirect = std::is_same_v<In, Mul>;  // operands may be read where the caller holds them
  // exp(z - z_t) is used as it is while its sum is below this: far from overflow, products with it too.
  static constexpr double kLargestSum = std::is_same_v<Acc, double> ? 1e100 : 1e16;

  struct Scratch {  // of one thread
    Buffer<Mul> packed, by_vocabulary, by_row, weight;
    Buffer<Acc> tile, sums, d_hidden, d_weight, row, gathered;
    Buffer<uint32_t> pairs, gathered_pairs;
  };

  struct Rows {  // per column of the blocks
    explicit Rows(int64_t count, int64_t slices)
        : target_logit(count),
          slope(count),
          reference(count),
          factor(count),
          coefficient(count),
          others(count * slices) {}
    Buffer<double> target_logit, slope;
    Buffer<Acc> reference;
    Buffer<Acc> factor;       // -u / (S temperature): of the exponentials
    Buffer<Acc> coefficient;  // u (1 - p_t) / temperature, times the softcap's slope: of the target
    Buffer<double> others;    // (slices, columns) sums of the exponentials of all but the target
  };

  struct Batch {                // rows that go through together
    std::vector<int64_t> rows;  // of the caller's
    bool gradient;
    std::vector<Block> blocks;
    int64_t columns, slices;
    Rows state;
    int64_t kept = 0;                       // columns, of the first blocks, whose exponentials are kept
    std::unique_ptr<Retained> exponentials;  // (V, width) of each of these blocks
    Buffer<Mul> packed;  // hidden as an operand, of the other blocks: their exponentials are computed again
  };

  // ---- work on all threads ----

  template <typename Work>
  void in_parallel(int64_t items, const Work& work) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min(threads_, items), 1, [&](int64_t begin, int64_t end) {
      const ProductThread<Mul> guard;
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t item = next++; item < items; item = next++) work(item, scratch_[thread]);
      }
    });
  }

  template <typename T>
  static T* at_least(Buffer<T>& buffer, int64_t count) {
    if (!buffer) buffer = Buffer<T>(count);
    return buffer.get();
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
        kernels_.pair.transpose(rows, D_ / 2, kGathered, D_ / 2, words + m, width);
      }
    } else {
      Acc* rows = at_least(scratch.gathered, kGathered * D_);
      for (int64_t m = 0; m < width; m += kGathered) {
        for (int64_t k = 0; k < kGathered; ++k) {
          Acc* row = rows + k * D_;
          if (m + k < block.count)
            row_kernels<In>(kernels_).widen(hidden_row(batch.rows[block.first + m + k]), D_, Acc(1), row);
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
    Mul* to = at_least(scratch.packed, D_ * tiling_.block);
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
      Mul* to = at_least(scratch.weight, std::max(tiling_.panel, tiling_.weight) * D_);
      for (int64_t i = 0; i < rows; ++i) row_kernels<In>(kernels_).widen(weight_row(v + i), D_, Acc(1), to + i * D_);
      return to;
    }
  }

  // ---- tiles ----

  const Acc* bias_at(int64_t v) const { return p_.bias ? bias_.get() + v : nullptr; }

  // Products (rows, width), `ld` apart, of a strip of the vocabulary -> exponentials, the targets' left out; adds them
  // to `others` where it is given.
  void exponentials(const Batch& batch, const Block& block, int64_t v, int64_t rows, Acc* z, int64_t ld,
                    Scratch& scratch, double* others) {
    const int64_t width = block.width;
    const Acc mask = p_.softcap ? kMasked<Acc> : -std::numeric_limits<Acc>::infinity();
    for (int64_t m = 0; m < block.count; ++m) {
      const int64_t inside = p_.targets[batch.rows[block.first + m]] - v;
      if (0 <= inside && inside < rows) z[inside * ld + m] = mask;
    }
    Acc* sums = at_least(scratch.sums, tiling_.block);
    std::fill(sums, sums + width, Acc(0));
    tile_kernels().exponentials(z, ld, rows, width, bias_at(v), batch.state.reference.get() + block.offset, sums,
                                transform_, batch.gradient);
    if (others) {
      for (int64_t m = 0; m < width; ++m) others[m] += sums[m];
    }
  }

  const TileKernels<Acc>& tile_kernels() const {
    if constexpr (std::is_same_v<Acc, double>)
      return kernels_.tile_double;
    else
      return kernels_.tile_float;
  }

  // Exponentials of a panel as the operand (rows, width) of a product, `ld_to` apart; and transposed, (count, rows),
  // where given.
  void panel(const Batch& batch, const Block& block, const Mul* hidden, int64_t v, int64_t rows, const Mul* weight,
             int64_t ld, Scratch& scratch, double* others, Mul* to, int64_t ld_to, Mul* by_row) {
    const int64_t width = block.width;
    for (int64_t s = 0; s < rows; s += tiling_.strip) {
      const int64_t count = std::min(tiling_.strip, rows - s);
      if constexpr (kPairs) {
        Acc* z = at_least(scratch.tile, (tiling_.strip + 1) * tiling_.block);
        product_(count, width, D_, weight + s * ld, ld, hidden, width, z, width, false);
        exponentials(batch, block, v + s, count, z, width, scratch, others);
        if (!batch.gradient) continue;
        const int64_t even = round_up(count, 2);
        if (count % 2) std::fill(z + count * width, z + even * width, Acc(0));
        uint32_t* pairs = by_row ? at_least(scratch.pairs, (tiling_.strip + 1) / 2 * tiling_.block) : nullptr;
        kernels_.pair.narrow(z, width, even, width, to + s * ld_to, ld_to, pairs, width, block.offset < batch.kept);
        if (by_row) {
          kernels_.pair.transpose(pairs, width, even / 2, block.count, reinterpret_cast<uint32_t*>(by_row + s),
                                  by_row_ld() / 2);
        }
      } else {
        Acc* z = to + s * ld_to;
        product_(count, width, D_, weight + s * ld, ld, hidden, width, z, ld_to, false);
        exponentials(batch, block, v + s, count, z, ld_to, scratch, others);
        if (by_row) tile_kernels().transpose(z, ld_to, count, block.count, by_row + s, by_row_ld());
      }
    }
  }

  int64_t by_row_ld() const { return tiling_.panel + 32; }

  // Where a block's exponentials of token v go: kept, or a tile of the thread's. `ld` is set.
  Mul* tile_of(const Batch& batch, const Block& block, int64_t v, Scratch& scratch, int64_t* ld) {
    // A power of 2 apart, rows would share a set of the cache.
    *ld = block.width % 64 ? block.width : block.width + 32;
    if (block.offset < batch.kept) return reinterpret_cast<Mul*>(batch.exponentials->get()) + kept_elements(batch, block.offset) + v * *ld;
    return at_least(scratch.by_vocabulary, (std::max(tiling_.panel, tiling_.weight) + 1) * (tiling_.block + 32));
  }

  // ---- the pass over the vocabulary ----

  int64_t slice_begin(const Batch& batch, int64_t slice) const {
    return std::min(round_up(ceil_div(V_ * slice, batch.slices), tiling_.panel), V_);
  }

  // Sums of one block over one slice of the vocabulary; d hidden (count, D), without the factor, into `d_hidden` where
  // given.
  void pass(const Batch& batch, const Block& block, int64_t slice, Scratch& scratch, Acc* d_hidden) {
    const Mul* hidden = packed_hidden(batch, block, scratch);
    double* others = batch.state.others.get() + slice * batch.columns + block.offset;
    std::fill(others, others + block.width, 0.0);
    const int64_t begin = slice_begin(batch, slice), end = slice_begin(batch, slice + 1);
    Mul* by_row = d_hidden ? at_least(scratch.by_row, tiling_.block * by_row_ld()) : nullptr;
    for (int64_t v = begin; v < end; v += tiling_.panel) {
      const int64_t rows = std::min(tiling_.panel, end - v);
      int64_t ld, ld_tile;
      const Mul* weight = weight_operand(v, rows, scratch, &ld);
      Mul* tile = tile_of(batch, block, v, scratch, &ld_tile);
      panel(batch, block, hidden, v, rows, weight, ld, scratch, others, tile, ld_tile, by_row);
      if (d_hidden) add_to_hidden(block, v, rows, weight, ld, by_row, v > begin, scratch, d_hidden);
    }
    if (d_hidden && begin == end) std::fill(d_hidden, d_hidden + block.count * ld_, Acc(0));
  }

  // d_hidden (count, D) (+)= E^T W over a panel.
  void add_to_hidden(const Block& block, int64_t v, int64_t rows, const Mul* weight, int64_t ld, const Mul* by_row,
                     bool add, Scratch& scratch, Acc* d_hidden) {
    const int64_t even = round_up(rows, 2);
    for (int64_t n = 0; n < D_; n += tiling_.columns) {
      const int64_t count = std::min(tiling_.columns, D_ - n);
      if constexpr (kPairs) {
        // Pairs of rows of the weight, a few products' worth at a time: long runs of a row for the prefetcher.
        constexpr int64_t kProducts = 4;
        Mul* words = at_least(scratch.weight, (tiling_.panel + 1) * tiling_.columns * kProducts);
        const int64_t part = n / tiling_.columns % kProducts;
        if (part == 0) {
          for (int64_t i = 0; i < rows; i += 2) {
            for (int64_t k = 0; k < kProducts && n + k * tiling_.columns < D_; ++k) {
              const int64_t from = n + k * tiling_.columns, length = std::min(tiling_.columns, D_ - from);
              const BFloat16* next = i + 1 < rows ? weight_row(v + i + 1) + from : nullptr;
              kernels_.pair.interleave(weight_row(v + i) + from, next, length,
                                       reinterpret_cast<uint32_t*>(words + k * even * tiling_.columns + i * length));
            }
          }
        }
        product_(block.count, count, even, by_row, by_row_ld(), words + part * even * tiling_.columns, count,
                 d_hidden + n, ld_, add);
      } else {
        product_(block.count, count, rows, by_row, by_row_ld(), weight + n, ld, d_hidden + n, ld_, add);
      }
    }
  }

  // Largest logit of each row of a block, for the rows whose sum was out of range.
  void find_maxima(const Batch& batch, const Block& block, Scratch& scratch, Acc* maximum) {
    const int64_t width = block.width;
    const Mul* hidden = packed_hidden(batch, block, scratch);
    Acc* z = at_least(scratch.tile, (tiling_.strip + 1) * tiling_.block);
    std::fill(maximum, maximum + width, -std::numeric_limits<Acc>::infinity());
    for (int64_t v = 0; v < V_; v += tiling_.strip) {
      const int64_t rows = std::min(tiling_.strip, V_ - v);
      int64_t ld;
      const Mul* weight = weight_operand(v, rows, scratch, &ld);
      product_(rows, width, D_, weight, ld, hidden, width, z, width, false);
      tile_kernels().maxima(z, width, rows, width, bias_at(v), maximum, transform_);
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
      double z = row_kernels<In>(kernels_).dot(hidden_row(row), weight_row(target), D_);
      if (p_.bias) z += bias_.get()[target];
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
  bool out_of_range(const Batch& batch, const Block& block) const {
    if (p_.known_lse) return false;
    for (int64_t m = 0; m < block.count; ++m) {
      if (!(sum_of_others(batch, block.offset + m) < kLargestSum)) return true;
    }
    return false;
  }

  void move_references(const Batch& batch, const Block& block, Scratch& scratch) {
    Buffer<Acc> maximum(block.width);
    find_maxima(batch, block, scratch, maximum.get());
    for (int64_t m = 0; m < block.count; ++m) {
      if (!(sum_of_others(batch, block.offset + m) < kLargestSum)) {
        batch.state.reference.get()[block.offset + m] = maximum.get()[m];
      }
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
      const double upstream = double(p_.upstream[row]) / p_.temperature;
      batch.state.factor.get()[column] = Acc(-upstream / total);
      batch.state.coefficient.get()[column] = Acc(upstream * (others / total) * batch.state.slope.get()[column]);
    }
  }

  void finish_hidden(const Batch& batch, const Block& block, const Acc* sums, Scratch& scratch) {
    Acc* row = at_least(scratch.row, D_);
    for (int64_t m = 0; m < block.count; ++m) {
      const int64_t column = block.offset + m, index = batch.rows[block.first + m];
      row_kernels<Acc>(kernels_).widen(sums + m * ld_, D_, batch.state.factor.get()[column], row);
      row_kernels<In>(kernels_).add_scaled(weight_row(p_.targets[index]), D_, batch.state.coefficient.get()[column],
                                           row);
      row_kernels<Out>(kernels_).narrow(row, D_, Acc(1), p_.d_hidden + index * D_);
    }
  }

  // ---- a batch ----

  Batch make_batch(std::vector<int64_t> rows, bool gradient) {
    std::vector<Block> blocks = cut(rows.size(), tiling_.block, threads_);
    const int64_t columns = blocks.empty() ? 0 : blocks.back().offset + blocks.back().width;
    const int64_t slices =
        blocks.empty() ? 1
                       : std::min(ceil_div(threads_, blocks.size()), std::max<int64_t>(V_ / (4 * tiling_.panel), 1));
    return {std::move(rows), gradient, std::move(blocks), columns, slices, Rows(columns, slices)};
  }

  // Statistics and d hidden of a batch.
  void statistics(const Batch& batch) {
    const int64_t blocks = batch.blocks.size(), slices = batch.slices;
    const bool need_hidden = batch.gradient && p_.d_hidden;
    Buffer<Acc> partial;
    const int64_t part = tiling_.block * ld_;
    if (need_hidden && slices > 1) partial = Buffer<Acc>(blocks * slices * part);
    in_parallel(blocks, [&](int64_t i, Scratch&) { prepare(batch, batch.blocks[i]); });
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
      in_parallel(items.size(), [&](int64_t k, Scratch& scratch) {
        const int64_t i = items[k] / slices, slice = items[k] % slices;
        Acc* sums = !need_hidden ? nullptr
                    : slices > 1 ? partial.get() + items[k] * part
                                 : at_least(scratch.d_hidden, part);
        pass(batch, batch.blocks[i], slice, scratch, sums);
        if (slices == 1) whole(i, sums, scratch);
      });
      if (slices == 1) continue;
      in_parallel(items.size() / slices, [&](int64_t k, Scratch& scratch) {
        const int64_t i = items[k * slices] / slices, size = batch.blocks[i].count * ld_;
        Acc* sums = need_hidden ? partial.get() + i * slices * part : nullptr;
        for (int64_t slice = 1; need_hidden && slice < slices; ++slice) {
          row_kernels<Acc>(kernels_).add_scaled(sums + slice * part, size, Acc(1), sums);
        }
        whole(i, sums, scratch);
      });
    }
  }

  void forward_only() {
    if (!p_.forward_rows.empty()) statistics(make_batch(p_.forward_rows, false));
  }

  // ---- d weight ----

  void gradients() {
    const int64_t n = p_.gradient_rows.size();
    const bool need_weight = p_.d_weight || p_.d_bias;
    const int64_t chunk = need_weight ? rows_per_chunk(n) : n, chunks = ceil_div(n, std::max<int64_t>(chunk, 1));
    Buffer<Acc> sums;  // (V, D), of several chunks where d_weight itself cannot hold them
    if (p_.d_weight && chunks > 1 && !std::is_same_v<Acc, Out>) sums = Buffer<Acc>(V_ * D_);
    if (p_.d_bias) {
      d_bias_ = Buffer<Acc>(V_);
      std::fill(d_bias_.get(), d_bias_.get() + V_, Acc(0));
    }
    normalise();
    for (int64_t c = 0; c < chunks; ++c) {
      const auto begin = p_.gradient_rows.begin();
      Batch batch = make_batch({begin + n * c / chunks, begin + n * (c + 1) / chunks}, true);
      if (need_weight) keep(batch);
      statistics(batch);
      if (need_weight) weight_gradient(batch, sums.get(), c == 0, c + 1 == chunks);
    }
    if (n == 0 && p_.d_weight) std::fill(p_.d_weight, p_.d_weight + V_ * D_, Out{});
    if (p_.d_bias) row_kernels<Out>(kernels_).narrow(d_bias_.get(), V_, scale_, p_.d_bias);
  }

  // A power of 2 near the largest upstream gradient: products of 16-bit numbers flush what is below 1e-38 to 0.
  void normalise() {
    if (!kPairs) return;
    Acc largest = 0;
    for (int64_t row : p_.gradient_rows) {
      const Acc size = std::abs(p_.upstream[row]);
      if (std::isfinite(size)) largest = std::max(largest, size);
    }
    if (largest > 0) scale_ = std::ldexp(Acc(1), std::clamp(std::ilogb(largest), -120, 120));
  }

  int64_t bytes_per_row() const { return int64_t(sizeof(Mul)) * D_ * 2 + int64_t(sizeof(double)) * 6; }
  int64_t thread_bytes() const {
    return threads_ * (tiling_.block * D_ * int64_t(sizeof(Mul) + sizeof(Acc)) +
                       2 * tiling_.panel * D_ * int64_t(sizeof(Mul)) + tiling_.weight * D_ * int64_t(sizeof(Acc)));
  }

  // What may hold exponentials. Where the weight is of 16 bits, an fp32 accumulator of its gradient may be held too:
  // without one, that much more of the exponentials.
  int64_t budget(bool accumulator) const {
    if (p_.low_memory) return 0;
    const int64_t spare = sizeof(Out) < sizeof(Acc) && !accumulator ? V_ * D_ * int64_t(sizeof(Acc)) : 0;
    return std::max<int64_t>(p_.workspace + spare - thread_bytes(), 0);
  }

  // Products of 16-bit numbers are so cheap that logits are computed again sooner than sums are read and written once
  // more.
  int64_t rows_per_chunk(int64_t n) const {
    const int64_t row = V_ * int64_t(sizeof(Mul)),
                  operands = std::max<int64_t>(p_.workspace / 2 / bytes_per_row(), tiling_.block);
    if (kPairs || p_.low_memory || n * (row + bytes_per_row()) <= budget(false)) return std::min(n, operands);
    return std::clamp(budget(true) / (row + bytes_per_row()), tiling_.block, operands);
  }

  // Elements that the exponentials of the blocks before a column take, each block's from a cache line on.
  int64_t kept_elements(const Batch& batch, int64_t column) const {
    int64_t elements = 0;
    for (const Block& block : batch.blocks) {
      if (block.offset < column) elements += round_up((V_ + 1) * (block.width + 32), 64);
    }
    return elements;
  }

  // Memory for the operands of d weight, and for the exponentials of as many blocks as the budget allows.
  void keep(Batch& batch) {
    scaled_ = Buffer<Mul>(batch.columns * D_);
    const int64_t columns = (budget(p_.gradient_rows.size() > batch.rows.size()) - batch.columns * bytes_per_row()) /
                            (V_ * int64_t(sizeof(Mul)));
    for (const Block& block : batch.blocks) {
      if (block.offset + block.width > columns) break;
      batch.kept = block.offset + block.width;
    }
    batch.exponentials = std::make_unique<Retained>(kept_elements(batch, batch.kept) * sizeof(Mul));
    if (batch.kept == batch.columns) return;
    batch.packed = Buffer<Mul>((batch.columns - batch.kept) * D_);
    in_parallel(batch.blocks.size(), [&](int64_t i, Scratch& scratch) {
      const Block& block = batch.blocks[i];
      if (block.offset >= batch.kept)
        pack_hidden(batch, block, scratch, batch.packed.get() + (block.offset - batch.kept) * D_);
    });
  }

  // hidden times the rows' factors, as the second operand (columns, D) of d weight, in strips of the hidden size.
  void scale_hidden(const Batch& batch, const Block& block) {
    Acc* factors = batch.state.factor.get() + block.offset;
    for (int64_t m = 0; m < block.count; ++m) factors[m] /= scale_;
    for (int64_t n = 0; n < D_; n += tiling_.weight_columns) {
      const int64_t count = std::min(tiling_.weight_columns, D_ - n);
      Mul* strip = scaled_.get() + n * batch.columns + block.offset * count;
      for (int64_t m = 0; m < block.width; m += kPairs ? 2 : 1) {
        const auto row = [&](int64_t k) {
          return k < block.count ? hidden_row(batch.rows[block.first + k]) + n : nullptr;
        };
        if constexpr (kPairs) {
          kernels_.pair.interleave_scaled(row(m), factors[m], row(m + 1), factors[m + 1], count,
                                          reinterpret_cast<uint32_t*>(strip + m * count));
        } else if (row(m)) {
          row_kernels<In>(kernels_).widen(row(m), count, factors[m], strip + m * count);
        } else {
          std::fill(strip + m * count, strip + (m + 1) * count, Mul(0));
        }
      }
    }
  }

  // total (rows, D) (+)= E X, and d_bias, over columns from `offset` on, for tokens from v on.
  void add_to_weight(const Batch& batch, const Mul* tile, int64_t ld, int64_t v, int64_t rows, int64_t offset,
                     int64_t width, bool add, Acc* total) {
    for (int64_t n = 0; total && n < D_; n += tiling_.weight_columns) {
      const int64_t count = std::min(tiling_.weight_columns, D_ - n);
      const Mul* strip = scaled_.get() + n * batch.columns + offset * count;
      product_(rows, count, width, tile, ld, strip, count, total + n, ld_, add);
    }
    if (!p_.d_bias) return;
    const Acc* factors = batch.state.factor.get() + offset;
    if constexpr (kPairs)
      kernels_.pair.weighted_sums(tile, ld, rows, width, factors, d_bias_.get() + v);
    else
      tile_kernels().weighted_sums(tile, ld, rows, width, factors, d_bias_.get() + v);
  }

  void weight_gradient(const Batch& batch, Acc* sums, bool first, bool last) {
    std::vector<std::pair<int64_t, int64_t>> targets;  // (token, column), for the rows' own terms
    std::vector<int64_t> row_of(batch.columns);
    for (const Block& block : batch.blocks) {
      for (int64_t m = 0; m < block.count; ++m) {
        row_of[block.offset + m] = batch.rows[block.first + m];
        targets.emplace_back(p_.targets[row_of[block.offset + m]], block.offset + m);
      }
    }
    std::sort(targets.begin(), targets.end());
    in_parallel(batch.blocks.size(), [&](int64_t i, Scratch&) { scale_hidden(batch, batch.blocks[i]); });
    in_parallel(ceil_div(V_, tiling_.weight), [&](int64_t item, Scratch& scratch) {
      const int64_t v = item * tiling_.weight, rows = std::min(tiling_.weight, V_ - v);
      Acc* total = p_.d_weight ? at_least(scratch.d_weight, tiling_.weight * ld_) : nullptr;
      int64_t ld = 0, ld_tile = 0;
      const Mul* weight = batch.kept < batch.columns ? weight_operand(v, rows, scratch, &ld) : nullptr;
      for (const Block& block : batch.blocks) {
        Mul* tile = tile_of(batch, block, v, scratch, &ld_tile);
        if (block.offset >= batch.kept) {
          const Mul* hidden = packed_hidden(batch, block, scratch);
          panel(batch, block, hidden, v, rows, weight, ld, scratch, nullptr, tile, ld_tile, nullptr);
        }
        add_to_weight(batch, tile, ld_tile, v, rows, block.offset, block.width, block.offset > 0, total);
      }
      const auto from = std::lower_bound(targets.begin(), targets.end(), std::pair<int64_t, int64_t>(v, 0));
      for (auto it = from; it != targets.end() && it->first < v + rows; ++it) {
        const Acc coefficient = batch.state.coefficient.get()[it->second] / scale_;
        if (total) {
          row_kernels<In>(kernels_).add_scaled(hidden_row(row_of[it->second]), D_, coefficient,
                                               total + (it->first - v) * ld_);
        }
        if (p_.d_bias) d_bias_.get()[it->first] += coefficient;
      }
      for (int64_t i = 0; total && i < rows; ++i) store_weight(total + i * ld_, v + i, sums, first, last);
    });
  }

  // A row of d weight, of one chunk of several.
  void store_weight(const Acc* row, int64_t v, Acc* sums, bool first, bool last) {
    if constexpr (std::is_same_v<Acc, Out>) sums = p_.d_weight;
    Acc* sum = sums ? sums + v * D_ : nullptr;
    if (!first)
      row_kernels<Acc>(kernels_).add_scaled(row, D_, Acc(1), sum);
    else if (!last)
      row_kernels<Acc>(kernels_).widen(row, D_, Acc(1), sum);
    if (last && !(std::is_same_v<Acc, Out> && !first)) {
      row_kernels<Out>(kernels_).narrow(first ? row : sum, D_, scale_, p_.d_weight + v * D_);
    }
  }

  const HeadProblem<In, Out, Acc>& p_;
  const int64_t D_, V_, threads_;
  const Kernels& kernels_;
  const Product<Mul, Acc> product_;
  const Tiling tiling_;
  const int64_t ld_;  // of sums with D columns: a power of 2 apart, rows would share a set of the cache
  const Transform<Acc> transform_;
  Acc scale_ = 1;
  Buffer<Acc> bias_, d_bias_;
  Buffer<Mul> scaled_;
  std::vector<Scratch> scratch_;
};

}  // namespace

template <typename In, typename Out, typename Mul, typename Acc>
void run_head(const HeadProblem<In, Out, Acc>& problem) {
  Head<In, Out, Mul, Acc>(problem).run();
}

template void run_head<BFloat16, BFloat16, BFloat16>(const HeadProblem<BFloat16, BFloat16, float>&);
template void run_head<BFloat16, BFloat16, float>(const HeadProblem<BFloat16, BFloat16, float>&);
template void run_head<Float16, Float16, float>(const HeadProblem<Float16, Float16, float>&);
template void run_head<Float16, float, float>(const HeadProblem<Float16, float, float>&);
template void run_head<float, float, float>(const HeadProblem<float, float, float>&);
template void run_head<double, double, double>(const HeadProblem<double, double, double>&);

}  // namespace l3m::cpu
