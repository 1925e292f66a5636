// A butterfly as dense matrices in double precision, with its permutations written out.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using DenseMatrix = std::vector<double>;

struct DenseButterfly {
  int64_t stages, count, size;
  std::vector<double> factors;  // (stages, count, size, size)

  int64_t features() const { return count * size; }
  int64_t group() const { return size << (stages - 1); }

  // Where the permutation of a stage takes each feature: even half-blocks of a chunk first, then the odd ones.
  std::vector<int64_t> order(int64_t stage) const {
    std::vector<int64_t> result;
    const int64_t half = size / 2, chunk = size << stage;
    if (stage == 0) {
      for (int64_t i = 0; i < features(); ++i) result.push_back(i);
      return result;
    }
    for (int64_t start = 0; start < features(); start += chunk)
      for (int64_t odd = 0; odd < 2; ++odd)
        for (int64_t at = odd * half; at < chunk; at += 2 * half)
          for (int64_t i = 0; i < half; ++i) result.push_back(start + at + i);
    return result;
  }

  DenseMatrix stage(int64_t stage, bool absolute) const {
    const int64_t n = features();
    const std::vector<int64_t> to = order(stage);
    DenseMatrix result(n * n);
    for (int64_t u = 0; u < n; ++u)
      for (int64_t v = 0; v < n; ++v) {
        if (to[u] / size != to[v] / size) continue;
        const double value = factors[((stage * count + to[u] / size) * size + to[u] % size) * size + to[v] % size];
        result[u * n + v] = absolute ? std::abs(value) : value;
      }
    return result;
  }

  DenseMatrix times(const DenseMatrix& a, const DenseMatrix& b) const {
    const int64_t n = features();
    DenseMatrix result(n * n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < n; ++k) {
        if (a[i * n + k] == 0) continue;
        for (int64_t j = 0; j < n; ++j) result[i * n + j] += a[i * n + k] * b[k * n + j];
      }
    return result;
  }

  DenseMatrix identity() const {
    DenseMatrix result(features() * features());
    for (int64_t i = 0; i < features(); ++i) result[i * features() + i] = 1;
    return result;
  }

  // stage(last - 1) ... stage(first)
  DenseMatrix product(int64_t first, int64_t last, bool absolute) const {
    DenseMatrix result = identity();
    for (int64_t i = first; i < last; ++i) result = times(stage(i, absolute), result);
    return result;
  }

  // Element (row, column) of group g of the whole product.
  int64_t at(int64_t g, int64_t row, int64_t column) const {
    return (g * group() + row) * features() + g * group() + column;
  }

  // The gradient in the blocks of one stage from that in the groups, (groups, group, group).
  std::vector<double> gradient(int64_t stage, const std::vector<double>& grad, bool absolute) const {
    const int64_t n = features(), g = group();
    DenseMatrix whole(n * n);
    for (int64_t i = 0; i < n / g; ++i)
      for (int64_t row = 0; row < g; ++row)
        for (int64_t column = 0; column < g; ++column) {
          const double value = grad[(i * g + row) * g + column];
          whole[at(i, row, column)] = absolute ? std::abs(value) : value;
        }
    const auto flipped = [&](const DenseMatrix& a) {
      DenseMatrix result(n * n);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) result[j * n + i] = a[i * n + j];
      return result;
    };
    const DenseMatrix inner =
        times(times(flipped(product(stage + 1, stages, absolute)), whole), flipped(product(0, stage, absolute)));
    const std::vector<int64_t> to = order(stage);
    std::vector<double> result(count * size * size);
    for (int64_t u = 0; u < n; ++u)
      for (int64_t v = 0; v < n; ++v)
        if (to[u] / size == to[v] / size)
          result[(to[u] / size * size + to[u] % size) * size + to[v] % size] = inner[u * n + v];
    return result;
  }
};

}  // namespace
