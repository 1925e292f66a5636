"""What may take the short way: tensors as they usually are, plain layers, and modules that nobody listens to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..runtime import settings

DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of a weight that is not packed."""

_FLOATING = frozenset(DENSE)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The classes of convolutions, by their number of dimensions."""

NONE: Mapping[str, Any] = {}
"""No keyword arguments; nobody writes to it."""


def ordinary(x: Tensor, *others: Tensor | None) -> bool:
    """Say whether all arguments are what a call usually has: strided floating-point tensors on one device.

    It is the short way around `check_tensor` for every argument: where it says no, those checks find the fault, or
    that there is none. An argument that is no tensor raises AttributeError. Optional ones alone may be None: a caller
    reads the shapes of the others first, which is also where a nested tensor raises RuntimeError.
    """
    dtype, on_cpu = x.dtype, x.is_cpu
    if dtype not in _FLOATING or x.layout is not torch.strided:
        return False
    for other in others:
        if other is not None and (
            (other.dtype is not dtype and other.dtype not in _FLOATING)
            or other.layout is not torch.strided
            or (not other.is_cpu if on_cpu else other.device != x.device)
        ):
            return False
    return True


OBSERVERS = (
    torch.is_grad_enabled,
    torch.compiler.is_compiling,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    torch._C._is_any_autocast_enabled,
    torch._C._autograd._profiler_enabled,
)
"""Each says of the whole process, by a true answer, that something records, transforms or replaces what runs."""


def unobserved() -> bool:
    """Whether nothing records, transforms or replaces what runs here, and no backend without C++ is asked for."""
    # A compiler follows this no further than to its own question, the second.
    for asks in OBSERVERS:
        if asks():
            return False
    return forward_ad._current_level < 0 and settings.backend() in ("auto", "native")


def stored(module: nn.Module) -> Tensor:
    """Return the weight of a module, from where nn.Module would look it up last if it is a parameter."""
    own = module.__dict__
    # FSDP puts views of its flat parameter beside the parameters. A parametrized weight is in neither place.
    weight: Tensor | None = own["weight"] if "weight" in own else own["_parameters"].get("weight")
    return getattr(module, "weight") if weight is None else weight  # noqa: B009 - nn.Module types what it finds.


def observed(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether somebody would notice that modules of an adapter are not called: hooks, or other forwards than their own.

    Args:
        kind: The class that they have where nobody has replaced or wrapped them.
        *modules: Those of whose parameters the arithmetic is done elsewhere.
    """
    for module in modules:
        if (
            type(module) is not kind
            or "forward" in module.__dict__
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return True
    return False


def listened_to(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether to call modules of an adapter: somebody observes them, or has a hook on every module of the process."""
    return bool(_has_any_global_hook()) or observed(kind, *modules)


def plain_tensors(
    base: Any, x: Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a plain dense nn.Linear or convolution whose call nobody observes or replaces, or None.

    With them an operator may run the layer itself. Anything else is reached by calling it, so that hooks, sharding,
    quantisation and nested wrappers keep working. Under autocast torch caches the cast of the weight, which only the
    call profits from.
    """
    linear = type(base) is nn.Linear
    if not (linear or type(base) in CONVOLUTIONS) or args or kwargs:
        return None
    own, parameters = base.__dict__, base._parameters
    # FSDP puts views of its flat parameter beside the parameters. A parametrized weight is in neither place.
    weight = own["weight"] if "weight" in own else parameters.get("weight")
    if (
        (type(weight) is nn.Parameter or type(weight) is Tensor)
        and not weight.requires_grad
        and weight.dtype is x.dtype
        and (
            weight.shape == (base.out_features, base.in_features)
            if linear
            else weight.dim() == len(base.kernel_size) + 2
        )
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
        and not base._backward_pre_hooks
        and not _has_any_global_hook()
        and "forward" not in own
        and not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type))
    ):
        return weight, own["bias"] if "bias" in own else parameters["bias"]
    return None
