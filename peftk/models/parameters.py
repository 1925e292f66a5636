"""Which parameters of a model `target_parameters` names, and where their adapters stand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from ..methods._base_layer import kind_of
from ..nn.base.adapter_layer import Adapter, AdapterLayer
from ..nn.base.config import PeftConfig
from ..nn.lora.parameter import LoRAParameter, holder_of
from .names import place_of, unwrapped
from .targets import candidates, describe_unknown

INNER = ".base_layer"


def own_parameters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the path of each module and the name of each parameter that it holds itself, adapters left out."""
    for path, module in {"": unwrapped(model), **candidates(model)}.items():
        if isinstance(module, LoRAParameter):
            if path.endswith(INNER):
                continue
            module = holder_of(module)
        elif isinstance(module, AdapterLayer):
            continue
        for name in module._parameters:
            yield path, name


def left_out(model: nn.Module) -> list[str]:
    """Return the names of the stacked weights that no layer holds, such as those of experts."""
    modules = candidates(model)
    found = []
    for path, name in own_parameters(model):
        module = holder_of(modules[path]) if path else unwrapped(model)
        parameter = module._parameters[name]
        if parameter is not None and parameter.dim() == 3 and kind_of(module) is None:
            found.append(f"{path}.{name}" if path else name)
    return found


def warn_of_stacks(model: nn.Module, config: PeftConfig) -> None:
    """Warn that "all-linear" means no parameter of three dimensions, naming those that nothing else targets."""
    asked = set(getattr(config, "target_parameters", None) or ())
    missed = [name for name in left_out(model) if not _meant(name, asked)]
    if missed:
        endings = sorted({".".join(name.split(".")[-2:]) for name in missed})
        warnings.warn(
            f'target_modules: "all-linear" leaves out {len(missed)} stacked parameters, which are no linear layers; '
            f"name them too: target_parameters={endings!r}",
            stacklevel=4,
        )


def _meant(name: str, asked: set[str]) -> bool:
    return name in asked or any(name.endswith(f".{one}") for one in asked)


def plan_parameters(
    model: nn.Module, config: PeftConfig, modules: dict[str, nn.Module], taken: dict[str, Adapter], **options: bool
) -> dict[str, Adapter]:
    """Make the adapters of the parameters that `config.target_parameters` names, by the paths that their layers get.

    Several parameters of one module are nested: the layer of the last one is at the path of the module, each other one
    in the `base_layer` of the next.

    Args:
        model: The model, adapted or not.
        config: The configuration.
        modules: What may be adapted.
        taken: The paths that it adapts as modules.
        **options: Those of `AdapterLayer.make`.

    Raises:
        ValueError: A name matches nothing, a module is adapted already, or other adapters have other parameters.
    """
    asked = list(getattr(config, "target_parameters", None) or ())
    if not asked:
        return {}
    known = [f"{path}.{name}" if path else name for path, name in own_parameters(model)]
    unknown = [one for one in asked if not any(name == one or name.endswith(f".{one}") for name in known)]
    if unknown:
        raise ValueError(f"target_parameters: not in the model: {describe_unknown(unknown, known)}")
    by_module: dict[str, list[str]] = {}
    for path, name in own_parameters(model):
        if path and _meant(f"{path}.{name}", {*asked}):
            by_module.setdefault(path, []).append(name)
    if not by_module:
        raise ValueError(
            "target_parameters: only parameters of modules inside of the model can be adapted, got those of the model "
            f"itself: {asked!r}"
        )
    adapters = {}
    for path, names in by_module.items():
        module = modules[path]
        if path in taken or (isinstance(module, AdapterLayer) and not isinstance(module, LoRAParameter)):
            raise ValueError(
                f"target_parameters: module {path!r} is adapted as a whole by target_modules; leave one of the two out"
            )
        present = [layer.weight_name for layer in module._chain()][::-1] if isinstance(module, LoRAParameter) else names
        if present != names:
            raise ValueError(
                f"target_parameters: the adapters of this model are on {present} of {path!r}, and another one needs "
                f"the same, got {names}; their names in a file say nothing else about which parameter they belong to"
            )
        if isinstance(module, LoRAParameter):
            for layer in module._chain():
                layer.check_add(config, options["initialise"])
        for depth, name in enumerate(reversed(names)):
            target = f"{path}.{name}"
            adapters[path + INNER * depth] = LoRAParameter.make(module, config, target, **options)
    return adapters


def attach_parameters(model: nn.Module, adapters: dict[str, Adapter], adapter_name: str) -> None:
    """Attach planned adapters of parameters, to layers that are put around their modules from the inside out."""
    planned = [(path, adapter) for path, adapter in adapters.items() if adapter.target]
    for path, adapter in sorted(planned, key=lambda item: -item[0].count(INNER)):
        while path.endswith(INNER):
            path = path.removesuffix(INNER)
        parent, name = place_of(model, path)
        module = getattr(parent, name)
        chain = list(module._chain()) if isinstance(module, LoRAParameter) else []
        present = [layer for layer in chain if layer.module_name == adapter.target]
        layer = present[0] if present else LoRAParameter.around(module, adapter.target)
        if not present:
            setattr(parent, name, layer)
        layer.attach(adapter_name, adapter)


__all__ = ["attach_parameters", "own_parameters", "plan_parameters", "warn_of_stacks"]
