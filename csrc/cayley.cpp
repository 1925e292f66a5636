#include "cayley.h"

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "native_ops.h"

namespace peftk {
namespace {

void check_triangles(const Tensor& packed, int64_t count, int64_t size) {
  check_float(packed, "packed");
  STD_TORCH_CHECK(size >= 1 && packed.dim() == 2 && packed.size(0) == count && packed.size(1) == size * (size - 1) / 2,
                  "packed: expected shape (nb, b * (b - 1) / 2)");
}

void check_exact(int64_t terms, int64_t size) {
  STD_TORCH_CHECK(terms > 0 || size <= kExactCayleySize, "block_size: expected at most ", kExactCayleySize,
                  " for the exact transform; got ", size);
}

// Blocks for each task: about 100,000 multiplications.
int64_t grain(int64_t size) { return 1 + 100000 / (size * size * size); }

}  // namespace

void cayley(const Tensor& packed, int64_t block_size, torch::headeronly::HeaderOnlyArrayRef<double> polynomial,
            Tensor& out) {
  check_float(out, "out");
  STD_TORCH_CHECK(block_size >= 1, "block_size: expected a positive integer; got ", block_size);
  const int64_t terms = static_cast<int64_t>(polynomial.size());
  const int64_t count = out.numel() / (block_size * block_size);
  STD_TORCH_CHECK(out.numel() == count * block_size * block_size, "out: expected shape (nb, b, b)");
  check_triangles(packed, count, block_size);
  check_exact(terms, block_size);
  const CayleyParams p{packed.const_data_ptr<float>(), polynomial.data(), terms, block_size,
                       static_cast<float*>(out.mutable_data_ptr())};
  torch::stable::parallel_for(0, count, grain(block_size),
                              [&](int64_t begin, int64_t end) { cayley_cpu(p, begin, end); });
}

void cayley_backward(const Tensor& grad, const Tensor& packed, const Tensor& blocks,
                     torch::headeronly::HeaderOnlyArrayRef<double> polynomial, Tensor& out) {
  check_float(blocks, "blocks");
  STD_TORCH_CHECK(blocks.dim() == 3 && blocks.size(1) == blocks.size(2), "blocks: expected shape (nb, b, b)");
  const int64_t terms = static_cast<int64_t>(polynomial.size()), count = blocks.size(0), size = blocks.size(1);
  check_triangles(packed, count, size);
  check_like(grad, "grad", blocks, "blocks");
  check_like(out, "out", packed, "packed");
  const CayleyBackwardParams p{grad.const_data_ptr<float>(),
                               packed.const_data_ptr<float>(),
                               blocks.const_data_ptr<float>(),
                               polynomial.data(),
                               terms,
                               size,
                               static_cast<float*>(out.mutable_data_ptr())};
  torch::stable::parallel_for(0, count, grain(size),
                              [&](int64_t begin, int64_t end) { cayley_backward_cpu(p, begin, end); });
}

}  // namespace peftk
