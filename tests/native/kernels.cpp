// Runs every C++ kernel under the sanitizers against naive loops in double precision. The kernels are included, not
// linked, so that the variants for each instruction set can be called by name. Every buffer has exactly the size that
// a kernel may touch. `planted-write` and `planted-shift` plant an error each, to show that it would be found.
#include "../../csrc/cpu/block_diagonal.cpp"
#include "../../csrc/cpu/cayley.cpp"
#include "../../csrc/cpu/low_rank.cpp"
#include "harness.h"

namespace {

struct Level {
  const char* name;
  void (*rotate)(const BlockRotateParams&, const float*, int64_t, int64_t);
  void (*rotate_backward)(const BlockRotateBackwardParams&, const float*, int64_t, int64_t);
  void (*cayley)(const CayleyParams&, int64_t, int64_t);
  void (*cayley_backward)(const CayleyBackwardParams&, int64_t, int64_t);
  void (*shrink)(const ShrinkParams&, int64_t, int64_t);
  void (*outer)(const OuterParams&, int64_t, int64_t);
  void (*dropout)(const DropoutParams&, int64_t, int64_t);
};

#define LEVEL(suffix)                  \
  {#suffix,                            \
   block_rotate_cpu_##suffix,          \
   block_rotate_backward_cpu_##suffix, \
   cayley_cpu_##suffix,                \
   cayley_backward_cpu_##suffix,       \
   shrink_cpu_##suffix,                \
   outer_cpu_##suffix,                 \
   dropout_cpu_##suffix}

std::vector<Level> levels() {
#if defined(__x86_64__) && defined(__GNUC__)
  std::vector<Level> result{LEVEL(base)};
  if (cpu_level() >= CpuLevel::avx2) result.push_back(LEVEL(avx2));
  if (cpu_level() >= CpuLevel::avx512) result.push_back(LEVEL(avx512));
  return result;
#else
  return {{"base", block_rotate_cpu, block_rotate_backward_cpu, cayley_cpu, cayley_backward_cpu, shrink_cpu, outer_cpu,
           dropout_cpu}};
#endif
}

template <typename T>
void check_rotate(const Level& level, int64_t rows, int64_t count, int64_t size, bool transpose) {
  const int64_t features = count * size, ld = padded(size);
  Heap<T> x(rows * features), y(rows * features - planted_write);
  Heap<float> blocks(count * size * size), packed(count * size * ld);
  fill(x);
  fill(blocks);
  const BlockRotateParams p{x.get(), blocks.get(), y.get(), rows, count, size, transpose, dtype_of<T>()};
  pack_blocks_cpu(blocks.get(), size, transpose, packed.get(), 0, count);
  in_pieces((rows + kRotateRows - 1) / kRotateRows, 1 + rows % 2,
            [&](int64_t begin, int64_t end) { level.rotate(p, packed.get(), begin, end); });
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t n = 0; n < count; ++n)
      for (int64_t j = 0; j < size; ++j) {
        double truth = 0, magnitude = 0;
        for (int64_t k = 0; k < size; ++k) {
          const double term =
              to_float(x[t * features + n * size + k]) *
              static_cast<double>(blocks[(n * size + (transpose ? j : k)) * size + (transpose ? k : j)]);
          truth += term;
          magnitude += std::abs(term);
        }
        expect(to_float(y[t * features + n * size + j]), truth, magnitude, static_cast<double>(size + 1),
               output_unit<T>(), std::string("block_rotate ") + level.name);
      }
}

template <typename T>
void check_rotate_backward(const Level& level, int64_t rows, int64_t count, int64_t size, int64_t chunks,
                           bool transpose, bool need_x, bool need_blocks, bool aliased) {
  const int64_t features = count * size, ld = padded(size);
  Heap<T> grad(rows * features), x(need_blocks ? rows * features : 0), own_dx(need_x && !aliased ? rows * features : 0);
  Heap<float> blocks(count * size * size), packed(count * size * ld);
  Heap<float> partial(need_blocks ? chunks * count * size * ld : 0), dblocks(need_blocks ? count * size * size : 0);
  fill(grad);
  fill(x);
  fill(blocks);
  for (int64_t i = 0; i < partial.count(); ++i) partial[i] = 0.0f;
  const std::vector<double> g = doubles(grad), in = doubles(x);
  T* dx = need_x ? (aliased ? grad.get() : own_dx.get()) : nullptr;
  const BlockRotateBackwardParams p{grad.get(),
                                    need_blocks ? x.get() : nullptr,
                                    blocks.get(),
                                    dx,
                                    need_blocks ? partial.get() : nullptr,
                                    rows,
                                    count,
                                    size,
                                    chunks,
                                    transpose,
                                    dtype_of<T>()};
  pack_blocks_cpu(blocks.get(), size, !transpose, packed.get(), 0, count);
  in_pieces(chunks * count, 2, [&](int64_t begin, int64_t end) { level.rotate_backward(p, packed.get(), begin, end); });
  const std::string what = std::string("block_rotate_backward ") + level.name;
  for (int64_t t = 0; need_x && t < rows; ++t)
    for (int64_t n = 0; n < count; ++n)
      for (int64_t k = 0; k < size; ++k) {
        double truth = 0, magnitude = 0;
        for (int64_t j = 0; j < size; ++j) {
          const double term =
              g[t * features + n * size + j] *
              static_cast<double>(blocks[(n * size + (transpose ? j : k)) * size + (transpose ? k : j)]);
          truth += term;
          magnitude += std::abs(term);
        }
        expect(to_float(dx[t * features + n * size + k]), truth, magnitude, static_cast<double>(size + 1),
               output_unit<T>(), what + " dx");
      }
  if (!need_blocks) return;
  sum_partials_cpu(partial.get(), chunks, count, size, dblocks.get());
  for (int64_t n = 0; n < count; ++n)
    for (int64_t k = 0; k < size; ++k)
      for (int64_t j = 0; j < size; ++j) {
        double truth = 0, magnitude = 0;
        for (int64_t t = 0; t < rows; ++t) {
          const double* left = (transpose ? g : in).data() + t * features + n * size;
          const double* right = (transpose ? in : g).data() + t * features + n * size;
          truth += left[k] * right[j];
          magnitude += std::abs(left[k] * right[j]);
        }
        expect(dblocks[(n * size + k) * size + j], truth, magnitude, static_cast<double>(rows + chunks + 1), kFloatUnit,
               what + " dblocks");
      }
}

using Matrix = std::vector<double>;

Matrix identity(int64_t n) {
  Matrix result(n * n);
  for (int64_t i = 0; i < n; ++i) result[i * n + i] = 1;
  return result;
}

Matrix times(const Matrix& a, const Matrix& b, int64_t n) {
  Matrix result(n * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < n; ++k)
      for (int64_t j = 0; j < n; ++j) result[i * n + j] += a[i * n + k] * b[k * n + j];
  return result;
}

Matrix transposed(const Matrix& a, int64_t n) {
  Matrix result(n * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) result[j * n + i] = a[i * n + j];
  return result;
}

Matrix absolute(Matrix a) {
  for (double& value : a) value = std::abs(value);
  return a;
}

Matrix skew(const float* packed, int64_t n) {
  Matrix result(n * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) {
      result[i * n + j] = *packed;
      result[j * n + i] = -static_cast<double>(*packed++);
    }
  return result;
}

// Gauss-Jordan with row exchange.
Matrix inverse(Matrix a, int64_t n) {
  Matrix result = identity(n);
  for (int64_t p = 0; p < n; ++p) {
    int64_t best = p;
    for (int64_t i = p; i < n; ++i)
      if (std::abs(a[i * n + p]) > std::abs(a[best * n + p])) best = i;
    for (int64_t j = 0; j < n; ++j) {
      std::swap(a[p * n + j], a[best * n + j]);
      std::swap(result[p * n + j], result[best * n + j]);
    }
    const double pivot = a[p * n + p];
    for (int64_t j = 0; j < n; ++j) {
      a[p * n + j] /= pivot;
      result[p * n + j] /= pivot;
    }
    for (int64_t i = 0; i < n; ++i) {
      const double factor = a[i * n + p];
      for (int64_t j = 0; i != p && j < n; ++j) {
        a[i * n + j] -= factor * a[p * n + j];
        result[i * n + j] -= factor * result[p * n + j];
      }
    }
  }
  return result;
}

// sum_k c_k S^k
Matrix polynomial_of(const Matrix& s, const std::vector<double>& c, int64_t n) {
  Matrix power = identity(n), result(n * n);
  for (const double coefficient : c) {
    for (int64_t i = 0; i < n * n; ++i) result[i] += coefficient * power[i];
    power = times(power, s, n);
  }
  return result;
}

// sum_k c_k sum_m T^m G T^(k - 1 - m), where T is the transposed of S
Matrix polynomial_gradient_of(const Matrix& t, const Matrix& g, const std::vector<double>& c, int64_t n) {
  std::vector<Matrix> powers{identity(n)};
  for (size_t k = 1; k < c.size(); ++k) powers.push_back(times(powers.back(), t, n));
  Matrix result(n * n);
  for (size_t k = 1; k < c.size(); ++k)
    for (size_t m = 0; m < k; ++m) {
      const Matrix term = times(times(powers[m], g, n), powers[k - 1 - m], n);
      for (int64_t i = 0; i < n * n; ++i) result[i] += c[k] * term[i];
    }
  return result;
}

// d R / d S in the direction of one pair of entries is -2 inv E inv, a sum of two outer products.
double exact_gradient_of(const Matrix& inv, const Matrix& g, int64_t n, int64_t i, int64_t j, bool magnitude) {
  double sum = 0;
  for (int64_t k = 0; k < n; ++k)
    for (int64_t l = 0; l < n; ++l) {
      const double one = g[k * n + l] * inv[k * n + i] * inv[j * n + l];
      const double two = g[k * n + l] * inv[k * n + j] * inv[i * n + l];
      sum += magnitude ? 2 * (std::abs(one) + std::abs(two)) : -2 * (one - two);
    }
  return sum;
}

void check_cayley(const Level& level, int64_t count, int64_t n, const std::vector<double>& c, double spread) {
  const int64_t terms = static_cast<int64_t>(c.size()), triangle = n * (n - 1) / 2;
  Heap<float> packed(count * triangle), blocks(count * n * n), grad(count * n * n), dpacked(count * triangle);
  Heap<double> coefficients(terms);
  for (int64_t k = 0; k < terms; ++k) coefficients[k] = c[k];
  fill(packed, spread);
  fill(grad);
  const CayleyParams p{packed.get(), coefficients.get(), terms, n, blocks.get()};
  in_pieces(count, 2, [&](int64_t begin, int64_t end) { level.cayley(p, begin, end); });
  const CayleyBackwardParams q{grad.get(), packed.get(), blocks.get(), coefficients.get(), terms, n, dpacked.get()};
  in_pieces(count, 2, [&](int64_t begin, int64_t end) { level.cayley_backward(q, begin, end); });
  const double operations = static_cast<double>((terms + 2) * (n + 4));
  const std::string what = std::string("cayley ") + level.name;
  for (int64_t m = 0; m < count; ++m) {
    const Matrix s = skew(packed.get() + m * triangle, n);
    Matrix shifted = s, g(n * n), magnitude(n * n), truth;
    for (int64_t i = 0; i < n; ++i) shifted[i * n + i] += 1;
    const Matrix inv = inverse(shifted, n);
    for (int64_t i = 0; i < n * n; ++i) g[i] = grad[m * n * n + i];
    if (terms == 0) {
      truth = inv;
      for (int64_t i = 0; i < n * n; ++i) truth[i] = 2 * truth[i] - (i % (n + 1) == 0);
      magnitude = absolute(truth);
    } else {
      truth = polynomial_of(s, c, n);
      magnitude = polynomial_of(absolute(s), absolute(c), n);
    }
    for (int64_t i = 0; i < n * n; ++i)
      expect(blocks[m * n * n + i], truth[i], magnitude[i], terms ? operations : 1, kFloatUnit, what);
    Matrix ds, size;
    if (terms > 0) {
      ds = polynomial_gradient_of(transposed(s, n), g, c, n);
      size = polynomial_gradient_of(absolute(transposed(s, n)), absolute(g), absolute(c), n);
    }
    const float* found = dpacked.get() + m * triangle;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i + 1; j < n; ++j) {
        const double expected = terms ? ds[i * n + j] - ds[j * n + i] : exact_gradient_of(inv, g, n, i, j, false);
        const double bound = terms ? size[i * n + j] + size[j * n + i] : exact_gradient_of(inv, g, n, i, j, true);
        // The kernel reads R + I, rounded, where the truth has 2 inv(I + S): the diagonal adds at most 2 |inv|.
        expect(*found++, expected, terms ? bound : bound + static_cast<double>(n), 2 * operations, kFloatUnit,
               what + " backward");
      }
  }
}

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
void check_dropout(const Level& level, int64_t count, uint32_t threshold, bool in_place) {
  constexpr float scale = 1.25f;
  const uint64_t seed = 0xfedcba9876543210ull + static_cast<uint64_t>(count);
  Heap<T> x(count), own(in_place ? 0 : count);
  fill(x);
  const std::vector<double> before = doubles(x);
  T* out = in_place ? x.get() : own.get();
  const DropoutParams p{x.get(), out, count, seed, threshold, scale, dtype_of<T>()};
  in_pieces((count + 3) / 4, 2, [&](int64_t begin, int64_t end) { level.dropout(p, begin, end); });
  for (int64_t i = 0; i < count; ++i) {
    const bool dropped = naive_philox(seed, static_cast<uint64_t>(i / 4)).word[i % 4] / 256 < threshold;
    expect(to_float(out[i]), dropped ? 0.0 : before[i] * scale, 0, 0, dropped ? 0.0 : 1.01 * output_unit<T>(),
           std::string("dropout ") + level.name);
  }
}

