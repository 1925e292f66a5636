#include "../few_rows.h"

#include "simd.h"

namespace peftk {
namespace {

// Words of a row that are taken at once, whatever the vectors: one line of the cache. Thus checksums and the order of
// all sums are the same on every CPU.
constexpr int64_t kStepWords = kSumWords;

// How large a tile is: vectors of so many words, and rows of the weight and of x side by side, as registers allow.
template <CpuLevel kLevel>
struct Tile {
  static constexpr int kWords = kLanes, kColumns = 2, kRows = 2;
};
template <>
struct Tile<CpuLevel::avx512> {
  static constexpr int kWords = kWidest<CpuLevel::avx512>, kColumns = 4, kRows = 4;
};

// Numbers of a word, and of a step.
template <typename T>
constexpr int64_t kWordNumbers = sizeof(uint32_t) / sizeof(T);
template <typename T>
constexpr int64_t kStepNumbers = kStepWords * kWordNumbers<T>;

// One more vector of a row in its checksum. A step is one-to-one in the sum and in the words, so that no change of one
// word alone is missed. Products of halves of words take half as long as those of words; the bits change halves then.
template <typename Words>
PEFTK_INLINE Words summed(Words sum, Words words) {
  typedef uint16_t Halves __attribute__((vector_size(sizeof(Words))));
  const Halves halves = reinterpret_cast<Halves>(sum ^ words) * uint16_t{0x9E37};
  sum = reinterpret_cast<Words>(halves);
  return sum << 13 | sum >> 19;
}

// sum += the numbers of some words, times those of x.
template <typename V>
PEFTK_INLINE void add_product(typename V::Numbers& sum, typename V::Words words, const float* x, float) {
  sum += bits_at<typename V::Numbers>(&words) * bits_at<typename V::Numbers>(x);
}

// The lower half of a word is the first number; x has the first ones of all words of a step, then the second ones.
template <typename V>
PEFTK_INLINE void add_product(typename V::Numbers& sum, typename V::Words words, const float* x, BFloat16) {
  const typename V::Words first = words << 16, second = words & 0xffff0000u;
  add_product<V>(sum, first, x, 0.0f);
  add_product<V>(sum, second, x + kStepWords, 0.0f);
}

// The sum of eight lanes, in the order of `sums_of`.
PEFTK_INLINE float total(Floats lanes) {
  return ((lanes[0] + lanes[2]) + (lanes[1] + lanes[3])) + ((lanes[4] + lanes[6]) + (lanes[5] + lanes[7]));
}

// The numbers of a row that fill no step, with zeros behind them.
template <typename T>
PEFTK_INLINE void last_words(const T* row, int64_t count, uint32_t* words) {
  std::memset(words, 0, kStepWords * sizeof(uint32_t));
  std::memcpy(words, row, count * sizeof(T));
}

// kColumns rows of the weight times kRows rows of x.
template <CpuLevel kLevel, typename T, int kColumns, int kRows, bool kSums>
PEFTK_INLINE bool few_tile(const FewRowsParams& p, int64_t column, int64_t row) {
  using V = Vectors<Tile<kLevel>::kWords>;
  constexpr int kCount = kStepWords / Tile<kLevel>::kWords;
  using Words = typename V::Words;
  using Numbers = typename V::Numbers;
  const T* weight = static_cast<const T*>(p.weight) + column * p.depth;
  const float* x = p.x + row * p.depth;
  Numbers lanes[kColumns][kRows][kCount] = {};
  Words sums[kColumns][kCount] = {};
  int64_t k = 0;
  for (; k + kStepNumbers<T> <= p.depth; k += kStepNumbers<T>)
    for (int v = 0; v < kCount; ++v)
      for (int c = 0; c < kColumns; ++c) {
        const int64_t first = v * Tile<kLevel>::kWords;
        const Words words = bits_at<Words>(weight + c * p.depth + k + first * kWordNumbers<T>);
        for (int r = 0; r < kRows; ++r) add_product<V>(lanes[c][r][v], words, x + r * p.depth + k + first, T());
        if (kSums) sums[c][v] = summed(sums[c][v], words);
      }
  constexpr int kOutputs = kColumns * kRows, kGroups = (kOutputs + kLanes - 1) / kLanes;
  Floats all[kGroups * kLanes] = {};
  for (int c = 0; c < kColumns; ++c)
    for (int r = 0; r < kRows; ++r) {
      const float *b = p.b + (column + c) * p.rank, *h = p.hidden + (row + r) * p.rank;
      Floats halves[2];
      std::memcpy(halves, lanes[c][r], sizeof halves);
      Floats sum = halves[0] + halves[1];
      for (int64_t j = 0; j + kLanes <= p.rank; j += kLanes) sum += eight(b + j) * eight(h + j);
      all[r * kColumns + c] = sum;
    }
  float totals[kGroups * kLanes];
  for (int i = 0; i < kOutputs; i += kOutputs < kLanes / 2 ? 1 : kLanes) {
    // Eight at once take as long as two.
    if (kOutputs < kLanes / 2) {
      totals[i] = total(all[i]);
    } else {
      const Floats found = sums_of(all + i);
      std::memcpy(totals + i, &found, sizeof found);
    }
  }
  bool same = true;
  for (int c = 0; c < kColumns; ++c) {
    const int64_t n = column + c;
    const T* tail = weight + c * p.depth + k;
    const float* b = p.b + n * p.rank;
    for (int r = 0; r < kRows; ++r) {
      const float *h = p.hidden + (row + r) * p.rank, *rest = x + r * p.depth + k;
      float sum = totals[r * kColumns + c];
      for (int64_t j = p.rank / kLanes * kLanes; j < p.rank; ++j) sum += b[j] * h[j];
      for (int64_t i = 0; i < p.depth - k; ++i) sum += to_float(tail[i]) * rest[i];
      if (p.added) sum += p.added[(row + r) * p.columns + n];
      if (p.gain) sum *= p.gain[n];
      if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[n]);
      from_float(sum, static_cast<T*>(p.out)[(row + r) * p.columns + n]);
    }
    if (kSums) {
      if (k < p.depth) {
        uint32_t words[kStepWords];
        last_words(tail, p.depth - k, words);
        for (int v = 0; v < kCount; ++v)
          sums[c][v] = summed(sums[c][v], bits_at<Words>(words + v * Tile<kLevel>::kWords));
      }
      same = same && std::memcmp(sums[c], p.sums + n * kSumWords, sizeof sums[c]) == 0;
    }
  }
  return same;
}

// The first tile of rows of x, which finds the checksums too where there are any.
template <CpuLevel kLevel, typename T, int kColumns, int kRows>
PEFTK_INLINE bool first_tile(const FewRowsParams& p, int64_t column) {
  return p.sums ? few_tile<kLevel, T, kColumns, kRows, true>(p, column, 0)
                : few_tile<kLevel, T, kColumns, kRows, false>(p, column, 0);
}

// kColumns rows of the weight times all rows of x, in tiles of as many rows as there are registers for, of half of them
// and of one.
template <CpuLevel kLevel, typename T, int kColumns>
PEFTK_INLINE bool few_columns(const FewRowsParams& p, int64_t column) {
  constexpr int kRows = Tile<kLevel>::kRows, kHalf = kRows / 2;
  int64_t row = p.rows >= kRows ? kRows : p.rows >= kHalf ? kHalf : 1;
  const bool same = row == kRows   ? first_tile<kLevel, T, kColumns, kRows>(p, column)
                    : row == kHalf ? first_tile<kLevel, T, kColumns, kHalf>(p, column)
                                   : first_tile<kLevel, T, kColumns, 1>(p, column);
  for (; row + kRows <= p.rows; row += kRows) few_tile<kLevel, T, kColumns, kRows, false>(p, column, row);
  for (; row + kHalf <= p.rows; row += kHalf) few_tile<kLevel, T, kColumns, kHalf, false>(p, column, row);
  for (; row < p.rows; ++row) few_tile<kLevel, T, kColumns, 1, false>(p, column, row);
  return same;
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE bool few_rows(const FewRowsParams& p, int64_t begin, int64_t end) {
  constexpr int kColumns = Tile<kLevel>::kColumns;
  bool same = true;
  int64_t column = begin;
  for (; column + kColumns <= end; column += kColumns) same = few_columns<kLevel, T, kColumns>(p, column) && same;
  for (; column < end; ++column) same = few_columns<kLevel, T, 1>(p, column) && same;
  return same;
}

template <CpuLevel kLevel>
PEFTK_INLINE void few_rows_cpu_body(const FewRowsParams& p, int64_t begin, int64_t end, std::atomic<bool>& changed) {
  const bool same =
      p.dtype == Dtype::float32 ? few_rows<kLevel, float>(p, begin, end) : few_rows<kLevel, BFloat16>(p, begin, end);
  if (!same) changed.store(true, std::memory_order_relaxed);
}

// The checksums of kRows rows: one step has to wait for the one before it, but not for those of other rows.
template <typename T, int kRows>
PEFTK_INLINE void row_sums(const T* rows, int64_t depth, uint32_t* to) {
  using Words = typename Vectors<kStepWords>::Words;
  Words sums[kRows] = {};
  int64_t k = 0;
  for (; k + kStepNumbers<T> <= depth; k += kStepNumbers<T>)
    for (int i = 0; i < kRows; ++i) sums[i] = summed(sums[i], bits_at<Words>(rows + i * depth + k));
  if (k < depth)
    for (int i = 0; i < kRows; ++i) {
      uint32_t words[kStepWords];
      last_words(rows + i * depth + k, depth - k, words);
      sums[i] = summed(sums[i], bits_at<Words>(words));
    }
  std::memcpy(to, sums, sizeof sums);
}

template <typename T>
PEFTK_INLINE void all_row_sums(const T* weight, int64_t depth, uint32_t* sums, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) row_sums<T, kRows>(weight + row * depth, depth, sums + row * kSumWords);
  for (; row < end; ++row) row_sums<T, 1>(weight + row * depth, depth, sums + row * kSumWords);
}

PEFTK_INLINE void row_sums_cpu_body(const void* weight, int64_t depth, Dtype dtype, uint32_t* sums, int64_t begin,
                                    int64_t end) {
  if (dtype == Dtype::float32)
    all_row_sums(static_cast<const float*>(weight), depth, sums, begin, end);
  else
    all_row_sums(static_cast<const BFloat16*>(weight), depth, sums, begin, end);
}

}  // namespace

