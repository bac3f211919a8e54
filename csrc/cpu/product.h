// Products of tiles, C (+)= A B, by a library: oneDNN's brgemm through torch where the machine has it, else torch's
// BLAS. Called from within a parallel region: each product runs on the thread that asks for it.
#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"

namespace l3m::cpu {

// A (m, k), B (k, n) and C (m, n) are row-major; B's 16-bit numbers in words of two consecutive k (k is then even).
template <typename Number, typename Acc>
class Product {
 public:
  Product(bool brgemm, bool amx) : brgemm_(brgemm), amx_(amx) {}

  void operator()(int64_t m, int64_t n, int64_t k, const Number* a, int64_t lda, const Number* b, int64_t ldb, Acc* c,
                  int64_t ldc, bool add) const {
    if (m == 0 || n == 0) return;
    if (k == 0) {
      for (int64_t i = 0; i < m && !add; ++i) std::fill(c + i * ldc, c + i * ldc + n, Acc(0));
      return;
    }
    if constexpr (std::is_same_v<Number, BFloat16>) {
      in_parts(amx_ ? k : 256, k, [&](int64_t at, int64_t size) {
        at::native::cpublas::brgemm(m, n, size, lda, ldb, ldc, add || at > 0,
                                    reinterpret_cast<const at::BFloat16*>(a) + at,
                                    reinterpret_cast<const at::BFloat16*>(b) + at * ldb, c, true);
      });
      return;
    } else if constexpr (std::is_same_v<Number, float>) {
      if (brgemm_) {
        in_parts(128, k, [&](int64_t at, int64_t size) {
          at::native::cpublas::brgemm(m, n, size, lda, ldb, ldc, add || at > 0, a + at, b + at * ldb, c, false);
        });
        return;
      }
    }
    if constexpr (!std::is_same_v<Number, BFloat16>) {
      const auto tensor = [](const Acc* data, int64_t rows, int64_t columns, int64_t ld) {
        return at::from_blob(const_cast<Acc*>(data), {rows, columns}, {ld, 1}, at::CppTypeToScalarType<Acc>::value);
      };
      at::Tensor result = tensor(c, m, n, ldc);
      if (add) {
        at::addmm_out(result, result, tensor(a, m, k, lda), tensor(b, k, n, ldb));
      } else {
        at::mm_out(result, tensor(a, m, k, lda), tensor(b, k, n, ldb));
      }
    }
  }

 private:
  // brgemm adds up all of k in one register. Its error is that of a chain of k sums: at k = 4096, where logits are
  // large, 7 to 9 times that of torch's product, which cuts it. So are the sums here, into equal parts of at most
  // `most`, each from 0 and then added to C: 0.7 to 1.1 times that error, and 5 to 12% faster.
  // (`python bench/accuracy.py`) On AMX parts were not measured, and k is one chain.
  template <typename Part>
  static void in_parts(int64_t most, int64_t k, const Part& part) {
    const int64_t count = (k + most - 1) / most;
    const int64_t size = ((k + count - 1) / count + 31) / 32 * 32;
    for (int64_t at = 0; at < k; at += size) part(at, std::min(size, k - at));
  }

  bool brgemm_;
  bool amx_;
};

// What a thread needs around its products.
template <typename Number>
class ProductThread {
 public:
  ~ProductThread() { at::native::cpublas::brgemm_release(std::is_same_v<Number, BFloat16>); }

 private:
  at::AutoDispatchBelowADInplaceOrView no_autograd_;
};

}  // namespace l3m::cpu
