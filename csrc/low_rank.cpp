#include "low_rank.h"

#include <torch/csrc/stable/ops.h>

#include <memory>

#include "check.h"
#include "native_ops.h"

namespace peftk {
namespace {

using torch::stable::parallel_for;

struct Sizes {
  int64_t rows, columns;
};

Sizes check_matrix(const Tensor& t, const char* name) {
  check_float(t, name);
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected 2 dimensions");
  return {t.size(0), t.size(1)};
}

// Operations of a task: enough to pay for handing it to a thread.
constexpr int64_t kTaskOperations = 1 << 18;

}  // namespace

void shrink(const Tensor& x, const Tensor& m, bool transposed, double scale, Tensor& out) {
  const Sizes s = check_matrix(x, "x"), f = check_matrix(m, "m"), o = check_matrix(out, "out");
  const int64_t depth = transposed ? f.columns : f.rows, rank = transposed ? f.rows : f.columns;
  STD_TORCH_CHECK(depth == s.columns, "m: expected ", s.columns, " features, as x has; got ", depth);
  STD_TORCH_CHECK(o.rows == s.rows && o.columns == rank, "out: expected shape (rows, rank)");
  const std::unique_ptr<float[]> packed(new float[depth * padded(rank)]);
  pad_columns_cpu(m.const_data_ptr<float>(), transposed ? 1 : rank, transposed ? depth : 1, depth, rank, packed.get());
  const ShrinkParams p{
      x.const_data_ptr<float>(), packed.get(), static_cast<float*>(out.mutable_data_ptr()), s.rows, depth, rank,
      static_cast<float>(scale)};
  parallel_for(0, s.rows, 1 + kTaskOperations / (1 + depth * rank),
               [&](int64_t begin, int64_t end) { shrink_cpu(p, begin, end); });
}

void outer(const Tensor& x, const Tensor& h, bool transposed, double scale, Tensor& out) {
  const Sizes s = check_matrix(x, "x"), f = check_matrix(h, "h"), o = check_matrix(out, "out");
  const int64_t rank = f.columns;
  STD_TORCH_CHECK(f.rows == s.rows, "h: expected ", s.rows, " rows, as x has; got ", f.rows);
  STD_TORCH_CHECK(transposed ? o.rows == rank && o.columns == s.columns : o.rows == s.columns && o.columns == rank,
                  "out: expected shape (features, rank), or (rank, features) where transposed");
  const std::unique_ptr<float[]> packed(new float[s.rows * padded(rank)]);
  pad_columns_cpu(h.const_data_ptr<float>(), rank, 1, s.rows, rank, packed.get());
  const OuterParams p{x.const_data_ptr<float>(),
                      packed.get(),
                      static_cast<float*>(out.mutable_data_ptr()),
                      s.rows,
                      s.columns,
                      rank,
                      transposed ? 1 : rank,
                      transposed ? s.columns : 1,
                      static_cast<float>(scale)};
  parallel_for(0, (s.columns + kOuterColumns - 1) / kOuterColumns,
               1 + kTaskOperations / (1 + s.rows * kOuterColumns * rank),
               [&](int64_t begin, int64_t end) { outer_cpu(p, begin, end); });
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
  torch::stable::parallel_for(0, (p.count + 3) / 4, 4096,
                              [&](int64_t begin, int64_t end) { dropout_cpu(p, begin, end); });
}

}  // namespace peftk
