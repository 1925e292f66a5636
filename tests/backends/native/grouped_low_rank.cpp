// Checks of the grouped low-rank product against naive sums, for groups of any size.
#include "../../../csrc/cpu/grouped_low_rank.cpp"
#include "harness.h"

#include <memory>
#include <vector>

namespace {

struct GroupedBound {
  double sum = 0.0, magnitude = 0.0;
  void add(double term) {
    sum += term;
    magnitude += std::abs(term);
  }
};

std::vector<int64_t> ends_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> ends;
  int64_t end = 0;
  for (const int64_t size : sizes) ends.push_back(end += size);
  return ends;
}

int64_t group_of(const std::vector<int64_t>& ends, int64_t row) {
  int64_t group = 0;
  while (group < static_cast<int64_t>(ends.size()) && ends[group] <= row) ++group;
  return group;
}

// `others` rows of no group follow those of the groups. The rows come in pieces, as from several threads.
template <typename T>
void check_grouped(Level level, const std::vector<int64_t>& sizes, int64_t others, int64_t depth, int64_t columns,
                   int64_t rank, bool gates, int64_t piece) {
  const std::vector<int64_t> ends = ends_of(sizes);
  const int64_t groups = static_cast<int64_t>(sizes.size()), rows = ends.back() + others;
  const float scale = 1.5f;
  Heap<T> base(rows * columns), x(rows * depth), grad(rows * columns);
  Heap<float> a(groups * rank * depth), b(groups * columns * rank), gate(gates ? rows * rank : 0);
  fill(base), fill(x), fill(grad), fill(a), fill(b), fill(gate);
  const std::vector<double> y0 = doubles(base), x0 = doubles(x), g0 = doubles(grad);
  const std::string what = std::string("grouped_low_rank ") + name_of(level);
  const auto factor = [&](int64_t t, int64_t j) { return gates ? static_cast<double>(gate[t * rank + j]) : 1.0; };
  const auto a_of = [&](int64_t g, int64_t j, int64_t k) { return static_cast<double>(a[(g * rank + j) * depth + k]); };
  const auto b_of = [&](int64_t g, int64_t c, int64_t j) {
    return static_cast<double>(b[(g * columns + c) * rank + j]);
  };

  Heap<T> out(rows * columns), hidden(rows * rank);
  const GroupedLowRankParams p{
      base.get(), x.get(),      a.get(),      b.get(), ends.data(), gates ? gate.get() : nullptr,
      out.get(),  hidden.get(), rows,         depth,   columns,     rank,
      groups,     scale,        dtype_of<T>()};
  in_pieces(rows, piece, [&](int64_t begin, int64_t end) { VARIANT(level, grouped_low_rank_cpu)(p, begin, end); });
  const double unit = 1.01 * output_unit<T>(), operations = static_cast<double>(depth + columns + rank + 10);
  std::vector<GroupedBound> h(rows * rank);
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t g = group_of(ends, t);
    for (int64_t j = 0; j < rank; ++j) {
      if (g < groups)
        for (int64_t k = 0; k < depth; ++k) h[t * rank + j].add(x0[t * depth + k] * a_of(g, j, k));
      expect(to_float(hidden[t * rank + j]), h[t * rank + j].sum, h[t * rank + j].magnitude, operations, unit,
             what + " hidden");
    }
    for (int64_t c = 0; c < columns; ++c) {
      double sum = y0[t * columns + c], magnitude = std::abs(sum);
      if (g == groups) {
        expect(to_float(out[t * columns + c]), sum, 0, 0, 0, what + " out of no group");
        continue;
      }
      for (int64_t j = 0; j < rank; ++j) {
        sum += h[t * rank + j].sum * factor(t, j) * b_of(g, c, j) * scale;
        magnitude += h[t * rank + j].magnitude * std::abs(factor(t, j) * b_of(g, c, j) * scale);
      }
      expect(to_float(out[t * columns + c]), sum, magnitude, operations, unit, what + " out");
    }
  }

  // The base's own buffer takes the sum as well.
  Heap<T> both(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) both[i] = base[i];
  GroupedLowRankParams onto_base = p;
  onto_base.base = onto_base.out = both.get();
  in_pieces(rows, piece,
            [&](int64_t begin, int64_t end) { VARIANT(level, grouped_low_rank_cpu)(onto_base, begin, end); });
  for (int64_t i = 0; i < rows * columns; ++i)
    expect(to_float(both[i]), to_float(out[i]), 0, 0, 0, what + " onto the base");

  const std::vector<double> h0 = doubles(hidden);
  Heap<float> da(groups * rank * depth), db(groups * columns * rank), dgate(gates ? rows * rank : 0);
  Heap<T> dx(rows * depth);
  const GroupedLowRankBackwardParams q{grad.get(),
                                       x.get(),
                                       hidden.get(),
                                       a.get(),
                                       b.get(),
                                       ends.data(),
                                       gates ? gate.get() : nullptr,
                                       dx.get(),
                                       da.get(),
                                       db.get(),
                                       gates ? dgate.get() : nullptr,
                                       rows,
                                       depth,
                                       columns,
                                       rank,
                                       groups,
                                       scale,
                                       dtype_of<T>(),
                                       false};
  const auto run = [&](const GroupedLowRankBackwardParams& params) {
    std::vector<GroupedPart> parts = grouped_parts(ends.data(), groups, rows);
    std::vector<std::unique_ptr<Heap<float>>> partials;
    const auto same = [&](size_t i, size_t j) { return j < parts.size() && parts[i].group == parts[j].group; };
    for (size_t i = 0; i < parts.size(); ++i)
      if (parts[i].group < groups && (same(i, i + 1) || (i > 0 && same(i, i - 1)))) {
        partials.push_back(std::make_unique<Heap<float>>(rank * (depth + columns)));
        parts[i].partial = partials.back()->get();
      }
    const int64_t count = static_cast<int64_t>(parts.size());
    std::atomic<int64_t> next{0};
    VARIANT(level, grouped_low_rank_backward_cpu)(params, parts.data(), count, next);
    for (int64_t i = 0, several = 0; i < count; i += several) {
      for (several = 1; same(i, i + several);) ++several;
      if (parts[i].partial) VARIANT(level, grouped_low_rank_sums_cpu)(params, parts.data() + i, several);
    }
  };
  run(q);
  Heap<T> added(rows * depth);
  fill(added);
  const std::vector<double> before = doubles(added);
  GroupedLowRankBackwardParams onto = q;
  onto.dx = added.get(), onto.add_dx = true;
  run(onto);
  // The gradient in the gated product.
  std::vector<GroupedBound> dh(rows * rank);
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t g = group_of(ends, t);
    for (int64_t j = 0; j < rank; ++j) {
      GroupedBound& d = dh[t * rank + j];
      if (g < groups)
        for (int64_t c = 0; c < columns; ++c) d.add(g0[t * columns + c] * b_of(g, c, j) * scale);
      const double saved = h0[t * rank + j];
      if (gates)
        expect(dgate[t * rank + j], d.sum * saved, d.magnitude * std::abs(saved), operations, kFloatUnit,
               what + " dgate");
      d.sum *= factor(t, j), d.magnitude *= std::abs(factor(t, j));
    }
    for (int64_t k = 0; k < depth; ++k) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t j = 0; j < rank && g < groups; ++j) {
        sum += dh[t * rank + j].sum * a_of(g, j, k);
        magnitude += dh[t * rank + j].magnitude * std::abs(a_of(g, j, k));
      }
      expect(to_float(dx[t * depth + k]), sum, magnitude, operations, unit, what + " dx");
      const double held = before[t * depth + k];
      expect(to_float(added[t * depth + k]), held + sum, magnitude + std::abs(held), operations, unit,
             what + " dx onto what is there");
    }
  }
  const double longer = operations + static_cast<double>(rows);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g ? ends[g - 1] : 0;
    for (int64_t j = 0; j < rank; ++j) {
      for (int64_t k = 0; k < depth; ++k) {
        double sum = 0.0, magnitude = 0.0;
        for (int64_t t = first; t < ends[g]; ++t) {
          sum += dh[t * rank + j].sum * x0[t * depth + k];
          magnitude += dh[t * rank + j].magnitude * std::abs(x0[t * depth + k]);
        }
        expect(da[(g * rank + j) * depth + k], sum, magnitude, longer, kFloatUnit, what + " da");
      }
      for (int64_t c = 0; c < columns; ++c) {
        GroupedBound d;
        for (int64_t t = first; t < ends[g]; ++t) d.add(g0[t * columns + c] * h0[t * rank + j] * factor(t, j) * scale);
        expect(db[(g * columns + c) * rank + j], d.sum, d.magnitude, longer, kFloatUnit, what + " db");
      }
    }
  }
}

