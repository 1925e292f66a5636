#include "../hadamard.h"

#include <memory>

#include "simd.h"

namespace peftk {
namespace {

PEFTK_INLINE int64_t hadamard_least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
PEFTK_INLINE void hadamard_factor_a(const KhatriRaoParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* left = p.w1_b + row / p.r2 * p.features;
    const float* right = p.w2_b + row % p.r2 * p.features;
    T* out = static_cast<T*>(p.a) + row * p.features;
    for (int64_t k = 0; k < p.features; ++k) from_float(left[k] * right[k], out[k]);
  }
}

template <typename T>
PEFTK_INLINE void hadamard_factor_b(const KhatriRaoParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* right = p.w2_a + row * p.r2;
    T* out = static_cast<T*>(p.b) + row * p.r1 * p.r2;
    for (int64_t i = 0; i < p.r1; ++i) {
      const float left = p.w1_a[row * p.r1 + i];
      for (int64_t j = 0; j < p.r2; ++j) from_float(left * right[j], out[i * p.r2 + j]);
    }
  }
}

PEFTK_INLINE void khatri_rao_a_cpu_body(const KhatriRaoParams& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float32 ? hadamard_factor_a<float>(p, begin, end) : hadamard_factor_a<BFloat16>(p, begin, end);
}

PEFTK_INLINE void khatri_rao_b_cpu_body(const KhatriRaoParams& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float32 ? hadamard_factor_b<float>(p, begin, end) : hadamard_factor_b<BFloat16>(p, begin, end);
}

// Every element of the gradient is read once, for both factors.
template <typename T>
PEFTK_INLINE void hadamard_gradient_a(const KhatriRaoBackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kHadamardColumns, columns = hadamard_least(p.features - first, kHadamardColumns);
    for (int64_t j = 0; p.dw2_b != nullptr && j < p.r2; ++j)
      for (int64_t k = 0; k < columns; ++k) p.dw2_b[j * p.features + first + k] = 0.0f;
    for (int64_t i = 0; i < p.r1; ++i) {
      const float* left = p.w1_b + i * p.features + first;
      float sum[kHadamardColumns] = {};
      for (int64_t j = 0; j < p.r2; ++j) {
        const T* grad = static_cast<const T*>(p.grad_a) + (i * p.r2 + j) * p.features + first;
        const float* right = p.w2_b + j * p.features + first;
        if (p.dw2_b != nullptr) {
          float* out = p.dw2_b + j * p.features + first;
          for (int64_t k = 0; k < columns; ++k) out[k] += to_float(grad[k]) * left[k];
        }
        for (int64_t k = 0; k < columns; ++k) sum[k] += to_float(grad[k]) * right[k];
      }
      for (int64_t k = 0; p.dw1_b != nullptr && k < columns; ++k) p.dw1_b[i * p.features + first + k] = sum[k];
    }
  }
}

template <typename T>
PEFTK_INLINE void hadamard_gradient_b(const KhatriRaoBackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* grad = static_cast<const T*>(p.grad_b) + row * p.r1 * p.r2;
    const float *left = p.w1_a + row * p.r1, *right = p.w2_a + row * p.r2;
    float* out = p.dw2_a == nullptr ? nullptr : p.dw2_a + row * p.r2;
    for (int64_t j = 0; out != nullptr && j < p.r2; ++j) out[j] = 0.0f;
    for (int64_t i = 0; i < p.r1; ++i) {
      float sum = 0.0f;
      for (int64_t j = 0; j < p.r2; ++j) {
        const float value = to_float(grad[i * p.r2 + j]);
        sum += value * right[j];
        if (out != nullptr) out[j] += value * left[i];
      }
      if (p.dw1_a != nullptr) p.dw1_a[row * p.r1 + i] = sum;
    }
  }
}

PEFTK_INLINE void khatri_rao_backward_a_cpu_body(const KhatriRaoBackwardParams& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float32 ? hadamard_gradient_a<float>(p, begin, end) : hadamard_gradient_a<BFloat16>(p, begin, end);
}

