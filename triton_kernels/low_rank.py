"""The low-rank product on a GPU.

Designs of the fused linear layer, chosen by `design`:

- ``D0``: the base product by torch's own library, then the low-rank product added onto the same buffer. The default,
  because an adapter whose b is zero must change no bit of the base layer's output: only the base layer's own call,
  with its own bias, is sure to give those bits.
- ``D0-expand-first``: ``scale * hidden @ b.T + bias`` first, then the base product accumulated onto it. The library's
  product reads what `D0` reads and writes once more, but it may use another kernel, with other bits, when it
  accumulates.
- ``D1``: one persistent product whose last steps read the low-rank factors, in `low_rank_gemm`.

Nothing but the arithmetic of the base product differs between them: the shrink, the mask and the gradients of the
factors are the same kernels. The gradient in x carries no promise about bits, so there D0 expands first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.shared.low_rank import Needs, Parameters
from ..runtime import settings
from . import _launch, low_rank_gemm
from .low_rank_gradients import factor_gradient, hidden_gradient, sum_chunks, visit, worth_visiting
from .low_rank_products import as_rows, expand, shrink

DESIGNS = ("D0", "D0-expand-first", "D1")
_named_design = settings.Choice("peftk.low_rank.design")


def design(rows: int, features: int, out: int, rank: int, capability: tuple[int, int]) -> str:
    """Return the design of a product of (rows, features) with a weight of (out, features).

    It is asked forward, and with features and out exchanged for the gradient in x, which has no use for the order of
    the two steps and takes both D0 for expanding first.

    On an H200 (8192 x 4096 -> 4096, bfloat16) D1 took 2 % less of the device's time forward than D0 and 80 us more of
    the host's, and it gives other bits than the base layer: nothing is D1.
    """
    return "D0"


@contextlib.contextmanager
def use_design(name: str) -> Iterator[None]:
    """Take one design wherever the fused layer is called inside, whatever `design` says.

    It holds where `peftk.use_backend` would.

    Raises:
        ValueError: if there is no such design.
    """
    if name not in DESIGNS:
        raise ValueError(f"name: expected one of {', '.join(DESIGNS)}; got {name!r}")
    with _named_design.named(name):
        yield


def _design(x: Tensor, weight: Tensor, out: int, rank: int) -> str:
    reason = low_rank_gemm.unsupported(x, weight, rank)
    if (named := _named_design.get()) is not None:
        if named == "D1" and reason:
            raise RuntimeError(f"design: expected one that can run this product; got 'D1', which cannot: {reason}")
        return named
    rows, features = x.shape
    chosen = design(rows, features, out, rank, low_rank_gemm.capability(x.device))
    return "D0" if chosen == "D1" and reason else chosen


def _reason(x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None) -> str | None:
    if reason := _launch.unsupported(x):
        return reason
    if a.dtype is not x.dtype or b.dtype is not x.dtype:
        return f"the Triton kernels take a and b in the dtype of x, {x.dtype}; got {a.dtype} and {b.dtype}"
    if gate is not None and gate.dtype is not torch.float32:
        return f"the Triton kernels take a float32 gate; got {gate.dtype}"
    return None


def _hidden(x: Tensor, rows: Tensor, a: Tensor, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``dropout(x) @ a.T`` in the shape of x, and the same memory as a matrix."""
    hidden = torch.empty(*x.shape[:-1], a.shape[0], dtype=x.dtype, device=x.device)
    matrix = hidden.view(rows.shape[0], a.shape[0])
    return hidden, shrink(rows, a, (a.stride(0), a.stride(1)), a.shape[0], matrix, dropout_p, seed)


def low_rank_add_supports(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, *args: object
) -> str | None:
    """Return None, or why the kernels cannot run the call."""
    if base.dtype not in _launch.DTYPES:
        return f"the Triton kernels take a base of float32, float16 or bfloat16; got {base.dtype}"
    return _reason(x, a, b, gate)


