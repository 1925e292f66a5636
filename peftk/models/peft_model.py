"""`get_peft_model` and `PeftModel`: adapters on a whole model, with PEFT's names, files and methods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn import PeftConfig
from ..nn.base.config import check_bool
from ..nn.base.foreign_config import as_config
from ..nn.base.offloading import HOOK_NAMES
from ..nn.base.scaling import note_attention_scale
from .adapters import Tuner
from .mixed import mixed_batch
from .plan import Plan
from .pretrained import Pretrained, check_base
from .signature import refuse_forward_of_trl, restore, with_signature_of
from .status import TunerLayerStatus, TunerModelStatus, count_parameters, get_layer_status, get_model_status
from .weighted import add_weighted_adapter
from .xlora import tuner_for


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig | Mapping[str, Any],
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adapt a model: freeze it, wrap the modules that the configuration names, and return the trainable whole.

    The layers of `model` are replaced in place; `peft_config` is copied. If anything is wrong, both stay as they are.

    Args:
        model: Any nn.Module.
        peft_config: The method and its targets, for instance a `LoraConfig`; a configuration of Hugging Face PEFT, or a
            dict of fields, is converted.
        adapter_name: The name of the adapter.
        mixed: Must be False: for several methods on different layers, add another adapter.
        autocast_adapter_dtype: Keep adapter parameters in float32 on a half-precision base.
        revision: The revision of the base model, kept in the configuration.
        low_cpu_mem_usage: Accepted for scripts that pass it: the adapter is made with memory and initial values.

    Returns:
        The adapted model, ready to train: a `PeftModelForCausalLM` and so on, if the configuration names a task.

    Raises:
        TypeError: An argument has the wrong type, or a targeted module cannot be adapted.
        ValueError: A target is unknown (the message names the closest), or an argument is out of range.

    Example:
        >>> import torch, peftk
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = peftk.get_peft_model(base, peftk.LoraConfig(r=1, target_modules=["0"]))
        >>> model.get_nb_trainable_parameters()
        (8, 28)
    """
    check_bool("mixed", mixed)
    if mixed:
        raise ValueError("mixed: expected False; add adapters of other methods to other layers with add_adapter")
    check_bool("low_cpu_mem_usage", low_cpu_mem_usage)
    given = as_config("peft_config", peft_config)
    check_base(model)
    cls = PeftModel._for_task(given)
    result = cls.__new__(cls)
    tuner = tuner_for(model, given)
    tuner._check_new(adapter_name, given)
    with tuner._whole() as before:
        plan = tuner._plan(adapter_name, given, autocast_adapter_dtype=autocast_adapter_dtype)
        before.keep(plan.changed())
        result._start(tuner, plan)
        config = result.peft_config[adapter_name]
        config.base_model_name_or_path = model.__dict__.get("name_or_path") or config.base_model_name_or_path
        config.revision = revision or config.revision
        return result


