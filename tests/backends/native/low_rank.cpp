// Checks of the low-rank product and of dropout, against naive sums and the published generator.
#include "../../../csrc/cpu/low_rank.cpp"
#include "harness.h"

#include <utility>

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

// Which gate a check has: none, one for all rows, or one for each.
enum class Gate { none, shared, own };

struct Bound {
  double sum = 0.0, magnitude = 0.0;
  void add(double term) {
    sum += term;
    magnitude += std::abs(term);
  }
};

void check_low_rank(Level level, int64_t rows, int64_t depth, int64_t columns, int64_t rank, Gate kind) {
  const float scale = 1.5f;
  const int64_t gate_row = kind == Gate::own ? rank : 0;
  Heap<float> x(rows * depth), a(rank * depth), b(columns * rank),
      gates(kind == Gate::none ? 0 : rank * (gate_row ? rows : 1));
  Heap<float> out(rows * columns), hidden(rows * rank), grad(rows * columns), dx(rows * depth);
  for (Heap<float>* values : {&x, &a, &b, &gates, &out, &grad, &dx}) fill(*values);
  const std::vector<double> y_before = doubles(out), dx_before = doubles(dx);
  const float* gate = kind == Gate::none ? nullptr : gates.get();
  const auto g = [&](int64_t t, int64_t j) { return gate ? static_cast<double>(gate[t * gate_row + j]) : 1.0; };
  const std::string what = std::string("low_rank ") + name_of(level), of_hidden = what + " hidden",
                    of_out = what + " out";
  const std::string of_dx = what + " dx", of_da = what + " da", of_db = what + " db", of_dgate = what + " dgate",
                    of_dhidden = what + " dhidden";

  Heap<float> a_columns(depth * padded(rank)), b_strips(strips_size(rank, columns));
  pad_columns_cpu(a.get(), 1, depth, depth, rank, a_columns.get());
  pack_strips_cpu(b.get(), 1, rank, rank, columns, scale, b_strips.get());
  const LowRankParams p{x.get(), a_columns.get(), b_strips.get(), gate, out.get(), hidden.get(),
                        rows,    depth,           columns,        rank, gate_row};
  in_pieces(rows, 13, [&](int64_t begin, int64_t end) { VARIANT(level, low_rank_cpu)(p, begin, end); });
  // The truth continues from the float32 product that the kernel keeps, as the gradients do.
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < rank; ++j) {
      Bound h;
      for (int64_t k = 0; k < depth; ++k) h.add(static_cast<double>(x[t * depth + k]) * a[j * depth + k]);
      expect(hidden[t * rank + j], h.sum, h.magnitude, static_cast<double>(depth + 2), kFloatUnit, of_hidden);
    }
    for (int64_t c = 0; c < columns; ++c) {
      Bound y;
      y.add(y_before[t * columns + c]);
      for (int64_t j = 0; j < rank; ++j)
        y.add(static_cast<double>(hidden[t * rank + j]) * g(t, j) * b[c * rank + j] * scale);
      expect(out[t * columns + c], y.sum, y.magnitude, static_cast<double>(rank + 4), kFloatUnit, of_out);
    }
  }

  Heap<float> b_columns(columns * padded(rank)), a_strips(strips_size(rank, depth));
  pad_columns_cpu(b.get(), rank, 1, columns, rank, b_columns.get());
  pack_strips_cpu(a.get(), depth, 1, rank, depth, 1.0f, a_strips.get());
  Heap<float> dhidden(rows * rank), da(rank * depth), db(columns * rank), dgate(gate_row ? rows * rank : 0);
  const LowRankBackwardParams q{grad.get(),
                                x.get(),
                                hidden.get(),
                                a_strips.get(),
                                b_columns.get(),
                                gate,
                                dhidden.get(),
                                dx.get(),
                                da.get(),
                                db.get(),
                                gate_row ? dgate.get() : nullptr,
                                rows,
                                depth,
                                columns,
                                rank,
                                gate_row,
                                scale};
  in_pieces(rows, 13, [&](int64_t begin, int64_t end) { VARIANT(level, low_rank_backward_cpu)(q, begin, end); });
  in_pieces(low_rank_tiles(depth) + low_rank_tiles(columns), 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, low_rank_factors_cpu)(q, begin, end); });

  // The gradient in the gated product, and its bound.
  std::vector<Bound> dh(rows * rank);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t c = 0; c < columns; ++c)
        dh[t * rank + j].add(static_cast<double>(grad[t * columns + c]) * b[c * rank + j] * scale);
  const double operations = static_cast<double>(columns + rows + rank + 8);
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t k = 0; k < depth; ++k) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t t = 0; t < rows; ++t) {
        sum += dh[t * rank + j].sum * g(t, j) * x[t * depth + k];
        magnitude += dh[t * rank + j].magnitude * std::abs(g(t, j) * x[t * depth + k]);
      }
      expect(da[j * depth + k], sum, magnitude, operations, kFloatUnit, of_da);
    }
    for (int64_t c = 0; c < columns; ++c) {
      Bound d;
      for (int64_t t = 0; t < rows; ++t)
        d.add(static_cast<double>(grad[t * columns + c]) * hidden[t * rank + j] * g(t, j) * scale);
      expect(db[c * rank + j], d.sum, d.magnitude, operations, kFloatUnit, of_db);
    }
  }
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t k = 0; k < depth; ++k) {
      double sum = dx_before[t * depth + k], magnitude = std::abs(sum);
      for (int64_t j = 0; j < rank; ++j) {
        sum += dh[t * rank + j].sum * g(t, j) * a[j * depth + k];
        magnitude += dh[t * rank + j].magnitude * std::abs(g(t, j) * a[j * depth + k]);
      }
      expect(dx[t * depth + k], sum, magnitude, operations, kFloatUnit, of_dx);
    }
  for (int64_t i = 0; i < rows * rank; ++i) {
    expect(dhidden[i], dh[i].sum, dh[i].magnitude, operations, kFloatUnit, of_dhidden);
    const double h = hidden[i];
    if (gate_row) expect(dgate[i], dh[i].sum * h, dh[i].magnitude * std::abs(h), operations, kFloatUnit, of_dgate);
  }
}

