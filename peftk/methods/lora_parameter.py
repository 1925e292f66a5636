"""LoRA on parameters of modules that are no layers, stacked experts above all: beside their products, or in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from .. import functional as F
from ..kernels.shared.grouped_low_rank import grouped_product, sizes_of
from ..ops._checks import autocast_input
from ._base_layer import observed


class Stacked(NamedTuple):
    """The tensors and settings of one adapter on one parameter.

    Attributes:
        a: (experts, r, in); a parameter of two dimensions counts as one expert.
        b: (experts, out, r).
        scale: A number.
        dropout_p: The probability with which an element of the input is dropped; drawn from torch's generator.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout_p: float = 0.0


def unstacked(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return the factors of each expert, (experts, r, in) and (experts, out, r).

    Args:
        a: (experts * r, in), the rows of one expert after those of another, as PEFT stores them.
        b: (out, r * experts), where the columns of one expert are `experts` apart.
        experts: How many.
    """
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)


def added(weight: Tensor, adapter: Stacked, transposed: bool) -> Tensor:
    """Return a parameter with the update of an adapter in it.

    Args:
        weight: (experts, out, in), with `transposed` (experts, in, out), or (out, in).
        adapter: The adapter.
        transposed: Whether a stack has the inputs first.
    """
    a, b = adapter.a.to(weight.dtype), adapter.b.to(weight.dtype)
    left, right = (a.mT, b.mT) if transposed and weight.dim() == 3 else (b, a)
    if weight.dim() == 2:
        return torch.addmm(weight, left[0], right[0], alpha=adapter.scale)
    return torch.baddbmm(weight, left, right, alpha=adapter.scale)


def is_interface(module: nn.Module) -> bool:
    """Whether a module has the experts of transformers, whose forward any function with its arguments may take over."""
    code = getattr(type(module).forward, "__code__", None)
    file = "" if code is None else code.co_filename.replace("\\", "/")
    return file.endswith("transformers/integrations/moe.py") and hasattr(module, "_apply_gate")


def takes_rows(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a module can be run on rows sorted by expert: nobody observes it, and it is the usual call."""
    return is_interface(module) and not kwargs and len(args) == 3 and not observed(type(module), module)


def in_parameters(
    module: nn.Module,
    adapters: Mapping[str, Sequence[Stacked]],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Call any module with the updates in its parameters, each of which is as large as the parameter.

    Args:
        module: The module.
        adapters: The name of each adapted parameter to its adapters.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    changed = {}
    for name, found in adapters.items():
        value = getattr(module, name)
        for adapter in found:
            value = added(value, adapter, bool(getattr(module, "is_transposed", False)))
        changed[name] = value
    return torch.func.functional_call(module, changed, tuple(args), dict(kwargs or {}))


class GroupedProduct(torch.autograd.Function):
    """The product of rows sorted by group with frozen weights, one for each group; zeros in the rows of no group."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """Multiply x (rows, in) by the weight (groups, in, out) of each row's group; offsets as in the operator."""
        return grouped_product(x, weight, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save references alone."""
        _x, weight, offsets = inputs
        ctx.save_for_backward(weight, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Multiply by the transposed weights."""
        weight, offsets = ctx.saved_tensors
        return GroupedProduct.apply(grad, weight.mT, offsets), None, None


def _traceable(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has the product of sorted rows for a graph: in bfloat16, and for rows of whole 16 bytes."""
    return x.dtype is weight.dtype is torch.bfloat16 and not (x.shape[1] % 8 or weight.shape[2] % 8)


def _linear(
    x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool, adapters: Sequence[Stacked], bias: Tensor | None
) -> Tensor:
    """Return one projection of all experts, bias and adapters included, of rows sorted by expert."""
    weight = weight if transposed else weight.mT
    fused = bool(adapters) and not adapters[0].dropout_p > 0 and not weight.requires_grad
    if not fused and torch.compiler.is_compiling() and _traceable(x, weight):
        # Reading the offsets would break the graph. What the product leaves in the rows of no group, of the result and
        # of the gradient, is anything.
        covered = (torch.arange(len(x), device=x.device) < offsets[-1])[:, None]
        y = torch.where(covered, tf.grouped_mm(torch.where(covered, x, 0.0), weight, offs=offsets.int()), 0.0)
    elif weight.requires_grad:
        *groups, others = x.split(sizes_of(offsets, len(x)))
        y = torch.cat(
            [*(rows @ w for rows, w in zip(groups, weight, strict=True)), others @ torch.zeros_like(weight[0])]
        )
    elif fused:
        (a, b, scale, _), *adapters = adapters
        y = F.grouped_low_rank_linear(x, weight.mT, a, b, offsets, scale)
    else:
        y = GroupedProduct.apply(x, weight, offsets)
    if bias is not None:
        y = y + bias.to(y.dtype)
    for a, b, scale, p in adapters:
        rows = tf.dropout(x, p) if p > 0 else x
        y = F.grouped_low_rank_add(y, rows, a, b, offsets, scale)
    return y


def experts(
    module: Any, x: Tensor, index: Tensor, weights: Tensor, adapters: Mapping[str, Sequence[Stacked]]
) -> Tensor:
    """Return the output of transformers' experts with adapters beside their products: no update is ever as large.

    Args:
        module: Stacked experts as `takes_rows` has found them.
        x: (tokens, hidden).
        index: (tokens, k), the experts of each token; a number beyond the last one is no expert.
        weights: (tokens, k), what their outputs are multiplied by.
        adapters: The name of each adapted parameter to its adapters.

    Returns:
        (tokens, hidden) in the dtype of x.
    """
    tokens, k = index.shape
    chosen, order = torch.sort(index.reshape(-1), stable=True)
    offsets = torch.searchsorted(chosen, torch.arange(module.num_experts, device=x.device), right=True)
    rows = autocast_input(x)[order // k]
    weights = weights.reshape(-1)[order]
    real = chosen.clamp(max=module.num_experts - 1)

    def project(rows: Tensor, name: str) -> Tensor:
        bias = getattr(module, f"{name}_bias")[real] if module.has_bias else None
        return _linear(rows, getattr(module, name), offsets, module.is_transposed, adapters.get(name, ()), bias)

    if module.has_gate:
        hidden = module._apply_gate(project(rows, "gate_up_proj"))
    else:
        hidden = module.act_fn(project(rows, "up_proj"))
    y = project(hidden, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    weights = weights.masked_fill(chosen >= module.num_experts, 0.0)
    y = y * weights[:, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return y[back].view(tokens, k, -1).sum(1).to(x.dtype)


__all__ = ["Stacked", "added", "experts", "in_parameters", "is_interface", "takes_rows", "unstacked"]