void check_shrink(const Level& level, int64_t rows, int64_t depth, int64_t rank, bool transposed) {
  const float scale = 1.5f;
  const int64_t row = transposed ? 1 : rank, col = transposed ? depth : 1;
  Heap<float> x(rows * depth), m(depth * rank), packed(depth * padded(rank)), out(rows * rank);
  fill(x);
  fill(m);
  pad_columns_cpu(m.get(), row, col, depth, rank, packed.get());
  const ShrinkParams p{x.get(), packed.get(), out.get(), rows, depth, rank, scale};
  in_pieces(rows, 13, [&](int64_t begin, int64_t end) { level.shrink(p, begin, end); });
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      double truth = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < depth; ++k) {
        const double term = static_cast<double>(x[i * depth + k]) * m[k * row + j * col] * scale;
        truth += term;
        magnitude += std::abs(term);
      }
      expect(out[i * rank + j], truth, magnitude, static_cast<double>(depth + 2), kFloatUnit,
             std::string("shrink ") + level.name);
    }
}

void check_outer(const Level& level, int64_t rows, int64_t features, int64_t rank, bool transposed) {
  const float scale = -0.75f;
  const int64_t row = transposed ? 1 : rank, col = transposed ? features : 1;
  Heap<float> x(rows * features), h(rows * rank), packed(rows * padded(rank)), out(features * rank);
  fill(x);
  fill(h);
  pad_columns_cpu(h.get(), rank, 1, rows, rank, packed.get());
  const OuterParams p{x.get(), packed.get(), out.get(), rows, features, rank, row, col, scale};
  in_pieces((features + kOuterColumns - 1) / kOuterColumns, 2,
            [&](int64_t begin, int64_t end) { level.outer(p, begin, end); });
  for (int64_t i = 0; i < features; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      double truth = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < rows; ++k) {
        const double term = static_cast<double>(x[k * features + i]) * h[k * rank + j] * scale;
        truth += term;
        magnitude += std::abs(term);
      }
      expect(out[i * row + j * col], truth, magnitude, static_cast<double>(rows + 2), kFloatUnit,
             std::string("outer ") + level.name);
    }
}

