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
            Buffer(new float[kStripRows * padded(rank)]),
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
      for (int64_t at = row; at < run.last; at += most)
        forward_rows<kLevel, T>(p, run, at, smaller(most, run.last - at), s);
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

// sum (rank, columns) = h (rows, rank).T @ x (rows, columns), or += where `add`. `tile` has room for two tiles.
template <CpuLevel kLevel>
PEFTK_INLINE void accumulate(const float* h, int64_t rows, int64_t rank, const float* x, int64_t columns, bool add,
                             float* tile, float* sum) {
  int64_t column = 0;
  if constexpr (kLevel == CpuLevel::avx512) {
    // There are registers for all sums of sixteen columns, so that every number of x is read once, where it lies.
    constexpr int kWide = kWidest<kLevel>;
    for (; column + 2 * kWide <= columns; column += 2 * kWide) {
      int64_t j = 0;
      for (; j + 16 <= rank; j += 16)
        for (int64_t at = column; at < column + 2 * kWide; at += kWide)
          product_strip<16, 1, kWide>({h + j, 1, rank}, x + at, columns, sum + j * columns + at, columns, rows, add);
      for (; j + 8 <= rank; j += 8)
        product_strip<8, 2, kWide>({h + j, 1, rank}, x + column, columns, sum + j * columns + column, columns, rows,
                                   add);
      if (j < rank)
        product_columns<2, kWide>({h + j, 1, rank}, x + column, columns, sum + j * columns + column, columns, rank - j,
                                  rows, add);
    }
  }
  // Elsewhere a tile of x is read more than once, and copied before: rows a power of two apart evict each other.
  float* part = tile + rows * kGroupedColumns;
  for (; column < columns; column += kGroupedColumns) {
    const int64_t width = smaller(kGroupedColumns, columns - column);
    load_tile(x + column, columns, rows, width, tile, kGroupedColumns);
    if (width == kGroupedColumns) {
      product<kLevel>({h, 1, rank}, tile, kGroupedColumns, sum + column, columns, rank, width, rows, add);
      continue;
    }
    if (add) load_tile(sum + column, columns, rank, width, part, kGroupedColumns);
    product<kLevel>({h, 1, rank}, tile, kGroupedColumns, part, kGroupedColumns, rank, padded(width), rows, add);
    store_tile(part, kGroupedColumns, rank, width, sum + column, columns);
  }
}

// What a thread needs for a backward pass.
struct Backward {
  Buffer a, b, grad, x, dx, strip, hidden, dhidden, tile, db;
};

// The gradients of some rows of one group; `da` and `db` are sums, which are begun where `first`.
template <CpuLevel kLevel, typename T>
PEFTK_INLINE void backward_rows(const GroupedLowRankBackwardParams& p, const float* b, float* da, float* db,
                                int64_t row, int64_t rows, bool first, Backward& s) {
  const int64_t rank = p.rank;
  float* dhidden = s.dhidden.get();
  const float* grad = as_floats(static_cast<const T*>(p.grad) + row * p.columns, rows * p.columns, s.grad.get());
  const float* gate = p.gate ? p.gate + row * rank : nullptr;
  const float* hidden = as_floats(static_cast<const T*>(p.hidden) + row * rank, rows * rank, s.hidden.get());
  if (p.dx || da || p.dgate) {
    shrink<kLevel>(grad, rows, p.columns, b, rank, p.scale, s.strip.get(), dhidden);
    if (p.dgate)
      for (int64_t i = 0; i < rows * rank; ++i) p.dgate[row * rank + i] = dhidden[i] * hidden[i];
    if (gate) gated(dhidden, gate, rank, rows, rank, dhidden);
  }
  if (p.dx) {
    T* dx = static_cast<T*>(p.dx) + row * p.depth;
    float* sums = s.dx.get();
    if constexpr (std::is_same_v<T, float>) sums = dx;
    if (!p.add_dx)
      std::memset(sums, 0, sizeof(float) * rows * p.depth);
    else if (static_cast<void*>(sums) != dx)
      for (int64_t i = 0; i < rows * p.depth; ++i) sums[i] = to_float(dx[i]);
    expand<kLevel>(dhidden, rows, rank, s.a.get(), p.depth, sums);
    if constexpr (!std::is_same_v<T, float>)
      for (int64_t i = 0; i < rows * p.depth; ++i) from_float(sums[i], dx[i]);
  }
  if (da) {
    const float* x = as_floats(static_cast<const T*>(p.x) + row * p.depth, rows * p.depth, s.x.get());
    accumulate<kLevel>(dhidden, rows, rank, x, p.depth, !first, s.tile.get(), da);
  }
  if (db) {
    if (gate) gated(hidden, gate, rank, rows, rank, s.hidden.get());
    accumulate<kLevel>(gate ? s.hidden.get() : hidden, rows, rank, grad, p.columns, !first, s.tile.get(), db);
  }
}

