"""Full-size calls of the Cayley transform, and what they launch."""

from __future__ import annotations

from collections.abc import Iterator

from peftk.testing.calls.cayley import NEUMANN

from . import WIDTH, Call, meta


def calls() -> Iterator[Call]:
    for size in (2, 13, 16, 32, 64, 65, 128, 256):
        count = WIDTH // size
        packed, blocks = meta(count, size * (size - 1) // 2), meta(count, size, size)
        yield "cayley", (packed, size, NEUMANN)
        yield "cayley_backward", (blocks, packed, blocks, NEUMANN)


LAUNCHES = {
    "cayley": ["cayley_kernel"],
    "cayley_backward": ["cayley_backward_kernel"],
}

NARROW = {
    # The rows of a packed triangle start anywhere, and are nothing beside the activations.
    "_cayley_kernel": {"load"},
    "_cayley_panel_kernel": {"load"},
    "_cayley_backward_kernel": {"store"},
    "_cayley_panel_backward_kernel": {"store"},
}
