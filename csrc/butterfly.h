// Butterfly products, multiplied out group by group, and the scale of channels about a bias.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace peftk {

// Features are numbered by half-blocks of h = size / 2. Block j of a chunk of 2^i blocks of stage i takes half-blocks j
// and j + 2^i of that chunk, so the product of stages 0 to i is closed on chunks of size * 2^i features.
struct ButterflyComposeParams {
  const float* factors;  // (stages, count, size, size)
  float* blocks;         // (count >> (stages - 1), group, group)
  int64_t stages, count, size;

  int64_t groups() const { return count >> (stages - 1); }
  int64_t group() const { return size << (stages - 1); }
};

struct ButterflyComposeBackwardParams {
  const float* grad;     // as blocks above
  const float* factors;  // as above
  float* dfactors;       // as factors
  int64_t stages, count, size;

  int64_t groups() const { return count >> (stages - 1); }
  int64_t group() const { return size << (stages - 1); }
};

// y = scale * x + (1 - scale) * bias over the channels of x, which is (outer, channels, inner).
struct ScaleChannelsParams {
  const void* x;
  const float *scale, *bias;  // (channels); the bias may be null
  void* y;
  int64_t outer, channels, inner;
  Dtype dtype;
};

struct ScaleChannelsBackwardParams {
  const void *grad, *x;       // x may be null where `sums` is
  const float *scale, *bias;  // as above
  void* dx;                   // null if not wanted
  float* sums;                // of grad * (x - bias) and of grad: (chunks, 2, channels); null if not wanted
  int64_t outer, channels, inner;
  int64_t chunks;  // the outer rows are cut into this many pieces, which sum apart
  Dtype dtype;
};

// Groups begin to end; the workspace of a task holds `butterfly_workspace` floats.
void butterfly_compose_cpu(const ButterflyComposeParams& p, int64_t begin, int64_t end);
void butterfly_compose_backward_cpu(const ButterflyComposeBackwardParams& p, int64_t begin, int64_t end);
// Outer rows begin to end.
void scale_channels_cpu(const ScaleChannelsParams& p, int64_t begin, int64_t end);
// Chunks begin to end.
void scale_channels_backward_cpu(const ScaleChannelsBackwardParams& p, int64_t begin, int64_t end);

// Largest group of the CUDA kernels, which hold one in shared memory.
constexpr int64_t kCudaButterflyGroup = 64;

// The stream is a cudaStream_t. A launch that fails throws a std::runtime_error that names the kernel.
void butterfly_compose_cuda(const ButterflyComposeParams& p, void* stream);
void butterfly_compose_backward_cuda(const ButterflyComposeBackwardParams& p, void* stream);

}  // namespace peftk
