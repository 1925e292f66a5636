#include "../circulant.h"

#include <memory>

#include "simd.h"

namespace peftk {
namespace {

static_assert(kCirculantLanes == kLanes);

PEFTK_INLINE Floats load_lanes(const float* from) { return *reinterpret_cast<const Floats*>(from); }

PEFTK_INLINE Floats load_lanes(const BFloat16* from) {
  Floats result;
  for (int i = 0; i < kLanes; ++i) result[i] = to_float(from[i]);
  return result;
}

PEFTK_INLINE void store_lanes(Floats value, float* to) { *reinterpret_cast<Floats*>(to) = value; }

PEFTK_INLINE void store_lanes(Floats value, BFloat16* to) {
  for (int i = 0; i < kLanes; ++i) from_float(value[i], to[i]);
}

// One vector of lanes of one block of the result, for kRows rows.
template <int kRows, bool kAdjoint, typename T>
PEFTK_INLINE void mix_lanes(const CirculantMixParams& p, const T* x, const float* kernel, int64_t kernel_step, T* out) {
  const int64_t from = kAdjoint ? p.out_blocks : p.in_blocks, to = kAdjoint ? p.in_blocks : p.out_blocks;
  Floats re[kRows], im[kRows];
  for (int u = 0; u < kRows; ++u) re[u] = im[u] = Floats{};
  for (int64_t n = 0; n < from; ++n, kernel += kernel_step) {
    const Floats a = load_lanes(kernel), s = load_lanes(kernel + p.lanes), c = load_lanes(kernel + 2 * p.lanes);
    for (int u = 0; u < kRows; ++u) {
      const T* at = x + (u * from + n) * 2 * p.lanes;
      const Floats x_re = load_lanes(at), x_im = load_lanes(at + p.lanes);
      if constexpr (kAdjoint) {
        re[u] += a * x_re - s * x_im;
        im[u] += c * x_im + s * x_re;
      } else {
        re[u] += a * x_re + s * x_im;
        im[u] += c * x_im - s * x_re;
      }
    }
  }
  for (int u = 0; u < kRows; ++u) {
    T* at = out + u * to * 2 * p.lanes;
    store_lanes(re[u], at);
    store_lanes(im[u], at + p.lanes);
  }
}

template <int kRows, bool kAdjoint, typename T>
PEFTK_INLINE void mix_rows(const CirculantMixParams& p, int64_t row) {
  const int64_t from = kAdjoint ? p.out_blocks : p.in_blocks, to = kAdjoint ? p.in_blocks : p.out_blocks;
  const int64_t block = 3 * p.lanes, kernel_step = kAdjoint ? p.in_blocks * block : block;
  const T* x = static_cast<const T*>(p.x) + row * from * 2 * p.lanes;
  T* out = static_cast<T*>(p.out) + row * to * 2 * p.lanes;
  for (int64_t m = 0; m < to; ++m) {
    const float* kernel = p.kernel + m * (kAdjoint ? block : p.in_blocks * block);
    for (int64_t lane = 0; lane < p.lanes; lane += kLanes)
      mix_lanes<kRows, kAdjoint>(p, x + lane, kernel + lane, kernel_step, out + m * 2 * p.lanes + lane);
  }
}

template <bool kAdjoint, typename T>
PEFTK_INLINE void mix_groups(const CirculantMixParams& p, int64_t begin, int64_t end) {
  int64_t row = begin * kMixRows;
  const int64_t last = end * kMixRows < p.rows ? end * kMixRows : p.rows;
  for (; row + kMixRows <= last; row += kMixRows) mix_rows<kMixRows, kAdjoint, T>(p, row);
  for (; row < last; ++row) mix_rows<1, kAdjoint, T>(p, row);
}

template <typename T>
PEFTK_INLINE void mix_typed(const CirculantMixParams& p, int64_t begin, int64_t end) {
  if (p.adjoint)
    mix_groups<true, T>(p, begin, end);
  else
    mix_groups<false, T>(p, begin, end);
}

PEFTK_INLINE void circulant_mix_cpu_body(const CirculantMixParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    mix_typed<float>(p, begin, end);
  else
    mix_typed<BFloat16>(p, begin, end);
}

// Add the products of kRows rows to the sums of a chunk.
template <int kRows, typename T>
PEFTK_INLINE void contract_rows(const CirculantContractParams& p, int64_t row, float* sums) {
  const T* grad = static_cast<const T*>(p.grad) + row * p.out_blocks * 2 * p.lanes;
  const T* x = static_cast<const T*>(p.x) + row * p.in_blocks * 2 * p.lanes;
  for (int64_t m = 0; m < p.out_blocks; ++m)
    for (int64_t lane = 0; lane < p.lanes; lane += kLanes) {
      Floats g_re[kRows], g_im[kRows];
      for (int u = 0; u < kRows; ++u) {
        const T* at = grad + (u * p.out_blocks + m) * 2 * p.lanes + lane;
        g_re[u] = load_lanes(at);
        g_im[u] = load_lanes(at + p.lanes);
      }
      for (int64_t n = 0; n < p.in_blocks; ++n) {
        float* sum = sums + (m * p.in_blocks + n) * 3 * p.lanes + lane;
        Floats a = load_lanes(sum), s = load_lanes(sum + p.lanes), c = load_lanes(sum + 2 * p.lanes);
        for (int u = 0; u < kRows; ++u) {
          const T* at = x + (u * p.in_blocks + n) * 2 * p.lanes + lane;
          const Floats x_re = load_lanes(at), x_im = load_lanes(at + p.lanes);
          a += g_re[u] * x_re;
          s += g_re[u] * x_im - g_im[u] * x_re;
          c += g_im[u] * x_im;
        }
        store_lanes(a, sum);
        store_lanes(s, sum + p.lanes);
        store_lanes(c, sum + 2 * p.lanes);
      }
    }
}

template <typename T>
PEFTK_INLINE void contract_chunks(const CirculantContractParams& p, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* sums = p.partial + chunk * p.out_blocks * p.in_blocks * 3 * p.lanes;
    int64_t row = p.rows * chunk / p.chunks;
    const int64_t last = p.rows * (chunk + 1) / p.chunks;
    for (; row + kMixRows <= last; row += kMixRows) contract_rows<kMixRows, T>(p, row, sums);
    for (; row < last; ++row) contract_rows<1, T>(p, row, sums);
  }
}

PEFTK_INLINE void circulant_contract_cpu_body(const CirculantContractParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    contract_chunks<float>(p, begin, end);
  else
    contract_chunks<BFloat16>(p, begin, end);
}

// The kernel of every block of a row of blocks, twice in a row: any rotation of it is a piece of that.
template <typename T>
PEFTK_INLINE void write_rows(const CirculantWeightParams& p, int64_t begin, int64_t end) {
  const int64_t b = p.size, features = p.in_blocks * b;
  const std::unique_ptr<float[]> twice(new float[2 * features]);
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t n = 0; n < p.in_blocks; ++n)
      for (int64_t l = 0; l < b; ++l)
        twice[2 * n * b + l] = twice[(2 * n + 1) * b + l] = p.kernel[(m * p.in_blocks + n) * b + l] * p.scale;
    for (int64_t row = 0; row < b; ++row) {
      const int64_t at = (m * b + row) * features;
      const T* weight = p.weight == nullptr ? nullptr : static_cast<const T*>(p.weight) + at;
      T* out = static_cast<T*>(p.out) + at;
      for (int64_t n = 0; n < p.in_blocks; ++n) {
        const float* values = twice.get() + (2 * n + 1) * b - row;
        if (weight == nullptr)
          for (int64_t q = 0; q < b; ++q) from_float(values[q], out[n * b + q]);
        else
          for (int64_t q = 0; q < b; ++q) from_float(to_float(weight[n * b + q]) + values[q], out[n * b + q]);
      }
    }
  }
}