// Few rows, from factors as they lie.
template <typename T>
void check_few(Level level, int64_t rows, int64_t depth, int64_t columns, int64_t rank, bool rescaled) {
  Heap<T> x(rows * depth), out(rows * columns), bias(columns);
  Heap<float> a(rank * depth), b(columns * rank), hidden(rows * rank), gain(columns);
  fill(x), fill(out), fill(a), fill(b), fill(bias), fill(gain);
  const std::vector<double> before = doubles(out), seen = doubles(x);
  const LowRankFewParams p{x.get(),
                           a.get(),
                           b.get(),
                           rescaled ? gain.get() : nullptr,
                           rescaled && rank % 2 ? bias.get() : nullptr,
                           hidden.get(),
                           out.get(),
                           rows,
                           depth,
                           columns,
                           rank,
                           dtype_of<T>()};
  const std::string what = std::string("low_rank_few ") + name_of(level);
  in_pieces(rank, 3, [&](int64_t begin, int64_t end) { VARIANT(level, low_rank_few_hidden_cpu)(p, begin, end); });
  in_pieces(columns, 3, [&](int64_t begin, int64_t end) { VARIANT(level, low_rank_few_cpu)(p, begin, end); });
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < rank; ++j) {
      Bound h;
      for (int64_t k = 0; k < depth; ++k) h.add(seen[t * depth + k] * a[j * depth + k]);
      expect(hidden[t * rank + j], h.sum, h.magnitude, static_cast<double>(depth + 2), kFloatUnit, what + " hidden");
    }
    for (int64_t c = 0; c < columns; ++c) {
      Bound y;
      y.add(before[t * columns + c]);
      for (int64_t j = 0; j < rank; ++j) y.add(static_cast<double>(hidden[t * rank + j]) * b[c * rank + j]);
      if (p.gain) y.sum *= gain[c], y.magnitude *= std::abs(gain[c]);
      if (p.bias) y.add(to_float(bias[c]));
      expect(to_float(out[t * columns + c]), y.sum, y.magnitude, static_cast<double>(rank + 6), 1.01 * output_unit<T>(),
             what);
    }
  }
}