void check_rounding() {
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const BFloat16 value{static_cast<uint16_t>(bits)};
    BFloat16 back;
    from_float(to_float(value), back);
    const bool nan = std::isnan(to_float(value));
    expect(nan ? std::isnan(to_float(back)) : back.bits == value.bits, 1, 0, 0, 0, "bfloat16 round trip");
  }
}

void run(const Level& level) {
  const int64_t sizes[] = {1, 2, 3, 5, 8, 12, 30, 32, 33, 64};
  for (const int64_t size : sizes)
    for (const int64_t rows : {0, 1, 47, 48, 49, 63, 64, 65, 130})
      for (const bool transpose : {false, true}) {
        if (planted_write && rows == 0) continue;
        const int64_t count = 1 + (size + rows) % 3;
        check_rotate<float>(level, rows, count, size, transpose);
        check_rotate<BFloat16>(level, rows, count, size, transpose);
        for (const int64_t chunks : {1, 2, 5}) {
          check_rotate_backward<float>(level, rows, count, size, chunks, transpose, true, true, chunks == 2);
          check_rotate_backward<BFloat16>(level, rows, count, size, chunks, transpose, true, true, chunks == 2);
        }
        check_rotate_backward<float>(level, rows, count, size, 1, transpose, true, false, false);
        check_rotate_backward<float>(level, rows, count, size, 2, transpose, false, true, false);
      }
  const std::vector<double> coefficients{1, 2, 2, 2, 2, 1.5, -1, 0.5, 1};
  for (const int64_t size : sizes) {
    check_cayley(level, 3, size, {}, 1.0);
    for (size_t terms = 1; terms <= coefficients.size(); ++terms)
      check_cayley(level, 1, size, {coefficients.begin(), coefficients.begin() + static_cast<int64_t>(terms)}, 0.2);
  }
  check_cayley(level, 1, 65, {1, 2, 2, 1}, 0.05);
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

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  planted_write = mode == "planted-write";
  if (mode == "planted-shift") std::printf("%d\n", 1 << (31 + argc));
  check_philox();
  check_rounding();
  for (const Level& level : levels()) {
    run(level);
    std::printf("level %s\n", level.name);
  }
  std::printf("%lld checks\n", static_cast<long long>(checks));
  return 0;
}
