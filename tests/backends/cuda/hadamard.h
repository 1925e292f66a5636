#pragma once
#include <memory>
#include <vector>

#include "../../../csrc/cuda/hadamard.cu"
#include "checks.h"

namespace {

template <typename T>
void check_hadamard_weight(int64_t out, int64_t features, int64_t r1, int64_t r2) {
  const float scale = -0.75f;
  Heap<float> w1_a(out * r1), w1_b(r1 * features), w2_a(out * r2), w2_b(r2 * features);
  for (Heap<float>* factor : {&w1_a, &w1_b, &w2_a, &w2_b}) fill(*factor);
  // The rows of the last output are zero: there the weight keeps every bit, a negative zero included.
  for (int64_t i = 0; i < r1; ++i) w1_a[(out - 1) * r1 + i] = 0.0f;
  Heap<T> weight(out * features), result(out * features);
  fill(weight);
  from_float(-0.0f, weight[(out - 1) * features]);
  const std::string what = "hadamard_weight " + std::to_string(out) + " x " + std::to_string(features) + " ranks " +
                           std::to_string(r1) + " and " + std::to_string(r2);
  hadamard_weight_cuda({weight.get(), w1_a.get(), w1_b.get(), w2_a.get(), w2_b.get(), result.get(), out, features, r1,
                        r2, features, scale, kDtype<T>},
                       nullptr);
  const auto product = [&](Heap<float>& a, Heap<float>& b, int64_t rank, int64_t o, int64_t k, bool magnitude) {
    double sum = 0;
    for (int64_t i = 0; i < rank; ++i) {
      const double term = static_cast<double>(a[o * rank + i]) * b[i * features + k];
      sum += magnitude ? std::abs(term) : term;
    }
    return sum;
  };
  for (int64_t o = 0; o < out; ++o)
    for (int64_t k = 0; k < features; ++k) {
      const double base = to_float(weight[o * features + k]);
      const double truth = base + scale * product(w1_a, w1_b, r1, o, k, false) * product(w2_a, w2_b, r2, o, k, false);
      const double magnitude =
          std::abs(base) + std::abs(scale) * product(w1_a, w1_b, r1, o, k, true) * product(w2_a, w2_b, r2, o, k, true);
      expect(to_float(result[o * features + k]), truth, magnitude, static_cast<double>(r1 + r2 + 4), kUnit<T>,
             what.c_str());
    }
  expect(std::memcmp(result.get() + (out - 1) * features, weight.get() + (out - 1) * features, features * sizeof(T)), 0,
         0, 0, 0, what.c_str());
  hash(result);
}

// The gradients of the factors that `wanted` names, bit by bit in the order of HadamardFactors.
template <typename T>
void check_hadamard_gradients(int64_t out, int64_t features, int64_t r1, int64_t r2, int wanted = 15) {
  const float scale = -0.75f;
  Heap<float> w1_a(out * r1), w1_b(r1 * features), w2_a(out * r2), w2_b(r2 * features);
  for (Heap<float>* factor : {&w1_a, &w1_b, &w2_a, &w2_b}) fill(*factor);
  Heap<T> grad(out * features);
  fill(grad);
  const HadamardParts parts = hadamard_weight_parts_cuda(out, features);
  const int64_t counts[4] = {out * r1, r1 * features, out * r2, r2 * features};
  const int64_t numbers[4] = {parts.tiles, parts.chunks, parts.tiles, parts.chunks};
  std::vector<std::unique_ptr<Heap<float>>> found, sums;
  float *results[4], *places[4];
  for (int i = 0; i < 4; ++i) {
    const bool is_wanted = wanted >> i & 1;
    found.push_back(std::make_unique<Heap<float>>(is_wanted ? counts[i] : 0));
    sums.push_back(std::make_unique<Heap<float>>(is_wanted ? counts[i] * numbers[i] : 0));
    results[i] = is_wanted ? found[i]->get() : nullptr, places[i] = is_wanted ? sums[i]->get() : nullptr;
  }
  hadamard_weight_backward_cuda(
      {grad.get(), w1_a.get(), w1_b.get(), w2_a.get(), w2_b.get(), nullptr, nullptr, places[0], places[2], places[1],
       places[3], out, features, r1, r2, features, parts.chunk, scale, kDtype<T>},
      {results[0], results[1], results[2], results[3]}, nullptr);
  const std::string what = "hadamard_weight_backward " + std::to_string(out) + " x " + std::to_string(features) +
                           " ranks " + std::to_string(r1) + " and " + std::to_string(r2);
  std::vector<double> truth[4], magnitude[4];
  for (int i = 0; i < 4; ++i) truth[i].assign(counts[i], 0), magnitude[i].assign(counts[i], 0);
  const auto contract = [&](Heap<float>& a, Heap<float>& b, int64_t rank, int which, int64_t o, int64_t k, double g,
                            double size) {
    for (int64_t i = 0; i < rank; ++i) {
      truth[which][o * rank + i] += g * b[i * features + k];
      magnitude[which][o * rank + i] += size * std::abs(b[i * features + k]);
      truth[which + 1][i * features + k] += g * a[o * rank + i];
      magnitude[which + 1][i * features + k] += size * std::abs(a[o * rank + i]);
    }
  };
  for (int64_t o = 0; o < out; ++o)
    for (int64_t k = 0; k < features; ++k) {
      double first = 0, first_size = 0, second = 0, second_size = 0;
      for (int64_t i = 0; i < r1; ++i) {
        const double term = static_cast<double>(w1_a[o * r1 + i]) * w1_b[i * features + k];
        first += term, first_size += std::abs(term);
      }
      for (int64_t i = 0; i < r2; ++i) {
        const double term = static_cast<double>(w2_a[o * r2 + i]) * w2_b[i * features + k];
        second += term, second_size += std::abs(term);
      }
      const double g = scale * static_cast<double>(to_float(grad[o * features + k]));
      contract(w1_a, w1_b, r1, 0, o, k, g * second, std::abs(g) * second_size);
      contract(w2_a, w2_b, r2, 2, o, k, g * first, std::abs(g) * first_size);
    }
  for (int i = 0; i < 4; ++i) {
    if (results[i] == nullptr) continue;
    for (int64_t at = 0; at < counts[i]; ++at)
      expect(results[i][at], truth[i][at], magnitude[i][at], static_cast<double>(out + features + r1 + r2), kFloatUnit,
             what.c_str());
    hash(*found[i]);
  }
}

void run_hadamard(bool few) {
  check_hadamard_weight<float>(33, 130, 17, 3);
  check_hadamard_gradients<float>(70, 130, 17, 3);
  if (few) return;
  // More chunks than are summed apart; and each gradient alone.
  check_hadamard_gradients<float>(1100, 20, 3, 2);
  for (const int wanted : {1, 2, 4, 8, 6}) check_hadamard_gradients<float>(40, 140, 5, 4, wanted);
  for (const int64_t out : {1, 32, 65})
    for (const int64_t features : {1, 128, 200})
      for (const int64_t rank : {1, 16, 33}) {
        check_hadamard_gradients<__nv_bfloat16>(out, features, rank, 5);
        check_hadamard_gradients<__half>(out, features, 2, rank);
      }
  for (const int64_t out : {1, 32, 40})
    for (const int64_t features : {1, 128, 200})
      for (const int64_t rank : {1, 8, 16, 33}) {
        check_hadamard_weight<float>(out, features, rank, rank);
        check_hadamard_weight<__nv_bfloat16>(out, features, rank, 5);
        check_hadamard_weight<__half>(out, features, 2, rank);
      }
}

}  // namespace
