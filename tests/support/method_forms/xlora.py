"""X-LoRA, two experts under one gate, which is of one input and cannot be merged."""

from __future__ import annotations

import torch

from peftk.methods import xlora
from peftk.methods.lora import LowRank
from support.method_forms import Form, single


def _experts(t):
    return [LowRank(t["a"], t["b"]), LowRank(t["c"], t["d"])]


def _weight(weight, bias, t):
    a, b = (torch.cat(pair, dim).flatten(1) for pair, dim in (((t["a"], t["c"]), 0), ((t["b"], t["d"]), 1)))
    return weight + ((b * t["gate"]) @ a).view(weight.shape), bias


def _conv_shapes(s):
    second = {"b": (s[0], 2, *single(s)), "d": (s[0], 1, *single(s))}
    return {"a": (2, *s[1:]), "c": (1, *s[1:]), **second, "gate": (3,)}


FORMS = (
    Form(
        "linear",
        lambda s: {"a": (2, s[1]), "b": (s[0], 2), "c": (1, s[1]), "d": (s[0], 1), "gate": (3,)},
        lambda base, x, t: xlora.linear(base, x, _experts(t), t["gate"]),
        _weight,
    ),
    Form(
        "conv",
        _conv_shapes,
        lambda base, x, t: xlora.conv(base, x, _experts(t), t["gate"]),
        _weight,
    ),
    Form(
        "embedding",
        lambda s: {"a": (2, s[1]), "b": (s[0], 2), "c": (1, s[1]), "d": (s[0], 1), "gate": (3,)},
        lambda base, x, t: xlora.embedding(base, x, _experts(t), t["gate"]),
        _weight,
    ),
)
