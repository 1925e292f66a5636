#include "kronecker.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "check.h"
#include "few_rows_linear.h"
#include "host.h"
#ifdef PEFTK_CUDA
#include "cuda_stream.h"
#endif

namespace peftk {
namespace {

constexpr int64_t kMostChunks = 64;
// Floats of the sums of all chunks together, 16 MiB, unless those of one chunk are more.
constexpr int64_t kMostSums = 1 << 22;

void check_factor(const Tensor& t, const char* name, Place place = Place::cpu) {
  check_float(t, name, place);
  STD_TORCH_CHECK(t.dim() == 2 && t.numel() > 0, name, ": expected 2 dimensions, none of them empty");
}

// How many chunks of `count` tokens or rows sum apart, each in `sums` floats. From the shape alone: the bits must not
// depend on the number of threads.
int64_t chunks_of(int64_t count, int64_t operations, int64_t sums) {
  int64_t chunks = operations / kTaskOperations + 1;
  for (const int64_t most : {kMostChunks, kMostSums / sums, count})
    if (chunks > most) chunks = most;
  return chunks > 0 ? chunks : 1;
}

std::unique_ptr<float[]> scaled(const Tensor& t, double scale) {
  const int64_t count = t.numel();
  std::unique_ptr<float[]> values(new float[count]);
  const float* from = floats(t);
  for (int64_t i = 0; i < count; ++i) values[i] = from[i] * static_cast<float>(scale);
  return values;
}

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
  const int64_t chunks = chunks_of(tokens, tokens * entries * columns, entries);
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
  if (need_w1) add_up(partial.get(), chunks, 1, entries, entries, static_cast<float>(scale), writable(dw1));
}

void kronecker_weight(const Tensor& weight, const Tensor& w1, const Tensor& w2, double scale, Tensor& out) {
  check_factor(w1, "w1");
  check_factor(w2, "w2");
  const Dtype dtype = check_dtype(weight, "weight");
  check_like(out, "out", weight, "weight");
  STD_TORCH_CHECK(weight.numel() == w1.numel() * w2.numel(), "weight: expected as many elements as kron(w1, w2) has");
  const KroneckerWeightParams p{weight.const_data_ptr(),
                                floats(w1),
                                floats(w2),
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
  const int64_t entries = w1.numel(), chunks = chunks_of(w2.size(0), grad.numel(), entries);
  const std::unique_ptr<float[]> partial(need_w1 ? new float[chunks * entries] : nullptr);
  const KroneckerWeightBackwardParams p{grad.const_data_ptr(),
                                        floats(w1),
                                        floats(w2),
                                        partial.get(),
                                        need_w2 ? writable(dw2) : nullptr,
                                        w1.size(0),
                                        w1.size(1),
                                        w2.size(0),
                                        w2.size(1),
                                        chunks,
                                        static_cast<float>(scale),
                                        dtype};
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { kronecker_weight_backward_cpu(p, begin, end); });
  if (need_w1) add_up(partial.get(), chunks, 1, entries, entries, static_cast<float>(scale), writable(dw1));
}

// Write the product of rows with kron(w1, w2) to a float32 `to`, (rows, out).
void multiply_rows(const Tensor& x, Dtype dtype, int64_t rows, const Tensor& w1, const Tensor& w2, double scale,
                   float* to) {
  const int64_t l = w1.size(0), m = w1.size(1), k = w2.size(0), n = w2.size(1);
  const FloatNumbers numbers(x, dtype);
  const KroneckerFewParams p{numbers.get(), floats(w1), floats(w2), to, rows, l, m, k, n, static_cast<float>(scale)};
  parallel_for(0, k, 1 + kTaskOperations / (1 + rows * m * (n + l)),
               [&](int64_t begin, int64_t end) { kronecker_few_cpu(p, begin, end); });
}

std::optional<Tensor> kronecker_few(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& w1,
                                    const Tensor& w2, double scale, int64_t most) {
  const auto sizes = few_rows_sizes(x, weight, bias, most);
  if (!sizes || !are_factors(w1, 2) || !are_factors(w2, 2)) return std::nullopt;
  if (w1.size(0) * w2.size(0) != sizes->columns || w1.size(1) * w2.size(1) != sizes->depth) return std::nullopt;
  const std::unique_ptr<float[]> added(new float[sizes->rows * sizes->columns]);
  multiply_rows(x, sizes->dtype, sizes->rows, w1, w2, scale, added.get());
  return few_rows_linear(*sizes, x, weight, bias, added.get());
}

void kronecker_rows(const Tensor& x, const Tensor& w1, const Tensor& w2, double scale, Tensor& out) {
  const Dtype dtype = check_dtype(x, "x");
  check_factor(w1, "w1");
  check_factor(w2, "w2");
  const int64_t features = w1.size(1) * w2.size(1);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) == features, "x: expected rows of ", features, " numbers");
  const int64_t rows = x.numel() / features;
  check_float(out, "out");
  STD_TORCH_CHECK(out.numel() == rows * w1.size(0) * w2.size(0), "out: expected as many rows as x");
  multiply_rows(x, dtype, rows, w1, w2, scale, writable(out));
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
  kronecker_weight_cuda({weight.const_data_ptr(), floats(w1), floats(w2), out.mutable_data_ptr(), w1.size(0),
                         w1.size(1), w2.size(0), w2.size(1), static_cast<float>(scale), dtype},
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
  kronecker_weight_backward_cuda({grad.const_data_ptr(), floats(w1), floats(w2), need_w1 ? writable(partial) : nullptr,
                                  need_w2 ? writable(dw2) : nullptr, w1.size(0), w1.size(1), w2.size(0), w2.size(1),
                                  chunks, static_cast<float>(scale), dtype},
                                 need_w1 ? writable(dw1) : nullptr, stream.get());
}

#endif

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("kronecker_few(Tensor x, Tensor weight, Tensor? bias, Tensor w1, Tensor w2, float scale, int most) -> Tensor?");
  m.def("kronecker_rows(Tensor x, Tensor w1, Tensor w2, float scale, Tensor(a!) out) -> ()");
  m.def(
      "kronecker_mix(Tensor left, Tensor right, Tensor w1, float scale, int columns, bool add_left, bool add_right,"
      " Tensor(a!) mixed_left,"
      " Tensor(b!) mixed_right, Tensor(c!) dw1) -> ()");
  m.def("kronecker_weight(Tensor weight, Tensor w1, Tensor w2, float scale, Tensor(a!) out) -> ()");
  m.def(
      "kronecker_weight_backward(Tensor grad, Tensor w1, Tensor w2, float scale, Tensor(a!) dw1, Tensor(b!) dw2)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("kronecker_few", TORCH_BOX(&peftk::kronecker_few));
  m.impl("kronecker_rows", TORCH_BOX(&peftk::kronecker_rows));
  m.impl("kronecker_mix", TORCH_BOX(&peftk::kronecker_mix));
  m.impl("kronecker_weight", TORCH_BOX(&peftk::kronecker_weight));
  m.impl("kronecker_weight_backward", TORCH_BOX(&peftk::kronecker_weight_backward));
}

#ifdef PEFTK_CUDA
STABLE_TORCH_LIBRARY_IMPL(peftk_native, CUDA, m) {
  m.impl("kronecker_weight", TORCH_BOX(&peftk::kronecker_weight_on_cuda));
  m.impl("kronecker_weight_backward", TORCH_BOX(&peftk::kronecker_weight_backward_on_cuda));
}
#endif
