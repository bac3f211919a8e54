// Which kernels and which products this machine runs.
#include <ATen/native/CPUBlas.h>
#ifdef L3M_X86
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace l3m::cpu {
namespace {

// Whether torch's brgemm takes this type here: it says so by an exception.
template <typename Number>
bool has_brgemm(bool pairs) {
  alignas(64) Number a[4] = {}, b[4] = {};
  alignas(64) float c[4] = {};
  try {
    at::native::cpublas::brgemm(2, 2, 2, 2, 2, 2, false, a, b, c, pairs);
    at::native::cpublas::brgemm_release(pairs);
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

Path choose() {
  Path best{&generic::table(), false, false, false, "generic"};
  const char* wanted = std::getenv("L3M_CPU");
  if (wanted && !*wanted) wanted = nullptr;
  std::string able = "generic";
  [[maybe_unused]] const auto offer = [&](bool runs, const Path& candidate) {
    if (!runs) return;
    able += std::string(", ") + candidate.name;
    if (!wanted || !std::strcmp(wanted, candidate.name)) best = candidate;
  };
#ifdef L3M_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  offer(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), {&avx2::table(), false, false, false, "avx2"});
  const bool tiles = avx512 && has_brgemm<float>(false);
  offer(avx512, {&avx512::table(), tiles, false, false, "avx512"});
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  const bool avx512_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  offer(tiles && (amx || avx512_bf16) && has_brgemm<at::BFloat16>(true),
        {&avx512::table(), true, true, amx, amx ? "amx" : "avx512_bf16"});
#endif
  if (wanted && std::strcmp(wanted, best.name)) {
    throw std::runtime_error(std::string("L3M_CPU must be one of ") + able + " on this machine, got " + wanted);
  }
  return best;
}

}  // namespace

const Path& path() {
  static const Path chosen = choose();
  return chosen;
}

}  // namespace l3m::cpu
