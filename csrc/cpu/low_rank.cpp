#include "../low_rank.h"

#include <memory>

#include "simd.h"
#include "thin.h"

namespace peftk {
namespace {

template <CpuLevel kLevel>
PEFTK_INLINE void low_rank_cpu_body(const LowRankParams& p, int64_t begin, int64_t end) {
  const int64_t most = chunk_rows(p.depth > p.columns ? p.depth : p.columns);
  const std::unique_ptr<float[]> strip(new float[kStripRows * padded(p.rank)]), scratch(new float[most * p.rank]);
  for (int64_t row = begin; row < end; row += most) {
    const int64_t rows = end - row < most ? end - row : most;
    float* hidden = p.hidden + row * p.rank;
    shrink<kLevel>(p.x + row * p.depth, rows, p.depth, p.a, p.rank, 1.0f, strip.get(), hidden);
    if (p.out == nullptr) continue;
    if (p.gate) gated(hidden, p.gate + row * p.gate_row, p.gate_row, rows, p.rank, scratch.get());
    expand<kLevel>(p.gate ? scratch.get() : hidden, rows, p.rank, p.b, p.columns, p.out + row * p.columns);
  }
}

template <CpuLevel kLevel>
PEFTK_INLINE void low_rank_backward_cpu_body(const LowRankBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t most = chunk_rows(p.depth > p.columns ? p.depth : p.columns), rank = p.rank;
  const std::unique_ptr<float[]> strip(new float[kStripRows * padded(rank)]), scratch(new float[most * rank]);
  for (int64_t row = begin; row < end; row += most) {
    const int64_t rows = end - row < most ? end - row : most;
    float* dhidden = p.dhidden + row * rank;
    shrink<kLevel>(p.grad + row * p.columns, rows, p.columns, p.b, rank, p.scale, strip.get(), dhidden);
    if (p.gate_row && p.dgate)
      for (int64_t i = 0; i < rows * rank; ++i) p.dgate[row * rank + i] = dhidden[i] * p.hidden[row * rank + i];
    if (p.dx == nullptr) continue;
    if (p.gate) gated(dhidden, p.gate + row * p.gate_row, p.gate_row, rows, rank, scratch.get());
    expand<kLevel>(p.gate ? scratch.get() : dhidden, rows, rank, p.a, p.depth, p.dx + row * p.depth);
  }
}

// sum (tiles, rank, kFactorColumns) = h (rows, rank).T @ x (rows, columns), with h times the gate; `part` is as large.
// A tile of x is copied before it is read, so that rows a power of two apart do not evict each other. The sum of every
// so many rows is a part of its own, so that the error grows with neither number alone.
template <CpuLevel kLevel>
PEFTK_INLINE void outer(const float* h, const LowRankBackwardParams& p, const float* x, int64_t ld, int64_t columns,
                        float* scratch, float* tile, float* part, float* sum) {
  const int64_t rank = p.rank, tiles = low_rank_tiles(columns), numbers = tiles * rank * kFactorColumns;
  for (int64_t i = 0; i < numbers; ++i) sum[i] = 0.0f;
  for (int64_t first = 0; first < p.rows; first += kPartRows) {
    const int64_t last = first + kPartRows < p.rows ? first + kPartRows : p.rows;
    for (int64_t row = first; row < last; row += kTileRows) {
      const int64_t rows = last - row < kTileRows ? last - row : kTileRows;
      const float* from = h + row * rank;
      if (p.gate) {
        gated(from, p.gate + row * p.gate_row, p.gate_row, rows, rank, scratch);
        from = scratch;
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t left = columns - t * kFactorColumns, width = left < kFactorColumns ? left : kFactorColumns;
        load_tile(x + row * ld + t * kFactorColumns, ld, rows, width, tile, kFactorColumns);
        product<kLevel>({from, 1, rank}, tile, kFactorColumns, part + t * rank * kFactorColumns, kFactorColumns, rank,
                        padded(width), rows, row > first);
      }
    }
    // Where a tile is narrow, its last columns are nobody's.
    for (int64_t i = 0; i < numbers; ++i) sum[i] += part[i];
  }
}

template <CpuLevel kLevel>
PEFTK_INLINE void low_rank_factors_cpu_body(const LowRankBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t rank = p.rank, split = p.db ? low_rank_tiles(p.columns) : 0;
  const int64_t numbers = (end - begin) * rank * kFactorColumns;
  const std::unique_ptr<float[]> scratch(new float[kTileRows * rank]), tile(new float[kTileRows * kFactorColumns]),
      part(new float[numbers]()), sum(new float[numbers]);
  const auto at = [&](int64_t column, int64_t j) {
    return sum[(column / kFactorColumns * rank + j) * kFactorColumns + column % kFactorColumns];
  };
  if (begin < split) {
    const int64_t first = begin * kFactorColumns, stop = (end < split ? end : split) * kFactorColumns;
    const int64_t columns = (stop < p.columns ? stop : p.columns) - first;
    outer<kLevel>(p.hidden, p, p.grad + first, p.columns, columns, scratch.get(), tile.get(), part.get(), sum.get());
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t j = 0; j < rank; ++j) p.db[(first + i) * rank + j] = at(i, j) * p.scale;
  }
  if (end > split) {
    const int64_t first = (begin > split ? begin - split : 0) * kFactorColumns, stop = (end - split) * kFactorColumns;
    const int64_t columns = (stop < p.depth ? stop : p.depth) - first;
    outer<kLevel>(p.dhidden, p, p.x + first, p.depth, columns, scratch.get(), tile.get(), part.get(), sum.get());
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t i = 0; i < columns; ++i) p.da[j * p.depth + first + i] = at(i, j);
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

// Eight columns of `hidden`, or as many as there are from `rank` on, in one row.
template <typename T>
PEFTK_INLINE void few_hidden(const LowRankFewParams& p, int64_t row, int64_t rank, int64_t some) {
  const T* x = static_cast<const T*>(p.x) + row * p.depth;
  const float* a = p.a + rank * p.depth;
  Floats lanes[kLanes] = {};
  int64_t k = 0;
  if (some == kLanes) {
    for (; k + kLanes <= p.depth; k += kLanes) {
      const Floats values = eight(x + k);
      for (int i = 0; i < kLanes; ++i) lanes[i] += values * eight(a + i * p.depth + k);
    }
  } else {
    for (; k + kLanes <= p.depth; k += kLanes)
      for (int64_t i = 0; i < some; ++i) lanes[i] += eight(x + k) * eight(a + i * p.depth + k);
  }
  const Floats total = sums_of(lanes);
  for (int64_t i = 0; i < some; ++i) {
    float sum = total[i];
    for (int64_t rest = k; rest < p.depth; ++rest) sum += to_float(x[rest]) * a[i * p.depth + rest];
    p.hidden[row * p.rank + rank + i] = sum;
  }
}

template <typename T>
PEFTK_INLINE void few_hiddens(const LowRankFewParams& p, int64_t begin, int64_t end) {
  for (int64_t rank = begin; rank < end; rank += kLanes)
    for (int64_t row = 0; row < p.rows; ++row) few_hidden<T>(p, row, rank, end - rank < kLanes ? end - rank : kLanes);
}

PEFTK_INLINE void low_rank_few_hidden_cpu_body(const LowRankFewParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    few_hiddens<float>(p, begin, end);
  else
    few_hiddens<BFloat16>(p, begin, end);
}

// Eight columns, or as many as there are, of one row of `out`, from the factor as it lies.
template <typename T>
PEFTK_INLINE void few_columns(const LowRankFewParams& p, int64_t row, int64_t column, int64_t some) {
  const int64_t whole = p.rank / kLanes * kLanes;
  const float *h = p.hidden + row * p.rank, *b = p.b + column * p.rank;
  Floats lanes[kLanes] = {};
  if (some == kLanes) {
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Floats values = eight(h + j);
      for (int i = 0; i < kLanes; ++i) lanes[i] += values * eight(b + i * p.rank + j);
    }
  } else {
    for (int64_t j = 0; j < whole; j += kLanes)
      for (int64_t i = 0; i < some; ++i) lanes[i] += eight(h + j) * eight(b + i * p.rank + j);
  }
  const Floats total = sums_of(lanes);
  T* to = static_cast<T*>(p.out) + row * p.columns + column;
  for (int64_t i = 0; i < some; ++i) {
    float sum = total[i];
    for (int64_t j = whole; j < p.rank; ++j) sum += h[j] * b[i * p.rank + j];
    sum += to_float(to[i]);
    if (p.gain) sum *= p.gain[column + i];
    if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[column + i]);
    from_float(sum, to[i]);
  }
}

