#include "butterfly.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "check.h"
#include "host.h"
#ifdef PEFTK_CUDA
#include "cuda_stream.h"
#endif

namespace peftk {
namespace {

ButterflyComposeParams check_butterfly(const Tensor& factors, const Tensor& blocks, const char* name, Place place) {
  check_float(factors, "factors", place);
  check_float(blocks, name, place);
  check_same_device(blocks, name, factors, "factors");
  STD_TORCH_CHECK(factors.dim() == 4 && factors.numel() > 0 && factors.size(2) == factors.size(3),
                  "factors: expected shape (m, nb, b, b)");
  const ButterflyComposeParams p{floats(factors), nullptr, factors.size(0), factors.size(1), factors.size(2)};
  STD_TORCH_CHECK(p.stages <= 32 && (p.stages == 1 || p.size % 2 == 0) && (p.groups() << (p.stages - 1)) == p.count,
                  "factors: expected nb a multiple of 2^(m - 1), and an even b where m > 1");
  STD_TORCH_CHECK(blocks.numel() == p.groups() * p.group() * p.group(), name, ": expected shape (nb * b / g, g, g)");
  return p;
}

// Groups for each task: about 100,000 multiplications.
int64_t grain(const ButterflyComposeParams& p) { return 1 + 100000 / (p.group() * p.group() * p.size); }

ButterflyComposeBackwardParams check_backward(const Tensor& grad, const Tensor& factors, Tensor& dfactors,
                                              Place place) {
  const ButterflyComposeParams p = check_butterfly(factors, grad, "grad", place);
  check_like(dfactors, "dfactors", factors, "factors", place);
  return {floats(grad), p.factors, writable(dfactors), p.stages, p.count, p.size};
}

struct Sizes {
  int64_t outer, channels, inner;
};

Sizes check_channels(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& bias, int64_t inner) {
  check_float(scale, "scale");
  if (bias) check_like(*bias, "bias", scale, "scale");
  const int64_t row = scale.numel() * inner;
  STD_TORCH_CHECK(inner >= 0 && (row > 0 ? x.numel() % row == 0 : x.numel() == 0),
                  "x: expected (outer, channels, inner) = (any, ", scale.numel(), ", ", inner, ")");
  return {row > 0 ? x.numel() / row : 0, scale.numel(), inner};
}

const float* data(const std::optional<Tensor>& bias) { return bias ? bias->const_data_ptr<float>() : nullptr; }

void butterfly_compose(const Tensor& factors, Tensor& out) {
  ButterflyComposeParams p = check_butterfly(factors, out, "out", Place::cpu);
  p.blocks = writable(out);
  parallel_for(0, p.groups(), grain(p), [&](int64_t begin, int64_t end) { butterfly_compose_cpu(p, begin, end); });
}

void butterfly_compose_backward(const Tensor& grad, const Tensor& factors, Tensor& out) {
  const ButterflyComposeBackwardParams p = check_backward(grad, factors, out, Place::cpu);
  parallel_for(0, p.groups(), grain({nullptr, nullptr, p.stages, p.count, p.size}),
               [&](int64_t begin, int64_t end) { butterfly_compose_backward_cpu(p, begin, end); });
}

void scale_channels(const Tensor& x, const Tensor& scale, std::optional<Tensor> bias, int64_t inner, Tensor& out) {
  const Dtype dtype = check_dtype(x, "x");
  check_like(out, "out", x, "x");
  const Sizes s = check_channels(x, scale, bias, inner);
  const ScaleChannelsParams p{x.const_data_ptr(), floats(scale), data(bias), out.mutable_data_ptr(), s.outer,
                              s.channels,         s.inner,       dtype};
  parallel_for(0, s.outer, 1 + 65536 / (s.channels * s.inner + 1),
               [&](int64_t begin, int64_t end) { scale_channels_cpu(p, begin, end); });
}

void scale_channels_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, std::optional<Tensor> bias,
                             int64_t inner, Tensor& dx, Tensor& dscale, Tensor& dbias) {
  const Dtype dtype = check_dtype(grad, "grad");
  const Sizes s = check_channels(grad, scale, bias, inner);
  const bool need_x = dx.numel() > 0, need_scale = dscale.numel() > 0, need_bias = dbias.numel() > 0;
  if (need_x) check_like(dx, "dx", grad, "grad");
  if (need_scale) check_like(dscale, "dscale", scale, "scale");
  if (need_bias) check_like(dbias, "dbias", scale, "scale");
  const bool sums = need_scale || need_bias;
  if (sums) check_like(x, "x", grad, "grad");
  // From the shape alone: the bits must not depend on the number of threads.
  const int64_t elements = s.outer * s.channels * s.inner, wanted = elements / 32768 < 16 ? elements / 32768 : 16;
  const int64_t chunks = wanted < 1 || s.outer < 1 ? 1 : (wanted < s.outer ? wanted : s.outer);
  const std::unique_ptr<float[]> partial(sums ? new float[chunks * 2 * s.channels] : nullptr);
  const ScaleChannelsBackwardParams p{grad.const_data_ptr(),
                                      sums ? x.const_data_ptr() : nullptr,
                                      floats(scale),
                                      data(bias),
                                      need_x ? dx.mutable_data_ptr() : nullptr,
                                      partial.get(),
                                      s.outer,
                                      s.channels,
                                      s.inner,
                                      chunks,
                                      dtype};
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { scale_channels_backward_cpu(p, begin, end); });
  const int64_t numbers = 2 * s.channels;
  for (int64_t chunk = 1; sums && chunk < chunks; ++chunk)
    for (int64_t c = 0; c < numbers; ++c) partial[c] += partial[chunk * numbers + c];
  float* scales = need_scale ? writable(dscale) : nullptr;
  float* biases = need_bias ? writable(dbias) : nullptr;
  for (int64_t c = 0; scales && c < s.channels; ++c) scales[c] = partial[c];
  for (int64_t c = 0; biases && c < s.channels; ++c) biases[c] = (1.0f - p.scale[c]) * partial[s.channels + c];
}

