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

#ifdef L3M_X86
// Whether a CPU that has AVX512_BF16, and no AMX that can be seen, multiplies bf16 sooner than widened to fp32.
//
// AMD's do. Zen 4, `L3M_CPU=... l3ms bench --shape 1536,768,12565 --masked 0 --threads 1`, GFLOP/s: 206 in bf16, 105 widened
// (so is fp16 always), 106 in fp32. oneDNN's products reach 225 of the 233 that vdpbf16ps allows, and are 94% of the time.
//
// Intel's since Sapphire Rapids do not: they have AMX for bf16, which a hypervisor may hide, and vdpbf16ps at half the rate
// of fp32 (github.com/libxsmm/tpp-mlir/pull/1025). Two cores without AMX, by their rates of this kind, took 2.17 s in bf16 and
// 1.47 in fp32 for n = 1536, D = 768, V = 50257; widening takes 0.57 of the former. Cooper Lake, the first with AVX512_BF16,
// was made without AMX and is said to have the full rate.
//
// Told by the maker and not timed: the same machine must give the same bits each time.
bool bfloat16_is_fast() {
  unsigned a = 0, maker = 0, c = 0, d = 0, signature = 0;
  __cpuid(0, a, maker, c, d);
  if (maker != signature_INTEL_ebx) return true;
  __cpuid(1, signature, a, c, d);
  const unsigned model = (signature >> 4 & 0xf) | (signature >> 12 & 0xf0);
  constexpr unsigned kCooperLake = 0x55;
  return model == kCooperLake;
}
#endif

Path choose() {
  Path best{&generic::table(), false, false, false, "generic"};
  const char* wanted = std::getenv("L3M_CPU");
  if (wanted && !*wanted) wanted = nullptr;
  std::string able = "generic";
  // In the order of their speed; one that `runs` and is not `fast` is taken only where it is wanted.
  [[maybe_unused]] const auto offer = [&](bool runs, bool fast, const Path& candidate) {
    if (!runs) return;
    able += std::string(", ") + candidate.name;
    if (wanted ? !std::strcmp(wanted, candidate.name) : fast) best = candidate;
  };
#ifdef L3M_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  offer(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), true,
        {&avx2::table(), false, false, false, "avx2"});
  const bool tiles = avx512 && has_brgemm<float>(false);
  offer(avx512, true, {&avx512::table(), tiles, false, false, "avx512"});
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  const bool avx512_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  offer(tiles && (amx || avx512_bf16) && has_brgemm<at::BFloat16>(true), amx || bfloat16_is_fast(),
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
