"""LoKr, two adapters: one of whole factors, one of low-rank ones."""

from __future__ import annotations

import torch

from peftk.methods import lokr
from support.method_forms import Form


def _linear_shapes(s):
    whole = {"w1": (2, 3), "w2": (s[0] // 2, s[1] // 3)}
    return {**whole, "u": (2, 2), "v": (2, 3), "y": (s[0] // 2, 1), "z": (1, s[1] // 3)}


def _conv_shapes(s):
    # Three dimensions would be those of PEFT's update of an nn.Conv1d.
    kernel = (*s[2:], 1) if len(s) == 3 else s[2:]
    whole = {"w1": (2, 2), "w2": (s[0] // 2, s[1] // 2, *kernel)}
    return {**whole, "u": (2, 1), "v": (1, 2), "y": (s[0] // 2, 1), "z": (1, s[1:].numel() // 2)}


def _adapters(t):
    return [lokr.Kronecker((t["w1"],), (t["w2"],), 0.5), lokr.Kronecker((t["u"], t["v"]), (t["y"], t["z"]), 2.0)]


def _weight(weight, bias, t):
    first, second = torch.kron(t["w1"], t["w2"].flatten(1)), torch.kron(t["u"] @ t["v"], t["y"] @ t["z"])
    return weight + (0.5 * first + 2 * second).view(weight.shape), bias


def _merged(weight, bias, t):
    for adapter in _adapters(t):
        weight = lokr.merged(weight, adapter)
    return weight, bias


FORMS = (
    Form("linear", _linear_shapes, lambda base, x, t: lokr.linear(base, x, _adapters(t)), _weight, _merged),
    Form("conv", _conv_shapes, lambda base, x, t: lokr.conv(base, x, _adapters(t)), _weight),
)
