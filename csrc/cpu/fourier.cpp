#include "../fourier.h"

#include <memory>

#include "simd.h"

namespace peftk {
namespace {

static_assert(kFourierGroup == kLanes);

// Blocks lie transposed in a buffer: number n of all blocks of a group in one vector. A whole group is apart, because
// its loops have no remainder.
PEFTK_INLINE void load_group(const float* from, int64_t size, int64_t blocks, float* to) {
  if (blocks == kLanes) {
    for (int64_t n = 0; n < size; ++n)
      for (int64_t j = 0; j < kLanes; ++j) to[n * kLanes + j] = from[j * size + n];
    return;
  }
  for (int64_t n = 0; n < size; ++n)
    for (int64_t j = 0; j < kLanes; ++j) to[n * kLanes + j] = j < blocks ? from[j * size + n] : 0.0f;
}

template <bool kAdd>
PEFTK_INLINE void store_group(const float* from, int64_t size, int64_t blocks, float* to) {
  for (int64_t j = 0; j < blocks; ++j)
    for (int64_t n = 0; n < size; ++n) {
      const float value = from[n * kLanes + j];
      to[j * size + n] = kAdd ? to[j * size + n] + value : value;
    }
}

// The transform of `count` complex numbers, (re, im) after one another, by halves that sort themselves (Stockham).
// Turns forward or, where `back`, backward, and is not scaled. Returns which of the two buffers holds the result.
template <bool kBack>
PEFTK_INLINE Floats* complex_transform(Floats* a, Floats* b, int64_t count, const float* waves) {
  for (int64_t step = 1; step < count; step *= 2) {
    const int64_t half = count / (2 * step);
    for (int64_t p = 0; p < half; ++p) {
      // The waves are those of blocks of 2 * count real numbers.
      const float* wave = waves + 2 * (2 * p * step);
      const float cosine = wave[0], sine = kBack ? wave[1] : -wave[1];
      const Floats* low = a + 2 * step * p;
      const Floats* high = a + 2 * step * (p + half);
      Floats* sum = b + 2 * step * (2 * p);
      Floats* difference = b + 2 * step * (2 * p + 1);
      for (int64_t q = 0; q < 2 * step; q += 2) {
        const Floats re = low[q] - high[q], im = low[q + 1] - high[q + 1];
        sum[q] = low[q] + high[q];
        sum[q + 1] = low[q + 1] + high[q + 1];
        difference[q] = cosine * re - sine * im;
        difference[q + 1] = cosine * im + sine * re;
      }
    }
    Floats* other = a;
    a = b;
    b = other;
  }
  return a;
}

// Even and odd numbers are the real and imaginary parts of half as many complex ones, whose transform is taken apart.
PEFTK_INLINE const Floats* forward_group(const FourierParams& p, Floats* a, Floats* b) {
  const int64_t half = p.size / 2;
  const Floats* z = complex_transform<false>(a, b, half, p.waves);
  Floats* out = z == a ? b : a;
  out[0] = p.first * (z[0] + z[1]);
  out[half] = p.first * (z[0] - z[1]);
  for (int64_t k = 1; 2 * k <= half; ++k) {
    const int64_t mirror = half - k;
    const float cosine = p.waves[2 * k], sine = p.waves[2 * k + 1];
    const Floats even_re = z[2 * k] + z[2 * mirror], even_im = z[2 * k + 1] - z[2 * mirror + 1];
    const Floats odd_re = z[2 * k + 1] + z[2 * mirror + 1], odd_im = z[2 * mirror] - z[2 * k];
    // The odd ones are half a step ahead.
    const Floats turned_re = cosine * odd_re + sine * odd_im, turned_im = cosine * odd_im - sine * odd_re;
    const float scale = 0.5f * p.rest;
    // A sine wave's part is minus the imaginary part.
    out[k] = scale * (even_re + turned_re);
    out[half + k] = -scale * (even_im + turned_im);
    out[mirror] = scale * (even_re - turned_re);
    out[half + mirror] = scale * (even_im - turned_im);
  }
  return out;
}

PEFTK_INLINE const Floats* backward_group(const FourierParams& p, Floats* a, Floats* b) {
  const int64_t half = p.size / 2;
  b[0] = p.first * (a[0] + a[half]);
  b[1] = p.first * (a[0] - a[half]);
  for (int64_t k = 1; 2 * k <= half; ++k) {
    const int64_t mirror = half - k;
    const float cosine = p.waves[2 * k], sine = p.waves[2 * k + 1], scale = 0.5f * p.rest;
    const Floats sum_re = scale * (a[k] + a[mirror]), sum_im = scale * (a[half + mirror] - a[half + k]);
    const Floats re = scale * (a[k] - a[mirror]), im = -scale * (a[half + k] + a[half + mirror]);
    const Floats turned_re = cosine * re - sine * im, turned_im = cosine * im + sine * re;
    b[2 * k] = sum_re - turned_im;
    b[2 * k + 1] = sum_im + turned_re;
    b[2 * mirror] = sum_re + turned_im;
    b[2 * mirror + 1] = turned_re - sum_im;
  }
  return complex_transform<true>(b, a, half, p.waves);
}

// Two buffers for one group. They start apart by an odd number of cache lines, so that the same place in both does not
// fall into the same set.
struct Buffers {
  explicit Buffers(int64_t size) : memory(new float[(2 * size + kGap) * kLanes]), apart((size + kGap) * kLanes) {}
  Floats* first() const { return reinterpret_cast<Floats*>(memory.get()); }
  Floats* second() const { return reinterpret_cast<Floats*>(memory.get() + apart); }

  static constexpr int64_t kGap = 18;
  std::unique_ptr<float[]> memory;
  int64_t apart;
};

PEFTK_INLINE int64_t blocks_of(const FourierParams& p, int64_t group) {
  const int64_t left = p.count - group * kLanes;
  return left < kLanes ? left : kLanes;
}

PEFTK_INLINE void fourier_cpu_body(const FourierParams& p, int64_t begin, int64_t end) {
  const Buffers buffers(p.size);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t at = group * kLanes * p.size, blocks = blocks_of(p, group);
    load_group(p.from + at, p.size, blocks, buffers.memory.get());
    const Floats* found = forward_group(p, buffers.first(), buffers.second());
    store_group<false>(reinterpret_cast<const float*>(found), p.size, blocks, p.to + at);
  }
}

PEFTK_INLINE void fourier_inverse_cpu_body(const FourierParams& p, int64_t begin, int64_t end) {
  const Buffers buffers(p.size);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t at = group * kLanes * p.size, blocks = blocks_of(p, group);
    load_group(p.from + at, p.size, blocks, buffers.memory.get());
    const float* found = reinterpret_cast<const float*>(backward_group(p, buffers.first(), buffers.second()));
    if (p.add)
      store_group<true>(found, p.size, blocks, p.to + at);
    else
      store_group<false>(found, p.size, blocks, p.to + at);
  }
}

}  // namespace

PEFTK_KERNEL(fourier_cpu, (const FourierParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(fourier_inverse_cpu, (const FourierParams& p, int64_t begin, int64_t end), (p, begin, end))

}  // namespace peftk
