"""DoRA and LoRA on convolutions and embeddings: what the generic layer tests do not see."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.layer_cases import Case, I, O, example, make, reference
from torch import nn

import peftk
from peftk.kernels.torch import dora as torch_dora
from peftk.nn import LoraConfig, LoRAConv, LoRAEmbedding, LoRALinear
from peftk.testing.compare import assert_close, assert_same_bits
from peftk.testing.memory import saved_bytes

DORA = LoraConfig(r=3, lora_alpha=5, use_dora=True, init_lora_weights=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_weight_is_made(dtype, monkeypatch):
    monkeypatch.setattr(torch_dora, "_PIECE", 4096)
    weight, a, b = torch.randn(320, 256, dtype=dtype), torch.randn(2, 256), torch.randn(320, 2)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else (result,):
                if t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                    largest = max(largest, t.numel())
            return result

    with Sizes():
        torch_dora.dora_norm(weight, a, b, 2.0)
    assert largest <= 4096


def test_what_a_layer_keeps_is_the_base_output():
    layer = LoRALinear(nn.Linear(256, 320), DORA)
    x = torch.randn(64, 256, requires_grad=True)
    owned = [x, *layer.parameters()]
    # The base output and the rank-sized product; the gain, and the norms that it was divided by.
    assert saved_bytes(lambda: layer(x), owned) <= 4 * (64 * (320 + 3) + 4 * 320)


def test_norms_follow_the_base_weight():
    """Nothing that the norms are made from outlives a change of the weight."""
    layer = make(DORA)
    torch.manual_seed(1)
    x = torch.randn(3, I)

    def check(dtype=torch.float32):
        assert_close(layer(x.to(dtype)), reference(layer, x.to(dtype)), dtype)

    check()
    with torch.no_grad():
        layer.base_layer.weight.mul_(-3)
    check()
    layer.base_layer.weight.data = torch.randn_like(layer.base_layer.weight)
    check()
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})
    check()
    expected = layer(x)
    layer.merge()
    layer.unmerge()
    assert_same_bits(layer(x), expected)
    layer.double()
    check(torch.float64)
    layer.to(torch.bfloat16)
    check(torch.bfloat16)


@pytest.mark.parametrize("base", ["linear", "conv", "sequence", "volume"])
def test_several_adapters_act_and_merge_in_order(base):
    layer = make(Case(DORA, base))
    torch.manual_seed(2)
    layer.add_adapter("plain", LoraConfig(r=2, init_lora_weights=False))
    layer.add_adapter("b", DORA)
    x = example(Case(DORA, base))
    original = layer.base_layer.weight.double()
    run = torch.nn.functional.linear if base == "linear" else layer.base_layer._conv_forward
    for names in (["default", "b"], ["b", "plain", "default"], ["plain", "b"]):
        layer.set_adapter(names)
        weight = original
        for name in names:
            a, b = layer.lora_A[name].weight.double().flatten(1), layer.lora_B[name].weight.double().flatten(1)
            update = (layer.scaling[name] * b @ a).view(original.shape)
            weight = weight + update
            if layer.use_dora[name]:
                norms = (original + update).detach().flatten(1).norm(dim=1)
                gain = layer.lora_magnitude_vector[name].weight.double().flatten() / norms
                weight = weight * gain.view(-1, *[1] * (weight.dim() - 1))
        expected = run(x.double(), weight, layer.base_layer.bias.double())
        y = layer(x)
        assert_close(y, expected, torch.float32)
        leaves = [p for name, p in layer.named_parameters() if name.split(".")[1] in names]
        found, truth = torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        for one, other in zip(found, truth, strict=True):
            assert_close(one, other, torch.float32)
        layer.merge()
        assert_close(layer(x), expected, torch.float32)
        layer.unmerge()


@pytest.mark.parametrize("base", ["linear", "conv"])
def test_a_bias_that_an_earlier_adapter_adds_is_scaled_when_merged_too(base):
    layer = make(Case(LoraConfig(r=2, init_lora_weights=False, lora_bias=True), base))
    layer.add_adapter("dora", DORA)
    layer.set_adapter(["default", "dora"])
    with torch.no_grad():
        layer.lora_B["default"].bias.fill_(1.0)
        layer.lora_magnitude_vector["dora"].weight.mul_(3.0)
    x = example(Case(DORA, base))
    expected, bias = layer(x), layer.bias.clone()
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["dora"])
    assert_close(layer(x), expected.double(), torch.float32)
    layer.unmerge()
    assert torch.equal(layer.bias, bias)


def test_dropout_reaches_both_products():
    layer = make(LoraConfig(r=3, use_dora=True, lora_dropout=0.5, init_lora_weights=False))
    x = torch.ones(2, I, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    y.sum().backward()
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    torch.manual_seed(3)
    assert torch.equal(layer(x), y)
    # The same mask, found from the product of a base layer that shows it.
    torch.manual_seed(3)
    from peftk.ops.dropout import Dropout

    seen = Dropout(x.detach(), 0.5).dropped().double()
    base, plain = layer.base_layer, (x.detach().double() @ layer.base_layer.weight.double().T)
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    scale = layer.scaling["default"]
    g = layer.lora_magnitude_vector["default"].weight.double() / (base.weight.double() + scale * b @ a).norm(dim=1)
    expected = plain + base.bias.double() + (g - 1) * (seen @ base.weight.double().T) + g * scale * (seen @ a.T @ b.T)
    assert_close(y, expected, torch.float32)
    assert set(grads) == {n for n, p in layer.named_parameters() if p.requires_grad}


def test_a_row_of_zeros_stays_finite():
    base = nn.Linear(I, O)
    with torch.no_grad():
        base.weight[3] = 0
    layer = LoRALinear(base, LoraConfig(r=2, use_dora=True))
    x = torch.randn(2, I, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, base(x))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


class Pictures(nn.Module):
    """One convolution with a geometry of its own."""

    def __init__(self, **geometry):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, **geometry)

    def forward(self, x):
        return self.conv(x)


def test_d14_geometry_of_convolutions():
    x = torch.randn(2, 3, 7, 6)
    for geometry in ({"dilation": 2}, {"padding_mode": "reflect"}):
        values = {"r": 2, "target_modules": ["conv"], "init_lora_weights": False}
        base = Pictures(**geometry)
        ours = peftk.get_peft_model(copy.deepcopy(base), LoraConfig(**values)).eval()
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**values)).eval()
        ours.load_state_dict(theirs.state_dict())
        y = ours(x)
        ours.merge_adapter()
        assert_close(ours(x), y.double(), torch.float32)
        if "dilation" in geometry:
            with pytest.raises(RuntimeError, match="size"):
                theirs(x)
        else:
            with pytest.raises(AssertionError):
                assert_close(theirs(x), y.double(), torch.float32)
        theirs.merge_adapter()
        assert_close(theirs(x), y.double(), torch.float32)


@pytest.mark.parametrize("use_dora", [False, True])
def test_channels_last_stays_channels_last(use_dora):
    torch.manual_seed(4)
    layer = LoRAConv(nn.Conv2d(4, 6, 3, padding=1), LoraConfig(r=2, init_lora_weights=False, use_dora=use_dora))
    if use_dora:
        nn.init.normal_(layer.lora_magnitude_vector["default"].weight)
    x = torch.randn(2, 4, 5, 6)
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close(last, expected.double(), torch.float32)
    assert_close(expected, reference(layer, x), torch.float32)
    layer.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    assert_close(layer(x), expected.double(), torch.float32)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found = torch.autograd.grad(layer(x).square().sum(), wanted)
    for gradient, exact in zip(found, torch.autograd.grad(reference(layer, x).square().sum(), wanted), strict=True):
        assert_close(gradient, exact.double(), torch.float32)


class Scaled(nn.Embedding):
    """An embedding that scales what it looks up, as Gemma's."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.embed_scale


@pytest.mark.parametrize("use_dora", [False, True])
def test_scaled_embeddings(use_dora):
    torch.manual_seed(0)
    values = {"r": 2, "target_modules": ["0"], "init_lora_weights": False, "use_dora": use_dora}
    base = nn.Sequential(Scaled(9, 4))
    ours = peftk.get_peft_model(copy.deepcopy(base), LoraConfig(**values)).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**values)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.tensor([[1, 2], [8, 0]])
    y = ours(x)
    assert_close(y, theirs(x).double(), torch.float32)
    ours.merge_adapter()
    assert_close(ours(x), y.double(), torch.float32)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        LoRAEmbedding(nn.Embedding(9, 4, max_norm=1.0), LoraConfig(r=2))
    with pytest.raises(ValueError, match="lora_bias"):
        LoRAEmbedding(nn.Embedding(9, 4), LoraConfig(r=2, lora_bias=True))
    with pytest.raises(ValueError, match="orthogonal"):
        LoRAConv(nn.Conv2d(4, 4, 1), LoraConfig(r=2, init_lora_weights="orthogonal"))
    with pytest.raises(ValueError, match="use_dora"):
        LoraConfig(use_dora=True, lora_bias=True)
