// What the checks of the C++ kernels share: guarded buffers, random numbers and the comparison with doubles.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../../csrc/cpu/simd.h"

// VARIANT(level, kernel)(arguments...) calls the variant of a kernel that was compiled for an instruction set.
#if defined(__x86_64__) && defined(__GNUC__)
#define VARIANT(level, kernel) \
  ((level) == CpuLevel::avx512 ? kernel##_avx512 : (level) == CpuLevel::avx2 ? kernel##_avx2 : kernel##_base)
#else
#define VARIANT(level, kernel) kernel
#endif

using namespace peftk;
using Level = CpuLevel;

inline const char* name_of(Level level) {
  return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "base";
}

// The instruction sets of this CPU.
inline std::vector<Level> levels() {
  std::vector<Level> result{Level::base};
  if (cpu_level() >= Level::avx2) result.push_back(Level::avx2);
  if (cpu_level() >= Level::avx512) result.push_back(Level::avx512);
  return result;
}

// Sizes of square blocks: one, odd ones, and those beside whole vectors.
constexpr int64_t kSizes[] = {1, 2, 3, 5, 8, 12, 30, 32, 33, 64};

// Unit roundoff: half the distance from 1 to the next number.
constexpr double kFloatUnit = std::numeric_limits<float>::epsilon() / 2.0;
// bfloat16 keeps 8 of the 24 significant bits of a float.
constexpr double kBFloat16Unit = kFloatUnit * (1 << 16);

inline int64_t checks = 0;
inline bool planted_write = false;

// A block of the heap of exactly `count` elements; the sanitizer guards both ends.
template <typename T>
class Heap {
 public:
  explicit Heap(int64_t count) : count_(count), data_(static_cast<T*>(std::malloc(count * sizeof(T)))) {
    // Whatever a kernel forgets to write stays a NaN.
    if (count > 0) std::memset(static_cast<void*>(data_), 0xff, count * sizeof(T));
  }
  ~Heap() { std::free(data_); }
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
  T* data_;
};

inline uint64_t state = 1;

inline double uniform() {
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

// `magnitude` bounds the sum of the absolute values of what was added up, and `operations` how often it was rounded.
inline void expect(double actual, double truth, double magnitude, double operations, double unit,
                   const std::string& what) {
  ++checks;
  const double limit =
      operations * kFloatUnit * magnitude + unit * std::abs(truth) + std::numeric_limits<float>::denorm_min();
  if (!(std::abs(actual - truth) <= limit)) {
    std::printf("%s: expected %.9g within %.3g; got %.9g\n", what.c_str(), truth, limit, actual);
    std::exit(1);
  }
}

template <typename T>
constexpr Dtype dtype_of() {
  return sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::bfloat16;
}

template <typename T>
constexpr double output_unit() {
  return sizeof(T) == sizeof(float) ? kFloatUnit : kBFloat16Unit;
}

// As parallel_for does: the range in pieces.
template <typename F>
void in_pieces(int64_t count, int64_t piece, F run) {
  for (int64_t begin = 0; begin < count; begin += piece) run(begin, begin + piece < count ? begin + piece : count);
}

// `const Family family("name", run_name);` in the file of a family has `main` run its checks, with each level.
struct Family {
  const char* name;
  void (*run)(Level);

  Family(const char* its_name, void (*its_run)(Level)) : name(its_name), run(its_run) { all().push_back(this); }
  static std::vector<const Family*>& all() {
    static std::vector<const Family*> found;
    return found;
  }
};
