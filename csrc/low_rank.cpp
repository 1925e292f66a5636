#include "low_rank.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "check.h"
#include "host.h"

namespace peftk {
namespace {

using Buffer = std::unique_ptr<float[]>;

struct Sizes {
  int64_t rows, depth, columns, rank;
};

void check_shape(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_float(t, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected shape (", rows, ", ",
                  columns, ")");
}

void check_shape(const Tensor& t, const char* name, int64_t count) {
  check_float(t, name);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count, name, ": expected shape (", count, ")");
}

Sizes check_factors(const Tensor& x, const Tensor& a, const Tensor& b) {
  for (const auto& [t, name] : {std::pair{&x, "x"}, {&a, "a"}, {&b, "b"}})
    STD_TORCH_CHECK(t->dim() == 2, name, ": expected 2 dimensions; got ", t->dim());
  const Sizes s{x.size(0), x.size(1), b.size(0), a.size(0)};
  check_float(x, "x");
  check_shape(a, "a", s.rank, s.depth);
  check_shape(b, "b", s.columns, s.rank);
  return s;
}

// Return how many numbers lie between the gates of two rows: none if all share one.
int64_t check_gate(const std::optional<Tensor>& gate, const Sizes& s) {
  if (!gate) return 0;
  check_float(*gate, "gate");
  if (gate->dim() == 1 && gate->size(0) == s.rank) return 0;
  check_shape(*gate, "gate", s.rows, s.rank);
  return s.rank;
}

Buffer padded_copy(const Tensor& m, int64_t row, int64_t col, int64_t rows, int64_t columns) {
  Buffer copy(new float[rows * padded(columns)]);
  pad_columns_cpu(floats(m), row, col, rows, columns, copy.get());
  return copy;
}

Buffer strips_of(const Tensor& m, int64_t row, int64_t col, int64_t rank, int64_t columns, float scale) {
  Buffer copy(new float[strips_size(rank, columns)]);
  pack_strips_cpu(floats(m), row, col, rank, columns, scale, copy.get());
  return copy;
}

// The gradient of a gate that all rows share. The longest sums, of the fewest numbers: in doubles they cost nothing.
void sum_gate(const float* dhidden, const float* hidden, const Sizes& s, float* dgate) {
  const std::unique_ptr<double[]> sums(new double[s.rank]());
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t j = 0; j < s.rank; ++j)
      sums[j] += static_cast<double>(dhidden[row * s.rank + j]) * hidden[row * s.rank + j];
  for (int64_t j = 0; j < s.rank; ++j) dgate[j] = static_cast<float>(sums[j]);
}

void low_rank(const Tensor& x, const Tensor& a, const Tensor& b, std::optional<Tensor> gate, double scale, Tensor& out,
              Tensor& hidden) {
  const Sizes s = check_factors(x, a, b);
  const bool expands = out.numel() > 0;
  if (expands) check_shape(out, "out", s.rows, s.columns);
  check_shape(hidden, "hidden", s.rows, s.rank);
  const int64_t gate_row = check_gate(gate, s);
  const Buffer columns = padded_copy(a, 1, s.depth, s.depth, s.rank);
  const Buffer strips = strips_of(b, 1, s.rank, s.rank, s.columns, static_cast<float>(scale));
  const LowRankParams p{floats(x),
                        columns.get(),
                        strips.get(),
                        gate ? floats(*gate) : nullptr,
                        expands ? writable(out) : nullptr,
                        writable(hidden),
                        s.rows,
                        s.depth,
                        s.columns,
                        s.rank,
                        gate_row};
  parallel_for(0, s.rows, 1 + kTaskOperations / (1 + (s.depth + s.columns) * s.rank),
               [&](int64_t begin, int64_t end) { low_rank_cpu(p, begin, end); });
}

// False, and nothing is done, where nothing would be added before the gain: what is then the frozen layer's output, but
// for the gain, is the caller's business.
bool low_rank_few(const Tensor& x, const Tensor& a, const Tensor& b, std::optional<Tensor> gate, double scale,
                  std::optional<Tensor> gain, std::optional<Tensor> bias, Tensor& out) {
  const Dtype dtype = check_dtype(x, "x");
  const int64_t depth = a.dim() == 2 ? a.size(1) : 0, rank = a.dim() == 2 ? a.size(0) : 0;
  STD_TORCH_CHECK(depth > 0 && x.numel() % depth == 0, "a: expected shape (rank, depth of x)");
  const int64_t rows = x.numel() / depth, columns = b.dim() == 2 ? b.size(0) : 0;
  check_shape(a, "a", rank, depth);
  check_shape(b, "b", columns, rank);
  check_dense(out, "out");
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type() && out.numel() == rows * columns,
                  "out: expected the dtype of x and as many rows");
  if (gate) check_shape(*gate, "gate", rank);
  if (gain) check_shape(*gain, "gain", columns);
  if (bias) {
    check_dense(*bias, "bias");
    STD_TORCH_CHECK(gain && bias->scalar_type() == x.scalar_type() && bias->numel() == columns,
                    "bias: expected the dtype of x, a number for each column, and a gain");
  }
  const auto is_zero = [](float number) { return number == 0.0f; };
  if (gain && std::all_of(floats(b), floats(b) + columns * rank, is_zero)) return false;
  const Buffer products(new float[rows * rank]);
  const LowRankFewParams p{x.const_data_ptr(),
                           floats(a),
                           floats(b),
                           gain ? floats(*gain) : nullptr,
                           bias ? bias->const_data_ptr() : nullptr,
                           products.get(),
                           out.mutable_data_ptr(),
                           rows,
                           depth,
                           columns,
                           rank,
                           dtype};
  parallel_for(0, rank, 1 + kTaskOperations / (1 + depth * rows),
               [&](int64_t begin, int64_t end) { low_rank_few_hidden_cpu(p, begin, end); });
  for (int64_t i = 0; i < rows * rank; ++i)
    p.hidden[i] *= (gate ? floats(*gate)[i % rank] : 1.0f) * static_cast<float>(scale);
  parallel_for(0, columns, 1 + kTaskOperations / (1 + rank * rows),
               [&](int64_t begin, int64_t end) { low_rank_few_cpu(p, begin, end); });
  return true;
}

