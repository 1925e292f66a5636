"""Every adapted layer on its own: formulas, dtypes, the call of the base layer, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layer_cases import CASES, IDENTITIES, I, O, example, make, reference, with_hook
from torch import nn

from peftk.nn import LoraConfig, LoRALinear, OFTConfig, OFTLinear, layer_class_for
from peftk.nn.oft import nearest_divisor
from peftk.testing.compare import assert_close


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_follow_the_formula(name, bias, fused):
    case = CASES[name]
    if (case.base == "conv1d" and not bias) or (case.base == "embedding" and bias):
        return
    layer = make(case, bias=bias)
    if not fused:
        with_hook(layer)
    for shape in case.shapes():
        x = example(case, shape)
        x = x.requires_grad_() if x.is_floating_point() else x
        layer.zero_grad()
        y = layer(x)
        assert y.dtype == (x.dtype if x.is_floating_point() else torch.float32)
        weights = torch.randn(y.shape)
        (y * weights).sum().backward()
        trained = [p for p in layer.parameters() if p.requires_grad]
        grads = [p.grad for p in trained]
        if x.is_floating_point():
            trained, grads = [x, *trained], [x.grad, *grads]
        y64 = reference(layer, x)
        expected = torch.autograd.grad((y64 * weights).sum(), trained)
        assert_close(y, y64, torch.float32)
        for grad, want in zip(grads, expected, strict=True):
            assert grad is not None
            assert_close(grad, want.double(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", IDENTITIES)
def test_a_fresh_adapter_changes_no_bit(name, fused, dtype):
    case = IDENTITIES[name]
    for bias in {"conv1d": [True], "embedding": [False]}.get(case.base, [True, False]):
        layer = make(case, dtype=dtype, bias=bias)
        base = copy.deepcopy(layer.base_layer)
        if not fused:
            with_hook(layer)
        for shape in case.shapes():
            x = example(case, shape, dtype)
            assert torch.equal(layer(x), base(x))


def test_scales_are_those_of_the_papers():
    assert make(CASES["lora"]).scaling["default"] == 5 / 3
    assert make(CASES["rslora"]).scaling["default"] == 6 / 2


class Rounding(nn.Linear):
    """A linear layer that answers in another dtype."""

    def forward(self, x):
        return super().forward(x).bfloat16()


def test_the_output_has_the_dtype_of_the_base_layer():
    layer = LoRALinear(Rounding(I, O), CASES["lora"].config)
    x = torch.randn(3, I)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, reference(layer, x), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_bases_get_float32_parameters(name, dtype):
    case = CASES[name]
    layer = make(case, dtype=dtype, bias=case.base != "embedding")
    adapter = [p for n, p in layer.named_parameters() if "base_layer" not in n]
    assert {p.dtype for p in adapter} == {torch.float32}
    # As with PEFT, the initial values are those of the base dtype; but DoRA's magnitudes are the exact norms.
    rounded = [p for n, p in layer.named_parameters() if "base_layer" not in n and "magnitude" not in n]
    assert all(torch.equal(p, p.to(dtype).float()) for p in rounded)
    x = example(case, dtype=dtype)
    x = x.requires_grad_() if x.is_floating_point() else x
    for variant in (layer, with_hook(copy.deepcopy(layer))):
        y = variant(x)
        assert y.dtype == dtype
        assert_close(y, reference(layer, x.detach()), dtype)
        y.sum().backward()
        assert all(p.grad is not None for p in variant.parameters() if p.requires_grad)
    plain = make(case, dtype=dtype, bias=case.base != "embedding", autocast_adapter_dtype=False)
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert plain(x).dtype == dtype


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.together])
def test_autocast_computes_in_the_autocast_dtype(name):
    layer = make(CASES[name])
    x = example(CASES[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        # As in PEFT, an embedding stays in float32.
        assert y.dtype == layer.base_layer(x).dtype
    assert_close(y, reference(layer, x), y.dtype)


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_fresh_adapter_changes_no_bit_under_autocast(name):
    case = IDENTITIES[name]
    layer, x = make(case, bias=case.base != "embedding"), example(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))


class Doubled(nn.Linear):
    """A linear layer whose forward is not the plain one."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_the_base_layer_is_called_when_its_call_matters():
    x = torch.randn(3, I)
    for config in (CASES["lora"].config, CASES["oft"].config):
        calls = []
        layer = make(config)
        expected = layer(x)
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            handle = getattr(layer.base_layer, register)(lambda *args, calls=calls: calls.append(1))
            assert_close(layer(x), expected.double(), torch.float32)
            handle.remove()
        assert len(calls) == 2
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_, calls=calls: calls.append(m))
        assert_close(layer(x), expected.double(), torch.float32)
        handle.remove()
        assert layer.base_layer in calls
        layer.base_layer.forward = lambda x: x[..., :O] * 0
        assert not layer(x * 0).any()
        subclass = layer_class_for(config, base := Doubled(I, O))(base, config)
        assert torch.equal(subclass(x * 0), 2 * subclass.base_layer.bias.expand(3, O))
        parametrised = make(config)
        nn.utils.parametrizations.weight_norm(parametrised.base_layer)
        assert_close(parametrised(x), reference(parametrised, x), torch.float32)
        with pytest.raises(ValueError, match="parametrization"):
            parametrised.merge()
        trained = make(config)
        trained.base_layer.weight.requires_grad_(True)
        trained(x).sum().backward()
        assert trained.base_layer.weight.grad is not None


