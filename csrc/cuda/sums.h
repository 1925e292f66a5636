// Adding up what blocks of threads have summed apart.
#pragma once
#include "launch.h"

namespace peftk {
namespace {

constexpr int kSumThreads = 256;

// out[i] = scale * the sum of parts[part * count + i], in the order of the parts.
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const float* parts, int64_t number, int64_t count, float scale, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < number; ++part) sum += parts[part * count + i];
  out[i] = sum * scale;
}

// Nothing is done where `out` is null.
void sum_parts(const float* parts, int64_t number, int64_t count, float scale, float* out, cudaStream_t stream) {
  if (out == nullptr || count == 0) return;
  const dim3 grid(static_cast<unsigned>((count + kSumThreads - 1) / kSumThreads));
  PEFTK_LAUNCH(sum_parts_kernel, grid, dim3(kSumThreads), 0, stream, parts, number, count, scale, out);
}

}  // namespace
}  // namespace peftk
