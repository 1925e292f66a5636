// Checks of the products of LoHa's factors, against naive sums in double precision.
#include "../../../csrc/cpu/hadamard.cpp"
#include "harness.h"

namespace {

struct HadamardSizes {
  int64_t out, features, r1, r2;
};

// Rows of whole vectors, zero from column `columns` on.
void pad_rows(Heap<float>& from, int64_t rows, int64_t columns, Heap<float>& to) {
  const int64_t wide = padded(columns);
  for (int64_t i = 0; i < rows * wide; ++i) to[i] = i % wide < columns ? from[i / wide * columns + i % wide] : 0.0f;
}

// (columns, padded(rows)) of a (rows, columns) matrix.
void pad_transposed(Heap<float>& from, int64_t rows, int64_t columns, Heap<float>& to) {
  const int64_t wide = padded(rows);
  for (int64_t i = 0; i < columns * wide; ++i) to[i] = i % wide < rows ? from[i % wide * columns + i / wide] : 0.0f;
}

template <typename T>
void check_khatri_rao(Level level, const HadamardSizes& s) {
  const int64_t rank = s.r1 * s.r2;
  Heap<float> w1_a(s.out * s.r1), w1_b(s.r1 * s.features), w2_a(s.out * s.r2), w2_b(s.r2 * s.features);
  Heap<T> a(rank * s.features), b(s.out * rank), grad_a(rank * s.features), grad_b(s.out * rank);
  for (Heap<float>* factor : {&w1_a, &w1_b, &w2_a, &w2_b}) fill(*factor);
  fill(grad_a);
  fill(grad_b);
  const std::string what = std::string("khatri_rao ") + name_of(level), back = what + " backward";
  const KhatriRaoParams p{w1_a.get(), w1_b.get(), w2_a.get(), w2_b.get(), a.get(),      b.get(),
                          s.out,      s.features, s.r1,       s.r2,       dtype_of<T>()};
  in_pieces(rank, 3, [&](int64_t begin, int64_t end) { VARIANT(level, khatri_rao_a_cpu)(p, begin, end); });
  in_pieces(s.out, 3, [&](int64_t begin, int64_t end) { VARIANT(level, khatri_rao_b_cpu)(p, begin, end); });
  for (int64_t i = 0; i < s.r1; ++i)
    for (int64_t j = 0; j < s.r2; ++j) {
      for (int64_t k = 0; k < s.features; ++k) {
        const double truth = static_cast<double>(w1_b[i * s.features + k]) * w2_b[j * s.features + k];
        expect(to_float(a[(i * s.r2 + j) * s.features + k]), truth, std::abs(truth), 1, output_unit<T>(), what);
      }
      for (int64_t o = 0; o < s.out; ++o) {
        const double truth = static_cast<double>(w1_a[o * s.r1 + i]) * w2_a[o * s.r2 + j];
        expect(to_float(b[o * rank + i * s.r2 + j]), truth, std::abs(truth), 1, output_unit<T>(), what);
      }
    }

  for (const bool need_first : {true, false})
    for (const bool need_second : {true, false}) {
      if (!need_first && !need_second) continue;
      Heap<float> dw1_a(need_first ? w1_a.count() : 0), dw1_b(need_first ? w1_b.count() : 0);
      Heap<float> dw2_a(need_second ? w2_a.count() : 0), dw2_b(need_second ? w2_b.count() : 0);
      const auto room = [](Heap<float>& heap, bool need) { return need ? heap.get() : nullptr; };
      const KhatriRaoBackwardParams q{grad_a.get(),
                                      grad_b.get(),
                                      w1_a.get(),
                                      w1_b.get(),
                                      w2_a.get(),
                                      w2_b.get(),
                                      room(dw1_a, need_first),
                                      room(dw1_b, need_first),
                                      room(dw2_a, need_second),
                                      room(dw2_b, need_second),
                                      s.out,
                                      s.features,
                                      s.r1,
                                      s.r2,
                                      dtype_of<T>()};
      in_pieces((s.features + kHadamardColumns - 1) / kHadamardColumns, 1,
                [&](int64_t begin, int64_t end) { VARIANT(level, khatri_rao_backward_a_cpu)(q, begin, end); });
      in_pieces(s.out, 3,
                [&](int64_t begin, int64_t end) { VARIANT(level, khatri_rao_backward_b_cpu)(q, begin, end); });
      // One side at a time: the element of a factor at (rank, index), and the gradient at (pair, index).
      const auto side = [&](auto grad, auto first, auto second, auto dfirst, auto dsecond, int64_t length) {
        for (int64_t k = 0; k < length; ++k) {
          for (int64_t i = 0; need_first && i < s.r1; ++i) {
            double truth = 0, magnitude = 0;
            for (int64_t j = 0; j < s.r2; ++j) {
              truth += grad(i * s.r2 + j, k) * second(j, k);
              magnitude += std::abs(grad(i * s.r2 + j, k) * second(j, k));
            }
            expect(dfirst(i, k), truth, magnitude, static_cast<double>(s.r2 + 1), kFloatUnit, back);
          }
          for (int64_t j = 0; need_second && j < s.r2; ++j) {
            double truth = 0, magnitude = 0;
            for (int64_t i = 0; i < s.r1; ++i) {
              truth += grad(i * s.r2 + j, k) * first(i, k);
              magnitude += std::abs(grad(i * s.r2 + j, k) * first(i, k));
            }
            expect(dsecond(j, k), truth, magnitude, static_cast<double>(s.r1 + 1), kFloatUnit, back);
          }
        }
      };
      const int64_t n = s.features;
      side([&](int64_t pair, int64_t k) { return static_cast<double>(to_float(grad_a[pair * n + k])); },
           [&](int64_t i, int64_t k) { return static_cast<double>(w1_b[i * n + k]); },
           [&](int64_t j, int64_t k) { return static_cast<double>(w2_b[j * n + k]); },
           [&](int64_t i, int64_t k) { return dw1_b[i * n + k]; },
           [&](int64_t j, int64_t k) { return dw2_b[j * n + k]; }, n);
      side([&](int64_t pair, int64_t o) { return static_cast<double>(to_float(grad_b[o * rank + pair])); },
           [&](int64_t i, int64_t o) { return static_cast<double>(w1_a[o * s.r1 + i]); },
           [&](int64_t j, int64_t o) { return static_cast<double>(w2_a[o * s.r2 + j]); },
           [&](int64_t i, int64_t o) { return dw1_a[o * s.r1 + i]; },
           [&](int64_t j, int64_t o) { return dw2_a[o * s.r2 + j]; }, s.out);
    }
}

struct Pair {
  int64_t rank;
  Heap<float> a, b, wide, transposed;
  Pair(const HadamardSizes& s, int64_t r)
      : rank(r), a(s.out * r), b(r * s.features), wide(r * padded(s.features)), transposed(s.features * padded(r)) {
    fill(a);
    fill(b);
    pad_rows(b, r, s.features, wide);
    pad_transposed(b, r, s.features, transposed);
  }
};

// Element (o, k) of the pair's product, or the sum of the magnitudes of its terms.
double product_of(Pair& w, const HadamardSizes& s, int64_t o, int64_t k, bool magnitude) {
  double sum = 0;
  for (int64_t i = 0; i < w.rank; ++i) {
    const double term = static_cast<double>(w.a[o * w.rank + i]) * w.b[i * s.features + k];
    sum += magnitude ? std::abs(term) : term;
  }
  return sum;
}

template <typename T>
void check_hadamard_weight(Level level, const HadamardSizes& s) {
  const float scale = -0.75f;
  const int64_t stride = padded(s.features);
  Pair one(s, s.r1), two(s, s.r2);
  // The rows of the last output are zero: there the weight keeps every bit, a negative zero included.
  for (int64_t i = 0; i < s.r1; ++i) one.a[(s.out - 1) * s.r1 + i] = 0.0f;
  Heap<T> weight(s.out * s.features), result(s.out * s.features);
  fill(weight);
  from_float(-0.0f, weight[(s.out - 1) * s.features]);
  const HadamardWeightParams p{weight.get(), one.a.get(), one.wide.get(), two.a.get(), two.wide.get(),
                               result.get(), s.out,       s.features,     s.r1,        s.r2,
                               stride,       scale,       dtype_of<T>()};
  in_pieces((s.out + kHadamardRows - 1) / kHadamardRows, 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, hadamard_weight_cpu)(p, begin, end); });
  const std::string what = std::string("hadamard_weight ") + name_of(level);
  const double operations = static_cast<double>(s.r1 + s.r2 + 4);
  for (int64_t o = 0; o < s.out; ++o)
    for (int64_t k = 0; k < s.features; ++k) {
      const double base = to_float(weight[o * s.features + k]);
      const double truth = base + scale * product_of(one, s, o, k, false) * product_of(two, s, o, k, false);
      const double magnitude =
          std::abs(base) + std::abs(scale) * product_of(one, s, o, k, true) * product_of(two, s, o, k, true);
      expect(to_float(result[o * s.features + k]), truth, magnitude, operations, output_unit<T>(), what);
    }
  expect(std::memcmp(result.get() + (s.out - 1) * s.features, weight.get() + (s.out - 1) * s.features,
                     s.features * sizeof(T)),
         0, 0, 0, 0, what + " bits");
}