void low_rank_backward(const Tensor& grad, const Tensor& x, const Tensor& hidden, const Tensor& a, const Tensor& b,
                       std::optional<Tensor> gate, double scale, Tensor& dx, Tensor& da, Tensor& db, Tensor& dgate) {
  const Sizes s = check_factors(x, a, b);
  check_shape(grad, "grad", s.rows, s.columns);
  check_shape(hidden, "hidden", s.rows, s.rank);
  const int64_t gate_row = check_gate(gate, s);
  const bool need_x = dx.numel() > 0, need_a = da.numel() > 0, need_b = db.numel() > 0, need_gate = dgate.numel() > 0;
  if (need_x) check_shape(dx, "dx", s.rows, s.depth);
  if (need_a) check_shape(da, "da", s.rank, s.depth);
  if (need_b) check_shape(db, "db", s.columns, s.rank);
  if (need_gate) {
    check_float(dgate, "dgate");
    STD_TORCH_CHECK(gate && dgate.numel() == gate->numel(), "dgate: expected as many numbers as gate has");
  }

  const Buffer columns = padded_copy(b, s.rank, 1, s.columns, s.rank);
  const Buffer strips = strips_of(a, s.depth, 1, s.rank, s.depth, 1.0f);
  const Buffer dhidden(new float[s.rows * s.rank]);
  const LowRankBackwardParams p{floats(grad),
                                floats(x),
                                floats(hidden),
                                strips.get(),
                                columns.get(),
                                gate ? floats(*gate) : nullptr,
                                dhidden.get(),
                                need_x ? writable(dx) : nullptr,
                                need_a ? writable(da) : nullptr,
                                need_b ? writable(db) : nullptr,
                                need_gate && gate_row ? writable(dgate) : nullptr,
                                s.rows,
                                s.depth,
                                s.columns,
                                s.rank,
                                gate_row,
                                static_cast<float>(scale)};
  if (need_x || need_a || need_gate)
    parallel_for(0, s.rows, 1 + kTaskOperations / (1 + (s.depth + s.columns) * s.rank),
                 [&](int64_t begin, int64_t end) { low_rank_backward_cpu(p, begin, end); });
  const int64_t tiles = (need_a ? low_rank_tiles(s.depth) : 0) + (need_b ? low_rank_tiles(s.columns) : 0);
  parallel_for(0, tiles, 1 + kTaskOperations / (1 + kFactorColumns * s.rows * s.rank),
               [&](int64_t begin, int64_t end) { low_rank_factors_cpu(p, begin, end); });
  if (need_gate && gate_row == 0) sum_gate(dhidden.get(), floats(hidden), s, writable(dgate));
}

void dropout(const Tensor& x, int64_t seed, int64_t threshold, double scale, Tensor& out) {
  const Dtype dtype = check_dtype(x, "x");
  check_like(out, "out", x, "x");
  STD_TORCH_CHECK(threshold >= 0 && threshold <= 1 << 24, "threshold: expected 0 to 2^24; got ", threshold);
  const DropoutParams p{x.const_data_ptr(),
                        out.mutable_data_ptr(),
                        x.numel(),
                        static_cast<uint64_t>(seed),
                        static_cast<uint32_t>(threshold),
                        static_cast<float>(scale),
                        dtype};
  parallel_for(0, (p.count + 3) / 4, 4096, [&](int64_t begin, int64_t end) { dropout_cpu(p, begin, end); });
}

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("low_rank(Tensor x, Tensor a, Tensor b, Tensor? gate, float scale, Tensor(a!) out, Tensor(b!) hidden) -> ()");
  m.def(
      "low_rank_few(Tensor x, Tensor a, Tensor b, Tensor? gate, float scale, Tensor? gain, Tensor? bias, "
      "Tensor(a!) out) -> bool");
  m.def(
      "low_rank_backward(Tensor grad, Tensor x, Tensor hidden, Tensor a, Tensor b, Tensor? gate, float scale, "
      "Tensor(a!) dx, Tensor(b!) da, Tensor(c!) db, Tensor(d!) dgate) -> ()");
  m.def("dropout(Tensor x, int seed, int threshold, float scale, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("low_rank", TORCH_BOX(&peftk::low_rank));
  m.impl("low_rank_few", TORCH_BOX(&peftk::low_rank_few));
  m.impl("low_rank_backward", TORCH_BOX(&peftk::low_rank_backward));
  m.impl("dropout", TORCH_BOX(&peftk::dropout));
}
