"""LoHa: the Hadamard product of two low-rank matrices, added to a frozen layer's weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..methods import dora, loha
from ..methods._base_layer import Few
from ..methods.loha import Hadamard
from ..ops import _seed
from ..ops.shortcut import Shortcut
from .base.adapter_layer import Adapter
from .base.config import (
    Form,
    PeftConfig,
    PeftType,
    check_bool,
    check_dora_inputs,
    check_int,
    check_number,
    check_patterns,
)
from .base.decomposed import Decomposed
from .base.kinds import core_shape, weight_shape
from .base.merging import Merged
from .lora.config import MAX_ALPHA, MAX_RANK


@dataclass
class LoHaConfig(PeftConfig, method=PeftType.LOHA):
    """Configuration of LoHa, with the fields and defaults of PEFT 0.21.

    ``W' = W + alpha / r * (w1_a w1_b) * (w2_a w2_b)``, the two matrix products multiplied element by element.

    Args:
        rank_pattern: Pattern of a module's name to the rank used there.
        alpha_pattern: Pattern of a module's name to the alpha used there.
        r: Rank of each of the two products; the rank of their Hadamard product is up to ``r * r``.
        alpha: Numerator of the scale ``alpha / r``.
        rank_dropout: Probability, in training, that a row of the update (an output feature) is dropped, in [0, 1);
            the others are divided by the share that stays, as in PEFT.
        module_dropout: Probability, in training, that a layer's whole update is dropped, in [0, 1).
        use_effective_conv2d: For kernels of several taps, the Tucker form: factors of the channels and a core of
            the kernel's taps.
        target_modules: As in `LoraConfig`.
        exclude_modules: As in `LoraConfig`.
        init_weights: True (the update starts at zero) or False (all factors random).
        layers_to_transform: As in `LoraConfig`.
        layers_pattern: As in `LoraConfig`.
        modules_to_save: As in `LoraConfig`.
        use_dora: Give every output a magnitude of its own, as DoRA does for LoRA. Hugging Face PEFT does not have this:
            such an adapter cannot be read by it.
        dora_inputs: Give every input a magnitude instead, or every input channel. Such an adapter acts alone.

    Source: Hyeon-Woo et al., FedPara: Low-rank Hadamard Product for Communication-Efficient Federated Learning,
    arXiv 2108.06098; the form for images: Yeh et al., Navigating Text-To-Image Customization, arXiv 2309.14859.

    Example:
        >>> from peftk import LoHaConfig
        >>> LoHaConfig(r=4, alpha=8, target_modules=["query", "value"]).r
        4
    """

    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    alpha_pattern: dict[str, Any] | None = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    dora_inputs: bool = False

    _forms = (
        Form("LoHa", {"r": 2}),
        Form("LoHa with DoRA", {"r": 2, "use_dora": True}),
        Form("LoHa, Tucker", {"r": 2, "use_effective_conv2d": True}, ("Conv1d", "Conv2d", "Conv3d")),
    )
    _meaning = (
        "r",
        "alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_effective_conv2d",
        "modules_to_save",
        "use_dora",
        "dora_inputs",
    )
    _only_here = frozenset({"use_dora", "dora_inputs"})

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_int("r", self.r, 1, MAX_RANK)
        check_number("alpha", self.alpha, 0, MAX_ALPHA, above=True)
        check_number("rank_dropout", self.rank_dropout, 0, 1)
        check_number("module_dropout", self.module_dropout, 0, 1)
        check_bool("use_effective_conv2d", self.use_effective_conv2d)
        check_bool("init_weights", self.init_weights)
        check_bool("use_dora", self.use_dora)
        check_dora_inputs(self)
        check_patterns(self, MAX_RANK, MAX_ALPHA)
        self._check_targets()


_PAIRS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


class LoHaLinear(Decomposed):
    """An nn.Linear with LoHa adapters: ``y = x W^T + s x ((w1_a w1_b) * (w2_a w2_b))^T + bias``.

    Parameters per adapter: `hada_w1_a.<name>` and `hada_w2_a.<name>` (out, r), `hada_w1_b.<name>` and
    `hada_w2_b.<name>` (r, in). Ranks up to about a fourth of the square root of the layer's size run as one low-rank
    product of rank ``r * r``; larger ones are written into the weight, tile by tile. With `use_dora` also
    `hada_magnitude_vector.<name>` (out,), and the output without its bias is scaled by ``m / ||W + update||``, row by
    row, through whose norm no gradient passes and for which nothing is dropped. With `dora_inputs` the magnitudes are
    (1, in), and the input is scaled by ``m / ||W + update||``, column by column.

    Args:
        base_layer: The nn.Linear to adapt; it is frozen.
        config: A LoHaConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not an nn.Linear, or holds integers that its call cannot multiply by.

    Source: Hyeon-Woo et al., arXiv 2108.06098.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.LoHaLinear(torch.nn.Linear(8, 4), peftk.LoHaConfig(r=2))
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """

    base_kinds: ClassVar[tuple[str, ...]] = ("Linear",)
    magnitudes = "hada_magnitude_vector"
    adapter_layer_names = (*_PAIRS, *_CORES, magnitudes)
    parameter_names = frozenset(adapter_layer_names)
    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "module_dropout", "use_dora", "dora_inputs")
    config_class = LoHaConfig
    update_fields = {"r": "r", "alpha": "alpha"}  # noqa: RUF012 - a ClassVar of the base

    @classmethod
    def _create(cls, base_layer: nn.Module, config: LoHaConfig, module_name: str, initialise: bool) -> Adapter:
        r = config._of_module(config.rank_pattern, module_name, config.r)
        alpha = config._of_module(config.alpha_pattern, module_name, config.alpha)
        parts = {name: nn.Parameter(torch.zeros(shape)) for name, shape in cls._shapes(base_layer, config, r).items()}
        if initialise:
            # In PEFT's order, so that equal seeds give equal bits.
            for name, parameter in parts.items():
                if name != "hada_w2_b" or not config.init_weights:
                    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if config.use_dora:
            parts[cls.magnitudes] = nn.Parameter(torch.zeros(cls._number_of_magnitudes(base_layer, config)))
        settings = {name: getattr(config, name) for name in cls.other_param_names[3:]}
        return Adapter({**parts}, {"r": r, "alpha": alpha, "scaling": alpha / r, **settings})

    @classmethod
    def _norms(cls, base_layer: Any, adapter: Adapter) -> Tensor:
        described = _hadamard(adapter.parts, adapter.settings["scaling"])
        return loha.norms(base_layer, described, of_inputs=adapter.settings["dora_inputs"])

    @classmethod
    def _shapes(cls, base_layer: Any, config: LoHaConfig, r: int) -> dict[str, tuple[int, ...]]:
        outputs, *inputs = weight_shape(base_layer)
        left, right = (outputs, r), (r, math.prod(inputs))
        return dict(zip(_PAIRS, (left, right, left, right), strict=True))

    def hadamard(self, name: str, drop: bool = True, weight: Tensor | None = None) -> Hadamard:
        """Return the tensors and settings of one adapter, as its arithmetic takes them.

        Args:
            name: The adapter.
            drop: Whether dropout acts, in training.
            weight: The base weight, for the norms of DoRA; None means that of the base layer.
        """
        held = {container: getattr(self, container) for container in (*_PAIRS, *_CORES)}
        adapter = _hadamard({c: parts[name] for c, parts in held.items() if name in parts}, self.scaling[name])
        rows = self._draw(name) if drop else None
        gain, of_inputs = None, self.dora_inputs[name]
        if self.use_dora[name]:
            gain = dora.gain(self.hada_magnitude_vector[name], loha.norms(self.base_layer, adapter, weight, of_inputs))
            # Where the whole update is dropped the layer is the base layer.
            gain = gain if rows is None else torch.where(rows.any().to(gain.device), gain, torch.ones_like(gain))
        gain, input_gain = (None, gain) if of_inputs else (gain, None)
        return adapter._replace(rows=rows, gain=gain, input_gain=input_gain)

    def _draw(self, name: str) -> Tensor | None:
        """Draw a factor for every row of the update in this pass: None for no dropout."""
        p, module_p = self.rank_dropout[name], self.module_dropout[name]
        if not (self.training and (p or module_p)):
            return None
        _seed.refuse_capture(self.hada_w1_a[name].device)
        # Drawn as PEFT draws them, on the CPU's default generator, so that activation checkpointing replays them.
        rows = (torch.rand(1, device="cpu") > module_p).float().expand(self.out_features)
        if p:
            kept = (torch.rand(self.out_features, device="cpu") > p).float()
            # Where nothing is kept, the update is zero and not 0 / 0.
            rows = rows * kept / kept.mean().clamp_min(1e-12)
        return rows

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return loha.linear(self.base_layer, x, [self.hadamard(name) for name in names], args, kwargs)

    def _few(self, name: str, weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        return None if self.use_dora[name] else loha.few(weight, bias, self.hadamard(name))

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update of one adapter, like the weight, without dropout and DoRA's scaling."""
        return loha.update(
            self.hadamard(adapter, drop=False)._replace(gain=None, input_gain=None), weight_shape(self.base_layer)
        )

    def _merge_into(self, tensors: Merged, name: str) -> None:
        weight = tensors["weight"]
        own = self._original.get("weight", self.base_layer.weight).to(device=weight.device, dtype=weight.dtype)
        tensors["weight"] = loha.merged(weight, self.hadamard(name, drop=False, weight=own))


