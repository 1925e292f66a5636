#include "circulant.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "check.h"
#include "few_rows_linear.h"
#include "host.h"
#ifdef PEFTK_CUDA
#include "cuda_stream.h"
#endif

namespace peftk {
namespace {

// The spectrum of activations, (rows, blocks * 2 * lanes).
int64_t check_spectrum(const Tensor& t, const char* name, int64_t width) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == width, name, ": expected shape (rows, ", width, ")");
  return t.size(0);
}

// The three planes of kernels, (out_blocks, in_blocks, 3, lanes).
void check_planes(const Tensor& t, const char* name, Place place) {
  check_float(t, name, place);
  STD_TORCH_CHECK(t.dim() == 4 && t.size(2) == 3 && t.numel() > 0 && t.size(3) % kCirculantLanes == 0, name,
                  ": expected shape (out_blocks, in_blocks, 3, lanes) with lanes in multiples of ", kCirculantLanes);
}

CirculantMixParams check_mix(const Tensor& x, const Tensor& kernel, bool adjoint, Tensor& out, Place place) {
  const Dtype dtype = check_dtype(x, "x", place);
  check_planes(kernel, "kernel", place);
  check_same_device(kernel, "kernel", x, "x");
  check_dense(out, "out", place);
  check_same_device(out, "out", x, "x");
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), "out: expected the dtype of x");
  const int64_t out_blocks = kernel.size(0), in_blocks = kernel.size(1), lanes = kernel.size(3);
  const int64_t rows = check_spectrum(x, "x", (adjoint ? out_blocks : in_blocks) * 2 * lanes);
  STD_TORCH_CHECK(check_spectrum(out, "out", (adjoint ? in_blocks : out_blocks) * 2 * lanes) == rows, "out: expected ",
                  rows, " rows, as x has");
  return {
      x.const_data_ptr(), floats(kernel), out.mutable_data_ptr(), rows, out_blocks, in_blocks, lanes, adjoint, dtype};
}

struct Blocks {
  int64_t out_blocks, in_blocks, size;
};

Blocks check_kernel(const Tensor& kernel, const char* name, const Tensor& weight, const char* weight_name,
                    Place place) {
  check_float(kernel, name, place);
  check_same_device(kernel, name, weight, weight_name);
  STD_TORCH_CHECK(kernel.dim() == 3 && kernel.numel() > 0, name, ": expected shape (out_blocks, in_blocks, b)");
  const Blocks s{kernel.size(0), kernel.size(1), kernel.size(2)};
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) == s.out_blocks * s.size && weight.size(1) == s.in_blocks * s.size,
      weight_name, ": expected shape (", s.out_blocks * s.size, ", ", s.in_blocks * s.size, ")");
  return s;
}

CirculantWeightParams check_weight(const Tensor& weight, const Tensor& kernel, double scale, Tensor& out, Place place) {
  const Dtype dtype = check_dtype(out, "out", place);
  const Blocks s = check_kernel(kernel, "kernel", out, "out", place);
  const bool given = weight.numel() > 0;
  if (given) check_like(weight, "weight", out, "out", place);
  return {given ? weight.const_data_ptr() : nullptr,
          floats(kernel),
          out.mutable_data_ptr(),
          s.out_blocks,
          s.in_blocks,
          s.size,
          static_cast<float>(scale),
          dtype};
}

// Without `partial` and `chunks`.
CirculantContractParams check_contract(const Tensor& grad, const Tensor& x, Tensor& out, Place place) {
  const Dtype dtype = check_dtype(grad, "grad", place);
  check_dense(x, "x", place);
  check_same_device(x, "x", grad, "grad");
  STD_TORCH_CHECK(x.scalar_type() == grad.scalar_type(), "x: expected the dtype of grad");
  check_planes(out, "out", place);
  check_same_device(out, "out", grad, "grad");
  const int64_t out_blocks = out.size(0), in_blocks = out.size(1), lanes = out.size(3);
  const int64_t rows = check_spectrum(grad, "grad", out_blocks * 2 * lanes);
  STD_TORCH_CHECK(check_spectrum(x, "x", in_blocks * 2 * lanes) == rows, "x: expected ", rows, " rows, as grad has");
  return {grad.const_data_ptr(), x.const_data_ptr(), nullptr, rows, out_blocks, in_blocks, lanes, 1, dtype};
}

CirculantWeightBackwardParams check_weight_backward(const Tensor& grad, double scale, Tensor& dkernel, Place place) {
  const Dtype dtype = check_dtype(grad, "grad", place);
  const Blocks s = check_kernel(dkernel, "dkernel", grad, "grad", place);
  return {
      grad.const_data_ptr(), writable(dkernel), s.out_blocks, s.in_blocks, s.size, static_cast<float>(scale), dtype};
}

// Enough chunks for many cores, few enough for their sums to stay small; from the shape alone, because the bits must
// not depend on the number of threads.
int64_t contract_chunks(int64_t rows, int64_t sums) {
  const int64_t possible = (rows + 63) / 64, afforded = (int64_t{1} << 21) / sums;
  const int64_t wanted = possible < 16 ? possible : 16, chunks = wanted < afforded ? wanted : afforded;
  return chunks > 0 ? chunks : 1;
}

void circulant_mix(const Tensor& x, const Tensor& kernel, bool adjoint, Tensor& out) {
  const CirculantMixParams p = check_mix(x, kernel, adjoint, out, Place::cpu);
  const int64_t work = kMixRows * p.out_blocks * p.in_blocks * p.lanes;
  parallel_for(0, (p.rows + kMixRows - 1) / kMixRows, 1 + 65536 / work,
               [&](int64_t begin, int64_t end) { circulant_mix_cpu(p, begin, end); });
}