// kLanes outputs of a row of blocks, or as many as there are, for one row of x.
PEFTK_INLINE void few_outputs(const CirculantFewParams& p, const float* twice, const float* x, int64_t first,
                              int64_t some, float* out) {
  const int64_t b = p.size, whole = b / kLanes * kLanes;
  Floats lanes[kLanes] = {};
  float rest[kLanes] = {};
  for (int64_t n = 0; n < p.in_blocks; ++n, x += b, twice += 2 * b) {
    const float* values = twice + b - first;
    if (some == kLanes) {
      for (int64_t q = 0; q < whole; q += kLanes) {
        const Floats numbers = *reinterpret_cast<const Floats*>(x + q);
        for (int i = 0; i < kLanes; ++i) lanes[i] += numbers * *reinterpret_cast<const Floats*>(values + q - i);
      }
    } else {
      for (int64_t q = 0; q < whole; q += kLanes)
        for (int64_t i = 0; i < some; ++i)
          lanes[i] += *reinterpret_cast<const Floats*>(x + q) * *reinterpret_cast<const Floats*>(values + q - i);
    }
    for (int64_t q = whole; q < b; ++q)
      for (int64_t i = 0; i < some; ++i) rest[i] += x[q] * values[q - i];
  }
  const Floats total = sums_of(lanes);
  for (int64_t i = 0; i < some; ++i) out[i] = total[i] + rest[i];
}

