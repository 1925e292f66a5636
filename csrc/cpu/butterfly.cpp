#include "../butterfly.h"

#include <memory>

#include "simd.h"

namespace peftk {
namespace {

using Buffer = std::unique_ptr<float[]>;

PEFTK_INLINE void axpy(float factor, const float* x, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    *reinterpret_cast<Floats*>(y + i) += factor * *reinterpret_cast<const Floats*>(x + i);
  for (; i < count; ++i) y[i] += factor * x[i];
}

// Eight sums beside each other, added up in a fixed order.
PEFTK_INLINE float dot(const float* x, const float* y, int64_t count) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    sums += *reinterpret_cast<const Floats*>(x + i) * *reinterpret_cast<const Floats*>(y + i);
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  for (; i < count; ++i) total += x[i] * y[i];
  return total;
}

// The product of the stages up to `stage` of one group, (group / chunk, chunk, chunk), from that of the stages before,
// (2 group / chunk, chunk / 2, chunk / 2). `factor` is the first block of the group in this stage.
PEFTK_INLINE void multiply_stage(const float* factor, int64_t size, int64_t chunk, int64_t group, const float* before,
                                 float* after) {
  const int64_t half = size / 2, width = chunk / 2, inner = width / half;
  for (int64_t c = 0; c < group / chunk; ++c)
    for (int64_t j = 0; j < inner; ++j) {
      const float* block = factor + (c * inner + j) * size * size;
      for (int64_t row = 0; row < size; ++row) {
        // Row (p, s) of the block is row s of half-block j of subchunk p.
        float* to = after + (c * chunk + row / half * width + j * half + row % half) * chunk;
        for (int64_t i = 0; i < chunk; ++i) to[i] = 0.0f;
        for (int64_t k = 0; k < size; ++k)
          axpy(block[row * size + k], before + ((2 * c + k / half) * width + j * half + k % half) * width,
               to + k / half * width, width);
      }
    }
}

PEFTK_INLINE void butterfly_compose_cpu_body(const ButterflyComposeParams& p, int64_t begin, int64_t end) {
  const int64_t group = p.group(), blocks = group / p.size, area = p.size * p.size;
  // Every product but the last is at most half a group wide.
  const Buffer space(new float[group * group]);
  for (int64_t n = begin; n < end; ++n) {
    const float* before = p.factors + n * blocks * area;
    float* result = p.blocks + n * group * group;
    if (p.stages == 1)
      for (int64_t i = 0; i < area; ++i) result[i] = before[i];
    float* free[2] = {space.get(), space.get() + group * group / 2};
    for (int64_t stage = 1; stage < p.stages; ++stage) {
      float* after = stage + 1 == p.stages ? result : free[stage % 2];
      multiply_stage(p.factors + (stage * p.count + n * blocks) * area, p.size, p.size << stage, group, before, after);
      before = after;
    }
  }
}

// The reverse of multiply_stage: the gradient of the stage's blocks, and of the product before it.
PEFTK_INLINE void stage_gradient(const float* factor, int64_t size, int64_t chunk, int64_t group, const float* before,
                                 const float* grad, float* dfactor, float* dbefore) {
  const int64_t half = size / 2, width = chunk / 2, inner = width / half;
  for (int64_t i = 0; i < group * width; ++i) dbefore[i] = 0.0f;
  for (int64_t c = 0; c < group / chunk; ++c)
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t block = (c * inner + j) * size * size;
      for (int64_t row = 0; row < size; ++row) {
        const float* from = grad + (c * chunk + row / half * width + j * half + row % half) * chunk;
        for (int64_t k = 0; k < size; ++k) {
          const int64_t at = ((2 * c + k / half) * width + j * half + k % half) * width;
          dfactor[block + row * size + k] = dot(from + k / half * width, before + at, width);
          axpy(factor[block + row * size + k], from + k / half * width, dbefore + at, width);
        }
      }
    }
}

PEFTK_INLINE void butterfly_compose_backward_cpu_body(const ButterflyComposeBackwardParams& p, int64_t begin,
                                                      int64_t end) {
  const int64_t group = p.group(), blocks = group / p.size, area = p.size * p.size, last = p.stages - 1;
  // The products of stages 1 to last - 1, beside each other: group * size * (2 + 4 + ...) floats; and two gradients.
  const int64_t kept = last > 1 ? group * (group - 2 * p.size) : 0;
  const Buffer space(new float[kept + group * group]);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = n * blocks * area, stage_stride = p.count * area;
    const auto product = [&](int64_t stage) -> const float* {
      return stage == 0 ? p.factors + first : space.get() + group * p.size * ((int64_t{1} << stage) - 2);
    };
    for (int64_t stage = 1; stage < last; ++stage)
      multiply_stage(p.factors + stage * stage_stride + first, p.size, p.size << stage, group, product(stage - 1),
                     const_cast<float*>(product(stage)));
    const float* grad = p.grad + n * group * group;
    float* free[2] = {space.get() + kept, space.get() + kept + group * group / 2};
    for (int64_t stage = last; stage > 0; --stage) {
      float* dbefore = stage == 1 ? p.dfactors + first : free[stage % 2];
      stage_gradient(p.factors + stage * stage_stride + first, p.size, p.size << stage, group, product(stage - 1), grad,
                     p.dfactors + stage * stage_stride + first, dbefore);
      grad = dbefore;
    }
    if (last == 0)
      for (int64_t i = 0; i < area; ++i) p.dfactors[first + i] = grad[i];
  }
}

