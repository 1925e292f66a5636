"""The cases that the generic layer tests run for every method, and the naive formula with dense weights in float64.

A module of this package belongs to one method, and says everything that a generic test must know about it:

- `CASES`: random, non-trivial adapters; `IDENTITIES`: fresh adapters that must not change a bit of the output.
- `dense(layer, name, weight, bias)`: the weight and bias that adapter `name` makes of float64 ones, in plain
  differentiable PyTorch that shares nothing with the package.
- `TOYS`: how the toy model of the model tests is adapted. `LARGE`: what must make nothing of the size of a
  half-precision weight in float32. `FULL`: configurations with many fields filled in.
- `ROTATES`: whether it acts on the input of the base layer, which then must pass gradients.
- `TURNS_OUTPUT`, where it is set: an operand is the output of the base layer, which is rounded with its bias.
- `FIRST_NEXT_TO_WEIGHT`, where it is set: the first of several adapters stands next to the weight, and else the last.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftk.methods._base_layer import CONVOLUTIONS
from peftk.nn import AdapterLayer, PeftConfig, layer_class_for

I, O = 12, 10  # noqa: E741


def _gpt2_layer(features=(I, O), bias=True, dtype=torch.float32):
    from transformers.pytorch_utils import Conv1D

    if not bias:
        raise NotImplementedError
    layer = Conv1D(features[1], features[0]).to(dtype)
    nn.init.normal_(layer.bias)
    return layer


def _conv(*shape, kind=nn.Conv2d, **geometry):
    return lambda bias=True, dtype=torch.float32: kind(*shape, bias=bias, dtype=dtype, **geometry)


# Name to how the layer is made and the shapes of the inputs that it is tried with.
BASES = {
    "linear": (
        lambda features=(I, O), bias=True, dtype=torch.float32: nn.Linear(*features, bias=bias, dtype=dtype),
        [(I,), (1, I), (0, I), (5, I), (2, 3, I)],
    ),
    "conv1d": (_gpt2_layer, [(1, I), (0, I), (5, I), (2, 3, I)]),
    "conv": (_conv(4, 6, 3, padding=1), [(2, 4, 5, 6), (1, 4, 1, 1), (4, 5, 5), (0, 4, 5, 5)]),
    "conv_uneven": (
        _conv(4, 6, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), padding_mode="reflect"),
        [(2, 4, 5, 6)],
    ),
    "conv_same": (_conv(4, 6, (2, 3), padding="same"), [(2, 4, 5, 6)]),
    "conv_groups": (_conv(8, 6, 3, groups=2), [(2, 8, 5, 6)]),
    "conv_eight": (_conv(4, 8, 3, padding=1), [(2, 4, 5, 6)]),
    "pointwise": (_conv(I, O, 1), [(2, I, 3, 2), (1, I, 1, 1), (0, I, 3, 2)]),
    "pointwise_strided": (_conv(I, O, 1, stride=2, padding=1), [(2, I, 3, 4)]),
    "sequence": (_conv(4, 6, 3, kind=nn.Conv1d, padding=1), [(2, 4, 7), (1, 4, 1), (4, 5), (0, 4, 5)]),
    "sequence_uneven": (
        _conv(8, 6, 2, kind=nn.Conv1d, groups=2, stride=2, padding=3, dilation=2, padding_mode="circular"),
        [(2, 8, 9)],
    ),
    "volume": (_conv(4, 6, (2, 1, 3), kind=nn.Conv3d, padding=1), [(2, 4, 3, 4, 2), (4, 3, 2, 2), (0, 4, 3, 2, 2)]),
    "volume_same": (
        _conv(4, 6, (1, 2, 3), kind=nn.Conv3d, padding="same", dilation=(1, 2, 1), padding_mode="replicate"),
        [(2, 4, 2, 3, 3)],
    ),
    "embedding": (
        lambda bias=False, dtype=torch.float32: nn.Embedding(11, 8, padding_idx=2, dtype=dtype),
        [(3,), (2, 5), (0,)],
    ),
}


@dataclass(frozen=True)
class Case:
    """One adapter on one layer.

    Attributes:
        config: Its configuration.
        base: Which of `BASES` it is on.
        together: The name of the case whose adapter may act on the same layer, for tests of several adapters.
    """

    config: PeftConfig
    base: str = "linear"
    together: str | None = None

    @property
    def decomposes(self) -> bool:
        """Whether the weight is taken apart into directions and norms, as DoRA does."""
        return bool(getattr(self.config, "use_dora", False))

    def shapes(self):
        return BASES[self.base][1]


@dataclass(frozen=True)
class Toy:
    """How the toy model is adapted: a configuration, and the fields that give it dropout, where the method has any."""

    config: PeftConfig
    dropout: dict[str, float]


def make(case: Case | PeftConfig, *, dtype=torch.float32, bias=True, seed=0, features=None, **kwargs) -> AdapterLayer:
    """Build the base layer and adapt it; a bare configuration goes on the linear layer."""
    if isinstance(case, PeftConfig):
        case = Case(case)
    torch.manual_seed(seed)
    sizes = {} if features is None else {"features": features}
    base = BASES[case.base][0](bias=bias, dtype=dtype, **sizes)
    return layer_class_for(case.config, base)(base, case.config, **kwargs)


def example(layer_or_case: Any, shape=None, dtype=torch.float32) -> Tensor:
    """A random input for a case."""
    shape = layer_or_case.shapes()[-1 if layer_or_case.base in ("linear", "conv1d") else 0] if shape is None else shape
    if layer_or_case.base == "embedding":
        return torch.randint(11, shape)
    return torch.randn(shape, dtype=dtype)


def with_hook(layer):
    """Make the layer take the path that calls its base layer."""
    layer.base_layer.register_forward_hook(lambda *_: None)
    return layer


def reference(layer: AdapterLayer, x: Tensor, names=("default",)) -> Tensor:
    """The output in float64: the base layer with the dense weight that the adapters make."""
    base = layer.base_layer
    weight = base.weight.double()
    bias = None if layer.bias is None else base.bias.double()
    if layer.kind == "Conv1D":
        weight = weight.T
    for name in _order(layer, names):
        weight, bias = _dense_of(layer)(layer, name, weight, bias)
    if isinstance(base, CONVOLUTIONS):
        return base._conv_forward(x.double(), weight, bias)
    if layer.kind == "Embedding":
        return torch.nn.functional.embedding(x, weight)
    return torch.nn.functional.linear(x.double(), weight, bias)


def dense_weight(layer: AdapterLayer, names=("default",)) -> tuple[Tensor, Tensor | None]:
    """The weight (as the base layer stores it) and bias in float64 once the adapters are merged."""
    weight = layer.base_layer.weight.double()
    bias = None if layer.bias is None else layer.bias.double()
    weight = weight.T if layer.kind == "Conv1D" else weight
    for name in _order(layer, names):
        weight, bias = _dense_of(layer)(layer, name, weight, bias)
    return (weight.T if layer.kind == "Conv1D" else weight), bias


def _order(layer, names):
    """The adapter next to the weight first: the last one, unless the method says otherwise (as PEFT's BOFT does)."""
    # What is looked up is acted on afterwards.
    first = layer.config_class in _FIRST_NEXT_TO_WEIGHT or layer.kind == "Embedding"
    return names if first else reversed(names)


_METHODS = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
CASES: dict[str, Case] = {name: case for method in _METHODS for name, case in method.CASES.items()}
IDENTITIES: dict[str, Case] = {name: case for method in _METHODS for name, case in method.IDENTITIES.items()}
TOYS: dict[str, Toy] = {name: toy for method in _METHODS for name, toy in method.TOYS.items()}
LARGE: dict[str, PeftConfig] = {name: config for method in _METHODS for name, config in method.LARGE.items()}
FULL: list[PeftConfig] = [config for method in _METHODS for config in method.FULL]
ROTATING = {type(case.config) for method in _METHODS if method.ROTATES for case in method.CASES.values()}
TURNING = {
    type(case.config) for method in _METHODS for case in method.CASES.values() if getattr(method, "TURNS_OUTPUT", False)
}
_FIRST_NEXT_TO_WEIGHT = {
    type(case.config)
    for method in _METHODS
    for case in method.CASES.values()
    if getattr(method, "FIRST_NEXT_TO_WEIGHT", False)
}
_DENSE = {type(case.config): method.dense for method in _METHODS for case in method.CASES.values()}


def _dense_of(layer):
    return _DENSE[layer.config_class]
