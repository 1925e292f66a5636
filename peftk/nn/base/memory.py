"""Memory for parameters that were planned without."""

from __future__ import annotations

import torch
from torch import nn


def give_memory(module: nn.Module, device: torch.device | None) -> None:
    """Give memory on a device, with any values, to the parameters of a module that have none."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                part._parameters[name] = with_memory(parameter, device)


def with_memory(parameter: nn.Parameter, device: torch.device | None) -> nn.Parameter:
    """Return a parameter like one that has no memory, on a device, with any values."""
    # Not torch.empty_like, which for a tensor without memory loads half of torch's compiler.
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device), parameter.requires_grad)
