#include "kronecker.h"

#include <torch/csrc/stable/ops.h>

#include <memory>

#include "check.h"
#include "native_ops.h"
#ifdef PEFTK_CUDA
#include "cuda_stream.h"
#endif

namespace peftk {
namespace {

using torch::stable::parallel_for;

// Operations of a task: enough to pay for handing it to a thread.
constexpr int64_t kTaskOperations = 1 << 18;
constexpr int64_t kMostChunks = 64;

void check_factor(const Tensor& t, const char* name, Place place = Place::cpu) {
  check_float(t, name, place);
  STD_TORCH_CHECK(t.dim() == 2 && t.numel() > 0, name, ": expected 2 dimensions, none of them empty");
}

// From the shape alone: the bits must not depend on the number of threads.
int64_t chunks_of(int64_t count, int64_t operations) {
  const int64_t possible = operations / kTaskOperations + 1, wanted = possible < kMostChunks ? possible : kMostChunks;
  return wanted < count ? wanted : (count > 0 ? count : 1);
}

std::unique_ptr<float[]> scaled(const Tensor& t, double scale) {
  const int64_t count = t.numel();
  std::unique_ptr<float[]> values(new float[count]);
  const float* from = t.const_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) values[i] = from[i] * static_cast<float>(scale);
  return values;
}

void sum_chunks(const float* partial, int64_t chunks, int64_t count, double scale, Tensor& out) {
  float* to = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[c * count + i];
    to[i] = sum * static_cast<float>(scale);
  }
}

}  // namespace

void kronecker_mix(const Tensor& left, const Tensor& right, const Tensor& w1, double scale, int64_t columns,
                   bool add_left, bool add_right, Tensor& mixed_left, Tensor& mixed_right, Tensor& dw1) {
  check_factor(w1, "w1");
  const Dtype dtype = check_dtype(left, "left");
  check_dense(right, "right");
  STD_TORCH_CHECK(right.scalar_type() == left.scalar_type(), "right: expected the dtype of left");
  const int64_t left_size = w1.size(0), right_size = w1.size(1);
  const bool need_left = mixed_left.numel() > 0, need_right = mixed_right.numel() > 0, need_w1 = dw1.numel() > 0;
  const int64_t tokens =
      left.numel() > 0 ? left.numel() / (left_size * columns) : right.numel() / (right_size * columns);
  STD_TORCH_CHECK(columns > 0 && (left.numel() == 0 || left.numel() == tokens * left_size * columns),
                  "left: expected (tokens, ", left_size, ", ", columns, ")");
  STD_TORCH_CHECK(right.numel() == 0 || right.numel() == tokens * right_size * columns, "right: expected (tokens, ",
                  right_size, ", ", columns, ")");
  if (need_left) {
    check_dtype(mixed_left, "mixed_left");
    STD_TORCH_CHECK(mixed_left.scalar_type() == left.scalar_type() && right.numel() > 0 &&
                        mixed_left.numel() == tokens * left_size * columns,
                    "mixed_left: expected the dtype of left and (tokens, ", left_size, ", ", columns, ")");
  }
  if (need_right) {
    check_dtype(mixed_right, "mixed_right");
    STD_TORCH_CHECK(mixed_right.scalar_type() == left.scalar_type() && left.numel() > 0 &&
                        mixed_right.numel() == tokens * right_size * columns,
                    "mixed_right: expected the dtype of left and (tokens, ", right_size, ", ", columns, ")");
  }
  if (need_w1) {
    check_float(dw1, "dw1");
    check_like(dw1, "dw1", w1, "w1");
    STD_TORCH_CHECK(tokens == 0 || (left.numel() > 0 && right.numel() > 0), "dw1: needs left and right");
  }
  const int64_t entries = left_size * right_size;
  const int64_t chunks = chunks_of(tokens, tokens * entries * columns);
  const auto factors = scaled(w1, scale);
  const std::unique_ptr<float[]> partial(need_w1 ? new float[chunks * entries] : nullptr);
  const KroneckerMixParams p{left.numel() > 0 ? left.const_data_ptr() : nullptr,
                             right.numel() > 0 ? right.const_data_ptr() : nullptr,
                             factors.get(),
                             need_left ? mixed_left.mutable_data_ptr() : nullptr,
                             need_right ? mixed_right.mutable_data_ptr() : nullptr,
                             partial.get(),
                             tokens,
                             left_size,
                             right_size,
                             columns,
                             chunks,
                             add_left,
                             add_right,
                             dtype};
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { kronecker_mix_cpu(p, begin, end); });
  if (need_w1) sum_chunks(partial.get(), chunks, entries, scale, dw1);
}