PEFTK_INLINE void khatri_rao_backward_b_cpu_body(const KhatriRaoBackwardParams& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float32 ? hadamard_gradient_b<float>(p, begin, end) : hadamard_gradient_b<BFloat16>(p, begin, end);
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void hadamard_write_tiles(const HadamardWeightParams& p, int64_t begin, int64_t end) {
  const std::unique_ptr<float[]> tiles(new float[2 * kHadamardRows * kHadamardColumns]);
  float *first = tiles.get(), *second = first + kHadamardRows * kHadamardColumns;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t row = group * kHadamardRows, rows = hadamard_least(p.out - row, kHadamardRows);
    for (int64_t column = 0; column < p.features; column += kHadamardColumns) {
      const int64_t columns = hadamard_least(p.features - column, kHadamardColumns), wide = padded(columns);
      product<kLevel>({p.w1_a + row * p.r1, p.r1, 1}, p.w1_b + column, p.stride, first, kHadamardColumns, rows, wide,
                      p.r1, false);
      product<kLevel>({p.w2_a + row * p.r2, p.r2, 1}, p.w2_b + column, p.stride, second, kHadamardColumns, rows, wide,
                      p.r2, false);
      for (int64_t i = 0; i < rows; ++i) {
        const T* weight = static_cast<const T*>(p.weight) + (row + i) * p.features + column;
        T* out = static_cast<T*>(p.result) + (row + i) * p.features + column;
        for (int64_t j = 0; j < columns; ++j) {
          const float base = to_float(weight[j]);
          const float delta = first[i * kHadamardColumns + j] * second[i * kHadamardColumns + j] * p.scale;
          // -0.0 + 0.0 is +0.0: where nothing is added, every bit of the weight stays.
          from_float(delta == 0.0f ? base : base + delta, out[j]);
        }
      }
    }
  }
}

template <CpuLevel kLevel>
PEFTK_INLINE void hadamard_weight_cpu_body(const HadamardWeightParams& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float32 ? hadamard_write_tiles<kLevel, float>(p, begin, end)
                            : hadamard_write_tiles<kLevel, BFloat16>(p, begin, end);
}

// One matrix's share of a tile: what the tile of the gradient, already times the other product, gives its factors.
template <CpuLevel kLevel>
PEFTK_INLINE void hadamard_contract_tile(const float* tile, const float* w_a, const float* transposed, int64_t rank,
                                         int64_t rows, int64_t columns, int64_t stride, float* da, float* db) {
  const int64_t wide = padded(rank);
  if (da != nullptr)
    product<kLevel>({tile, kHadamardColumns, 1}, transposed, wide, da, wide, rows, wide, columns, true);
  if (db != nullptr)
    product<kLevel>({w_a, 1, rank}, tile, kHadamardColumns, db, stride, rank, padded(columns), rows, true);
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void hadamard_contract_chunks(const HadamardWeightBackwardParams& p, int64_t begin, int64_t end) {
  const bool need1 = p.dw1_a != nullptr || p.dw1_b != nullptr, need2 = p.dw2_a != nullptr || p.dw2_b != nullptr;
  const int64_t wide1 = padded(p.r1), wide2 = padded(p.r2);
  const std::unique_ptr<float[]> tiles(new float[kHadamardRows * (2 * kHadamardColumns + wide1 + wide2)]);
  float *first = tiles.get(), *second = first + kHadamardRows * kHadamardColumns,
        *da1 = second + kHadamardRows * kHadamardColumns;
  float* da2 = da1 + kHadamardRows * wide1;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t last = hadamard_least(p.out, (chunk + 1) * p.chunk);
    for (int64_t row = chunk * p.chunk; row < last; row += kHadamardRows) {
      const int64_t rows = hadamard_least(last - row, kHadamardRows);
      for (int64_t i = 0; i < kHadamardRows * (wide1 + wide2); ++i) da1[i] = 0.0f;
      const float *w1 = p.w1_a + row * p.r1, *w2 = p.w2_a + row * p.r2;
      for (int64_t column = 0; column < p.features; column += kHadamardColumns) {
        const int64_t columns = hadamard_least(p.features - column, kHadamardColumns), wide = padded(columns);
        if (need2)
          product<kLevel>({w1, p.r1, 1}, p.w1_b + column, p.stride, first, kHadamardColumns, rows, wide, p.r1, false);
        if (need1)
          product<kLevel>({w2, p.r2, 1}, p.w2_b + column, p.stride, second, kHadamardColumns, rows, wide, p.r2, false);
        for (int64_t i = 0; i < rows; ++i) {
          const T* grad = static_cast<const T*>(p.grad) + (row + i) * p.features + column;
          // Beyond the last column both products are zero.
          for (int64_t j = 0; need2 && j < columns; ++j) first[i * kHadamardColumns + j] *= to_float(grad[j]) * p.scale;
          for (int64_t j = 0; need1 && j < columns; ++j)
            second[i * kHadamardColumns + j] *= to_float(grad[j]) * p.scale;
        }
        if (need1)
          hadamard_contract_tile<kLevel>(second, w1, p.t1 + column * wide1, p.r1, rows, columns, p.stride,
                                         p.dw1_a ? da1 : nullptr,
                                         p.dw1_b ? p.dw1_b + chunk * p.r1 * p.stride + column : nullptr);
        if (need2)
          hadamard_contract_tile<kLevel>(first, w2, p.t2 + column * wide2, p.r2, rows, columns, p.stride,
                                         p.dw2_a ? da2 : nullptr,
                                         p.dw2_b ? p.dw2_b + chunk * p.r2 * p.stride + column : nullptr);
      }
      if (p.dw1_a != nullptr) store_tile(da1, wide1, rows, p.r1, p.dw1_a + row * p.r1, p.r1);
      if (p.dw2_a != nullptr) store_tile(da2, wide2, rows, p.r2, p.dw2_a + row * p.r2, p.r2);
    }
  }
}

