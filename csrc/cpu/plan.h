// How a batch is cut into tiles that fit the caches, and rows into chunks that fit the workspace.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace l3m::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

// Asks for huge pages: a fault on each of many small ones costs as much as the work on it (65 MB of a gradient: 27 ms against 12).
inline void prefer_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Uninitialised memory on a cache line; in huge pages where it is large, since a page fault costs as much as the work on a page.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    constexpr size_t kHuge = size_t(2) << 20;
    const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T), line = bytes < (32 << 10) ? 64 : kHuge;
    data_.reset(static_cast<T*>(std::aligned_alloc(line, (bytes + line - 1) / line * line)));
    if (!data_) throw std::bad_alloc();
#ifdef __linux__
    if (line == kHuge) madvise(data_.get(), (bytes + kHuge - 1) / kHuge * kHuge, MADV_HUGEPAGE);
#endif
  }
  T* get() const { return data_.get(); }
  explicit operator bool() const { return static_cast<bool>(data_); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// Sizes of tiles for a hidden size: what one thread holds should stay in its second-level cache (2 MiB where this was measured).
struct Tiling {
  int64_t block;      // rows of the batch
  int64_t panel;      // rows of the vocabulary between two products into d hidden
  int64_t strip;      // of them in one product of logits
  int64_t weight;     // rows of the vocabulary whose d weight is summed up at a time
  int64_t columns;    // of the hidden size in one product into d hidden
  int64_t weight_columns;  // and into d weight
  Tiling(int64_t hidden_size, int64_t operand_bytes, int64_t acc_bytes);
};

inline int64_t environment_or(const char* name, int64_t value) {
  const char* text = std::getenv(name);
  return text ? std::atoll(text) : value;
}

inline Tiling::Tiling(int64_t hidden_size, int64_t operand_bytes, int64_t acc_bytes) {
  const int64_t D = std::max<int64_t>(hidden_size, 1);
  const auto fit = [](int64_t bytes, int64_t per_row, int64_t least, int64_t most) {
    return std::clamp(bytes / per_row / 16 * 16, least, most);
  };
  block = environment_or("L3M_BLOCK", fit(1024 << 10, D * operand_bytes, 32, 512));
  panel = environment_or("L3M_PANEL", 512);
  strip = environment_or("L3M_STRIP", 64);
  weight = environment_or("L3M_WEIGHT", fit(1024 << 10, D * acc_bytes, 32, 256));
  columns = environment_or("L3M_COLUMNS", 64);
  weight_columns = environment_or("L3M_WCOLUMNS", 256);
}

// A batch's rows that go through the vocabulary together.
struct Block {
  int64_t first, count;  // of the list of rows
  int64_t width;         // columns of its tiles: count rounded up to 16
  int64_t offset;        // of its columns among all blocks'
};

// Blocks of nearly equal size, as many as keep all threads busy.
inline std::vector<Block> cut(int64_t first, int64_t rows, int64_t most, int64_t threads) {
  std::vector<Block> blocks;
  if (rows == 0) return blocks;
  const int64_t units = ceil_div(rows, 16);
  int64_t count = ceil_div(rows, most);
  if (rows >= 64 * threads) count = round_up(count, threads);
  count = std::min(count, units);
  int64_t offset = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = std::min(units * i / count * 16, rows), end = std::min(units * (i + 1) / count * 16, rows);
    blocks.push_back({first + begin, end - begin, round_up(end - begin, 16), offset});
    offset += blocks.back().width;
  }
  return blocks;
}

}  // namespace l3m::cpu
