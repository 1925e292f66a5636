#include "grouped_low_rank.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "host.h"

namespace peftk {
namespace {

struct Sizes {
  int64_t rows, depth, columns, rank, groups;
};

Sizes check_groups(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& offsets) {
  STD_TORCH_CHECK(x.dim() == 2 && a.dim() == 3 && b.dim() == 3, "x, a, b: expected 2, 3 and 3 dimensions");
  const Sizes s{x.size(0), x.size(1), b.size(1), a.size(1), a.size(0)};
  check_float(a, "a");
  check_float(b, "b");
  STD_TORCH_CHECK(s.groups > 0 && s.rank > 0 && a.size(2) == s.depth, "a: expected shape (groups, rank, depth of x)");
  STD_TORCH_CHECK(b.size(0) == s.groups && b.size(2) == s.rank, "b: expected shape (groups, columns, rank)");
  check_dense(offsets, "offsets");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.numel() == s.groups,
                  "offsets: expected int64, one for each group");
  const int64_t* ends = offsets.const_data_ptr<int64_t>();
  int64_t start = 0;
  for (int64_t g = 0; g < s.groups; start = ends[g++])
    STD_TORCH_CHECK(start <= ends[g] && ends[g] <= s.rows, "offsets: expected ends that ascend from 0 to at most ",
                    s.rows, "; got ", ends[g]);
  return s;
}

void check_matrix(const Tensor& t, const char* name, const Tensor& like, int64_t rows, int64_t columns) {
  check_dense(t, name);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of x");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected shape (", rows, ", ",
                  columns, ")");
}

const float* check_gate(const std::optional<Tensor>& gate, const Sizes& s) {
  if (!gate) return nullptr;
  check_float(*gate, "gate");
  STD_TORCH_CHECK(gate->dim() == 2 && gate->size(0) == s.rows && gate->size(1) == s.rank,
                  "gate: expected shape (rows, rank)");
  return floats(*gate);
}

void grouped_low_rank(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& offsets,
                      std::optional<Tensor> gate, double scale, Tensor& out, Tensor& hidden) {
  const Dtype dtype = check_dtype(x, "x");
  const Sizes s = check_groups(x, a, b, offsets);
  check_matrix(base, "base", x, s.rows, s.columns);
  check_matrix(out, "out", x, s.rows, s.columns);
  check_matrix(hidden, "hidden", x, s.rows, s.rank);
  const GroupedLowRankParams p{base.const_data_ptr(),
                               x.const_data_ptr(),
                               floats(a),
                               floats(b),
                               offsets.const_data_ptr<int64_t>(),
                               check_gate(gate, s),
                               out.mutable_data_ptr(),
                               hidden.mutable_data_ptr(),
                               s.rows,
                               s.depth,
                               s.columns,
                               s.rank,
                               s.groups,
                               static_cast<float>(scale),
                               dtype};
  parallel_for(0, s.rows, 1 + kTaskOperations / (1 + (s.depth + s.columns) * s.rank),
               [&](int64_t begin, int64_t end) { grouped_low_rank_cpu(p, begin, end); });
}

// Parts differ as groups do: whoever is done takes the next one. Each sums alone, so that nothing depends on who.
void run_backward(const GroupedLowRankBackwardParams& p) {
  std::vector<GroupedPart> parts = grouped_parts(p.ends, p.groups, p.rows);
  const auto alone = [&](size_t i) {
    const int64_t group = parts[i].group;
    const bool before = i > 0 && parts[i - 1].group == group;
    return group == p.groups || !(before || (i + 1 < parts.size() && parts[i + 1].group == group));
  };
  std::vector<size_t> shared;
  for (size_t i = 0; i < parts.size(); ++i)
    if ((p.da || p.db) && !alone(i)) shared.push_back(i);
  const int64_t numbers = p.rank * (p.depth + p.columns), count = static_cast<int64_t>(parts.size());
  const std::unique_ptr<float[]> partials(new float[shared.size() * numbers]);
  for (size_t k = 0; k < shared.size(); ++k) parts[shared[k]].partial = partials.get() + k * numbers;
  std::atomic<int64_t> next{0};
  const int64_t operations = 1 + (p.rows / count + 1) * (p.depth + p.columns) * p.rank;
  parallel_for(0, count, 1 + kTaskOperations / operations,
               [&](int64_t, int64_t) { grouped_low_rank_backward_cpu(p, parts.data(), count, next); });
  std::vector<std::pair<size_t, int64_t>> sums;
  for (const size_t i : shared) {
    if (sums.empty() || parts[sums.back().first].group != parts[i].group) sums.emplace_back(i, 0);
    ++sums.back().second;
  }
  parallel_for(0, static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) grouped_low_rank_sums_cpu(p, parts.data() + sums[i].first, sums[i].second);
  });
}

void grouped_low_rank_backward(const Tensor& grad, const Tensor& x, const Tensor& hidden, const Tensor& a,
                               const Tensor& b, const Tensor& offsets, std::optional<Tensor> gate, double scale,
                               bool add_dx, Tensor& dx, Tensor& da, Tensor& db, Tensor& dgate) {
  const Dtype dtype = check_dtype(x, "x");
  const Sizes s = check_groups(x, a, b, offsets);
  check_matrix(grad, "grad", x, s.rows, s.columns);
  check_matrix(hidden, "hidden", x, s.rows, s.rank);
  const bool need_x = dx.numel() > 0, need_a = da.numel() > 0, need_b = db.numel() > 0, need_gate = dgate.numel() > 0;
  if (need_x) check_matrix(dx, "dx", x, s.rows, s.depth);
  if (need_a) check_float(da, "da"), check_like(da, "da", a, "a");
  if (need_b) check_float(db, "db"), check_like(db, "db", b, "b");
  const float* gates = check_gate(gate, s);
  if (need_gate) {
    STD_TORCH_CHECK(gates != nullptr, "dgate: expected none without a gate");
    check_like(dgate, "dgate", *gate, "gate");
  }
  const GroupedLowRankBackwardParams p{grad.const_data_ptr(),
                                       x.const_data_ptr(),
                                       hidden.const_data_ptr(),
                                       floats(a),
                                       floats(b),
                                       offsets.const_data_ptr<int64_t>(),
                                       gates,
                                       need_x ? dx.mutable_data_ptr() : nullptr,
                                       need_a ? writable(da) : nullptr,
                                       need_b ? writable(db) : nullptr,
                                       need_gate ? writable(dgate) : nullptr,
                                       s.rows,
                                       s.depth,
                                       s.columns,
                                       s.rank,
                                       s.groups,
                                       static_cast<float>(scale),
                                       dtype,
                                       add_dx};
  if (need_x || need_a || need_b || need_gate) run_backward(p);
}

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def(
      "grouped_low_rank(Tensor base, Tensor x, Tensor a, Tensor b, Tensor offsets, Tensor? gate, float scale, "
      "Tensor(a!) out, Tensor(b!) hidden) -> ()");
  m.def(
      "grouped_low_rank_backward(Tensor grad, Tensor x, Tensor hidden, Tensor a, Tensor b, Tensor offsets, "
      "Tensor? gate, float scale, bool add_dx, Tensor(a!) dx, Tensor(b!) da, Tensor(c!) db, Tensor(d!) dgate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("grouped_low_rank", TORCH_BOX(&peftk::grouped_low_rank));
  m.impl("grouped_low_rank_backward", TORCH_BOX(&peftk::grouped_low_rank_backward));
}
