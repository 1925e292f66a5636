#include "../dora.h"

#include <cmath>
#include <memory>

#include "simd.h"

namespace peftk {
namespace {

// A tile of rows and columns, which fits the first-level cache beside the columns of a factor of rank 16.
constexpr int64_t kDoraTileRows = 12;
constexpr int64_t kDoraTileColumns = 256;

constexpr int64_t dora_least(int64_t left, int64_t right) { return left < right ? left : right; }

// weight + left @ right for a tile; columns up to the stride `ld` are zero.
template <typename T>
PEFTK_INLINE void adapted_tile(const DoraNormParams& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
                               float* tile, int64_t ld) {
  load_tile(static_cast<const T*>(p.weight) + row * p.cols + column, p.cols, rows, columns, tile, ld);
  product({p.left + row * p.left_row, p.left_row, p.left_col}, p.right + column, padded(p.cols), tile, ld, rows, ld,
          p.rank, true);
}

template <typename T>
PEFTK_INLINE void row_norms(const DoraNormParams& p, int64_t begin, int64_t end) {
  const std::unique_ptr<float[]> tile(new float[kDoraTileRows * kDoraTileColumns]);
  for (int64_t row = begin; row < end; row += kDoraTileRows) {
    const int64_t rows = dora_least(end - row, kDoraTileRows);
    // Long sums of squares: a tile's are added in float, the tiles in double.
    double total[kDoraTileRows] = {};
    for (int64_t column = 0; column < p.cols; column += kDoraTileColumns) {
      const int64_t columns = dora_least(p.cols - column, kDoraTileColumns), ld = padded(columns);
      adapted_tile<T>(p, row, rows, column, columns, tile.get(), ld);
      for (int64_t i = 0; i < rows; ++i) {
        Floats sums = {};
        for (int64_t j = 0; j < ld; j += kLanes) {
          const Floats values = *reinterpret_cast<const Floats*>(tile.get() + i * ld + j);
          sums += values * values;
        }
        for (int lane = 0; lane < kLanes; ++lane) total[i] += sums[lane];
      }
    }
    for (int64_t i = 0; i < rows; ++i) p.out[row + i] = static_cast<float>(std::sqrt(total[i]));
  }
}

template <typename T>
PEFTK_INLINE void column_norms(const DoraNormParams& p, int64_t begin, int64_t end) {
  const std::unique_ptr<float[]> tile(new float[kDoraTileRows * kDoraColumns]);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kDoraColumns, columns = dora_least(p.cols - first, kDoraColumns);
    const int64_t ld = padded(columns);
    double total[kDoraColumns] = {};
    for (int64_t row = 0; row < p.rows; row += kDoraTileRows) {
      const int64_t rows = dora_least(p.rows - row, kDoraTileRows);
      adapted_tile<T>(p, row, rows, first, columns, tile.get(), ld);
      float sums[kDoraColumns] = {};
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < ld; ++j) sums[j] += tile[i * ld + j] * tile[i * ld + j];
      for (int64_t j = 0; j < ld; ++j) total[j] += sums[j];
    }
    for (int64_t j = 0; j < columns; ++j) p.out[first + j] = static_cast<float>(std::sqrt(total[j]));
  }
}

template <typename T>
PEFTK_INLINE void compose(const DoraComposeParams& p, int64_t begin, int64_t end) {
  const T *base = static_cast<const T*>(p.base), *hidden = static_cast<const T*>(p.hidden);
  T* out = static_cast<T*>(p.out);
  const std::unique_ptr<float[]> tile(new float[kDoraTileRows * kDoraTileColumns]);
  const std::unique_ptr<float[]> left(new float[kDoraTileRows * p.rank]);
  for (int64_t row = begin; row < end; row += kDoraTileRows) {
    const int64_t rows = dora_least(end - row, kDoraTileRows);
    load_tile(hidden + row * p.rank, p.rank, rows, p.rank, left.get(), p.rank);
    for (int64_t column = 0; column < p.cols; column += kDoraTileColumns) {
      const int64_t columns = dora_least(p.cols - column, kDoraTileColumns), ld = padded(columns);
      const float *gain = p.gain + column, *shift = p.shift ? p.shift + column : nullptr;
      for (int64_t i = 0; i < rows; ++i) {
        const T* from = base + (row + i) * p.cols + column;
        float* to = tile.get() + i * ld;
        if (shift)
          for (int64_t j = 0; j < columns; ++j) to[j] = to_float(from[j]) * gain[j] + shift[j];
        else
          for (int64_t j = 0; j < columns; ++j) to[j] = to_float(from[j]) * gain[j];
        for (int64_t j = columns; j < ld; ++j) to[j] = 0.0f;
      }
      product({left.get(), p.rank, 1}, p.factor + column, padded(p.cols), tile.get(), ld, rows, ld, p.rank, true);
      store_tile(tile.get(), ld, rows, columns, out + row * p.cols + column, p.cols);
    }
  }
}

PEFTK_INLINE void dora_row_norms_cpu_body(const DoraNormParams& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float32 ? row_norms<float>(p, begin, end) : row_norms<BFloat16>(p, begin, end);
}

PEFTK_INLINE void dora_column_norms_cpu_body(const DoraNormParams& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float32 ? column_norms<float>(p, begin, end) : column_norms<BFloat16>(p, begin, end);
}

PEFTK_INLINE void dora_compose_cpu_body(const DoraComposeParams& p, int64_t begin, int64_t end) {
  p.dtype == Dtype::float32 ? compose<float>(p, begin, end) : compose<BFloat16>(p, begin, end);
}

}  // namespace

PEFTK_KERNEL(dora_row_norms_cpu, (const DoraNormParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(dora_column_norms_cpu, (const DoraNormParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(dora_compose_cpu, (const DoraComposeParams& p, int64_t begin, int64_t end), (p, begin, end))

}  // namespace peftk
