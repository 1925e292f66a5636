"""What single methods have beside an output and a merged weight: masks, mixed batches, updates, norms."""

from __future__ import annotations

import pytest
import torch
from support.method_forms import BASES, TOKENS, I, O
from torch import Tensor, nn

from peftk import functional as F
from peftk.methods import (
    adaption_prompt,
    boft,
    c3a,
    dora,
    loha,
    lokr,
    lora,
    lora_parameter,
    magnitudes,
    oft,
    output_rotation,
)
from peftk.ops.conv import convolution
from peftk.testing.cases import cayley, circulant
from peftk.testing.compare import assert_close, assert_same_bits


@pytest.mark.parametrize("name", ["fused", "called", "Conv1D"])
def test_low_rank_batches_that_mix_adapters(name: str) -> None:
    torch.manual_seed(2)
    base = BASES["linear"][name]().requires_grad_(False)
    x = torch.randn(4, TOKENS, I)
    adapters = [
        lora.LowRank(torch.randn(2, I), torch.randn(O, 2), 0.5, bias=torch.randn(O)),
        lora.LowRank(torch.randn(3, I), torch.randn(O, 3), 2.0),
    ]
    choice = [1, -1, 0, 1]
    y = lora.linear_mixed(base, x, adapters, choice)
    for row, index in enumerate(choice):
        expected = base(x[row]) if index < 0 else lora.linear(base, x[row], [adapters[index]])
        assert_close(y[row], expected.double(), torch.float32)


def test_additive_methods_add_to_an_output_that_is_there() -> None:
    torch.manual_seed(3)
    base, x = nn.Linear(I, O).requires_grad_(False), torch.randn(2, I)
    y = base(x)
    low_rank = lora.LowRank(torch.randn(2, I), torch.randn(O, 2), 0.5, bias=torch.randn(O))
    assert_close(lora.add(y, x, low_rank), lora.linear(base, x, [low_rank]).double(), torch.float32)
    hadamard = loha.Hadamard(torch.randn(O, 2), torch.randn(2, I), torch.randn(O, 2), torch.randn(2, I), 0.5)
    assert_close(loha.add(y, x, hadamard), loha.linear(base, x, [hadamard]).double(), torch.float32)
    kronecker = lokr.Kronecker((torch.randn(2, 3),), (torch.randn(4, 4),), 0.5)
    assert_close(lokr.add(y, x, kronecker), lokr.linear(base, x, [kronecker]).double(), torch.float32)
    kernel = torch.randn(2, 3, 4)
    assert_close(c3a.add(y, x, kernel), c3a.linear(base, x, [kernel]).double(), torch.float32)


