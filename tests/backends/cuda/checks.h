// What the checks of every family share: memory that the sanitizers watch, numbers, comparison, and a hash of results.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/pieces.h"
#include "../../../csrc/dtype.h"

namespace {

using namespace peftk;
using cuda_on_cpu::Order;

constexpr double kFloatUnit = std::numeric_limits<float>::epsilon() / 2.0;

int64_t checks = 0;
uint64_t bits_hash = 14695981039346656037ull;
bool planted_write = false;

// Exactly `count` elements of the heap, `offset` elements away from an aligned address.
template <typename T>
class Heap {
 public:
  explicit Heap(int64_t count, int64_t offset = 0)
      : count_(count), start_(static_cast<T*>(std::malloc((count + offset) * sizeof(T)))), data_(start_ + offset) {
    // Whatever a kernel forgets to write stays a NaN.
    if (count > 0) std::memset(static_cast<void*>(start_), 0xff, (count + offset) * sizeof(T));
  }
  ~Heap() { std::free(start_); }
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
  T *start_, *data_;
};

uint64_t state = 1;

double uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<double>(state >> 11) / static_cast<double>(1ull << 53) * 2.0 - 1.0;
}

template <typename T>
void fill(Heap<T>& values, double spread = 1.0) {
  for (int64_t i = 0; i < values.count(); ++i) from_float(static_cast<float>(uniform() * spread), values[i]);
}

template <typename T>
std::vector<double> doubles(Heap<T>& values) {
  std::vector<double> result;
  for (int64_t i = 0; i < values.count(); ++i) result.push_back(to_float(values[i]));
  return result;
}

template <typename T>
void hash(Heap<T>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.get());
  for (size_t i = 0; i < values.count() * sizeof(T); ++i) bits_hash = (bits_hash ^ bytes[i]) * 1099511628211ull;
}

// `magnitude` bounds the sum of the absolute values of what was added up, and `operations` how often it was rounded.
void expect(double actual, double truth, double magnitude, double operations, double unit, const char* what) {
  ++checks;
  const double limit = operations * kFloatUnit * magnitude + unit * std::abs(truth) + 0x1p-25;
  if (!(std::abs(actual - truth) <= limit)) {
    std::printf("%s: expected %.9g within %.3g; got %.9g\n", what, truth, limit, actual);
    std::exit(1);
  }
}

template <typename T>
constexpr Dtype kDtype = Dtype::float32;
template <>
constexpr Dtype kDtype<__nv_bfloat16> = Dtype::bfloat16;
template <>
constexpr Dtype kDtype<__half> = Dtype::float16;

// Unit roundoff of an output: bfloat16 keeps 8 significant bits, float16 11, and a float 24.
template <typename T>
constexpr double kUnit = kDtype<T> == Dtype::bfloat16  ? 0x1p-8
                         : kDtype<T> == Dtype::float16 ? 0x1p-11
                                                       : 0x1p-24;

}  // namespace
