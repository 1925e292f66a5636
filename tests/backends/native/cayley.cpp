// Checks of the Cayley transform, against dense matrices in double precision.
#include "../../../csrc/cpu/cayley.cpp"
#include "harness.h"

namespace {

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

Matrix skew(const float* source, bool square, int64_t n) {
  Matrix result(n * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) {
      // The difference is rounded to a float, as the kernel rounds it, so that the rest has the same input.
      result[i * n + j] = square ? (source[i * n + j] - source[j * n + i]) / 2 : *source++;
      result[j * n + i] = -result[i * n + j];
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

void check_cayley(Level level, int64_t count, int64_t n, const std::vector<double>& c, double spread, bool square) {
  const int64_t terms = static_cast<int64_t>(c.size()), numbers = square ? n * n : n * (n - 1) / 2;
  Heap<float> source(count * numbers), blocks(count * n * n), grad(count * n * n), dsource(count * numbers);
  Heap<double> coefficients(terms);
  for (int64_t k = 0; k < terms; ++k) coefficients[k] = c[k];
  fill(source, spread);
  fill(grad);
  const CayleyParams p{source.get(), coefficients.get(), terms, n, blocks.get(), square};
  in_pieces(count, 2, [&](int64_t begin, int64_t end) { VARIANT(level, cayley_cpu)(p, begin, end); });
  const CayleyBackwardParams q{grad.get(), source.get(),  blocks.get(), coefficients.get(), terms,
                               n,          dsource.get(), square};
  in_pieces(count, 2, [&](int64_t begin, int64_t end) { VARIANT(level, cayley_backward_cpu)(q, begin, end); });
  const double operations = static_cast<double>((terms + 2) * (n + 4));
  const std::string what = std::string("cayley ") + name_of(level);
  for (int64_t m = 0; m < count; ++m) {
    const Matrix s = skew(source.get() + m * numbers, square, n);
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
    const float* found = dsource.get() + m * numbers;
    for (int64_t i = 0; i < n; ++i) {
      if (square) expect(found[i * n + i], 0, 0, 0, 0, what + " backward, diagonal");
      for (int64_t j = i + 1; j < n; ++j) {
        const double expected = terms ? ds[i * n + j] - ds[j * n + i] : exact_gradient_of(inv, g, n, i, j, false);
        const double bound = terms ? size[i * n + j] + size[j * n + i] : exact_gradient_of(inv, g, n, i, j, true);
        // The kernel reads R + I, rounded, where the truth has 2 inv(I + S): the diagonal adds at most 2 |inv|.
        const double allowed = terms ? bound : bound + static_cast<double>(n);
        const double part = square ? 0.5 : 1.0;
        const float upper = square ? found[i * n + j] : *found++;
        expect(upper, part * expected, part * allowed, 2 * operations, kFloatUnit, what + " backward");
        if (square) expect(found[j * n + i], -upper, 0, 0, 0, what + " backward, mirrored");
      }
    }
  }
}

void run_cayley(Level level) {
  const std::vector<double> coefficients{1, 2, 2, 2, 2, 1.5, -1, 0.5, 1};
  for (const int64_t size : kSizes) {
    for (const bool square : {false, true}) {
      check_cayley(level, 3, size, {}, 1.0, square);
      check_cayley(level, 2, size, {1, 2, 2, 2, 1}, 0.2, square);
    }
    for (size_t terms = 1; terms <= coefficients.size(); ++terms) {
      const std::vector<double> some(coefficients.begin(), coefficients.begin() + static_cast<int64_t>(terms));
      check_cayley(level, 1, size, some, 0.2, false);
    }
  }
  check_cayley(level, 1, 65, {1, 2, 2, 1}, 0.05, false);
}

const Family family("cayley", run_cayley);

}  // namespace
