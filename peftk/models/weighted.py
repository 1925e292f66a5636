"""A new LoRA adapter that is a weighted combination of others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..methods._base_layer import kind_of
from ..nn import AdapterLayer, LoraConfig
from ..nn.base.config import check_choice, check_int, check_number
from ..nn.lora.start import starts_inside
from .adapters import Tuner

_PRUNING = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
KINDS = ("linear", "svd", "cat", *_PRUNING, *(f"{kind}_svd" for kind in _PRUNING))


class Way(NamedTuple):
    """How tensors are combined.

    Attributes:
        kind: One of `KINDS` without "_svd".
        density: The share of numbers that pruning leaves; None where nothing is pruned.
        majority: How the majority sign is found: "total" or "frequency".
    """

    kind: str
    density: float | None
    majority: str


class Svd(NamedTuple):
    """How a dense update becomes a low-rank one.

    Attributes:
        rank: Its rank.
        clamp: The quantile to which its numbers are clamped, or None.
        full: torch's `full_matrices`.
        driver: torch's `driver`.
    """

    rank: int
    clamp: float | None
    full: bool
    driver: str | None


def add_weighted_adapter(
    tuner: Tuner,
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
    """Add a LoRA adapter that combines others; see `PeftModel.add_weighted_adapter`."""
    check_choice("combination_type", combination_type, KINDS)
    check_choice("majority_sign_method", majority_sign_method, ("total", "frequency"))
    names, factors = _checked(tuner, adapters, weights)
    kind = combination_type.removesuffix("_svd")
    if kind in _PRUNING and density is None:
        raise ValueError(f"density: expected a number from 0 to 1 for {combination_type!r}, got None")
    if density is not None:
        check_number("density", density, 0, 1, above=True)
    ranks = {name: max(layer.r[name] for _, layer in tuner._layers() if name in layer.adapter_names) for name in names}
    by_svd = combination_type == "svd" or combination_type.endswith("_svd")
    if by_svd:
        rank = max(ranks.values()) if svd_rank is None else svd_rank
        check_int("svd_rank", rank, 1, 1 << 20)
    elif combination_type == "cat":
        rank = sum(ranks.values())
    else:
        rank = _common_rank(tuner, names)
    config = _config(tuner, names, rank)
    tuner._check_new(adapter_name, config)
    way, svd = Way(kind, density, majority_sign_method), Svd(rank, svd_clamp, svd_full_matrices, svd_driver)
    with tuner._whole(), torch.no_grad():
        plan = tuner._plan(adapter_name, config)
        layers = dict(tuner._layers())
        for path, adapter in plan.adapters.items():
            a, b = _pair(adapter)
            layer = layers[path]
            pairs = [(name, weight) for name, weight in zip(names, factors, strict=True) if name in layer.adapter_names]
            if by_svd:
                new_a, new_b = _by_svd(layer, pairs, way, svd)
            elif combination_type == "cat":
                new_a, new_b = _side_by_side(layer, pairs, rank)
            else:
                new_a, new_b = _of_factors(layer, pairs, way)
            a.copy_(new_a.reshape(a.shape))
            b.copy_(new_b.reshape(b.shape))
        tuner._commit(plan)
        tuner.set_requires_grad(adapter_name, False)


def _checked(tuner: Tuner, adapters: Sequence[str], weights: Sequence[float]) -> tuple[list[str], list[float]]:
    if isinstance(adapters, str):
        raise TypeError(f"adapters: expected a list of adapter names, got {adapters!r}")
    names = tuner._known(adapters, "adapters")
    if not names:
        raise ValueError("adapters: expected at least one name, got none")
    if len(weights) != len(names):
        raise ValueError(f"weights: expected {len(names)} numbers, one for each adapter, got {len(weights)}")
    for weight in weights:
        check_number("weights", weight, -1e9, 1e9)
    for name in names:
        config = tuner.peft_config[name]
        if not isinstance(config, LoraConfig):
            raise ValueError(f"adapters: expected LoRA adapters, got {name!r}, which is {config._kind}")
        if starts_inside(config.init_lora_weights):
            raise ValueError(
                f"adapters: {name!r} has init_lora_weights={config.init_lora_weights!r}, whose update is what its "
                "factors have moved by; save it with path_initial_model_for_weight_conversion and load that"
            )
        if config.target_parameters:
            raise NotImplementedError(
                f"adapters: {name!r} has target_parameters, and weighted sums of the adapters of parameters are not "
                "implemented; merge the adapters one after the other instead"
            )
        for field in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"):
            if getattr(config, field):
                raise ValueError(
                    f"adapters: {name!r} has {field}, of which a weighted sum of low-rank updates has no part; merge "
                    "the adapters one after the other instead"
                )
    return names, [float(weight) for weight in weights]


def _common_rank(tuner: Tuner, names: Sequence[str]) -> int:
    """Return the rank that the adapters have in common, in every layer."""
    for path, layer in tuner._layers():
        found = {layer.r[name] for name in names if name in layer.adapter_names}
        if len(found) > 1:
            raise ValueError(
                f"adapters: their ranks differ, {sorted(found)} in {path!r}; choose combination_type='cat' or 'svd'"
            )
    found = {layer.r[name] for _, layer in tuner._layers() for name in names if name in layer.adapter_names}
    if len(found) > 1:
        raise ValueError(f"adapters: their layers have several ranks, {sorted(found)}; choose 'cat' or 'svd'")
    return found.pop()


def _config(tuner: Tuner, names: Sequence[str], rank: int) -> LoraConfig:
    configs = [tuner.peft_config[name] for name in names]
    targets = [config.target_modules for config in configs]
    first = targets[0]
    if all(target == first for target in targets):
        together = first
    elif any(isinstance(target, str) for target in targets):
        raise ValueError(
            "adapters: expected configurations that all name their target_modules in lists, or have one pattern"
        )
    else:
        together = set().union(*targets)
    assert isinstance(configs[0], LoraConfig)
    # The scales of the adapters are in the new factors: that of the new one is 1.
    plain: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    return dataclasses.replace(configs[0], r=rank, lora_alpha=rank, target_modules=together, **plain)


def _pair(adapter: Any) -> tuple[Tensor, Tensor]:
    """Return A and B of an adapter of a layer of any kind."""
    found = {key.removesuffix(".weight").rpartition("_")[2]: tensor for key, tensor in adapter.saved_tensors()}
    return found["A"], found["B"]


def _side_by_side(layer: AdapterLayer, pairs: list[tuple[str, float]], rank: int) -> tuple[Tensor, Tensor]:
    rows, columns = [], []
    for name, weight in pairs:
        a, b = _pair(layer.adapter(name))
        rows.append(a * (weight * layer.scaling[name]))
        columns.append(b)
    a, b = torch.cat(rows), torch.cat(columns, 1)
    left = rank - len(a)
    # A layer that lacks one of the adapters has fewer, and zeros for the rest.
    return torch.cat([a, a.new_zeros(left, *a.shape[1:])]), torch.cat([b, b.new_zeros(len(b), left, *b.shape[2:])], 1)


def _of_factors(layer: AdapterLayer, pairs: list[tuple[str, float]], way: Way) -> tuple[Tensor, Tensor]:
    """Combine the factors themselves, each with the root of the weight, as PEFT does; A has its sign."""
    strengths = [weight * layer.scaling[name] for name, weight in pairs]
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths, strict=True)]
    factors = [_pair(layer.adapter(name)) for name, _ in pairs]
    a, b = ([pair[i].float() for pair in factors] for i in (0, 1))
    return _combined(a, signed, way), _combined(b, roots, way)


def _by_svd(layer: AdapterLayer, pairs: list[tuple[str, float]], way: Way, svd: Svd) -> tuple[Tensor, Tensor]:
    """Combine the dense updates, and take the best approximation of the rank."""
    updates = [layer.get_delta_weight(name).float() for name, _ in pairs]
    dense = _combined(updates, [weight for _, weight in pairs], way).flatten(1)
    if kind_of(layer.base_layer) in ("Conv1D", "Embedding"):
        dense = dense.mT
    u, s, v = torch.linalg.svd(dense, full_matrices=svd.full, driver=svd.driver)
    rank = min(svd.rank, len(s))
    b, a = u[:, :rank] * s[:rank], v[:rank]
    if svd.clamp is not None:
        high = torch.quantile(torch.cat([b.flatten(), a.flatten()]), svd.clamp)
        b, a = b.clamp(-high, high), a.clamp(-high, high)
    left = svd.rank - rank
    return torch.cat([a, a.new_zeros(left, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), left)], 1)


def _combined(tensors: list[Tensor], weights: list[float], way: Way) -> Tensor:
    """Return the weighted sum of tensors, pruned and with a majority sign as the way says.

    Sources: Yadav et al., TIES-Merging, arXiv 2306.01708; Yu et al., Language Models are Super Mario (DARE), arXiv
    2311.03099.
    """
    if way.density is not None and way.kind in ("ties", "magnitude_prune"):
        tensors = [_largest(tensor, way.density) for tensor in tensors]
    elif way.density is not None and way.kind in ("dare_ties", "dare_linear"):
        tensors = [_drawn(tensor, way.density) for tensor in tensors]
    stacked = torch.stack(tensors)
    shape = (-1, *[1] * (stacked.dim() - 1))
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(shape)
    if way.kind not in ("ties", "dare_ties"):
        return weighted.sum(0)
    sign = stacked.sign()
    votes = (stacked if way.majority == "total" else sign).sum(0)
    agrees = sign == torch.where(votes >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    flat = tensor.abs().flatten()
    kept = torch.topk(flat, int(density * flat.numel())).indices
    mask = torch.zeros_like(flat).index_fill(0, kept, 1.0)
    return tensor * mask.view(tensor.shape)


def _drawn(tensor: Tensor, density: float) -> Tensor:
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


__all__ = ["KINDS", "add_weighted_adapter"]
