"""Cases of the Cayley transform."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Case, Inputs, Rows


def transform(skew: Tensor, block_size: int, neumann_terms: int | None = None) -> Tensor:
    """Write out the skew-symmetric matrices, and invert them or add up their powers one by one."""
    if skew.dim() == 3:
        s = (skew - skew.mT) / 2
    else:
        upper = skew.new_zeros(len(skew), block_size, block_size)
        rows, columns = torch.triu_indices(block_size, block_size, 1, device=skew.device)
        matrix = torch.arange(len(skew), device=skew.device)[:, None]
        upper = upper.index_put((matrix, rows, columns), skew)
        s = upper - upper.mT
    eye = torch.eye(block_size, dtype=skew.dtype, device=skew.device)
    if neumann_terms is None:
        return (eye - s) @ torch.linalg.inv(eye + s)
    if neumann_terms <= 2:
        return eye + 2 * (neumann_terms - 1) * s
    # Hugging Face PEFT gives the last power half the weight of the others, and reads 3 terms as 4.
    power, total = s, eye + 2 * s
    for _ in range(2, max(neumann_terms, 4) - 1):
        power = power @ s
        total = total + 2 * power
    return total + power @ s


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
