// peftk._C: importing it registers the operators of every family. Nothing here takes a tensor.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "cpu/simd.h"
#include "unchanged.h"
#include "wide_product.h"

#define PEFTK_STRING(x) #x
#define PEFTK_QUOTED(x) PEFTK_STRING(x)

namespace {

std::string cpu_capability() {
  switch (peftk::cpu_level()) {
    case peftk::CpuLevel::avx512: return "avx512";
    case peftk::CpuLevel::avx2: return "avx2";
    default: return "base";
  }
}

// Of what is no x86 nothing is known, so that torch's library is trusted to be the faster one.
bool multiplies_bfloat16() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return peftk::wide_instructions() || __builtin_cpu_supports("avx512bf16");
#else
  return true;
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = PEFTK_QUOTED(PEFTK_VERSION);
  info["torch"] = PEFTK_QUOTED(PEFTK_TORCH_VERSION);
  info["compiler"] = __VERSION__;
  pybind11::list architectures;
#ifdef PEFTK_CUDA
  // As in TORCH_CUDA_ARCH_LIST: "8.0", "9.0a", "10.0+PTX".
  std::istringstream listed(PEFTK_QUOTED(PEFTK_CUDA));
  for (std::string one; listed >> one;) architectures.append(one);
#endif
  info["cuda_architectures"] = architectures;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of peftk.";
  m.def("build_info", &build_info, "What the extension was built from: peftk and torch version, compiler, CUDA.");
  m.def("cpu_capability", &cpu_capability, "The instruction set that the CPU kernels use here: base, avx2 or avx512.");
  m.def("has_bfloat16_tiles", &peftk::wide_instructions,
        "Whether products of bfloat16 matrices run on matrix instructions (AMX) here.");
  m.def("multiplies_bfloat16", &multiplies_bfloat16,
        "Whether the CPU may have instructions that multiply bfloat16 numbers (AMX, AVX-512 BF16).");
  peftk::define_unchanged(m);
}
