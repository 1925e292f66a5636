"""Cases of the grouped low-rank product."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Case, Inputs, Rows


def add(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
) -> Tensor:
    """Look up the group of one row after the other, and multiply the row by the dense matrix that it stands for."""
    found = []
    for row in range(len(x)):
        group = next((g for g, end in enumerate(offsets.tolist()) if row < end), None)
        if group is None:
            found.append(base[row])
            continue
        left = b[group] if gate is None else b[group] @ torch.diag(gate[row])
        factor = scale[group] if isinstance(scale, Tensor) and scale.dim() else scale
        found.append(base[row] + factor * (left @ a[group] @ x[row]))
    return torch.stack(found) if found else base + 0 * (x.sum() + a.sum() + b.sum())


def linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
) -> Tensor:
    """Multiply one row after the other by the weight of its group, rows of no group by zero, and add the adapters."""
    start, found = 0, []
    for matrix, end in zip(weight, offsets.tolist(), strict=True):
        found += [matrix @ row for row in x[start:end]]
        start = end
    found += [0 * (weight[0] @ row) for row in x[start:]]
    return add(torch.stack(found) if found else x @ weight[0].mT, x, a, b, offsets, scale, gate)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _case(
    name: str,
    sizes: list[int],
    features: int,
    out: int,
    rank: int,
    *,
    others: int = 0,
    scale: float | list[float] = 2.0,
    gate: bool = False,
    dtype: torch.dtype = torch.int64,
    positive: bool = False,
    fused: bool = False,
) -> Case:
    """Return the case of groups of these sizes, before rows of no group; `fused` with the frozen weights' product."""
    rows, groups = sum(sizes) + others, len(sizes)

    def make(generator: torch.Generator) -> Inputs:
        inputs: Inputs = {
            **({} if fused else {"base": _normal(generator, rows, out)}),
            "x": _normal(generator, rows, features),
            **({"weight": _normal(generator, groups, out, features) / features**0.5} if fused else {}),
            "a": _normal(generator, groups, rank, features) / features**0.5,
            "b": _normal(generator, groups, out, rank) / rank**0.5,
            "offsets": torch.tensor(sizes).cumsum(0).to(dtype),
            "scale": torch.tensor(scale, dtype=torch.float64) if isinstance(scale, list) else scale,
            "gate": _normal(generator, rows, rank) if gate else None,
        }
        if positive:
            # Few terms in a sum, or one sum for each scale: those of one sign keep it well conditioned.
            signed = [n for n in ("base", "x", "weight", "a", "b", "gate") if inputs.get(n) is not None]
            inputs |= {name: inputs[name].abs() for name in signed}
        return inputs

    optional = (*(("gate",) if gate else ()), *(("scale",) if isinstance(scale, list) else ()))

    def saved(inputs: Inputs) -> int:
        # The rank-sized product; the rounded factors, scaled ones and the gate where they have another dtype.
        width = inputs["x"].element_size()
        factors = groups * rank * (features + out)
        scaled = 2 * 4 * (groups + groups * out * rank) if isinstance(scale, list) else 0
        return width * (rows * rank + factors) + scaled + (4 * rows * rank if gate else 0) + 8 * groups

    by_row = ("x",) if fused else ("base", "x")
    return Case(
        "grouped_low_rank_linear" if fused else "grouped_low_rank_add",
        name,
        make,
        linear if fused else add,
        (*by_row, "a", "b", *optional),
        ("x", "weight") if fused else by_row,
        saved,
        rows=Rows((*by_row, *(("gate",) if gate else ()))),
    )


def _uneven(groups: int, rows: int) -> list[int]:
    """Return group sizes that fall off quickly, some of them zero."""
    sizes: list[int] = []
    for _ in range(groups - 1):
        sizes.append((rows - sum(sizes)) // 3)
    return [*sizes, rows - sum(sizes)]


CASES: list[Case] = [
    _case("one-row-r1", [1], 3, 5, 1, positive=True),
    _case("gate-scales", [4, 0, 9, 1], 16, 9, 6, gate=True, scale=[0.5, 3.0, 1.25, -2.0], positive=True),
    _case("no-rows", [0, 0], 6, 5, 2),
    _case("empty-groups-r4", [0, 0, 7, 0, 5, 0], 12, 10, 4),
    _case("rows-of-no-group", [3, 2], 6, 5, 2, others=4, gate=True),
    _case("no-group-has-rows", [0, 0, 0], 6, 5, 2, others=3),
    _case("one-group-r16", [65], 40, 24, 16, scale=0.5),
    _case("one-row-groups", [1] * 4, 12, 7, 3, scale=-1.25),
    _case("many-groups", [(5 * i) % 3 for i in range(16)], 10, 8, 2),
    _case("uneven-r16", _uneven(5, 100), 40, 36, 16, dtype=torch.int32),
    _case("rank-above-sizes", [4, 6], 5, 4, 9),
    _case("zero-scale", [4, 6], 6, 4, 2, scale=0.0),
    _case("scales", [4, 6, 2], 6, 4, 2, scale=[0.75, 2.0, -1.0], positive=True),
    _case("gate-others", [33, 20], 33, 18, 5, gate=True, others=2, scale=1.5, dtype=torch.int32),
    _case("prime-sizes", [37, 3], 101, 67, 7),
    _case("rank-above-a-tile", [20, 11], 24, 32, 80),
    _case("one-row-r1", [1], 3, 5, 1, positive=True, fused=True),
    _case("no-group-has-rows", [0, 0, 0], 6, 5, 2, others=3, fused=True),
    _case("gate-others", [9, 34], 33, 18, 5, gate=True, others=2, scale=1.5, dtype=torch.int32, fused=True),
    _case("gate-scales", [4, 0, 3, 1], 16, 9, 6, gate=True, scale=[0.5, 3.0, 1.25, -2.0], positive=True, fused=True),
    _case("zero-scale", [4, 6], 6, 4, 2, scale=0.0, fused=True),
    _case("eights", [17, 0, 3], 64, 72, 8, fused=True),
]

DOCTOR = {
    "grouped_low_rank_add-uneven-r16",
    "grouped_low_rank_add-gate-others",
    "grouped_low_rank_linear-gate-others",
}
