#include "../kronecker.h"
#include "launch.h"
#include "pieces.h"
#include "sums.h"

namespace peftk {
namespace {

constexpr int kKroneckerThreads = 256;
// Columns of w2 whose gradients a block of threads sums, and the threads that share each of them.
constexpr int kKroneckerColumns = 32, kKroneckerTeam = kKroneckerThreads / kKroneckerColumns;

// The entries of both factors that an element of the weight is the product of.
struct Entry {
  int64_t first, second;
};

__device__ __forceinline__ Entry place_of(int64_t row, int64_t column, int64_t middle, int64_t rows, int64_t columns) {
  return {row / rows * middle + column / columns, row % rows * columns + column % columns};
}

__device__ __forceinline__ float added(float before, float delta) {
  // -0.0 + 0.0 is +0.0: where nothing is added, every bit of the weight stays.
  return delta == 0.0f ? before : before + delta;
}

// One piece of a row a thread; a piece lies within one block of the product.
template <typename T>
__global__ void __launch_bounds__(kKroneckerThreads) kronecker_weight_kernel(KroneckerWeightParams p, int64_t pieces) {
  constexpr int kSize = Piece<T>::kSize;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kKroneckerThreads + threadIdx.x;
  if (index >= pieces) return;
  const int64_t in_row = p.middle * p.columns / kSize;
  const Entry at = place_of(index / in_row, index % in_row * kSize, p.middle, p.rows, p.columns);
  const float factor = p.w1[at.first] * p.scale;
  Piece<T> piece = static_cast<const Piece<T>*>(p.weight)[index];
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const Piece<float> w2 = *reinterpret_cast<const Piece<float>*>(p.w2 + at.second + i);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      from_float(added(to_float(piece.values[i + j]), factor * w2.values[j]), piece.values[i + j]);
  }
  static_cast<Piece<T>*>(p.out)[index] = piece;
}

template <typename T>
__global__ void __launch_bounds__(kKroneckerThreads)
    kronecker_weight_any_kernel(KroneckerWeightParams p, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kKroneckerThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t features = p.middle * p.columns;
  const Entry at = place_of(index / features, index % features, p.middle, p.rows, p.columns);
  const float delta = p.w1[at.first] * p.scale * p.w2[at.second];
  from_float(added(to_float(static_cast<const T*>(p.weight)[index]), delta), static_cast<T*>(p.out)[index]);
}

// dw2[k, n] for one k and kKroneckerColumns columns: a team of threads shares a column, and adds in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kKroneckerThreads) kronecker_dw2_kernel(KroneckerWeightBackwardParams p) {
  PEFTK_SHARED(float, sums, [kKroneckerTeam][kKroneckerColumns]);
  const int lane = threadIdx.x % kKroneckerColumns, member = threadIdx.x / kKroneckerColumns;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kKroneckerColumns + lane, k = blockIdx.y;
  float sum = 0.0f;
  if (n < p.columns)
    for (int64_t i = member; i < p.left * p.middle; i += kKroneckerTeam) {
      const int64_t row = i / p.middle * p.rows + k;
      const int64_t at = row * p.middle * p.columns + i % p.middle * p.columns + n;
      sum = fmaf(p.w1[i], to_float(static_cast<const T*>(p.grad)[at]), sum);
    }
  sums[member][lane] = sum;
  __syncthreads();
  if (member > 0 || n >= p.columns) return;
  for (int other = 1; other < kKroneckerTeam; ++other) sum += sums[other][lane];
  p.dw2[k * p.columns + n] = sum * p.scale;
}

// A chunk's part of dw1[l, m]: the sum of one block of the gradient times the same rows of w2.
template <typename T>
__global__ void __launch_bounds__(kKroneckerThreads) kronecker_dw1_kernel(KroneckerWeightBackwardParams p) {
  PEFTK_SHARED(float, sums, [kKroneckerThreads]);
  const int thread = threadIdx.x;
  const int64_t i = blockIdx.x, chunk = blockIdx.y;
  const int64_t first = p.rows * chunk / p.chunks, last = p.rows * (chunk + 1) / p.chunks;
  float sum = 0.0f;
  // A warp a row: no division for every element.
  for (int64_t k = first + thread / kKroneckerColumns; k < last; k += kKroneckerTeam) {
    const T* grad = static_cast<const T*>(p.grad) + ((i / p.middle * p.rows + k) * p.middle + i % p.middle) * p.columns;
    const float* w2 = p.w2 + k * p.columns;
    for (int64_t n = thread % kKroneckerColumns; n < p.columns; n += kKroneckerColumns)
      sum = fmaf(w2[n], to_float(grad[n]), sum);
  }
  sums[thread] = sum;
  __syncthreads();
  for (int half = kKroneckerThreads / 2; half > 0; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    __syncthreads();
  }
  if (thread == 0) p.partial[chunk * p.left * p.middle + i] = sums[0];
}

unsigned blocks_for(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

bool on_pieces(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T>
void start(const KroneckerWeightParams& p, cudaStream_t stream) {
  const int64_t count = p.left * p.rows * p.middle * p.columns;
  constexpr int kSize = Piece<T>::kSize;
  if (p.columns % kSize == 0 && on_pieces(p.weight) && on_pieces(p.out) && on_pieces(p.w2)) {
    const int64_t pieces = count / kSize;
    PEFTK_LAUNCH((kronecker_weight_kernel<T>), dim3(blocks_for(pieces, kKroneckerThreads)), dim3(kKroneckerThreads), 0,
                 stream, p, pieces);
  } else {
    PEFTK_LAUNCH((kronecker_weight_any_kernel<T>), dim3(blocks_for(count, kKroneckerThreads)), dim3(kKroneckerThreads),
                 0, stream, p, count);
  }
}

template <typename T>
void start(const KroneckerWeightBackwardParams& p, float* dw1, cudaStream_t stream) {
  const int64_t entries = p.left * p.middle;
  if (p.dw2 != nullptr)
    PEFTK_LAUNCH((kronecker_dw2_kernel<T>),
                 dim3(blocks_for(p.columns, kKroneckerColumns), static_cast<unsigned>(p.rows)), dim3(kKroneckerThreads),
                 0, stream, p);
  if (dw1 == nullptr) return;
  PEFTK_LAUNCH((kronecker_dw1_kernel<T>), dim3(static_cast<unsigned>(entries), static_cast<unsigned>(p.chunks)),
               dim3(kKroneckerThreads), 0, stream, p);
  sum_parts(p.partial, p.chunks, entries, p.scale, dw1, stream);
}

}  // namespace

void kronecker_weight_cuda(const KroneckerWeightParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::float32: return start<float>(p, queue);
    case Dtype::bfloat16: return start<__nv_bfloat16>(p, queue);
    case Dtype::float16: return start<__half>(p, queue);
  }
}

int64_t kronecker_weight_chunks_cuda(int64_t entries, int64_t rows) {
  const int64_t wanted = (1024 + entries - 1) / entries;
  return wanted < rows ? wanted : rows;
}

void kronecker_weight_backward_cuda(const KroneckerWeightBackwardParams& p, float* dw1, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::float32: return start<float>(p, dw1, queue);
    case Dtype::bfloat16: return start<__nv_bfloat16>(p, dw1, queue);
    case Dtype::float16: return start<__half>(p, dw1, queue);
  }
}

}  // namespace peftk
