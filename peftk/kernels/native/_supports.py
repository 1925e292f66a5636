"""What the C++ and CUDA kernels ask of the device and of the activations."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from ... import _C


def holds(built: str, capability: tuple[int, int]) -> bool:
    """Say whether code built for an architecture, as TORCH_CUDA_ARCH_LIST names it, runs on a GPU."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", built)
    assert match is not None, built
    major, minor, kind = int(match[1]), int(match[2]), match[3]
    if kind == "a":
        return (major, minor) == capability
    if major == capability[0] and minor <= capability[1]:
        return True
    # PTX is compiled by the driver for every later GPU, unless it is that of one family.
    return bool(match[4]) and not kind and (major, minor) <= capability


@functools.cache
def cuda_reason(index: int) -> str | None:
    """Return None if the extension holds code for a GPU, else the reason why it does not."""
    built = _C.build_info()["cuda_architectures"]
    if not built:
        return "peftk._C was built without CUDA"
    capability = torch.cuda.get_device_capability(index)
    if any(holds(one, capability) for one in built):
        return None
    return f"sm_{capability[0]}{capability[1]} is not in the build of peftk._C (it has {', '.join(built)})"


def device_reason(t: Tensor) -> str | None:
    """Return None if there is compiled code for the device of a tensor, else the reason why there is none."""
    if t.is_cpu:
        return None
    if t.device.type == "cuda":
        return cuda_reason(t.device.index)
    return f"the C++ kernels take CPU and CUDA tensors; got one on {t.device}"


ACTIVATIONS = frozenset((torch.float32, torch.bfloat16))
"""The dtypes of activations that C++ on the CPU reads."""


def supports_activations(x: Tensor) -> str | None:
    """Return None if C++ on the CPU reads activations like x, else the reason why it does not."""
    if not x.is_cpu:
        return f"the C++ kernels take CPU tensors; got one on {x.device}"
    if x.dtype not in ACTIVATIONS:
        return f"the C++ kernels take float32 and bfloat16; got {x.dtype}"
    return None
