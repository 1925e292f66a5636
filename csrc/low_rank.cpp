#include "low_rank.h"

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "native_ops.h"

namespace peftk {

void dropout(const Tensor& x, int64_t seed, int64_t threshold, double scale, Tensor& out) {
  const Dtype dtype = check_dtype(x, "x");
  check_like(out, "out", x, "x");
  STD_TORCH_CHECK(threshold >= 0 && threshold <= 1 << 24, "threshold: expected 0 to 2^24; got ", threshold);
  const DropoutParams p{x.const_data_ptr(),
                        out.mutable_data_ptr(),
                        x.numel(),
                        static_cast<uint64_t>(seed),
                        static_cast<uint32_t>(threshold),
                        static_cast<float>(scale),
                        dtype};
  torch::stable::parallel_for(0, (p.count + 3) / 4, 4096,
                              [&](int64_t begin, int64_t end) { dropout_cpu(p, begin, end); });
}

}  // namespace peftk