def test_masks_of_dropout_are_handed_in() -> None:
    torch.manual_seed(4)
    base, x = nn.Linear(I, O).requires_grad_(False), torch.randn(2, I)
    kept = torch.tensor([True, False, True])
    blocks = oft.rotations(torch.randn(3, 6), 4, None, kept)
    assert torch.equal(blocks[1], torch.eye(4)) and not torch.equal(blocks[0], torch.eye(4))
    factors = boft.rotations(torch.randn(1, 3, 4, 4), kept)
    assert torch.equal(factors[0, 1], torch.eye(4)) and not torch.equal(factors[0, 0], torch.eye(4))
    rows = torch.tensor([1.0, 0.0] * (O // 2))
    hadamard = loha.Hadamard(*(torch.randn(s) for s in ((O, 2), (2, I), (O, 2), (2, I))), 0.5, rows=rows)
    y = base(x)
    assert_close(loha.linear(base, x, [hadamard])[:, 1::2], y[:, 1::2].double(), torch.float32)
    kronecker = lokr.Kronecker((torch.randn(2, 3),), (torch.randn(4, 4),), 0.5, rows.bool())
    adapted = lokr.linear(base, x, [kronecker])
    assert torch.equal(adapted[:, 1::2], y[:, 1::2]) and not torch.equal(adapted[:, ::2], y[:, ::2])


def test_dropout_of_low_rank_products_follows_the_generator() -> None:
    base, x = nn.Linear(I, O).requires_grad_(False), torch.randn(64, I)
    adapter = lora.LowRank(torch.randn(2, I), torch.randn(O, 2), dropout_p=0.5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(lora.linear(base, x, [adapter]))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_the_share_of_prompts_is_attention_to_them() -> None:
    torch.manual_seed(5)
    heads, size, length = 4, 3, 6
    query = torch.randn(2, TOKENS, heads * size, dtype=torch.float64)
    key, value = torch.randn(2, 1, length, 2 * size, dtype=torch.float64)
    gate = torch.tensor([0.7], dtype=torch.float64)
    found = adaption_prompt.share(query, key, value, gate, size)
    for head in range(heads):
        part, shared = slice(head * size, (head + 1) * size), slice(head // 2 * size, (head // 2 + 1) * size)
        scores = torch.softmax(query[..., part] @ key[0, :, shared].mT / size**0.5, -1)
        assert_close(found[..., part], 0.7 * scores @ value[0, :, shared], torch.float64)


def test_norms_of_dora_are_constants() -> None:
    base = nn.Linear(I, O).requires_grad_(False)
    a, b = torch.randn(2, I, requires_grad=True), torch.randn(O, 2, requires_grad=True)
    norms = dora.norms(base, a, b, 0.5)
    assert not norms.requires_grad
    assert_close(norms, (base.weight + 0.5 * b @ a).detach().double().norm(dim=1), torch.float32)
    zero = dora.gain(torch.ones(2), torch.tensor([0.0, 2.0]))
    assert torch.equal(zero, torch.tensor([1.0, 0.5]))


def test_the_dense_rotation_of_oft() -> None:
    torch.manual_seed(6)
    packed = torch.randn(3, 6, dtype=torch.float64)
    dense = torch.block_diag(*cayley.transform(packed, 4))
    assert_close(oft.rotation(oft.rotations(packed, 4), 3), dense, torch.float64)


def test_the_dense_update_of_c3a() -> None:
    torch.manual_seed(7)
    kernel = torch.randn(2, 3, 4, dtype=torch.float64)
    assert_close(c3a.update(kernel), circulant.dense(kernel) / I, torch.float64)


@pytest.mark.parametrize("pair", [False, True])
def test_scale_of_lokr_may_be_a_tensor(pair: bool) -> None:
    """In the dense update and in a merged weight as in a forward pass."""
    first = (torch.randn(2, 1), torch.randn(1, 3)) if pair else (torch.randn(2, 3),)
    w2, weight = torch.randn(4, 5), torch.randn(8, 15)
    w1 = first[0].double() @ first[1].double() if pair else first[0].double()
    dense = 0.75 * torch.kron(w1, w2.double())
    adapter = lokr.Kronecker(first, (w2,), torch.tensor(0.75))
    assert_close(lokr.update(adapter, dense.shape), dense, torch.float32)
    assert_close(lokr.merged(weight, adapter), weight + dense, torch.float32)


class Pair(nn.Module):
    """A module with a stack and a matrix, of which no method knows what it does with them."""

    def __init__(self, stack: Tensor, matrix: Tensor, transposed: bool) -> None:
        super().__init__()
        self.stack, self.matrix, self.is_transposed = nn.Parameter(stack), nn.Parameter(matrix), transposed

    def forward(self, x: Tensor) -> Tensor:
        stack = self.stack if self.is_transposed else self.stack.mT
        return torch.einsum("eio,ti->teo", stack, x).sum(1) * (x @ self.matrix.mT)


@pytest.mark.parametrize("transposed", [False, True])
def test_updates_of_parameters_are_dense_products(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    stack, matrix, x = normal(3, 5, 4), normal(5, 4), normal(7, 4)
    # As PEFT stores them: rank by rank within an expert in A, expert by expert within a rank in B.
    a, b = normal(6, 4), normal(5, 6)
    dense = torch.stack([b[:, e::3] @ a[2 * e : 2 * e + 2] for e in range(3)])
    one = lora_parameter.Stacked(*lora_parameter.unstacked(a, b, 3), 0.5)
    two = lora_parameter.Stacked(*lora_parameter.unstacked(a[:2], b[:, :2], 1), 2.0)
    stored = stack.mT if transposed else stack
    delta = lora_parameter.added(torch.zeros_like(stored), one, transposed)
    assert_close(delta.mT if transposed else delta, 0.5 * dense, torch.float64)
    base = Pair(stored, matrix, transposed)
    y = lora_parameter.in_parameters(base, {"stack": [one, one], "matrix": [two]}, (x,))
    truth = torch.einsum("eoi,ti->teo", stack + dense, x).sum(1) * (x @ (matrix + 2 * b[:, :2] @ a[:2]).mT)
    assert_close(y, truth, torch.float64)
    assert_same_bits(base.stack, stored)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("of_outputs", [True, False], ids=["outputs", "inputs"])
@pytest.mark.parametrize("kind", ["fused", "no bias", "conv", "volume"])
def test_magnitudes_pass_gradients_through_the_norms(
    kind: str, of_outputs: bool, strength: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(9)
    base = BASES["conv" if kind in BASES["conv"] else "linear"][kind]().to(dtype).requires_grad_(False)
    weight = base.weight
    sides = [size if d == (0 if of_outputs else 1) else 1 for d, size in enumerate(weight.shape)]
    values = [torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2), 1 + torch.rand(sides)]
    x = torch.randn((2, TOKENS, I) if weight.dim() == 2 else (2, 4, 6, 5, 3)[: weight.dim()])
    found = [t.to(dtype).requires_grad_() for t in (x, *values)]
    exact = [t.to(dtype).double().requires_grad_() for t in (x, *values)]

    def changed(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return weight + 0.5 * (b @ a.flatten(1)).view(weight.shape)

    def truth(x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        wide = changed(weight.double(), a, b)
        norms = wide.pow(2).sum([d for d in range(wide.dim()) if sides[d] == 1], keepdim=True).sqrt()
        wide = wide * (1 + strength * (m / norms - 1))
        bias = None if base.bias is None else base.bias.double()
        if wide.dim() == 2:
            return x @ wide.mT + (0 if bias is None else bias)
        return convolution(x, wide, bias, base.stride, base.padding)

    def forms(x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> list[Tensor]:
        mine = magnitudes.Magnitudes(m, of_outputs, strength)
        if weight.dim() > 2:
            return [magnitudes.written_conv(base, x, changed, (a, b), mine)]
        low_rank = [magnitudes.low_rank_linear(x, weight, base.bias, a, b, 0.5, mine)] if of_outputs else []
        return [*low_rank, magnitudes.written_linear(x, weight, base.bias, changed, (a, b), mine)]

    expected = truth(*exact)
    grad = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, exact, grad)
    for number, y in enumerate(forms(*found)):
        assert_close(y, expected, dtype, what=f"output of form {number}")
        got = torch.autograd.grad(y, found, grad.to(dtype), retain_graph=True)
        for name, one, other in zip(("x", "a", "b", "m"), got, gradients, strict=True):
            assert_close(one, other, dtype, what=f"d{name} of form {number}")


def test_a_row_of_zeros_has_no_gradient_through_its_norm() -> None:
    x, weight = torch.randn(3, I), torch.zeros(O, I)
    a, b = torch.randn(2, I, requires_grad=True), torch.zeros(O, 2, requires_grad=True)
    mine = magnitudes.Magnitudes(torch.ones(O, 1))
    y = magnitudes.low_rank_linear(x, weight, None, a, b, 1.0, mine)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(3, O)) and a.grad.isfinite().all() and b.grad.isfinite().all()


def test_butterflies_of_more_features_than_one_pass_turns() -> None:
    torch.manual_seed(10)
    stages = output_rotation.rotations(torch.randn(9, 256, 4, 4, dtype=torch.float64))
    y = torch.randn(3, 1024, dtype=torch.float64)
    expected = y @ F.butterfly_compose(stages)[0].mT
    assert_close(output_rotation.rotated(y, output_rotation.Turn(stages)), expected, torch.float64)
