"""peftk: fused kernels for parameter-efficient fine-tuning."""

from . import functional
from ._config import use_backend
from ._registry import explain
from ._version import __version__

__all__ = ["__version__", "explain", "functional", "use_backend"]
