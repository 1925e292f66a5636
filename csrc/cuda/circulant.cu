#include "../circulant.h"

#include "launch.h"
#include "pieces.h"
#include "sums.h"

namespace peftk {
namespace {

constexpr int kCirculantThreads = 128;
// Rows that a thread mixes at once, and blocks of the output whose products it sums at once.
constexpr int kMixTogether = 4, kContractOuts = 4;
// Blocks of threads in the second dimension, at most; they take turns. Tests lower it, so that few rows take several.
int64_t most_circulant_turns = 4096;

// Neighbouring threads have neighbouring lanes, so that all accesses are of whole lines.
template <typename T, bool kAdjoint>
__global__ void __launch_bounds__(kCirculantThreads) circulant_mix_kernel(CirculantMixParams p) {
  const int64_t from = kAdjoint ? p.out_blocks : p.in_blocks, to = kAdjoint ? p.in_blocks : p.out_blocks;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCirculantThreads + threadIdx.x;
  if (i >= to * p.lanes) return;
  const int64_t m = i / p.lanes, lane = i % p.lanes, block = 3 * p.lanes;
  const int64_t step = kAdjoint ? p.in_blocks * block : block;
  const float* planes = p.kernel + m * (kAdjoint ? block : p.in_blocks * block) + lane;
  const T* x = static_cast<const T*>(p.x) + lane;
  T* out = static_cast<T*>(p.out) + m * 2 * p.lanes + lane;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kMixTogether; first < p.rows;
       first += static_cast<int64_t>(gridDim.y) * kMixTogether) {
    float re[kMixTogether] = {}, im[kMixTogether] = {};
    for (int64_t n = 0; n < from; ++n) {
      const float* at = planes + n * step;
      const float a = at[0], s = kAdjoint ? -at[p.lanes] : at[p.lanes], c = at[2 * p.lanes];
#pragma unroll
      for (int u = 0; u < kMixTogether; ++u) {
        const int64_t row = first + u < p.rows ? first + u : p.rows - 1;
        const T* value = x + (row * from + n) * 2 * p.lanes;
        const float x_re = to_float(value[0]), x_im = to_float(value[p.lanes]);
        re[u] = fmaf(a, x_re, fmaf(s, x_im, re[u]));
        im[u] = fmaf(c, x_im, fmaf(-s, x_re, im[u]));
      }
    }
#pragma unroll
    for (int u = 0; u < kMixTogether; ++u)
      if (first + u < p.rows) {
        T* result = out + (first + u) * to * 2 * p.lanes;
        from_float(re[u], result[0]);
        from_float(im[u], result[p.lanes]);
      }
  }
}

// The products of one chunk of rows, for kContractOuts blocks of the output, one of the input, and one lane.
template <typename T>
__global__ void __launch_bounds__(kCirculantThreads) circulant_contract_kernel(CirculantContractParams p) {
  const int64_t groups = (p.out_blocks + kContractOuts - 1) / kContractOuts;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCirculantThreads + threadIdx.x;
  if (i >= groups * p.in_blocks * p.lanes) return;
  const int64_t lane = i % p.lanes, n = i / p.lanes % p.in_blocks, first = i / p.lanes / p.in_blocks * kContractOuts;
  const int64_t chunk = blockIdx.y, last = p.rows * (chunk + 1) / p.chunks;
  const T* grad = static_cast<const T*>(p.grad) + lane;
  const T* x = static_cast<const T*>(p.x) + n * 2 * p.lanes + lane;
  float a[kContractOuts] = {}, s[kContractOuts] = {}, c[kContractOuts] = {};
  for (int64_t row = p.rows * chunk / p.chunks; row < last; ++row) {
    const T* value = x + row * p.in_blocks * 2 * p.lanes;
    const float x_re = to_float(value[0]), x_im = to_float(value[p.lanes]);
#pragma unroll
    for (int u = 0; u < kContractOuts; ++u) {
      const int64_t m = first + u < p.out_blocks ? first + u : p.out_blocks - 1;
      const T* at = grad + (row * p.out_blocks + m) * 2 * p.lanes;
      const float g_re = to_float(at[0]), g_im = to_float(at[p.lanes]);
      a[u] = fmaf(g_re, x_re, a[u]);
      s[u] = fmaf(g_re, x_im, fmaf(-g_im, x_re, s[u]));
      c[u] = fmaf(g_im, x_im, c[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kContractOuts; ++u)
    if (first + u < p.out_blocks) {
      float* partial = p.partial + (((chunk * p.out_blocks + first + u) * p.in_blocks + n) * 3) * p.lanes + lane;
      partial[0] = a[u];
      partial[p.lanes] = s[u];
      partial[2 * p.lanes] = c[u];
    }
}

// A thread walks down a column: the place in the kernel moves back by one with each row.
template <typename T>
__global__ void __launch_bounds__(kCirculantThreads) circulant_weight_kernel(CirculantWeightParams p) {
  const int64_t features = p.in_blocks * p.size,
                column = static_cast<int64_t>(blockIdx.x) * kCirculantThreads + threadIdx.x;
  if (column >= features) return;
  const int64_t n = column / p.size, q = column % p.size, rows = p.out_blocks * p.size;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out);
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const int64_t shift = q - row % p.size, place = shift < 0 ? shift + p.size : shift;
    const float value = p.kernel[(row / p.size * p.in_blocks + n) * p.size + place];
    const float base = weight == nullptr ? 0.0f : to_float(weight[row * features + column]);
    from_float(fmaf(value, p.scale, base), out[row * features + column]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kCirculantThreads) circulant_weight_backward_kernel(CirculantWeightBackwardParams p) {
  const int64_t features = p.in_blocks * p.size, i = static_cast<int64_t>(blockIdx.x) * kCirculantThreads + threadIdx.x;
  if (i >= p.out_blocks * features) return;
  const int64_t m = i / features, n = i % features / p.size;
  int64_t column = i % p.size;
  const T* grad = static_cast<const T*>(p.grad) + m * p.size * features + n * p.size;
  float sum = 0.0f;
  for (int64_t row = 0; row < p.size; ++row) {
    sum += to_float(grad[row * features + column]);
    if (++column == p.size) column = 0;
  }
  p.dkernel[i] = sum * p.scale;
}

dim3 circulant_grid(int64_t threads, int64_t turns) {
  return dim3(static_cast<unsigned>((threads + kCirculantThreads - 1) / kCirculantThreads),
              static_cast<unsigned>(turns < most_circulant_turns ? turns : most_circulant_turns));
}

template <typename F>
void for_circulant_dtype(Dtype dtype, F start) {
  switch (dtype) {
    case Dtype::float32: return start(float{});
    case Dtype::bfloat16: return start(__nv_bfloat16{});
    case Dtype::float16: return start(__half{});
  }
}

}  // namespace

void circulant_mix_cuda(const CirculantMixParams& p, void* stream) {
  if (p.rows == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  const dim3 grid =
      circulant_grid((p.adjoint ? p.in_blocks : p.out_blocks) * p.lanes, (p.rows + kMixTogether - 1) / kMixTogether);
  for_circulant_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.adjoint)
      PEFTK_LAUNCH((circulant_mix_kernel<T, true>), grid, dim3(kCirculantThreads), 0, queue, p);
    else
      PEFTK_LAUNCH((circulant_mix_kernel<T, false>), grid, dim3(kCirculantThreads), 0, queue, p);
  });
}

void circulant_contract_cuda(const CirculantContractParams& p, float* out, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t groups = (p.out_blocks + kContractOuts - 1) / kContractOuts,
                sums = p.out_blocks * p.in_blocks * 3 * p.lanes;
  const dim3 grid(circulant_grid(groups * p.in_blocks * p.lanes, 1).x, static_cast<unsigned>(p.chunks));
  for_circulant_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    PEFTK_LAUNCH((circulant_contract_kernel<T>), grid, dim3(kCirculantThreads), 0, queue, p);
  });
  sum_parts(p.partial, p.chunks, sums, 1.0f, out, queue);
}

void circulant_weight_cuda(const CirculantWeightParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const dim3 grid = circulant_grid(p.in_blocks * p.size, p.out_blocks * p.size);
  for_circulant_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    PEFTK_LAUNCH((circulant_weight_kernel<T>), grid, dim3(kCirculantThreads), 0, queue, p);
  });
}

void circulant_weight_backward_cuda(const CirculantWeightBackwardParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const dim3 grid = circulant_grid(p.out_blocks * p.in_blocks * p.size, 1);
  for_circulant_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    PEFTK_LAUNCH((circulant_weight_backward_kernel<T>), grid, dim3(kCirculantThreads), 0, queue, p);
  });
}

}  // namespace peftk
