"""Backend "native": C++ on the CPU, CUDA C++ on NVIDIA GPUs. Large products stay in torch's own libraries, in place."""

from __future__ import annotations

import functools


@functools.cache
def unavailable() -> str | None:
    """Return None if the compiled extension can be imported, else the reason why it cannot."""
    try:
        from ... import _C  # noqa: F401
    except ImportError as error:
        return f"peftk._C, the compiled extension, cannot be imported: {error}"
    return None
