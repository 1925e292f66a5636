#pragma once

#include "../../../csrc/cuda/block_diagonal.cu"
#include "checks.h"

namespace {

struct Rotation {
  int64_t rows, count, size;
  bool shared, transpose;
  int64_t offset;  // elements that pointers are off from an aligned address

  int64_t features() const { return count * size; }
  int64_t block(int64_t n, int64_t k, int64_t j) const {
    return ((shared ? 0 : n) * size + (transpose ? j : k)) * size + (transpose ? k : j);
  }
  // The kernels see a shared block as rows of one block.
  int64_t kernel_rows() const { return shared ? rows * count : rows; }
  int64_t kernel_count() const { return shared ? 1 : count; }
  std::string name(const char* what) const {
    return std::string(what) + " rows " + std::to_string(rows) + " count " + std::to_string(count) + " size " +
           std::to_string(size) + (shared ? " shared" : "") + (transpose ? " transposed" : "") + " offset " +
           std::to_string(offset);
  }
};

template <typename T>
void check_rotate(const Rotation& r) {
  const int64_t b = r.size, features = r.features();
  Heap<T> x(r.rows * features, r.offset), y(r.rows * features - planted_write, r.offset);
  Heap<float> blocks(r.kernel_count() * b * b);
  fill(x);
  fill(blocks);
  const std::string what = r.name("block_rotate");
  block_rotate_cuda({x.get(), blocks.get(), y.get(), r.kernel_rows(), r.kernel_count(), b, r.transpose, kDtype<T>},
                    nullptr);
  for (int64_t t = 0; t < r.rows; ++t)
    for (int64_t n = 0; n < r.count; ++n)
      for (int64_t j = 0; j < b; ++j) {
        double truth = 0, magnitude = 0;
        for (int64_t k = 0; k < b; ++k) {
          const double term = static_cast<double>(to_float(x[t * features + n * b + k])) * blocks[r.block(n, k, j)];
          truth += term;
          magnitude += std::abs(term);
        }
        expect(to_float(y[t * features + n * b + j]), truth, magnitude, static_cast<double>(b + 1), kUnit<T>,
               what.c_str());
      }
  hash(y);
}

template <typename T>
void check_rotate_backward(const Rotation& r, bool need_x, bool need_blocks, bool aliased) {
  const int64_t b = r.size, features = r.features(), elements = r.rows * features;
  Heap<T> grad(elements, r.offset), x(need_blocks ? elements : 0, r.offset);
  Heap<T> own_dx(need_x && !aliased ? elements : 0, r.offset);
  Heap<float> blocks(r.kernel_count() * b * b), dblocks(need_blocks ? blocks.count() : 0);
  fill(grad);
  fill(x);
  fill(blocks);
  const std::vector<double> g = doubles(grad), in = doubles(x);
  const std::string what = r.name("block_rotate_backward");
  Heap<T>& dx = aliased ? grad : own_dx;
  BlockRotateBackwardParams p{grad.get(),
                              need_blocks && r.rows > 0 ? x.get() : nullptr,
                              blocks.get(),
                              need_x ? dx.get() : nullptr,
                              nullptr,
                              r.kernel_rows(),
                              r.kernel_count(),
                              b,
                              0,
                              r.transpose,
                              kDtype<T>};
  Heap<float> partial(need_blocks ? block_rotate_partials_cuda(p) : 0);
  p.partial = need_blocks ? partial.get() : nullptr;
  block_rotate_backward_cuda(p, need_blocks ? dblocks.get() : nullptr, nullptr);
  for (int64_t t = 0; need_x && t < r.rows; ++t)
    for (int64_t n = 0; n < r.count; ++n)
      for (int64_t k = 0; k < b; ++k) {
        double truth = 0, magnitude = 0;
        for (int64_t j = 0; j < b; ++j) {
          const double term = g[t * features + n * b + j] * blocks[r.block(n, k, j)];
          truth += term;
          magnitude += std::abs(term);
        }
        expect(to_float(dx[t * features + n * b + k]), truth, magnitude, static_cast<double>(b + 1), kUnit<T>,
               what.c_str());
      }
  if (need_x) hash(dx);
  if (!need_blocks) return;
  std::vector<double> truth(blocks.count()), magnitude(blocks.count());
  for (int64_t t = 0; t < r.rows; ++t)
    for (int64_t n = 0; n < r.count; ++n)
      for (int64_t k = 0; k < b; ++k)
        for (int64_t j = 0; j < b; ++j) {
          const double term = in[t * features + n * b + k] * g[t * features + n * b + j];
          truth[r.block(n, k, j)] += term;
          magnitude[r.block(n, k, j)] += std::abs(term);
        }
  const double terms = static_cast<double>(r.rows * (r.shared ? r.count : 1));
  for (int64_t i = 0; i < blocks.count(); ++i)
    expect(dblocks[i], truth[i], magnitude[i], terms + 1, kFloatUnit, what.c_str());
  hash(dblocks);
}

template <typename T>
void check_rotations(const Rotation& r) {
  check_rotate<T>(r);
  check_rotate_backward<T>(r, true, true, (r.rows + r.count) % 2 == 0);
  if (r.rows == 5) {
    check_rotate_backward<T>(r, true, false, r.transpose);
    check_rotate_backward<T>(r, false, true, false);
  }
}

void run_rotations(bool few) {
  for (int64_t size = 2; size <= kCudaRotateSize; ++size)
    for (const int64_t rows : {0, 1, 5, 75})
      for (const int64_t count : {1, 4, 11, 37}) {
        // Many blocks beside each other need few rows, and the reverse.
        if ((count > 4 && rows == 75) || (count == 37 && rows == 5) || (few && (rows != 5 || count != 4))) continue;
        const bool turn = (rows + count + size) % 2 == 0;
        for (const bool shared : {false, true}) {
          const Rotation plain{rows, count, size, shared, turn != shared, 0};
          check_rotations<float>(plain);
          check_rotations<__nv_bfloat16>(plain);
          if (rows > 5) continue;
          check_rotations<__half>(plain);
          if (rows != 5) continue;
          check_rotations<float>({rows, count, size, shared, !plain.transpose, 0});
          check_rotations<float>({rows, count, size, shared, plain.transpose, 1});
          check_rotations<__nv_bfloat16>({rows, count, size, shared, !plain.transpose, 1});
        }
      }
  // So many partial sums that several threads share an element.
  check_rotations<__nv_bfloat16>({600, 2, 16, true, false, 0});
  most_blocks = 4;
  for (const int64_t size : {4, 5, 16}) {
    check_rotations<float>({40, 3, size, false, false, 0});
    check_rotations<__nv_bfloat16>({40, 4, size, false, true, 0});
  }
  most_blocks = 1024;
}

}  // namespace
