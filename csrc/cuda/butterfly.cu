#include "../butterfly.h"

#include "launch.h"

namespace peftk {
namespace {

constexpr int kButterflyThreads = 128;

// One stage of one group: chunks of `chunk` features, joined from subchunks of half that width.
struct Stage {
  int size, half, chunk, width;

  __device__ Stage(int64_t size, int stage)
      : size(static_cast<int>(size)), half(this->size / 2), chunk(this->size << stage), width(chunk / 2) {}
  __device__ __forceinline__ int inner() const { return width / half; }
  // Row `row` of block j of chunk c: a row of half-block j of the first or of the second subchunk.
  __device__ __forceinline__ int row_of(int c, int j, int row) const {
    return c * chunk + row / half * width + j * half + row % half;
  }
  // Row k of half-block j, k from `half` on being those of the second subchunk.
  __device__ __forceinline__ int row_before(int c, int j, int k) const {
    return (2 * c + k / half) * width + j * half + k % half;
  }
};

// after (group / chunk, chunk, chunk) from before (2 group / chunk, chunk / 2, chunk / 2).
__device__ __forceinline__ void multiply_stage_on_cuda(const Stage& s, int group, const float* factor,
                                                       const float* before, float* after) {
  for (int at = threadIdx.x; at < group * s.chunk; at += kButterflyThreads) {
    const int u = at / s.chunk, v = at % s.chunk, c = u / s.chunk, r = u % s.chunk;
    const int j = r % s.width / s.half, row = r / s.width * s.half + r % s.half, first = v / s.width * s.half;
    const float* entries = factor + ((c * s.inner() + j) * s.size + row) * s.size + first;
    const float* column = before + s.row_before(c, j, first) * s.width + v % s.width;
    float sum = 0.0f;
    for (int t = 0; t < s.half; ++t) sum = fmaf(entries[t], column[t * s.width], sum);
    after[at] = sum;
  }
}

// A block of threads multiplies the stages of one group; products but the last stay in shared memory.
__global__ void __launch_bounds__(kButterflyThreads) butterfly_compose_kernel(ButterflyComposeParams p) {
  PEFTK_DYNAMIC_SHARED(float, space);
  const int stages = static_cast<int>(p.stages), group = static_cast<int>(p.size) << (stages - 1);
  const int64_t first = blockIdx.x * (group * p.size);
  float* blocks = p.blocks + static_cast<int64_t>(blockIdx.x) * group * group;
  const float* before = p.factors + first;
  if (stages == 1)
    for (int at = threadIdx.x; at < group * group; at += kButterflyThreads) blocks[at] = before[at];
  for (int stage = 1; stage < stages; ++stage) {
    float* after = stage + 1 == stages ? blocks : space + stage % 2 * (group * group / 2);
    multiply_stage_on_cuda(Stage(p.size, stage), group, p.factors + stage * (p.count * p.size * p.size) + first, before,
                           after);
    __syncthreads();
    before = after;
  }
}

// The products of the stages again, beside each other, and then the stages backward.
__global__ void __launch_bounds__(kButterflyThreads)
    butterfly_compose_backward_kernel(ButterflyComposeBackwardParams p) {
  PEFTK_DYNAMIC_SHARED(float, space);
  const int last = static_cast<int>(p.stages) - 1, group = static_cast<int>(p.size) << last;
  const int64_t first = blockIdx.x * (group * p.size), stride = p.count * p.size * p.size;
  const float* grad = p.grad + static_cast<int64_t>(blockIdx.x) * group * group;
  if (last == 0)
    for (int at = threadIdx.x; at < group * group; at += kButterflyThreads) p.dfactors[first + at] = grad[at];
  const int columns = group * static_cast<int>(p.size);
  for (int stage = 1; stage < last; ++stage) {
    const float* before = stage == 1 ? p.factors + first : space + columns * ((1 << (stage - 1)) - 2);
    multiply_stage_on_cuda(Stage(p.size, stage), group, p.factors + stage * stride + first, before,
                           space + columns * ((1 << stage) - 2));
    __syncthreads();
  }
  float* gradients = space + (last > 1 ? columns * ((1 << last) - 2) : 0);
  for (int stage = last; stage > 0; --stage) {
    const Stage s(p.size, stage);
    const float* factor = p.factors + stage * stride + first;
    const float* before = stage == 1 ? p.factors + first : space + columns * ((1 << (stage - 1)) - 2);
    float* dfactor = p.dfactors + stage * stride + first;
    float* dbefore = stage == 1 ? p.dfactors + first : gradients + stage % 2 * (group * group / 2);
    for (int at = threadIdx.x; at < columns; at += kButterflyThreads) {
      const int k = at % s.size, row = at / s.size % s.size, block = at / (s.size * s.size);
      const int c = block / s.inner(), j = block % s.inner();
      const float* left = grad + s.row_of(c, j, row) * s.chunk + k / s.half * s.width;
      const float* right = before + s.row_before(c, j, k) * s.width;
      float sum = 0.0f;
      for (int i = 0; i < s.width; ++i) sum = fmaf(left[i], right[i], sum);
      dfactor[at] = sum;
    }
    for (int at = threadIdx.x; at < group * s.width; at += kButterflyThreads) {
      const int u = at / s.width, c = u / s.chunk, sub = u / s.width % 2, r = u % s.width, j = r / s.half;
      const float* entries = factor + (c * s.inner() + j) * s.size * s.size + sub * s.half + r % s.half;
      const float* column = grad + sub * s.width + at % s.width;
      float sum = 0.0f;
      for (int row = 0; row < s.size; ++row)
        sum = fmaf(entries[row * s.size], column[s.row_of(c, j, row) * s.chunk], sum);
      dbefore[at] = sum;
    }
    __syncthreads();
    grad = dbefore;
  }
}

}  // namespace

void butterfly_compose_cuda(const ButterflyComposeParams& p, void* stream) {
  const int64_t floats = p.stages > 2 ? p.group() * p.group() : 0;
  PEFTK_LAUNCH(butterfly_compose_kernel, dim3(static_cast<unsigned>(p.groups())), dim3(kButterflyThreads),
               floats * sizeof(float), static_cast<cudaStream_t>(stream), p);
}

void butterfly_compose_backward_cuda(const ButterflyComposeBackwardParams& p, void* stream) {
  const int64_t kept = p.stages > 2 ? p.group() * (p.group() - 2 * p.size) : 0;
  const int64_t floats = p.stages > 2 ? kept + p.group() * p.group() : 0;
  PEFTK_LAUNCH(butterfly_compose_backward_kernel, dim3(static_cast<unsigned>(p.groups())), dim3(kButterflyThreads),
               floats * sizeof(float), static_cast<cudaStream_t>(stream), p);
}

}  // namespace peftk
