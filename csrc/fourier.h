// The real Fourier transform of blocks whose size is a power of two, into planes and back (circulant.h).
//
// A block of b numbers has b / 2 lanes. Lane k of the spectrum is `rest` times
//   re = sum_n x[n] cos(2 pi k n / b), im = sum_n x[n] sin(2 pi k n / b);
// lane 0 is `first` times the sum and the alternating sum. The way back is the transpose of that.
#pragma once
#include <cstdint>

namespace peftk {

struct FourierParams {
  const float* from;   // (count, size), or (count, 2, size / 2) on the way back
  float* to;           // the other one
  const float* waves;  // (size / 2, 2): cosine and sine of 2 pi k / size
  int64_t count, size;
  float first, rest;
  bool add;  // onto what is there; on the way back only
};

// Blocks that are transformed side by side, one in each lane of a vector; a task is a whole number of such groups.
constexpr int64_t kFourierGroup = 8;
// From here on a block fills whole vectors of lanes; below, a product with a matrix is as good.
constexpr int64_t kFourierLeast = 16;

// The ranges are of groups.
void fourier_cpu(const FourierParams& p, int64_t begin, int64_t end);
void fourier_inverse_cpu(const FourierParams& p, int64_t begin, int64_t end);

}  // namespace peftk
