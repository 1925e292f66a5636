"""BOFT of the outputs: a butterfly, weakened and bounded, and a factor for every output."""

from __future__ import annotations

import torch

from peftk.methods import output_rotation
from support.method_forms import Form
from support.method_forms.output_rotation import cayley


def _shapes(s):
    return {"q": (3, s[0] // 2, 2, 2), "s": (s[0],)}


def _turn(t):
    stages = output_rotation.interleaved(output_rotation.rotations(t["q"], bound=2.0))
    return output_rotation.Turn(output_rotation.weakened(stages, 0.5), t["s"])


def _dense(weight, bias, t):
    """Stage i takes numbers k apart in turns, k half a block times 2^i, and turns blocks of them."""
    q = t["q"]
    norm = (q - q.mT).norm()
    stages = cayley(q * 2.0 / (norm + 1e-8) if norm > 2 else q)
    stages = torch.eye(q.shape[-1], dtype=q.dtype) + 0.5 * (stages - torch.eye(q.shape[-1], dtype=q.dtype))
    rows = weight.flatten(1)
    half = q.shape[-1] // 2
    for i, blocks in enumerate(stages):
        apart = half << i
        order = torch.arange(len(rows)).view(-1, 2, apart).transpose(1, 2).flatten()
        turned = torch.block_diag(*blocks) @ rows[order]
        rows = torch.empty_like(rows).index_copy(0, order, turned)
    return (t["s"].view(-1, 1) * rows).view(weight.shape), bias


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
