// What every host function checks before it hands out raw pointers. Python has checked the user's arguments with
// better words; these guard the raw operators.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/simd.h"

namespace peftk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_dense(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_float(const Tensor& t, const char* name) {
  check_dense(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected dtype float32");
}

inline Dtype check_dtype(const Tensor& t, const char* name) {
  check_dense(t, name);
  if (t.scalar_type() == ScalarType::Float) return Dtype::float32;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, name, ": expected dtype float32 or bfloat16");
  return Dtype::bfloat16;
}

inline void check_like(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_dense(t, name);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of ", like_name);
  STD_TORCH_CHECK(t.numel() == like.numel(), name, ": expected ", like.numel(), " elements, as ", like_name,
                  " has; got ", t.numel());
}

}  // namespace peftk
