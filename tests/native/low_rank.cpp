// Checks of the thin products and of dropout, against naive sums and the published generator.
#include "../../csrc/cpu/low_rank.cpp"
#include "harness.h"

namespace {

struct Words {
  uint32_t word[4];
};

// Philox4x32-10 as the paper writes it: 64-bit products, split.
Words naive_philox(uint64_t seed, uint64_t index) {
  uint32_t x[4] = {static_cast<uint32_t>(index & 0xffffffffu), static_cast<uint32_t>(index >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed & 0xffffffffu), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(x[0]) * 0xD2511F53u, p1 = static_cast<uint64_t>(x[2]) * 0xCD9E8D57u;
    const uint32_t y0 = static_cast<uint32_t>(p1 >> 32) ^ x[1] ^ key[0], y1 = static_cast<uint32_t>(p1);
    const uint32_t y2 = static_cast<uint32_t>(p0 >> 32) ^ x[3] ^ key[1], y3 = static_cast<uint32_t>(p0);
    x[0] = y0, x[1] = y1, x[2] = y2, x[3] = y3;
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return {{x[0], x[1], x[2], x[3]}};
}

void check_philox() {
  // The known answer of the Random123 library for a counter and a key of zeros.
  const uint32_t known[4] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  for (const uint64_t seed : {0ull, 1ull, 0x123456789abcdefull, 0xffffffffffffffffull})
    for (const uint64_t index : {0ull, 1ull, 0xffffffffull, 0x100000000ull, 0x7fffffffffffffffull}) {
      uint32_t found[4];
      philox(seed, index, found);
      const Words expected = naive_philox(seed, index);
      for (int i = 0; i < 4; ++i) {
        expect(found[i], expected.word[i], 0, 0, 0, "philox");
        if (seed == 0 && index == 0) expect(found[i], known[i], 0, 0, 0, "philox, known answer");
      }
    }
}

template <typename T>
void check_dropout(Level level, int64_t count, uint32_t threshold, bool in_place) {
  constexpr float scale = 1.25f;
  const uint64_t seed = 0xfedcba9876543210ull + static_cast<uint64_t>(count);
  Heap<T> x(count), own(in_place ? 0 : count);
  fill(x);
  const std::vector<double> before = doubles(x);
  T* out = in_place ? x.get() : own.get();
  const DropoutParams p{x.get(), out, count, seed, threshold, scale, dtype_of<T>()};
  in_pieces((count + 3) / 4, 2, [&](int64_t begin, int64_t end) { VARIANT(level, dropout_cpu)(p, begin, end); });
  for (int64_t i = 0; i < count; ++i) {
    const bool dropped = naive_philox(seed, static_cast<uint64_t>(i / 4)).word[i % 4] / 256 < threshold;
    expect(to_float(out[i]), dropped ? 0.0 : before[i] * scale, 0, 0, dropped ? 0.0 : 1.01 * output_unit<T>(),
           std::string("dropout ") + name_of(level));
  }
}

void check_shrink(Level level, int64_t rows, int64_t depth, int64_t rank, bool transposed) {
  const float scale = 1.5f;
  const int64_t row = transposed ? 1 : rank, col = transposed ? depth : 1;
  Heap<float> x(rows * depth), m(depth * rank), packed(depth * padded(rank)), out(rows * rank);
  fill(x);
  fill(m);
  pad_columns_cpu(m.get(), row, col, depth, rank, packed.get());
  const ShrinkParams p{x.get(), packed.get(), out.get(), rows, depth, rank, scale};
  in_pieces(rows, 13, [&](int64_t begin, int64_t end) { VARIANT(level, shrink_cpu)(p, begin, end); });
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      double truth = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < depth; ++k) {
        const double term = static_cast<double>(x[i * depth + k]) * m[k * row + j * col] * scale;
        truth += term;
        magnitude += std::abs(term);
      }
      expect(out[i * rank + j], truth, magnitude, static_cast<double>(depth + 2), kFloatUnit,
             std::string("shrink ") + name_of(level));
    }
}

void check_outer(Level level, int64_t rows, int64_t features, int64_t rank, bool transposed) {
  const float scale = -0.75f;
  const int64_t row = transposed ? 1 : rank, col = transposed ? features : 1;
  Heap<float> x(rows * features), h(rows * rank), packed(rows * padded(rank)), out(features * rank);
  fill(x);
  fill(h);
  pad_columns_cpu(h.get(), rank, 1, rows, rank, packed.get());
  const OuterParams p{x.get(), packed.get(), out.get(), rows, features, rank, row, col, scale};
  in_pieces((features + kOuterColumns - 1) / kOuterColumns, 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, outer_cpu)(p, begin, end); });
  for (int64_t i = 0; i < features; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      double truth = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < rows; ++k) {
        const double term = static_cast<double>(x[k * features + i]) * h[k * rank + j] * scale;
        truth += term;
        magnitude += std::abs(term);
      }
      expect(out[i * row + j * col], truth, magnitude, static_cast<double>(rows + 2), kFloatUnit,
             std::string("outer ") + name_of(level));
    }
}

void run_low_rank(Level level) {
  for (const int64_t rank : {1, 3, 8, 16, 29, 32})
    for (const int64_t rows : {0, 1, 5, 24, 25, 49})
      for (const int64_t features : {1, 7, 128, 129, 300})
        for (const bool transposed : {false, true}) {
          check_shrink(level, rows, features, rank, transposed);
          check_outer(level, rows, features, rank, transposed);
        }
  for (int64_t count = 0; count <= 9; ++count)
    for (const bool in_place : {false, true})
      for (const uint32_t threshold : {0u, 1u << 22, 1u << 24}) {
        check_dropout<float>(level, count, threshold, in_place);
        check_dropout<BFloat16>(level, count, threshold, in_place);
      }
}

}  // namespace
