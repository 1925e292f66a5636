#include "../kronecker.h"

#include <memory>
#include <type_traits>

#include "simd.h"

namespace peftk {
namespace {

PEFTK_INLINE float sum_of(Floats lanes) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

PEFTK_INLINE Floats at(const float* data, int64_t index) { return *reinterpret_cast<const Floats*>(data + index); }

// One token's matrices as padded floats: in place where they are made of whole vectors of floats.
template <typename T>
PEFTK_INLINE const float* read_matrix(const T* from, int64_t rows, int64_t columns, float* scratch) {
  if constexpr (std::is_same_v<T, float>)
    if (columns % kLanes == 0) return from;
  load_tile(from, columns, rows, columns, scratch, padded(columns));
  return scratch;
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void mix(View w1, const float* in, int64_t rows, int64_t depth, int64_t columns, bool add, T* out,
                      float* scratch) {
  const int64_t ld = padded(columns);
  if constexpr (std::is_same_v<T, float>)
    if (columns == ld) return product<kLevel>(w1, in, ld, out, ld, rows, ld, depth, add);
  if (add) load_tile(out, columns, rows, columns, scratch, ld);
  product<kLevel>(w1, in, ld, scratch, ld, rows, ld, depth, add);
  store_tile(scratch, ld, rows, columns, out, columns);
}

// sums[i, j] += left[i] * right[j], lane by lane, (rows, stride, kLanes): the lanes are added up after the last token.
template <int kRows, int kCols>
PEFTK_INLINE void inner_tile(const float* left, const float* right, int64_t ld, float* sums, int64_t stride) {
  Floats sum[kRows][kCols];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) sum[i][j] = at(sums, (i * stride + j) * kLanes);
  for (int64_t c = 0; c < ld; c += kLanes) {
    Floats row[kCols];
    for (int j = 0; j < kCols; ++j) row[j] = at(right, j * ld + c);
    for (int i = 0; i < kRows; ++i) {
      const Floats value = at(left, i * ld + c);
      for (int j = 0; j < kCols; ++j) sum[i][j] += value * row[j];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) *reinterpret_cast<Floats*>(sums + (i * stride + j) * kLanes) = sum[i][j];
}

template <int kRows>
PEFTK_INLINE void inner_rows(const float* left, const float* right, int64_t right_size, int64_t ld, float* sums) {
  int64_t j = 0;
  for (; j + 4 <= right_size; j += 4) inner_tile<kRows, 4>(left, right + j * ld, ld, sums + j * kLanes, right_size);
  for (; j < right_size; ++j) inner_tile<kRows, 1>(left, right + j * ld, ld, sums + j * kLanes, right_size);
}

PEFTK_INLINE void inner(const float* left, const float* right, int64_t left_size, int64_t right_size, int64_t ld,
                        float* sums) {
  int64_t i = 0;
  for (; i + 2 <= left_size; i += 2)
    inner_rows<2>(left + i * ld, right, right_size, ld, sums + i * right_size * kLanes);
  if (i < left_size) inner_rows<1>(left + i * ld, right, right_size, ld, sums + i * right_size * kLanes);
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void mix_chunks(const KroneckerMixParams& p, int64_t begin, int64_t end) {
  const int64_t ld = padded(p.columns), left_count = p.left_size * p.columns, right_count = p.right_size * p.columns;
  const int64_t entries = p.left_size * p.right_size;
  const std::unique_ptr<float[]> left_copy(new float[p.left_size * ld]), right_copy(new float[p.right_size * ld]),
      scratch(new float[(p.left_size > p.right_size ? p.left_size : p.right_size) * ld]);
  const std::unique_ptr<float[]> sums(p.partial ? new float[entries * kLanes] : nullptr);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    if (p.partial)
      for (int64_t i = 0; i < entries * kLanes; ++i) sums[i] = 0.0f;
    for (int64_t t = p.tokens * chunk / p.chunks; t < p.tokens * (chunk + 1) / p.chunks; ++t) {
      const float *left = nullptr, *right = nullptr;
      if (p.left)
        left = read_matrix(static_cast<const T*>(p.left) + t * left_count, p.left_size, p.columns, left_copy.get());
      if (p.right)
        right =
            read_matrix(static_cast<const T*>(p.right) + t * right_count, p.right_size, p.columns, right_copy.get());
      if (p.partial) inner(left, right, p.left_size, p.right_size, ld, sums.get());
      if (p.mixed_left)
        mix<kLevel>({p.w1, p.right_size, 1}, right, p.left_size, p.right_size, p.columns, p.add_left,
                    static_cast<T*>(p.mixed_left) + t * left_count, scratch.get());
      if (p.mixed_right)
        mix<kLevel>({p.w1, 1, p.right_size}, left, p.right_size, p.left_size, p.columns, p.add_right,
                    static_cast<T*>(p.mixed_right) + t * right_count, scratch.get());
    }
    if (p.partial)
      for (int64_t i = 0; i < entries; ++i) p.partial[chunk * entries + i] = sum_of(at(sums.get(), i * kLanes));
  }
}

template <CpuLevel kLevel>
PEFTK_INLINE void kronecker_mix_cpu_body(const KroneckerMixParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    mix_chunks<kLevel, float>(p, begin, end);
  else
    mix_chunks<kLevel, BFloat16>(p, begin, end);
}

template <typename T>
PEFTK_INLINE void write_rows(const KroneckerWeightParams& p, int64_t begin, int64_t end) {
  const int64_t features = p.middle * p.columns;
  for (int64_t row = begin; row < end; ++row) {
    const float *factors = p.w1 + row / p.rows * p.middle, *w2 = p.w2 + row % p.rows * p.columns;
    for (int64_t m = 0; m < p.middle; ++m) {
      const float factor = factors[m] * p.scale;
      const T* from = static_cast<const T*>(p.weight) + row * features + m * p.columns;
      T* to = static_cast<T*>(p.out) + row * features + m * p.columns;
      for (int64_t n = 0; n < p.columns; ++n) {
        const float delta = factor * w2[n], before = to_float(from[n]);
        // -0.0 + 0.0 is +0.0: where nothing is added, every bit of the weight stays.
        from_float(delta == 0.0f ? before : before + delta, to[n]);
      }
    }
  }
}

PEFTK_INLINE void kronecker_weight_cpu_body(const KroneckerWeightParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    write_rows<float>(p, begin, end);
  else
    write_rows<BFloat16>(p, begin, end);
}

template <typename T>
PEFTK_INLINE void weight_gradients(const KroneckerWeightBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t ld = padded(p.columns), features = p.middle * p.columns, entries = p.left * p.middle;
  const std::unique_ptr<float[]> g(new float[ld]), w2(new float[ld]), sum(new float[ld]);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* partial = p.partial ? p.partial + chunk * entries : nullptr;
    if (partial)
      for (int64_t i = 0; i < entries; ++i) partial[i] = 0.0f;
    for (int64_t k = p.rows * chunk / p.chunks; k < p.rows * (chunk + 1) / p.chunks; ++k) {
      load_tile(p.w2 + k * p.columns, p.columns, 1, p.columns, w2.get(), ld);
      for (int64_t n = 0; n < ld; ++n) sum[n] = 0.0f;
      for (int64_t i = 0; i < entries; ++i) {
        const int64_t row = i / p.middle * p.rows + k;
        load_tile(static_cast<const T*>(p.grad) + row * features + i % p.middle * p.columns, p.columns, 1, p.columns,
                  g.get(), ld);
        const float factor = p.w1[i] * p.scale;
        Floats products{};
        for (int64_t n = 0; n < ld; n += kLanes) {
          const Floats value = at(g.get(), n);
          products += value * at(w2.get(), n);
          *reinterpret_cast<Floats*>(sum.get() + n) += factor * value;
        }
        if (partial) partial[i] += sum_of(products);
      }
      if (p.dw2)
        for (int64_t n = 0; n < p.columns; ++n) p.dw2[k * p.columns + n] = sum[n];
    }
  }
}

PEFTK_INLINE void kronecker_weight_backward_cpu_body(const KroneckerWeightBackwardParams& p, int64_t begin,
                                                     int64_t end) {
  if (p.dtype == Dtype::float32)
    weight_gradients<float>(p, begin, end);
  else
    weight_gradients<BFloat16>(p, begin, end);
}

// The sums over n of one part of a token, for kLanes rows of w2, or as many as there are.
PEFTK_INLINE Floats few_sums(const float* x, const float* w2, int64_t n, int64_t some) {
  Floats lanes[kLanes] = {};
  int64_t at = 0;
  if (some == kLanes) {
    for (; at + kLanes <= n; at += kLanes) {
      const Floats values = *reinterpret_cast<const Floats*>(x + at);
      for (int c = 0; c < kLanes; ++c) lanes[c] += values * *reinterpret_cast<const Floats*>(w2 + c * n + at);
    }
  } else {
    for (; at + kLanes <= n; at += kLanes)
      for (int64_t c = 0; c < some; ++c)
        lanes[c] += *reinterpret_cast<const Floats*>(x + at) * *reinterpret_cast<const Floats*>(w2 + c * n + at);
  }
  Floats sums = sums_of(lanes);
  for (; at < n; ++at)
    for (int64_t c = 0; c < some; ++c) sums[c] += x[at] * w2[c * n + at];
  return sums;
}

PEFTK_INLINE void kronecker_few_cpu_body(const KroneckerFewParams& p, int64_t begin, int64_t end) {
  const std::unique_ptr<float[]> sums(new float[p.m * kLanes]);
  for (int64_t k = begin; k < end; k += kLanes) {
    const int64_t some = end - k < kLanes ? end - k : kLanes;
    for (int64_t t = 0; t < p.tokens; ++t) {
      for (int64_t j = 0; j < p.m; ++j) {
        const Floats found = few_sums(p.x + (t * p.m + j) * p.n, p.w2 + k * p.n, p.n, some);
        *reinterpret_cast<Floats*>(sums.get() + j * kLanes) = found * p.scale;
      }
      for (int64_t i = 0; i < p.l; ++i) {
        Floats total = {};
        for (int64_t j = 0; j < p.m; ++j)
          total += p.w1[i * p.m + j] * *reinterpret_cast<const Floats*>(sums.get() + j * kLanes);
        for (int64_t c = 0; c < some; ++c) p.out[(t * p.l + i) * p.k + k + c] = total[c];
      }
    }
  }
}

}  // namespace

PEFTK_KERNEL(kronecker_few_cpu, (const KroneckerFewParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_LEVEL_KERNEL(kronecker_mix_cpu, (const KroneckerMixParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(kronecker_weight_cpu, (const KroneckerWeightParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(kronecker_weight_backward_cpu, (const KroneckerWeightBackwardParams& p, int64_t begin, int64_t end),
             (p, begin, end))

}  // namespace peftk