#ifdef PEFTK_CUDA

void check_small_group(int64_t group) {
  STD_TORCH_CHECK(group <= kCudaButterflyGroup, "factors: expected groups of at most ", kCudaButterflyGroup, "; got ",
                  group);
}

void butterfly_compose_on_cuda(const Tensor& factors, Tensor& out) {
  ButterflyComposeParams p = check_butterfly(factors, out, "out", Place::cuda);
  check_small_group(p.group());
  p.blocks = writable(out);
  const CudaStream stream(factors);
  butterfly_compose_cuda(p, stream.get());
}

void butterfly_compose_backward_on_cuda(const Tensor& grad, const Tensor& factors, Tensor& out) {
  const ButterflyComposeBackwardParams p = check_backward(grad, factors, out, Place::cuda);
  check_small_group(p.group());
  const CudaStream stream(factors);
  butterfly_compose_backward_cuda(p, stream.get());
}

#endif

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("butterfly_compose(Tensor factors, Tensor(a!) out) -> ()");
  m.def("butterfly_compose_backward(Tensor grad, Tensor factors, Tensor(a!) out) -> ()");
  m.def("scale_channels(Tensor x, Tensor scale, Tensor? bias, int inner, Tensor(a!) out) -> ()");
  m.def(
      "scale_channels_backward(Tensor grad, Tensor x, Tensor scale, Tensor? bias, int inner, Tensor(a!) dx,"
      " Tensor(b!) dscale, Tensor(c!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("butterfly_compose", TORCH_BOX(&peftk::butterfly_compose));
  m.impl("butterfly_compose_backward", TORCH_BOX(&peftk::butterfly_compose_backward));
  m.impl("scale_channels", TORCH_BOX(&peftk::scale_channels));
  m.impl("scale_channels_backward", TORCH_BOX(&peftk::scale_channels_backward));
}

#ifdef PEFTK_CUDA
STABLE_TORCH_LIBRARY_IMPL(peftk_native, CUDA, m) {
  m.impl("butterfly_compose", TORCH_BOX(&peftk::butterfly_compose_on_cuda));
  m.impl("butterfly_compose_backward", TORCH_BOX(&peftk::butterfly_compose_backward_on_cuda));
}
#endif
