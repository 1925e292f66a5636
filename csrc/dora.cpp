#include "dora.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "check.h"
#include "cpu/simd.h"
#include "host.h"
#include "low_rank.h"

namespace peftk {
namespace {

// Operations of a task: enough to pay for handing it to a thread.
constexpr int64_t kDoraTaskOperations = 1 << 18;

// A small factor, (rank, columns), in strips.
class Strips {
 public:
  Strips(const float* from, int64_t row, int64_t col, int64_t rank, int64_t columns, float scale)
      : rank_(rank), data_(new float[strips_size(rank, columns, kDoraStrip)]) {
    pack_strips_cpu(from, row, col, rank, columns, scale, data_.get(), kDoraStrip);
  }
  const float* get() const { return data_.get(); }
  float& at(int64_t k, int64_t j) const { return data_[(j / kDoraStrip * rank_ + k) * kDoraStrip + j % kDoraStrip]; }

 private:
  int64_t rank_;
  std::unique_ptr<float[]> data_;
};

void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
  check_float(t, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, ": expected shape (", rows, ", ", cols,
                  ")");
}

void check_vector(const Tensor& t, const char* name, int64_t size) {
  check_float(t, name);
  STD_TORCH_CHECK(t.numel() == size, name, ": expected ", size, " elements; got ", t.numel());
}

void dora_norm(const Tensor& weight, const Tensor& a, const Tensor& b, bool transposed, double scale, Tensor& out) {
  const Dtype dtype = check_dtype(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2 && a.dim() == 2, "weight, a: expected 2 dimensions");
  const int64_t rows = weight.size(0), cols = weight.size(1), rank = a.size(0);
  check_matrix(a, "a", rank, transposed ? rows : cols);
  check_matrix(b, "b", transposed ? cols : rows, rank);
  check_vector(out, "out", transposed ? cols : rows);
  // The stored matrix is the update's transpose where `transposed`: a.T @ b.T.
  const float *left = (transposed ? a : b).const_data_ptr<float>(),
              *other = (transposed ? b : a).const_data_ptr<float>();
  const Strips right(other, transposed ? 1 : cols, transposed ? rank : 1, rank, cols, static_cast<float>(scale));
  const DoraNormParams p{
      weight.const_data_ptr(), left,       right.get(), writable(out), rows, cols, rank, transposed ? 1 : rank,
      transposed ? rows : 1,   transposed, dtype};
  if (transposed)
    parallel_for(0, (cols + kDoraColumns - 1) / kDoraColumns,
                 1 + kDoraTaskOperations / (1 + rows * kDoraColumns * rank),
                 [&](int64_t begin, int64_t end) { dora_column_norms_cpu(p, begin, end); });
  else
    parallel_for(0, rows, 1 + kDoraTaskOperations / (1 + cols * rank),
                 [&](int64_t begin, int64_t end) { dora_row_norms_cpu(p, begin, end); });
}

void dora_compose(const Tensor& base, const Tensor& hidden, const Tensor& b, const Tensor& gain,
                  std::optional<Tensor> bias, double scale, Tensor& out) {
  const Dtype dtype = check_dtype(base, "base");
  check_like(out, "out", base, "base");
  STD_TORCH_CHECK(b.dim() == 2, "b: expected 2 dimensions");
  const int64_t cols = b.size(0), rank = b.size(1);
  STD_TORCH_CHECK(cols > 0 ? base.numel() % cols == 0 : base.numel() == 0, "base: expected (rows, ", cols, ")");
  const int64_t rows = cols > 0 ? base.numel() / cols : 0;
  check_matrix(b, "b", cols, rank);
  check_vector(gain, "gain", cols);
  if (bias) check_vector(*bias, "bias", cols);
  STD_TORCH_CHECK(check_dtype(hidden, "hidden") == dtype && (rows == 0 || hidden.numel() == rows * rank),
                  "hidden: expected (rows, rank) = (", rows, ", ", rank, ") in the dtype of base");
  const float *gains = floats(gain), *biases = bias ? bias->const_data_ptr<float>() : nullptr;
  const Strips factor(floats(b), 1, rank, rank, cols, static_cast<float>(scale));
  const std::unique_ptr<float[]> shift(biases ? new float[cols] : nullptr);
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t k = 0; k < rank; ++k) factor.at(k, j) *= gains[j];
  for (int64_t j = 0; biases && j < cols; ++j) shift[j] = (1.0f - gains[j]) * biases[j];
  const DoraComposeParams p{base.const_data_ptr(),
                            hidden.const_data_ptr(),
                            factor.get(),
                            gains,
                            shift.get(),
                            out.mutable_data_ptr(),
                            rows,
                            cols,
                            rank,
                            dtype};
  parallel_for(0, rows, 1 + kDoraTaskOperations / (1 + cols * (rank + 2)),
               [&](int64_t begin, int64_t end) { dora_compose_cpu(p, begin, end); });
}

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("dora_norm(Tensor weight, Tensor a, Tensor b, bool transposed, float scale, Tensor(a!) out) -> ()");
  m.def(
      "dora_compose(Tensor base, Tensor hidden, Tensor b, Tensor gain, Tensor? bias, float scale, Tensor(a!) out)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("dora_norm", TORCH_BOX(&peftk::dora_norm));
  m.impl("dora_compose", TORCH_BOX(&peftk::dora_compose));
}
