"""Freezing what has run already: its gradient still arrives when that forward pass is differentiated later."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .walking import all_modules, all_parameters

_KEPT = "peftk: keeps the gradient"
# The backward pass in which adapted layers were run again last, as activation checkpointing does.
_rerun_in = -1


def set_trainable(part: nn.Module | Tensor, trainable: bool) -> None:
    """Freeze or unfreeze parameters; those that are frozen still get the gradient of earlier forward passes.

    Autograd drops what arrives at a parameter that has been frozen since, silently.
    """
    for parameter in all_parameters(all_modules(part)) if isinstance(part, nn.Module) else [part]:
        if parameter.requires_grad and not trainable:
            _keep_gradient(parameter)
        if parameter.requires_grad is not trainable:
            parameter.requires_grad_(trainable)


def _keep_gradient(parameter: Tensor) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        node = torch.autograd.graph.get_gradient_edge(parameter).node
    # The node belongs to the graphs of earlier passes; without any, it ends here, and the hook with it.
    metadata: dict[Any, Any] = node.metadata  # type: ignore[assignment]  # torch declares a method and has a dict.
    if _KEPT not in metadata:
        metadata[_KEPT] = True
        node.register_prehook(functools.partial(_accumulate, parameter))


@torch.no_grad()
def _accumulate(parameter: Tensor, grads: tuple[Tensor | None, ...]) -> None:
    (grad,) = grads
    if parameter.requires_grad or grad is None:
        return
    if torch._C._current_graph_task_id() == _rerun_in:
        raise RuntimeError(
            "backward: another adapter was made active after the forward pass, and activation checkpointing has run "
            "the layers again with it; call backward before set_adapter"
        )
    if parameter.grad is None:
        parameter.grad = grad.clone()
    else:
        parameter.grad += grad


def note_rerun() -> None:
    """Remember that a layer runs within a backward pass, if it does."""
    global _rerun_in
    task = torch._C._current_graph_task_id()
    if task != -1:
        _rerun_in = task


def check_not_rerun() -> bool:
    """Return False, or raise RuntimeError within a backward pass, where the adapters of a mixed batch are not known."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "backward: activation checkpointing runs layers again that had a batch of several adapters "
            "(adapter_names), and which sample had which is not known any more; run such batches without checkpointing"
        )
    return False
