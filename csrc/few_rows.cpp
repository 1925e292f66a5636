#include "few_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "block_diagonal.h"
#include "check.h"
#include "few_rows_linear.h"
#include "host.h"
#include "low_rank.h"
#include "same_bits.h"

namespace peftk {
namespace {

using Buffer = std::unique_ptr<float[]>;

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

// As torch's `new_empty`, which finds its operator by name in every call and goes through all that listens to one.
Tensor empty_on_cpu(const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

bool all_zero(const float* numbers, int64_t count) {
  return std::all_of(numbers, numbers + count, [](float number) { return number == 0.0f; });
}

bool is_dense(const Tensor& t, ScalarType dtype, int64_t dimensions) {
  return t.is_cpu() && t.scalar_type() == dtype && t.dim() == dimensions && t.is_contiguous();
}

// Numbers of any shape that lie one behind the other, or none.
bool are_numbers(const std::optional<Tensor>& t, ScalarType dtype, int64_t count) {
  return !t || (is_dense(*t, dtype, t->dim()) && t->numel() == count);
}

bool is_rotation(const Tensor& blocks, int64_t depth) {
  return is_dense(blocks, ScalarType::Float, 3) && blocks.size(1) > 0 && blocks.size(1) == blocks.size(2) &&
         depth % blocks.size(1) == 0 && (blocks.size(0) == 1 || blocks.size(0) * blocks.size(1) == depth);
}

// Return rows of x with every block of their features rotated, or null where the rotation changes no number.
Buffer rotated(const Tensor& x, Dtype dtype, int64_t rows, int64_t depth, const Tensor& blocks) {
  const int64_t size = blocks.size(1), count = depth / size, numbers = rows * depth;
  Buffer turned(new float[numbers]);
  const BlockRotateFewParams p{x.const_data_ptr(),  floats(blocks), turned.get(), rows, count, size,
                               blocks.size(0) == 1, dtype};
  parallel_for(0, count, 1 + kTaskOperations / (size * size * rows),
               [&](int64_t begin, int64_t end) { block_rotate_few_cpu(p, begin, end); });
  bool same = true;
  if (dtype == Dtype::float32) {
    same = std::equal(turned.get(), turned.get() + numbers, x.const_data_ptr<float>());
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(x.const_data_ptr());
    for (int64_t i = 0; same && i < numbers; ++i) {
      uint32_t now;
      std::memcpy(&now, &turned[i], sizeof now);
      same = now == static_cast<uint32_t>(bits[i]) << 16;
    }
  }
  return same ? nullptr : std::move(turned);
}

// What a call adds to the base product, how it scales the sum, and how it knows that the weight is still the same.
struct Parts {
  std::optional<Tensor> blocks, a, b, gate, gain, sums;
  double scale = 1.0;
  const float* added = nullptr;
};

// Return the output, or nothing where this is not the way: for what does not fit, for a weight that has other
// checksums, and where the output is that of the frozen layer alone, whose bits only the library's own product has.
// All of these are decided here, and not in Python, where they would take longer than the arithmetic.
std::optional<Tensor> few_rows(const FewRowsSizes& sizes, const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, const Parts& parts) {
  constexpr ScalarType kFloat = ScalarType::Float;
  const auto& [blocks, a, b, gate, gain, sums, scale, added] = parts;
  const auto [rows, depth, columns, dtype] = sizes;
  if (!are_numbers(gain, kFloat, columns)) return std::nullopt;
  int64_t rank = 0;
  if (a) {
    if (!is_dense(*a, kFloat, 2) || !is_dense(*b, kFloat, 2)) return std::nullopt;
    rank = a->size(0);
    if (rank == 0 || a->size(1) != depth || b->size(0) != columns || b->size(1) != rank ||
        !are_numbers(gate, kFloat, rank) || scale == 0.0 || all_zero(floats(*b), columns * rank))
      return std::nullopt;
  } else if (blocks) {
    if (!is_rotation(*blocks, depth)) return std::nullopt;
  } else if (all_zero(added, rows * columns)) {
    return std::nullopt;
  }
  const uint32_t* expected = sums ? check_sums(*sums, columns) : nullptr;

  const Buffer turned = blocks ? rotated(x, dtype, rows, depth, *blocks) : nullptr;
  if (blocks && !turned) return std::nullopt;
  const Buffer hidden(new float[rows * rank]);
  const Buffer laid_out(dtype == Dtype::float32 ? nullptr : new float[rows * depth]);
  if (laid_out && turned)
    few_rows_input_cpu(turned.get(), Dtype::float32, rows, depth, laid_out.get());
  else if (laid_out)
    few_rows_input_cpu(x.const_data_ptr(), dtype, rows, depth, laid_out.get());
  if (rank > 0) {
    const LowRankFewParams thin{x.const_data_ptr(),
                                floats(*a),
                                floats(*b),
                                nullptr,
                                nullptr,
                                hidden.get(),
                                nullptr,
                                rows,
                                depth,
                                columns,
                                rank,
                                dtype};
    parallel_for(0, rank, 1 + kTaskOperations / (1 + depth * rows),
                 [&](int64_t begin, int64_t end) { low_rank_few_hidden_cpu(thin, begin, end); });
    for (int64_t i = 0; i < rows * rank; ++i)
      hidden[i] *= (gate ? floats(*gate)[i % rank] : 1.0f) * static_cast<float>(scale);
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = columns;
  Tensor out = empty_on_cpu(shape, x.scalar_type());
  const FewRowsParams p{weight.const_data_ptr(),
                        laid_out ? laid_out.get()
                        : turned ? turned.get()
                                 : x.const_data_ptr<float>(),
                        bias ? bias->const_data_ptr() : nullptr,
                        hidden.get(),
                        b ? floats(*b) : nullptr,
                        added,
                        gain ? floats(*gain) : nullptr,
                        expected,
                        out.mutable_data_ptr(),
                        rows,
                        depth,
                        columns,
                        rank,
                        dtype};
  std::atomic<bool> changed{false};
  // Reading a weight takes longer than multiplying it by few rows, so that less of it is enough for a task.
  parallel_for(0, columns, 1 + kTaskOperations / 4 / (1 + depth * rows),
               [&](int64_t begin, int64_t end) { few_rows_cpu(p, begin, end, changed); });
  if (changed.load(std::memory_order_relaxed)) return std::nullopt;
  return out;
}

std::optional<Tensor> low_rank(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& a,
                               const Tensor& b, std::optional<Tensor> gate, double scale, int64_t most) {
  const auto sizes = few_rows_sizes(x, weight, bias, most);
  if (!sizes) return std::nullopt;
  return few_rows(*sizes, x, weight, bias, {.a = a, .b = b, .gate = std::move(gate), .scale = scale});
}

bool all_same_bits(const std::vector<Tensor>& sources, const std::vector<Tensor>& kept) {
  return std::equal(sources.begin(), sources.end(), kept.begin(), kept.end(), same_bits);
}

// Nothing also where a source of the blocks or of the gain has changed.
std::optional<Tensor> rotate(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& blocks,
                             std::optional<Tensor> gain, const std::vector<Tensor>& sources,
                             const std::vector<Tensor>& kept, int64_t most) {
  const auto sizes = few_rows_sizes(x, weight, bias, most);
  if (!sizes || !all_same_bits(sources, kept)) return std::nullopt;
  return few_rows(*sizes, x, weight, bias, {.blocks = blocks, .gain = std::move(gain)});
}

std::optional<Tensor> rescale(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& a,
                              const Tensor& b, double scale, const Tensor& gain, const Tensor& sums,
                              const std::vector<Tensor>& sources, const std::vector<Tensor>& kept, int64_t most) {
  const auto sizes = few_rows_sizes(x, weight, bias, most);
  if (!sizes || !all_same_bits(sources, kept)) return std::nullopt;
  return few_rows(*sizes, x, weight, bias, {.a = a, .b = b, .gain = gain, .sums = sums, .scale = scale});
}

// Return x, in float32, with every block of its features rotated, or nothing where that is not the way.
std::optional<Tensor> rotate_rows(const Tensor& x, const Tensor& weight, const Tensor& blocks, int64_t most) {
  const auto sizes = few_rows_sizes(x, weight, std::nullopt, most);
  if (!sizes || sizes->dtype != Dtype::float32 || !is_rotation(blocks, sizes->depth)) return std::nullopt;
  const Buffer turned = rotated(x, sizes->dtype, sizes->rows, sizes->depth, blocks);
  if (!turned) return std::nullopt;
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  Tensor out = empty_on_cpu(shape, x.scalar_type());
  std::copy_n(turned.get(), x.numel(), writable(out));
  return out;
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

// Whether neither the weight, by its checksums, nor a source of the gain has changed.
bool same_gain(const Tensor& weight, const Tensor& sums, const std::vector<Tensor>& sources,
               const std::vector<Tensor>& kept) {
  return (is_dense(weight, ScalarType::Float, 2) || is_dense(weight, ScalarType::BFloat16, 2)) &&
         all_same_bits(sources, kept) && sums.size(0) == weight.size(0) && same_row_sums(weight, sums);
}

}  // namespace

std::optional<FewRowsSizes> few_rows_sizes(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           int64_t most) {
  const ScalarType type = weight.scalar_type();
  if ((type != ScalarType::Float && type != ScalarType::BFloat16) || x.dim() == 0 || !is_dense(x, type, x.dim()) ||
      !is_dense(weight, type, 2))
    return std::nullopt;
  const int64_t columns = weight.size(0), depth = weight.size(1);
  if (columns == 0 || depth == 0 || x.size(-1) != depth) return std::nullopt;
  const int64_t rows = x.numel() / depth;
  if (rows == 0 || rows > most || !are_numbers(bias, type, columns)) return std::nullopt;
  return FewRowsSizes{rows, depth, columns, type == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16};
}

std::optional<Tensor> few_rows_linear(const FewRowsSizes& sizes, const Tensor& x, const Tensor& weight,
                                      const std::optional<Tensor>& bias, const float* added) {
  return few_rows(sizes, x, weight, bias, {.added = added});
}

bool are_factors(const Tensor& t, int64_t dimensions) {
  return is_dense(t, ScalarType::Float, dimensions) && t.numel() > 0;
}

}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def(
      "few_rows_low_rank(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? gate, float scale, "
      "int most) -> Tensor?");
  m.def(
      "few_rows_rotate(Tensor x, Tensor weight, Tensor? bias, Tensor blocks, Tensor? gain, Tensor[] sources, "
      "Tensor[] kept, int most) -> Tensor?");
  m.def(
      "few_rows_rescale(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, Tensor gain, "
      "Tensor sums, Tensor[] sources, Tensor[] kept, int most) -> Tensor?");
  m.def("few_rows_rotated(Tensor x, Tensor weight, Tensor blocks, int most) -> Tensor?");
  m.def("row_sums(Tensor weight, Tensor(a!) sums) -> ()");
  m.def("same_row_sums(Tensor weight, Tensor sums) -> bool");
  m.def("same_gain(Tensor weight, Tensor sums, Tensor[] sources, Tensor[] kept) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("few_rows_low_rank", TORCH_BOX(&peftk::low_rank));
  m.impl("few_rows_rotate", TORCH_BOX(&peftk::rotate));
  m.impl("few_rows_rescale", TORCH_BOX(&peftk::rescale));
  m.impl("few_rows_rotated", TORCH_BOX(&peftk::rotate_rows));
  m.impl("row_sums", TORCH_BOX(&peftk::row_sums));
  m.impl("same_row_sums", TORCH_BOX(&peftk::same_row_sums));
  m.impl("same_gain", TORCH_BOX(&peftk::same_gain));
}
