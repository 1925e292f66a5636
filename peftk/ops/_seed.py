"""Random numbers of dropout, which come from the CPU: activation checkpointing replays its default generator."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_capture(device: torch.device) -> None:
    """Raise where a number drawn now would be drawn never again.

    Args:
        device: where the elements are that it decides about.

    Raises:
        RuntimeError: while a CUDA graph is captured: it keeps the number, and drops the same elements in every replay.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dropout: expected a probability of 0 while a CUDA graph is captured; got one above it, and every replay "
            "of the graph would drop the same elements. Call eval() first, set the adapter's dropout to 0, or train "
            "without the graph"
        )


def draw_seed(device: torch.device) -> Tensor:
    """Draw a 0-dimensional int64 tensor on the CPU that decides which elements on a device are dropped.

    Raises:
        RuntimeError: as `refuse_capture` does.
    """
    refuse_capture(device)
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
