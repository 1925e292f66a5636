#include "../low_rank.h"

#include "simd.h"

namespace peftk {
namespace {

// Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
PEFTK_INLINE void philox(uint64_t seed, uint64_t index, uint32_t (&c)[4]) {
  c[0] = static_cast<uint32_t>(index);
  c[1] = static_cast<uint32_t>(index >> 32);
  c[2] = c[3] = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = 0xD2511F53ull * c[0], right = 0xCD9E8D57ull * c[2];
    c[0] = static_cast<uint32_t>(right >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(right);
    c[2] = static_cast<uint32_t>(left >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(left);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

template <typename T>
PEFTK_INLINE void drop(const DropoutParams& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  for (int64_t block = begin; block < end; ++block) {
    uint32_t bits[4];
    philox(p.seed, static_cast<uint64_t>(block), bits);
    const int64_t at = block * 4, count = p.count - at < 4 ? p.count - at : 4;
    for (int64_t i = 0; i < count; ++i)
      from_float((bits[i] >> 8) < p.threshold ? 0.0f : to_float(x[at + i]) * p.scale, out[at + i]);
  }
}

PEFTK_INLINE void dropout_cpu_body(const DropoutParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    drop<float>(p, begin, end);
  else
    drop<BFloat16>(p, begin, end);
}

}  // namespace

PEFTK_KERNEL(dropout_cpu, (const DropoutParams& p, int64_t begin, int64_t end), (p, begin, end))

}  // namespace peftk
