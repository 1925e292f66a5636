#pragma once

#include "../../../csrc/cuda/cayley.cu"
#include "checks.h"

namespace {

// The inverse of a general matrix by elimination with the largest pivots.
std::vector<double> inverse(std::vector<double> a, int64_t n) {
  std::vector<double> result(n * n);
  for (int64_t i = 0; i < n; ++i) result[i * n + i] = 1.0;
  for (int64_t p = 0; p < n; ++p) {
    int64_t best = p;
    for (int64_t i = p; i < n; ++i)
      if (std::abs(a[i * n + p]) > std::abs(a[best * n + p])) best = i;
    for (int64_t j = 0; j < n; ++j) {
      std::swap(a[p * n + j], a[best * n + j]);
      std::swap(result[p * n + j], result[best * n + j]);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (i == p) continue;
      const double factor = a[i * n + p] / a[p * n + p];
      for (int64_t j = 0; j < n; ++j) {
        a[i * n + j] -= factor * a[p * n + j];
        result[i * n + j] -= factor * result[p * n + j];
      }
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) result[i * n + j] /= a[i * n + i];
  return result;
}

void check_cayley(int64_t count, int64_t n, double spread, bool square = false) {
  const int64_t area = n * n, numbers = square ? area : n * (n - 1) / 2;
  Heap<float> source(count * numbers), blocks(count * area), grad(count * area), dsource(count * numbers);
  fill(source, spread);
  fill(grad);
  const std::string what = "cayley size " + std::to_string(n) + " spread " + std::to_string(spread);
  cayley_cuda({source.get(), nullptr, 0, n, blocks.get(), square}, count, nullptr);
  cayley_backward_cuda({grad.get(), source.get(), blocks.get(), nullptr, 0, n, dsource.get(), square}, count, nullptr);
  for (int64_t c = 0; c < count; ++c) {
    std::vector<double> plus(area), m(area), left(area);
    const float *from = source.get() + c * numbers, *packed = from;
    for (int64_t i = 0; i < n; ++i) {
      plus[i * n + i] = 1.0;
      for (int64_t j = i + 1; j < n; ++j) {
        plus[i * n + j] = square ? (from[i * n + j] - from[j * n + i]) / 2 : *packed++;
        plus[j * n + i] = -plus[i * n + j];
      }
    }
    const std::vector<double> inverted = inverse(plus, n);
    const float* r = blocks.get() + c * area;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        // Doubles leave an error of |S|^2 roundings of them, far below a float's.
        expect(r[i * n + j], 2.0 * inverted[i * n + j] - (i == j), 1.0, 1.0, kFloatUnit, what.c_str());
        double product = i == j ? -1.0 : 0.0;
        for (int64_t k = 0; k < n; ++k) product += static_cast<double>(r[i * n + k]) * r[j * n + k];
        if (!(std::abs(product) < 1e-6)) {
          std::printf("%s: R R^T - I is %.3g\n", what.c_str(), product);
          std::exit(1);
        }
        m[j * n + i] = r[i * n + j] + static_cast<double>(i == j);
      }
    // -M G M / 2 with M = (R + I)^T, from the float32 result, as the kernel has it; and its magnitude.
    const float* g = grad.get() + c * area;
    std::vector<double> d(area), size(area), left_size(area);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < n; ++k)
        for (int64_t j = 0; j < n; ++j) {
          left[i * n + j] += m[i * n + k] * g[k * n + j];
          left_size[i * n + j] += std::abs(m[i * n + k] * g[k * n + j]);
        }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < n; ++k)
        for (int64_t j = 0; j < n; ++j) {
          d[i * n + j] -= 0.5 * left[i * n + k] * m[k * n + j];
          size[i * n + j] += 0.5 * left_size[i * n + k] * std::abs(m[k * n + j]);
        }
    const float *found = dsource.get() + c * numbers, *next = found;
    const double part = square ? 0.5 : 1.0, operations = 2.0 * static_cast<double>(n) + 4.0;
    for (int64_t i = 0; i < n; ++i) {
      if (square) expect(found[i * n + i], 0, 0, 0, 0, what.c_str());
      for (int64_t j = i + 1; j < n; ++j) {
        const float upper = square ? found[i * n + j] : *next++;
        expect(upper, part * (d[i * n + j] - d[j * n + i]), part * (size[i * n + j] + size[j * n + i]), operations,
               kFloatUnit, what.c_str());
        if (square) expect(found[j * n + i], -upper, 0, 0, 0, what.c_str());
      }
    }
  }
  hash(blocks);
  hash(dsource);
}

void run_cayley(bool few) {
  check_cayley(0, 4, 1.0);
  if (few) {
    for (const int64_t size : {1, 5, 16, 20, 33}) check_cayley(2, size, 1.0);
    check_cayley(2, 5, 1.0, true);
    return;
  }
  for (int64_t size = 1; size <= 34; ++size) check_cayley(size < 10 ? 3 : 1, size, size % 2 ? 1.0 : 0.1);
  for (const int64_t size : {40, 47, 63, 64}) check_cayley(1, size, 0.3);
  for (const int64_t size : {2, 8, 13, 32, 64}) check_cayley(1, size, 100.0);
  for (const int64_t size : {1, 4, 8, 13, 32, 64}) check_cayley(2, size, 0.3, true);
}

}  // namespace
