// Checks of the Kronecker product: the small factor's mix of every token, and the writer of the weight.
#include "../../../csrc/cpu/kronecker.cpp"
#include "harness.h"

namespace {

// The terms of one sum, and the bound of its rounding.
struct Sum {
  double truth = 0.0, magnitude = 0.0;
  void add(double term) {
    truth += term;
    magnitude += std::abs(term);
  }
};

template <typename T>
void check_mix(Level level, int64_t tokens, int64_t l, int64_t m, int64_t c, bool add, int64_t chunks) {
  const std::string what = std::string("kronecker mix ") + name_of(level);
  Heap<T> left(tokens * l * c), right(tokens * m * c), mixed_left(tokens * l * c), mixed_right(tokens * m * c);
  Heap<float> w1(l * m), partial(chunks * l * m);
  fill(left), fill(right), fill(w1);
  if (add) fill(mixed_left), fill(mixed_right);
  const std::vector<double> before_left = doubles(mixed_left), before_right = doubles(mixed_right);
  const KroneckerMixParams p{
      left.get(), right.get(), w1.get(), mixed_left.get(), mixed_right.get(), partial.get(), tokens, l, m, c,
      chunks,     add,         add,      dtype_of<T>()};
  in_pieces(chunks, 2, [&](int64_t begin, int64_t end) { VARIANT(level, kronecker_mix_cpu)(p, begin, end); });
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < c; ++k) {
      for (int64_t i = 0; i < l; ++i) {
        const int64_t at = (t * l + i) * c + k;
        Sum sum;
        if (add) sum.add(before_left[at]);
        for (int64_t j = 0; j < m; ++j)
          sum.add(static_cast<double>(w1[i * m + j]) * to_float(right[(t * m + j) * c + k]));
        expect(to_float(mixed_left[at]), sum.truth, sum.magnitude, m + 2.0, output_unit<T>(), what + " left");
      }
      for (int64_t j = 0; j < m; ++j) {
        const int64_t at = (t * m + j) * c + k;
        Sum sum;
        if (add) sum.add(before_right[at]);
        for (int64_t i = 0; i < l; ++i)
          sum.add(static_cast<double>(w1[i * m + j]) * to_float(left[(t * l + i) * c + k]));
        expect(to_float(mixed_right[at]), sum.truth, sum.magnitude, l + 2.0, output_unit<T>(), what + " right");
      }
    }
  for (int64_t i = 0; i < l; ++i)
    for (int64_t j = 0; j < m; ++j) {
      Sum sum;
      double found = 0.0;
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t k = 0; k < c; ++k)
          sum.add(static_cast<double>(to_float(left[(t * l + i) * c + k])) * to_float(right[(t * m + j) * c + k]));
      for (int64_t chunk = 0; chunk < chunks; ++chunk) found += partial[(chunk * l + i) * m + j];
      expect(found, sum.truth, sum.magnitude, static_cast<double>(tokens * c + 8), kFloatUnit, what + " gradient");
    }
}

template <typename T>
void check_weight(Level level, int64_t l, int64_t m, int64_t rows, int64_t columns, int64_t chunks) {
  const std::string what = std::string("kronecker weight ") + name_of(level);
  const int64_t count = l * m * rows * columns, features = m * columns;
  Heap<T> weight(count), out(count);
  Heap<float> w1(l * m), w2(rows * columns), partial(chunks * l * m), dw2(rows * columns);
  fill(weight), fill(w1), fill(w2);
  w1[0] = 0.0f;
  from_float(-0.0f, weight[0]);
  const KroneckerWeightParams p{weight.get(), w1.get(), w2.get(), out.get(), l, m, rows, columns, 1.5f, dtype_of<T>()};
  in_pieces(l * rows, 3, [&](int64_t begin, int64_t end) { VARIANT(level, kronecker_weight_cpu)(p, begin, end); });
  expect(std::signbit(to_float(out[0])), 1, 0, 0, 0, what + " negative zero");
  const KroneckerWeightBackwardParams q{weight.get(), w1.get(), w2.get(), partial.get(), dw2.get(),    l, m,
                                        rows,         columns,  chunks,   1.5f,          dtype_of<T>()};
  in_pieces(chunks, 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, kronecker_weight_backward_cpu)(q, begin, end); });
  std::vector<Sum> first(l * m), second(rows * columns);
  for (int64_t i = 0; i < l; ++i)
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t j = 0; j < m; ++j)
        for (int64_t n = 0; n < columns; ++n) {
          const int64_t at = (i * rows + k) * features + j * columns + n;
          const double before = to_float(weight[at]), a = 1.5 * w1[i * m + j], b = w2[k * columns + n];
          expect(to_float(out[at]), before + a * b, std::abs(before) + std::abs(a * b), 2, output_unit<T>(), what);
          first[i * m + j].add(before * b);
          second[k * columns + n].add(before * a);
        }
  for (int64_t i = 0; i < l * m; ++i) {
    double found = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) found += partial[chunk * l * m + i];
    expect(found, first[i].truth, first[i].magnitude, static_cast<double>(rows * columns + 2), kFloatUnit,
           what + " dw1");
  }
  for (int64_t i = 0; i < rows * columns; ++i)
    expect(dw2[i], second[i].truth, second[i].magnitude, static_cast<double>(l * m + 2), kFloatUnit, what + " dw2");
}

void check_few(Level level, int64_t tokens, int64_t l, int64_t m, int64_t k, int64_t n) {
  const float scale = 1.5f;
  Heap<float> x(tokens * m * n), w1(l * m), w2(k * n), out(tokens * l * k);
  for (Heap<float>* values : {&x, &w1, &w2}) fill(*values);
  const KroneckerFewParams p{x.get(), w1.get(), w2.get(), out.get(), tokens, l, m, k, n, scale};
  in_pieces(k, 9, [&](int64_t begin, int64_t end) { VARIANT(level, kronecker_few_cpu)(p, begin, end); });
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < l; ++i)
      for (int64_t c = 0; c < k; ++c) {
        double truth = 0.0, magnitude = 0.0;
        for (int64_t j = 0; j < m; ++j)
          for (int64_t at = 0; at < n; ++at) {
            const double term = static_cast<double>(x[(t * m + j) * n + at]) * w1[i * m + j] * w2[c * n + at] * scale;
            truth += term;
            magnitude += std::abs(term);
          }
        expect(out[(t * l + i) * k + c], truth, magnitude, static_cast<double>(m + n + 3), kFloatUnit,
               std::string("kronecker_few ") + name_of(level));
      }
}

void run_kronecker(Level level) {
  for (const int64_t tokens : {0, 1, 7})
    for (const int64_t l : {1, 2, 5, 8})
      for (const int64_t m : {1, 3, 8})
        for (const int64_t c : {1, 7, 16, 33})
          for (const bool add : {false, true}) {
            check_mix<float>(level, tokens, l, m, c, add, tokens ? 2 : 1);
            check_mix<BFloat16>(level, tokens, l, m, c, add, 3);
          }
  for (const int64_t l : {1, 3, 8})
    for (const int64_t m : {1, 2, 5})
      for (const int64_t rows : {1, 4, 9})
        for (const int64_t columns : {1, 8, 13, 32}) {
          check_weight<float>(level, l, m, rows, columns, rows < 2 ? 1 : 2);
          check_weight<BFloat16>(level, l, m, rows, columns, 1);
          for (const int64_t tokens : {1, 3}) check_few(level, tokens, l, m, rows, columns);
        }
}

const Family family("kronecker", run_kronecker);

}  // namespace
