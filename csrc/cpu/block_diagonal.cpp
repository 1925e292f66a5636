#include "../block_diagonal.h"

#include <memory>
#include <type_traits>

#include "simd.h"

namespace peftk {
namespace {

PEFTK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A tile that a product reads: in place where it is made of whole vectors of floats, else a padded copy.
struct Tile {
  const float* data;
  int64_t ld;
};

template <typename T>
PEFTK_INLINE Tile read_tile(const T* from, int64_t stride, int64_t rows, int64_t size, bool copy, float* scratch) {
  if constexpr (std::is_same_v<T, float>)
    if (!copy && size % kLanes == 0) return {from, stride};
  load_tile(from, stride, rows, size, scratch, padded(size));
  return {scratch, padded(size)};
}

// y (rows, size) = x @ block, written in place where it is made of whole vectors of floats.
template <CpuLevel kLevel, typename T>
PEFTK_INLINE void rotate_tile(Tile x, const float* block, int64_t rows, int64_t size, T* y, int64_t stride,
                              float* scratch) {
  const int64_t ld = padded(size);
  if constexpr (std::is_same_v<T, float>)
    if (size == ld) return product<kLevel>({x.data, x.ld, 1}, block, ld, y, stride, rows, ld, size, false);
  product<kLevel>({x.data, x.ld, 1}, block, ld, scratch, ld, rows, ld, size, false);
  store_tile(scratch, ld, rows, size, y, stride);
}

// Rows of a strip: as many as a product takes at once, and few enough for the hardware to follow each as a stream.
constexpr int64_t kStripRows = 6;
// Bytes of the blocks that are used together: they stay in the second-level cache while all strips pass by.
constexpr int64_t kGroupBytes = 1 << 17;

PEFTK_INLINE int64_t blocks_of_group(int64_t size) {
  const int64_t bytes = size * padded(size) * static_cast<int64_t>(sizeof(float));
  return bytes < kGroupBytes ? kGroupBytes / bytes : 1;
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void rotate_tiles(const BlockRotateParams& p, const float* packed, int64_t begin, int64_t end) {
  const int64_t b = p.size, ld = padded(b), features = p.count * b;
  const int64_t group = blocks_of_group(b);
  const int64_t first_row = begin * kRotateRows, last_row = smaller(end * kRotateRows, p.rows);
  const std::unique_ptr<float[]> in(new float[kStripRows * ld]), out(new float[kStripRows * ld]);
  for (int64_t first = 0; first < p.count; first += group)
    for (int64_t row = first_row; row < last_row; row += kStripRows) {
      const int64_t rows = smaller(kStripRows, last_row - row);
      for (int64_t n = first; n < smaller(first + group, p.count); ++n) {
        const int64_t at = row * features + n * b;
        const Tile x = read_tile(static_cast<const T*>(p.x) + at, features, rows, b, false, in.get());
        rotate_tile<kLevel>(x, packed + n * b * ld, rows, b, static_cast<T*>(p.y) + at, features, out.get());
      }
    }
}

// kVectors vectors of the columns of one block, times one row.
template <int kVectors, typename T>
PEFTK_INLINE void rotate_row(const T* x, const float* block, int64_t size, float* y) {
  Floats sum[kVectors] = {};
  for (int64_t k = 0; k < size; ++k) {
    const float scalar = to_float(x[k]);
    for (int v = 0; v < kVectors; ++v)
      sum[v] += scalar * *reinterpret_cast<const Floats*>(block + k * size + v * kLanes);
  }
  std::memcpy(y, sum, sizeof sum);
}

template <typename T>
PEFTK_INLINE void rotate_few(const BlockRotateFewParams& p, int64_t begin, int64_t end) {
  const int64_t b = p.size;
  for (int64_t n = begin; n < end; ++n) {
    const float* block = p.blocks + (p.shared ? 0 : n * b * b);
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t at = (row * p.count + n) * b;
      const T* x = static_cast<const T*>(p.x) + at;
      float* y = p.y + at;
      int64_t j = 0;
      for (; j + 4 * kLanes <= b; j += 4 * kLanes) rotate_row<4>(x, block + j, b, y + j);
      for (; j + kLanes <= b; j += kLanes) rotate_row<1>(x, block + j, b, y + j);
      for (; j < b; ++j) {
        float sum = 0.0f;
        for (int64_t k = 0; k < b; ++k) sum += to_float(x[k]) * block[k * b + j];
        y[j] = sum;
      }
    }
  }
}

PEFTK_INLINE void block_rotate_few_cpu_body(const BlockRotateFewParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    rotate_few<float>(p, begin, end);
  else
    rotate_few<BFloat16>(p, begin, end);
}

PEFTK_INLINE void write_eight(Floats numbers, float* to) { *reinterpret_cast<Floats*>(to) = numbers; }

PEFTK_INLINE void write_eight(Floats numbers, BFloat16* to) {
  float values[kLanes];
  std::memcpy(values, &numbers, sizeof values);
  for (int i = 0; i < kLanes; ++i) from_float(values[i], to[i]);
}

// The number kAt of every block of kSize features, in each of the block's lanes.
template <int kSize, int kAt>
PEFTK_INLINE Floats spread(Floats x) {
  typedef int32_t Words __attribute__((vector_size(32)));
  return PEFTK_SHUFFLE(Words, x, x, 0 / kSize * kSize + kAt, 1 / kSize * kSize + kAt, 2 / kSize * kSize + kAt,
                       3 / kSize * kSize + kAt, 4 / kSize * kSize + kAt, 5 / kSize * kSize + kAt,
                       6 / kSize * kSize + kAt, 7 / kSize * kSize + kAt);
}

// sum + x @ the blocks of a group.
template <int kSize, int kAt = 0>
PEFTK_INLINE Floats rotated_group(Floats x, const Floats* rows, Floats sum) {
  sum += spread<kSize, kAt>(x) * rows[kAt];
  if constexpr (kAt + 1 < kSize) return rotated_group<kSize, kAt + 1>(x, rows, sum);
  return sum;
}

// sums[k] += the gradient of the k-th rows of the blocks of a group.
template <int kSize, int kAt = 0>
PEFTK_INLINE void add_group(Floats x, Floats grad, Floats* sums) {
  sums[kAt] += spread<kSize, kAt>(x) * grad;
  if constexpr (kAt + 1 < kSize) add_group<kSize, kAt + 1>(x, grad, sums);
}

template <int kSize, typename T>
PEFTK_INLINE void rotate_groups(const BlockRotateParams& p, const float* packed, int64_t begin, int64_t end) {
  const int64_t features = p.count * p.size, last_row = smaller(end * kRotateRows, p.rows);
  for (int64_t row = begin * kRotateRows; row < last_row; row += kStripRows)
    for (int64_t at = 0; at < features; at += kLanes) {
      Floats rows[kSize];
      std::memcpy(rows, packed + at * kSize, sizeof rows);
      for (int64_t t = row; t < smaller(row + kStripRows, last_row); ++t)
        write_eight(rotated_group<kSize>(eight(static_cast<const T*>(p.x) + t * features + at), rows, Floats{}),
                    static_cast<T*>(p.y) + t * features + at);
    }
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void rotate_rows(const BlockRotateParams& p, const float* packed, int64_t begin, int64_t end) {
  if (!fit_a_vector(p.count, p.size))
    rotate_tiles<kLevel, T>(p, packed, begin, end);
  else if (p.size == 2)
    rotate_groups<2, T>(p, packed, begin, end);
  else if (p.size == 4)
    rotate_groups<4, T>(p, packed, begin, end);
  else
    rotate_groups<8, T>(p, packed, begin, end);
}

template <CpuLevel kLevel>
PEFTK_INLINE void block_rotate_cpu_body(const BlockRotateParams& p, const float* packed, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float32)
    rotate_rows<kLevel, float>(p, packed, begin, end);
  else
    rotate_rows<kLevel, BFloat16>(p, packed, begin, end);
}

// Blocks first to last of a chunk of the rows: x and grad are visited once, for dx and for the blocks' gradient.
template <CpuLevel kLevel, typename T>
PEFTK_INLINE void visit_blocks(const BlockRotateBackwardParams& p, const float* packed, int64_t chunk, int64_t first,
                               int64_t last, float* x, float* grad, float* dx) {
  const int64_t b = p.size, ld = padded(b), features = p.count * b;
  const int64_t tiles = (p.rows + kRotateRows - 1) / kRotateRows;
  for (int64_t tile = tiles * chunk / p.chunks; tile < tiles * (chunk + 1) / p.chunks; ++tile) {
    const int64_t row = tile * kRotateRows, rows = smaller(kRotateRows, p.rows - row);
    for (int64_t n = first; n < last; ++n) {
      const int64_t at = row * features + n * b;
      // Copies, because dx may overwrite grad, and because rows that lie a power of two apart evict each other from
      // the cache while the block's gradient walks over them again and again.
      const Tile g = read_tile(static_cast<const T*>(p.grad) + at, features, rows, b, true, grad);
      if (p.dx) rotate_tile<kLevel>(g, packed + n * b * ld, rows, b, static_cast<T*>(p.dx) + at, features, dx);
      if (p.partial) {
        const Tile in = read_tile(static_cast<const T*>(p.x) + at, features, rows, b, true, x);
        const Tile left = p.transpose ? g : in, right = p.transpose ? in : g;
        float* partial = p.partial + (chunk * p.count + n) * b * ld;
        product<kLevel>({left.data, 1, left.ld}, right.data, right.ld, partial, ld, b, ld, rows, true);
      }
    }
  }
}

// A task is one block in one chunk of the rows. Neighbours are visited together, as their columns of x are.
template <CpuLevel kLevel, typename T>
PEFTK_INLINE void visit_tasks(const BlockRotateBackwardParams& p, const float* packed, int64_t begin, int64_t end) {
  const int64_t numbers = kRotateRows * padded(p.size), group = blocks_of_group(p.size);
  const std::unique_ptr<float[]> x(new float[numbers]), grad(new float[numbers]), dx(new float[numbers]);
  for (int64_t task = begin, next; task < end; task = next) {
    const int64_t first = task % p.count, last = smaller(smaller(first + group, p.count), first + end - task);
    visit_blocks<kLevel, T>(p, packed, task / p.count, first, last, x.get(), grad.get(), dx.get());
    next = task + last - first;
  }
}

// Groups first to last of a chunk of the rows.
template <int kSize, typename T>
PEFTK_INLINE void visit_groups(const BlockRotateBackwardParams& p, const float* packed, int64_t chunk, int64_t first,
                               int64_t last, float* sums) {
  const int64_t features = p.count * p.size;
  std::memset(sums, 0, (last - first) * kSize * sizeof(Floats));
  const int64_t end = p.rows * (chunk + 1) / p.chunks;
  for (int64_t row = p.rows * chunk / p.chunks; row < end; row += kStripRows)
    for (int64_t group = first; group < last; ++group) {
      Floats rows[kSize], sum[kSize];
      std::memcpy(rows, packed + group * kLanes * kSize, sizeof rows);
      std::memcpy(sum, sums + (group - first) * kSize * kLanes, sizeof sum);
      for (int64_t t = row; t < smaller(row + kStripRows, end); ++t) {
        const int64_t at = t * features + group * kLanes;
        const Floats grad = eight(static_cast<const T*>(p.grad) + at);
        if (p.partial) {
          const Floats x = eight(static_cast<const T*>(p.x) + at);
          add_group<kSize>(p.transpose ? grad : x, p.transpose ? x : grad, sum);
        }
        if (p.dx) write_eight(rotated_group<kSize>(grad, rows, Floats{}), static_cast<T*>(p.dx) + at);
      }
      std::memcpy(sums + (group - first) * kSize * kLanes, sum, sizeof sum);
    }
  for (int64_t i = first * kLanes; p.partial && i < last * kLanes; ++i)
    for (int64_t k = 0; k < kSize; ++k)
      p.partial[((chunk * p.count + i / kSize) * kSize + k) * kLanes + i % kSize] =
          sums[((i / kLanes - first) * kSize + k) * kLanes + i % kLanes];
}

// A task is one block in one chunk of the rows, and a group belongs to the task of its first block.
template <int kSize, typename T>
PEFTK_INLINE void visit_group_tasks(const BlockRotateBackwardParams& p, const float* packed, int64_t begin,
                                    int64_t end) {
  constexpr int64_t kTogether = kLanes / kSize;
  const int64_t groups = p.count / kTogether;
  const std::unique_ptr<float[]> sums(new float[groups * kSize * kLanes]);
  int64_t task = (begin + kTogether - 1) / kTogether;
  for (const int64_t stop = (end + kTogether - 1) / kTogether; task < stop;) {
    const int64_t first = task % groups, last = smaller(groups, first + stop - task);
    visit_groups<kSize, T>(p, packed, task / groups, first, last, sums.get());
    task += last - first;
  }
}

template <CpuLevel kLevel, typename T>
PEFTK_INLINE void visit_rows(const BlockRotateBackwardParams& p, const float* packed, int64_t begin, int64_t end) {
  if (!fit_a_vector(p.count, p.size))
    visit_tasks<kLevel, T>(p, packed, begin, end);
  else if (p.size == 2)
    visit_group_tasks<2, T>(p, packed, begin, end);
  else if (p.size == 4)
    visit_group_tasks<4, T>(p, packed, begin, end);
  else
    visit_group_tasks<8, T>(p, packed, begin, end);
}

template <CpuLevel kLevel>
PEFTK_INLINE void block_rotate_backward_cpu_body(const BlockRotateBackwardParams& p, const float* packed, int64_t begin,
                                                 int64_t end) {
  if (p.dtype == Dtype::float32)
    visit_rows<kLevel, float>(p, packed, begin, end);
  else
    visit_rows<kLevel, BFloat16>(p, packed, begin, end);
}

}  // namespace

PEFTK_KERNEL(block_rotate_few_cpu, (const BlockRotateFewParams& p, int64_t begin, int64_t end), (p, begin, end))
PEFTK_LEVEL_KERNEL(block_rotate_cpu, (const BlockRotateParams& p, const float* packed, int64_t begin, int64_t end),
                   (p, packed, begin, end))
PEFTK_LEVEL_KERNEL(block_rotate_backward_cpu,
                   (const BlockRotateBackwardParams& p, const float* packed, int64_t begin, int64_t end),
                   (p, packed, begin, end))

void pack_blocks_cpu(const float* blocks, int64_t count, int64_t size, bool transpose, float* packed, int64_t begin,
                     int64_t end) {
  const int64_t row = transpose ? 1 : size, col = transpose ? size : 1;
  if (fit_a_vector(count, size)) {
    const int64_t together = kLanes / size;
    for (int64_t n = begin; n < end; ++n)
      for (int64_t i = 0; i < size; ++i)
        for (int64_t j = 0; j < size; ++j)
          packed[(n / together * size + i) * kLanes + n % together * size + j] =
              blocks[n * size * size + i * row + j * col];
    return;
  }
  const int64_t ld = padded(size);
  for (int64_t n = begin; n < end; ++n)
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < ld; ++j)
        packed[(n * size + i) * ld + j] = j < size ? blocks[n * size * size + i * row + j * col] : 0.0f;
}

}  // namespace peftk