template <typename T>
void check_hadamard_backward(Level level, const HadamardSizes& s, int64_t chunk, bool need_a, bool need_b) {
  const float scale = 1.25f;
  const int64_t stride = padded(s.features), chunks = (s.out + chunk - 1) / chunk;
  Pair one(s, s.r1), two(s, s.r2);
  Heap<T> grad(s.out * s.features);
  fill(grad);
  Heap<float> da1(need_a ? s.out * s.r1 : 0), da2(need_a ? s.out * s.r2 : 0);
  Heap<float> db1(need_b ? chunks * s.r1 * stride : 0), db2(need_b ? chunks * s.r2 * stride : 0);
  for (Heap<float>* sums : {&db1, &db2})
    for (int64_t i = 0; i < sums->count(); ++i) (*sums)[i] = 0.0f;
  const HadamardWeightBackwardParams p{grad.get(),
                                       one.a.get(),
                                       one.wide.get(),
                                       two.a.get(),
                                       two.wide.get(),
                                       one.transposed.get(),
                                       two.transposed.get(),
                                       need_a ? da1.get() : nullptr,
                                       need_a ? da2.get() : nullptr,
                                       need_b ? db1.get() : nullptr,
                                       need_b ? db2.get() : nullptr,
                                       s.out,
                                       s.features,
                                       s.r1,
                                       s.r2,
                                       stride,
                                       chunk,
                                       scale,
                                       dtype_of<T>()};
  in_pieces(chunks, 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, hadamard_weight_backward_cpu)(p, begin, end); });
  const std::string what = std::string("hadamard_weight_backward ") + name_of(level);
  const auto check_pair = [&](Pair& own, Pair& other, Heap<float>& da, Heap<float>& db) {
    std::vector<double> ta(s.out * own.rank), ma(ta), tb(own.rank * s.features), mb(tb);
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t k = 0; k < s.features; ++k) {
        const double g = scale * static_cast<double>(to_float(grad[o * s.features + k]));
        const double term = g * product_of(other, s, o, k, false);
        const double size = std::abs(g) * product_of(other, s, o, k, true);
        for (int64_t i = 0; i < own.rank; ++i) {
          ta[o * own.rank + i] += term * own.b[i * s.features + k];
          ma[o * own.rank + i] += size * std::abs(own.b[i * s.features + k]);
          tb[i * s.features + k] += term * own.a[o * own.rank + i];
          mb[i * s.features + k] += size * std::abs(own.a[o * own.rank + i]);
        }
      }
    const double operations = static_cast<double>(other.rank + s.out + s.features + chunks + 4);
    for (int64_t i = 0; i < da.count(); ++i) expect(da[i], ta[i], ma[i], operations, kFloatUnit, what);
    for (int64_t i = 0; need_b && i < own.rank * s.features; ++i) {
      float sum = 0.0f;
      for (int64_t c = 0; c < chunks; ++c) sum += db[(c * own.rank + i / s.features) * stride + i % s.features];
      expect(sum, tb[i], mb[i], operations, kFloatUnit, what);
    }
  };
  check_pair(one, two, da1, db1);
  check_pair(two, one, da2, db2);
}