void kronecker_weight(const Tensor& weight, const Tensor& w1, const Tensor& w2, double scale, Tensor& out) {
  check_factor(w1, "w1");
  check_factor(w2, "w2");
  const Dtype dtype = check_dtype(weight, "weight");
  check_like(out, "out", weight, "weight");
  STD_TORCH_CHECK(weight.numel() == w1.numel() * w2.numel(), "weight: expected as many elements as kron(w1, w2) has");
  const KroneckerWeightParams p{weight.const_data_ptr(),
                                w1.const_data_ptr<float>(),
                                w2.const_data_ptr<float>(),
                                out.mutable_data_ptr(),
                                w1.size(0),
                                w1.size(1),
                                w2.size(0),
                                w2.size(1),
                                static_cast<float>(scale),
                                dtype};
  const int64_t features = p.middle * p.columns;
  parallel_for(0, p.left * p.rows, 1 + kTaskOperations / features,
               [&](int64_t begin, int64_t end) { kronecker_weight_cpu(p, begin, end); });
}

void kronecker_weight_backward(const Tensor& grad, const Tensor& w1, const Tensor& w2, double scale, Tensor& dw1,
                               Tensor& dw2) {
  check_factor(w1, "w1");
  check_factor(w2, "w2");
  const Dtype dtype = check_dtype(grad, "grad");
  STD_TORCH_CHECK(grad.numel() == w1.numel() * w2.numel(), "grad: expected as many elements as kron(w1, w2) has");
  const bool need_w1 = dw1.numel() > 0, need_w2 = dw2.numel() > 0;
  if (need_w1) check_like(dw1, "dw1", w1, "w1");
  if (need_w2) check_like(dw2, "dw2", w2, "w2");
  const int64_t entries = w1.numel(), chunks = chunks_of(w2.size(0), grad.numel());
  const std::unique_ptr<float[]> partial(need_w1 ? new float[chunks * entries] : nullptr);
  const KroneckerWeightBackwardParams p{grad.const_data_ptr(),
                                        w1.const_data_ptr<float>(),
                                        w2.const_data_ptr<float>(),
                                        partial.get(),
                                        need_w2 ? static_cast<float*>(dw2.mutable_data_ptr()) : nullptr,
                                        w1.size(0),
                                        w1.size(1),
                                        w2.size(0),
                                        w2.size(1),
                                        chunks,
                                        static_cast<float>(scale),
                                        dtype};
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { kronecker_weight_backward_cpu(p, begin, end); });
  if (need_w1) sum_chunks(partial.get(), chunks, entries, scale, dw1);
}

#ifdef PEFTK_CUDA

void kronecker_weight_on_cuda(const Tensor& weight, const Tensor& w1, const Tensor& w2, double scale, Tensor& out) {
  check_factor(w1, "w1", Place::cuda);
  check_factor(w2, "w2", Place::cuda);
  const Dtype dtype = check_dtype(weight, "weight", Place::cuda);
  check_like(out, "out", weight, "weight", Place::cuda);
  check_same_device(w1, "w1", weight, "weight");
  check_same_device(w2, "w2", weight, "weight");
  STD_TORCH_CHECK(weight.numel() == w1.numel() * w2.numel(), "weight: expected as many elements as kron(w1, w2) has");
  const CudaStream stream(weight);
  kronecker_weight_cuda(
      {weight.const_data_ptr(), w1.const_data_ptr<float>(), w2.const_data_ptr<float>(), out.mutable_data_ptr(),
       w1.size(0), w1.size(1), w2.size(0), w2.size(1), static_cast<float>(scale), dtype},
      stream.get());
}

void kronecker_weight_backward_on_cuda(const Tensor& grad, const Tensor& w1, const Tensor& w2, double scale,
                                       Tensor& dw1, Tensor& dw2) {
  check_factor(w1, "w1", Place::cuda);
  check_factor(w2, "w2", Place::cuda);
  const Dtype dtype = check_dtype(grad, "grad", Place::cuda);
  check_same_device(w1, "w1", grad, "grad");
  check_same_device(w2, "w2", grad, "grad");
  STD_TORCH_CHECK(grad.numel() == w1.numel() * w2.numel(), "grad: expected as many elements as kron(w1, w2) has");
  STD_TORCH_CHECK(w2.size(0) <= kMostCudaRows, "w2: expected at most ", kMostCudaRows, " rows; got ", w2.size(0));
  const bool need_w1 = dw1.numel() > 0, need_w2 = dw2.numel() > 0;
  if (need_w1) check_like(dw1, "dw1", w1, "w1", Place::cuda);
  if (need_w2) check_like(dw2, "dw2", w2, "w2", Place::cuda);
  const CudaStream stream(grad);
  const int64_t entries = w1.numel(), chunks = kronecker_weight_chunks_cuda(entries, w2.size(0));
  // From torch's allocator, which knows the stream: it may hand the memory on as soon as this returns.
  const Tensor partial = torch::stable::new_empty(w1, {need_w1 ? chunks * entries : 0});
  kronecker_weight_backward_cuda({grad.const_data_ptr(), w1.const_data_ptr<float>(), w2.const_data_ptr<float>(),
                                  need_w1 ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr,
                                  need_w2 ? static_cast<float*>(dw2.mutable_data_ptr()) : nullptr, w1.size(0),
                                  w1.size(1), w2.size(0), w2.size(1), chunks, static_cast<float>(scale), dtype},
                                 need_w1 ? static_cast<float*>(dw1.mutable_data_ptr()) : nullptr, stream.get());
}

#endif

}  // namespace peftk
