// The Cayley transform of skew-symmetric blocks, exact or as a polynomial, and its gradient.
#pragma once
#include <cstdint>

namespace peftk {

// The exact transform inverts I + S in registers and first-level cache; larger blocks belong to LAPACK.
constexpr int64_t kExactCayleySize = 64;

struct CayleyParams {
  const float* source;       // (count, size * (size - 1) / 2): rows of the upper triangle, one after another;
                             // or, if `square`, (count, size, size), of which the skew-symmetric part counts
  const double* polynomial;  // coefficients, the constant first; the exact transform if `terms` is 0
  int64_t terms, size;
  float* blocks;  // (count, size, size)
  bool square;
};

struct CayleyBackwardParams {
  const float* grad;    // (count, size, size)
  const float* source;  // as above
  const float* blocks;  // the transform's result; read by the exact gradient only
  const double* polynomial;
  int64_t terms, size;
  float* dsource;  // as source
  bool square;
};

void cayley_cpu(const CayleyParams& p, int64_t begin, int64_t end);
void cayley_backward_cpu(const CayleyBackwardParams& p, int64_t begin, int64_t end);

// The exact transform only. The stream is a cudaStream_t. A launch that fails throws a std::runtime_error that names
// the kernel.
void cayley_cuda(const CayleyParams& p, int64_t count, void* stream);
void cayley_backward_cuda(const CayleyBackwardParams& p, int64_t count, void* stream);

}  // namespace peftk
