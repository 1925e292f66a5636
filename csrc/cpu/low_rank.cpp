#include "../low_rank.h"

#include <memory>

#include "simd.h"

namespace peftk {
namespace {

// Rows that a product takes at once; they lie whole in the first-level cache up to about a thousand features.
constexpr int64_t kShrinkRows = 6;
// Rows that are copied together, so that rows a power of two apart do not evict each other.
constexpr int64_t kOuterRows = 24;

PEFTK_INLINE void shrink_cpu_body(const ShrinkParams& p, int64_t begin, int64_t end) {
  const int64_t ld = padded(p.rank);
  const std::unique_ptr<float[]> strip(new float[kShrinkRows * ld]);
  for (int64_t row = begin; row < end; row += kShrinkRows) {
    const int64_t rows = end - row < kShrinkRows ? end - row : kShrinkRows;
    product({p.x + row * p.depth, p.depth, 1}, p.m, ld, strip.get(), ld, rows, ld, p.depth, false);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < p.rank; ++j) p.out[(row + i) * p.rank + j] = strip[i * ld + j] * p.scale;
  }
}

PEFTK_INLINE void outer_cpu_body(const OuterParams& p, int64_t begin, int64_t end) {
  const int64_t ld = padded(p.rank);
  const std::unique_ptr<float[]> tile(new float[kOuterRows * kOuterColumns]), sum(new float[kOuterColumns * ld]);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kOuterColumns, left = p.features - first;
    const int64_t columns = left < kOuterColumns ? left : kOuterColumns;
    for (int64_t i = 0; i < columns * ld; ++i) sum[i] = 0.0f;
    for (int64_t row = 0; row < p.rows; row += kOuterRows) {
      const int64_t rows = p.rows - row < kOuterRows ? p.rows - row : kOuterRows;
      load_tile(p.x + row * p.features + first, p.features, rows, columns, tile.get(), kOuterColumns);
      product({tile.get(), 1, kOuterColumns}, p.h + row * ld, ld, sum.get(), ld, columns, ld, rows, true);
    }
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t j = 0; j < p.rank; ++j) p.out[(first + i) * p.row + j * p.col] = sum[i * ld + j] * p.scale;
  }
}

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

PEFTK_KERNEL(shrink_cpu, (const ShrinkParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(outer_cpu, (const OuterParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(dropout_cpu, (const DropoutParams& p, int64_t begin, int64_t end), (p, begin, end))

void pad_columns_cpu(const float* from, int64_t row, int64_t col, int64_t rows, int64_t cols, float* to) {
  const int64_t ld = padded(cols);
  // Sixteen rows at a time: where `from` is transposed, they share a line of the cache.
  for (int64_t first = 0; first < rows; first += 16) {
    const int64_t last = first + 16 < rows ? first + 16 : rows;
    for (int64_t j = 0; j < ld; ++j)
      for (int64_t i = first; i < last; ++i) to[i * ld + j] = j < cols ? from[i * row + j * col] : 0.0f;
  }
}

}  // namespace peftk
