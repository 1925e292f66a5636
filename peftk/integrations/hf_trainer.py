"""Callbacks for training scripts of transformers and TRL: `peftk.accelerate`, and the ranks of AdaLoRA."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..models.trainer import Allocates
from .accelerate import accelerate
from .report import Report


class AccelerateCallback(TrainerCallback):
    """Accelerates the model of a `transformers.Trainer`, or of a trainer derived from it, when its training begins.

    Trainers of TRL make the PEFT model themselves, from `peft_config`. The report is printed once, by the first process
    of those that train together. `report.restore()` undoes it.

    Args:
        show: Whether to print the report.
        **options: `correct`, `strict` and `force` of `peftk.accelerate`.

    Attributes:
        report: What `peftk.accelerate` has returned; None before training.

    Example:
        >>> from peftk.integrations.hf_trainer import AccelerateCallback  # doctest: +SKIP
        >>> SFTTrainer(model, peft_config=config, callbacks=[AccelerateCallback()], ...).train()  # doctest: +SKIP
    """

    def __init__(self, *, show: bool = True, **options: bool) -> None:
        self.show, self.options = show, options
        self.report: Report | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Accelerate the model; transformers calls this."""
        first = self.report is None
        self.report = accelerate(kwargs["model"], **self.options)
        if first and self.show and state.is_world_process_zero:
            print(self.report)


class AllocateCallback(Allocates, TrainerCallback):
    """Calls `update_and_allocate` of an AdaLoRA model after every step of a `transformers.Trainer`.

    `AdapterTrainerMixin` does that by itself. Steps that a gradient scaler skips are left out. Models without a
    trainable AdaLoRA adapter are left alone.

    Warns:
        UserWarning: When training begins: its steps end before the adapter is pruned.

    Example:
        >>> from peftk.integrations.hf_trainer import AllocateCallback  # doctest: +SKIP
        >>> Trainer(model, arguments, callbacks=[AllocateCallback()], ...).train()  # doctest: +SKIP
    """
