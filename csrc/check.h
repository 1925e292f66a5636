// What every host function checks before it hands out raw pointers. Python has checked the user's arguments with
// better words; these guard the raw operators.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "dtype.h"

namespace peftk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where the kernels of a host function run.
enum class Place { cpu, cuda };

inline void check_dense(const Tensor& t, const char* name, Place place = Place::cpu) {
  STD_TORCH_CHECK(place == Place::cpu ? t.is_cpu() : t.is_cuda(), name, ": expected a ",
                  place == Place::cpu ? "CPU" : "CUDA", " tensor");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_float(const Tensor& t, const char* name, Place place = Place::cpu) {
  check_dense(t, name, place);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected dtype float32");
}

inline Dtype check_dtype(const Tensor& t, const char* name, Place place = Place::cpu) {
  check_dense(t, name, place);
  if (t.scalar_type() == ScalarType::Float) return Dtype::float32;
  if (place == Place::cuda && t.scalar_type() == ScalarType::Half) return Dtype::float16;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, name, ": expected dtype float32 or bfloat16",
                  place == Place::cuda ? " or float16" : "");
  return Dtype::bfloat16;
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(!like.is_cuda() || t.get_device_index() == like.get_device_index(), name, ": expected the device of ",
                  like_name);
}

inline void check_like(const Tensor& t, const char* name, const Tensor& like, const char* like_name,
                       Place place = Place::cpu) {
  check_dense(t, name, place);
  check_same_device(t, name, like, like_name);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of ", like_name);
  STD_TORCH_CHECK(t.numel() == like.numel(), name, ": expected ", like.numel(), " elements, as ", like_name,
                  " has; got ", t.numel());
}

}  // namespace peftk