def low_rank_add(base: Tensor, x: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    """Return the sum and the rank-sized product ``dropout(x) @ a.T``; see `peftk.functional.low_rank_add`."""
    a, b, gate, scale, dropout_p, seed = Parameters(*parameters)
    hidden, matrix = _hidden(x, as_rows(x), a, dropout_p, seed)
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    rows = as_rows(base)
    expand(out.view(rows.shape), rows, matrix, b, (b.stride(1), b.stride(0)), gate, scale)
    return out, hidden


def low_rank_linear_supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gate: Tensor | None, *args: object
) -> str | None:
    """Return None, or why the kernels cannot run the call."""
    return _reason(x, a, b, gate)


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Any) -> tuple[Tensor, Tensor]:
    """Return the output and the rank-sized product; see `peftk.functional.low_rank_linear`."""
    a, b, gate, scale, dropout_p, seed = Parameters(*parameters)
    rows, strides = as_rows(x), (b.stride(1), b.stride(0))
    chosen = _design(rows, weight, weight.shape[0], a.shape[0])
    hidden, matrix = _hidden(x, rows, a, dropout_p, seed)
    if chosen == "D0":
        # The base layer's own call: its bits depend on the shape of x, too.
        y = linear(x, weight, bias)
        out = as_rows(y)
        expand(out, out, matrix, b, strides, gate, scale)
    elif chosen == "D0-expand-first":
        out = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        bias = None if bias is None else bias.contiguous()
        expand(out, None, matrix, b, strides, gate, scale, bias=bias).addmm_(rows, weight.mT)
    else:
        out = low_rank_gemm.extended_linear(rows, weight, bias, matrix, b, gate, scale)
    return out.view(*x.shape[:-1], weight.shape[0]), hidden


def low_rank_add_backward_supports(
    grad: Tensor, x: Tensor, hidden: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, *args: object
) -> str | None:
    """Return None, or why the kernels cannot run the backward pass."""
    if grad.dtype is not x.dtype or hidden.dtype is not x.dtype:
        return f"the Triton kernels take grad and hidden in the dtype of x, {x.dtype}; got {grad.dtype}, {hidden.dtype}"
    return _reason(x, a, b, gate)


def low_rank_add_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b and the gate; an empty tensor for one not needed."""
    return _gradients(grad, x, hidden, None, Parameters(*arguments[:6]), Needs(*arguments[6:]))


def low_rank_linear_backward_supports(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, *args: Any
) -> str | None:
    """Return None, or why the kernels cannot run the backward pass."""
    return low_rank_add_backward_supports(grad, x, hidden, *args)


def low_rank_linear_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b, the gate and the bias; an empty tensor for one not needed."""
    found = _gradients(grad, x, hidden, weight, Parameters(*arguments[:6]), Needs(*arguments[6:10]))
    return *found, as_rows(grad).sum(0) if arguments[10] else grad.new_empty(0)


def _gradients(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    parameters: Parameters,
    need: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, gate, scale, dropout_p, seed = parameters
    dx = da = db = dgate = grad.new_empty(0)
    grad, hidden, rank = as_rows(grad), as_rows(hidden), a.shape[0]
    need_hidden = need.x or need.a or need.gate
    if need_hidden and need.b and worth_visiting(rank, grad.dtype):
        sums, db_sums = visit(grad, hidden, as_rows(b), gate)
    else:
        if need_hidden:
            sums = torch.empty(1, grad.shape[0], rank, dtype=torch.float32, device=grad.device)
            shrink(grad, b, (b.stride(1), b.stride(0)), rank, sums[0])
        if need.b:
            db_sums = factor_gradient(hidden, grad, gate, rank_first=False)
    if need_hidden:
        dhidden, found = hidden_gradient(sums, hidden, gate, scale, need.gate)
        dgate = dgate if found is None else found
    # The large product first: while it runs, the host enqueues the rest.
    if need.x:
        dx = _input_gradient(grad, weight, dhidden, a, dropout_p, seed).view(x.shape)
    if need.b:
        db = sum_chunks(db_sums, b.shape, scale)
    if need.a:
        da_sums = factor_gradient(dhidden, as_rows(x), None, rank_first=True, dropout_p=dropout_p, seed=seed)
        da = sum_chunks(da_sums, a.shape, 1.0 / (1.0 - dropout_p))
    return dx, da, db, dgate


def _input_gradient(
    grad: Tensor, weight: Tensor | None, dhidden: Tensor, a: Tensor, dropout_p: float, seed: Tensor | None
) -> Tensor:
    dhidden = dhidden.to(a.dtype)
    # The extended product has no place for a mask.
    if weight is not None and seed is None and _design(grad, weight, a.shape[1], a.shape[0]) == "D1":
        return low_rank_gemm.extended_linear(grad, weight, None, dhidden, a, transposed=True)
    dx = torch.empty(grad.shape[0], a.shape[1], dtype=grad.dtype, device=grad.device)
    expand(dx, None, dhidden, a, (a.stride(0), a.stride(1)), None, 1.0, dropout_p=dropout_p, seed=seed)
    return dx if weight is None else dx.addmm_(grad, weight)
