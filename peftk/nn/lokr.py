"""LoKr: a Kronecker product of two small matrices, added to a frozen layer's weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..methods import dora, lokr
from ..methods._base_layer import Few
from ..methods.lokr import Kronecker
from ..ops import _seed
from ..ops.shortcut import Shortcut
from .base.adapter_layer import Adapter
from .base.config import (
    Form,
    LayerInFile,
    PeftConfig,
    PeftType,
    check_bool,
    check_choice,
    check_dora_inputs,
    check_int,
    check_number,
    check_patterns,
    warn_of_field,
)
from .base.decomposed import Decomposed
from .base.kinds import core_shape, weight_shape
from .base.merging import Merged
from .lora.config import MAX_RANK

MAX_FULL_RANK = 2**53
"""Largest rank and alpha. A rank from half of a factor's size on means the whole matrix, whatever it is: LyCORIS' users
write 100 000 and 10^10 for that, and no parameter grows with it."""
MAX_DECOMPOSE_FACTOR = MAX_RANK


_NOT_IN_FILE: Mapping[tuple[int, int], set[tuple[int, int]]] = MappingProxyType({})


@dataclass
class LoKrConfig(PeftConfig, method=PeftType.LOKR):
    """Configuration of LoKr, with the fields and defaults of PEFT 0.21.

    ``W' = W + alpha / r * kron(w1, w2)`` with w1 (l, m) and w2 (k, n), ``l * k`` outputs and ``m * n`` inputs.

    Args:
        rank_pattern: Name ending or expression to the rank of the modules it matches.
        alpha_pattern: Name ending or expression to the alpha of the modules it matches.
        r: Rank of the factors that are products of two matrices. w2 is one, unless ``r >= max(k, n) / 2``: a huge
            rank asks for whole matrices everywhere.
        alpha: Numerator of the scale ``alpha / r``, which holds also where no factor has a rank; LyCORIS' scale is
            then 1.
        rank_dropout: Probability, in training, that a row of the update (an output feature) is dropped, in [0, 1).
        module_dropout: Probability, in training, that a layer's whole update is dropped, in [0, 1).
        use_effective_conv2d: For kernels of several taps, the Tucker form of w2: factors of the channels and a core
            of the kernel's taps.
        decompose_both: w1 is a product of two matrices too, unless ``r >= max(l, m) / 2``.
        decompose_factor: What l and m are if it divides the layer's sizes; else they are the largest divisors up to it
            that do not exceed k and n. -1 is as large as they can be: l nearest to k, m nearest to n. Files may hold
            the factors that LyCORIS makes of it.
        rank_dropout_scale: Divide the rows that `rank_dropout` leaves by their share.
        target_modules: As in `LoraConfig`.
        exclude_modules: As in `LoraConfig`.
        init_weights: True (w1 starts at zero), "lycoris" (w2 does) or False (all factors random).
        layers_to_transform: As in `LoraConfig`.
        layers_pattern: As in `LoraConfig`.
        modules_to_save: As in `LoraConfig`.
        use_dora: Give every output a magnitude of its own, as DoRA does for LoRA. Hugging Face PEFT does not have this:
            such an adapter cannot be read by it.
        dora_inputs: Give every input a magnitude instead, or every input channel. Such an adapter acts alone.

    Source: Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation,
    arXiv 2309.14859; Edalati et al., KronA, arXiv 2212.10650.

    Example:
        >>> from peftk import LoKrConfig
        >>> LoKrConfig(r=64, decompose_factor=8, target_modules=["query", "value"]).decompose_factor
        8
    """

    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    alpha_pattern: dict[str, Any] | None = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    dora_inputs: bool = False

    _forms = (
        Form("LoKr", {"r": 8, "decompose_factor": 4}),
        Form("LoKr with DoRA", {"r": 8, "decompose_factor": 4, "use_dora": True}),
        Form("LoKr, factored", {"r": 1, "decompose_both": True, "use_effective_conv2d": True}),
    )
    _meaning = (
        "r",
        "alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_effective_conv2d",
        "decompose_both",
        "decompose_factor",
        "modules_to_save",
        "use_dora",
        "dora_inputs",
    )
    _only_here = frozenset({"use_dora", "dora_inputs"})

    # What `settle_with_file` found: (outputs, numbers in a filter) to the pairs l, m of such layers in the file.
    # Without annotations, which would make them fields.
    _in_file = _NOT_IN_FILE
    _told = False

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_int("r", self.r, 1, MAX_FULL_RANK)
        check_number("alpha", self.alpha, 0, MAX_FULL_RANK, above=True)
        check_number("rank_dropout", self.rank_dropout, 0, 1)
        check_number("module_dropout", self.module_dropout, 0, 1)
        for name in ("use_effective_conv2d", "decompose_both", "rank_dropout_scale", "use_dora"):
            check_bool(name, getattr(self, name))
        check_dora_inputs(self)
        if self.decompose_factor != -1 or isinstance(self.decompose_factor, bool):
            check_int("decompose_factor", self.decompose_factor, 1, MAX_DECOMPOSE_FACTOR)
        check_choice("init_weights", self.init_weights, (True, False, "lycoris"))
        check_patterns(self, MAX_FULL_RANK, MAX_FULL_RANK)
        self._check_targets()

    @classmethod
    def fields_of(cls, layers: Mapping[str, LayerInFile]) -> dict[str, Any]:
        """See `PeftConfig.fields_of`: the `decompose_factor` of which LyCORIS makes factors of these sizes."""
        sides: list[tuple[int, int]] = []
        for path, layer in layers.items():
            first = _sizes(layer.tensors, "lokr_w1")
            if first is None:
                raise ValueError(f"module {path!r}: lokr_w1: expected a matrix or two, got {dict(layer.tensors)}")
            sides += zip(layer.weight, first, strict=False)
        sizes = {number for size, one in sides if one and size % one == 0 for number in (one, size // one)}
        for factor in (-1, *sorted(sizes)):
            if all(one in {left for left, _ in _pairs(size, factor)} for size, one in sides):
                return {"decompose_factor": factor}
        raise ValueError("lokr_w1: the modules have sizes of no one decompose_factor, as LyCORIS makes them")

    def settle_with_file(self, shapes: Callable[[], Mapping[str, torch.Size]]) -> None:
        """Take l and m from the tensors of a file, where LyCORIS would have chosen them and PEFT would not.

        Of one `decompose_factor`, PEFT and releases of LyCORIS make other factors; see `_pairs`. Only the tensors say
        which.
        """
        self._in_file = _factors_in(shapes())


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Return the two factors of `size` for a `decompose_factor`, as PEFT chooses them.

    A factor that divides is taken as it is, even if it is the larger of the two. Otherwise the first is the largest
    divisor up to it (any, if it is -1) that does not exceed the second.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)
    return first, size // first


def _pairs(size: int, factor: int) -> list[tuple[int, int]]:
    """Return the factors of `size` that PEFT or a release of LyCORIS may choose, PEFT's first.

    LyCORIS sorts the two, so that (4, 2) is (2, 4) there; later releases search for another divisor where the factor is
    more than the size's root, and `unbalanced_factorization` turns the pair of the outputs round.
    """
    first = factorization(size, factor)
    second = factorization(size, -1) if factor > math.isqrt(size) else first
    return list(dict.fromkeys([first, first[::-1], second, second[::-1]]))


def _factors_in(shapes: Mapping[str, torch.Size]) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """Return l and m of every layer in a file, by the number of its outputs and the numbers in one of its filters."""
    layers: dict[str, dict[str, torch.Size]] = {}
    for key, shape in shapes.items():
        path, _, part = key.rpartition(".")
        layers.setdefault(path, {})[part] = shape
    found: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for parts in layers.values():
        first, second = (_sizes(parts, which) for which in ("lokr_w1", "lokr_w2"))
        if first is None or second is None:
            continue
        (left, middle), (rows, rest) = first, second
        found.setdefault((left * rows, middle * rest), set()).add((left, middle))
    return found


def _sizes(parts: Mapping[str, torch.Size], name: str) -> tuple[int, int] | None:
    """Return the rows of one factor of the product and the numbers in a row; None if its tensors do not tell."""
    whole, a, b, core = (parts.get(key) for key in (name, f"{name}_a", f"{name}_b", "lokr_t2"))
    if whole is not None:
        return (whole[0], math.prod(whole[1:])) if len(whole) > 1 else None
    if a is None or b is None or not len(a) == len(b) == 2:
        return None
    if core is None or name == "lokr_w1":
        return a[0], b[1]
    return (a[1], b[1] * math.prod(core[2:])) if len(core) > 2 else None


_W1 = ("lokr_w1", "lokr_w1_a", "lokr_w1_b")
_W2 = ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class LoKrLinear(Decomposed):
    """An nn.Linear with LoKr adapters: ``y = x W^T + s * x kron(w1, w2)^T + bias``, without the dense product.

    Parameters per adapter: `lokr_w1.<name>` (l, m), or `lokr_w1_a` (l, r) and `lokr_w1_b` (r, m); `lokr_w2.<name>`
    (k, n), or `lokr_w2_a` (k, r) and `lokr_w2_b` (r, n). With `use_dora` also `lokr_magnitude_vector.<name>` (out,),
    and the output without its bias is scaled by ``m / ||W + update||``, row by row, through whose norm no gradient
    passes and for which nothing is dropped. With `dora_inputs` the magnitudes are (1, in), and the input is scaled by
    ``m / ||W + update||``, column by column.

    Args:
        base_layer: The nn.Linear to adapt; it is frozen.
        config: A LoKrConfig; `rank_pattern` and `alpha_pattern` are matched against `module_name`.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not an nn.Linear, or holds integers that its call cannot multiply by.

    Source: Yeh et al., arXiv 2309.14859.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.LoKrLinear(torch.nn.Linear(8, 4), peftk.LoKrConfig(r=2))
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """

    base_kinds: ClassVar[tuple[str, ...]] = ("Linear",)
    magnitudes = "lokr_magnitude_vector"
    adapter_layer_names = (*_W1, *_W2, magnitudes)
    parameter_names = frozenset(adapter_layer_names)
    other_param_names = (
        *("r", "alpha", "scaling"),
        *("rank_dropout", "module_dropout", "rank_dropout_scale", "use_dora", "dora_inputs"),
    )
    config_class = LoKrConfig
    update_fields = {"r": "r", "alpha": "alpha"}  # noqa: RUF012 - a ClassVar of the base

    @classmethod
    def _create(cls, base_layer: nn.Module, config: LoKrConfig, module_name: str, initialise: bool) -> Adapter:
        r = config._of_module(config.rank_pattern, module_name, config.r)
        alpha = config._of_module(config.alpha_pattern, module_name, config.alpha)
        shapes = _shapes(weight_shape(base_layer), config, r, module_name)
        parts = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        if initialise:
            _tell_factors(weight_shape(base_layer)[:2], config.decompose_factor, module_name)
            zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}
            # In PEFT's order, so that equal seeds give equal bits.
            for name, parameter in parts.items():
                if name not in zero[config.init_weights]:
                    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if config.use_dora:
            parts[cls.magnitudes] = nn.Parameter(torch.zeros(cls._number_of_magnitudes(base_layer, config)))
        settings = {name: getattr(config, name) for name in cls.other_param_names[3:]}
        return Adapter({**parts}, {"r": r, "alpha": alpha, "scaling": alpha / r, **settings})

    @classmethod
    def _norms(cls, base_layer: Any, adapter: Adapter) -> Tensor:
        described = _kronecker(adapter.parts, adapter.settings["scaling"])
        return lokr.norms(base_layer, described, of_inputs=adapter.settings["dora_inputs"])

    def kronecker(self, name: str, drop: bool = True, weight: Tensor | None = None) -> Kronecker:
        """Return the tensors and settings of one adapter, as its arithmetic takes them.

        Args:
            name: The adapter.
            drop: Whether dropout acts, in training.
            weight: The base weight, for the norms of DoRA; None means that of the base layer.
        """
        held = {container: getattr(self, container) for container in (*_W1, *_W2)}
        adapter = _kronecker({c: parts[name] for c, parts in held.items() if name in parts}, self.scaling[name])
        kept = self._draw(name) if drop else None
        gain, of_inputs = None, self.dora_inputs[name]
        if self.use_dora[name]:
            gain = dora.gain(self.lokr_magnitude_vector[name], lokr.norms(self.base_layer, adapter, weight, of_inputs))
            # Where the whole update is dropped the layer is the base layer.
            gain = gain if kept is None else torch.where(kept.any(), gain, torch.ones_like(gain))
        gain, input_gain = (None, gain) if of_inputs else (gain, None)
        return adapter._replace(scale=self._scale(name, kept), kept=kept, gain=gain, input_gain=input_gain)

    def _draw(self, name: str) -> Tensor | None:
        """Draw which rows of the update stay in this pass: None for all of them."""
        p, module_p = self.rank_dropout[name], self.module_dropout[name]
        if not (self.training and (p or module_p)):
            return None
        _seed.refuse_capture(self.base_layer.weight.device)
        # Drawn as PEFT draws them, on the CPU's default generator, so that activation checkpointing replays them.
        kept = (torch.rand(1, device="cpu") > module_p).expand(self.out_features)
        if p:
            kept = kept & (torch.rand(self.out_features, device="cpu") > p)
        return kept.to(self.base_layer.weight.device)

    def _scale(self, name: str, kept: Tensor | None) -> float | Tensor:
        """Return the scale, divided by the share of rows that stay where the configuration says so."""
        scale = self.scaling[name]
        if kept is None or not (self.rank_dropout[name] and self.rank_dropout_scale[name]):
            return scale
        # Where no row stays, the update is zero and not 0 / 0.
        return scale / kept.double().mean().clamp_min(1e-12)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return lokr.linear(self.base_layer, x, [self.kronecker(name) for name in names], args, kwargs)

    def _few(self, name: str, weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        return None if self.use_dora[name] else lokr.few(weight, bias, self.kronecker(name))

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update of one adapter, like the weight, without dropout and DoRA's scaling."""
        return lokr.update(
            self.kronecker(adapter, drop=False)._replace(gain=None, input_gain=None), weight_shape(self.base_layer)
        )

    def _merge_into(self, tensors: Merged, name: str) -> None:
        weight = tensors["weight"]
        own = self._original.get("weight", self.base_layer.weight).to(device=weight.device, dtype=weight.dtype)
        tensors["weight"] = lokr.merged(weight, self.kronecker(name, drop=False, weight=own))


