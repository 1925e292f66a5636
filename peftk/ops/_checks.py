"""Checks and casts that every public operator shares. Messages name argument, expected and got."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FLOATING = frozenset(FLOATING)


def ordinary(x: Tensor, *others: Tensor | None) -> bool:
    """Say whether all arguments are what a call usually has: strided floating-point tensors on one device.

    It is the short way around `check_tensor` for every argument: where it says no, those checks find the fault, or
    that there is none. An argument that is no tensor raises AttributeError.
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


def check_tensor(name: str, value: object, like: Tensor | None = None) -> None:
    """Check that an argument is a strided floating-point tensor, on the device of another one.

    Raises:
        TypeError: if it is not a tensor, or not of a supported dtype.
        ValueError: if it is not strided, or on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected dtype float64, float32, bfloat16 or float16; got {value.dtype}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name}: expected a strided tensor; got layout {value.layout}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, as x is; got one on {value.device}")


def check_shape(name: str, value: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Check a shape, None standing for any size.

    Raises:
        ValueError: if it differs.
    """
    if value.shape == expected:
        return
    shape = value.shape
    if len(shape) != len(expected) or any(e not in (None, s) for s, e in zip(shape, expected, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected shape {meaning} = ({wanted}); got {tuple(shape)}")


def check_frozen(name: str, value: Tensor) -> None:
    """Check that a tensor whose gradient the operator does not compute does not ask for one.

    Raises:
        ValueError: if it requires grad.
    """
    if value.requires_grad:
        raise ValueError(
            f"{name}: expected a frozen tensor (requires_grad=False), because this operator computes no "
            f"gradient for it; got one that requires grad"
        )


def check_scale(scale: object) -> float:
    """Return a finite Python number as a float.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is NaN or infinite.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or a 0-dimensional tensor; got {type(scale).__name__}")
    # A comparison, unlike math.isfinite, can be traced with a symbolic number; it refuses NaN too.
    if not abs(scale) < math.inf:
        raise ValueError(f"scale: expected a finite number; got {scale}")
    return float(scale)


def cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast a tensor, if there is one, without the half microsecond that ``Tensor.to`` costs to do nothing."""
    return value if value is None or value.dtype is dtype else value.to(dtype)


def autocast_input(x: Tensor) -> Tensor:
    """Cast an activation as ``torch.nn.functional.linear`` would under autocast; float64 stays."""
    kind = x.device.type
    if torch._C._is_any_autocast_enabled() and x.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
