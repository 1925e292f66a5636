#include "hadamard.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "check.h"
#include "cpu/simd.h"
#include "few_rows_linear.h"
#include "host.h"
#include "low_rank.h"
#ifdef PEFTK_CUDA
#include "cuda_stream.h"
#endif

namespace peftk {
namespace {

struct Sizes {
  int64_t out, features, r1, r2;
};

Sizes check_factors(const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a, const Tensor& w2_b,
                    Place place = Place::cpu) {
  check_float(w1_a, "w1_a", place);
  check_float(w1_b, "w1_b", place);
  check_float(w2_a, "w2_a", place);
  check_float(w2_b, "w2_b", place);
  check_same_device(w1_b, "w1_b", w1_a, "w1_a");
  check_same_device(w2_a, "w2_a", w1_a, "w1_a");
  check_same_device(w2_b, "w2_b", w1_a, "w1_a");
  STD_TORCH_CHECK(w1_a.dim() == 2 && w1_b.dim() == 2 && w2_a.dim() == 2 && w2_b.dim() == 2,
                  "factors: expected 2 dimensions");
  STD_TORCH_CHECK(w1_a.size(1) == w1_b.size(0) && w2_a.size(1) == w2_b.size(0),
                  "factors: expected (out, rank) and (rank, features) of one rank");
  STD_TORCH_CHECK(w1_a.size(0) == w2_a.size(0) && w1_b.size(1) == w2_b.size(1),
                  "factors: expected both pairs to have one out and one features");
  return {w1_a.size(0), w1_b.size(1), w1_a.size(1), w2_a.size(1)};
}

// Null for a result of no elements, which is not wanted.
float* wanted(Tensor& out, const char* name, const Tensor& like, const char* like_name, Place place = Place::cpu) {
  if (out.numel() == 0) return nullptr;
  check_like(out, name, like, like_name, place);
  return writable(out);
}

// Rows of `stride` floats, whole vectors each: the matrix itself where its rows are, else a copy.
class Aligned {
 public:
  Aligned(const Tensor& t, int64_t rows, int64_t columns) : data_(floats(t)), stride_(padded(columns)) {
    if (stride_ == columns) return;
    copy_.reset(new float[rows * stride_]);
    pad_columns_cpu(data_, columns, 1, rows, columns, copy_.get());
    data_ = copy_.get();
  }
  const float* get() const { return data_; }
  int64_t stride() const { return stride_; }

