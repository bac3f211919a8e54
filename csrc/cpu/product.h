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

// A (m, k) row-major; B (k, n) row-major, its 16-bit numbers in words of two consecutive k (k is then even); C (m, n)
// row-major.
template <typename Number, typename Acc>
class Product {
 public:
  explicit Product(bool brgemm) : brgemm_(brgemm) {}

  void operator()(int64_t m, int64_t n, int64_t k, const Number* a, int64_t lda, const Number* b, int64_t ldb, Acc* c,
                  int64_t ldc, bool add) const {
    if (m == 0 || n == 0) return;
    if (k == 0) {
      for (int64_t i = 0; i < m && !add; ++i) std::fill(c + i * ldc, c + i * ldc + n, Acc(0));
      return;
    }
    if constexpr (std::is_same_v<Number, BFloat16>) {
      at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                                  reinterpret_cast<const at::BFloat16*>(b), c, true);
      return;
    } else if constexpr (std::is_same_v<Number, float>) {
      if (brgemm_) {
        at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
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
  bool brgemm_;
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
