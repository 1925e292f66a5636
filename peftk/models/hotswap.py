"""Other values, ranks and scales for an adapter that a compiled model has, without compiling it again."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.container import shown
from ..nn import AdapterLayer, LoraConfig, PeftConfig
from ..nn.base.config import check_choice, check_int
from ..nn.base.undo import all_or_nothing
from ..nn.lora.layer import LoRALayer
from ..nn.lora.padding import resized, set_factor
from ..nn.lora.start import starts_inside
from ..nn.xlora.layer import XLoraLayer
from .adapters import Tuner
from .file_keys import PREFIX, as_in_file, as_in_memory, same_meaning, without_values
from .loading import (
    check_not_merged,
    check_there,
    config_values,
    expected_of,
    naming_the_file,
    read_config,
    rename_fields,
    rename_of,
)
from .names import named_modules, unwrapped
from .peft_model import PeftModel
from .plan import Plan
from .pretrained import local_adapter
from .targets import resolve

_FREE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""The fields in which an adapter may differ from the one that it replaces."""


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Make room in the LoRA adapters of a model for others, so that `hotswap_adapter` changes no shape and no number.

    Call it after the first adapter was loaded and before the model is compiled. Scales become tensors, and the factors
    get zeros, which change no output and are not saved. On failure nothing changes.

    Args:
        model: A PeftModel, or any module that holds adapted layers.
        target_rank: The largest rank of the adapters to come; None leaves ranks as they are.
        config: A configuration, or several by name, whose `r` becomes `target_rank` and whose `lora_alpha` becomes what
            leaves the scale as it is. Given those of the model, its adapters are saved with that rank.
        check_compiled: "error", "warn" or "ignore": what to do if the model is compiled already.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The model is compiled, it has no LoRA layer or one of X-LoRA, or `target_rank` is too small for one.

    Example:
        >>> import torch, peftk
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = peftk.get_peft_model(base, peftk.LoraConfig(r=1, target_modules=["0"]))
        >>> peftk.prepare_model_for_compiled_hotswap(model, target_rank=8)
        >>> model.base_model.model[0].lora_A["default"].weight.shape
        torch.Size([8, 4])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_choice("check_compiled", check_compiled, ("error", "warn", "ignore"))
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        if check_compiled == "error":
            raise ValueError(
                "model: it is compiled already. Call prepare_model_for_compiled_hotswap *before* compiling the model"
            )
        if check_compiled == "warn":
            warnings.warn(
                "model: prepare_model_for_compiled_hotswap was called with a model that is already compiled, and what "
                "it changes will be compiled again; call it before",
                stacklevel=2,
            )
    layers = [(path, layer) for path, layer in named_modules(model) if isinstance(layer, LoRALayer)]
    if not layers:
        raise ValueError(
            "model: No adapter layers found on the model; load the first LoRA adapter, call "
            "prepare_model_for_compiled_hotswap, and load others by hotswap_adapter"
        )
    for path, layer in layers:
        if isinstance(layer, XLoraLayer):
            raise ValueError(f"model: module {path!r} is one of X-LoRA, whose experts cannot be swapped")
    configs = _configs(config)
    if target_rank is not None:
        check_int("target_rank", target_rank, 1, 1 << 20)
        _check_room(layers, target_rank)
    with all_or_nothing(*_touched(layers)):
        for _, layer in layers:
            for name in layer.adapter_names:
                _make_room(layer, name, target_rank)
    if target_rank is not None:
        for given in configs:
            _set_rank(given, target_rank)


def _configs(config: object) -> list[LoraConfig]:
    found = []
    for value in config.values() if isinstance(config, Mapping) else () if config is None else (config,):
        if not isinstance(value, LoraConfig):
            raise TypeError(f"config: expected a LoraConfig, or a dict of them, got {type(value).__name__}")
        found.append(value)
    return found


def _check_room(layers: list[tuple[str, LoRALayer]], target_rank: int) -> None:
    for path, layer in layers:
        if target_rank % layer.groups:
            raise ValueError(
                f"target_rank: Trying to pad an adapter on module {path!r}, a convolution with groups={layer.groups}, "
                f"to target rank {target_rank}, but the target rank is not divisible by {layer.groups}"
            )
        for name in layer.adapter_names:
            if layer.r[name] > target_rank:
                raise ValueError(
                    f"target_rank: Trying to pad the adapter to the target rank {target_rank}, but the original rank "
                    f"is larger ({layer.r[name]}): that of {name!r} on module {path!r}"
                )


def _touched(layers: Iterable[tuple[str, LoRALayer]]) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """Return the modules and the parameters that a change of ranks, scales or values touches."""
    modules: list[nn.Module] = []
    for _, layer in layers:
        held = [part for name in layer.adapter_names for _, part in layer.factors(name)]
        modules += [layer, *(part for part in held if isinstance(part, nn.Module))]
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    bare = [p for _, layer in layers for c in layer.parameter_names for p in getattr(layer, c).values()]
    return modules, [*parameters, *bare]


