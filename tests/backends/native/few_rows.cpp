// Checks of a linear layer on few rows, against sums in double precision, and of the checksums of a weight.
#include "../../../csrc/cpu/few_rows.cpp"
#include "harness.h"

namespace {

struct Bound {
  double sum = 0.0, magnitude = 0.0;
  void add(double term) {
    sum += term;
    magnitude += std::abs(term);
  }
};

// x as the kernel takes it.
template <typename T>
void lay_out(Heap<T>& x, int64_t rows, int64_t depth, Heap<float>& to) {
  if (sizeof(T) == sizeof(float))
    std::memcpy(to.get(), x.get(), rows * depth * sizeof(float));
  else
    few_rows_input_cpu(x.get(), dtype_of<T>(), rows, depth, to.get());
}

template <typename T>
void check_few_rows(Level level, int64_t rows, int64_t depth, int64_t columns, int64_t rank, bool whole) {
  Heap<T> x(rows * depth), weight(columns * depth), bias(columns), out(rows * columns);
  Heap<float> numbers(rows * depth), hidden(rows * rank), b(columns * rank), gain(columns), added(rows * columns);
  Heap<uint32_t> sums(columns * kSumWords);
  for (Heap<T>* values : {&x, &weight, &bias}) fill(*values);
  for (Heap<float>* values : {&hidden, &b, &gain, &added}) fill(*values);
  lay_out(x, rows, depth, numbers);
  VARIANT(level, row_sums_cpu)(weight.get(), depth, dtype_of<T>(), sums.get(), 0, columns);
  FewRowsParams p{weight.get(), numbers.get(), nullptr, hidden.get(), b.get(), nullptr, nullptr,
                  nullptr,      out.get(),     rows,    depth,        columns, rank,    dtype_of<T>()};
  if (whole) p.bias = bias.get(), p.added = added.get(), p.gain = gain.get(), p.sums = sums.get();
  std::atomic<bool> changed{false};
  const auto run = [&] {
    in_pieces(columns, 5, [&](int64_t begin, int64_t end) { VARIANT(level, few_rows_cpu)(p, begin, end, changed); });
  };
  run();
  const std::string what = std::string("few_rows ") + name_of(level);
  expect(changed ? 1 : 0, 0, 0, 0, 0, what + ", a weight that is the same");
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t c = 0; c < columns; ++c) {
      Bound y;
      for (int64_t k = 0; k < depth; ++k)
        y.add(static_cast<double>(to_float(x[t * depth + k])) * to_float(weight[c * depth + k]));
      for (int64_t j = 0; j < rank; ++j) y.add(static_cast<double>(hidden[t * rank + j]) * b[c * rank + j]);
      if (whole) {
        y.add(added[t * columns + c]);
        y.sum *= gain[c];
        y.magnitude *= std::abs(gain[c]);
        y.add(to_float(bias[c]));
      }
      expect(to_float(out[t * columns + c]), y.sum, y.magnitude, static_cast<double>(depth + rank + 5),
             output_unit<T>(), what);
    }
  if (!whole) return;
  // One bit of any number changes the checksum of its row, and only that.
  for (int64_t at = 0; at < columns * depth; at += 1 + depth / 3) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(weight.get() + at);
    bytes[at % sizeof(T)] ^= static_cast<uint8_t>(1 << at % 8);
    changed = false;
    run();
    expect(changed ? 1 : 0, 1, 0, 0, 0, what + ", one bit");
    bytes[at % sizeof(T)] ^= static_cast<uint8_t>(1 << at % 8);
  }
}

// The same on every level, so that what one thread has kept serves another one, and different for what a user writes.
template <typename T>
void check_row_sums(Level level, int64_t depth) {
  Heap<T> weight(depth);
  fill(weight);
  const std::string what = std::string("row_sums ") + name_of(level);
  std::vector<std::vector<uint32_t>> seen;
  const auto note = [&] {
    std::vector<uint32_t> found(kSumWords), plain(kSumWords);
    VARIANT(level, row_sums_cpu)(weight.get(), depth, dtype_of<T>(), found.data(), 0, 1);
    VARIANT(Level::base, row_sums_cpu)(weight.get(), depth, dtype_of<T>(), plain.data(), 0, 1);
    expect(found == plain ? 1 : 0, 1, 0, 0, 0, what + ", as at the base level");
    for (const std::vector<uint32_t>& other : seen) expect(found == other ? 1 : 0, 0, 0, 0, 0, what + ", another row");
    seen.push_back(found);
  };
  note();
  const auto all = [&](auto change) {
    for (int64_t k = 0; k < depth; ++k) from_float(change(to_float(weight[k]), k), weight[k]);
    note();
  };
  all([](float v, int64_t) { return -v; });
  all([](float v, int64_t) { return 2.0f * v; });
  all([](float v, int64_t k) { return k % 2 ? v : -v; });
  all([](float v, int64_t k) { return k % 64 ? v : -v; });
  all([](float v, int64_t k) { return k < 33 ? -v : v; });
  std::swap(weight[0], weight[depth - 1]);
  note();
  all([](float v, int64_t) { return v + 0.5f; });
}

void run_few_rows(Level level) {
  for (const bool whole : {false, true})
    for (const int64_t rank : {0, 1, 8, 19})
      for (const int64_t rows : {1, 2, 3, 4, 7, 9})
        for (const auto& [depth, columns] : {std::pair<int64_t, int64_t>{1, 3}, {16, 4}, {32, 11}, {99, 6}, {130, 5}}) {
          check_few_rows<float>(level, rows, depth, columns, rank, whole);
          check_few_rows<BFloat16>(level, rows, depth, columns, rank, whole);
        }
  for (const int64_t depth : {40, 64, 100, 256}) {
    check_row_sums<float>(level, depth);
    check_row_sums<BFloat16>(level, depth);
  }
}

const Family family("few_rows", run_few_rows);

}  // namespace
