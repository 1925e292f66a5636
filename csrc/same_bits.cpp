// Whether two tensors hold the same bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "check.h"

namespace peftk {
namespace {

bool same_bits(const Tensor& a, const Tensor& b) {
  check_dense(a, "a");
  check_dense(b, "b");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "b: expected the dtype of a");
  if (a.numel() != b.numel()) return false;
  return std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.numel() * a.element_size()) == 0;
}

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) { m.def("same_bits(Tensor a, Tensor b) -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) { m.impl("same_bits", TORCH_BOX(&peftk::same_bits)); }
