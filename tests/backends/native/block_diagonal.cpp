// Checks of the block rotation, against naive sums in double precision.
#include "../../../csrc/cpu/block_diagonal.cpp"
#include "harness.h"

namespace {

template <typename T>
void check_rotate(Level level, int64_t rows, int64_t count, int64_t size, bool transpose) {
  const int64_t features = count * size, ld = padded(size);
  Heap<T> x(rows * features), y(rows * features - planted_write);
  Heap<float> blocks(count * size * size), packed(count * size * ld);
  fill(x);
  fill(blocks);
  const BlockRotateParams p{x.get(), blocks.get(), y.get(), rows, count, size, transpose, dtype_of<T>()};
  pack_blocks_cpu(blocks.get(), count, size, transpose, packed.get(), 0, count);
  in_pieces((rows + kRotateRows - 1) / kRotateRows, 1 + rows % 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, block_rotate_cpu)(p, packed.get(), begin, end); });
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t n = 0; n < count; ++n)
      for (int64_t j = 0; j < size; ++j) {
        double truth = 0, magnitude = 0;
        for (int64_t k = 0; k < size; ++k) {
          const double term =
              to_float(x[t * features + n * size + k]) *
              static_cast<double>(blocks[(n * size + (transpose ? j : k)) * size + (transpose ? k : j)]);
          truth += term;
          magnitude += std::abs(term);
        }
        expect(to_float(y[t * features + n * size + j]), truth, magnitude, static_cast<double>(size + 1),
               output_unit<T>(), std::string("block_rotate ") + name_of(level));
      }
}

template <typename T>
void check_rotate_few(Level level, int64_t rows, int64_t count, int64_t size, bool shared) {
  const int64_t features = count * size;
  Heap<T> x(rows * features);
  Heap<float> blocks((shared ? 1 : count) * size * size), y(rows * features - planted_write);
  fill(x);
  fill(blocks);
  const BlockRotateFewParams p{x.get(), blocks.get(), y.get(), rows, count, size, shared, dtype_of<T>()};
  in_pieces(count, 1 + rows % 2,
            [&](int64_t begin, int64_t end) { VARIANT(level, block_rotate_few_cpu)(p, begin, end); });
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t n = 0; n < count; ++n)
      for (int64_t j = 0; j < size; ++j) {
        double truth = 0, magnitude = 0;
        for (int64_t k = 0; k < size; ++k) {
          const double term = to_float(x[t * features + n * size + k]) *
                              static_cast<double>(blocks[((shared ? 0 : n) * size + k) * size + j]);
          truth += term;
          magnitude += std::abs(term);
        }
        expect(y[t * features + n * size + j], truth, magnitude, static_cast<double>(size + 1), kFloatUnit,
               std::string("block_rotate_few ") + name_of(level));
      }
}

template <typename T>
void check_rotate_backward(Level level, int64_t rows, int64_t count, int64_t size, int64_t chunks, bool transpose,
                           bool need_x, bool need_blocks, bool aliased) {
  const int64_t features = count * size, ld = padded(size);
  Heap<T> grad(rows * features), x(need_blocks ? rows * features : 0), own_dx(need_x && !aliased ? rows * features : 0);
  Heap<float> blocks(count * size * size), packed(count * size * ld);
  Heap<float> partial(need_blocks ? chunks * count * size * ld : 0), dblocks(need_blocks ? count * size * size : 0);
  fill(grad);
  fill(x);
  fill(blocks);
  for (int64_t i = 0; i < partial.count(); ++i) partial[i] = 0.0f;
  const std::vector<double> g = doubles(grad), in = doubles(x);
  T* dx = need_x ? (aliased ? grad.get() : own_dx.get()) : nullptr;
  const BlockRotateBackwardParams p{grad.get(),
                                    need_blocks ? x.get() : nullptr,
                                    blocks.get(),
                                    dx,
                                    need_blocks ? partial.get() : nullptr,
                                    rows,
                                    count,
                                    size,
                                    chunks,
                                    transpose,
                                    dtype_of<T>()};
  pack_blocks_cpu(blocks.get(), count, size, !transpose, packed.get(), 0, count);
  in_pieces(chunks * count, 2, [&](int64_t begin, int64_t end) {
    VARIANT(level, block_rotate_backward_cpu)(p, packed.get(), begin, end);
  });
  const std::string what = std::string("block_rotate_backward ") + name_of(level);
  for (int64_t t = 0; need_x && t < rows; ++t)
    for (int64_t n = 0; n < count; ++n)
      for (int64_t k = 0; k < size; ++k) {
        double truth = 0, magnitude = 0;
        for (int64_t j = 0; j < size; ++j) {
          const double term =
              g[t * features + n * size + j] *
              static_cast<double>(blocks[(n * size + (transpose ? j : k)) * size + (transpose ? k : j)]);
          truth += term;
          magnitude += std::abs(term);
        }
        expect(to_float(dx[t * features + n * size + k]), truth, magnitude, static_cast<double>(size + 1),
               output_unit<T>(), what + " dx");
      }
  if (!need_blocks) return;
  for (int64_t i = 0; i < count * size; ++i)
    for (int64_t j = 0; j < size; ++j) {
      float sum = 0.0f;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[(c * count * size + i) * padded(size) + j];
      dblocks[i * size + j] = sum;
    }
  for (int64_t n = 0; n < count; ++n)
    for (int64_t k = 0; k < size; ++k)
      for (int64_t j = 0; j < size; ++j) {
        double truth = 0, magnitude = 0;
        for (int64_t t = 0; t < rows; ++t) {
          const double* left = (transpose ? g : in).data() + t * features + n * size;
          const double* right = (transpose ? in : g).data() + t * features + n * size;
          truth += left[k] * right[j];
          magnitude += std::abs(left[k] * right[j]);
        }
        expect(dblocks[(n * size + k) * size + j], truth, magnitude, static_cast<double>(rows + chunks + 1), kFloatUnit,
               what + " dblocks");
      }
}

void run_block_diagonal(Level level) {
  for (const int64_t size : kSizes)
    for (const int64_t rows : {0, 1, 47, 48, 49, 63, 64, 65, 130})
      for (const bool transpose : {false, true}) {
        if (planted_write && rows == 0) continue;
        // Small blocks also as many as share vectors.
        const int64_t count = (size == 2 || size == 4) && rows % 2 ? 8 : 1 + (size + rows) % 3;
        check_rotate<float>(level, rows, count, size, transpose);
        check_rotate<BFloat16>(level, rows, count, size, transpose);
        check_rotate_few<float>(level, 1 + rows % 6, count, size, transpose);
        check_rotate_few<BFloat16>(level, 1 + rows % 6, count, size, transpose);
        for (const int64_t chunks : {1, 2, 5}) {
          check_rotate_backward<float>(level, rows, count, size, chunks, transpose, true, true, chunks == 2);
          check_rotate_backward<BFloat16>(level, rows, count, size, chunks, transpose, true, true, chunks == 2);
        }
        check_rotate_backward<float>(level, rows, count, size, 1, transpose, true, false, false);
        check_rotate_backward<float>(level, rows, count, size, 2, transpose, false, true, false);
      }
}

const Family family("block_diagonal", run_block_diagonal);

}  // namespace
