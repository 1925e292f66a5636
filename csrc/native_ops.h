// The operators of the namespace peftk_native. Python allocates every result; a result of no elements is not wanted.
#pragma once
#include <torch/csrc/stable/tensor.h>

namespace peftk {

using torch::stable::Tensor;

void block_rotate(const Tensor& x, const Tensor& blocks, bool transpose, Tensor& out);
void block_rotate_backward(const Tensor& grad, const Tensor& x, const Tensor& blocks, bool transpose, Tensor& dx,
                           Tensor& dblocks);

}  // namespace peftk