// Each gradient alone, bit for bit what it is among the others.
void check_needs(Level level) {
  const int64_t rows = 70, depth = 21, columns = 35, rank = 5;
  Heap<float> x(rows * depth), a(padded(depth) * 16), b(columns * padded(rank)), gate(rows * rank);
  Heap<float> grad(rows * columns), hidden(rows * rank), dhidden(rows * rank), one(rows * columns);
  Heap<float> dx(rows * depth), da(rank * depth), db(columns * rank), dgate(rows * rank);
  for (Heap<float>* values : {&x, &a, &b, &gate, &grad, &hidden}) fill(*values);
  const auto run = [&](float* to_x, float* to_a, float* to_b, float* to_gate) {
    if (to_x) std::memset(to_x, 0, sizeof(float) * rows * depth);
    const LowRankBackwardParams q{grad.get(),    x.get(), hidden.get(), a.get(), b.get(), gate.get(),
                                  dhidden.get(), to_x,    to_a,         to_b,    to_gate, rows,
                                  depth,         columns, rank,         rank,    0.5f};
    if (to_x || to_a || to_gate) VARIANT(level, low_rank_backward_cpu)(q, 0, rows);
    const int64_t tiles = (to_b ? low_rank_tiles(columns) : 0) + (to_a ? low_rank_tiles(depth) : 0);
    VARIANT(level, low_rank_factors_cpu)(q, 0, tiles);
  };
  run(dx.get(), da.get(), db.get(), dgate.get());
  const auto same = [&](Heap<float>& all, const char* what) {
    const std::string alone = std::string("low_rank alone, ") + what;
    for (int64_t i = 0; i < all.count(); ++i) expect(one[i], all[i], 0, 0, 0, alone);
  };
  run(one.get(), nullptr, nullptr, nullptr), same(dx, "dx");
  run(nullptr, one.get(), nullptr, nullptr), same(da, "da");
  run(nullptr, nullptr, one.get(), nullptr), same(db, "db");
  run(nullptr, nullptr, nullptr, one.get()), same(dgate, "dgate");
}

void run_low_rank(Level level) {
  if (level == Level::base) check_philox();
  for (const Gate gate : {Gate::none, Gate::shared, Gate::own})
    for (const int64_t rank : {1, 7, 16, 29})
      for (const int64_t rows : {0, 1, 30, 65})
        for (const auto& [depth, columns] : {std::pair<int64_t, int64_t>{1, 129}, {7, 16}, {64, 64}, {130, 3}})
          check_low_rank(level, rows, depth, columns, rank, gate);
  check_low_rank(level, 50, 1500, 20, 3, Gate::none);
  // More rows than are summed at a time.
  for (const Gate gate : {Gate::none, Gate::shared, Gate::own}) check_low_rank(level, 1000, 70, 9, 3, gate);
  check_needs(level);
  for (const int64_t rank : {1, 7, 8, 19})
    for (const int64_t rows : {1, 5})
      for (const auto& [depth, columns] : {std::pair<int64_t, int64_t>{1, 130}, {64, 16}, {133, 3}}) {
        for (const bool rescaled : {false, true}) {
          check_few<float>(level, rows, depth, columns, rank, rescaled);
          check_few<BFloat16>(level, rows, depth, columns, rank, rescaled);
        }
      }
  for (int64_t count = 0; count <= 9; ++count)
    for (const bool in_place : {false, true})
      for (const uint32_t threshold : {0u, 1u << 22, 1u << 24}) {
        check_dropout<float>(level, count, threshold, in_place);
        check_dropout<BFloat16>(level, count, threshold, in_place);
      }
}

const Family family("low_rank", run_low_rank);

}  // namespace
