"""DoRA's gain is kept between calls that record nothing, and made again after any write to what it was made of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk import functional as F
from peftk.testing.compare import assert_close, assert_same_bits

OUT, FEATURES, RANK = 37, 83, 5
DTYPES = [torch.float32, torch.bfloat16]


def made(dtype: torch.dtype = torch.float32, bias: bool = True) -> peftk.nn.LoRALinear:
    torch.manual_seed(3)
    base = nn.Linear(FEATURES, OUT, bias=bias).to(dtype)
    layer = peftk.nn.LoRALinear(base, peftk.LoraConfig(r=RANK, use_dora=True))
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    layer.lora_magnitude_vector["default"].weight.data.mul_(torch.linspace(0.5, 2.0, OUT))
    return layer.eval()


def truth(layer: peftk.nn.LoRALinear, x: Tensor) -> Tensor:
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight, a, b, x = (t.detach().double() for t in (base.weight, a, b, x))
    update = layer.scaling["default"] * b @ a
    gain = layer.lora_magnitude_vector["default"].weight.detach().double() / (weight + update).norm(dim=1)
    y = x @ (weight + update).T * gain
    return y if base.bias is None else y + base.bias.detach().double()


@pytest.fixture
def norms(monkeypatch) -> list[Tensor]:
    """What `dora_norm` was called with."""
    seen: list[Tensor] = []
    found = F.dora_norm
    monkeypatch.setattr(F, "dora_norm", lambda weight, *args: (seen.append(weight), found(weight, *args))[1])
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 16, 17, 80])
def test_matches_float64_and_finds_the_norms_once(rows: int, dtype: torch.dtype, bias: bool, norms: list) -> None:
    layer = made(dtype, bias)
    norms.clear()
    x = torch.randn(rows, FEATURES).to(dtype)
    with torch.no_grad():
        for _ in range(3):
            assert_close(layer(x), truth(layer, x), dtype)
            assert_close(layer(x[None]), truth(layer, x)[None], dtype)
    assert len(norms) == 1


def _element(name: str) -> Callable[[peftk.nn.LoRALinear], object]:
    def write(layer: peftk.nn.LoRALinear) -> None:
        dict(layer.named_parameters())[name].data.view(-1)[7:8].add_(3.0)

    return write


def _new_weight(layer: peftk.nn.LoRALinear) -> None:
    layer.base_layer.weight = nn.Parameter(torch.randn_like(layer.base_layer.weight), requires_grad=False)


def _same_words(layer: peftk.nn.LoRALinear) -> None:
    words = layer.base_layer.weight.data.flatten()
    layer.base_layer.weight = nn.Parameter(words.view(FEATURES, OUT).T, requires_grad=False)


def _same_words_and_parameter(layer: peftk.nn.LoRALinear) -> None:
    words = layer.base_layer.weight.data.flatten()
    layer.base_layer.weight.data = words.view(FEATURES, OUT).T


WRITES = {
    "weight": _element("base_layer.weight"),
    "a": _element("lora_A.default.weight"),
    "b": _element("lora_B.default.weight"),
    "magnitude": _element("lora_magnitude_vector.default.weight"),
    "bias": _element("base_layer.bias"),
    "negated": lambda layer: layer.base_layer.weight.data.neg_(),
    "doubled": lambda layer: layer.base_layer.weight.data[3].mul_(2),
    "swapped": lambda layer: layer.base_layer.weight.data.copy_(layer.base_layer.weight.data.flip(1)),
    "another": _new_weight,
    "same words": _same_words,
    "same words, same parameter": _same_words_and_parameter,
    "scale": lambda layer: layer.set_scale("default", 0.25),
}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_no_write_is_overlooked(write: Callable, dtype: torch.dtype, rows: int) -> None:
    layer, x = made(dtype), torch.randn(rows, FEATURES).to(dtype)
    with torch.inference_mode():
        before = layer(x)
        write(layer)
        after = layer(x)
        assert not torch.equal(before, after)
        assert_close(after, truth(layer, x), dtype)
        # Equal calls have equal bits, whether what is kept was made by them or before.
        assert_same_bits(layer(x), after)


def test_training_keeps_nothing_and_is_followed(norms: list) -> None:
    layer, x = made(), torch.randn(2, FEATURES)
    norms.clear()
    with torch.no_grad():
        layer(x)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        layer(x).square().sum().backward()
        assert len(norms) == 2 + 2 * step
        optimizer.step()
        with torch.no_grad():
            assert_close(layer(x), truth(layer, x), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 17])
def test_a_fresh_adapter_keeps_the_bits_of_the_frozen_layer(rows: int, dtype: torch.dtype) -> None:
    layer = peftk.nn.LoRALinear(nn.Linear(FEATURES, OUT).to(dtype), peftk.LoraConfig(r=RANK, use_dora=True)).eval()
    x = torch.randn(rows, FEATURES).to(dtype)
    with torch.no_grad():
        for _ in range(2):
            assert_same_bits(layer(x), layer.base_layer(x))


def test_rows_of_zeros_are_left_alone() -> None:
    layer, x = made(), torch.randn(1, FEATURES)
    layer.base_layer.weight.data[5] = 0
    layer.lora_B["default"].weight.data[5] = 0
    with torch.no_grad():
        for _ in range(2):
            assert_same_bits(layer(x)[:, 5], layer.base_layer.bias[5:6].expand(1, 1)[0])


def test_copies_and_pickles_keep_nothing() -> None:
    layer, x = made(), torch.randn(1, FEATURES)
    with torch.no_grad():
        layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert all(kept._entry is None for kept in other._kept.values())
            other.base_layer.weight.data.mul_(3)
            assert_close(other(x), truth(other, x), torch.float32)
        assert_close(layer(x), truth(layer, x), torch.float32)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Conv2d(6, 9, 3), torch.randn(1, 6, 5, 5)),
        (lambda: nn.Conv2d(6, 9, 3).to(memory_format=torch.channels_last), torch.randn(1, 6, 5, 5)),
        (lambda: nn.Embedding(12, 7), torch.tensor([[1, 2, 11]])),
    ],
)
def test_other_kinds_of_layers_follow_their_weights(layer: Callable[[], nn.Module], x: Tensor, norms: list) -> None:
    base = layer()
    config = peftk.LoraConfig(r=2, use_dora=True, init_lora_weights=False)
    adapted = peftk.nn.layer_class_for(config, base)(base, config).eval()
    for _ in range(2):
        with torch.no_grad():
            first, second = adapted(x), adapted(x)
        recorded = adapted(x).detach()
        assert_close(first, recorded.double(), torch.float32)
        assert_same_bits(first, second)
        base.weight.data.view(-1)[3:4].add_(1.0) if base.weight.is_contiguous() else base.weight.data[0, 0].add_(1.0)
        norms.clear()
