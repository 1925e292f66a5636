"""PiSSA and OLoRA: factors that start as a part of the weight, which the layer then lacks."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ...methods._base_layer import opaque_weight, rows_of

_NITER = re.compile(r"pissa_niter_(\d{1,4})")


def starts_inside(how: bool | str) -> bool:
    """Whether `init_lora_weights` makes the factors a part of the weight."""
    return how in ("pissa", "olora") or is_random(how)


def is_random(how: bool | str) -> bool:
    """Whether the part is found with random numbers, so that nobody can find it again."""
    return isinstance(how, str) and _NITER.fullmatch(how) is not None


class Start(nn.Module):
    """The factors as they were at first, `a` (r, in) and `b` (out, r), which are subtracted; they are never trained."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(b, requires_grad=False)


@torch.no_grad()
def start_of(base: Any, r: int, scale: float, how: str, where: str) -> Start:
    """Find the part of a weight that the factors of rank r start as.

    "pissa": its r largest singular values and vectors; "pissa_niter_<n>": the same by n random subspace iterations;
    "olora": the first r columns and rows of its QR decomposition.

    Args:
        base: A linear layer with a dense weight.
        r: The rank.
        scale: The scale of the adapter.
        how: `init_lora_weights`.
        where: What messages call the layer.

    Raises:
        NotImplementedError: The weight is not dense.
        ValueError: It has no such rank.
    """
    if opaque_weight(base) is not None:
        raise NotImplementedError(
            f"init_lora_weights={how!r}: the weight of {where} is {opaque_weight(base)}, and the factors start as "
            "a part of a dense one; use True"
        )
    weight = rows_of(base, base.weight).detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if r > min(weight.shape):
        raise ValueError(
            f"r: init_lora_weights={how!r} needs a rank of at most {min(weight.shape)} on {where}, got {r}"
        )
    if how == "olora":
        q, rest = torch.linalg.qr(weight)
        return Start(rest[:r].contiguous(), q[:, :r].contiguous())
    random = _NITER.fullmatch(how)
    if random is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, v = torch.svd_lowrank(weight, r, niter=int(random[1]))
        right = v.mT
    root = (values[:r] / scale).sqrt()
    return Start(root[:, None] * right[:r], left[:, :r] * root)


__all__ = ["Start", "is_random", "start_of", "starts_inside"]
