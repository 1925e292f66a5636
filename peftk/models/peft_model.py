"""`get_peft_model` and `PeftModel`: adapters on a whole model, with PEFT's names, files and methods."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn import AdapterLayer, PeftConfig
from ..nn.base.config import check_bool, check_choice
from ..nn.base.foreign_config import as_config
from ..nn.base.offloading import HOOK_NAMES
from ..nn.base.scaling import note_attention_scale
from .adapters import Tuner
from .loading import read_into_plan
from .mixed import mixed_batch
from .plan import Plan
from .saving import save_adapter
from .signature import restore, with_signature_of
from .status import TunerLayerStatus, TunerModelStatus, count_parameters, get_layer_status, get_model_status
from .xlora import tuner_for, tuner_for_file


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
    _check_base(model)
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


class PeftModel(nn.Module):
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
        _check_base(model)
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

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make this adapter (or these), and no other, active and (unless `inference_mode`) trainable."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; a merged one must be unmerged first."""
        self.base_model.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run a block with the base model's own outputs; afterwards every layer is exactly as before."""
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
    ) -> nn.Module:
        """Merge the active (or the named) adapters for good and return the base model without adapter layers.

        Args:
            progressbar: Show a progress bar.
            safe_merge: Check all merged weights first; if one is not finite, nothing is changed.
            adapter_names: Which adapters, in the order in which they act.
            dequantise: Put a dense nn.Linear in place of a layer that bitsandbytes or torchao has quantised, and merge
                into that; without it, such a layer is refused.

        Returns:
            The base model, with the trained copies of `modules_to_save` in place. This object must not be used again.
        """
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names, dequantise=dequantise)

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
        Frobenius norms. PEFT adds it to `outputs.loss` by itself; here nothing is added that was not asked for.

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

    # -- files ------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write adapters in PEFT's format: "default" into the folder itself, others into sub-folders of their name.

        Args:
            save_directory: The folder; it is created.
            safe_serialization: Must be True: pickles are not written.
            selected_adapters: Which adapters; None means all.
            save_embedding_layers: Whether to write the embeddings of the base model too; "auto" does so, with a
                warning, where its vocabulary was resized, because nobody else has the new rows.
            is_main_process: Write only if True.
            path_initial_model_for_weight_conversion: The folder of the adapter as it was before it was trained; what
                it has learned since is then written as a LoRA adapter of twice the rank.

        Raises:
            ValueError: An argument is not one of the above.
        """
        if safe_serialization is not True:
            raise ValueError(f"safe_serialization: expected True (pickles are refused), got {safe_serialization!r}")
        check_choice("save_embedding_layers", save_embedding_layers, ("auto", True, False))
        folder = os.fspath(save_directory)
        if os.path.isfile(folder):
            raise ValueError(f"save_directory: expected a folder, got the file {folder!r}")
        chosen = list(self.peft_config) if selected_adapters is None else selected_adapters
        names = self.base_model._known(chosen, "selected_adapters")
        options = save_embedding_layers, path_initial_model_for_weight_conversion
        for name in names if is_main_process else ():
            save_adapter(self.base_model, name, folder if name == "default" else os.path.join(folder, name), *options)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        key_mapping: Mapping[str, str] | None = None,
    ) -> PeftModel:
        """Load an adapter that peftk or PEFT has saved onto its base model.

        The whole file is read and checked before the model is touched; if anything is wrong, it stays as it is.

        Args:
            model: The base model; its layers are replaced in place.
            model_id: The folder of the adapter. Nothing is downloaded.
            adapter_name: The name that the adapter gets.
            is_trainable: Whether it can be trained further; if not, the model is put into evaluation mode.
            autocast_adapter_dtype: Keep adapter parameters in float32 on a half-precision base.
            low_cpu_mem_usage: Accepted for scripts that pass it: what is loaded is never initialised first.
            adapters: For X-LoRA: names to the folders of the experts; None means the sub-folders 0, 1, ... of
                `model_id`.
            key_mapping: Regular expressions to replacements for the keys of the file without `base_model.model.`, of
                which the first that is found counts. None means the `_checkpoint_conversion_mapping` of the model.

        Raises:
            ValueError: The file is damaged, or its keys or shapes do not fit the model.
        """
        check_bool("low_cpu_mem_usage", low_cpu_mem_usage)
        check_bool("is_trainable", is_trainable)
        _check_base(model)
        tuner = tuner_for_file(model, model_id, adapters, key_mapping)
        result = cls.__new__(cls)
        with tuner._whole() as before:
            options = is_trainable, autocast_adapter_dtype, None, key_mapping
            read = read_into_plan(tuner, model_id, adapter_name, *options)
            before.keep([*read.changed, *read.plan.changed()])
            result._start(tuner, read.plan)
            read.fill()
            if not is_trainable:
                result.eval()
            return result

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
    ) -> None:
        """Load another saved adapter, or new values for one that exists; `set_adapter` activates it.

        On failure nothing changes. Arguments as in `from_pretrained`.
        """
        check_bool("low_cpu_mem_usage", low_cpu_mem_usage)
        tuner = self.base_model
        with tuner._whole(self) as before:
            read = read_into_plan(
                tuner, model_id, adapter_name, is_trainable, autocast_adapter_dtype, key_mapping=key_mapping
            )
            before.keep(read.changed)
            if adapter_name not in self.peft_config:
                tuner._commit(read.plan)
                if is_trainable:
                    tuner.set_requires_grad(adapter_name)
            read.fill()
            if not is_trainable:
                self.eval()


def _check_base(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError("model: it is a PeftModel already; use add_adapter or load_adapter, or unload it first")
    adapted = next((name for name, module in model.named_modules() if isinstance(module, AdapterLayer)), None)
    if adapted is not None:
        raise ValueError(f"model: module {adapted!r} is adapted already; call unload on the PeftModel that owns it")


__all__ = ["PeftModel", "get_peft_model"]