PEFTK_INLINE void circulant_few_cpu_body(const CirculantFewParams& p, int64_t begin, int64_t end) {
  const int64_t b = p.size, features = p.in_blocks * b;
  const std::unique_ptr<float[]> twice(new float[2 * features]);
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t n = 0; n < p.in_blocks; ++n)
      for (int64_t l = 0; l < b; ++l)
        twice[2 * n * b + l] = twice[(2 * n + 1) * b + l] = p.kernel[(m * p.in_blocks + n) * b + l] * p.scale;
    for (int64_t t = 0; t < p.rows; ++t)
      for (int64_t first = 0; first < b; first += kLanes)
        few_outputs(p, twice.get(), p.x + t * features, first, b - first < kLanes ? b - first : kLanes,
                    p.out + (t * p.out_blocks + m) * b + first);
  }
}

PEFTK_INLINE void circulant_weight_cpu_body(const CirculantWeightParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    write_rows<float>(p, begin, end);
  else
    write_rows<BFloat16>(p, begin, end);
}

template <typename T>
PEFTK_INLINE void gather_rows(const CirculantWeightBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t b = p.size, features = p.in_blocks * b;
  const std::unique_ptr<float[]> twice(new float[2 * features]);
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t i = 0; i < 2 * features; ++i) twice[i] = 0.0f;
    for (int64_t row = 0; row < b; ++row) {
      const T* grad = static_cast<const T*>(p.grad) + (m * b + row) * features;
      for (int64_t n = 0; n < p.in_blocks; ++n) {
        float* sums = twice.get() + (2 * n + 1) * b - row;
        for (int64_t q = 0; q < b; ++q) sums[q] += to_float(grad[n * b + q]);
      }
    }
    for (int64_t n = 0; n < p.in_blocks; ++n)
      for (int64_t l = 0; l < b; ++l)
        p.dkernel[(m * p.in_blocks + n) * b + l] = (twice[2 * n * b + l] + twice[(2 * n + 1) * b + l]) * p.scale;
  }
}

PEFTK_INLINE void circulant_weight_backward_cpu_body(const CirculantWeightBackwardParams& p, int64_t begin,
                                                     int64_t end) {
  if (p.dtype == Dtype::float32)
    gather_rows<float>(p, begin, end);
  else
    gather_rows<BFloat16>(p, begin, end);
}

}  // namespace

PEFTK_KERNEL(circulant_mix_cpu, (const CirculantMixParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(circulant_contract_cpu, (const CirculantContractParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(circulant_few_cpu, (const CirculantFewParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(circulant_weight_cpu, (const CirculantWeightParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(circulant_weight_backward_cpu, (const CirculantWeightBackwardParams& p, int64_t begin, int64_t end),
             (p, begin, end))

}  // namespace peftk