class LoHaConv(LoHaLinear):
    """A convolution with LoHa adapters on its flattened filters, (out, in / groups * taps of the kernel).

    Parameters per adapter: as `LoHaLinear` has them, with that many inputs. With `use_effective_conv2d` and a kernel
    of several taps, the Tucker form: `hada_w1_a` (r, out), `hada_w1_b` (r, in / groups), `hada_t1` (r, r, *kernel), on
    an nn.Conv1d (r, r, taps, 1) as in PEFT, and the same of the second matrix;
    ``W1[p, q] = sum_ij t1[i, j] w1_a[i, p] w1_b[j, q]``.
    PEFT's gradients of `hada_w1_a` and `hada_w2_a` are wrong in that form; those here are the true ones.

    Small ranks run as a convolution to ``r * r`` channels and a product with (out, r * r); larger ones, and groups, as
    one convolution with the written weight. Geometry, padding mode and groups are those of the layer.

    Args:
        base_layer: The nn.Conv1d, nn.Conv2d or nn.Conv3d to adapt; it is frozen.
        config: A LoHaConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense convolution of these kinds.

    Source: Yeh et al., Navigating Text-To-Image Customization, arXiv 2309.14859.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.LoHaConv(torch.nn.Conv2d(4, 8, 3), peftk.LoHaConfig(r=2, use_effective_conv2d=True))
        >>> layer(torch.randn(1, 4, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """

    base_kinds = ("Conv1d", "Conv2d", "Conv3d")

    @classmethod
    def _shapes(cls, base_layer: Any, config: LoHaConfig, r: int) -> dict[str, tuple[int, ...]]:
        out, channels, *kernel = base_layer.weight.shape
        if not config.use_effective_conv2d or all(taps == 1 for taps in kernel):
            return super()._shapes(base_layer, config, r)
        sizes = ((r, out), (r, channels)) * 2 + (core_shape(r, kernel),) * 2
        return dict(zip((*_PAIRS, *_CORES), sizes, strict=True))

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return loha.conv(self.base_layer, x, [self.hadamard(name) for name in names], args, kwargs)


def _hadamard(parts: Mapping[str, Any], scale: float) -> Hadamard:
    """Describe an adapter by its parts, without dropout and magnitudes."""
    w1_a, w1_b, w2_a, w2_b = (parts[name] for name in _PAIRS)
    return Hadamard(w1_a, w1_b, w2_a, w2_b, scale, *(parts.get(name) for name in _CORES))