template <CpuLevel kLevel>
PEFTK_INLINE void hadamard_weight_backward_cpu_body(const HadamardWeightBackwardParams& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float32 ? hadamard_contract_chunks<kLevel, float>(p, begin, end)
                            : hadamard_contract_chunks<kLevel, BFloat16>(p, begin, end);
}

PEFTK_INLINE Floats vector_at(const float* from) { return *reinterpret_cast<const Floats*>(from); }

PEFTK_INLINE void hadamard_few_hidden_cpu_body(const HadamardFewParams& p, int64_t begin, int64_t end) {
  const int64_t whole = p.features / kLanes * kLanes;
  for (int64_t at = begin; at < end; ++at) {
    const float *x = p.x + at / p.r1 * p.features, *w1 = p.w1_b + at % p.r1 * p.features;
    for (int64_t first = 0; first < p.r2; first += kLanes) {
      const int64_t some = p.r2 - first < kLanes ? p.r2 - first : kLanes;
      const float* w2 = p.w2_b + first * p.features;
      Floats lanes[kLanes] = {};
      if (some == kLanes) {
        for (int64_t k = 0; k < whole; k += kLanes) {
          const Floats values = vector_at(x + k) * vector_at(w1 + k);
          for (int j = 0; j < kLanes; ++j) lanes[j] += values * vector_at(w2 + j * p.features + k);
        }
      } else {
        for (int64_t k = 0; k < whole; k += kLanes)
          for (int64_t j = 0; j < some; ++j)
            lanes[j] += vector_at(x + k) * vector_at(w1 + k) * vector_at(w2 + j * p.features + k);
      }
      const Floats total = sums_of(lanes);
      for (int64_t j = 0; j < some; ++j) {
        float sum = total[j];
        for (int64_t k = whole; k < p.features; ++k) sum += x[k] * w1[k] * w2[j * p.features + k];
        p.hidden[at * p.r2 + first + j] = sum;
      }
    }
  }
}

PEFTK_INLINE void hadamard_few_cpu_body(const HadamardFewParams& p, int64_t begin, int64_t end) {
  const int64_t whole = p.r2 / kLanes * kLanes;
  for (int64_t t = 0; t < p.rows; ++t) {
    const float* hidden = p.hidden + t * p.r1 * p.r2;
    for (int64_t n = begin; n < end; n += kLanes) {
      const int64_t some = end - n < kLanes ? end - n : kLanes;
      Floats lanes[kLanes] = {};
      float rest[kLanes] = {};
      for (int64_t c = 0; c < some; ++c) {
        const float *w1 = p.w1_a + (n + c) * p.r1, *w2 = p.w2_a + (n + c) * p.r2;
        for (int64_t j = 0; j < whole; j += kLanes) {
          Floats sum = {};
          for (int64_t i = 0; i < p.r1; ++i) sum += w1[i] * vector_at(hidden + i * p.r2 + j);
          lanes[c] += sum * vector_at(w2 + j);
        }
        for (int64_t j = whole; j < p.r2; ++j) {
          float sum = 0.0f;
          for (int64_t i = 0; i < p.r1; ++i) sum += w1[i] * hidden[i * p.r2 + j];
          rest[c] += sum * w2[j];
        }
      }
      const Floats total = sums_of(lanes);
      for (int64_t c = 0; c < some; ++c) p.result[t * p.out + n + c] = (total[c] + rest[c]) * p.scale;
    }
  }
}

}  // namespace

PEFTK_KERNEL(hadamard_few_hidden_cpu, (const HadamardFewParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(hadamard_few_cpu, (const HadamardFewParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(khatri_rao_a_cpu, (const KhatriRaoParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(khatri_rao_b_cpu, (const KhatriRaoParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(khatri_rao_backward_a_cpu, (const KhatriRaoBackwardParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(khatri_rao_backward_b_cpu, (const KhatriRaoBackwardParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_LEVEL_KERNEL(hadamard_weight_cpu, (const HadamardWeightParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_LEVEL_KERNEL(hadamard_weight_backward_cpu, (const HadamardWeightBackwardParams& p, int64_t begin, int64_t end),
                   (p, begin, end))

}  // namespace peftk
