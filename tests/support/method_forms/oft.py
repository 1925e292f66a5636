"""OFT, two rotations, the first of which stands next to x."""

from __future__ import annotations

import torch

from peftk.methods import oft
from peftk.testing.cases import cayley
from support.method_forms import IMAGES, Form


def _shapes(s):
    return dict.fromkeys("pq", (s[1:].numel() // 4, 6))


def _rotations(t):
    return [oft.rotations(t["p"], 4), oft.rotations(t["q"], 4)]


def _weight(weight, bias, t):
    first, second = (torch.block_diag(*cayley.transform(t[name], 4)) for name in "pq")
    return (weight.flatten(1) @ (first @ second).mT).view(weight.shape), bias


def _merged(weight, bias, t):
    first, second = _rotations(t)
    return oft.merged(oft.merged(weight, second), first), bias


FORMS = (
    Form("linear", _shapes, lambda base, x, t: oft.linear(base, x, _rotations(t)), _weight, _merged),
    Form("conv", _shapes, lambda base, x, t: oft.conv2d(base, x, _rotations(t)), _weight, bases=IMAGES),
)