def _make_room(layer: LoRALayer, name: str, target_rank: int | None) -> None:
    scale = layer.scaling[name]
    holders = layer.factors(name)
    if not isinstance(scale, Tensor):
        weight = _held(holders[0][1])
        dtype = torch.promote_types(weight.dtype, torch.float32)
        layer.scaling[name] = torch.tensor(float(scale), dtype=dtype, device=weight.device)
    if target_rank is not None:
        for which, (_, part) in enumerate(holders):
            set_factor(part, which, layer.groups, resized(_held(part).detach(), which, layer.groups, target_rank))
        layer.r[name] = target_rank


def _held(part: Any) -> Tensor:
    return part if isinstance(part, nn.Parameter) else part.weight


def _set_rank(config: LoraConfig, rank: int) -> None:
    """Change the rank of a configuration and leave its scales as they are."""

    def alpha_for(alpha: float, before: int) -> Any:
        found = alpha * ((rank / before) ** 0.5 if config.use_rslora else rank / before)
        return int(found) if found.is_integer() else found

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    # A key of either pattern may stand for modules that the other one has no key for.
    config.alpha_pattern = {
        key: alpha_for(alphas.get(key, config.lora_alpha), ranks.get(key, config.r)) for key in {**ranks, **alphas}
    }
    config.lora_alpha = alpha_for(config.lora_alpha, config.r)
    config.r, config.rank_pattern = rank, dict.fromkeys(ranks, rank)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Put the values and scales of a saved LoRA adapter in the place of those that an adapter of a model has.

    The rank may differ. A smaller one is filled up with zeros; a larger one gets new memory, unless the model was
    prepared for another rank by `prepare_model_for_compiled_hotswap`. A module that the file does not adapt gets
    zeros. The whole file is read and checked before the model is touched; on failure nothing changes.

    Args:
        model: The PeftModel, compiled or not.
        model_name_or_path: The folder of the adapter, or the name of a repository.
        adapter_name: The adapter to replace, which keeps its name.
        torch_device: Accepted for scripts that pass it: values go where the adapter is.
        **kwargs: As in `PeftModel.from_pretrained`: where the adapter is, and `key_mapping`.

    Raises:
        TypeError: `model` is no PeftModel.
        ValueError: There is no such adapter, it is merged or no LoRA adapter; the file is damaged or one of another
            method; it adapts other modules, or more; or it differs in more than its ranks and scales.

    Example:
        >>> peftk.prepare_model_for_compiled_hotswap(model, target_rank=64)  # doctest: +SKIP
        >>> compiled = torch.compile(model)  # doctest: +SKIP
        >>> peftk.hotswap_adapter(compiled, "other-adapter", "default")  # doctest: +SKIP
    """
    inner = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, PeftModel):
        raise TypeError(f"model: expected a PeftModel, got {type(inner).__name__}")
    tuner = inner.base_model
    name = tuner._known([adapter_name], "adapter_name")[0]
    key_mapping = kwargs.pop("key_mapping", None)
    folder = local_adapter(model_name_or_path, {"torch_device": torch_device, **kwargs})
    saved = config_values(folder)
    ours = _swappable(tuner, name)
    config = naming_the_file(folder, lambda: _checked(tuner, ours, folder, key_mapping))
    plan = tuner._plan_of(name)
    layers = [(path, layer) for path, layer in tuner._layers() if name in layer.adapter_names]
    read, values = _read(tuner, plan, config, folder, saved, key_mapping)
    targets = tuner._file_tensors(plan)
    check_not_merged(tuner, {key: targets[key] for key in values})
    check_there({key: targets[key] for key in values})
    _check_prepared(layers, name, config, read)
    own = {id(p) for _, layer in layers for _, part in layer.factors(name) for p in [_held(part)]}
    changed = [targets[key] for key in values if id(targets[key]) not in own or targets[key].shape == values[key].shape]
    scales = [layer.scaling[name] for _, layer in layers if isinstance(layer.scaling[name], Tensor)]
    with tuner._whole(inner) as before, torch.no_grad():
        before.keep([*changed, *scales])
        for path, layer in layers:
            _fill(layer, name, config, path, values)
        for key, value in values.items():
            targets[key].copy_(value)
        # A new one, which is taken out again if this is interrupted.
        ours = copy.copy(tuner.peft_config[name])
        for field in _FREE:
            setattr(ours, field, copy.deepcopy(getattr(config, field)))
        tuner.peft_config[name] = ours


def _swappable(tuner: Tuner, name: str) -> LoraConfig:
    """Return the configuration of an adapter, or raise ValueError if it cannot be replaced as the model is."""
    config = _lora(tuner.peft_config[name], f"adapter_name: {name!r}")
    merged = [path for path, layer in tuner._layers() if name in layer.merged_adapters]
    if merged:
        raise ValueError(
            f"adapter_name: Cannot hot-swap adapter {name!r} because it is currently merged into {merged[0]!r}; call "
            "unmerge_adapter first"
        )
    return config


def _lora(config: PeftConfig, what: str) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{what} is {config._kind}; only LoRA adapters can be swapped")
    if starts_inside(config.init_lora_weights):
        raise ValueError(
            f"{what} has init_lora_weights={config.init_lora_weights!r}, whose factors are a part of the base weight; "
            "load adapters of that kind under a new name"
        )
    return config


def _checked(tuner: Tuner, ours: LoraConfig, folder: str, key_mapping: Mapping[str, str] | None) -> LoraConfig:
    """Return the configuration of a file; raise ValueError unless the adapter that has `ours` can become that."""
    from ..checkpoint import peft as files

    config = _lora(read_config(folder), "peft_type: the adapter")
    config.settle_with_file(lambda: files.read_shapes(folder))
    rename_fields(tuner.model, config, key_mapping)
    alike = copy.copy(config)
    for field in _FREE:
        setattr(alike, field, getattr(ours, field))
    same_meaning(ours, alike, [path for path, _ in tuner._layers()])
    if ours.lora_dropout != config.lora_dropout:
        raise ValueError(
            f"lora_dropout: the file has {config.lora_dropout}, the adapter in memory {ours.lora_dropout}; load it "
            "under a new name"
        )
    return config


def _read(
    tuner: Tuner,
    plan: Plan,
    config: LoraConfig,
    folder: str,
    saved: Mapping[str, Any],
    key_mapping: Mapping[str, str] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the file, and what all tensors of the adapter become."""
    from ..checkpoint import peft as files

    covered = naming_the_file(folder, lambda: _covered(tuner, plan, config))
    targets = tuner._file_tensors(plan)
    left_out = tuple(f"{PREFIX}{path}." for path in plan.adapters if path not in covered)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in targets.items() if key.startswith(left_out)}
    expected = as_in_file(tuner._layers(), plan.name, config, without_values(targets))
    expected = {key: tensor for key, tensor in expected.items() if key not in zeros}
    rename = rename_of(tuner.model, folder, expected, key_mapping)
    read = files.read_adapter(folder, *expected_of(expected), saved, rename)
    return read, {**as_in_memory(tuner._layers(), plan.name, config, read), **zeros}


