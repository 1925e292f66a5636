"""Callbacks for training scripts of transformers and TRL: `peftk.accelerate`, and the ranks of AdaLoRA."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback

from ..models.names import unwrapped
from ..models.peft_model import PeftModel
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


class AllocateCallback(TrainerCallback):
    """Calls `update_and_allocate` of an AdaLoRA model after every step of a `transformers.Trainer`.

    `AdapterTrainerMixin` has it already. Steps that a gradient scaler skips are left out. Models without a trainable
    AdaLoRA adapter are left alone.

    Warns:
        UserWarning: When training begins: its steps end before the adapter is pruned.

    Example:
        >>> from peftk.integrations.hf_trainer import AllocateCallback  # doctest: +SKIP
        >>> Trainer(model, arguments, callbacks=[AllocateCallback()], ...).train()  # doctest: +SKIP
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the schedule of the adapter with that of the training; transformers calls this."""
        model = unwrapped(kwargs["model"])
        allocator = getattr(model, "rankallocator", None) if isinstance(model, PeftModel) else None
        if allocator is not None and allocator.config.total_step > state.max_steps:
            warnings.warn(
                f"total_step: the AdaLoRA adapter {allocator.adapter_name!r} is pruned over "
                f"{allocator.config.total_step} steps, and training ends after {state.max_steps}, before it has "
                f"reached its target; give AdaLoraConfig total_step={state.max_steps}, or call "
                f"model.rankallocator.set_total_step({state.max_steps})",
                stacklevel=2,
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in the gradients of the step, which are still there; transformers calls this."""
        model = unwrapped(kwargs["model"])
        skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        if isinstance(model, PeftModel) and hasattr(model, "rankallocator") and not skipped:
            model.update_and_allocate(state.global_step)