class LoKrConv(LoKrLinear):
    """A convolution with LoKr adapters on its filters, computed as one convolution with the written weight.

    Parameters per adapter: `lokr_w1.<name>` (l, m) or its two factors, with ``m * n = in / groups``;
    `lokr_w2.<name>` (k, n, *kernel), or `lokr_w2_a` (k, r) and `lokr_w2_b` (r, n * taps). With `use_effective_conv2d`
    and a kernel of several taps, the Tucker form: `lokr_t2` (r, r, *kernel), on an nn.Conv1d (r, r, taps, 1) as in
    PEFT, `lokr_w2_a` (r, k) and `lokr_w2_b` (r, n). Stride, padding, padding mode, dilation and groups are those of the
    layer. On an nn.Conv1d, a whole `lokr_w2` makes PEFT's update, which is no Kronecker product; see `lokr.Kronecker`.

    Args:
        base_layer: The nn.Conv1d, nn.Conv2d or nn.Conv3d to adapt; it is frozen.
        config: A LoKrConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense convolution of these kinds.

    Source: Yeh et al., arXiv 2309.14859.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.LoKrConv(torch.nn.Conv2d(4, 8, 3), peftk.LoKrConfig(r=2, decompose_factor=2))
        >>> layer(torch.randn(1, 4, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """

    base_kinds = ("Conv1d", "Conv2d", "Conv3d")

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return lokr.conv(self.base_layer, x, [self.kronecker(name) for name in names], args, kwargs)


