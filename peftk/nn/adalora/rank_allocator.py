"""AdaLoRA's budget: the importance of every triplet, the schedule, the masks, and the orthogonality term."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import AdaLoraConfig, module_of
from .linear import AdaLoRALinear

_CONTAINERS = ("lora_A", "lora_B", "lora_E")
_Layers = Sequence[tuple[str, AdaLoRALinear]]


class _Group:
    """The parameters of one shape, with the averages of their importance in two buffers."""

    def __init__(self, indices: list[int], parameters: list[nn.Parameter]) -> None:
        self.indices = indices
        first = parameters[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        shape = (len(indices), *first.shape)
        self.importance = torch.zeros(shape, device=first.device, dtype=wide)
        self.uncertainty = torch.zeros_like(self.importance)


def _by_shape(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Group the indices of tensors that can be stacked."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, p in enumerate(parameters):
        groups.setdefault((p.shape, p.dtype, p.device), []).append(index)
    return list(groups.values())


class RankAllocator:
    """Decides, in training, which triplets (a row of A, an entry of E, a column of B) an AdaLoRA adapter keeps.

    The importance of a weight is ``|w * gradient|``, smoothed; that of a triplet is the product of smoothed importance
    and smoothed uncertainty of its entry of E plus the means over its row of A and its column of B. All layers compete
    for one budget. The arithmetic runs on lists of tensors, and on one stack for every shape, not layer by layer.

    Args:
        layers: Paths and layers that have the adapter.
        adapter_name: The adapter.
        config: Its configuration; `rank_pattern` is set here.

    Raises:
        ValueError: No layer has the adapter.
    """

    def __init__(self, layers: Iterable[tuple[str, AdaLoRALinear]], adapter_name: str, config: AdaLoraConfig) -> None:
        self.layers = [(path, layer) for path, layer in layers if adapter_name in layer.lora_E]
        if not self.layers:
            raise ValueError(f"adapter_name: no layer has the adapter {adapter_name!r}")
        self.adapter_name = adapter_name
        self.config = config
        self.init_budget = config.init_r * len(self.layers)
        self.target_budget = config.target_r * len(self.layers)
        self.reset()

    def set_total_step(self, total_step: int) -> None:
        """Change the number of training steps."""
        self.config.total_step = total_step

    def reset(self) -> None:
        """Forget all averages."""
        self._groups: dict[str, list[_Group]] = {}
        self._mask: tuple[dict[str, Any], list[Tensor]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what going on with an interrupted training takes: the averages, and the triplets in full.

        A saved adapter has those triplets alone that were kept, and any other may come back while the budget falls.
        """
        return {
            "rank_pattern": copy.deepcopy(self.config.rank_pattern),
            "parameters": {c: [p.detach().clone() for p in self._parameters(c)] for c in _CONTAINERS},
            "averages": {
                container: [(group.importance.clone(), group.uncertainty.clone()) for group in groups]
                for container, groups in self._groups.items()
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` has returned for an adapter of the same configuration on the same layers.

        Raises:
            ValueError: The state is of another adapter; nothing has changed then.
        """
        groups: dict[str, list[_Group]] = {}
        try:
            pairs: list[tuple[Tensor, Any]] = []
            for container in _CONTAINERS:
                mine, theirs = self._parameters(container), state["parameters"][container]
                pairs += list(zip(mine, theirs, strict=True))
            for container, averages in state["averages"].items():
                mine = self._parameters(container)
                groups[container] = [_Group(ids, [mine[i] for i in ids]) for ids in _by_shape(mine)]
                for group, (importance, uncertainty) in zip(groups[container], averages, strict=True):
                    pairs += [(group.importance, importance), (group.uncertainty, uncertainty)]
            fits = all(own.shape == value.shape for own, value in pairs)
        except (KeyError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(
                f"state: expected what state_dict() has returned for adapter {self.adapter_name!r} with the same ranks "
                "on the same layers"
            )
        for own, value in pairs:
            own.copy_(value)
        self._groups, self._mask = groups, None
        self.config.rank_pattern = copy.deepcopy(state["rank_pattern"])

    def _parameters(self, container: str) -> list[nn.Parameter]:
        return [getattr(layer, container)[self.adapter_name] for _, layer in self.layers]

    def masked(self) -> list[nn.Parameter]:
        """Return the parameters that pruning writes to."""
        return self._parameters("lora_E")

    def _steps(self) -> int:
        # The configuration refuses None.
        assert self.config.total_step is not None
        return self.config.total_step

    def budget(self, step: int) -> tuple[int, bool]:
        """Return how many triplets a step may keep, and whether it prunes."""
        c = self.config
        if step <= c.tinit:
            return self.init_budget, False
        if step > self._steps() - c.tfinal:
            return self.target_budget, True
        left = 1 - (step - c.tinit) / (self._steps() - c.tfinal - c.tinit)
        return int((self.init_budget - self.target_budget) * left**3 + self.target_budget), step % c.deltaT == 0

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Take in the gradients of a step and prune if it is time; see `PeftModel.update_and_allocate`."""
        last = self._steps() - self.config.tfinal
        if step > last:
            self.mask_by_pattern()
            return
        if step < last:
            self.update_importance()
        budget, prunes = self.budget(step)
        if prunes or step == last:
            self.prune_to(budget)
        if step == last:
            self._groups = {}

    @torch.no_grad()
    def update_importance(self) -> None:
        """Update the averages from the gradients; a parameter without one counts as unimportant.

        Raises:
            ValueError: No parameter has a gradient.
        """
        parameters: list[Tensor] = []
        importance: list[Tensor] = []
        uncertainty: list[Tensor] = []
        for container in _CONTAINERS:
            mine = self._parameters(container)
            if container not in self._groups:
                self._groups[container] = [_Group(ids, [mine[i] for i in ids]) for ids in _by_shape(mine)]
            for group in self._groups[container]:
                device = mine[group.indices[0]].device
                group.importance, group.uncertainty = group.importance.to(device), group.uncertainty.to(device)
                parameters += [mine[i] for i in group.indices]
                importance += group.importance.unbind()
                uncertainty += group.uncertainty.unbind()
        if all(p.grad is None for p in parameters):
            raise ValueError(
                "update_and_allocate: expected gradients; call it after loss.backward() and before zero_grad()"
            )
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # Products of half-precision numbers underflow.
        parameters, grads = ([t.to(w.dtype) for t, w in zip(ts, importance, strict=True)] for ts in (parameters, grads))
        beta1, beta2 = self.config.beta1, self.config.beta2
        now = torch._foreach_mul(parameters, grads)
        torch._foreach_abs_(now)
        torch._foreach_mul_(importance, beta1)
        torch._foreach_add_(importance, now, alpha=1 - beta1)
        torch._foreach_sub_(now, importance)
        torch._foreach_abs_(now)
        torch._foreach_mul_(uncertainty, beta2)
        torch._foreach_add_(uncertainty, now, alpha=1 - beta2)

    def scores(self) -> list[Tensor]:
        """Return the importance of every triplet, one vector for every layer."""
        parts: dict[str, list[Tensor]] = {}
        for container, reduced in (("lora_A", -1), ("lora_B", -2), ("lora_E", -1)):
            parts[container] = [torch.empty(0)] * len(self.layers)
            for group in self._groups[container]:
                means = (group.importance * group.uncertainty).mean(reduced)
                for index, vector in zip(group.indices, means.unbind(), strict=True):
                    parts[container][index] = vector
        ab = torch._foreach_add(parts["lora_A"], parts["lora_B"])
        return list(torch._foreach_add(parts["lora_E"], ab))

    @torch.no_grad()
    def prune_to(self, budget: int) -> Tensor | None:
        """Zero the entries of E of all but `budget` triplets and set `rank_pattern`; return the threshold."""
        ranks = [p.shape[0] for p in self._parameters("lora_E")]
        count = sum(ranks) - budget
        if count <= 0:
            threshold, flags = None, [True] * sum(ranks)
        elif not self._groups:
            raise ValueError(
                "update_and_allocate: the importance of the weights is not known at the last step that prunes; call it "
                "in every training step"
            )
        else:
            scores = self.scores()
            joined = torch.cat([s.to(scores[0].device) for s in scores])
            threshold = joined.kthvalue(min(count, joined.numel())).values
            flags = (joined > threshold).tolist()
        pattern = {}
        for (path, layer), rank in zip(self.layers, ranks, strict=True):
            kept = dict(zip(layer.triplets[self.adapter_name], flags[:rank], strict=True))
            del flags[:rank]
            pattern[f"{path}.lora_E.{self.adapter_name}"] = [
                kept.get(index, False) for index in range(self.config.init_r)
            ]
        self.config.rank_pattern = pattern
        self.mask_by_pattern()
        return threshold

    @torch.no_grad()
    def mask_by_pattern(self) -> None:
        """Zero the entries of E that `rank_pattern` leaves out."""
        pattern = self.config.rank_pattern
        if pattern is None:
            return
        groups = _by_shape(entries := self._parameters("lora_E"))
        if self._mask is None or self._mask[0] is not pattern:
            flags = {module_of(key): kept for key, kept in pattern.items()}
            self._mask = pattern, [_mask([self._pruned(i, flags) for i in ids]) for ids in groups]
        masks = [mask.to(entries[ids[0]].device) for mask, ids in zip(self._mask[1], groups, strict=True)]
        self._mask = pattern, masks
        for mask, ids in zip(masks, groups, strict=True):
            mine: list[Tensor] = [entries[i] for i in ids]
            torch._foreach_copy_(mine, torch.stack(mine).masked_fill_(mask, 0.0).unbind())

    def _pruned(self, index: int, flags: dict[str, list[bool]]) -> list[bool]:
        path, layer = self.layers[index]
        triplets = layer.triplets[self.adapter_name]
        kept = flags.get(path, [True] * self.config.init_r)
        return [not kept[i] for i in triplets]


def _mask(rows: list[list[bool]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool).unsqueeze(-1)


def orthogonality_loss(layers: _Layers, adapter_name: str) -> Tensor:
    """Return the mean over all A and B of an adapter of ``||A A^T - I||`` and ``||B^T B - I||`` (Frobenius norms).

    Few products: one for all matrices of a shape.
    """
    norms = []
    for container in ("lora_A", "lora_B"):
        parameters = [getattr(layer, container)[adapter_name] for _, layer in layers]
        for ids in _by_shape(parameters):
            stack = torch.stack([parameters[i] for i in ids])
            wide = stack.to(torch.promote_types(stack.dtype, torch.float32))
            gram = wide @ wide.mT if container == "lora_A" else wide.mT @ wide
            eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
            norms.append(torch.linalg.vector_norm(gram - eye, dim=(1, 2)))
    return torch.cat([norm.to(norms[0].device) for norm in norms]).mean()


__all__ = ["RankAllocator", "orthogonality_loss"]
