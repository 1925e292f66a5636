"""BOFT, two factors."""

from __future__ import annotations

import torch

from peftk.methods import boft
from peftk.testing.cases import butterfly, cayley
from support.method_forms import IMAGES, Form


def _shapes(s):
    return {"q": (2, s[1:].numel() // 2, 2, 2), "s": (1, s[0]) if len(s) == 4 else (s[0], 1)}


def _adapters(t):
    return [boft.Butterfly(boft.rotations(t["q"]), t["s"])]


def _weight(weight, bias, t):
    first, second = butterfly.stages(torch.stack([cayley.transform(stage, 2) for stage in t["q"]]))
    rotated = t["s"].view(-1, 1) * (weight.flatten(1) @ (second @ first).mT)
    return rotated.view(weight.shape), bias


FORMS = (
    Form(
        "linear",
        _shapes,
        lambda base, x, t: boft.linear(base, x, _adapters(t)),
        _weight,
        lambda weight, bias, t: (boft.merged(weight, *_adapters(t)), bias),
    ),
    Form("conv", _shapes, lambda base, x, t: boft.conv2d(base, x, _adapters(t)), _weight, bases=IMAGES),
)
