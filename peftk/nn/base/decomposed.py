"""Layers whose adapters may train the magnitude of every output, as DoRA does, or of every input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...methods import dora
from ...methods._base_layer import features_of
from .adapter_layer import Adapter, AdapterLayer
from .config import PeftConfig
from .kinds import weight_shape
from .offloading import onloaded


class Decomposed(AdapterLayer):
    """A layer with adapters that take the weight apart into norms and directions where `use_dora` says so.

    A subclass names the container of the magnitudes, and says in `_norms` what they are of a fresh adapter.

    Source: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353.
    """

    magnitudes: ClassVar[str]

    @classmethod
    def _number_of_magnitudes(cls, base_layer: Any, config: Any) -> tuple[int, ...]:
        """Return the shape of a linear layer's magnitudes: (out,), or (1, in) for those of inputs, in no file of PEFT.

        The inputs of a convolution are the channels of one group.
        """
        inputs, outputs = features_of(base_layer) if "Linear" in cls.base_kinds else weight_shape(base_layer)[1::-1]
        return (1, inputs) if config.dora_inputs else (outputs,)

    @classmethod
    def _norms(cls, base_layer: Any, adapter: Adapter) -> Tensor:
        """Return the norms of the rows of the weight with a made adapter in it, as the forward pass finds them."""
        raise NotImplementedError

    @classmethod
    def _reads_weight(cls, config: Any, initialise: bool) -> str | None:
        """Name the field for which the base weight is read when an adapter is made, or return None."""
        return "use_dora" if config.use_dora and initialise else None

    @classmethod
    def make(
        cls,
        base_layer: nn.Module,
        config: PeftConfig,
        module_name: str = "",
        *,
        autocast_adapter_dtype: bool = True,
        initialise: bool = True,
    ) -> Adapter:
        """See `AdapterLayer.make`; DoRA's magnitudes are the norms of the adapted weight, never rounded to half."""
        reads = cls._reads_weight(config, initialise) if isinstance(config, cls.config_class) else None
        if reads is not None and "weight" in base_layer.__dict__:
            raise NotImplementedError(
                f"{reads}: the weight of module {module_name!r} is computed by a hook whenever the layer is called "
                "(as by torch.nn.utils.weight_norm), and it is needed before; use "
                "torch.nn.utils.parametrizations.weight_norm, or remove it"
            )
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "initialise": initialise}
        with onloaded([base_layer]), torch.no_grad():
            adapter = super().make(base_layer, config, module_name, **options)
            if config.use_dora and initialise:
                held = adapter.parts[cls.magnitudes]
                magnitude = held if isinstance(held, nn.Parameter) else next(held.parameters())
                # As in the forward pass, so that the gain of a fresh adapter is one to the bit.
                magnitude.copy_(cls._norms(base_layer, adapter).view_as(magnitude))
        return adapter

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if an adapter with magnitudes of inputs is to be merged and another one is, too."""
        super().check_merge(adapter_names)
        names = [*self.merged_adapters, *self._to_merge(adapter_names)]
        if any(self.dora_inputs[name] for name in names):
            dora.check_alone(names)

    def check_add(self, config: PeftConfig, initialise: bool = True) -> None:
        """Raise ValueError if the norms of the base weight are needed and adapters are merged into it."""
        super().check_add(config, initialise)
        if initialise and config.use_dora and self.merged_adapters:
            raise ValueError(
                f"use_dora: a new DoRA adapter starts at the norms of the base weight, and {self.merged_adapters} are "
                "merged into it; unmerge first"
            )

    def _merge_order(self, names: list[str]) -> list[str]:
        # All add to the output; DoRA also scales what the adapters before it have made of it.
        return names
