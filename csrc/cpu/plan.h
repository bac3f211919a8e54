// How a batch is cut into tiles that fit the caches, and memory for what is kept of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace l3m::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

inline constexpr size_t kHugePage = size_t(2) << 20;

// A fault on each of many small pages costs more than the work on it:
// 65 MB of a gradient take 27 ms to write in small ones, 16 in huge ones (one thread).
inline void prefer_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Uninitialised memory, aligned to a cache line, or to a huge page where it is large.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T),
                 line = bytes < kHugePage ? 64 : kHugePage;
    const size_t rounded = (bytes + 63) / 64 * 64;
    void* data = nullptr;
    if (posix_memalign(&data, line, rounded)) throw std::bad_alloc();
    data_.reset(static_cast<T*>(data));
    prefer_huge_pages(data, rounded);
  }
  T* get() const { return data_.get(); }
  explicit operator bool() const { return static_cast<bool>(data_); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

struct Memory {
  Buffer<char> buffer;
  size_t bytes = 0;
};

// One freed piece of memory that waits for the next call. Fresh pages are zeroed, and in a virtual machine given back
// to the host when they are free: the first touch of them took 150 of 1,210 ms in
// `l3ms bench --shape 2048,1024,32000 --dtype fp32`.
class Shelf {
 public:
  // At least so many bytes; at most twice as many where the piece may stay with the caller.
  Memory take(size_t bytes, bool stays) {
    const std::lock_guard lock(guard_);
    if (memory_.bytes >= bytes && (!stays || memory_.bytes / 2 <= bytes)) return std::exchange(memory_, {});
    if (!stays) memory_ = {};  // too small: it would be held beside its successor, and then be dropped
    return {Buffer<char>(static_cast<int64_t>(bytes)), bytes};
  }
  void give(Memory memory, bool if_larger) {
    const std::lock_guard lock(guard_);
    if (!if_larger || memory.bytes > memory_.bytes) std::swap(memory_, memory);
  }
  void release() {
    const std::lock_guard lock(guard_);
    memory_ = {};
  }

 private:
  std::mutex guard_;
  Memory memory_;
};

// Never destroyed: a tensor may outlive whatever is static.
struct Shelves {
  Shelf exponentials, d_hidden, d_weight;

  static Shelves& all() {
    static Shelves* shelves = new Shelves;
    return *shelves;
  }
  static void release() {
    for (Shelf* shelf : {&all().exponentials, &all().d_hidden, &all().d_weight}) shelf->release();
#ifdef __GLIBC__
    malloc_trim(0);  // tiles that were freed: up to 18 MiB stayed with the heaps of the threads
#endif
  }
};

// Memory of a batch's exponentials, for the duration of a call.
class Retained {
 public:
  explicit Retained(size_t bytes) {
    if (bytes) memory_ = Shelves::all().exponentials.take(bytes, false);
  }
  ~Retained() { Shelves::all().exponentials.give(std::move(memory_), true); }
  Retained(const Retained&) = delete;
  Retained& operator=(const Retained&) = delete;
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.buffer.get());
  }

 private:
  Memory memory_;
};

// Sizes of tiles. Measured on a core with AMX and 2 MiB of second-level cache, D = 1024, V = 32000, one thread.
struct Tiling {
  int64_t block;           // rows of the batch that go through the vocabulary together
  int64_t panel;           // rows of the vocabulary in one product into d hidden
  int64_t strip;           // of them in one product of logits: the tile of fp32 stays in the nearest cache
  int64_t columns;         // of the hidden size in one product into d hidden: a strip of the weight stays there too
  int64_t weight;          // rows of the vocabulary whose d weight is summed up at a time
  int64_t weight_columns;  // of the hidden size in one product into d weight

  Tiling(int64_t hidden_size, int64_t operand_bytes, int64_t acc_bytes) {
    const int64_t D = std::max<int64_t>(hidden_size, 1);
    const auto fit = [](int64_t bytes, int64_t per_row, int64_t least, int64_t most) {
      return std::clamp(bytes / per_row / 16 * 16, least, most);
    };
    // Products of 16-bit numbers are so fast that reading the weight from memory once per block limits them: blocks of
    // 512, 256 and 192 rows give the logits in 95, 106 and 128 ms.
    // fp32, both threads, forward and backward of 2048 rows, of which 92% are products: 1.13-1.19 s with blocks of 160
    // and 208 rows, 1.23-1.25 with 128, 1.15-1.27 with 256.
    const bool fast = operand_bytes == 2;
    block = fit(fast ? 1024 << 10 : 640 << 10, D * operand_bytes, 32, fast ? 512 : 160);
    panel = fast ? 512 : 128;
    strip = 64;
    columns = 64;
    weight = fit(1024 << 10, D * acc_bytes, 32, 256);
    weight_columns = 256;
  }
};

// Rows of a batch that go through the vocabulary together.
struct Block {
  int64_t first, count;  // of the list of rows
  int64_t width;         // columns of its tiles: count rounded up to 16
  int64_t offset;        // of its columns among all blocks'
};

// Blocks of nearly equal size, as many as keep all threads busy.
inline std::vector<Block> cut(int64_t rows, int64_t most, int64_t threads) {
  std::vector<Block> blocks;
  if (rows == 0) return blocks;
  const int64_t units = ceil_div(rows, 16);
  int64_t count = ceil_div(rows, most);
  if (rows >= 64 * threads) count = round_up(count, threads);
  count = std::min(count, units);
  int64_t offset = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = std::min(units * i / count * 16, rows), end = std::min(units * (i + 1) / count * 16, rows);
    blocks.push_back({begin, end - begin, round_up(end - begin, 16), offset});
    offset += blocks.back().width;
  }
  return blocks;
}

}  // namespace l3m::cpu
