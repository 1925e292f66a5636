"""Checks and casts that every public operator shares. Messages name argument, expected and got."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from .plain import DENSE

LARGEST_SCALE = torch.finfo(torch.float32).max
"""The largest number that every operator takes as a scale: all but those on float64 compute in float32."""


def check_tensor(name: str, value: object, like: Tensor | None = None) -> None:
    """Check that an argument is a strided floating-point tensor, on the device of another one.

    Raises:
        TypeError: if it is not a tensor, or not of a supported dtype.
        ValueError: if it is not strided, or nested, or on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(value).__name__}")
    if value.dtype not in DENSE:
        raise TypeError(f"{name}: expected dtype float64, float32, bfloat16 or float16; got {value.dtype}")
    # Nested tensors say that they are strided, and raise where they are asked for a shape.
    if value.is_nested:
        raise ValueError(f"{name}: expected a strided tensor; got a nested one")
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


def check_scale(scale: object, dtype: torch.dtype) -> float:
    """Return a Python number as a float that is finite where an operator on this dtype computes.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is NaN, infinite, or too large.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or a 0-dimensional tensor; got {type(scale).__name__}")
    # A comparison, unlike math.isfinite, can be traced with a symbolic number; it refuses NaN too.
    if not abs(scale) < math.inf:
        raise ValueError(f"scale: expected a finite number; got {scale}")
    largest = torch.finfo(torch.float64).max if dtype is torch.float64 else LARGEST_SCALE
    # Before it becomes a float: an integer may be larger than all of those, and too long to print.
    if abs(scale) > largest:
        got = scale if isinstance(scale, float) else f"an integer of {scale.bit_length()} bits"
        raise ValueError(f"scale: expected a finite number of at most {largest} in magnitude; got {got}")
    return float(scale)


def fold_zero(factor: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return a factor and a scale that is not zero: a zero becomes part of the factor.

    Libraries skip a product that they are told to scale by zero. NaN and infinity in it would be lost on one backend
    and not on another; times a factor of zeros they are NaN on all.
    """
    return (factor * 0.0, 1.0) if scale == 0.0 else (factor, scale)


def check_scale_tensor(scale: Tensor, like: Tensor) -> Tensor:
    """Return a 0-dimensional tensor on the device of another one. As elsewhere in torch, it may come from the CPU.

    Raises:
        TypeError: if its dtype is not supported.
        ValueError: if it has dimensions, or is on another device.
    """
    check_tensor("scale", scale)
    if scale.dim() != 0:
        raise ValueError(f"scale: expected a number or a 0-dimensional tensor; got shape {tuple(scale.shape)}")
    if not scale.is_cpu:
        check_tensor("scale", scale, like=like)
    return scale.to(like.device)


@overload
def cast(value: Tensor, dtype: torch.dtype) -> Tensor: ...


@overload
def cast(value: None, dtype: torch.dtype) -> None: ...


@overload
def cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...


def cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast a tensor, if there is one, without the half microsecond that ``Tensor.to`` costs to do nothing."""
    return value if value is None or value.dtype is dtype else value.to(dtype)


def autocast_input(x: Tensor) -> Tensor:
    """Cast an activation as ``torch.nn.functional.linear`` would under autocast; float64 stays."""
    kind = x.device.type
    if torch._C._is_any_autocast_enabled() and x.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
