#include "block_diagonal.h"

#include <torch/csrc/stable/library.h>

#include <memory>

#include "check.h"
#include "cpu/simd.h"
#include "host.h"
#ifdef PEFTK_CUDA
#include "cuda_stream.h"
#endif

namespace peftk {
namespace {

struct Sizes {
  int64_t rows, count, size;
};

// One shared block: every block of every row is a row of its own.
Sizes check_blocks(const Tensor& x, const Tensor& blocks, Place place = Place::cpu) {
  check_float(blocks, "blocks", place);
  check_same_device(blocks, "blocks", x, "x");
  STD_TORCH_CHECK(blocks.dim() == 3 && blocks.size(1) == blocks.size(2) && blocks.numel() > 0,
                  "blocks: expected shape (nb, b, b)");
  const int64_t count = blocks.size(0), size = blocks.size(1), features = count * size;
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % size == 0 && x.numel() % features == 0 &&
                      (count == 1 || x.size(x.dim() - 1) == features),
                  "x: expected (..., nb * b) = (..., ", features, ")");
  return {x.numel() / features, count, size};
}

Sizes check_cpu_blocks(const Tensor& x, const Tensor& blocks) {
  const Sizes s = check_blocks(x, blocks);
  STD_TORCH_CHECK(s.size <= kCpuRotateSize, "blocks: expected a block size of at most ", kCpuRotateSize, "; got ",
                  s.size);
  return s;
}

// Enough tasks for many cores, from the shape alone: the bits must not depend on the number of threads.
int64_t row_chunks(const Sizes& s) {
  const int64_t wanted = (64 + s.count - 1) / s.count, possible = (s.rows + 255) / 256;
  return wanted < possible ? wanted : (possible > 0 ? possible : 1);
}

// Blocks as the kernels read them: where that is how they lie in memory, there.
class Packed {
 public:
  Packed(const float* blocks, const Sizes& s, bool transpose)
      : copy_(!transpose && s.size == padded(s.size) ? nullptr : new float[s.count * s.size * padded(s.size)]),
        data_(copy_ ? copy_.get() : blocks) {
    if (copy_)
      parallel_for(0, s.count, 1 + 65536 / (s.size * s.size), [&](int64_t begin, int64_t end) {
        pack_blocks_cpu(blocks, s.count, s.size, transpose, copy_.get(), begin, end);
      });
  }
  const float* get() const { return data_; }

