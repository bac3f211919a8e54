// The Python module `l3m_kernels._C`: importing it registers the ops of ops.cpp; build_info() says how it was compiled.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/kernels.h"
#include "cpu/plan.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = L3M_COMPILER;
  info["cpp_standard"] = __cplusplus / 100 % 100;
  info["cxx11_abi"] = static_cast<bool>(_GLIBCXX_USE_CXX11_ABI);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of l3m_kernels, reached through torch.ops.l3m_kernels.";
  m.def(
      "cpu_path", [] { return l3m::cpu::path().name; },
      "What the head runs on: generic, avx2, avx512, avx512_bf16 or amx; L3M_CPU names another.");
  m.def("release_workspace", &l3m::cpu::Shelves::release,
        "Gives back the memory that is kept from one call of the head to the next.");
  m.def("build_info", &build_info, "What this module was compiled with: torch, compiler, cpp_standard, cxx11_abi.");
}
