#include "cayley.h"

#include <torch/csrc/stable/library.h>

#include "check.h"
#include "host.h"
#ifdef PEFTK_CUDA
#include "cuda_stream.h"
#endif

namespace peftk {
namespace {

// Return whether the source is square matrices.
bool check_source(const Tensor& source, int64_t count, int64_t size, Place place) {
  check_float(source, "source", place);
  const bool square = source.dim() == 3;
  const bool fits = square ? source.size(1) == size && source.size(2) == size
                           : source.dim() == 2 && source.size(1) == size * (size - 1) / 2;
  STD_TORCH_CHECK(size >= 1 && fits && source.size(0) == count,
                  "source: expected shape (nb, b * (b - 1) / 2) or (nb, b, b)");
  return square;
}

void check_exact(int64_t terms, int64_t size) {
  STD_TORCH_CHECK(terms > 0 || size <= kExactCayleySize, "block_size: expected at most ", kExactCayleySize,
                  " for the exact transform; got ", size);
}

#ifdef PEFTK_CUDA
void check_no_series(int64_t terms) {
  STD_TORCH_CHECK(terms == 0, "polynomial: expected none on CUDA, where only the exact transform is; got ", terms,
                  " coefficients");
}
#endif

CayleyParams check_forward(const Tensor& source, int64_t block_size,
                           torch::headeronly::HeaderOnlyArrayRef<double> polynomial, Tensor& out, Place place) {
  check_float(out, "out", place);
  check_same_device(out, "out", source, "source");
  STD_TORCH_CHECK(block_size >= 1, "block_size: expected a positive integer; got ", block_size);
  const int64_t terms = static_cast<int64_t>(polynomial.size());
  const int64_t count = out.numel() / (block_size * block_size);
  STD_TORCH_CHECK(out.numel() == count * block_size * block_size, "out: expected shape (nb, b, b)");
  const bool square = check_source(source, count, block_size, place);
  check_exact(terms, block_size);
  return {floats(source), polynomial.data(), terms, block_size, writable(out), square};
}

CayleyBackwardParams check_backward(const Tensor& grad, const Tensor& source, const Tensor& blocks,
                                    torch::headeronly::HeaderOnlyArrayRef<double> polynomial, Tensor& out,
                                    Place place) {
  check_float(blocks, "blocks", place);
  STD_TORCH_CHECK(blocks.dim() == 3 && blocks.size(1) == blocks.size(2), "blocks: expected shape (nb, b, b)");
  const bool square = check_source(source, blocks.size(0), blocks.size(1), place);
  check_same_device(source, "source", blocks, "blocks");
  check_like(grad, "grad", blocks, "blocks", place);
  check_like(out, "out", source, "source", place);
  return {floats(grad),   floats(source), floats(blocks), polynomial.data(), static_cast<int64_t>(polynomial.size()),
          blocks.size(1), writable(out),  square};
}

// Blocks for each task: about 100,000 multiplications.
int64_t grain(int64_t size) { return 1 + 100000 / (size * size * size); }

void cayley(const Tensor& source, int64_t block_size, torch::headeronly::HeaderOnlyArrayRef<double> polynomial,
            Tensor& out) {
  const CayleyParams p = check_forward(source, block_size, polynomial, out, Place::cpu);
  parallel_for(0, source.size(0), grain(block_size), [&](int64_t begin, int64_t end) { cayley_cpu(p, begin, end); });
}

void cayley_backward(const Tensor& grad, const Tensor& source, const Tensor& blocks,
                     torch::headeronly::HeaderOnlyArrayRef<double> polynomial, Tensor& out) {
  const CayleyBackwardParams p = check_backward(grad, source, blocks, polynomial, out, Place::cpu);
  parallel_for(0, source.size(0), grain(p.size),
               [&](int64_t begin, int64_t end) { cayley_backward_cpu(p, begin, end); });
}

#ifdef PEFTK_CUDA

void cayley_on_cuda(const Tensor& source, int64_t block_size, torch::headeronly::HeaderOnlyArrayRef<double> polynomial,
                    Tensor& out) {
  const CayleyParams p = check_forward(source, block_size, polynomial, out, Place::cuda);
  check_no_series(p.terms);
  const CudaStream stream(source);
  cayley_cuda(p, source.size(0), stream.get());
}

void cayley_backward_on_cuda(const Tensor& grad, const Tensor& source, const Tensor& blocks,
                             torch::headeronly::HeaderOnlyArrayRef<double> polynomial, Tensor& out) {
  const CayleyBackwardParams p = check_backward(grad, source, blocks, polynomial, out, Place::cuda);
  check_no_series(p.terms);
  check_exact(p.terms, p.size);
  const CudaStream stream(source);
  cayley_backward_cuda(p, source.size(0), stream.get());
}

#endif

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("cayley(Tensor source, int block_size, float[] polynomial, Tensor(a!) out) -> ()");
  m.def("cayley_backward(Tensor grad, Tensor source, Tensor blocks, float[] polynomial, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("cayley", TORCH_BOX(&peftk::cayley));
  m.impl("cayley_backward", TORCH_BOX(&peftk::cayley_backward));
}

#ifdef PEFTK_CUDA
STABLE_TORCH_LIBRARY_IMPL(peftk_native, CUDA, m) {
  m.impl("cayley", TORCH_BOX(&peftk::cayley_on_cuda));
  m.impl("cayley_backward", TORCH_BOX(&peftk::cayley_backward_on_cuda));
}
#endif
