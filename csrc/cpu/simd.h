// Vectors of eight floats, the dtypes that are read and written, and the choice of an instruction set at run time.
#pragma once
#include <cstdint>
#include <cstring>

#include "../dtype.h"

#define PEFTK_INLINE inline __attribute__((always_inline))

// PEFTK_KERNEL(name, (parameters), (arguments)) defines `void name(parameters)`, which calls
// `name##_body(arguments)` compiled for the best instruction set of this CPU. The body must be PEFTK_INLINE:
// it is compiled once for each set, in a function that carries the target attribute. PEFTK_LEVEL_KERNEL is the same
// for a body that is a template of the CpuLevel that it is compiled for.
#if defined(__x86_64__) && defined(__GNUC__)
#define PEFTK_VARIANTS(name, params, args, avx512_body, avx2_body, base_body)                          \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) static void name##_avx512 params { \
    avx512_body args;                                                                                  \
  }                                                                                                    \
  __attribute__((target("avx2,fma"))) static void name##_avx2 params { avx2_body args; }               \
  static void name##_base params { base_body args; }                                                   \
  void name params {                                                                                   \
    switch (cpu_level()) {                                                                             \
      case CpuLevel::avx512: return name##_avx512 args;                                                \
      case CpuLevel::avx2: return name##_avx2 args;                                                    \
      default: return name##_base args;                                                                \
    }                                                                                                  \
  }
#define PEFTK_KERNEL(name, params, args) PEFTK_VARIANTS(name, params, args, name##_body, name##_body, name##_body)
#define PEFTK_LEVEL_KERNEL(name, params, args)                                                   \
  PEFTK_VARIANTS(name, params, args, name##_body<CpuLevel::avx512>, name##_body<CpuLevel::avx2>, \
                 name##_body<CpuLevel::base>)
#else
#define PEFTK_KERNEL(name, params, args) \
  void name params { name##_body args; }
#define PEFTK_LEVEL_KERNEL(name, params, args) \
  void name params { name##_body<CpuLevel::base> args; }
#endif

// Choose elements of two vectors by number; those of the second one follow those of the first. `Words` is a vector of
// as many integers.
#ifdef __clang__
#define PEFTK_SHUFFLE(Words, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PEFTK_SHUFFLE(Words, a, b, ...) __builtin_shuffle(a, b, (Words){__VA_ARGS__})
#endif

namespace peftk {

enum class CpuLevel { base, avx2, avx512 };

inline CpuLevel cpu_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const CpuLevel level = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return CpuLevel::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::avx2;
    return CpuLevel::base;
  }();
  return level;
#else
  return CpuLevel::base;
#endif
}

constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));

// Vectors of so many words and floats.
template <int kWords>
struct Vectors {
  typedef uint32_t Words __attribute__((vector_size(4 * kWords)));
  typedef float Numbers __attribute__((vector_size(4 * kWords)));
};

// Floats of the largest vectors that a level has registers for.
template <CpuLevel>
constexpr int kWidest = kLanes;
template <>
inline constexpr int kWidest<CpuLevel::avx512> = 16;

