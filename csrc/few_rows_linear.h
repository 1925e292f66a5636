// A frozen linear layer on few rows, with what a family has computed for them added in the same pass over the weight.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "dtype.h"

namespace peftk {

using torch::stable::Tensor;

// The sizes of a call that can be one pass over the weight.
struct FewRowsSizes {
  int64_t rows, depth, columns;
  Dtype dtype;
};

// Nothing for more rows than `most`, and for what is of another dtype, shape or layout than the kernels take.
std::optional<FewRowsSizes> few_rows_sizes(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           int64_t most);
// x @ weight.T + added + bias, for such sizes; nothing where all of `added`, (rows, columns), is zero: the output is
// that of the frozen layer then, whose bits only the library's own product has.
std::optional<Tensor> few_rows_linear(const FewRowsSizes& sizes, const Tensor& x, const Tensor& weight,
                                      const std::optional<Tensor>& bias, const float* added);
// Whether a tensor holds floats of so many dimensions, one behind the other, and at least one.
bool are_factors(const Tensor& t, int64_t dimensions);

}  // namespace peftk