PEFTK_LEVEL_KERNEL(few_rows_cpu, (const FewRowsParams& p, int64_t begin, int64_t end, std::atomic<bool>& changed),
                   (p, begin, end, changed))
PEFTK_KERNEL(row_sums_cpu, (const void* weight, int64_t depth, Dtype dtype, uint32_t* sums, int64_t begin, int64_t end),
             (weight, depth, dtype, sums, begin, end))

template <typename T>
static void few_rows_input(const T* from, int64_t rows, int64_t depth, float* to) {
  constexpr int64_t kNumbers = kStepNumbers<BFloat16>;
  for (int64_t row = 0; row < rows; ++row, from += depth, to += depth) {
    int64_t k = 0;
    for (; k + kNumbers <= depth; k += kNumbers)
      for (int64_t i = 0; i < kStepWords; ++i) {
        to[k + i] = to_float(from[k + 2 * i]);
        to[k + kStepWords + i] = to_float(from[k + 2 * i + 1]);
      }
    for (; k < depth; ++k) to[k] = to_float(from[k]);
  }
}

void few_rows_input_cpu(const void* x, Dtype dtype, int64_t rows, int64_t depth, float* to) {
  if (dtype == Dtype::float32)
    few_rows_input(static_cast<const float*>(x), rows, depth, to);
  else
    few_rows_input(static_cast<const BFloat16*>(x), rows, depth, to);
}

}  // namespace peftk
