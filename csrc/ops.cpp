// Schemas and registration, through LibTorch's stable ABI: one binary serves many torch releases.
#include "native_ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(peftk_native, m) {
  m.def("block_rotate(Tensor x, Tensor blocks, bool transpose, Tensor(a!) out) -> ()");
  m.def(
      "block_rotate_backward(Tensor grad, Tensor x, Tensor blocks, bool transpose, Tensor(a!) dx, Tensor(b!) dblocks)"
      " -> ()");
  m.def("butterfly_compose(Tensor factors, Tensor(a!) out) -> ()");
  m.def("butterfly_compose_backward(Tensor grad, Tensor factors, Tensor(a!) out) -> ()");
  m.def("scale_channels(Tensor x, Tensor scale, Tensor? bias, int inner, Tensor(a!) out) -> ()");
  m.def(
      "scale_channels_backward(Tensor grad, Tensor x, Tensor scale, Tensor? bias, int inner, Tensor(a!) dx,"
      " Tensor(b!) dscale, Tensor(c!) dbias) -> ()");
  m.def("cayley(Tensor source, int block_size, float[] polynomial, Tensor(a!) out) -> ()");
  m.def("cayley_backward(Tensor grad, Tensor source, Tensor blocks, float[] polynomial, Tensor(a!) out) -> ()");
  m.def("circulant_mix(Tensor x, Tensor kernel, bool adjoint, Tensor(a!) out) -> ()");
  m.def("circulant_contract(Tensor grad, Tensor x, Tensor(a!) out) -> ()");
  m.def("circulant_weight(Tensor weight, Tensor kernel, float scale, Tensor(a!) out) -> ()");
  m.def("circulant_weight_backward(Tensor grad, float scale, Tensor(a!) dkernel) -> ()");
  m.def("dora_norm(Tensor weight, Tensor a, Tensor b, bool transposed, float scale, Tensor(a!) out) -> ()");
  m.def(
      "dora_compose(Tensor base, Tensor hidden, Tensor b, Tensor gain, Tensor? bias, float scale, Tensor(a!) out)"
      " -> ()");
  m.def("fourier(Tensor x, Tensor waves, float first, float rest, Tensor(a!) out) -> ()");
  m.def("fourier_inverse(Tensor spectrum, Tensor waves, float first, float rest, bool add, Tensor(a!) out) -> ()");
  m.def("khatri_rao(Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b, Tensor(a!) a, Tensor(b!) b) -> ()");
  m.def(
      "khatri_rao_backward(Tensor grad_a, Tensor grad_b, Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b,"
      " Tensor(a!) dw1_a, Tensor(b!) dw1_b, Tensor(c!) dw2_a, Tensor(d!) dw2_b) -> ()");
  m.def(
      "hadamard_weight(Tensor weight, Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b, float scale,"
      " Tensor(a!) out) -> ()");
  m.def(
      "hadamard_weight_backward(Tensor grad, Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b, float scale,"
      " Tensor(a!) dw1_a, Tensor(b!) dw1_b, Tensor(c!) dw2_a, Tensor(d!) dw2_b) -> ()");
  m.def(
      "kronecker_mix(Tensor left, Tensor right, Tensor w1, float scale, int columns, bool add_left, bool add_right,"
      " Tensor(a!) mixed_left,"
      " Tensor(b!) mixed_right, Tensor(c!) dw1) -> ()");
  m.def("kronecker_weight(Tensor weight, Tensor w1, Tensor w2, float scale, Tensor(a!) out) -> ()");
  m.def(
      "kronecker_weight_backward(Tensor grad, Tensor w1, Tensor w2, float scale, Tensor(a!) dw1, Tensor(b!) dw2)"
      " -> ()");
  m.def("low_rank(Tensor x, Tensor a, Tensor b, Tensor? gate, float scale, Tensor(a!) out, Tensor(b!) hidden) -> ()");
  m.def(
      "low_rank_backward(Tensor grad, Tensor x, Tensor hidden, Tensor a, Tensor b, Tensor? gate, float scale, "
      "Tensor(a!) dx, Tensor(b!) da, Tensor(c!) db, Tensor(d!) dgate) -> ()");
  m.def("dropout(Tensor x, int seed, int threshold, float scale, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftk_native, CPU, m) {
  m.impl("block_rotate", TORCH_BOX(&peftk::block_rotate));
  m.impl("block_rotate_backward", TORCH_BOX(&peftk::block_rotate_backward));
  m.impl("butterfly_compose", TORCH_BOX(&peftk::butterfly_compose));
  m.impl("butterfly_compose_backward", TORCH_BOX(&peftk::butterfly_compose_backward));
  m.impl("scale_channels", TORCH_BOX(&peftk::scale_channels));
  m.impl("scale_channels_backward", TORCH_BOX(&peftk::scale_channels_backward));
  m.impl("cayley", TORCH_BOX(&peftk::cayley));
  m.impl("cayley_backward", TORCH_BOX(&peftk::cayley_backward));
  m.impl("circulant_mix", TORCH_BOX(&peftk::circulant_mix));
  m.impl("circulant_contract", TORCH_BOX(&peftk::circulant_contract));
  m.impl("circulant_weight", TORCH_BOX(&peftk::circulant_weight));
  m.impl("circulant_weight_backward", TORCH_BOX(&peftk::circulant_weight_backward));
  m.impl("dora_norm", TORCH_BOX(&peftk::dora_norm));
  m.impl("dora_compose", TORCH_BOX(&peftk::dora_compose));
  m.impl("fourier", TORCH_BOX(&peftk::fourier));
  m.impl("fourier_inverse", TORCH_BOX(&peftk::fourier_inverse));
  m.impl("khatri_rao", TORCH_BOX(&peftk::khatri_rao));
  m.impl("khatri_rao_backward", TORCH_BOX(&peftk::khatri_rao_backward));
  m.impl("hadamard_weight", TORCH_BOX(&peftk::hadamard_weight));
  m.impl("hadamard_weight_backward", TORCH_BOX(&peftk::hadamard_weight_backward));
  m.impl("kronecker_mix", TORCH_BOX(&peftk::kronecker_mix));
  m.impl("kronecker_weight", TORCH_BOX(&peftk::kronecker_weight));
  m.impl("kronecker_weight_backward", TORCH_BOX(&peftk::kronecker_weight_backward));
  m.impl("low_rank", TORCH_BOX(&peftk::low_rank));
  m.impl("low_rank_backward", TORCH_BOX(&peftk::low_rank_backward));
  m.impl("dropout", TORCH_BOX(&peftk::dropout));
}