def _kronecker(parts: Mapping[str, Any], scale: float) -> Kronecker:
    """Describe an adapter by its parts, without dropout and magnitudes."""
    w1, w2 = (tuple(parts[container] for container in containers if container in parts) for containers in (_W1, _W2))
    return Kronecker(w1, w2, scale)


def _tell_factors(sizes: tuple[int, ...], factor: int, module_name: str) -> None:
    """Warn where a layer gets another factor than the one that was asked for, as in PEFT."""
    for size in sizes:
        if factor > 0 and size % factor:
            warn_of_field(
                f"decompose_factor: {factor} does not divide the size {size} of module {module_name!r}; "
                f"{factorization(size, factor)[0]} is used instead",
                stacklevel=2,
            )


def _factors(weight: tuple[int, ...], config: LoKrConfig, module_name: str) -> list[tuple[int, int]]:
    """Return the factors of a layer's outputs and inputs: PEFT's, unless the file that is read holds others."""
    found = config._in_file.get((weight[0], math.prod(weight[1:])), ())
    options = list(itertools.product(*(_pairs(size, config.decompose_factor) for size in weight[:2])))
    chosen = next((pairs for pairs in options if (pairs[0][0], pairs[1][0]) in found), options[0])
    if chosen != options[0] and not config._told:
        # Once for an adapter: all its layers come from one writer.
        config._told = True
        (left, _), (middle, _) = chosen
        warn_of_field(
            f"decompose_factor: {config.decompose_factor} gives a w1 of {(options[0][0][0], options[0][1][0])} on "
            f"module {module_name!r}; the file holds one of {(left, middle)}, as LyCORIS chooses it, which is used. "
            "PEFT cannot load such a file",
            stacklevel=2,
        )
    return list(chosen)


def _shapes(weight: tuple[int, ...], config: LoKrConfig, r: int, module_name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters, in the order in which PEFT initialises them."""
    kernel = list(weight[2:])
    (left, rows), (middle, columns) = _factors(weight, config, module_name)
    if config.decompose_both and r < max(left, middle) / 2:
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1_a": (left, r), "lokr_w1_b": (r, middle)}
    else:
        shapes = {"lokr_w1": (left, middle)}
    if r >= max(rows, columns) / 2:
        return {**shapes, "lokr_w2": (rows, columns, *kernel)}
    if config.use_effective_conv2d and any(taps > 1 for taps in kernel):
        return {**shapes, "lokr_w2_a": (r, rows), "lokr_w2_b": (r, columns), "lokr_t2": core_shape(r, kernel)}
    return {**shapes, "lokr_w2_a": (rows, r), "lokr_w2_b": (r, columns * math.prod(kernel))}


__all__ = ["LoKrConfig", "LoKrConv", "LoKrLinear"]