 private:
  std::unique_ptr<float[]> copy_;
  const float* data_;
};

void block_rotate(const Tensor& x, const Tensor& blocks, bool transpose, Tensor& out) {
  const Dtype dtype = check_dtype(x, "x");
  check_like(out, "out", x, "x");
  const Sizes s = check_cpu_blocks(x, blocks);
  if (s.rows == 0) return;
  const float* matrices = floats(blocks);
  const BlockRotateParams p{x.const_data_ptr(), matrices, out.mutable_data_ptr(), s.rows, s.count, s.size,
                            transpose,          dtype};
  const Packed packed(matrices, s, transpose);
  parallel_for(0, (s.rows + kRotateRows - 1) / kRotateRows, 1,
               [&](int64_t begin, int64_t end) { block_rotate_cpu(p, packed.get(), begin, end); });
}

void block_rotate_backward(const Tensor& grad, const Tensor& x, const Tensor& blocks, bool transpose, Tensor& dx,
                           Tensor& dblocks) {
  const Dtype dtype = check_dtype(grad, "grad");
  const Sizes s = check_cpu_blocks(grad, blocks);
  const bool need_x = dx.numel() > 0, need_blocks = dblocks.numel() > 0;
  if (need_x) check_like(dx, "dx", grad, "grad");
  if (need_blocks) {
    check_like(x, "x", grad, "grad");
    check_float(dblocks, "dblocks");
    check_like(dblocks, "dblocks", blocks, "blocks");
  }
  const int64_t chunks = row_chunks(s);
  // Value-initialised: the partial sums start from zero.
  const std::unique_ptr<float[]> partial(need_blocks ? new float[chunks * s.count * s.size * padded(s.size)]()
                                                     : nullptr);
  const float* matrices = floats(blocks);
  const BlockRotateBackwardParams p{grad.const_data_ptr(),
                                    need_blocks ? x.const_data_ptr() : nullptr,
                                    matrices,
                                    need_x ? dx.mutable_data_ptr() : nullptr,
                                    partial.get(),
                                    s.rows,
                                    s.count,
                                    s.size,
                                    chunks,
                                    transpose,
                                    dtype};
  const Packed packed(matrices, s, !transpose);
  parallel_for(0, chunks * s.count, 1,
               [&](int64_t begin, int64_t end) { block_rotate_backward_cpu(p, packed.get(), begin, end); });
  if (need_blocks) add_up(partial.get(), chunks, s.count * s.size, s.size, padded(s.size), 1.0f, writable(dblocks));
}

#ifdef PEFTK_CUDA

Sizes check_small_blocks(const Tensor& x, const Tensor& blocks) {
  const Sizes s = check_blocks(x, blocks, Place::cuda);
  STD_TORCH_CHECK(s.size >= 2 && s.size <= kCudaRotateSize, "blocks: expected a block size from 2 to ", kCudaRotateSize,
                  "; got ", s.size);
  return s;
}

void block_rotate_on_cuda(const Tensor& x, const Tensor& blocks, bool transpose, Tensor& out) {
  const Dtype dtype = check_dtype(x, "x", Place::cuda);
  check_like(out, "out", x, "x", Place::cuda);
  const Sizes s = check_small_blocks(x, blocks);
  const CudaStream stream(x);
  block_rotate_cuda(
      {x.const_data_ptr(), floats(blocks), out.mutable_data_ptr(), s.rows, s.count, s.size, transpose, dtype},
      stream.get());
}

void block_rotate_backward_on_cuda(const Tensor& grad, const Tensor& x, const Tensor& blocks, bool transpose,
                                   Tensor& dx, Tensor& dblocks) {
  const Dtype dtype = check_dtype(grad, "grad", Place::cuda);
  const Sizes s = check_small_blocks(grad, blocks);
  const bool need_x = dx.numel() > 0, need_blocks = dblocks.numel() > 0;
  if (need_x) check_like(dx, "dx", grad, "grad", Place::cuda);
  if (need_blocks) {
    check_like(x, "x", grad, "grad", Place::cuda);
    check_like(dblocks, "dblocks", blocks, "blocks", Place::cuda);
  }
  if (!need_x && !need_blocks) return;
  const CudaStream stream(grad);
  BlockRotateBackwardParams p{grad.const_data_ptr(),
                              need_blocks ? x.const_data_ptr() : nullptr,
                              floats(blocks),
                              need_x ? dx.mutable_data_ptr() : nullptr,
                              nullptr,
                              s.rows,
                              s.count,
                              s.size,
                              0,
                              transpose,
                              dtype};
  // From torch's allocator, which knows the stream: it may hand the memory on as soon as this returns.
  const Tensor partial = torch::stable::new_empty(blocks, {need_blocks ? block_rotate_partials_cuda(p) : 0});
  if (need_blocks) p.partial = writable(partial);
  block_rotate_backward_cuda(p, need_blocks ? writable(dblocks) : nullptr, stream.get());
}

#endif

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("block_rotate(Tensor x, Tensor blocks, bool transpose, Tensor(a!) out) -> ()");
  m.def(
      "block_rotate_backward(Tensor grad, Tensor x, Tensor blocks, bool transpose, Tensor(a!) dx, Tensor(b!) dblocks)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("block_rotate", TORCH_BOX(&peftk::block_rotate));
  m.impl("block_rotate_backward", TORCH_BOX(&peftk::block_rotate_backward));
}

#ifdef PEFTK_CUDA
STABLE_TORCH_LIBRARY_IMPL(peftk_native, CUDA, m) {
  m.impl("block_rotate", TORCH_BOX(&peftk::block_rotate_on_cuda));
  m.impl("block_rotate_backward", TORCH_BOX(&peftk::block_rotate_backward_on_cuda));
}
#endif
