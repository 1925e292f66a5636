#pragma once

#include "../../csrc/cuda/cayley.cu"
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

void check_cayley(int64_t count, int64_t n, double spread) {
  const int64_t triangle = n * (n - 1) / 2, area = n * n;
  Heap<float> packed(count * triangle), blocks(count * area), grad(count * area), dpacked(count * triangle);
  fill(packed, spread);
  fill(grad);
  const std::string what = "cayley size " + std::to_string(n) + " spread " + std::to_string(spread);
  cayley_cuda({packed.get(), nullptr, 0, n, blocks.get()}, count, nullptr);
  cayley_backward_cuda({grad.get(), packed.get(), blocks.get(), nullptr, 0, n, dpacked.get()}, count, nullptr);
  for (int64_t c = 0; c < count; ++c) {
    std::vector<double> plus(area), m(area), left(area);
    int64_t at = c * triangle;
    for (int64_t i = 0; i < n; ++i) {
      plus[i * n + i] = 1.0;
      for (int64_t j = i + 1; j < n; ++j, ++at) {
        plus[i * n + j] = packed[at];
        plus[j * n + i] = -static_cast<double>(packed[at]);
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
    at = c * triangle;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i + 1; j < n; ++j, ++at)
        expect(dpacked[at], d[i * n + j] - d[j * n + i], size[i * n + j] + size[j * n + i],
               2.0 * static_cast<double>(n) + 4.0, kFloatUnit, what.c_str());
  }
  hash(blocks);
  hash(dpacked);
}

void run_cayley(bool few) {
  check_cayley(0, 4, 1.0);
  if (few) {
    for (const int64_t size : {1, 5, 16, 20, 33}) check_cayley(2, size, 1.0);
    return;
  }
  for (int64_t size = 1; size <= 34; ++size) check_cayley(size < 10 ? 3 : 1, size, size % 2 ? 1.0 : 0.1);
  for (const int64_t size : {40, 47, 63, 64}) check_cayley(1, size, 0.3);
  for (const int64_t size : {2, 8, 13, 32, 64}) check_cayley(1, size, 100.0);
}

}  // namespace
