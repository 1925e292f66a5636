"""AdaLoRA: a low-rank update in the form of a singular value decomposition, whose rank is chosen in training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...methods import adalora
from ...methods._base_layer import Few, features_of
from ...methods.lora import LowRank
from ...ops.shortcut import Shortcut
from ..base.adapter_layer import Adapter, AdapterLayer
from ..base.kinds import settle_fan_in_fan_out
from ..base.merging import Merged
from .config import AdaLoraConfig


class AdaLoRALinear(AdapterLayer):
    """An nn.Linear, or GPT-2's Conv1D, with AdaLoRA adapters: ``y = x W^T + bias + c * ((dropout(x) A^T) * E) B^T``.

    ``c = s / (ranknum + 1e-5)``. Parameters per adapter: `lora_A.<name>` (r, in), `lora_B.<name>` (out, r),
    `lora_E.<name>` (r, 1) and the constant `ranknum.<name>` (1,), the initial rank, which is never trained nor saved.
    The layer itself never changes its rank: `peftk.PeftModel.update_and_allocate` zeroes entries of E.

    Args:
        base_layer: The layer to adapt; it is frozen.
        config: An AdaLoraConfig; a `rank_pattern` in it makes the layer as small as a saved file is.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is of another kind.

    Source: Zhang et al., arXiv 2303.10512.

    Example:
        >>> import torch, peftk
        >>> config = peftk.AdaLoraConfig(init_r=4, target_r=2, total_step=9)
        >>> layer = peftk.nn.AdaLoRALinear(torch.nn.Linear(8, 8), config)
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    peft_class_prefix = "SVD"
    base_kinds: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "ranknum")
    parameter_names = frozenset(adapter_layer_names)
    constant_names = frozenset({"ranknum"})
    # triplets: which of the initial rank's triplets the rows of A are; not all of them in an adapter that was pruned
    # when it was saved.
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "init_r", "triplets")
    config_class = AdaLoraConfig
    update_fields = {"r": "init_r", "lora_alpha": "lora_alpha"}  # noqa: RUF012 - a ClassVar of the base

    @classmethod
    def _create(cls, base_layer: nn.Module, config: AdaLoraConfig, module_name: str, initialise: bool) -> Adapter:
        settle_fan_in_fan_out(config, base_layer)
        features, outputs = cls._sizes(base_layer, module_name)
        triplets = config.kept_triplets(module_name)
        rank = len(triplets)
        # In the order of PEFT, whose random numbers these are.
        make = torch.randn if initialise else torch.empty
        a, e, b, _ = make(rank, features), make(rank, 1), make(outputs, rank), make(1)
        if initialise and config.init_lora_weights:
            nn.init.zeros_(e)
            nn.init.normal_(a, std=0.02)
            nn.init.normal_(b, std=0.02)
        # A constant has its value also where the others have no memory yet.
        constant = torch.tensor([float(config.init_r)], device="cpu")
        tensors = {"lora_A": a, "lora_B": b, "lora_E": e, "ranknum": constant}
        return Adapter(
            {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()},
            {
                "r": rank,
                "lora_alpha": config.lora_alpha,
                "scaling": config.lora_alpha if config.lora_alpha > 0 else float(config.init_r),
                "lora_dropout": float(config.lora_dropout),
                "init_r": config.init_r,
                "triplets": triplets,
            },
        )

    @classmethod
    def _sizes(cls, base_layer: Any, module_name: str) -> tuple[int, int]:
        """Return how many numbers a row of A, and how many a column of B has."""
        return features_of(base_layer)

    def low_rank(self, name: str) -> LowRank:
        """Return the tensors and settings of one adapter, as its arithmetic takes them."""
        # Straight from the dictionaries: a look-up that goes through nn.Module runs Python of its own.
        own = self.__dict__
        p = own["lora_dropout"][name] if own["training"] else 0.0
        a, b, e = [own["_modules"][container][name] for container in ("lora_A", "lora_B", "lora_E")]
        return adalora.low_rank(adalora.Triplets(a, b, e, own["scaling"][name], own["init_r"][name], p))

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self._modules["base_layer"]
        assert base is not None
        return adalora.linear(base, x, [self.low_rank(name) for name in names], args, kwargs)

    def _few(self, name: str, weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        adapter = self.low_rank(name)
        # As it lies: a view would stay behind where another value is put into the parameter.
        return adalora.few(self.base_layer, weight, bias, adapter._replace(gate=self.lora_E[name]))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, (out, in), in the adapter's dtype."""
        return adalora.update(self.low_rank(adapter))

    def _merge_into(self, tensors: Merged, name: str) -> None:
        tensors["weight"], _ = adalora.merged(tensors["weight"], None, self.low_rank(name))

    def as_in_file(self, name: str, config: Any, path: str, tensors: dict[str, Tensor], prefix: str) -> None:
        """Take the triplets out that `rank_pattern` leaves out."""
        rows = self._rows(name, config, path)
        if len(rows) == self.r[name]:
            return
        for container in ("lora_A", "lora_E", "lora_B"):
            key = prefix + container
            tensors[key] = tensors[key][:, rows].contiguous() if container == "lora_B" else tensors[key][rows]

    def as_in_memory(self, name: str, config: Any, path: str, tensors: dict[str, Tensor], prefix: str) -> None:
        """Put zeros where `rank_pattern` leaves triplets out."""
        rows = self._rows(name, config, path)
        if len(rows) == self.r[name]:
            return
        for container in ("lora_A", "lora_E", "lora_B"):
            key, dim = prefix + container, int(container == "lora_B")
            # What a caller gives may be whole already.
            if key in tensors and tensors[key].shape[dim] == len(rows):
                shape = list(tensors[key].shape)
                shape[dim] = self.r[name]
                index = torch.tensor(rows, dtype=torch.long, device=tensors[key].device)
                tensors[key] = tensors[key].new_zeros(shape).index_copy(dim, index, tensors[key])

    def _rows(self, name: str, config: Any, path: str) -> list[int]:
        kept = set(config.kept_triplets(path))
        return [row for row, triplet in enumerate(self.triplets[name]) if triplet in kept]


__all__ = ["AdaLoRALinear", "AdaLoraConfig"]
