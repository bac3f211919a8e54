// The relaxed logarithmic barrier, once for C++ and CUDA C++ (arXiv 2410.21533; the derivation is in
// l3m_kernels/reference.py).
#pragma once

#ifdef __CUDACC__
#define L3M_HOST_DEVICE __host__ __device__
#else
#define L3M_HOST_DEVICE
#endif

namespace l3m {

// lambda = B'(z): mu / slack while the slack -z is at least s, linear in the violation beyond.
// The quotients stay apart: 1 / s^2 overflows first.
L3M_HOST_DEVICE inline double barrier_multiplier(double z, double mu, double s) {
  return z <= -s ? mu / -z : (mu / s) * ((z + 2.0 * s) / s);
}

}  // namespace l3m