// to (columns, rank) = scale * sum (rank, columns), or += where `add`.
PEFTK_INLINE void store_transposed(const float* sum, int64_t rank, int64_t columns, float scale, bool add, float* to) {
  for (int64_t first = 0; first < columns; first += kLanes) {
    const int64_t last = smaller(first + kLanes, columns);
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t i = first; i < last; ++i) {
        const float value = sum[j * columns + i] * scale;
        to[i * rank + j] = add ? to[i * rank + j] + value : value;
      }
  }
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void backward_parts(const GroupedLowRankBackwardParams& p, const GroupedPart* parts, int64_t count,
                                 std::atomic<int64_t>& next) {
  const int64_t most = chunk_rows(p.depth > p.columns ? p.depth : p.columns), rank = p.rank;
  const bool copies = !std::is_same_v<T, float>, aligned = rank % kLanes == 0;
  Backward s{Buffer(new float[p.dx ? strips_size(rank, p.depth) : 0]),
             Buffer(new float[aligned ? 0 : p.columns * padded(rank)]),
             Buffer(new float[copies ? most * p.columns : 0]),
             Buffer(new float[copies && p.da ? most * p.depth : 0]),
             Buffer(new float[copies && p.dx ? most * p.depth : 0]),
             Buffer(new float[kStripRows * padded(rank)]),
             Buffer(new float[most * rank]),
             Buffer(new float[most * rank]),
             Buffer(new float[(most + rank) * kGroupedColumns]),
             Buffer(new float[p.db ? rank * p.columns : 0])};
  for (int64_t task; (task = next.fetch_add(1)) < count;) {
    const GroupedPart& part = parts[task];
    const int64_t rows = part.last - part.first;
    if (part.group == p.groups) {
      if (p.dgate) std::memset(p.dgate + part.first * rank, 0, sizeof(float) * rows * rank);
      if (p.dx && !p.add_dx) std::memset(static_cast<T*>(p.dx) + part.first * p.depth, 0, sizeof(T) * rows * p.depth);
      continue;
    }
    const float* b = p.b + part.group * p.columns * rank;
    if (!aligned) {
      pad_columns_cpu(b, rank, 1, p.columns, rank, s.b.get());
      b = s.b.get();
    }
    if (p.dx) pack_strips_cpu(p.a + part.group * rank * p.depth, p.depth, 1, rank, p.depth, 1.0f, s.a.get());
    const bool alone = part.partial == nullptr;
    float* da = p.da == nullptr ? nullptr : alone ? p.da + part.group * rank * p.depth : part.partial;
    float* db = p.db == nullptr ? nullptr : alone ? s.db.get() : part.partial + rank * p.depth;
    if (rows == 0 && da) std::memset(da, 0, sizeof(float) * rank * p.depth);
    if (rows == 0 && db) std::memset(db, 0, sizeof(float) * rank * p.columns);
    for (int64_t row = part.first; row < part.last; row += most)
      backward_rows<kLevel, T>(p, b, da, db, row, smaller(most, part.last - row), row == part.first, s);
    if (db && alone) store_transposed(db, rank, p.columns, p.scale, false, p.db + part.group * p.columns * rank);
  }
}

template <CpuLevel kLevel>
PEFTK_INLINE void grouped_low_rank_backward_cpu_body(const GroupedLowRankBackwardParams& p, const GroupedPart* parts,
                                                     int64_t count, std::atomic<int64_t>& next) {
  if (p.dtype == Dtype::float32)
    backward_parts<kLevel, float>(p, parts, count, next);
  else
    backward_parts<kLevel, BFloat16>(p, parts, count, next);
}

PEFTK_INLINE void grouped_low_rank_sums_cpu_body(const GroupedLowRankBackwardParams& p, const GroupedPart* parts,
                                                 int64_t count) {
  const int64_t numbers = p.rank * p.depth;
  float* da = p.da ? p.da + parts->group * numbers : nullptr;
  float* db = p.db ? p.db + parts->group * p.columns * p.rank : nullptr;
  for (int64_t part = 0; part < count; ++part) {
    const float* from = parts[part].partial;
    for (int64_t i = 0; da && i < numbers; ++i) da[i] = part ? da[i] + from[i] : from[i];
    if (db) store_transposed(from + numbers, p.rank, p.columns, p.scale, part > 0, db);
  }
}

}  // namespace

PEFTK_LEVEL_KERNEL(grouped_low_rank_cpu, (const GroupedLowRankParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_LEVEL_KERNEL(grouped_low_rank_backward_cpu,
                   (const GroupedLowRankBackwardParams& p, const GroupedPart* parts, int64_t count,
                    std::atomic<int64_t>& next),
                   (p, parts, count, next))
PEFTK_KERNEL(grouped_low_rank_sums_cpu,
             (const GroupedLowRankBackwardParams& p, const GroupedPart* parts, int64_t count), (p, parts, count))

}  // namespace peftk
