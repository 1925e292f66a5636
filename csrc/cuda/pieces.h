// Sixteen bytes of activations: what one thread reads and writes at once.
#pragma once
#include <cstdint>
#include <cstring>

#include "launch.h"

namespace peftk {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

__device__ __forceinline__ void from_float(float value, float& out) { out = value; }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void from_float(float value, __half& out) { out = __float2half_rn(value); }

template <typename T>
struct alignas(16) Piece {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <typename T>
__device__ __forceinline__ Piece<T> zero_piece() {
  Piece<T> piece;
#pragma unroll
  for (int i = 0; i < Piece<T>::kSize; ++i) from_float(0.0f, piece.values[i]);
  return piece;
}

template <typename T>
__device__ __forceinline__ void widen(const Piece<T>& piece, float* to) {
#pragma unroll
  for (int i = 0; i < Piece<T>::kSize; ++i) to[i] = to_float(piece.values[i]);
}

// The piece of the lane whose number differs in the bits of `flip`. Every lane of the warp must take part.
template <typename T>
__device__ __forceinline__ Piece<T> exchange(const Piece<T>& piece, int flip) {
  uint32_t words[4];
  std::memcpy(words, &piece, sizeof words);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = __shfl_xor_sync(0xffffffffu, words[i], flip);
  Piece<T> other;
  std::memcpy(static_cast<void*>(&other), words, sizeof words);
  return other;
}

}  // namespace peftk
