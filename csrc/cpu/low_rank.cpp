#include "../low_rank.h"

#include <memory>

#include "simd.h"

namespace peftk {
namespace {

// Columns of x that are copied together: with all rows of a chunk, half of the first-level cache at most.
constexpr int64_t kTileColumns = 64;

// Rows that are taken together: everything that needs them is done while they are in the second-level cache. A multiple
// of the six rows that a product takes at once, and enough of them to write sums seldom.
PEFTK_INLINE int64_t chunk_rows(int64_t width) {
  constexpr int64_t kNumbers = 48 * 1024, kLeast = 24, kMost = 48;
  const int64_t rows = kNumbers / (width + 1) / 6 * 6;
  return rows < kLeast ? kLeast : rows > kMost ? kMost : rows;
}

// to (rows, rank) = scale * x (rows, depth) @ m (depth, padded(rank)).
PEFTK_INLINE void shrink(const float* x, int64_t rows, int64_t depth, const float* m, int64_t rank, float scale,
                         float* strip, float* to) {
  const int64_t ld = padded(rank);
  for (int64_t row = 0; row < rows; row += 6) {
    const int64_t some = rows - row < 6 ? rows - row : 6;
    product({x + row * depth, depth, 1}, m, ld, strip, ld, some, ld, depth, false);
    for (int64_t i = 0; i < some; ++i)
      for (int64_t j = 0; j < rank; ++j) to[(row + i) * rank + j] = strip[i * ld + j] * scale;
  }
}

// out (rows, columns) += h (rows, rank) @ m, in strips.
PEFTK_INLINE void expand(const float* h, int64_t rows, int64_t rank, const float* m, int64_t columns, float* out) {
  float tile[6 * kStripColumns];
  for (int64_t row = 0; row < rows; row += 6) {
    const int64_t some = rows - row < 6 ? rows - row : 6;
    const View from{h + row * rank, rank, 1};
    const float* strip = m;
    for (int64_t first = 0; first < columns; first += kStripColumns, strip += rank * kStripColumns) {
      float* to = out + row * columns + first;
      const int64_t left = columns - first;
      if (left >= kStripColumns) {
        product_columns<2>(from, strip, kStripColumns, to, columns, some, rank, true);
      } else {
        load_tile(to, columns, some, left, tile, kStripColumns);
        product_columns<2>(from, strip, kStripColumns, tile, kStripColumns, some, rank, true);
        store_tile(tile, kStripColumns, some, left, to, columns);
      }
    }
  }
}

// sum (rank, padded(columns)) = h (rows, rank).T @ x (rows, columns), or += where `add`. Columns are copied together,
// so that rows a power of two apart do not evict each other.
PEFTK_INLINE void outer(const float* h, const float* x, int64_t rows, int64_t rank, int64_t columns, bool add,
                        float* tile, float* sum) {
  const int64_t ld = padded(columns);
  for (int64_t first = 0; first < columns; first += kTileColumns) {
    const int64_t left = columns - first < kTileColumns ? columns - first : kTileColumns;
    load_tile(x + first, columns, rows, left, tile, kTileColumns);
    product({h, 1, rank}, tile, kTileColumns, sum + first, ld, rank, padded(left), rows, add);
  }
}

PEFTK_INLINE void gated(const float* h, const float* gate, int64_t gate_row, int64_t rows, int64_t rank, float scale,
                        float* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      const float value = gate ? h[i * rank + j] * gate[i * gate_row + j] : h[i * rank + j];
      to[i * rank + j] = value * scale;
    }
}

PEFTK_INLINE void low_rank_cpu_body(const LowRankParams& p, int64_t begin, int64_t end) {
  const int64_t most = chunk_rows(p.depth > p.columns ? p.depth : p.columns);
  const std::unique_ptr<float[]> strip(new float[6 * padded(p.rank)]), scratch(new float[most * p.rank]);
  for (int64_t row = begin; row < end; row += most) {
    const int64_t rows = end - row < most ? end - row : most;
    float* hidden = p.hidden + row * p.rank;
    shrink(p.x + row * p.depth, rows, p.depth, p.a, p.rank, 1.0f, strip.get(), hidden);
    if (p.out == nullptr) continue;
    if (p.gate) gated(hidden, p.gate + row * p.gate_row, p.gate_row, rows, p.rank, 1.0f, scratch.get());
    expand(p.gate ? scratch.get() : hidden, rows, p.rank, p.b, p.columns, p.out + row * p.columns);
  }
}

PEFTK_INLINE void low_rank_backward_cpu_body(const LowRankBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t most = chunk_rows(p.depth > p.columns ? p.depth : p.columns), rank = p.rank;
  const std::unique_ptr<float[]> strip(new float[6 * padded(rank)]), scratch(new float[most * rank]),
      dhidden(new float[most * rank]), tile(new float[most * kTileColumns]);
  // The longest sums, of the fewest numbers: in doubles they cost nothing.
  const std::unique_ptr<double[]> dgate(new double[rank]);
  for (int64_t split = begin; split < end; ++split) {
    const int64_t first = split * p.split_rows;
    const int64_t last = first + p.split_rows < p.rows ? first + p.split_rows : p.rows;
    for (int64_t j = 0; j < rank; ++j) dgate[j] = 0.0;
    for (int64_t row = first; row < last; row += most) {
      const int64_t rows = last - row < most ? last - row : most;
      const float *grad = p.grad + row * p.columns, *hidden = p.hidden + row * rank;
      const float* gate = p.gate ? p.gate + row * p.gate_row : nullptr;
      if (p.dx || p.da || p.dgate) {
        shrink(grad, rows, p.columns, p.b, rank, p.scale, strip.get(), dhidden.get());
        for (int64_t i = 0; p.dgate && i < rows; ++i)
          for (int64_t j = 0; j < rank; ++j) {
            const float value = dhidden[i * rank + j] * hidden[i * rank + j];
            dgate[j] += value;
            if (p.gate_row) p.dgate[(row + i) * rank + j] = value;
          }
      }
      if (p.db) {
        gated(hidden, gate, p.gate_row, rows, rank, p.scale, scratch.get());
        outer(scratch.get(), grad, rows, rank, p.columns, row > first, tile.get(),
              p.db + split * rank * padded(p.columns));
      }
      if (gate) gated(dhidden.get(), gate, p.gate_row, rows, rank, 1.0f, dhidden.get());
      if (p.da)
        outer(dhidden.get(), p.x + row * p.depth, rows, rank, p.depth, row > first, tile.get(),
              p.da + split * rank * padded(p.depth));
      if (p.dx) expand(dhidden.get(), rows, rank, p.a, p.depth, p.dx + row * p.depth);
    }
    for (int64_t j = 0; p.dgate && !p.gate_row && j < rank; ++j)
      p.dgate[split * rank + j] = static_cast<float>(dgate[j]);
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

PEFTK_KERNEL(low_rank_cpu, (const LowRankParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(low_rank_backward_cpu, (const LowRankBackwardParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(dropout_cpu, (const DropoutParams& p, int64_t begin, int64_t end), (p, begin, end))

void pack_strips_cpu(const float* from, int64_t row, int64_t col, int64_t rank, int64_t columns, float scale,
                     float* to) {
  for (int64_t first = 0; first < columns; first += kStripColumns, to += rank * kStripColumns) {
    const int64_t count = columns - first < kStripColumns ? columns - first : kStripColumns;
    for (int64_t i = 0; i < rank; ++i)
      for (int64_t j = 0; j < kStripColumns; ++j)
        to[i * kStripColumns + j] = j < count ? from[i * row + (first + j) * col] * scale : 0.0f;
  }
}

void add_parts_cpu(const float* parts, int64_t count, int64_t rank, int64_t ld, int64_t row, int64_t col, int64_t begin,
                   int64_t end, float* to) {
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t j = begin; j < end; ++j) {
      float sum = 0.0f;
      for (int64_t part = 0; part < count; ++part) sum += parts[(part * rank + i) * ld + j];
      to[i * row + j * col] = sum;
    }
}

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
