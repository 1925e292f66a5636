"""Statistics of batches, as batch normalisation keeps them: training changes them, and no adapter holds them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

from ..checkpoint.container import shown
from .names import is_inside

if TYPE_CHECKING:
    from .adapters import Tuner
    from .plan import Plan


def batches_seen(model: nn.Module) -> dict[str, int]:
    """Return how many batches every module that keeps statistics of them has seen in training."""
    found = {}
    for path, module in model.named_modules():
        count = module._buffers.get("num_batches_tracked")
        if count is not None and not count.is_meta:
            found[path] = int(count)
    return found


def tell_statistics(tuner: Tuner, plan: Plan) -> None:
    """Warn of statistics, as batch normalisation keeps them, that training has changed and the file does not hold."""
    before = tuner.__dict__.get("_counted", {})
    changed = [
        path
        for path, count in batches_seen(tuner.model).items()
        if before.get(path, count) != count and path not in plan.saved and not is_inside(path, plan.saved)
    ]
    # What a copy in modules_to_save has seen is in the file.
    changed = [path for path in changed if ".modules_to_save." not in f".{path}."]
    if changed:
        warnings.warn(
            f"save_pretrained: training has changed the running statistics of {shown(changed)}, which are not in the "
            "adapter, so that the reloaded model differs; name these modules in modules_to_save, or keep them in "
            "evaluation mode while training",
            stacklevel=4,
        )