class PeftModel(Pretrained):
    """A model with named adapters. Attributes that it does not have are those of the base model.

    Parameters are named as by PEFT: `base_model.model.<path>.lora_A.<adapter>.weight` and so on. The class of an object
    is a subclass made for its base model: its `forward` has the signature of the base model's.

    Args:
        model: The base model; its layers are replaced in place.
        peft_config: The configuration of the first adapter.
        adapter_name: Its name.
        autocast_adapter_dtype: Keep adapter parameters in float32 on a half-precision base.
        low_cpu_mem_usage: As in `get_peft_model`.
    """

    _by_task: ClassVar[dict[str, type[PeftModel]]] = {}

    def __init_subclass__(cls, task: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            PeftModel._by_task[task] = cls

    @classmethod
    def _for_task(cls, config: PeftConfig) -> type[PeftModel]:
        """Return the class of a model whose first adapter has this configuration."""
        return cls if cls is not PeftModel else cls._by_task.get(config.task_type or "", cls)

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        check_bool("low_cpu_mem_usage", low_cpu_mem_usage)
        peft_config = as_config("peft_config", peft_config)
        check_base(model)
        tuner = tuner_for(model, peft_config)
        tuner._check_new(adapter_name, peft_config)
        with tuner._whole() as before:
            plan = tuner._plan(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
            before.keep(plan.changed())
            self._start(tuner, plan)

    def _start(self, tuner: Tuner, plan: Plan) -> None:
        super().__init__()
        tuner._commit(plan)
        self.base_model = tuner
        self.peft_type = plan.config.peft_type
        self.train(tuner.model.training)
        model = tuner.model
        self.__class__ = with_signature_of(type(self), type(model))
        # Checkpointed blocks compute gradients only if an input asks for them, which none does of frozen embeddings.
        renamed = hasattr(type(model), "is_activation_checkpointing")
        flag = "is_activation_checkpointing" if renamed else "is_gradient_checkpointing"
        if getattr(model, flag, False) and (enable := getattr(model, "enable_input_require_grads", None)):
            enable()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the adapted model; `adapter_names` gives every sample in evaluation a LoRA adapter, or "__base__"."""
        if not torch.compiler.is_compiling():
            note_attention_scale(kwargs)
        if torch.jit.is_tracing():  # type: ignore[attr-defined]  # torch imports it and exports it no further.
            # An autograd.Function is traced as a call into Python: it cannot be saved, and is missing from the trace
            # without gradients with which torch checks the first. What is traced in its place has gradients too.
            with torch.no_grad(), mixed_batch(self.base_model, kwargs):
                return self.base_model(*args, **kwargs)
        if "adapter_names" not in kwargs:
            return self.base_model(*args, **kwargs)
        with mixed_batch(self.base_model, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the adapted model; `adapter_names` as in `forward`."""
        with mixed_batch(self.base_model, kwargs):
            return self.base_model.generate(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made for this base model, and cannot be found by its name.
        public = getattr(type(self), "_public_class", type(self))
        return restore, (public, type(self.get_base_model())), self.__dict__

    def _get_name(self) -> str:
        # transformers.Trainer looks this name up among those of the causal language models, to shift smoothed labels.
        return self.get_base_model()._get_name()

    def __repr__(self) -> str:
        return getattr(type(self), "_public_class", type(self)).__name__ + super().__repr__()[len(self._get_name()) :]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            refuse_forward_of_trl(value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", *HOOK_NAMES) or name[:2] == "__":
                raise
        return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """Return the base model, with the adapter layers in it."""
        return self.base_model.model

    # -- adapters ---------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configuration of every adapter, by name."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or the list of them if there is not exactly one."""
        return self.base_model.active_adapter

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the first active adapter."""
        if not self.active_adapters:
            raise AttributeError("active_peft_config: no adapter is active")
        return self.peft_config[self.active_adapters[0]]

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained adapter of any method; `set_adapter` activates it. On failure nothing changes."""
        check_bool("low_cpu_mem_usage", low_cpu_mem_usage)
        peft_config = as_config("peft_config", peft_config)
        tuner = self.base_model
        tuner._check_new(adapter_name, peft_config)
        with tuner._whole():
            plan = tuner._plan(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
            tuner._commit(plan)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add a LoRA adapter that is a weighted combination of others, frozen; `set_adapter` activates it.

        Args:
            adapters: The names of LoRA adapters, without DoRA.
            weights: A number for each, which its own scale is multiplied by.
            adapter_name: The name of the new adapter.
            combination_type: "cat" is the exact sum, of the sum of the ranks; "svd" is its best approximation of
                `svd_rank`; "linear" sums the factors themselves, as PEFT does, which is not the sum of the updates.
                "ties", "dare_linear", "dare_ties" and "magnitude_prune" prune before they sum, factors or, with "_svd"
                behind, updates.
            svd_rank: None means the largest of the ranks.
            svd_clamp: The quantile to which the numbers of the new factors are clamped.
            svd_full_matrices: As in `torch.linalg.svd`.
            svd_driver: As in `torch.linalg.svd`.
            density: The share of numbers that pruning leaves.
            majority_sign_method: How the sign that counts is found: by the "total" or the "frequency".

        Raises:
            ValueError: An argument is not one of the above, or the adapters do not go together.
        """
        options = combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method
        add_weighted_adapter(self.base_model, adapters, weights, adapter_name, *options)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make this adapter (or these), and no other, active and (unless `inference_mode`) trainable."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; a merged one must be unmerged first."""
        self.base_model.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run a block with the base model's own outputs and frozen adapters; afterwards all is exactly as before."""
        with self.base_model._disabled():
            yield

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, *, keep_base: str = "device"
    ) -> None:
        """Merge the active (or the named) adapters into the base weights, in every layer or in none.

        The original weights are kept for `unmerge_adapter`, `keep_base` says where: "device" or "cpu". That costs one
        copy of every adapted weight, and is the only exact way back.

        Raises:
            ValueError: With `safe_merge`, a merged weight would not be finite.
        """
        self.base_model.merge_adapter(adapter_names, safe_merge, keep_base=keep_base)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit.

        Raises:
            ValueError: A merged weight was written to since, for instance by an optimizer; that would be lost.
        """
        self.base_model.unmerge_adapter()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        dequantise: bool = False,
        requantise: bool = False,
    ) -> nn.Module:
        """Merge the active (or the named) adapters for good and return the base model without adapter layers.

        Args:
            progressbar: Show a progress bar.
            safe_merge: Check all merged weights first; if one is not finite, nothing is changed.
            adapter_names: Which adapters, in the order in which they act.
            dequantise: Put a dense nn.Linear in place of a layer that bitsandbytes or torchao has quantised, and merge
                into that; without it, such a layer is refused.
            requantise: Do that, and quantise the merged weights as they were, where bitsandbytes did it; a warning says
                which share of the adapters rounding loses.

        Returns:
            The base model, with the trained copies of `modules_to_save` in place. This object must not be used again.
        """
        options = {"dequantise": dequantise, "requantise": requantise}
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names, **options)

    def unload(self) -> nn.Module:
        """Return the base model as it was before it was adapted: original weights, original modules, frozen."""
        return self.base_model.unload()

    # -- AdaLoRA ----------------------------------------------------------------------------------------------

    def update_and_allocate(self, global_step: int) -> None:
        """Take in the gradients of a step and prune the trainable AdaLoRA adapter when its schedule says so.

        Call it in every training step, after `loss.backward()` and before the gradients are cleared.

        Args:
            global_step: The number of the step, from 0 to `total_step`.

        Raises:
            ValueError: There is no trainable AdaLoRA adapter, or there are no gradients.
        """
        self.base_model.update_and_allocate(global_step)

    def orthogonality_loss(self) -> Tensor:
        """Return AdaLoRA's regulariser, `orth_reg_weight` included: a scalar to be added to the loss in training.

        ``orth_reg_weight * mean(||A A^T - I||, ||B^T B - I||)`` over all A and B of the trainable AdaLoRA adapter,
        Frobenius norms. A model whose configuration has a `task_type` adds it to `outputs.loss` itself, as in PEFT,
        unless `orth_reg_in_loss` is False.

        Raises:
            ValueError: There is no trainable AdaLoRA adapter.
        """
        return self.base_model.orthogonality_loss()

    # -- numbers ----------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters are trainable, and how many there are; packed ones are counted one by one."""
        return count_parameters(self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the state of every adapted layer; see `peftk.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Return the state of the adapters as a whole; see `peftk.get_model_status`."""
        return get_model_status(self)


__all__ = ["PeftModel", "get_peft_model"]
