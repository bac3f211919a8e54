// What the passes over a batch share: the rows that go through together, and the memory of a thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/plan.h"

namespace l3m::cpu {

template <typename Acc>
struct RowState {  // per column of the blocks
  RowState(int64_t count, int64_t slices)
      : target_logit(count),
        slope(count),
        others(count * slices),
        reference(count),
        factor(count),
        coefficient(count) {}
  Buffer<double> target_logit, slope;
  Buffer<double> others;  // (slices, columns) sums of the exponentials of all but the target
  Buffer<Acc> reference;
  Buffer<Acc> factor;       // -u / (S temperature scale): of the exponentials
  Buffer<Acc> coefficient;  // u (1 - p_t) / (temperature scale), times the softcap's slope: of the target
};

template <typename Mul, typename Acc>
struct Batch {
  std::vector<int64_t> rows;  // of the caller's
  bool gradient;
  Acc scale;  // a power of 2 that is taken out of the upstream gradients
  std::vector<Block> blocks;
  int64_t columns, slices;
  RowState<Acc> state;
  // For d weight:
  int64_t kept = 0;             // columns, of the first blocks, whose exponentials are kept
  Mul* exponentials = nullptr;  // (V, width) of each of these blocks
  Buffer<Mul> packed{};         // hidden as an operand, of the other blocks: their exponentials are computed again
  Buffer<Mul> scaled{};         // hidden times the rows' factors (columns, D), in strips of the hidden size
};

template <typename Mul, typename Acc>
struct Scratch {  // of one thread, each of one size for all its uses
  Buffer<Mul> packed, by_vocabulary, by_row, weight;
  Buffer<Acc> tile, sums, d_hidden, d_weight, row, gathered;
  Buffer<uint32_t> pairs, gathered_pairs;
};

// The memory of a buffer that is allocated when it is first needed; `count` is the same each time.
template <typename T>
T* at_least(Buffer<T>& buffer, int64_t count) {
  if (!buffer) buffer = Buffer<T>(count);
  return buffer.get();
}

}  // namespace l3m::cpu