@pytest.mark.parametrize(
    ("number", "wanted", "expected"), [(60, 32, 30), (12, 5, 4), (12, 100, 12), (9, 6, 3), (9, 7, 9), (8, 6, 4)]
)
def test_a_size_that_does_not_divide_becomes_the_nearest_divisor(number, wanted, expected):
    assert nearest_divisor(number, wanted) == expected
    with pytest.warns(UserWarning, match=f"{wanted} does not divide.*{expected} is used"):
        layer = make(OFTConfig(oft_block_size=wanted), features=(number, 4))
    assert layer.oft_block_size["default"] == expected
    if expected < number:
        with pytest.warns(UserWarning, match=f"r: {wanted} does not divide.*{expected} is used"):
            layer = make(OFTConfig(r=wanted, oft_block_size=0), features=(number, 4))
        assert layer.r["default"] == expected


def test_blocks_of_size_one_are_refused():
    with pytest.raises(ValueError, match="size 1"), pytest.warns(UserWarning, match="does not divide"):
        make(OFTConfig(oft_block_size=32), features=(127, 4))


class Quantised(nn.Linear):
    """A linear layer with packed integers."""

    def __init__(self):
        super().__init__(4, 4)
        del self.weight
        self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    "base",
    [nn.ConvTranspose3d(4, 4, 1), nn.LayerNorm(4), Quantised(), nn.LazyLinear(4), nn.LazyConv2d(4, 1), nn.Identity()],
)
def test_unsupported_layers_are_refused(base):
    for config in (LoraConfig(r=1), OFTConfig(oft_block_size=2)):
        with pytest.raises(TypeError, match=rf"'a\.b'.*{type(base).__name__}.*support"):
            layer_class_for(config, nn.Linear(4, 4))(base, config, module_name="a.b")
        with pytest.raises(TypeError, match=rf"'a\.b'.*{type(base).__name__}.*support"):
            layer_class_for(config, base, "a.b")


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "..", "a\\b"])
def test_bad_adapter_names_are_refused(name):
    with pytest.raises(ValueError, match="adapter_name"):
        make(LoraConfig(), adapter_name=name)


def test_bad_calls_are_refused_by_name():
    layer = make(LoraConfig(r=2))
    with pytest.raises(TypeError, match="OFTConfig"):
        OFTLinear(nn.Linear(4, 4), LoraConfig())
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("default", LoraConfig())
    with pytest.raises(TypeError, match="adapter_names"):
        layer.merge(adapter_names="default")
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        layer(torch.randn(3, I + 1))
    with pytest.warns(UserWarning, match="nothing is merged"):
        layer.unmerge()
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        make(LoraConfig(fan_in_fan_out=True))
