"""Linear layers with quantised weights: of torchao, of bitsandbytes, and with a weight that nobody may read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from support.layer_cases import I, O


class Locked(nn.Parameter):
    """A packed weight that says what it is and where, and nothing else."""

    ALLOWED = ("dtype", "device", "shape", "requires_grad", "is_leaf", "grad", "grad_fn")

    def __new__(cls, elements=0):
        return torch.Tensor._make_subclass(cls, torch.zeros(elements, 1, dtype=torch.uint8), False)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        allowed = [getattr(Tensor, name).__get__ for name in cls.ALLOWED]
        if func in (*allowed, Tensor.requires_grad_, Tensor.numel, Tensor.element_size):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise AssertionError(f"the weight was read: {func}")


class LockedLinear(nn.Linear):
    """A linear layer that computes with a weight of its own."""

    def forward(self, x):
        return nn.functional.linear(x, self.hidden, self.bias)


def locked(linear):
    layer = LockedLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.bias = linear.bias
    layer.register_buffer("hidden", linear.weight.detach().clone())
    layer.weight = Locked(layer.hidden.numel() // 2)
    return layer


def torchao_int8(linear):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    return linear


def torchao_int4(linear):
    quantization = pytest.importorskip("torchao.quantization")
    groups = quantization.granularity.PerGroup(4)
    quantization.quantize_(linear, quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups))
    return linear


def bnb(kind, linear, **values):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    cls = getattr(bitsandbytes.nn, kind)
    layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, **values)
    layer.load_state_dict(linear.state_dict())
    layer.requires_grad_(False)
    return layer.to("cpu")


def bnb_int8(linear):
    return bnb("Linear8bitLt", linear, has_fp16_weights=False)


def bnb_nf4(linear):
    return bnb("Linear4bit", linear, quant_type="nf4")


QUANTISE = {
    "locked": locked,
    "torchao_int8": torchao_int8,
    "torchao_int4": torchao_int4,
    "bnb_int8": bnb_int8,
    "bnb_nf4": bnb_nf4,
}
LIBRARIES = [name for name in QUANTISE if name != "locked"]
WEIGHT = {
    "locked": "Locked",
    "torchao_int8": "Int8Tensor",
    "torchao_int4": "IntxUnpackedToInt8Tensor",
    "bnb_int8": "Int8Params",
    "bnb_nf4": "Params4bit",
}
BACKEND = dict(zip(QUANTISE, ("Locked", "torchao", "torchao", "bnb 8bit", "bnb 4bit"), strict=True))


def dequantised(layer):
    """The weight that a quantised layer stands for, by the rules of its library, in float64."""
    weight = layer.weight
    if isinstance(weight, Locked):
        return layer.hidden.double()
    if hasattr(weight, "dequantize") and "torchao" in type(weight).__module__:
        return weight.dequantize().double()
    import bitsandbytes

    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    rows, scales = (weight.CB, weight.SCB) if weight.CB is not None else (layer.state.CB, layer.state.SCB)
    return rows.double() * scales.double()[:, None] / 127


def linear(seed=0, sizes=(I, O), bias=True):
    torch.manual_seed(seed)
    return nn.Linear(*sizes, bias=bias)


class Severed(LockedLinear):
    """A layer that rounds its input, so that no gradient comes back from it."""

    def forward(self, x):
        return super().forward((x.detach() * 8).round() / 8)


def severed():
    layer = locked(linear())
    layer.__class__ = Severed
    return layer


def dynamic():
    quantization = pytest.importorskip("torchao.quantization")
    layer = linear()
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return layer


def adapter_parameters(layer):
    return {name: p for name, p in layer.named_parameters() if "base_layer" not in name}


class Net(nn.Module):
    """Two linear layers that may be quantised, and a head that is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(I, 8), nn.Linear(8, O), nn.Linear(O, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()))


def net(kind=None):
    model = Net()
    if kind is not None:
        model.first, model.second = (QUANTISE[kind](layer) for layer in (model.first, model.second))
    # What transformers says of such a model, by which PEFT chooses its layers.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "bnb_nf4", kind == "bnb_int8"
    return model
