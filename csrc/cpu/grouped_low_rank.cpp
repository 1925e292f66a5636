#include "../grouped_low_rank.h"

#include <cstring>
#include <memory>
#include <type_traits>

#include "simd.h"
#include "thin.h"

namespace peftk {
namespace {

using Buffer = std::unique_ptr<float[]>;

// Rows of a group up to which its factors are read as they lie: laying them out anew would take longer.
constexpr int64_t kFewRows = 8;

PEFTK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The rows of one group that follow one another, or of none where group is the number of groups.
struct Run {
  int64_t group, first, last, size;
};

// The run that starts at a row and does not reach beyond `end`; `group` is at most the group of that row.
PEFTK_INLINE Run run_at(const int64_t* ends, int64_t groups, int64_t group, int64_t row, int64_t end) {
  while (group < groups && ends[group] <= row) ++group;
  if (group == groups) return {group, row, end, 0};
  return {group, row, smaller(ends[group], end), ends[group] - (group ? ends[group - 1] : 0)};
}

PEFTK_INLINE int64_t group_before(const int64_t* ends, int64_t groups, int64_t row) {
  int64_t low = 0, high = groups;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ends[middle] <= row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Activations as floats: in place where they are, else a copy.
template <typename T>
PEFTK_INLINE const float* as_floats(const T* from, int64_t count, float* scratch) {
  if constexpr (std::is_same_v<T, float>) return from;
  for (int64_t i = 0; i < count; ++i) scratch[i] = to_float(from[i]);
  return scratch;
}

// to (columns) = scale * m (columns, depth) @ x (depth), or += where `add`: for one row, with a factor as it lies.
PEFTK_INLINE void dots(const float* x, const float* m, int64_t depth, int64_t columns, float scale, bool add,
                       float* to) {
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t first = 0; first < columns; first += kLanes) {
    const int64_t some = smaller(columns - first, kLanes);
    const float* rows = m + first * depth;
    Floats lanes[kLanes] = {};
    if (some == kLanes) {
      for (int64_t k = 0; k < whole; k += kLanes) {
        const Floats values = eight(x + k);
        for (int i = 0; i < kLanes; ++i) lanes[i] += values * eight(rows + i * depth + k);
      }
    } else {
      for (int64_t k = 0; k < whole; k += kLanes)
        for (int64_t i = 0; i < some; ++i) lanes[i] += eight(x + k) * eight(rows + i * depth + k);
    }
    const Floats total = sums_of(lanes);
    for (int64_t i = 0; i < some; ++i) {
      float sum = total[i];
      for (int64_t k = whole; k < depth; ++k) sum += x[k] * rows[i * depth + k];
      to[first + i] = add ? to[first + i] + sum * scale : sum * scale;
    }
  }
}

// What a thread needs for the rows of a forward pass.
struct Forward {
  Buffer a, b, x, out, strip, hidden, gated;
};

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void forward_rows(const GroupedLowRankParams& p, const Run& run, int64_t row, int64_t rows, Forward& s) {
  const T* base = static_cast<const T*>(p.base) + row * p.columns;
  T* out = static_cast<T*>(p.out) + row * p.columns;
  T* hidden = static_cast<T*>(p.hidden) + row * p.rank;
  const float* x = as_floats(static_cast<const T*>(p.x) + row * p.depth, rows * p.depth, s.x.get());
  const bool few = run.size <= kFewRows;
  if (few) {
    for (int64_t i = 0; i < rows; ++i)
      dots(x + i * p.depth, p.a + run.group * p.rank * p.depth, p.depth, p.rank, 1.0f, false,
           s.hidden.get() + i * p.rank);
  } else {
    shrink<kLevel>(x, rows, p.depth, s.a.get(), p.rank, 1.0f, s.strip.get(), s.hidden.get());
  }
  for (int64_t i = 0; i < rows * p.rank; ++i) from_float(s.hidden[i], hidden[i]);
  const float* h = s.hidden.get();
  if (p.gate) {
    gated(h, p.gate + row * p.rank, p.rank, rows, p.rank, s.gated.get());
    h = s.gated.get();
  }
  float* sums = s.out.get();
  if constexpr (std::is_same_v<T, float>) sums = out;
  if (static_cast<const void*>(sums) != base)
    for (int64_t i = 0; i < rows * p.columns; ++i) sums[i] = to_float(base[i]);
  if (few) {
    for (int64_t i = 0; i < rows; ++i)
      dots(h + i * p.rank, p.b + run.group * p.columns * p.rank, p.rank, p.columns, p.scale, true,
           sums + i * p.columns);
  } else {
    expand<kLevel>(h, rows, p.rank, s.b.get(), p.columns, sums);
  }
  if constexpr (!std::is_same_v<T, float>)
    for (int64_t i = 0; i < rows * p.columns; ++i) from_float(sums[i], out[i]);
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void forward_runs(const GroupedLowRankParams& p, int64_t begin, int64_t end) {
  const int64_t most = chunk_rows(p.depth > p.columns ? p.depth : p.columns), rank = p.rank;
  const bool copies = !std::is_same_v<T, float>;
  Forward s{Buffer(new float[p.depth * padded(rank)]),
            Buffer(new float[strips_size(rank, p.columns)]),
            Buffer(new float[copies ? most * p.depth : 0]),
            Buffer(new float[copies ? most * p.columns : 0]),
            Buffer(new float[6 * padded(rank)]),
            Buffer(new float[most * rank]),
            Buffer(new float[most * rank])};
  int64_t group = group_before(p.ends, p.groups, begin);
  for (int64_t row = begin; row < end;) {
    const Run run = run_at(p.ends, p.groups, group, row, end);
    group = run.group;
    const int64_t rows = run.last - row;
    if (group == p.groups) {
      if (p.out != p.base)
        std::memcpy(static_cast<T*>(p.out) + row * p.columns, static_cast<const T*>(p.base) + row * p.columns,
                    sizeof(T) * rows * p.columns);
      std::memset(static_cast<T*>(p.hidden) + row * rank, 0, sizeof(T) * rows * rank);
    } else {
      if (run.size > kFewRows) {
        pad_columns_cpu(p.a + group * rank * p.depth, 1, p.depth, p.depth, rank, s.a.get());
        pack_strips_cpu(p.b + group * p.columns * rank, 1, rank, rank, p.columns, p.scale, s.b.get());
      }
      for (int64_t at = row; at < run.last; at += most) forward_rows<kLevel, T>(p, run, at, smaller(most, run.last - at), s);
    }
    row = run.last;
  }
}

template <CpuLevel kLevel>
PEFTK_INLINE void grouped_low_rank_cpu_body(const GroupedLowRankParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    forward_runs<kLevel, float>(p, begin, end);
  else
    forward_runs<kLevel, BFloat16>(p, begin, end);
}

// What a thread needs for the rows of a backward pass.
struct Backward {
  Buffer a, b, grad, dx, strip;
};

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void backward_rows(const GroupedLowRankBackwardParams& p, const float* b, const float* a, int64_t row,
                                int64_t rows, Backward& s) {
  const int64_t rank = p.rank;
  float* dhidden = p.dhidden + row * rank;
  const float* grad = as_floats(static_cast<const T*>(p.grad) + row * p.columns, rows * p.columns, s.grad.get());
  shrink<kLevel>(grad, rows, p.columns, b, rank, p.scale, s.strip.get(), dhidden);
  if (p.dgate) {
    const T* hidden = static_cast<const T*>(p.hidden) + row * rank;
    for (int64_t i = 0; i < rows * rank; ++i) p.dgate[row * rank + i] = dhidden[i] * to_float(hidden[i]);
  }
  if (p.gate) gated(dhidden, p.gate + row * rank, rank, rows, rank, dhidden);
  if (p.dx == nullptr) return;
  T* dx = static_cast<T*>(p.dx) + row * p.depth;
  float* sums = s.dx.get();
  if constexpr (std::is_same_v<T, float>) sums = dx;
  if (!p.add_dx)
    std::memset(sums, 0, sizeof(float) * rows * p.depth);
  else if (static_cast<void*>(sums) != dx)
    for (int64_t i = 0; i < rows * p.depth; ++i) sums[i] = to_float(dx[i]);
  expand<kLevel>(dhidden, rows, rank, a, p.depth, sums);
  if constexpr (!std::is_same_v<T, float>)
    for (int64_t i = 0; i < rows * p.depth; ++i) from_float(sums[i], dx[i]);
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void backward_runs(const GroupedLowRankBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t most = chunk_rows(p.depth > p.columns ? p.depth : p.columns), rank = p.rank;
  const bool copies = !std::is_same_v<T, float>, aligned = rank % kLanes == 0;
  Backward s{Buffer(new float[p.dx ? strips_size(rank, p.depth) : 0]),
             Buffer(new float[aligned ? 0 : p.columns * padded(rank)]),
             Buffer(new float[copies ? most * p.columns : 0]), Buffer(new float[copies && p.dx ? most * p.depth : 0]),
             Buffer(new float[6 * padded(rank)])};
  int64_t group = group_before(p.ends, p.groups, begin);
  for (int64_t row = begin; row < end;) {
    const Run run = run_at(p.ends, p.groups, group, row, end);
    group = run.group;
    const int64_t rows = run.last - row;
    if (group == p.groups) {
      std::memset(p.dhidden + row * rank, 0, sizeof(float) * rows * rank);
      if (p.dgate) std::memset(p.dgate + row * rank, 0, sizeof(float) * rows * rank);
      if (p.dx && !p.add_dx) std::memset(static_cast<T*>(p.dx) + row * p.depth, 0, sizeof(T) * rows * p.depth);
    } else {
      const float* b = p.b + group * p.columns * rank;
      if (!aligned) {
        pad_columns_cpu(b, rank, 1, p.columns, rank, s.b.get());
        b = s.b.get();
      }
      if (p.dx) pack_strips_cpu(p.a + group * rank * p.depth, p.depth, 1, rank, p.depth, 1.0f, s.a.get());
      for (int64_t at = row; at < run.last; at += most)
        backward_rows<kLevel, T>(p, b, s.a.get(), at, smaller(most, run.last - at), s);
    }
    row = run.last;
  }
}

template <CpuLevel kLevel>
PEFTK_INLINE void grouped_low_rank_backward_cpu_body(const GroupedLowRankBackwardParams& p, int64_t begin,
                                                     int64_t end) {
  if (p.dtype == Dtype::float32)
    backward_runs<kLevel, float>(p, begin, end);
  else
    backward_runs<kLevel, BFloat16>(p, begin, end);
}

struct Factors {
  Buffer hidden, tile, part, sum;
};

// s.sum (rank, kGroupedColumns) = h (rows of a group, rank).T @ x (the same rows, width columns from the first one on),
// with h times the gate where `gates`. The sum of every so many rows is a part of its own, so that the error grows with
// neither number alone.
template <CpuLevel kLevel, typename H, typename T>
PEFTK_INLINE void outer(const H* h, const float* gate, const T* x, int64_t ld, int64_t width, int64_t rank,
                        int64_t first, int64_t last, Factors& s) {
  const int64_t numbers = rank * kGroupedColumns;
  for (int64_t i = 0; i < numbers; ++i) s.sum[i] = 0.0f;
  for (int64_t start = first; start < last; start += kPartRows) {
    const int64_t stop = smaller(start + kPartRows, last);
    for (int64_t row = start; row < stop; row += kTileRows) {
      const int64_t rows = smaller(kTileRows, stop - row);
      const float* from = as_floats(h + row * rank, rows * rank, s.hidden.get());
      if (gate) {
        gated(from, gate + row * rank, rank, rows, rank, s.hidden.get());
        from = s.hidden.get();
      }
      load_tile(x + row * ld, ld, rows, width, s.tile.get(), kGroupedColumns);
      product<kLevel>({from, 1, rank}, s.tile.get(), kGroupedColumns, s.part.get(), kGroupedColumns, rank, padded(width), rows,
              row > start);
    }
    // Where the tile is narrow, its last columns are nobody's.
    for (int64_t i = 0; i < numbers; ++i) s.sum[i] += s.part[i];
  }
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void factor_tasks(const GroupedLowRankBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t rank = p.rank, split = p.db ? grouped_tiles(p.columns) * p.groups : 0;
  Factors s{Buffer(new float[kTileRows * rank]), Buffer(new float[kTileRows * kGroupedColumns]),
            Buffer(new float[rank * kGroupedColumns]()), Buffer(new float[rank * kGroupedColumns])};
  for (int64_t task = begin; task < end; ++task) {
    const bool of_b = task < split;
    const int64_t local = of_b ? task : task - split, group = local % p.groups;
    const int64_t column = local / p.groups * kGroupedColumns, columns = of_b ? p.columns : p.depth;
    const int64_t width = smaller(kGroupedColumns, columns - column);
    const int64_t first = group ? p.ends[group - 1] : 0, last = p.ends[group];
    if (of_b) {
      outer<kLevel>(static_cast<const T*>(p.hidden), p.gate, static_cast<const T*>(p.grad) + column, columns, width, rank,
            first, last, s);
      float* db = p.db + (group * columns + column) * rank;
      for (int64_t i = 0; i < width; ++i)
        for (int64_t j = 0; j < rank; ++j) db[i * rank + j] = s.sum[j * kGroupedColumns + i] * p.scale;
    } else {
      // The gate is part of `dhidden` already.
      outer<kLevel>(static_cast<const float*>(p.dhidden), nullptr, static_cast<const T*>(p.x) + column, columns, width, rank,
            first, last, s);
      float* da = p.da + group * rank * columns + column;
      for (int64_t j = 0; j < rank; ++j)
        for (int64_t i = 0; i < width; ++i) da[j * columns + i] = s.sum[j * kGroupedColumns + i];
    }
  }
}

template <CpuLevel kLevel>
PEFTK_INLINE void grouped_low_rank_factors_cpu_body(const GroupedLowRankBackwardParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    factor_tasks<kLevel, float>(p, begin, end);
  else
    factor_tasks<kLevel, BFloat16>(p, begin, end);
}

}  // namespace

PEFTK_LEVEL_KERNEL(grouped_low_rank_cpu, (const GroupedLowRankParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_LEVEL_KERNEL(grouped_low_rank_backward_cpu, (const GroupedLowRankBackwardParams& p, int64_t begin, int64_t end),
             (p, begin, end))
PEFTK_LEVEL_KERNEL(grouped_low_rank_factors_cpu, (const GroupedLowRankBackwardParams& p, int64_t begin, int64_t end),
             (p, begin, end))

}  // namespace peftk
