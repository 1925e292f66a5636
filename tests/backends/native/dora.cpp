// Checks of DoRA's norms and of its output, against naive sums in double precision.
#include "../../../csrc/cpu/dora.cpp"
#include "harness.h"

namespace {

template <typename T>
void check_dora_norm(Level level, int64_t rows, int64_t cols, int64_t rank, bool columns) {
  const int64_t left_row = columns ? 1 : rank, left_col = columns ? rows : 1, count = columns ? cols : rows;
  Heap<T> weight(rows * cols);
  Heap<float> left(rows * rank), right(rank * cols), strips(strips_size(rank, cols, kDoraStrip)), out(count);
  fill(weight);
  fill(left);
  fill(right);
  pack_strips_cpu(right.get(), cols, 1, rank, cols, 1.0f, strips.get(), kDoraStrip);
  const DoraNormParams p{weight.get(), left.get(), strips.get(), out.get(), rows,         cols,
                         rank,         left_row,   left_col,     columns,   dtype_of<T>()};
  if (columns)
    in_pieces((cols + kDoraColumns - 1) / kDoraColumns, 1,
              [&](int64_t begin, int64_t end) { VARIANT(level, dora_column_norms_cpu)(p, begin, end); });
  else
    in_pieces(rows, 13, [&](int64_t begin, int64_t end) { VARIANT(level, dora_row_norms_cpu)(p, begin, end); });
  std::vector<double> squares(count), errors(count);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      double entry = to_float(weight[i * cols + j]), magnitude = std::abs(entry);
      for (int64_t k = 0; k < rank; ++k) {
        const double term = static_cast<double>(left[i * left_row + k * left_col]) * right[k * cols + j];
        entry += term;
        magnitude += std::abs(term);
      }
      squares[columns ? j : i] += entry * entry;
      errors[columns ? j : i] += magnitude * magnitude;
    }
  // A square's error is twice that of its root, relative to the root; the sum's rounding is within its length.
  for (int64_t n = 0; n < count; ++n) {
    const double truth = std::sqrt(squares[n]), magnitude = truth > 0 ? errors[n] / truth : 0.0;
    expect(out[n], truth, magnitude, static_cast<double>(2 * rank + 300), kFloatUnit,
           std::string("dora norms ") + name_of(level));
  }
}

template <typename T>
void check_dora_compose(Level level, int64_t rows, int64_t cols, int64_t rank, bool with_shift) {
  Heap<T> base(rows * cols), hidden(rows * rank), out(rows * cols);
  Heap<float> factor(rank * cols), strips(strips_size(rank, cols, kDoraStrip)), gain(cols), shift(cols);
  fill(base);
  fill(hidden);
  fill(factor);
  fill(gain, 2.0);
  fill(shift);
  pack_strips_cpu(factor.get(), cols, 1, rank, cols, 1.0f, strips.get(), kDoraStrip);
  const DoraComposeParams p{base.get(), hidden.get(), strips.get(), gain.get(), with_shift ? shift.get() : nullptr,
                            out.get(),  rows,         cols,         rank,       dtype_of<T>()};
  in_pieces(rows, 13, [&](int64_t begin, int64_t end) { VARIANT(level, dora_compose_cpu)(p, begin, end); });
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      double truth = static_cast<double>(to_float(base[i * cols + j])) * gain[j], magnitude = std::abs(truth);
      if (with_shift) {
        truth += shift[j];
        magnitude += std::abs(shift[j]);
      }
      for (int64_t k = 0; k < rank; ++k) {
        const double term = static_cast<double>(to_float(hidden[i * rank + k])) * factor[k * cols + j];
        truth += term;
        magnitude += std::abs(term);
      }
      expect(to_float(out[i * cols + j]), truth, magnitude, static_cast<double>(rank + 3), output_unit<T>(),
             std::string("dora compose ") + name_of(level));
    }
}

void run_dora(Level level) {
  for (const int64_t rank : {1, 5, 16})
    for (const int64_t rows : {0, 1, 7, 25, 40})
      for (const int64_t cols : {0, 1, 19, 128, 263, 520})
        for (const bool flag : {false, true}) {
          check_dora_norm<float>(level, rows, cols, rank, flag);
          check_dora_norm<BFloat16>(level, rows, cols, rank, flag);
          check_dora_compose<float>(level, rows, cols, rank, flag);
          check_dora_compose<BFloat16>(level, rows, cols, rank, flag);
        }
}

const Family family("dora", run_dora);

}  // namespace
