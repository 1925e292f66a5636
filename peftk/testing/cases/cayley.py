"""Cases of the Cayley transform."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Case, Inputs, Rows


def transform(skew: Tensor, block_size: int, neumann_terms: int | None = None) -> Tensor:
    """Invert each dense matrix, or add up the powers of it one by one."""
    blocks = []
    if skew.dim() == 3:
        blocks = [_transform_one((square - square.T) / 2, neumann_terms) for square in skew]
        return torch.stack(blocks) if blocks else skew.sum() * skew.new_empty(0, block_size, block_size)
    for row in skew:
        entries = iter(row)
        rows = [[row.new_zeros(()) for _ in range(block_size)] for _ in range(block_size)]
        for i in range(block_size):
            for j in range(i + 1, block_size):
                rows[i][j] = next(entries)
                rows[j][i] = -rows[i][j]
        # The zero keeps a 1 x 1 block, which has no entries, in the graph.
        matrix = torch.stack([torch.stack(line) for line in rows]) + 0 * row.sum()
        blocks.append(_transform_one(matrix, neumann_terms))
    return torch.stack(blocks) if blocks else skew.sum() * skew.new_empty(0, block_size, block_size)


def _transform_one(skew: Tensor, terms: int | None) -> Tensor:
    eye = torch.eye(len(skew), dtype=skew.dtype)
    if terms is None:
        return (eye - skew) @ torch.linalg.inv(eye + skew)
    if terms == 1:
        return eye + 0 * skew
    if terms == 2:
        return eye + 2 * skew
    # Hugging Face PEFT gives the last power half the weight of the others, and reads 3 terms as 4.
    power, total = skew, eye + 2 * skew
    for _ in range(2, max(terms, 4) - 1):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew


def _case(count: int, size: int, terms: int | None, spread: float = 0.1, square: bool = False) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        shape = (count, size, size) if square else (count, size * (size - 1) // 2)
        skew = torch.randn(*shape, generator=generator, dtype=torch.float64) * spread
        return {"skew": skew, "block_size": size, "neumann_terms": terms}

    name = f"{count}xb{size}-{'exact' if terms is None else f'{terms}-terms'}{'-square' if square else ''}"
    # The result is kept: b * b elements a block, in float32 or float64.
    saved = lambda inputs: count * size * size * max(inputs["skew"].element_size(), 4)  # noqa: E731
    rows = Rows(("skew",), 2 if square else 1, 2)
    return Case("cayley", name, make, transform, ("skew",), (), saved, rows=rows)


CASES = [
    _case(2, 1, None),
    _case(0, 4, None),
    _case(3, 2, None, 1.0),
    _case(2, 3, None, 1.0),
    _case(3, 8, None, 0.3),
    _case(2, 13, None),
    _case(2, 32, None),
    _case(1, 64, None),
    _case(1, 65, None),
    _case(2, 1, 5),
    _case(0, 4, 5),
    _case(2, 5, 1),
    _case(2, 5, 2),
    _case(2, 5, 3),
    _case(2, 5, 4),
    _case(3, 8, 5),
    _case(2, 9, 6),
    _case(2, 16, 7),
    _case(2, 32, 5, 0.05),
    _case(1, 65, 5, 0.02),
    _case(0, 4, None, square=True),
    _case(2, 1, None, square=True),
    _case(3, 4, None, 0.3, square=True),
    _case(2, 13, None, square=True),
    _case(1, 65, None, square=True),
    _case(2, 1, 5, square=True),
    _case(2, 9, 5, square=True),
]

DOCTOR = {
    "cayley-3xb8-exact",
    "cayley-3xb8-5-terms",
}
