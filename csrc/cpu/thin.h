// Products of activations with factors of few columns, for the kernels of the low-rank families.
#pragma once
#include <cstdint>

#include "../low_rank.h"
#include "simd.h"

namespace peftk {

// Rows of x that are copied together: with all columns of a tile, half of the first-level cache at most.
constexpr int64_t kTileRows = 48;

// Rows that are summed before they are added to others.
constexpr int64_t kPartRows = 10 * kTileRows;

// Rows that are taken together: everything that needs them is done while they are in the second-level cache. A multiple
// of the six rows that a product takes at once, and enough of them to write sums seldom.
PEFTK_INLINE int64_t chunk_rows(int64_t width) {
  constexpr int64_t kNumbers = 48 * 1024, kLeast = 24, kMost = 48;
  const int64_t rows = kNumbers / (width + 1) / 6 * 6;
  return rows < kLeast ? kLeast : rows > kMost ? kMost : rows;
}

// Rows that a thin product takes at once at most: sums of eight columns in six rows would not keep the units busy.
constexpr int64_t kStripRows = 12;

// to (rows, rank) = scale * x (rows, depth) @ m (depth, padded(rank)).
template <CpuLevel kLevel = CpuLevel::base>
PEFTK_INLINE void shrink(const float* x, int64_t rows, int64_t depth, const float* m, int64_t rank, float scale,
                         float* strip, float* to) {
  const int64_t ld = padded(rank);
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, some = ld == kLanes && left >= kStripRows ? kStripRows : left < 6 ? left : 6;
    const View from{x + row * depth, depth, 1};
    if (some == kStripRows)
      product_strip<kStripRows, 1, kLanes>(from, m, ld, strip, ld, depth, false);
    else
      product<kLevel>(from, m, ld, strip, ld, some, ld, depth, false);
    for (int64_t i = 0; i < some; ++i)
      for (int64_t j = 0; j < rank; ++j) to[(row + i) * rank + j] = strip[i * ld + j] * scale;
    row += some;
  }
}

// out (rows, columns) += h (rows, rank) @ m, in strips.
template <CpuLevel kLevel = CpuLevel::base>
PEFTK_INLINE void expand(const float* h, int64_t rows, int64_t rank, const float* m, int64_t columns, float* out) {
  float tile[6 * kStripColumns];
  for (int64_t row = 0; row < rows; row += 6) {
    const int64_t some = rows - row < 6 ? rows - row : 6;
    const View from{h + row * rank, rank, 1};
    const float* strip = m;
    for (int64_t first = 0; first < columns; first += kStripColumns, strip += rank * kStripColumns) {
      float* to = out + row * columns + first;
      const int64_t left = columns - first;
      if (left < kStripColumns) {
        load_tile(to, columns, some, left, tile, kStripColumns);
        product<kLevel>(from, strip, kStripColumns, tile, kStripColumns, some, padded(left), rank, true);
        store_tile(tile, kStripColumns, some, left, to, columns);
      } else if constexpr (kLevel == CpuLevel::avx512) {
        // All of a strip at once: there are registers for it.
        product_columns<kStripColumns / kWidest<kLevel>, kWidest<kLevel>>(from, strip, kStripColumns, to, columns, some,
                                                                          rank, true);
      } else {
        product<kLevel>(from, strip, kStripColumns, to, columns, some, kStripColumns, rank, true);
      }
    }
  }
}

PEFTK_INLINE void gated(const float* h, const float* gate, int64_t gate_row, int64_t rows, int64_t rank, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rank; ++j) to[i * rank + j] = h[i * rank + j] * gate[i * gate_row + j];
}

}  // namespace peftk
