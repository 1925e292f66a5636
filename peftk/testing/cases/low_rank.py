"""Cases of the low-rank product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Case, Inputs, Rows


def philox(seed: int, count: int) -> list[int]:
    """Philox4x32-10 on Python's integers, one block of four words at a time (Salmon et al., SC 2011)."""
    low = 0xFFFFFFFF
    words: list[int] = []
    for block in range((count + 3) // 4):
        counter, key = (block & low, block >> 32, 0, 0), (seed & low, seed >> 32 & low)
        for _ in range(10):
            first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
            counter = (
                *(second >> 32 ^ counter[1] ^ key[0], second & low),
                *(first >> 32 ^ counter[3] ^ key[1], first & low),
            )
            key = (key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low)
        words += counter
    return words[:count]


def _mask(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if not p:
        return torch.ones_like(x)
    assert seed is not None
    kept = [(word >> 8) / 2**24 >= p for word in philox(int(seed), x.numel())]
    return torch.tensor(kept, dtype=x.dtype).view(x.shape) / (1 - p)


def add(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Multiply by the dense out x in matrix; with a gate for every token, by one such matrix a token."""
    dropped = x * _mask(x, dropout_p, seed)
    if gate is None or gate.dim() == 1:
        dense = b @ (a if gate is None else torch.diag(gate) @ a)
        return base + scale * (dropped @ dense.mT)
    dense = torch.einsum("or,...r,ri->...oi", b, gate, a)
    return base + scale * torch.einsum("...oi,...i->...o", dense, dropped)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Multiply by the weight, then add the dense low-rank product."""
    base = x @ weight.mT
    return add(base if bias is None else base + bias, x, a, b, *args, **kwargs)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _factors(
    generator: torch.Generator,
    lead: tuple[Any, ...],
    features: int,
    out: int,
    rank: int,
    scale: float | list[float],
    gate: str | None,
    p: float,
) -> Inputs:
    gates = {"rank": (rank,), "token": (*lead, rank)}
    return {
        "a": _normal(generator, rank, features) / features**0.5,
        "b": _normal(generator, out, rank) / rank**0.5,
        "scale": torch.tensor(scale[0], dtype=torch.float64) if isinstance(scale, list) else scale,
        "gate": _normal(generator, *gates[gate]) if gate else None,
        "dropout_p": p,
        "seed": torch.tensor(0x1234_5678_9ABC) if p else None,
    }


def _case(
    operator: str,
    name: str,
    lead: tuple[Any, ...],
    features: int,
    out: int,
    rank: int,
    *,
    bias: bool = True,
    scale: float | list[float] = 2.0,
    gate: str | None = None,
    p: float = 0.0,
    positive: bool = False,
) -> Case:
    fused = operator == "low_rank_linear"

    def make(generator: torch.Generator) -> Inputs:
        x = _normal(generator, *lead, features)
        inputs: Inputs = {"x": x}
        if fused:
            inputs["weight"] = _normal(generator, out, features) / features**0.5
            inputs["bias"] = _normal(generator, out) if bias else None
        else:
            inputs = {"base": _normal(generator, *lead, out), "x": x}
        inputs |= _factors(generator, lead, features, out, rank, scale, gate, p)
        if positive:
            # One short sum, or one for the whole scale: terms of one sign keep it well conditioned in half precision.
            inputs |= {k: inputs[k].abs() for k in ("x", "a", "b", "gate") if inputs[k] is not None}
        return inputs

    optional: tuple[str, ...] = ("gate",) if gate else ()
    optional += ("scale",) if isinstance(scale, list) else ()
    first = (("x", "bias") if bias else ("x",)) if fused else ("base", "x")

    def saved(inputs: Inputs) -> int:
        # The rank-sized product; the rounded factors and gate where the parameters have another dtype; the seed.
        width = inputs["x"].element_size()
        tokens = inputs["x"].shape[:-1].numel()
        gates = 0 if inputs["gate"] is None else inputs["gate"].numel()
        return width * (tokens * rank + (features + out) * rank) + 8 * (gates + rank) + 8

    return Case(
        operator,
        name,
        make,
        linear if fused else add,
        (*first, "a", "b", *optional),
        ("base", "x", "weight", "bias"),
        saved,
        rows=Rows((*(n for n in first if n != "bias"), *(("gate",) if gate == "token" else ()))),
    )


def _both(name: str, *args: Any, **kwargs: Any) -> list[Case]:
    add_kwargs = {k: v for k, v in kwargs.items() if k != "bias"}
    return [_case("low_rank_linear", name, *args, **kwargs), _case("low_rank_add", name, *args, **add_kwargs)]


CASES = [
    *_both("one-row-r1", (1,), 3, 5, 1, positive=True),
    _case("low_rank_linear", "one-row-no-bias", (1,), 6, 5, 2, bias=False),
    *_both("vector", (), 6, 5, 2),
    *_both("empty", (0,), 6, 5, 2),
    *_both("empty-dropout", (0, 3), 6, 5, 2, p=0.5),
    *_both("r4", (7, 3), 12, 10, 4, scale=0.5),
    *_both("r3-negative-scale", (33,), 13, 17, 3, scale=-1.25, bias=False),
    *_both("r16", (65,), 96, 40, 16),
    *_both("rank-above-sizes", (10,), 5, 4, 9),
    *_both("zero-scale", (10,), 6, 4, 2, scale=0.0),
    *_both("tensor-scale", (10,), 6, 4, 2, scale=[0.75], positive=True),
    *_both("gate", (66,), 16, 9, 6, gate="rank"),
    *_both("gate-tensor-scale", (11,), 16, 9, 6, gate="rank", scale=[-0.5], positive=True),
    *_both("token-gate", (33, 2), 8, 7, 4, gate="token", scale=1.5),
    *_both("dropout", (34, 2), 15, 8, 4, p=0.3),
    *_both("dropout-gate-no-bias", (71,), 33, 8, 4, p=0.75, gate="rank", bias=False),
    *_both("dropout-token-gate", (9,), 10, 3, 2, p=0.1, gate="token"),
    *_both("prime-sizes", (127,), 101, 103, 7),
]

DOCTOR = {
    "low_rank_add-r16",
    "low_rank_linear-r16",
    "low_rank_linear-dropout",
}