void check_few(Level level, const HadamardSizes& s, int64_t rows) {
  const float scale = 1.5f;
  Heap<float> x(rows * s.features), w1_a(s.out * s.r1), w1_b(s.r1 * s.features), w2_a(s.out * s.r2),
      w2_b(s.r2 * s.features), hidden(rows * s.r1 * s.r2), out(rows * s.out);
  for (Heap<float>* values : {&x, &w1_a, &w1_b, &w2_a, &w2_b}) fill(*values);
  const HadamardFewParams p{x.get(), w1_a.get(), w1_b.get(), w2_a.get(), w2_b.get(), hidden.get(), out.get(),
                            rows,    s.out,      s.features, s.r1,       s.r2,       scale};
  in_pieces(rows * s.r1, 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, hadamard_few_hidden_cpu)(p, begin, end); });
  in_pieces(s.out, 9, [&](int64_t begin, int64_t end) { VARIANT(level, hadamard_few_cpu)(p, begin, end); });
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t n = 0; n < s.out; ++n) {
      double truth = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < s.features; ++k)
        for (int64_t i = 0; i < s.r1; ++i)
          for (int64_t j = 0; j < s.r2; ++j) {
            const double term = static_cast<double>(w1_a[n * s.r1 + i]) * w1_b[i * s.features + k] *
                                w2_a[n * s.r2 + j] * w2_b[j * s.features + k] * x[t * s.features + k] * scale;
            truth += term;
            magnitude += std::abs(term);
          }
      expect(out[t * s.out + n], truth, magnitude, static_cast<double>(s.features + s.r1 + s.r2 + 5), kFloatUnit,
             std::string("hadamard_few ") + name_of(level));
    }
}

void run_hadamard(Level level) {
  for (const HadamardSizes& s :
       {HadamardSizes{1, 1, 1, 1}, {3, 5, 2, 2}, {24, 128, 8, 8}, {25, 129, 3, 5}, {50, 140, 9, 1}}) {
    check_khatri_rao<float>(level, s);
    check_khatri_rao<BFloat16>(level, s);
    check_hadamard_weight<float>(level, s);
    check_hadamard_weight<BFloat16>(level, s);
    for (const int64_t rows : {1, 3}) check_few(level, s, rows);
    for (const int64_t chunk : {kHadamardRows, 2 * kHadamardRows}) {
      check_hadamard_backward<float>(level, s, chunk, true, true);
      check_hadamard_backward<BFloat16>(level, s, chunk, true, true);
    }
    check_hadamard_backward<float>(level, s, kHadamardRows, true, false);
    check_hadamard_backward<float>(level, s, kHadamardRows, false, true);
  }
}

const Family family("hadamard", run_hadamard);

}  // namespace
