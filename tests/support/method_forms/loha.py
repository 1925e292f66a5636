"""LoHa, two adapters."""

from __future__ import annotations

from peftk.methods import loha
from peftk.testing.cases import hadamard
from support.method_forms import Form

SCALES = (0.5, 2.0)


def _shapes(s):
    four = dict(zip("abcd", ((s[0], 2), (2, s[1:].numel())) * 2, strict=True))
    return {f"{name}{i}": shape for i in range(2) for name, shape in four.items()}


def _factors(t):
    return [[t[f"{name}{i}"] for name in "abcd"] for i in range(2)]


def _adapters(t):
    return [loha.Hadamard(*four, scale) for four, scale in zip(_factors(t), SCALES, strict=True)]


def _weight(weight, bias, t):
    for four, scale in zip(_factors(t), SCALES, strict=True):
        weight = hadamard.weight(weight, *four, scale)
    return weight, bias


def _merged(weight, bias, t):
    for adapter in _adapters(t):
        weight = loha.merged(weight, adapter)
    return weight, bias


FORMS = (
    Form("linear", _shapes, lambda base, x, t: loha.linear(base, x, _adapters(t)), _weight, _merged),
    Form("conv", _shapes, lambda base, x, t: loha.conv(base, x, _adapters(t)), _weight),
)
