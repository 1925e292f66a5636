#include "../cayley.h"

#include "launch.h"

namespace peftk {
namespace {

// A block of threads holds one matrix: kSide x kSide threads, each with the kTile x kTile elements whose row and
// column leave its own remainder modulo kSide. Rows and columns from `size` on are those of the identity.
template <int kTile, int kSide>
struct Grid {
  static constexpr int kThreads = kSide * kSide;
  static constexpr int kSize = kTile * kSide;
};

__device__ __forceinline__ int64_t triangle_offset(int64_t size, int64_t i, int64_t j) {
  return i * (2 * size - i - 1) / 2 + (j - i - 1);
}

// Numbers of one matrix in the source.
__device__ __forceinline__ int64_t source_size(int64_t size, bool square) {
  return square ? size * size : size * (size - 1) / 2;
}

// An entry of S above its diagonal.
__device__ __forceinline__ float upper(const float* source, bool square, int64_t size, int64_t i, int64_t j) {
  return square ? 0.5f * (source[i * size + j] - source[j * size + i]) : source[triangle_offset(size, i, j)];
}

// R = 2 inv(I + S) - I, as on the CPU. The symmetric part of I + S and of every Schur complement of it is at least I,
// so all pivots are at least 1 and none is looked for. The elimination may grow numbers to 1 + |S|^2, which takes all
// digits of a float32 for |S| = 1e4 and leaves no start for a refinement: it runs in doubles, in registers.
template <int kTile, int kSide>
__global__ void __launch_bounds__(Grid<kTile, kSide>::kThreads) cayley_kernel(CayleyParams p) {
  constexpr int kSize = Grid<kTile, kSide>::kSize;
  // Two of each: while a slow thread reads one step's pivots, a quick one writes the next step's.
  PEFTK_SHARED(double, pivot_row, [2][kSize]);
  PEFTK_SHARED(double, pivot_column, [2][kSize]);
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide, n = static_cast<int>(p.size);
  const float* source = p.source + blockIdx.x * source_size(p.size, p.square);

  double a[kTile][kTile];
#pragma unroll
  for (int r = 0; r < kTile; ++r)
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      const int i = y + r * kSide, j = x + c * kSide;
      double value = i == j ? 1.0 : 0.0;
      if (i < j && j < n) value = upper(source, p.square, n, i, j);
      if (j < i && i < n) value = -static_cast<double>(upper(source, p.square, n, j, i));
      a[r][c] = value;
    }

  for (int pivot = 0; pivot < n; ++pivot) {
    const int turn = pivot & 1;
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        const int i = y + r * kSide, j = x + c * kSide;
        if (i == pivot) pivot_row[turn][j] = a[r][c];
        if (j == pivot) pivot_column[turn][i] = a[r][c];
      }
    __syncthreads();
    const double inverse = 1.0 / pivot_row[turn][pivot];
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        const int i = y + r * kSide, j = x + c * kSide;
        const double row = j == pivot ? 1.0 : pivot_row[turn][j];
        const double rest = j == pivot ? 0.0 : a[r][c];
        a[r][c] = i == pivot ? row * inverse : rest - pivot_column[turn][i] * inverse * row;
      }
  }

  float* blocks = p.blocks + blockIdx.x * (p.size * p.size);
#pragma unroll
  for (int r = 0; r < kTile; ++r)
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      const int i = y + r * kSide, j = x + c * kSide;
      if (i < n && j < n) blocks[i * n + j] = static_cast<float>(2.0 * a[r][c] - (i == j ? 1.0 : 0.0));
    }
}

// dS = -(R + I)^T G (R + I)^T / 2, because inv(I + S) = (R + I) / 2: two products instead of a second inversion.
template <int kTile, int kSide>
__global__ void __launch_bounds__(Grid<kTile, kSide>::kThreads) cayley_backward_kernel(CayleyBackwardParams p) {
  constexpr int kThreads = Grid<kTile, kSide>::kThreads, kSize = Grid<kTile, kSide>::kSize;
  // One column more, so that a warp that walks down a column touches every bank.
  PEFTK_SHARED(float, m, [kSize][kSize + 1]);
  PEFTK_SHARED(float, g, [kSize][kSize + 1]);
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide, n = static_cast<int>(p.size);
  const float* blocks = p.blocks + blockIdx.x * (p.size * p.size);
  const float* grad = p.grad + blockIdx.x * (p.size * p.size);
  for (int at = threadIdx.x; at < kSize * kSize; at += kThreads) {
    const int i = at / kSize, j = at % kSize;
    const bool inside = i < n && j < n;
    m[i][j] = inside ? blocks[i * n + j] + (i == j ? 1.0f : 0.0f) : 0.0f;
    g[i][j] = inside ? grad[i * n + j] : 0.0f;
  }
  __syncthreads();

  float sum[kTile][kTile] = {};
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; ++c) sum[r][c] = fmaf(m[k][y + r * kSide], g[k][x + c * kSide], sum[r][c]);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kTile; ++r)
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      g[y + r * kSide][x + c * kSide] = sum[r][c];
      sum[r][c] = 0.0f;
    }
  __syncthreads();
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; ++c) sum[r][c] = fmaf(g[y + r * kSide][k], m[x + c * kSide][k], sum[r][c]);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kTile; ++r)
#pragma unroll
    for (int c = 0; c < kTile; ++c) g[y + r * kSide][x + c * kSide] = sum[r][c];
  __syncthreads();

  float* dsource = p.dsource + blockIdx.x * source_size(p.size, p.square);
  for (int at = threadIdx.x; at < kSize * kSize; at += kThreads) {
    const int i = at / kSize, j = at % kSize;
    if (p.square && i < n && j < n)
      dsource[i * n + j] = -0.25f * (g[i][j] - g[j][i]);
    else if (i < j && j < n)
      dsource[triangle_offset(n, i, j)] = -0.5f * (g[i][j] - g[j][i]);
  }
}

template <int kTile, int kSide>
void start(const CayleyParams& p, unsigned count, cudaStream_t stream) {
  PEFTK_LAUNCH((cayley_kernel<kTile, kSide>), dim3(count), dim3(kSide * kSide), 0, stream, p);
}

template <int kTile, int kSide>
void start(const CayleyBackwardParams& p, unsigned count, cudaStream_t stream) {
  PEFTK_LAUNCH((cayley_backward_kernel<kTile, kSide>), dim3(count), dim3(kSide * kSide), 0, stream, p);
}

template <typename Params>
void start_by_size(const Params& p, int64_t count, void* stream) {
  if (count == 0) return;
  const auto blocks = static_cast<unsigned>(count);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (p.size <= 8)
    start<1, 8>(p, blocks, queue);
  else if (p.size <= 16)
    start<2, 8>(p, blocks, queue);
  else if (p.size <= 32)
    start<4, 8>(p, blocks, queue);
  else
    start<4, 16>(p, blocks, queue);
}

}  // namespace

void cayley_cuda(const CayleyParams& p, int64_t count, void* stream) { start_by_size(p, count, stream); }

void cayley_backward_cuda(const CayleyBackwardParams& p, int64_t count, void* stream) {
  start_by_size(p, count, stream);
}

}  // namespace peftk