template <typename T>
void check_pieces(Level level) {
  // Pieces of any size give the same bits: a group is taken the same way wherever it is cut.
  const std::vector<int64_t> ends = ends_of({3, 0, 40, 8, 9});
  const int64_t rows = 62, depth = 21, columns = 35, rank = 5, groups = 5;
  Heap<T> base(rows * columns), x(rows * depth), one(rows * columns), other(rows * columns), hidden(rows * rank);
  Heap<float> a(groups * rank * depth), b(groups * columns * rank);
  fill(base), fill(x), fill(a), fill(b);
  GroupedLowRankParams p{base.get(), x.get(), a.get(), b.get(), ends.data(), nullptr, one.get(),    hidden.get(),
                         rows,       depth,   columns, rank,    groups,      0.5f,    dtype_of<T>()};
  VARIANT(level, grouped_low_rank_cpu)(p, 0, rows);
  p.out = other.get();
  in_pieces(rows, 7, [&](int64_t begin, int64_t end) { VARIANT(level, grouped_low_rank_cpu)(p, begin, end); });
  for (int64_t i = 0; i < rows * columns; ++i)
    expect(to_float(other[i]), to_float(one[i]), 0, 0, 0, "grouped_low_rank in pieces");
}

template <typename T>
void run_grouped(Level level) {
  for (const bool gates : {false, true})
    for (const int64_t rank : {1, 7, 8, 19}) {
      check_grouped<T>(level, {0, 5, 1, 0, 30, 8, 9, 0}, 3, 33, 18, rank, gates, 13);
      check_grouped<T>(level, {0, 0}, 4, 5, 7, rank, gates, 2);
      check_grouped<T>(level, {65}, 0, 1, 129, rank, gates, 20);
      check_grouped<T>(level, {1, 1, 1}, 0, 130, 3, rank, gates, 2);
    }
  // More rows than are summed at a time.
  check_grouped<T>(level, {700, 2}, 1, 70, 9, 3, true, 150);
  check_pieces<T>(level);
}

void run_grouped_low_rank(Level level) {
  run_grouped<float>(level);
  run_grouped<BFloat16>(level);
}

const Family family("grouped_low_rank", run_grouped_low_rank);

}  // namespace