// Ranks of a factor that are turned around for several rows.
constexpr int64_t kTurnedRanks = 128;
// Rows of `out` from which that pays.
constexpr int64_t kTurnedRows = 4;

// Eight columns of kRows rows of `out`, from a factor that was turned around: (rank, 8).
template <typename T, int kRows>
PEFTK_INLINE void turned_rows(const LowRankFewParams& p, const float* turned, int64_t row, int64_t column) {
  const float* h = p.hidden + row * p.rank;
  Floats sums[kRows] = {};
  for (int64_t j = 0; j < p.rank; ++j)
    for (int r = 0; r < kRows; ++r) sums[r] += h[r * p.rank + j] * eight(turned + j * kLanes);
  T* to = static_cast<T*>(p.out) + row * p.columns + column;
  for (int r = 0; r < kRows; ++r) sums[r] += eight(to + r * p.columns);
  if (p.gain) {
    const Floats gain = eight(p.gain + column), none = {};
    const Floats bias = p.bias ? eight(static_cast<const T*>(p.bias) + column) : none;
    for (int r = 0; r < kRows; ++r) sums[r] = sums[r] * gain + bias;
  }
  for (int r = 0; r < kRows; ++r) put_eight(sums[r], to + r * p.columns);
}

template <typename T>
PEFTK_INLINE void turned_columns(const LowRankFewParams& p, int64_t column) {
  float turned[kTurnedRanks * kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < p.rank; ++j) turned[j * kLanes + i] = p.b[(column + i) * p.rank + j];
  int64_t row = 0;
  for (; row + 8 <= p.rows; row += 8) turned_rows<T, 8>(p, turned, row, column);
  for (; row + 2 <= p.rows; row += 2) turned_rows<T, 2>(p, turned, row, column);
  for (; row < p.rows; ++row) turned_rows<T, 1>(p, turned, row, column);
}

