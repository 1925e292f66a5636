// What host functions share beside their checks: pointers to floats, and tasks on torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>

#include "cpu/simd.h"

namespace peftk {

using torch::stable::Tensor;

inline const float* floats(const Tensor& t) { return t.const_data_ptr<float>(); }
inline float* writable(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Operations of a task: enough to pay for handing it to a thread.
constexpr int64_t kTaskOperations = 1 << 18;

// torch's parallel_for, for tasks that may throw, as those do that find no memory. torch's own leads through C, where
// only the fact that a call failed is left of an exception; here the first one arrives as it was thrown, after all
// other tasks have ended.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& run) {
  std::exception_ptr thrown;
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      run(first, last);
    } catch (...) {
      if (!taken.test_and_set()) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

// The numbers of a tensor as floats, copied if it holds others.
class FloatNumbers {
 public:
  FloatNumbers(const Tensor& t, Dtype dtype)
      : copy_(dtype == Dtype::float32 ? nullptr : new float[t.numel()]),
        data_(copy_ ? copy_.get() : static_cast<const float*>(t.const_data_ptr())) {
    const BFloat16* from = static_cast<const BFloat16*>(t.const_data_ptr());
    for (int64_t i = 0; copy_ && i < t.numel(); ++i) copy_[i] = to_float(from[i]);
  }
  const float* get() const { return data_; }

 private:
  std::unique_ptr<float[]> copy_;
  const float* data_;
};

// out (rows, columns) = scale * the sum of `chunks` matrices of rows of `stride` floats each, in their order.
inline void add_up(const float* partial, int64_t chunks, int64_t rows, int64_t columns, int64_t stride, float scale,
                   float* out) {
  parallel_for(0, rows * columns, 1 + (1 << 16) / (1 + chunks), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / columns, last = (row + 1) * columns < end ? (row + 1) * columns : end;
      const float* from = partial + row * stride - row * columns;
      for (; at < last; ++at) {
        float sum = 0.0f;
        for (int64_t c = 0; c < chunks; ++c) sum += from[c * rows * stride + at];
        out[at] = sum * scale;
      }
    }
  });
}

}  // namespace peftk