// Channels that are written together, in the first-level cache.
constexpr int64_t kChannels = 512;
// Rows that are summed before their sum joins the others: short sums of short sums round less.
constexpr int64_t kSumRows = 16;

// What is added to the scaled channel. A scale of one must change no bit, and a negative zero added changes none.
PEFTK_INLINE float shift_of(float scale, float bias) { return scale == 1.0f ? -0.0f : (1.0f - scale) * bias; }

template <typename T>
PEFTK_INLINE void scale_rows(const ScaleChannelsParams& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  if (p.inner == 1) {
    float shift[kChannels];
    for (int64_t first = 0; first < p.channels; first += kChannels) {
      const int64_t count = p.channels - first < kChannels ? p.channels - first : kChannels;
      const float* scale = p.scale + first;
      for (int64_t c = 0; c < count; ++c) shift[c] = p.bias ? shift_of(scale[c], p.bias[first + c]) : 0.0f;
      for (int64_t row = begin; row < end; ++row) {
        const T* from = x + row * p.channels + first;
        T* to = y + row * p.channels + first;
        if (p.bias)
          for (int64_t c = 0; c < count; ++c) from_float(to_float(from[c]) * scale[c] + shift[c], to[c]);
        else
          for (int64_t c = 0; c < count; ++c) from_float(to_float(from[c]) * scale[c], to[c]);
      }
    }
    return;
  }
  for (int64_t row = begin; row < end; ++row)
    for (int64_t c = 0; c < p.channels; ++c) {
      const T* from = x + (row * p.channels + c) * p.inner;
      T* to = y + (row * p.channels + c) * p.inner;
      const float scale = p.scale[c], shift = p.bias ? shift_of(scale, p.bias[c]) : 0.0f;
      for (int64_t i = 0; i < p.inner; ++i)
        from_float(p.bias ? to_float(from[i]) * scale + shift : to_float(from[i]) * scale, to[i]);
    }
}

template <typename T>
PEFTK_INLINE void scale_rows_backward(const ScaleChannelsBackwardParams& p, int64_t chunk) {
  const T *grad = static_cast<const T*>(p.grad), *x = static_cast<const T*>(p.x);
  T* dx = static_cast<T*>(p.dx);
  const int64_t begin = p.outer * chunk / p.chunks, end = p.outer * (chunk + 1) / p.chunks;
  float* products = p.sums ? p.sums + chunk * 2 * p.channels : nullptr;
  float* totals = p.sums ? products + p.channels : nullptr;
  for (int64_t c = 0; p.sums && c < 2 * p.channels; ++c) products[c] = 0.0f;
  if (p.inner == 1) {
    float product[kChannels], total[kChannels];
    for (int64_t first = 0; first < p.channels; first += kChannels) {
      const int64_t count = p.channels - first < kChannels ? p.channels - first : kChannels;
      const float *scale = p.scale + first, *bias = p.bias ? p.bias + first : nullptr;
      for (int64_t tile = begin; tile < end; tile += kSumRows) {
        for (int64_t c = 0; c < count; ++c) product[c] = total[c] = 0.0f;
        for (int64_t row = tile; row < end && row < tile + kSumRows; ++row) {
          const int64_t at = row * p.channels + first;
          if (p.sums)
            for (int64_t c = 0; c < count; ++c) {
              const float g = to_float(grad[at + c]);
              product[c] += g * (to_float(x[at + c]) - (bias ? bias[c] : 0.0f));
              total[c] += g;
            }
          if (dx)
            for (int64_t c = 0; c < count; ++c) from_float(to_float(grad[at + c]) * scale[c], dx[at + c]);
        }
        for (int64_t c = 0; p.sums && c < count; ++c) {
          products[first + c] += product[c];
          totals[first + c] += total[c];
        }
      }
    }
    return;
  }
  for (int64_t row = begin; row < end; ++row)
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t at = (row * p.channels + c) * p.inner;
      if (p.sums) {
        const float bias = p.bias ? p.bias[c] : 0.0f;
        // Eight sums beside each other, and the rest one by one.
        float product[kLanes] = {}, total[kLanes] = {};
        for (int64_t i = 0; i < p.inner; i += kLanes) {
          const int64_t count = p.inner - i < kLanes ? p.inner - i : kLanes;
          for (int64_t lane = 0; lane < count; ++lane) {
            const float g = to_float(grad[at + i + lane]);
            product[lane] += g * (to_float(x[at + i + lane]) - bias);
            total[lane] += g;
          }
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          products[c] += product[lane];
          totals[c] += total[lane];
        }
      }
      if (dx)
        for (int64_t i = 0; i < p.inner; ++i) from_float(to_float(grad[at + i]) * p.scale[c], dx[at + i]);
    }
}

PEFTK_INLINE void scale_channels_cpu_body(const ScaleChannelsParams& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float32 ? scale_rows<float>(p, begin, end) : scale_rows<BFloat16>(p, begin, end);
}

PEFTK_INLINE void scale_channels_backward_cpu_body(const ScaleChannelsBackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk)
    p.dtype == Dtype::float32 ? scale_rows_backward<float>(p, chunk) : scale_rows_backward<BFloat16>(p, chunk);
}

}  // namespace

PEFTK_KERNEL(butterfly_compose_cpu, (const ButterflyComposeParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(butterfly_compose_backward_cpu, (const ButterflyComposeBackwardParams& p, int64_t begin, int64_t end),
             (p, begin, end))
PEFTK_KERNEL(scale_channels_cpu, (const ScaleChannelsParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(scale_channels_backward_cpu, (const ScaleChannelsBackwardParams& p, int64_t begin, int64_t end),
             (p, begin, end))

}  // namespace peftk
