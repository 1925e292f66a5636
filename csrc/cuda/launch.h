// The words that a .cu file of peftk is written in. nvcc turns them into CUDA; every other compiler takes them from
// tests/backends/cuda/cuda_on_cpu.h and runs the same file on the CPU.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// PEFTK_SHARED(float, tile, [32][33]);
#define PEFTK_SHARED(type, name, dims) __shared__ __align__(16) type name dims
#define PEFTK_DYNAMIC_SHARED(type, name)                      \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* const name = reinterpret_cast<type*>(name##_raw)
#define PEFTK_START(kernel, grid, block, bytes, stream, ...) kernel<<<(grid), (block), (bytes), (stream)>>>(__VA_ARGS__)

#else

#include "cuda_on_cpu.h"

#define PEFTK_SHARED(type, name, dims) CUDA_ON_CPU_SHARED(type, name, dims)
#define PEFTK_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_cpu::dynamic_shared())
#define PEFTK_START(kernel, grid, block, bytes, stream, ...) \
  cuda_on_cpu::launch((grid), (block), (bytes), (stream), [&] { (kernel)(__VA_ARGS__); })

#endif

// PEFTK_LAUNCH((kernel<8>), grid, block, bytes, stream, arguments...): a template goes in parentheses.
#define PEFTK_LAUNCH(kernel, grid, block, bytes, stream, ...)     \
  do {                                                            \
    PEFTK_START(kernel, grid, block, bytes, stream, __VA_ARGS__); \
    ::peftk::check_launch(#kernel);                               \
  } while (0)

namespace peftk {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("the CUDA kernel ") + kernel +
                             " was not launched: " + cudaGetErrorString(error));
}

}  // namespace peftk