#ifdef PEFTK_CUDA
STABLE_TORCH_LIBRARY_IMPL(peftk_native, CUDA, m) {
  m.impl("block_rotate", TORCH_BOX(&peftk::block_rotate_on_cuda));
  m.impl("block_rotate_backward", TORCH_BOX(&peftk::block_rotate_backward_on_cuda));
  m.impl("butterfly_compose", TORCH_BOX(&peftk::butterfly_compose_on_cuda));
  m.impl("butterfly_compose_backward", TORCH_BOX(&peftk::butterfly_compose_backward_on_cuda));
  m.impl("circulant_mix", TORCH_BOX(&peftk::circulant_mix_on_cuda));
  m.impl("circulant_contract", TORCH_BOX(&peftk::circulant_contract_on_cuda));
  m.impl("circulant_weight", TORCH_BOX(&peftk::circulant_weight_on_cuda));
  m.impl("circulant_weight_backward", TORCH_BOX(&peftk::circulant_weight_backward_on_cuda));
  m.impl("cayley", TORCH_BOX(&peftk::cayley_on_cuda));
  m.impl("cayley_backward", TORCH_BOX(&peftk::cayley_backward_on_cuda));
  m.impl("hadamard_weight", TORCH_BOX(&peftk::hadamard_weight_on_cuda));
  m.impl("hadamard_weight_backward", TORCH_BOX(&peftk::hadamard_weight_backward_on_cuda));
  m.impl("kronecker_weight", TORCH_BOX(&peftk::kronecker_weight_on_cuda));
  m.impl("kronecker_weight_backward", TORCH_BOX(&peftk::kronecker_weight_backward_on_cuda));
}
#endif