void circulant_contract(const Tensor& grad, const Tensor& x, Tensor& out) {
  CirculantContractParams p = check_contract(grad, x, out, Place::cpu);
  const int64_t sums = out.numel(), chunks = p.chunks = contract_chunks(p.rows, sums);
  // Value-initialised: the sums start from zero.
  const std::unique_ptr<float[]> partial(new float[chunks * sums]());
  p.partial = partial.get();
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { circulant_contract_cpu(p, begin, end); });
  add_up(partial.get(), chunks, 1, sums, sums, 1.0f, writable(out));
}

void circulant_weight(const Tensor& weight, const Tensor& kernel, double scale, Tensor& out) {
  const CirculantWeightParams p = check_weight(weight, kernel, scale, out, Place::cpu);
  parallel_for(0, p.out_blocks, 1 + 65536 / (p.size * p.size * p.in_blocks),
               [&](int64_t begin, int64_t end) { circulant_weight_cpu(p, begin, end); });
}

void circulant_weight_backward(const Tensor& grad, double scale, Tensor& dkernel) {
  const CirculantWeightBackwardParams p = check_weight_backward(grad, scale, dkernel, Place::cpu);
  parallel_for(0, p.out_blocks, 1 + 65536 / (p.size * p.size * p.in_blocks),
               [&](int64_t begin, int64_t end) { circulant_weight_backward_cpu(p, begin, end); });
}

std::optional<Tensor> circulant_few(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                    const Tensor& kernel, double scale, int64_t most) {
  const auto sizes = few_rows_sizes(x, weight, bias, most);
  if (!sizes || !are_factors(kernel, 3)) return std::nullopt;
  const int64_t out_blocks = kernel.size(0), in_blocks = kernel.size(1), size = kernel.size(2);
  if (out_blocks * size != sizes->columns || in_blocks * size != sizes->depth) return std::nullopt;
  const FloatNumbers numbers(x, sizes->dtype);
  const std::unique_ptr<float[]> added(new float[sizes->rows * sizes->columns]);
  const CirculantFewParams p{numbers.get(), floats(kernel), added.get(), sizes->rows,
                             out_blocks,    in_blocks,      size,        static_cast<float>(scale)};
  parallel_for(0, out_blocks, 1 + kTaskOperations / (1 + p.rows * sizes->depth * size),
               [&](int64_t begin, int64_t end) { circulant_few_cpu(p, begin, end); });
  return few_rows_linear(*sizes, x, weight, bias, added.get());
}

#ifdef PEFTK_CUDA

void circulant_mix_on_cuda(const Tensor& x, const Tensor& kernel, bool adjoint, Tensor& out) {
  const CirculantMixParams p = check_mix(x, kernel, adjoint, out, Place::cuda);
  const CudaStream stream(x);
  circulant_mix_cuda(p, stream.get());
}

void circulant_contract_on_cuda(const Tensor& grad, const Tensor& x, Tensor& out) {
  CirculantContractParams p = check_contract(grad, x, out, Place::cuda);
  p.chunks = contract_chunks(p.rows, out.numel());
  const CudaStream stream(grad);
  // From torch's allocator, which knows the stream: it may hand the memory on as soon as this returns.
  const Tensor partial = torch::stable::new_empty(out, {p.chunks * out.numel()});
  p.partial = writable(partial);
  circulant_contract_cuda(p, writable(out), stream.get());
}

void circulant_weight_on_cuda(const Tensor& weight, const Tensor& kernel, double scale, Tensor& out) {
  const CirculantWeightParams p = check_weight(weight, kernel, scale, out, Place::cuda);
  const CudaStream stream(out);
  circulant_weight_cuda(p, stream.get());
}

void circulant_weight_backward_on_cuda(const Tensor& grad, double scale, Tensor& dkernel) {
  const CirculantWeightBackwardParams p = check_weight_backward(grad, scale, dkernel, Place::cuda);
  const CudaStream stream(grad);
  circulant_weight_backward_cuda(p, stream.get());
}

#endif

}  // namespace
}  // namespace peftk

STABLE_TORCH_LIBRARY_FRAGMENT(peftk_native, m) {
  m.def("circulant_mix(Tensor x, Tensor kernel, bool adjoint, Tensor(a!) out) -> ()");
  m.def("circulant_contract(Tensor grad, Tensor x, Tensor(a!) out) -> ()");
  m.def("circulant_few(Tensor x, Tensor weight, Tensor? bias, Tensor kernel, float scale, int most) -> Tensor?");
  m.def("circulant_weight(Tensor weight, Tensor kernel, float scale, Tensor(a!) out) -> ()");
  m.def("circulant_weight_backward(Tensor grad, float scale, Tensor(a!) dkernel) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("circulant_mix", TORCH_BOX(&peftk::circulant_mix));
  m.impl("circulant_contract", TORCH_BOX(&peftk::circulant_contract));
  m.impl("circulant_few", TORCH_BOX(&peftk::circulant_few));
  m.impl("circulant_weight", TORCH_BOX(&peftk::circulant_weight));
  m.impl("circulant_weight_backward", TORCH_BOX(&peftk::circulant_weight_backward));
}

#ifdef PEFTK_CUDA
STABLE_TORCH_LIBRARY_IMPL(peftk_native, CUDA, m) {
  m.impl("circulant_mix", TORCH_BOX(&peftk::circulant_mix_on_cuda));
  m.impl("circulant_contract", TORCH_BOX(&peftk::circulant_contract_on_cuda));
  m.impl("circulant_weight", TORCH_BOX(&peftk::circulant_weight_on_cuda));
  m.impl("circulant_weight_backward", TORCH_BOX(&peftk::circulant_weight_backward_on_cuda));
}
#endif
