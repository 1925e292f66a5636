// The operators of the namespace peftk_native. Python allocates every result; a result of no elements is not wanted.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <optional>

namespace peftk {

using torch::stable::Tensor;

void block_rotate(const Tensor& x, const Tensor& blocks, bool transpose, Tensor& out);
void block_rotate_backward(const Tensor& grad, const Tensor& x, const Tensor& blocks, bool transpose, Tensor& dx,
                           Tensor& dblocks);

void butterfly_compose(const Tensor& factors, Tensor& out);
void butterfly_compose_backward(const Tensor& grad, const Tensor& factors, Tensor& out);
// `x` is (outer, channels, inner).
void scale_channels(const Tensor& x, const Tensor& scale, std::optional<Tensor> bias, int64_t inner, Tensor& out);
void scale_channels_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, std::optional<Tensor> bias,
                             int64_t inner, Tensor& dx, Tensor& dscale, Tensor& dbias);

void cayley(const Tensor& source, int64_t block_size, torch::headeronly::HeaderOnlyArrayRef<double> polynomial,
            Tensor& out);
void cayley_backward(const Tensor& grad, const Tensor& source, const Tensor& blocks,
                     torch::headeronly::HeaderOnlyArrayRef<double> polynomial, Tensor& out);

// Circular convolution between spectra in planes (circulant.h), and as a weight; an empty `weight` is zero.
void circulant_mix(const Tensor& x, const Tensor& kernel, bool adjoint, Tensor& out);
void circulant_contract(const Tensor& grad, const Tensor& x, Tensor& out);
void circulant_weight(const Tensor& weight, const Tensor& kernel, double scale, Tensor& out);
void circulant_weight_backward(const Tensor& grad, double scale, Tensor& dkernel);
// The Fourier transform of blocks into planes, and back (fourier.h); `waves` is (b / 2, 2).
void fourier(const Tensor& x, const Tensor& waves, double first, double rest, Tensor& out);
void fourier_inverse(const Tensor& spectrum, const Tensor& waves, double first, double rest, bool add, Tensor& out);
// `weight` is (in, out) where transposed; `base` is (rows, out) and `hidden` (rows, rank).
void dora_norm(const Tensor& weight, const Tensor& a, const Tensor& b, bool transposed, double scale, Tensor& out);
void dora_compose(const Tensor& base, const Tensor& hidden, const Tensor& b, const Tensor& gain,
                  std::optional<Tensor> bias, double scale, Tensor& out);
void khatri_rao(const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a, const Tensor& w2_b, Tensor& a, Tensor& b);
void khatri_rao_backward(const Tensor& grad_a, const Tensor& grad_b, const Tensor& w1_a, const Tensor& w1_b,
                         const Tensor& w2_a, const Tensor& w2_b, Tensor& dw1_a, Tensor& dw1_b, Tensor& dw2_a,
                         Tensor& dw2_b);
void hadamard_weight(const Tensor& weight, const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a,
                     const Tensor& w2_b, double scale, Tensor& out);
void hadamard_weight_backward(const Tensor& grad, const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a,
                              const Tensor& w2_b, double scale, Tensor& dw1_a, Tensor& dw1_b, Tensor& dw2_a,
                              Tensor& dw2_b);
// The small factor of a Kronecker product: mixed_left (+)= scale * w1 @ right and mixed_right (+)= scale * w1.T @ left
// for every token, dw1 = scale * sum of left @ right.T; left and right are (tokens, either size of w1, columns).
void kronecker_mix(const Tensor& left, const Tensor& right, const Tensor& w1, double scale, int64_t columns,
                   bool add_left, bool add_right, Tensor& mixed_left, Tensor& mixed_right, Tensor& dw1);
void kronecker_weight(const Tensor& weight, const Tensor& w1, const Tensor& w2, double scale, Tensor& out);
void kronecker_weight_backward(const Tensor& grad, const Tensor& w1, const Tensor& w2, double scale, Tensor& dw1,
                               Tensor& dw2);

// hidden = x @ a.T, and out += scale * (hidden * gate) @ b.T unless `out` is empty, with `gate` (rank) or (rows, rank).
void low_rank(const Tensor& x, const Tensor& a, const Tensor& b, std::optional<Tensor> gate, double scale, Tensor& out,
              Tensor& hidden);
// An empty tensor is a gradient that nobody needs; that of x is added to `dx`.
void low_rank_backward(const Tensor& grad, const Tensor& x, const Tensor& hidden, const Tensor& a, const Tensor& b,
                       std::optional<Tensor> gate, double scale, Tensor& dx, Tensor& da, Tensor& db, Tensor& dgate);
void dropout(const Tensor& x, int64_t seed, int64_t threshold, double scale, Tensor& out);

#ifdef PEFTK_CUDA
// The same operators on CUDA tensors.
void block_rotate_on_cuda(const Tensor& x, const Tensor& blocks, bool transpose, Tensor& out);
void block_rotate_backward_on_cuda(const Tensor& grad, const Tensor& x, const Tensor& blocks, bool transpose,
                                   Tensor& dx, Tensor& dblocks);
void butterfly_compose_on_cuda(const Tensor& factors, Tensor& out);
void butterfly_compose_backward_on_cuda(const Tensor& grad, const Tensor& factors, Tensor& out);
void circulant_mix_on_cuda(const Tensor& x, const Tensor& kernel, bool adjoint, Tensor& out);
void circulant_contract_on_cuda(const Tensor& grad, const Tensor& x, Tensor& out);
void circulant_weight_on_cuda(const Tensor& weight, const Tensor& kernel, double scale, Tensor& out);
void circulant_weight_backward_on_cuda(const Tensor& grad, double scale, Tensor& dkernel);
void cayley_on_cuda(const Tensor& source, int64_t block_size, torch::headeronly::HeaderOnlyArrayRef<double> polynomial,
                    Tensor& out);
void cayley_backward_on_cuda(const Tensor& grad, const Tensor& source, const Tensor& blocks,
                             torch::headeronly::HeaderOnlyArrayRef<double> polynomial, Tensor& out);
void hadamard_weight_on_cuda(const Tensor& weight, const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a,
                             const Tensor& w2_b, double scale, Tensor& out);
void hadamard_weight_backward_on_cuda(const Tensor& grad, const Tensor& w1_a, const Tensor& w1_b, const Tensor& w2_a,
                                      const Tensor& w2_b, double scale, Tensor& dw1_a, Tensor& dw1_b, Tensor& dw2_a,
                                      Tensor& dw2_b);
void kronecker_weight_on_cuda(const Tensor& weight, const Tensor& w1, const Tensor& w2, double scale, Tensor& out);
void kronecker_weight_backward_on_cuda(const Tensor& grad, const Tensor& w1, const Tensor& w2, double scale,
                                       Tensor& dw1, Tensor& dw2);
#endif

}  // namespace peftk
