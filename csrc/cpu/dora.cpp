#include "../dora.h"

#include <cmath>
#include <memory>

#include "../low_rank.h"
#include "simd.h"

namespace peftk {
namespace {

// Rows of a tile: twice as many as a product takes at once, so that a strip of factors is read half as often.
constexpr int64_t kDoraTileRows = 12;
constexpr int64_t kDoraTile = kDoraTileRows * kDoraStrip;
// Columns whose squares are added in float, before their sum joins the others in double.
constexpr int64_t kDoraSumColumns = 256;

constexpr int64_t dora_least(int64_t left, int64_t right) { return left < right ? left : right; }

// A tile of at most kDoraStrip columns, zero behind the last one. All columns are the usual case, which the compiler
// unrolls.
template <typename T>
PEFTK_INLINE void load_strip(const T* from, int64_t stride, int64_t rows, int64_t columns, float* tile) {
  if (columns < kDoraStrip) return load_tile(from, stride, rows, columns, tile, kDoraStrip);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kDoraStrip; ++j) tile[i * kDoraStrip + j] = to_float(from[i * stride + j]);
}

template <typename T>
PEFTK_INLINE void store_strip(const float* tile, int64_t rows, int64_t columns, T* to, int64_t stride) {
  if (columns < kDoraStrip) return store_tile(tile, kDoraStrip, rows, columns, to, stride);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kDoraStrip; ++j) from_float(tile[i * kDoraStrip + j], to[i * stride + j]);
}

// A tile of weight + left @ right, zero behind the last column.
template <typename T>
PEFTK_INLINE void adapted_tile(const DoraNormParams& p, View left, int64_t row, int64_t rows, int64_t column,
                               float* tile) {
  load_strip(static_cast<const T*>(p.weight) + row * p.cols + column, p.cols, rows,
             dora_least(p.cols - column, kDoraStrip), tile);
  product_columns<2>(left, p.right + column * p.rank, kDoraStrip, tile, kDoraStrip, rows, p.rank, true);
}

template <typename T>
PEFTK_INLINE void row_norms(const DoraNormParams& p, int64_t begin, int64_t end) {
  float tile[kDoraTile];
  for (int64_t row = begin; row < end; row += kDoraTileRows) {
    const int64_t rows = dora_least(end - row, kDoraTileRows);
    const View left{p.left + row * p.left_row, p.left_row, p.left_col};
    double total[kDoraTileRows] = {};
    for (int64_t column = 0; column < p.cols; column += kDoraSumColumns) {
      float sums[kDoraTile] = {};
      const int64_t last = dora_least(p.cols, column + kDoraSumColumns);
      for (int64_t first = column; first < last; first += kDoraStrip) {
        adapted_tile<T>(p, left, row, rows, first, tile);
        for (int64_t i = 0; i < rows * kDoraStrip; ++i) sums[i] += tile[i] * tile[i];
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < kDoraStrip; ++j) total[i] += sums[i * kDoraStrip + j];
    }
    for (int64_t i = 0; i < rows; ++i) p.out[row + i] = static_cast<float>(std::sqrt(total[i]));
  }
}

template <typename T>
PEFTK_INLINE void column_norms(const DoraNormParams& p, int64_t begin, int64_t end) {
  float tile[kDoraTile];
  const std::unique_ptr<float[]> left(new float[kDoraTileRows * p.rank]);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t start = group * kDoraColumns, stop = dora_least(p.cols, start + kDoraColumns);
    double total[kDoraColumns] = {};
    for (int64_t row = 0; row < p.rows; row += kDoraTileRows) {
      const int64_t rows = dora_least(p.rows - row, kDoraTileRows);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < p.rank; ++k) left[i * p.rank + k] = p.left[(row + i) * p.left_row + k * p.left_col];
      for (int64_t first = start; first < stop; first += kDoraStrip) {
        adapted_tile<T>(p, {left.get(), p.rank, 1}, row, rows, first, tile);
        float sums[kDoraStrip] = {};
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < kDoraStrip; ++j) sums[j] += tile[i * kDoraStrip + j] * tile[i * kDoraStrip + j];
        for (int64_t j = 0; j < kDoraStrip; ++j) total[first - start + j] += sums[j];
      }
    }
    for (int64_t j = start; j < stop; ++j) p.out[j] = static_cast<float>(std::sqrt(total[j - start]));
  }
}

template <typename T>
PEFTK_INLINE void compose(const DoraComposeParams& p, int64_t begin, int64_t end) {
  const T *base = static_cast<const T*>(p.base), *hidden = static_cast<const T*>(p.hidden);
  T* out = static_cast<T*>(p.out);
  float tile[kDoraTile];
  const std::unique_ptr<float[]> left(new float[kDoraTileRows * p.rank]);
  for (int64_t row = begin; row < end; row += kDoraTileRows) {
    const int64_t rows = dora_least(end - row, kDoraTileRows);
    load_tile(hidden + row * p.rank, p.rank, rows, p.rank, left.get(), p.rank);
    for (int64_t column = 0; column < p.cols; column += kDoraStrip) {
      const int64_t columns = dora_least(p.cols - column, kDoraStrip);
      // A negative zero added changes no bit.
      float gain[kDoraStrip], shift[kDoraStrip];
      for (int64_t j = 0; j < kDoraStrip; ++j) {
        gain[j] = j < columns ? p.gain[column + j] : 0.0f;
        shift[j] = j < columns && p.shift ? p.shift[column + j] : -0.0f;
      }
      load_strip(base + row * p.cols + column, p.cols, rows, columns, tile);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < kDoraStrip; ++j)
          tile[i * kDoraStrip + j] = tile[i * kDoraStrip + j] * gain[j] + shift[j];
      product_columns<2>({left.get(), p.rank, 1}, p.factor + column * p.rank, kDoraStrip, tile, kDoraStrip, rows,
                         p.rank, true);
      store_strip(tile, rows, columns, out + row * p.cols + column, p.cols);
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
