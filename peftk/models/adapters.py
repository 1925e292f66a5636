"""The adapters of one model: which exist, which are active, and how they are merged and removed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn import PeftConfig
from ..nn.base.adapter_layer import AdapterLayer
from ..nn.base.config import check_adapter_name
from ..nn.base.freezing import set_trainable
from ..nn.base.merging import check_finite, check_keep_base
from ..nn.base.offloading import HOOK_NAMES
from ..nn.base.saved import ModulesToSaveWrapper
from ..nn.base.undo import Before, all_or_nothing, process_kept, put_back
from ..nn.base.walking import all_modules, all_parameters
from .adalora import Allocating
from .batch_statistics import batches_seen
from .file_keys import biases, file_tensors
from .plan import Plan, attach, make_plan, plan_of, replace_module
from .quantised_layers import make_dense, quantise_again
from .targets import candidates, describe_unknown
from .ties import holders, note_untied, sharing
from .tokens import alike

_MISSING = "Hugging Face PEFT has it, peftk lacks it"
_XLORA = "it belongs to X-LoRA, and this model has no X-LoRA adapter"
# What PEFT's models answer themselves. A base model asked in their place would do something else, or be blamed.
ABSENT = {
    "push_to_hub": f"{_MISSING} here; call that of the PeftModel",
    "rankallocator": "no adapter of this model is a trainable AdaLoRA adapter",
    "active_peft_config": "no adapter is active",
    **dict.fromkeys(
        (
            "add_weighted_adapter",
            "create_or_update_model_card",
            "get_model_config",
            "get_prompt",
            "get_prompt_embedding_to_save",
            "inject_adapter",
            "prepare_model_for_gradient_checkpointing",
            "resize_modules_by_rank_pattern",
            "resize_state_dict_by_rank_pattern",
            "subtract_mutated_init",
            "supports_lora_conversion",
        ),
        _MISSING,
    ),
    **dict.fromkeys(
        (
            "clear_scalings_log",
            "disable_scalings_logging",
            "enable_scalings_logging",
            "get_bucketed_scalings_log",
            "get_global_scaling_weight",
            "get_latest_scalings",
            "get_scalings_log",
            "set_global_scaling_weight",
            "set_scaling_pass_value",
            "set_topk_lora",
        ),
        _XLORA,
    ),
}


class Tuner(Allocating):
    """Holds the adapted model under `model`, which gives parameters the names that PEFT gives them.

    Args:
        model: The base model; its layers are replaced in place.
    """

    uses_shared_state = False
    """PEFT's word for methods whose adapters share tensors between layers, which none here does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module("model", model)
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapters: list[str] = []
        self._start_allocating()
        # What training has changed since is not in any adapter.
        self._counted: dict[str, int] = {}
        # Not by train(), which would reach into the model.
        self.training = model.training

    if TYPE_CHECKING:
        # A property of `XLoraModel`: nobody puts another one here.
        @property
        def model(self) -> nn.Module:
            """The base model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the adapted model."""
        return self._with_regulariser(self.model(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # X-LoRA's `model` is that of its `lora_model`.
            if name in ("model", "lora_model", *HOOK_NAMES) or name[:2] == "__":
                raise
        # Raised here, because the base model may have a method of this name that does something else.
        if name in ABSENT:
            raise AttributeError(f"PeftModel has no {name!r}: {ABSENT[name]}")
        return getattr(self.model, name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Called before any module inside is loaded: a load that a merged layer refuses changes nothing.
        for path, layer in self._layers():
            layer.check_load(state_dict, f"{prefix}model.{path}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or the list of them if there is not exactly one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    def _layers(self) -> Iterator[tuple[str, AdapterLayer]]:
        """Yield the path and the layer of every adapted layer."""
        for path, module in candidates(self.model).items():
            if isinstance(module, AdapterLayer):
                yield path, module

    def _parts(self) -> list[AdapterLayer | ModulesToSaveWrapper]:
        """Return every adapted layer, and after them every module that is trained in full: one walk for both."""
        found = candidates(self.model).values()
        layers = [module for module in found if isinstance(module, AdapterLayer)]
        return [*layers, *(module for module in found if isinstance(module, ModulesToSaveWrapper))]

    def _wrappers(self) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
        """Yield the path and the wrapper of every module that is trained in full."""
        for path, module in candidates(self.model).items():
            if isinstance(module, ModulesToSaveWrapper):
                yield path, module

    def _known(self, names: str | Sequence[str], argument: str = "adapter_name") -> list[str]:
        """Return the names as a list, or raise ValueError if one of them does not exist."""
        names = [names] if isinstance(names, str) else list(names)
        missing = [name for name in names if name not in self.peft_config]
        if missing:
            there = describe_unknown(map(str, missing), self.peft_config)
            raise ValueError(f"{argument}: Adapter {missing[0]} does not exist: {there}")
        return names

    # -- adding and choosing ----------------------------------------------------------------------------------

    def _check_new(self, name: str, config: PeftConfig) -> None:
        """Raise unless an adapter of this name and configuration may be added."""
        check_adapter_name(name)
        if name in self.peft_config:
            raise ValueError(f"adapter_name: {name!r} exists already; delete it or choose another name")
        for other, present in self.peft_config.items():
            if type(present) is not type(config) and (present._alone or config._alone):
                raise ValueError(
                    f"peft_config: {config._kind} cannot be added to a model with adapter {other!r}, which "
                    f"is {present._kind}; one of the two must be the only method of its model"
                )
        with_bias = [other for other, c in self.peft_config.items() if c.bias_mode != "none"]
        if with_bias and config.bias_mode != "none":
            raise ValueError(
                f"bias: adapter {with_bias[0]!r} trains biases of the base model already, and only one adapter can; "
                f"use bias='none', got {config.bias_mode!r}"
            )
        self._check_one_trained(config)

    def _plan(self, name: str, config: PeftConfig, **options: Any) -> Plan:
        """Make all tensors of a new adapter without touching the model; see `make_plan`."""
        return make_plan(self.model, name, config, **options)

    def _plan_of(self, name: str) -> Plan:
        """Describe an adapter that the model has already."""
        return plan_of(self.model, name, self.peft_config[name])

    def _file_tensors(self, plan: Plan) -> dict[str, Tensor]:
        """Map every key of an adapter's file to its tensor; see `file_tensors`."""
        return file_tensors(self.model, plan)

    @contextlib.contextmanager
    def _whole(self, root: nn.Module | None = None) -> Iterator[Before]:
        """Undo what a block does to the model and its adapters, and to the module around them, if it fails.

        Numbers in tensors that the model has already are not among that, but for those that the block asks to keep.
        """
        modules = all_modules(self, *([] if root is None else [root]))
        with process_kept(), all_or_nothing(modules, all_parameters(modules)) as before:
            yield before

    @contextlib.contextmanager
    def _switches(self, parts: Sequence[AdapterLayer | ModulesToSaveWrapper]) -> Iterator[None]:
        """Undo what a block does to the choice of adapters and to what is trained or merged if it fails."""
        switched = [m for part in parts for m in (part.switched() if isinstance(part, AdapterLayer) else (part,))]
        with process_kept(), all_or_nothing([self, *switched], all_parameters(all_modules(self))):
            yield

    def _commit(self, plan: Plan) -> None:
        """Add a planned adapter, inside of `_whole`. The first one becomes active; a later one waits to be chosen."""
        first = not self.peft_config
        if first:
            self._counted = batches_seen(self.model)
            self.model.requires_grad_(False)
        attach(self.model, plan)
        self.peft_config[plan.name] = plan.config
        if first:
            self._choose(self._parts(), [plan.name], plan.config.inference_mode)
        else:
            for _, layer in self._layers():
                layer.active_adapters = list(self.active_adapters)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters, and no others, active and (unless `inference_mode`) trainable."""
        names = self._known(adapter_name)
        parts = self._parts()
        for part in parts:
            part.check_set_adapter(names)
        self._check_unmerge(parts)
        with self._switches(parts):
            self._choose(parts, names, inference_mode)

    def _choose(
        self, parts: Sequence[AdapterLayer | ModulesToSaveWrapper], names: list[str], inference_mode: bool
    ) -> None:
        # Those that are trained in full first: a layer has the last word about a parameter of both.
        for part in reversed(parts):
            part.set_adapter(names, inference_mode)
        self.active_adapters = names
        for name in [n for n in self.peft_config if n not in names] + names:
            if self.peft_config[name].bias_mode != "none":
                for _, bias in biases(self.model, plan_of(self.model, name, self.peft_config[name])):
                    set_trainable(bias, name in names and not inference_mode)
        # With bias="all" the originals of fully trained modules are listed too; they are never trained.
        for part in parts:
            if isinstance(part, ModulesToSaveWrapper):
                part.original_module.requires_grad_(False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters without activating them."""
        names = self._known(adapter_names, "adapter_names")
        parts = self._parts()
        with self._switches(parts):
            for part in parts:
                part.set_requires_grad(names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, the first that remains becomes active."""
        self._known(adapter_name)
        merged = [path for path, layer in self._layers() if adapter_name in layer.merged_adapters]
        if merged:
            raise ValueError(
                f"adapter_name: Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them "
                f"first. (It is merged into {merged[0]!r}.)"
            )
        with self._whole():
            self._delete(adapter_name)

    def _delete(self, adapter_name: str) -> None:
        for part in self._parts():
            part.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        self._forget_allocator(adapter_name)
        remaining = [name for name in self.active_adapters if name != adapter_name]
        if not remaining and self.active_adapters and self.peft_config:
            remaining = [next(iter(self.peft_config))]
            warnings.warn(f"delete_adapter: {adapter_name!r} was active; {remaining[0]!r} is active now", stacklevel=4)
            self.set_adapter(remaining)
        self.active_adapters = remaining

    # -- switching off ----------------------------------------------------------------------------------------

    def enable_adapter_layers(self) -> None:
        """Switch all adapters on."""
        parts = self._parts()
        with self._switches(parts):
            for part in parts:
                part.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off; merged layers are unmerged."""
        for name in self.active_adapters:
            mode = self.peft_config[name].bias_mode
            if mode != "none":
                warnings.warn(
                    f"disable_adapter: adapter {name!r} trains biases of the base model (bias={mode!r}), so the output "
                    "is not that of the original model",
                    stacklevel=3,
                )
        parts = self._parts()
        self._check_unmerge(parts)
        with self._switches(parts):
            for part in parts:
                part.enable_adapters(False)

    @contextlib.contextmanager
    def _disabled(self) -> Iterator[None]:
        """Switch all adapters off and freeze them for a block, and restore every layer exactly, merged ones too."""
        modules = self._parts()
        # In the middle of a pass FSDP has views in their place, which cannot be frozen.
        trained = [p for module in modules for p in _parameters_of(module) if p.requires_grad and p.is_leaf]
        was_disabled = [module.disable_adapters for module in modules]
        was_merged = [(m, *_merge_state(m)) for m in modules if isinstance(m, AdapterLayer) and m.merged]

        def restore() -> None:
            for module, disabled in zip(modules, was_disabled, strict=True):
                module.disable_adapters = disabled
            for parameter in trained:
                parameter.requires_grad_(True)
            for layer, names, keep_base in was_merged:
                if not layer.merged:
                    layer.merge(adapter_names=names, keep_base=keep_base)

        with put_back(restore):
            self.disable_adapter_layers()
            for parameter in trained:
                parameter.requires_grad_(False)
            yield

    # -- merging and removing ---------------------------------------------------------------------------------

    def _check_merge(self, adapter_names: Sequence[str] | None) -> list[str] | None:
        """Return the names to merge, or None for what each layer runs."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names: expected a list of adapter names, got {adapter_names!r}")
        names = None if adapter_names is None else self._known(adapter_names, "adapter_names")
        held = holders(self.model)
        for path, layer in self._layers():
            if not layer._to_merge(names):
                continue
            try:
                layer.check_merge(names)
                layer.check_written()
            except ValueError as error:
                raise ValueError(f"module {path!r}: {error}") from None
            weight = layer.weight
            if held[id(weight)] > 1 and held[id(weight)] > alike((layer for _, layer in self._layers()), weight, names):
                raise ValueError(
                    f"merge: the weight of {path!r} is shared by {sharing(self.model, weight)}, and merging "
                    "would change all of them; give the layer a copy of the weight first"
                )
        return names

    def _check_unmerge(self, parts: Iterable[AdapterLayer | ModulesToSaveWrapper]) -> None:
        for layer in parts:
            if isinstance(layer, AdapterLayer) and layer.merged_adapters:
                try:
                    layer.check_written()
                except ValueError as error:
                    path = next(path for path, other in self._layers() if other is layer)
                    raise ValueError(f"module {path!r}: {error}") from None

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, *, keep_base: str = "device"
    ) -> None:
        """Merge adapters into the base weights, in every layer or, if one of them fails, in none."""
        check_keep_base(keep_base)
        names = self._check_merge(adapter_names)
        layers = [layer for _, layer in self._layers()]
        if layers and all(layer.merged_adapters and not layer._to_merge(names) for layer in layers):
            warnings.warn("merge_adapter: All adapters are already merged, nothing to do", stacklevel=3)
        with self._switches(layers):
            for layer in layers:
                layer.merge_checked(safe_merge, names, keep_base=keep_base)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit, or raise ValueError: see `AdapterLayer.unmerge`."""
        layers = [layer for _, layer in self._layers()]
        self._check_unmerge(layers)
        with self._switches(layers):
            for layer in layers:
                if layer.merged:
                    layer.unmerge_checked()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        dequantise: bool = False,
        requantise: bool = False,
    ) -> nn.Module:
        """Merge adapters and return the base model without any adapter layer; see `PeftModel.merge_and_unload`."""
        with self._whole():
            replaced = []
            if dequantise or requantise:
                layers = {path: layer for path, layer in self._layers() if layer._to_merge(adapter_names)}
                replaced = make_dense(self.model, layers, requantise)
            names = self._check_merge(adapter_names)
            if safe_merge:
                for path, layer in self._layers():
                    acting = layer.active_adapters if names is None else names
                    check_finite(layer.merged_tensors(names), acting, f"of {path!r} ")
            model = self._merge_for_good(names, progressbar)
            quantise_again(model, replaced if requantise else [])
            return model

    def _merge_for_good(self, names: list[str] | None, progressbar: bool) -> nn.Module:
        for path, layer in _progress(list(self._layers())[::-1], progressbar, "Merging"):
            layer.merge_checked(adapter_names=names)
            replace_module(self.model, path, layer.unwrap())
        for path, wrapper in list(self._wrappers()):
            found = wrapper.active_adapters if names is None else wrapper.check_set_adapter(names)
            replace_module(self.model, path, wrapper.modules_to_save[found[0]] if found else wrapper.original_module)
        note_untied(self.model)
        return self.model

    def unload(self) -> nn.Module:
        """Return the base model with its original weights and modules; see `PeftModel.unload`."""
        with self._whole():
            self.unmerge_adapter()
            for path, layer in list(self._layers())[::-1]:
                replace_module(self.model, path, layer.unwrap())
            for path, wrapper in list(self._wrappers()):
                replace_module(self.model, path, wrapper.original_module)
            return self.model


def _parameters_of(part: AdapterLayer | ModulesToSaveWrapper) -> Iterator[nn.Parameter]:
    """Yield the parameters of all adapters in an adapted layer or a module that is trained in full."""
    if isinstance(part, ModulesToSaveWrapper):
        yield from part.modules_to_save.parameters()
        return
    for name in part.adapter_names:
        for held in part.adapter(name).parts.values():
            yield from held.parameters() if isinstance(held, nn.Module) else (held,)


def _merge_state(layer: AdapterLayer) -> tuple[list[str], str]:
    kept: Tensor | None = layer._original.get(layer.weight_name)
    on_cpu = kept is not None and kept.device != layer.weight.device and kept.device == torch.device("cpu")
    return list(layer.merged_adapters), "cpu" if on_cpu else "device"


def _progress(items: list[Any], show: bool, description: str) -> Any:
    if not show:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=description)
