"""Which rows of which embeddings an adapter trains, by `trainable_token_indices`, and what shares their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..nn import PeftConfig
from ..nn.base.adapter_layer import Adapter, AdapterLayer
from ..nn.base.saved import ModulesToSaveWrapper
from ..nn.trainable_tokens import TiedTokens, TrainableTokens
from .names import unwrapped
from .targets import candidates, describe_unknown

_FIELD = "trainable_token_indices"
_DEFAULT = "embed_tokens"


def plan_tokens(
    model: nn.Module, config: PeftConfig, taken: Mapping[str, Any], **options: bool
) -> tuple[dict[str, Adapter], dict[str, str]]:
    """Make the trained rows of an adapter without touching the model.

    Args:
        model: The base model.
        config: The configuration of the adapter.
        taken: The paths of the modules that the adapter adapts or trains in full.
        **options: Those of `TrainableTokens.of_rows`.

    Returns:
        Module path to the rows there; and the paths of layers that share a weight with one of those modules, each with
        the path of that module.

    Raises:
        ValueError: A name means no module, an index is out of range, or what shares a weight is to have other rows.
    """
    modules = candidates(model)
    ensured = bool(getattr(config, "ensure_weight_tying", False))
    asked = _asked(model, modules, getattr(config, _FIELD, None))
    tied = _tied(modules, asked, ensured)
    adapters = {}
    for path in (*asked, *tied):
        _check_free(path, modules[path], taken)
    for path, indices in asked.items():
        if path not in tied:
            adapters[path] = TrainableTokens.of_rows(_base(modules[path]), indices, path, **options)
    return adapters, tied


def tokens_of(model: nn.Module, name: str) -> tuple[dict[str, Adapter], dict[str, str]]:
    """Return what `plan_tokens` made for an adapter that the model has already."""
    found = [(p, m) for p, m in candidates(model).items() if isinstance(m, TrainableTokens) and name in m.token_indices]
    adapters = {path: module.adapter(name) for path, module in found if not isinstance(module, TiedTokens)}
    weights = {id(module.base_layer.weight): path for path, module in found if path in adapters}
    return adapters, {p: weights[id(m.base_layer.weight)] for p, m in found if isinstance(m, TiedTokens)}


def layers_for(
    modules: Mapping[str, nn.Module], adapters: Mapping[str, Adapter], tied: Mapping[str, str]
) -> Iterator[tuple[str, TrainableTokens, Adapter]]:
    """Yield the path, the layer and the rows of everything that is attached; a layer may be new."""
    for path, adapter in adapters.items():
        yield path, _layer(modules[path], TrainableTokens, path), adapter
    for path, source in tied.items():
        yield path, _layer(modules[path], TiedTokens, path), adapters[source]


def alike(layers: Iterable[AdapterLayer], weight: Tensor, names: list[str] | None) -> int:
    """Count the layers of a weight that merging changes alike: an embedding with trained rows and what is tied to it.

    Args:
        layers: All adapted layers.
        weight: The weight.
        names: The adapters that are to be merged; None means the active ones.
    """
    sharing = [layer for layer in layers if layer.weight is weight and isinstance(layer, TrainableTokens)]
    free = [layer for layer in sharing if not isinstance(layer, TiedTokens)]
    tied = [layer for layer in sharing if isinstance(layer, TiedTokens)]
    if len(free) != 1 or any(layer._to_merge(names) != free[0]._to_merge(names) for layer in tied):
        return 1
    return 1 + len(tied)


def _layer(module: nn.Module, kind: type[TrainableTokens], path: str) -> TrainableTokens:
    if isinstance(module, TrainableTokens):
        return module
    made = kind.around(module, path)
    assert isinstance(made, TrainableTokens)
    return made


def _base(module: nn.Module) -> Any:
    return module.base_layer if isinstance(module, AdapterLayer) else module


def _asked(model: nn.Module, modules: Mapping[str, nn.Module], field: Any) -> dict[str, list[int]]:
    """Return the path of every module that is named, with the indices of its rows."""
    if field is None:
        return {}
    if not isinstance(field, dict):
        field = {_input_embeddings(model, modules): field}
    found: dict[str, list[int]] = {}
    for name, indices in field.items():
        paths = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not paths:
            raise ValueError(f"{_FIELD}: no module has this name: {describe_unknown([name], modules)}")
        for path in paths:
            if found.setdefault(path, list(indices)) != list(indices):
                raise ValueError(f"{_FIELD}: {name!r} and another name mean module {path!r}, with other indices")
    return found


def _input_embeddings(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    method = getattr(unwrapped(model), "get_input_embeddings", None)
    layer = unwrapped(method()) if callable(method) else None
    return next((path for path, module in modules.items() if layer is not None and module is layer), _DEFAULT)


def _tied(modules: Mapping[str, nn.Module], asked: Mapping[str, list[int]], ensured: bool) -> dict[str, str]:
    """Return the paths of layers that follow an embedding of the same weight, each with the path of that embedding."""
    tied: dict[str, str] = {}
    for source, indices in asked.items():
        base = _base(modules[source])
        if source in tied or not isinstance(base, nn.Embedding):
            continue
        group = [
            path
            for path, module in modules.items()
            if path != source
            and isinstance(_base(module), (nn.Embedding, nn.Linear))
            and getattr(_base(module), "weight", None) is base.weight
        ]
        other = next((path for path in group if path in asked and asked[path] != indices), None)
        if other is not None and ensured:
            raise ValueError(
                f"ensure_weight_tying: {source!r} and {other!r} have one weight, and {_FIELD} names other rows of it "
                f"for each: {indices} and {asked[other]}; name the same ones"
            )
        if other is None:
            tied.update(dict.fromkeys(group, source))
    return tied


def _check_free(path: str, module: nn.Module, taken: Mapping[str, Any]) -> None:
    """Raise ValueError if a module is adapted or trained in full."""
    if isinstance(module, TrainableTokens) and path not in taken:
        return
    if path in taken or isinstance(module, (AdapterLayer, ModulesToSaveWrapper)):
        raise ValueError(
            f"{_FIELD}: module {path!r}, or what shares its weight, is adapted by target_modules or trained in full by "
            "modules_to_save too; name it in one of them"
        )


__all__ = ["alike", "layers_for", "plan_tokens", "tokens_of"]