def _covered(tuner: Tuner, plan: Plan, config: LoraConfig) -> set[str]:
    """Return the paths that the file adapts, among those of the adapter in memory."""
    found = set(resolve(tuner.model, config, strict=False))
    more = sorted(found - plan.adapters.keys())
    if more:
        raise ValueError(
            f"target_modules: the file adapts {shown(more)}, which adapter {plan.name!r} in memory does not; load it "
            "under a new name"
        )
    if not found:
        raise ValueError(f"target_modules: the file adapts no module that adapter {plan.name!r} in memory does")
    less = sorted(plan.adapters.keys() - found)
    if less and config.use_dora:
        raise ValueError(
            f"target_modules: the file does not adapt {shown(less)}, which adapter {plan.name!r} in memory does, and "
            "DoRA's magnitudes cannot be zero there; load it under a new name"
        )
    return found


def _check_prepared(
    layers: list[tuple[str, AdapterLayer]], name: str, config: LoraConfig, read: Mapping[str, Tensor]
) -> None:
    """Raise ValueError where compiled code has been promised a rank that the file exceeds."""
    for path, layer in layers:
        rank = layer._settings(config, path)["r"]
        adapted = any(key.startswith(f"{PREFIX}{path}.") for key in read)
        if adapted and rank > layer.r[name] and isinstance(layer.scaling[name], Tensor):
            raise ValueError(
                f"target_rank: the model is prepared for rank {layer.r[name]} on module {path!r}, and the file has "
                f"{rank}; call prepare_model_for_compiled_hotswap with target_rank={rank} or more, and compile again"
            )


def _fill(layer: AdapterLayer, name: str, config: LoraConfig, path: str, values: dict[str, Tensor]) -> None:
    """Take over the settings of a file, and those values that need other memory, which are taken out of `values`."""
    settings = layer._settings(config, path)
    for which, (key, part) in enumerate(layer.factors(name)):
        full = f"{PREFIX}{path}.{key}"
        if values[full].shape != _held(part).shape:
            set_factor(part, which, layer.groups, values.pop(full))
            layer.r[name] = settings["r"]
    layer.updated.pop(name, None)
    layer.lora_alpha[name] = settings["lora_alpha"]
    layer._first_scaling[name] = settings["scaling"]
    layer.write_scaling(name, settings["scaling"])


__all__ = ["hotswap_adapter", "prepare_model_for_compiled_hotswap"]
