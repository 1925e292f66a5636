#pragma once

#include "../../csrc/cuda/hadamard.cu"
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

void run_hadamard(bool few) {
  check_hadamard_weight<float>(33, 130, 17, 3);
  if (few) return;
  for (const int64_t out : {1, 32, 40})
    for (const int64_t features : {1, 128, 200})
      for (const int64_t rank : {1, 8, 16, 33}) {
        check_hadamard_weight<float>(out, features, rank, rank);
        check_hadamard_weight<__nv_bfloat16>(out, features, rank, 5);
        check_hadamard_weight<__half>(out, features, 2, rank);
      }
}

}  // namespace