template <typename T>
PEFTK_INLINE void few(const LowRankFewParams& p, int64_t begin, int64_t end) {
  const bool turns = p.rows >= kTurnedRows && p.rank <= kTurnedRanks;
  for (int64_t column = begin; column < end; column += kLanes) {
    const int64_t some = end - column < kLanes ? end - column : kLanes;
    if (turns && some == kLanes)
      turned_columns<T>(p, column);
    else
      for (int64_t row = 0; row < p.rows; ++row) few_columns<T>(p, row, column, some);
  }
}

PEFTK_INLINE void low_rank_few_cpu_body(const LowRankFewParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    few<float>(p, begin, end);
  else
    few<BFloat16>(p, begin, end);
}

PEFTK_INLINE void dropout_cpu_body(const DropoutParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    drop<float>(p, begin, end);
  else
    drop<BFloat16>(p, begin, end);
}

}  // namespace

PEFTK_LEVEL_KERNEL(low_rank_cpu, (const LowRankParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_LEVEL_KERNEL(low_rank_backward_cpu, (const LowRankBackwardParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_LEVEL_KERNEL(low_rank_factors_cpu, (const LowRankBackwardParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(low_rank_few_hidden_cpu, (const LowRankFewParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(low_rank_few_cpu, (const LowRankFewParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_KERNEL(dropout_cpu, (const DropoutParams& p, int64_t begin, int64_t end), (p, begin, end))

void pack_strips_cpu(const float* from, int64_t row, int64_t col, int64_t rank, int64_t columns, float scale, float* to,
                     int64_t strip) {
  for (int64_t first = 0; first < columns; first += strip, to += rank * strip) {
    const int64_t count = columns - first < strip ? columns - first : strip;
    for (int64_t i = 0; i < rank; ++i) {
      const float* line = from + i * row + first * col;
      float* row_to = to + i * strip;
      if (col == 1)
        for (int64_t j = 0; j < count; ++j) row_to[j] = line[j] * scale;
      else
        for (int64_t j = 0; j < count; ++j) row_to[j] = line[j * col] * scale;
      for (int64_t j = count; j < strip; ++j) row_to[j] = 0.0f;
    }
  }
}

void pad_columns_cpu(const float* from, int64_t row, int64_t col, int64_t rows, int64_t cols, float* to) {
  const int64_t ld = padded(cols);
  if (col == 1) return load_tile(from, row, rows, cols, to, ld);
  // Sixteen rows at a time: where `from` is transposed, they share a line of the cache.
  for (int64_t first = 0; first < rows; first += 16) {
    const int64_t last = first + 16 < rows ? first + 16 : rows;
    for (int64_t j = 0; j < ld; ++j)
      for (int64_t i = first; i < last; ++i) to[i * ld + j] = j < cols ? from[i * row + j * col] : 0.0f;
  }
}

}  // namespace peftk
