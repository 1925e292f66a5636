"""What transformers.Trainer needs to keep adapters, instead of whole models, in its checkpoints."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..nn.adalora.rank_allocator import RankAllocator
from .names import unwrapped
from .peft_model import PeftModel

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    # It stands before the Trainer in the bases; importing peftk must not import transformers.
    _Trainer = object


ALLOCATOR_NAME = "rank_allocator.pt"


class Allocates:
    """What a callback of a Trainer does for AdaLoRA: `update_and_allocate` after every step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the schedule of the adapter with that of the training; transformers calls this."""
        model = unwrapped(kwargs["model"])
        allocator = _allocator(model if isinstance(model, PeftModel) else None)
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
        if isinstance(model, PeftModel) and _allocator(model) is not None and not skipped:
            model.update_and_allocate(state.global_step)


class AdapterTrainerMixin(_Trainer):
    """Make a Trainer save, resume from and choose among adapter files; put it before the Trainer in the bases.

    Without it, a Trainer writes a checkpoint of the whole model, frozen weights included, and fails where weights are
    tied. Training and evaluation are the same with and without it, but for an AdaLoRA adapter, whose ranks it allocates
    after every step (`peftk.integrations.hf_trainer.AllocateCallback`): what that knows is in the checkpoints too. A
    model that is no `PeftModel` is saved as ever.

    Raises:
        NotImplementedError: The model is sharded by FSDP or DeepSpeed.

    Example:
        >>> from transformers import Trainer  # doctest: +SKIP
        >>> class AdapterTrainer(AdapterTrainerMixin, Trainer): ...  # doctest: +SKIP
        >>> trainer = AdapterTrainer(model, arguments, train_dataset=data)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.save_model("adapter")  # doctest: +SKIP
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from transformers import TrainerCallback

        # It does nothing without a trainable AdaLoRA adapter.
        if not any(isinstance(callback, Allocates) for callback in self.callback_handler.callbacks):
            self.add_callback(type("AllocateCallback", (Allocates, TrainerCallback), {}))

    def _adapted(self: Any) -> PeftModel | None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel):
            return None
        for kind in ("fsdp", "deepspeed"):
            if getattr(self, f"is_{kind}_enabled", False):
                raise NotImplementedError(
                    f"{kind}: expected whole parameters; a Trainer cannot save and resume sharded adapters yet: use a "
                    "loop of your own, and save_pretrained(state_dict=...)"
                )
        return model

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self._adapted()
        if model is None:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        model.save_pretrained(folder)
        # As the Trainer does: a collator may have the only tokenizer.
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        allocator = _allocator(self._adapted())
        if allocator is not None and self.args.should_save:
            torch.save(allocator.state_dict(), os.path.join(output_dir, ALLOCATOR_NAME))

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        allocator = _allocator(self._adapted())
        if allocator is not None and checkpoint is not None:
            file = os.path.join(checkpoint, ALLOCATOR_NAME)
            if os.path.isfile(file):
                allocator.load_state_dict(torch.load(file, weights_only=True))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _load(adapted, resume_from_checkpoint)

    def _load_best_model(self: Any) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._load_best_model()
        else:
            _load(adapted, self.state.best_model_checkpoint)


def _allocator(model: PeftModel | None) -> RankAllocator | None:
    return getattr(model, "rankallocator", None)


def _load(model: PeftModel, folder: str) -> None:
    for name in model.peft_config:
        model.load_adapter(folder if name == "default" else os.path.join(folder, name), name, is_trainable=True)


__all__ = ["AdapterTrainerMixin", "Allocates"]
