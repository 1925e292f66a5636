"""The tensors of the base model in an adapted one, under the names that they had before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..checkpoint.container import shown
from ..nn import AdapterLayer
from ..nn.base.saved import ModulesToSaveWrapper
from .adapters import Tuner
from .loading import LoadResult, check_there
from .state_dict import tuner_of


def _own(tuner: Tuner) -> dict[str, Tensor]:
    """Return the tensors of the base model by their names before; of merged layers, the original ones."""
    inner: dict[str, str] = {}
    left: dict[str, tuple[str, ...]] = {}
    merged: dict[str, dict[str, Tensor]] = {}
    for path, module in tuner.model.named_modules(remove_duplicate=False):
        start = f"{path}." if path else ""
        if isinstance(module, AdapterLayer):
            inner[start], left[start] = "base_layer.", (*module.adapter_layer_names, *module.other_param_names)
            merged[start] = module._original
        elif isinstance(module, ModulesToSaveWrapper):
            inner[start], left[start] = "original_module.", ("modules_to_save",)
    found: dict[str, Tensor] = {}
    for key, tensor in tuner.model.state_dict(keep_vars=True).items():
        name = key
        # From the outermost layer in: what one of them holds beside its base layer is an adapter's.
        for start in sorted((s for s in inner if key.startswith(s)), key=len):
            rest = key[len(start) :]
            if rest.partition(".")[0] in left[start]:
                break
            if rest.startswith(inner[start]):
                # One layer may be around another one, as those of the parameters of one module are.
                own, wrapped = rest.removeprefix(inner[start]), start + inner[start]
                while wrapped in inner and own.startswith(inner[wrapped]):
                    own, wrapped = own.removeprefix(inner[wrapped]), wrapped + inner[wrapped]
                tensor = merged.get(start, {}).get(own, tensor)
                at = len(start) - (len(key) - len(name))
                name = name[:at] + name[at + len(inner[start]) :]
        else:
            found[name] = tensor
    return found


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the base model as it was before it was adapted: its names, its weights.

    Args:
        model: A PeftModel, or a model with injected adapters. Of merged layers the original weights are returned.

    Raises:
        ValueError: The model has no adapters.
    """
    return {name: tensor.detach() for name, tensor in _own(tuner_of(model)[0]).items()}


@torch.no_grad()
def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Copy tensors with the names of the base model before it was adapted into it; nothing, if one is refused.

    Args:
        model: A PeftModel, or a model with injected adapters.
        state_dict: Name to tensor, as `get_base_model_state_dict` returns them.
        strict: Whether names that are missing on either side are an error.

    Returns:
        The names without a partner.

    Raises:
        RuntimeError: With `strict`, the names differ; or a shape does.
        ValueError: Adapters are merged: unmerging would undo the load.
    """
    tuner = tuner_of(model)[0]
    if any(layer.merged_adapters for _, layer in tuner._layers()):
        raise ValueError("model: adapters are merged, and unmerging would undo the load; unmerge them first")
    own = _own(tuner)
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"state_dict: Missing key(s): {shown(missing)}; Unexpected key(s): {shown(unexpected)}; pass strict=False "
            "to load what is there"
        )
    wrong = [name for name in state_dict if name in own and own[name].shape != state_dict[name].shape]
    if wrong:
        shapes = "; ".join(f"{n}: {tuple(state_dict[n].shape)}, not {tuple(own[n].shape)}" for n in wrong)
        raise RuntimeError(f"state_dict: size mismatch for {shapes}")
    check_there({name: own[name] for name in state_dict if name in own})
    for name, value in state_dict.items():
        if name in own:
            own[name].copy_(value)
    return LoadResult(missing, unexpected)


__all__ = ["get_base_model_state_dict", "set_base_model_state_dict"]