 private:
  const float* data_;
  int64_t stride_;
  std::unique_ptr<float[]> copy_;
};

void khatri_rao(const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a, const Tensor& w2_b, Tensor& a, Tensor& b) {
  const Sizes s = check_factors(w1_a, w1_b, w2_a, w2_b);
  const Dtype dtype = check_dtype(a, "a");
  const int64_t rank = s.r1 * s.r2;
  STD_TORCH_CHECK(check_dtype(b, "b") == dtype, "b: expected the dtype of a");
  STD_TORCH_CHECK(a.numel() == rank * s.features, "a: expected shape (r1 * r2, features)");
  STD_TORCH_CHECK(b.numel() == rank * s.out, "b: expected shape (out, r1 * r2)");
  const KhatriRaoParams p{
      floats(w1_a), floats(w1_b), floats(w2_a), floats(w2_b), a.mutable_data_ptr(), b.mutable_data_ptr(), s.out,
      s.features,   s.r1,         s.r2,         dtype};
  parallel_for(0, rank, 1 + kTaskOperations / (1 + s.features),
               [&](int64_t begin, int64_t end) { khatri_rao_a_cpu(p, begin, end); });
  parallel_for(0, s.out, 1 + kTaskOperations / (1 + rank),
               [&](int64_t begin, int64_t end) { khatri_rao_b_cpu(p, begin, end); });
}

void khatri_rao_backward(const Tensor& grad_a, const Tensor& grad_b, const Tensor& w1_a, const Tensor& w1_b,
                         const Tensor& w2_a, const Tensor& w2_b, Tensor& dw1_a, Tensor& dw1_b, Tensor& dw2_a,
                         Tensor& dw2_b) {
  const Sizes s = check_factors(w1_a, w1_b, w2_a, w2_b);
  const Dtype dtype = check_dtype(grad_a, "grad_a");
  const int64_t rank = s.r1 * s.r2;
  STD_TORCH_CHECK(check_dtype(grad_b, "grad_b") == dtype, "grad_b: expected the dtype of grad_a");
  STD_TORCH_CHECK(grad_a.numel() == rank * s.features, "grad_a: expected shape (r1 * r2, features)");
  STD_TORCH_CHECK(grad_b.numel() == rank * s.out, "grad_b: expected shape (out, r1 * r2)");
  const KhatriRaoBackwardParams p{grad_a.const_data_ptr(),
                                  grad_b.const_data_ptr(),
                                  floats(w1_a),
                                  floats(w1_b),
                                  floats(w2_a),
                                  floats(w2_b),
                                  wanted(dw1_a, "dw1_a", w1_a, "w1_a"),
                                  wanted(dw1_b, "dw1_b", w1_b, "w1_b"),
                                  wanted(dw2_a, "dw2_a", w2_a, "w2_a"),
                                  wanted(dw2_b, "dw2_b", w2_b, "w2_b"),
                                  s.out,
                                  s.features,
                                  s.r1,
                                  s.r2,
                                  dtype};
  if (p.dw1_b != nullptr || p.dw2_b != nullptr)
    parallel_for(0, divide_up(s.features, kHadamardColumns), 1 + kTaskOperations / (1 + rank * kHadamardColumns),
                 [&](int64_t begin, int64_t end) { khatri_rao_backward_a_cpu(p, begin, end); });
  if (p.dw1_a != nullptr || p.dw2_a != nullptr)
    parallel_for(0, s.out, 1 + kTaskOperations / (1 + rank),
                 [&](int64_t begin, int64_t end) { khatri_rao_backward_b_cpu(p, begin, end); });
}

void hadamard_weight(const Tensor& weight, const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a,
                     const Tensor& w2_b, double scale, Tensor& out) {
  const Sizes s = check_factors(w1_a, w1_b, w2_a, w2_b);
  const Dtype dtype = check_dtype(weight, "weight");
  check_like(out, "out", weight, "weight");
  STD_TORCH_CHECK(weight.numel() == s.out * s.features, "weight: expected shape (out, features)");
  const Aligned b1(w1_b, s.r1, s.features), b2(w2_b, s.r2, s.features);
  const HadamardWeightParams p{weight.const_data_ptr(),
                               floats(w1_a),
                               b1.get(),
                               floats(w2_a),
                               b2.get(),
                               out.mutable_data_ptr(),
                               s.out,
                               s.features,
                               s.r1,
                               s.r2,
                               b1.stride(),
                               static_cast<float>(scale),
                               dtype};
  parallel_for(0, divide_up(s.out, kHadamardRows),
               1 + kTaskOperations / (1 + kHadamardRows * s.features * (s.r1 + s.r2 + 1)),
               [&](int64_t begin, int64_t end) { hadamard_weight_cpu(p, begin, end); });
}

void hadamard_weight_backward(const Tensor& grad, const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a,
                              const Tensor& w2_b, double scale, Tensor& dw1_a, Tensor& dw1_b, Tensor& dw2_a,
                              Tensor& dw2_b) {
  const Sizes s = check_factors(w1_a, w1_b, w2_a, w2_b);
  const Dtype dtype = check_dtype(grad, "grad");
  STD_TORCH_CHECK(grad.numel() == s.out * s.features, "grad: expected shape (out, features)");
  const Aligned b1(w1_b, s.r1, s.features), b2(w2_b, s.r2, s.features);
  // From the shape alone: the bits must not depend on the number of threads.
  const int64_t chunk = kHadamardRows * (1 + s.out / (8 * kHadamardRows)), chunks = divide_up(s.out, chunk);
  const int64_t stride = b1.stride();
  float* const db1 = wanted(dw1_b, "dw1_b", w1_b, "w1_b");
  float* const db2 = wanted(dw2_b, "dw2_b", w2_b, "w2_b");
  // Value-initialised: the sums start from zero.
  const std::unique_ptr<float[]> sums1(db1 ? new float[chunks * s.r1 * stride]() : nullptr);
  const std::unique_ptr<float[]> sums2(db2 ? new float[chunks * s.r2 * stride]() : nullptr);
  const std::unique_ptr<float[]> t1(new float[s.features * padded(s.r1)]), t2(new float[s.features * padded(s.r2)]);
  pad_columns_cpu(floats(w1_b), 1, s.features, s.features, s.r1, t1.get());
  pad_columns_cpu(floats(w2_b), 1, s.features, s.features, s.r2, t2.get());
  const HadamardWeightBackwardParams p{grad.const_data_ptr(),
                                       floats(w1_a),
                                       b1.get(),
                                       floats(w2_a),
                                       b2.get(),
                                       t1.get(),
                                       t2.get(),
                                       wanted(dw1_a, "dw1_a", w1_a, "w1_a"),
                                       wanted(dw2_a, "dw2_a", w2_a, "w2_a"),
                                       sums1.get(),
                                       sums2.get(),
                                       s.out,
                                       s.features,
                                       s.r1,
                                       s.r2,
                                       stride,
                                       chunk,
                                       static_cast<float>(scale),
                                       dtype};
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { hadamard_weight_backward_cpu(p, begin, end); });
  if (db1) add_up(sums1.get(), chunks, s.r1, s.features, stride, 1.0f, db1);
  if (db2) add_up(sums2.get(), chunks, s.r2, s.features, stride, 1.0f, db2);
}

// Write the product of rows with the update to a float32 `to`, (rows, out).
void hadamard_product(const Tensor& x, Dtype dtype, int64_t rows, const Sizes& s, const Tensor& w1_a,
                      const Tensor& w1_b, const Tensor& w2_a, const Tensor& w2_b, double scale, float* to) {
  const FloatNumbers numbers(x, dtype);
  const std::unique_ptr<float[]> hidden(new float[rows * s.r1 * s.r2]);
  const HadamardFewParams p{numbers.get(),
                            floats(w1_a),
                            floats(w1_b),
                            floats(w2_a),
                            floats(w2_b),
                            hidden.get(),
                            to,
                            rows,
                            s.out,
                            s.features,
                            s.r1,
                            s.r2,
                            static_cast<float>(scale)};
  parallel_for(0, rows * s.r1, 1 + kTaskOperations / (1 + s.features * s.r2),
               [&](int64_t begin, int64_t end) { hadamard_few_hidden_cpu(p, begin, end); });
  parallel_for(0, s.out, 1 + kTaskOperations / (1 + rows * s.r1 * s.r2),
               [&](int64_t begin, int64_t end) { hadamard_few_cpu(p, begin, end); });
}

std::optional<Tensor> hadamard_few(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                   const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a, const Tensor& w2_b,
                                   double scale, int64_t most) {
  const auto sizes = few_rows_sizes(x, weight, bias, most);
  if (!sizes || !are_factors(w1_a, 2) || !are_factors(w1_b, 2) || !are_factors(w2_a, 2) || !are_factors(w2_b, 2))
    return std::nullopt;
  const Sizes s = check_factors(w1_a, w1_b, w2_a, w2_b);
  if (s.out != sizes->columns || s.features != sizes->depth) return std::nullopt;
  const std::unique_ptr<float[]> added(new float[sizes->rows * s.out]);
  hadamard_product(x, sizes->dtype, sizes->rows, s, w1_a, w1_b, w2_a, w2_b, scale, added.get());
  return few_rows_linear(*sizes, x, weight, bias, added.get());
}

void hadamard_rows(const Tensor& x, const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a, const Tensor& w2_b,
                   double scale, Tensor& out) {
  const Sizes s = check_factors(w1_a, w1_b, w2_a, w2_b);
  const Dtype dtype = check_dtype(x, "x");
  STD_TORCH_CHECK(s.features > 0 && x.numel() % s.features == 0, "x: expected rows of ", s.features, " numbers");
  const int64_t rows = x.numel() / s.features;
  check_float(out, "out");
  STD_TORCH_CHECK(out.numel() == rows * s.out, "out: expected as many rows as x");
  hadamard_product(x, dtype, rows, s, w1_a, w1_b, w2_a, w2_b, scale, writable(out));
}

#ifdef PEFTK_CUDA

void hadamard_weight_on_cuda(const Tensor& weight, const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a,
                             const Tensor& w2_b, double scale, Tensor& out) {
  const Sizes s = check_factors(w1_a, w1_b, w2_a, w2_b, Place::cuda);
  const Dtype dtype = check_dtype(weight, "weight", Place::cuda);
  check_same_device(w1_a, "w1_a", weight, "weight");
  check_like(out, "out", weight, "weight", Place::cuda);
  STD_TORCH_CHECK(weight.numel() == s.out * s.features, "weight: expected shape (out, features)");
  const CudaStream stream(weight);
  hadamard_weight_cuda(
      {weight.const_data_ptr(), floats(w1_a), floats(w1_b), floats(w2_a), floats(w2_b), out.mutable_data_ptr(), s.out,
       s.features, s.r1, s.r2, s.features, static_cast<float>(scale), dtype},
      stream.get());
}

void hadamard_weight_backward_on_cuda(const Tensor& grad, const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a,
                                      const Tensor& w2_b, double scale, Tensor& dw1_a, Tensor& dw1_b, Tensor& dw2_a,
                                      Tensor& dw2_b) {
  const Sizes s = check_factors(w1_a, w1_b, w2_a, w2_b, Place::cuda);
  const Dtype dtype = check_dtype(grad, "grad", Place::cuda);
  check_same_device(w1_a, "w1_a", grad, "grad");
  STD_TORCH_CHECK(grad.numel() == s.out * s.features, "grad: expected shape (out, features)");
  const HadamardFactors out{
      wanted(dw1_a, "dw1_a", w1_a, "w1_a", Place::cuda), wanted(dw1_b, "dw1_b", w1_b, "w1_b", Place::cuda),
      wanted(dw2_a, "dw2_a", w2_a, "w2_a", Place::cuda), wanted(dw2_b, "dw2_b", w2_b, "w2_b", Place::cuda)};
  const CudaStream stream(grad);
  const HadamardParts parts = hadamard_weight_parts_cuda(s.out, s.features);
  // From torch's allocator, which knows the stream: it may hand the memory on as soon as this returns.
  const auto room = [&](const float* asked, int64_t count) {
    return torch::stable::new_empty(w1_a, {asked == nullptr ? 0 : count});
  };
  const Tensor a1 = room(out.w1_a, parts.tiles * s.out * s.r1), b1 = room(out.w1_b, parts.chunks * s.r1 * s.features),
               a2 = room(out.w2_a, parts.tiles * s.out * s.r2), b2 = room(out.w2_b, parts.chunks * s.r2 * s.features);
  const auto place = [](const float* asked, const Tensor& t) { return asked == nullptr ? nullptr : writable(t); };
  hadamard_weight_backward_cuda(
      {grad.const_data_ptr(), floats(w1_a), floats(w1_b), floats(w2_a), floats(w2_b), nullptr, nullptr,
       place(out.w1_a, a1), place(out.w2_a, a2), place(out.w1_b, b1), place(out.w2_b, b2), s.out, s.features, s.r1,
       s.r2, s.features, parts.chunk, static_cast<float>(scale), dtype},
      out, stream.get());
}

#endif

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("khatri_rao(Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b, Tensor(a!) a, Tensor(b!) b) -> ()");
  m.def(
      "khatri_rao_backward(Tensor grad_a, Tensor grad_b, Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b,"
      " Tensor(a!) dw1_a, Tensor(b!) dw1_b, Tensor(c!) dw2_a, Tensor(d!) dw2_b) -> ()");
  m.def(
      "hadamard_few(Tensor x, Tensor weight, Tensor? bias, Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b, "
      "float scale, int most) -> Tensor?");
  m.def(
      "hadamard_rows(Tensor x, Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b, float scale, Tensor(a!) out)"
      " -> ()");
  m.def(
      "hadamard_weight(Tensor weight, Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b, float scale,"
      " Tensor(a!) out) -> ()");
  m.def(
      "hadamard_weight_backward(Tensor grad, Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b, float scale,"
      " Tensor(a!) dw1_a, Tensor(b!) dw1_b, Tensor(c!) dw2_a, Tensor(d!) dw2_b) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("khatri_rao", TORCH_BOX(&peftk::khatri_rao));
  m.impl("khatri_rao_backward", TORCH_BOX(&peftk::khatri_rao_backward));
  m.impl("hadamard_few", TORCH_BOX(&peftk::hadamard_few));
  m.impl("hadamard_rows", TORCH_BOX(&peftk::hadamard_rows));
  m.impl("hadamard_weight", TORCH_BOX(&peftk::hadamard_weight));
  m.impl("hadamard_weight_backward", TORCH_BOX(&peftk::hadamard_weight_backward));
}

#ifdef PEFTK_CUDA
STABLE_TORCH_LIBRARY_IMPL(peftk_native, CUDA, m) {
  m.impl("hadamard_weight", TORCH_BOX(&peftk::hadamard_weight_on_cuda));
  m.impl("hadamard_weight_backward", TORCH_BOX(&peftk::hadamard_weight_backward_on_cuda));
}
#endif
