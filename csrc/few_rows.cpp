#include "few_rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "check.h"
#include "host.h"
#include "low_rank.h"

namespace peftk {
namespace {

using Buffer = std::unique_ptr<float[]>;

void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_float(t, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected shape (", rows, ", ",
                  columns, ")");
}

void check_vector(const Tensor& t, const char* name, int64_t size) {
  check_float(t, name);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, ": expected ", size, " elements; got ", t.numel());
}

Dtype check_weight(const Tensor& weight) {
  const Dtype dtype = check_dtype(weight, "weight");
  STD_TORCH_CHECK(weight.dim() >= 1, "weight: expected a dimension of rows");
  return dtype;
}

uint32_t* check_sums(const Tensor& sums, int64_t rows) {
  check_dense(sums, "sums");
  STD_TORCH_CHECK(
      sums.scalar_type() == ScalarType::Int && sums.dim() == 2 && sums.size(0) == rows && sums.size(1) == kSumWords,
      "sums: expected shape (", rows, ", ", kSumWords, ") in int32");
  return static_cast<uint32_t*>(sums.mutable_data_ptr());
}

bool all_zero(const float* numbers, int64_t count) {
  return std::all_of(numbers, numbers + count, [](float number) { return number == 0.0f; });
}

// Return whether `out` may be used: false where the weight has other checksums, and where the output is that of the
// frozen layer alone, whose bits only the library's own product has.
bool few_rows(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& a, const Tensor& b,
              std::optional<Tensor> gate, double scale, std::optional<Tensor> gain, std::optional<Tensor> sums,
              Tensor& out) {
  const Dtype dtype = check_weight(weight);
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected 2 dimensions; got ", weight.dim());
  const int64_t columns = weight.size(0), depth = weight.size(1);
  check_dense(x, "x");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type() && depth > 0 && x.numel() % depth == 0,
                  "x: expected rows of ", depth, " numbers in the dtype of weight");
  const int64_t rows = x.numel() / depth;
  check_dense(out, "out");
  STD_TORCH_CHECK(out.scalar_type() == weight.scalar_type() && out.numel() == rows * columns,
                  "out: expected the dtype of weight and as many rows as x");
  if (bias) {
    check_dense(*bias, "bias");
    STD_TORCH_CHECK(bias->scalar_type() == weight.scalar_type() && bias->numel() == columns, "bias: expected ", columns,
                    " elements in the dtype of weight");
  }
  const int64_t rank = a.dim() == 2 ? a.size(0) : 0;
  check_matrix(a, "a", rank, depth);
  check_matrix(b, "b", columns, rank);
  if (gate) check_vector(*gate, "gate", rank);
  if (gain) check_vector(*gain, "gain", columns);
  const uint32_t* expected = sums ? check_sums(*sums, columns) : nullptr;
  if (!gain && all_zero(floats(b), columns * rank)) return false;

  const Buffer hidden(new float[rows * rank]);
  const Buffer laid_out(dtype == Dtype::float32 ? nullptr : new float[rows * depth]);
  if (laid_out) few_rows_input_cpu(x.const_data_ptr(), rows, depth, laid_out.get());
  const LowRankFewParams thin{
      x.const_data_ptr(), floats(a), floats(b), hidden.get(), nullptr, rows, depth, columns, rank, dtype};
  parallel_for(0, rank, 1 + kTaskOperations / (1 + depth * rows),
               [&](int64_t begin, int64_t end) { low_rank_few_hidden_cpu(thin, begin, end); });
  for (int64_t i = 0; i < rows * rank; ++i)
    hidden[i] *= (gate ? floats(*gate)[i % rank] : 1.0f) * static_cast<float>(scale);
  const FewRowsParams p{weight.const_data_ptr(),
                        laid_out ? laid_out.get() : x.const_data_ptr<float>(),
                        bias ? bias->const_data_ptr() : nullptr,
                        hidden.get(),
                        floats(b),
                        gain ? floats(*gain) : nullptr,
                        expected,
                        out.mutable_data_ptr(),
                        rows,
                        depth,
                        columns,
                        rank,
                        dtype};
  std::atomic<bool> changed{false};
  parallel_for(0, columns, 1 + kTaskOperations / (1 + depth * rows),
               [&](int64_t begin, int64_t end) { few_rows_cpu(p, begin, end, changed); });
  return !changed.load(std::memory_order_relaxed);
}

// Rows of a weight, of any number of dimensions, and the numbers of each.
std::pair<int64_t, int64_t> rows_of(const Tensor& weight) {
  const int64_t rows = weight.size(0);
  return {rows, rows > 0 ? weight.numel() / rows : 0};
}

void row_sums(const Tensor& weight, Tensor& sums) {
  const Dtype dtype = check_weight(weight);
  const auto [rows, depth] = rows_of(weight);
  uint32_t* to = check_sums(sums, rows);
  const void* from = weight.const_data_ptr();
  parallel_for(0, rows, 1 + kTaskOperations / (1 + depth),
               [&](int64_t begin, int64_t end) { row_sums_cpu(from, depth, dtype, to, begin, end); });
}

bool same_row_sums(const Tensor& weight, const Tensor& sums) {
  const Dtype dtype = check_weight(weight);
  const auto [rows, depth] = rows_of(weight);
  const uint32_t* expected = check_sums(sums, rows);
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  const int64_t bytes = depth * weight.element_size();
  std::atomic<bool> changed{false};
  parallel_for(0, rows, 1 + kTaskOperations / (1 + depth), [&](int64_t begin, int64_t end) {
    constexpr int64_t kRows = 16;
    uint32_t found[kRows * kSumWords];
    for (int64_t row = begin; row < end; row += kRows) {
      const int64_t some = std::min(end - row, kRows);
      row_sums_cpu(from + row * bytes, depth, dtype, found, 0, some);
      if (std::memcmp(found, expected + row * kSumWords, some * kSumWords * sizeof(uint32_t)) != 0)
        return changed.store(true, std::memory_order_relaxed);
    }
  });
  return !changed.load(std::memory_order_relaxed);
}

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def(
      "few_rows(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? gate, float scale, Tensor? gain, "
      "Tensor? sums, Tensor(a!) out) -> bool");
  m.def("row_sums(Tensor weight, Tensor(a!) sums) -> ()");
  m.def("same_row_sums(Tensor weight, Tensor sums) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("few_rows", TORCH_BOX(&peftk::few_rows));
  m.impl("row_sums", TORCH_BOX(&peftk::row_sums));
  m.impl("same_row_sums", TORCH_BOX(&peftk::same_row_sums));
}
