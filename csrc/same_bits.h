// Whether a tensor holds the bits that it had before.
#pragma once
#include <torch/csrc/stable/tensor.h>

namespace peftk {

// `kept` is a copy of what the source was, or the checksums of a source that is larger, from `piece_sums`. False also
// for a source whose bits cannot be read where they lie.
bool same_bits(const torch::stable::Tensor& source, const torch::stable::Tensor& kept);

}  // namespace peftk