// The bits that stand anywhere.
template <typename To>
PEFTK_INLINE To bits_at(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

// The sums of the lanes of eight vectors.
PEFTK_INLINE Floats sums_of(const Floats* lanes) {
  typedef int32_t Words __attribute__((vector_size(32)));
  Floats pair[4], four[2];
  for (int i = 0; i < 4; ++i) {
    const Floats a = lanes[2 * i], b = lanes[2 * i + 1];
    pair[i] =
        PEFTK_SHUFFLE(Words, a, b, 0, 8, 1, 9, 4, 12, 5, 13) + PEFTK_SHUFFLE(Words, a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats a = pair[2 * i], b = pair[2 * i + 1];
    four[i] =
        PEFTK_SHUFFLE(Words, a, b, 0, 1, 8, 9, 4, 5, 12, 13) + PEFTK_SHUFFLE(Words, a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return PEFTK_SHUFFLE(Words, four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         PEFTK_SHUFFLE(Words, four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct BFloat16 {
  uint16_t bits;
};

PEFTK_INLINE float to_float(float value) { return value; }

PEFTK_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

PEFTK_INLINE void from_float(float value, float& out) { out = value; }

PEFTK_INLINE void from_float(float value, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  // To nearest, ties to even; a NaN keeps its upper bits and stays a NaN.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

// Eight numbers as floats.
PEFTK_INLINE Floats eight(const float* from) { return *reinterpret_cast<const Floats*>(from); }

PEFTK_INLINE Floats eight(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(32)));
  const Words bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
  return reinterpret_cast<const Floats&>(bits);
}

// Write eight floats as the numbers of a dtype, rounded as `from_float` rounds.
PEFTK_INLINE void put_eight(Floats values, float* to) { *reinterpret_cast<Floats*>(to) = values; }

PEFTK_INLINE void put_eight(Floats values, BFloat16* to) {
  typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(32)));
  const Words bits = bits_at<Words>(&values);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(is_nan ? quiet : rounded, Halves);
}

// Copy a (rows, cols) tile into floats with row stride `ld`, zero from column `cols` on.
template <typename T>
PEFTK_INLINE void load_tile(const T* from, int64_t stride, int64_t rows, int64_t cols, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) to[i * ld + j] = to_float(from[i * stride + j]);
    for (int64_t j = cols; j < ld; ++j) to[i * ld + j] = 0.0f;
  }
}

template <typename T>
PEFTK_INLINE void store_tile(const float* from, int64_t ld, int64_t rows, int64_t cols, T* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) from_float(from[i * ld + j], to[i * stride + j]);
}

// A matrix that is read by element: value(i, k) = data[i * row + k * col].
struct View {
  const float* data;
  int64_t row, col;
};

template <int kRows, int kVectors, int kWide>
PEFTK_INLINE void product_strip(View a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth, bool add) {
  using Vector = typename Vectors<kWide>::Numbers;
  Vector sum[kRows][kVectors] = {};
  for (int i = 0; add && i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = bits_at<Vector>(c + i * ldc + v * kWide);
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = bits_at<Vector>(b + k * ldb + v * kWide);
    for (int i = 0; i < kRows; ++i) {
      const float scalar = a.data[i * a.row + k * a.col];
      for (int v = 0; v < kVectors; ++v) sum[i][v] += scalar * row[v];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) std::memcpy(c + i * ldc + v * kWide, &sum[i][v], sizeof(Vector));
}

template <int kVectors, int kWide = kLanes>
PEFTK_INLINE void product_columns(View a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                                  int64_t depth, bool add) {
  for (int64_t i = 0; i < rows;) {
    const View from{a.data + i * a.row, a.row, a.col};
    const int64_t left = rows - i;
    // Six rows fill the registers; 8 rows go better as 4 + 4 than as 6 + 2.
    if (left >= 6 && left != 8) {
      product_strip<6, kVectors, kWide>(from, b, ldb, c + i * ldc, ldc, depth, add);
      i += 6;
    } else if (left >= 4) {
      product_strip<4, kVectors, kWide>(from, b, ldb, c + i * ldc, ldc, depth, add);
      i += 4;
    } else if (left >= 2) {
      product_strip<2, kVectors, kWide>(from, b, ldb, c + i * ldc, ldc, depth, add);
      i += 2;
    } else {
      product_strip<1, kVectors, kWide>(from, b, ldb, c + i * ldc, ldc, depth, add);
      i += 1;
    }
  }
}

// c (rows, cols) = a (rows, depth) @ b (depth, cols), or += where `add`. cols must be a multiple of eight.
// The terms of every sum are added in the order of `depth`, so equal inputs give equal bits, whatever the vectors.
template <CpuLevel kLevel = CpuLevel::base>
PEFTK_INLINE void product(View a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t cols,
                          int64_t depth, bool add) {
  constexpr int kWide = kWidest<kLevel>;
  int64_t j = 0;
  for (; j + 2 * kWide <= cols; j += 2 * kWide) product_columns<2, kWide>(a, b + j, ldb, c + j, ldc, rows, depth, add);
  if (kWide > kLanes && j + kWide <= cols) {
    product_columns<1, kWide>(a, b + j, ldb, c + j, ldc, rows, depth, add);
    j += kWide;
  }
  if (j < cols) product_columns<1>(a, b + j, ldb, c + j, ldc, rows, depth, add);
}

}  // namespace peftk
