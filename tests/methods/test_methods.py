"""Every method from tensors alone: base layers of torch, the functions of `peftk.methods`, dense formulas beside."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as tf

import peftk.methods
from peftk.methods import (
    adalora,
    adaption_prompt,
    boft,
    c3a,
    dora,
    loha,
    lokr,
    lora,
    lora_conv,
    lora_embedding,
    oft,
    xlora,
)
from peftk.methods._base_layer import plain_tensors
from peftk.testing.compare import assert_close

I, O, TOKENS = 12, 8, 5  # noqa: E741


class Opaque(nn.Linear):
    """A linear layer that may only be called, as a quantised one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Conv1D(nn.Module):
    """Stores its weight as (in, out); only the name of the class tells it from others."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def observed() -> nn.Linear:
    layer = nn.Linear(I, O)
    layer.register_forward_hook(lambda *_: None)
    return layer


def conv(kernel: int = 3, groups: int = 1, padding: int | str = 1, mode: str = "zeros") -> nn.Conv2d:
    return nn.Conv2d(4, 8, kernel, padding=padding, groups=groups, padding_mode=mode)


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "fused": lambda: nn.Linear(I, O),
    "no bias": lambda: nn.Linear(I, O, bias=False),
    "called": observed,
    "opaque": lambda: Opaque(I, O),
    "Conv1D": lambda: Conv1D(O, I),
}
CONVS: dict[str, Callable[[], nn.Module]] = {
    "conv": conv,
    "pointwise": lambda: conv(1, padding=0),
    "circular": lambda: conv(padding="same", mode="circular"),
}


@dataclass
class Form:
    """One way through one method.

    Attributes:
        base: Makes the layer.
        shapes: The tensors of the adapters, by name.
        run: What the method computes: (base, x, tensors).
        weight: The dense weight with the outputs as rows, and the bias, from those of the base and the tensors.
        kind: "linear", "conv" or "embedding".
    """

    base: Callable[[], nn.Module]
    shapes: dict[str, tuple[int, ...]]
    run: Callable[[nn.Module, Tensor, dict[str, Tensor]], Tensor]
    weight: Callable[[Tensor, Tensor | None, dict[str, Tensor]], tuple[Tensor, Tensor | None]]
    kind: str = "linear"


def two_low_rank(t: dict[str, Tensor]) -> list[lora.LowRank]:
    return [lora.LowRank(t["a"], t["b"], 0.5, bias=t["bias"]), lora.LowRank(t["c"], t["d"], 2.0, t["gate"])]


def lora_weight(w: Tensor, bias: Tensor | None, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    a, b, c, d = (t[n].flatten(1) for n in "abcd")
    added = 0.5 * b @ a + 2 * (d * t["gate"]) @ c
    return w + added.view(w.shape), t["bias"] if bias is None else bias + t["bias"]


def dora_weight(w: Tensor, bias: Tensor | None, t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    adapted = w + 0.5 * (t["b"].flatten(1) @ t["a"].flatten(1)).view(w.shape)
    norms = adapted.flatten(1).norm(dim=1).detach()
    return adapted * (t["m"].view(-1) / norms).view(-1, *[1] * (w.dim() - 1)), bias


def rotation(square: Tensor) -> Tensor:
    eye = torch.eye(square.shape[-1], dtype=square.dtype)
    return (eye - square) @ torch.linalg.inv(eye + square)


def skew(packed: Tensor, size: int) -> Tensor:
    rows, columns = torch.triu_indices(size, size, 1)
    square = packed.new_zeros(len(packed), size, size)
    square[:, rows, columns] = packed
    return square - square.mT


def oft_weight(w: Tensor, bias: Tensor | None, t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    first, second = (torch.block_diag(*rotation(skew(t[n], 4))) for n in ("p", "q"))
    # The first one stands next to x.
    return (w.flatten(1) @ (first @ second).mT).view(w.shape), bias


def boft_weight(w: Tensor, bias: Tensor | None, t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    blocks = rotation((t["q"][0] - t["q"][0].mT) / 2)
    return t["s"].view(-1, *[1] * (w.dim() - 1)) * (w.flatten(1) @ torch.block_diag(*blocks).mT).view(w.shape), bias


def loha_weight(w: Tensor, bias: Tensor | None, t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    for i, scale in ((1, 0.5), (2, 2.0)):
        delta = (t[f"a{i}"] @ t[f"b{i}"]) * (t[f"c{i}"] @ t[f"d{i}"])
        w = w + (scale * delta).view(w.shape)
    return w, bias


def lokr_weight(w: Tensor, bias: Tensor | None, t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    first = torch.kron(t["w1"], t["w2"].flatten(1))
    second = torch.kron(t["u"] @ t["v"], t["y"] @ t["z"])
    return w + (0.5 * first + 2 * second).view(w.shape), bias


def circulant(kernel: Tensor) -> Tensor:
    rows = [torch.cat([torch.stack([k.roll(i) for i in range(len(k))]) for k in row], 1) for row in kernel]
    return torch.cat(rows)


def c3a_weight(w: Tensor, bias: Tensor | None, t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    added = (circulant(t["k"]) + circulant(t["l"])) / w.flatten(1).shape[1]
    return w + added.view(w.shape), bias


def forms() -> dict[str, Form]:
    found = {}
    pair = {"a": (2, I), "b": (O, 2), "bias": (O,), "c": (3, I), "d": (O, 3), "gate": (3,)}
    hadamard = {f"{n}{i}": s for i in (1, 2) for n, s in (("a", (O, 2)), ("b", (2, I)), ("c", (O, 3)), ("d", (3, I)))}
    kronecker = {"w1": (2, 3), "w2": (4, 4), "u": (2, 2), "v": (2, 3), "y": (4, 1), "z": (1, 4)}
    for name, base in LINEARS.items():
        found[f"lora {name}"] = Form(base, pair, lambda b, x, t: lora.linear(b, x, two_low_rank(t)), lora_weight)
        found[f"dora {name}"] = Form(
            base,
            {"a": (2, I), "b": (O, 2), "m": (O,)},
            lambda b, x, t: lora.linear(b, x, [lora.LowRank(t["a"], t["b"], 0.5, magnitude=t["m"])]),
            dora_weight,
        )
        found[f"adalora {name}"] = Form(
            base,
            {"a": (3, I), "b": (O, 3), "e": (3, 1)},
            lambda b, x, t: adalora.linear(b, x, [adalora.low_rank(adalora.Triplets(t["a"], t["b"], t["e"], 2.0, 4))]),
            lambda w, bias, t: (w + 2 / (4 + 1e-5) * (t["b"] * t["e"].view(-1)) @ t["a"], bias),
        )
        found[f"xlora {name}"] = Form(
            base,
            {"a": (2, I), "b": (O, 2), "c": (1, I), "d": (O, 1), "gate": (3,)},
            lambda b, x, t: xlora.linear(b, x, [lora.LowRank(t["a"], t["b"]), lora.LowRank(t["c"], t["d"])], t["gate"]),
            lambda w, bias, t: (
                w + (torch.cat([t["b"], t["d"]], 1) * t["gate"]) @ torch.cat([t["a"], t["c"]]),
                bias,
            ),
        )
        found[f"oft {name}"] = Form(
            base,
            {"p": (3, 6), "q": (3, 6)},
            lambda b, x, t: oft.linear(b, x, [oft.rotations(t["p"], 4), oft.rotations(t["q"], 4)]),
            oft_weight,
        )
        found[f"boft {name}"] = Form(
            base,
            {"q": (1, 3, 4, 4), "s": (O, 1)},
            lambda b, x, t: boft.linear(b, x, [boft.Butterfly(boft.rotations(t["q"]), t["s"])]),
            boft_weight,
        )
        found[f"loha {name}"] = Form(
            base,
            hadamard,
            lambda b, x, t: loha.linear(
                b, x, [loha.Hadamard(*(t[f"{n}{i}"] for n in "abcd"), s) for i, s in ((1, 0.5), (2, 2.0))]
            ),
            loha_weight,
        )
        found[f"lokr {name}"] = Form(
            base,
            kronecker,
            lambda b, x, t: lokr.linear(
                b,
                x,
                [
                    lokr.Kronecker((t["w1"],), (t["w2"],), 0.5),
                    lokr.Kronecker((t["u"], t["v"]), (t["y"], t["z"]), 2.0),
                ],
            ),
            lokr_weight,
        )
        found[f"c3a {name}"] = Form(
            base,
            {"k": (2, 3, 4), "l": (4, 6, 2)},
            lambda b, x, t: c3a.linear(b, x, [t["k"], t["l"]]),
            c3a_weight,
        )
    for name, base in CONVS.items():
        k = 1 if name == "pointwise" else 3
        filters = 4 * k * k
        image = {"a": (2, 4, k, k), "b": (8, 2, 1, 1)}
        found[f"lora {name}"] = Form(
            base,
            {**image, "bias": (8,)},
            lambda b, x, t: lora_conv.conv2d(b, x, [lora.LowRank(t["a"], t["b"], 0.5, bias=t["bias"])]),
            lambda w, bias, t: (w + 0.5 * (t["b"].flatten(1) @ t["a"].flatten(1)).view(w.shape), bias + t["bias"]),
            "conv",
        )
        found[f"dora {name}"] = Form(
            base,
            {**image, "m": (1, 8, 1, 1)},
            lambda b, x, t: lora_conv.conv2d(b, x, [lora.LowRank(t["a"], t["b"], 0.5, magnitude=t["m"])]),
            dora_weight,
            "conv",
        )
        found[f"xlora {name}"] = Form(
            base,
            {**image, "c": (1, 4, k, k), "d": (8, 1, 1, 1), "gate": (3,)},
            lambda b, x, t: xlora.conv2d(b, x, [lora.LowRank(t["a"], t["b"]), lora.LowRank(t["c"], t["d"])], t["gate"]),
            lambda w, bias, t: (
                w
                + (
                    (torch.cat([t["b"], t["d"]], 1).flatten(1) * t["gate"]) @ torch.cat([t["a"], t["c"]]).flatten(1)
                ).view(w.shape),
                bias,
            ),
            "conv",
        )
        found[f"oft {name}"] = Form(
            base,
            {"p": (filters // 4, 6), "q": (filters // 4, 6)},
            lambda b, x, t: oft.conv2d(b, x, [oft.rotations(t["p"], 4), oft.rotations(t["q"], 4)]),
            oft_weight,
            "conv",
        )
        found[f"boft {name}"] = Form(
            base,
            {"q": (1, filters // 4, 4, 4), "s": (1, 8)},
            lambda b, x, t: boft.conv2d(b, x, [boft.Butterfly(boft.rotations(t["q"]), t["s"])]),
            boft_weight,
            "conv",
        )
        found[f"loha {name}"] = Form(
            base,
            {f"{n}{i}": s for i in (1, 2) for n, s in zip("abcd", ((8, 2), (2, filters)) * 2, strict=True)},
            lambda b, x, t: loha.conv2d(
                b, x, [loha.Hadamard(*(t[f"{n}{i}"] for n in "abcd"), s) for i, s in ((1, 0.5), (2, 2.0))]
            ),
            loha_weight,
            "conv",
        )
        found[f"lokr {name}"] = Form(
            base,
            {"w1": (2, 2), "w2": (4, 2, k, k), "u": (2, 1), "v": (1, 2), "y": (4, 1), "z": (1, 2 * k * k)},
            lambda b, x, t: lokr.conv2d(
                b,
                x,
                [
                    lokr.Kronecker((t["w1"],), (t["w2"],), 0.5),
                    lokr.Kronecker((t["u"], t["v"]), (t["y"], t["z"]), 2.0),
                ],
            ),
            lokr_weight,
            "conv",
        )
    found["c3a pointwise"] = Form(
        CONVS["pointwise"],
        {"k": (2, 1, 4), "l": (4, 2, 2)},
        lambda b, x, t: c3a.conv2d(b, x, [t["k"], t["l"]]),
        c3a_weight,
        "conv",
    )
    for form, shapes, run, weight in (
        (
            "lora",
            {"a": (2, I), "b": (O, 2)},
            lambda b, x, t: lora_embedding.embedding(b, x, [lora.LowRank(t["a"], t["b"], 0.5)]),
            lambda w, bias, t: (w + 0.5 * t["b"] @ t["a"], None),
        ),
        (
            "dora",
            {"a": (2, I), "b": (O, 2), "m": (O,)},
            lambda b, x, t: lora_embedding.embedding(b, x, [lora.LowRank(t["a"], t["b"], 0.5, magnitude=t["m"])]),
            dora_weight,
        ),
        (
            "xlora",
            {"a": (2, I), "b": (O, 2), "gate": (2,)},
            lambda b, x, t: xlora.embedding(b, x, [lora.LowRank(t["a"], t["b"])], t["gate"]),
            lambda w, bias, t: (w + (t["b"] * t["gate"]) @ t["a"], None),
        ),
    ):
        found[f"{form} embedding"] = Form(lambda: nn.Embedding(I, O), shapes, run, weight, "embedding")
    return found


FORMS = forms()


def dense(form: Form, base: nn.Module, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    """The output of the dense weight that the formula gives."""
    own = base.weight.detach()
    bias = None if form.kind == "embedding" or base.bias is None else base.bias.detach()
    weight, bias = form.weight(own if isinstance(base, (nn.Linear, nn.Conv2d)) else own.mT, bias, t)
    if form.kind == "embedding":
        return tf.embedding(x, weight.mT)
    if form.kind == "linear":
        return tf.linear(x, weight, bias)
    pad = base._reversed_padding_repeated_twice
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    return tf.conv2d(tf.pad(x, pad, mode=mode), weight, bias)


def inputs(form: Form, dtype: torch.dtype) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    base = form.base().to(dtype).requires_grad_(False)
    if form.kind == "embedding":
        x = torch.randint(I, (3, TOKENS))
    else:
        x = torch.randn((2, TOKENS, I) if form.kind == "linear" else (2, 4, 6, 5), dtype=dtype).requires_grad_()
    tensors = {name: (0.4 * torch.randn(shape, dtype=dtype)).requires_grad_() for name, shape in form.shapes.items()}
    return base, x, tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", FORMS)
def test_output_and_gradients_are_those_of_the_dense_weight(name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    base, x, tensors = inputs(form, dtype)
    wide = copy.deepcopy(base).double()
    exact = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    far = x.detach().double().requires_grad_() if x.is_floating_point() else x
    y, truth = form.run(base, x, tensors), dense(form, wide, far, exact)
    assert_close(y, truth, dtype, what="output")
    grad = 1 + torch.randn(y.shape, dtype=torch.float64)
    leaves = [*tensors, *(["x"] if x.is_floating_point() else [])]
    found = torch.autograd.grad(y, [x if n == "x" else tensors[n] for n in leaves], grad.to(y))
    expected = torch.autograd.grad(truth, [far if n == "x" else exact[n] for n in leaves], grad.to(y).double())
    for n, left, right in zip(leaves, found, expected, strict=True):
        assert_close(left, right, dtype, what=f"d{n}")
    with torch.no_grad():
        assert_close(form.run(base, x, tensors), truth, dtype, what="output without gradients")


@pytest.mark.parametrize("name", [n for n in FORMS if FORMS[n].kind == "linear"])
def test_which_forms_run_the_base_layer_inside(name: str) -> None:
    """The forms are what they are called: plain layers are not called, and others are, once."""
    form = FORMS[name]
    base, x, tensors = inputs(form, torch.float32)
    plain = name.split(" ", 1)[1] in ("fused", "no bias")
    assert (plain_tensors(base, x) is not None) is plain
    calls = []
    base.forward = lambda x, forward=base.forward: calls.append(1) or forward(x)
    form.run(base, x, tensors)
    assert len(calls) == 1, "a replaced forward is called"


def test_merged_weights_are_the_dense_ones() -> None:
    torch.manual_seed(0)
    for name, form in FORMS.items():
        if form.kind != "linear" or not name.endswith("fused"):
            continue
        base, _, tensors = inputs(form, torch.float64)
        t = {n: v.detach() for n, v in tensors.items()}
        weight, bias = form.weight(base.weight.detach(), base.bias.detach(), t)
        method = name.split()[0]
        own = base.weight.detach(), base.bias.detach()
        found_bias = bias
        if method in ("lora", "dora", "adalora"):
            found, found_bias = own
            adapters = {
                "lora": lambda t=t: two_low_rank(t),
                "dora": lambda t=t: [lora.LowRank(t["a"], t["b"], 0.5, magnitude=t["m"])],
                "adalora": lambda t=t: [adalora.low_rank(adalora.Triplets(t["a"], t["b"], t["e"], 2.0, 4))],
            }[method]()
            for adapter in adapters:
                found, found_bias = lora.merged(found, found_bias, adapter, *own)
        elif method == "oft":
            found = oft.merged(oft.merged(own[0], oft.rotations(t["q"], 4)), oft.rotations(t["p"], 4))
            assert_close(
                oft.rotation(oft.rotations(t["p"], 4), 3), torch.block_diag(*rotation(skew(t["p"], 4))), torch.float64
            )
        elif method == "boft":
            found = boft.merged(own[0], boft.Butterfly(boft.rotations(t["q"]), t["s"]))
        elif method == "loha":
            found = own[0]
            for i, s in ((1, 0.5), (2, 2.0)):
                found = loha.merged(found, loha.Hadamard(*(t[f"{n}{i}"] for n in "abcd"), s))
        elif method == "lokr":
            found = lokr.merged(own[0], lokr.Kronecker((t["w1"],), (t["w2"],), 0.5))
            found = lokr.merged(found, lokr.Kronecker((t["u"], t["v"]), (t["y"], t["z"]), 2.0))
        elif method == "c3a":
            found = c3a.merged(c3a.merged(own[0], t["k"]), t["l"])
            assert_close(c3a.update(t["k"]), circulant(t["k"]) / I, torch.float64)
        else:
            assert method == "xlora", method
            continue
        assert_close(found, weight, torch.float64, what=f"weight of {method}")
        assert_close(found_bias, bias, torch.float64, what=f"bias of {method}")


@pytest.mark.parametrize("name", ["fused", "called", "Conv1D"])
def test_low_rank_batches_that_mix_adapters(name: str) -> None:
    torch.manual_seed(2)
    base = LINEARS[name]().requires_grad_(False)
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


def test_every_method_is_here() -> None:
    """A new method needs a file beside this one, with tests from tensors alone that name its module."""
    text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py")))
    for module in pkgutil.iter_modules(peftk.methods.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"peftk.methods.{module.name}")
            assert f"{module.name}." in text.replace("peftk.methods.", ""), (
                f"peftk.methods.{module.name} is not run: put a test of it beside this file"
            )
    assert "peftk" + ".nn" not in text.replace("`peftk.nn`", ""), "no layer of the package is in sight"


@pytest.mark.parametrize("pair", [False, True])
def test_scale_of_lokr_may_be_a_tensor(pair: bool) -> None:
    """In the dense update and in a merged weight as in a forward pass."""
    first = (torch.randn(2, 1), torch.randn(1, 3)) if pair else (torch.randn(2, 3),)
    w2, weight = torch.randn(4, 5), torch.randn(8, 15)
    w1 = first[0].double() @ first[1].double() if pair else first[0].double()
    dense = 0.75 * torch.kron(w1, w2.double())
    adapter = lokr.Kronecker(first, (w2,), torch.tensor(0.75))
    assert_close(lokr.update(adapter), dense, torch.float32)
    assert_close(lokr.merged(weight, adapter), weight + dense, torch.float32)
