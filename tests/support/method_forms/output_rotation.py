"""OFT of the outputs: one block-diagonal rotation."""

from __future__ import annotations

import torch

from peftk.methods import output_rotation
from support.method_forms import Form


def cayley(square):
    skew = square - square.mT
    eye = torch.eye(square.shape[-1], dtype=square.dtype)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def _shapes(s):
    return {"q": (s[0] // 4, 4, 4)}


def _turn(t):
    return output_rotation.Turn(output_rotation.rotations(t["q"]))


def _dense(weight, bias, t):
    return (torch.block_diag(*cayley(t["q"])).mT @ weight.flatten(1)).view(weight.shape), bias


FORMS = (
    Form(
        "linear",
        _shapes,
        lambda base, x, t: output_rotation.linear(base, x, [_turn(t)]),
        _dense,
        lambda weight, bias, t: (output_rotation.merged(weight, _turn(t)), bias),
    ),
    Form("conv", _shapes, lambda base, x, t: output_rotation.conv(base, x, [_turn(t)]), _dense),
)
