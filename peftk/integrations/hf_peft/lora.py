"""PEFT's LoRA and DoRA: linear layers, quantised ones among them, convolutions and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from ...methods import dora, lora, lora_conv, lora_embedding
from ...methods._base_layer import Few, kind_of, observed, opaque_weight, plain_tensors
from ...methods.lora import LowRank
from ...ops._few_rows import few
from ...ops.conv import Convolution
from ...ops.kept import Kept
from ...ops.shortcut import Shortcut
from ..fingerprints import name_of
from .tuner_layer import NONE_ACTIVE, SHARED, TunerWay, active, parameter, plain_example, unfit

FEW_ROWS = 64
"""Below as many rows, one LoRA adapter runs in PEFT's own code, whose two small products cost less than one call; but
for the fewest, where nothing is recorded."""


FEW_PIXELS = 1024
"""The same for convolutions, in places of the input."""


class Active(NamedTuple):
    """An active adapter, and the probability of PEFT's dropout, which is drawn here, as PEFT draws it."""

    low_rank: LowRank
    dropout_p: float


class LoRAWay(TunerWay):
    """What the kinds of layers with LoRA share."""

    method = "lora"
    magnitude_class: str
    variant_class: str

    def _variant(self, layer: Any, name: str) -> str | None:
        """Say why the variant of an adapter is not taken, or return None: there is none, or it is DoRA."""
        variant = layer.lora_variant.get(name)
        if variant is None:
            return None
        if name_of(type(variant)) != f"peft.tuners.lora.variants.{self.variant_class}":
            return f"the variant {type(variant).__name__}"
        unknown = self.unknown(self.copied_by_some)
        if unknown is not None:
            return unknown
        base = layer._modules["base_layer"]
        if kind_of(base) is None or opaque_weight(base) is not None:
            return "DoRA on a weight that is not dense"
        magnitude = layer.lora_magnitude_vector[name]
        if name_of(type(magnitude)) != f"peft.tuners.lora.dora.{self.magnitude_class}" or observed(
            type(magnitude), magnitude
        ):
            return "a hook or another forward is on a module of the adapter"
        return None if not _caches() else "PEFT's cache of DoRA is on"


def _theirs() -> Any:
    from peft.tuners.lora import dora as theirs

    return theirs


def _caches() -> bool:
    return bool(_theirs().ENABLE_DORA_CACHING)


def scale_of(layer: Any, name: str) -> Any:
    """Return the scale of an adapter: a float, a tensor of one number, or None if it is neither."""
    scale = layer.scaling[name]
    if type(scale) is float:
        return scale
    if isinstance(scale, int):
        return float(scale)
    return scale if isinstance(scale, Tensor) and scale.numel() == 1 else None


def dropout_of(module: Any) -> float | None:
    """Return the probability with which a dropout module drops now, or None if it is not PEFT's or somebody listens."""
    if type(module) is nn.Identity:
        return None if observed(nn.Identity, module) else 0.0
    if observed(nn.Dropout, module):
        return None
    return module.p if module.training else 0.0


class Factored(LoRAWay):
    """Layers whose factors are modules: linear layers and convolutions."""

    factor_class: type[nn.Module]

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        modules = layer._modules
        first, second = modules["lora_A"]._modules, modules["lora_B"]._modules
        names = active(layer, first)
        if not names:
            return NONE_ACTIVE
        variants = layer.lora_variant
        found: list[Any] = []
        parameters: list[Any] = []
        for name in names:
            a, b = first[name], second[name]
            p = dropout_of(modules["lora_dropout"]._modules[name])
            if p is None or observed(self.factor_class, a, b):
                return "a hook or another forward is on a module of the adapter"
            scale = scale_of(layer, name)
            if scale is None:
                return "a scale that is no number"
            a, bias, b = parameter(a), parameter(b, "bias"), parameter(b)
            parameters += (a, b) if bias is None else (a, b, bias)
            magnitude = None
            if variants:
                why = self._variant(layer, name)
                if why is not None:
                    return why
                if name in variants:
                    if bias is not None:
                        return "DoRA with a bias"
                    magnitude = parameter(layer.lora_magnitude_vector[name])
                    parameters.append(magnitude)
            found.append(Active(LowRank(a, b, scale, None, None if bias is None else bias * scale, 0.0, magnitude), p))
        return unfit(layer, x, parameters) or self._unfit_base(layer, x, names) or found

    def _unfit_base(self, layer: Any, x: Tensor | None, names: Sequence[str]) -> str | None:
        raise NotImplementedError


class Linear(Factored):
    """Linear layers, GPT-2's Conv1D among them, dense or quantised."""

    layers = (
        "peft.tuners.lora.layer.Linear",
        "peft.tuners.lora.bnb.Linear8bitLt",
        "peft.tuners.lora.bnb.Linear4bit",
        "peft.tuners.lora.torchao.TorchaoLoraLinear",
    )
    operator = "low_rank_linear"
    copied = SHARED
    variant_class, magnitude_class = "DoraLinearVariant", "DoraLinearLayer"
    copied_by_some = (
        "peft.tuners.lora.variants.DoraLinearVariant.forward",
        "peft.tuners.lora.dora.DoraLinearLayer.forward",
        "peft.tuners.lora.dora.DoraLinearLayer.get_weight_norm",
        "peft.tuners.lora.dora.DoraLinearLayer.get_lora_weight",
    )
    factor_class = nn.Linear

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        # First, so that a call that is left to PEFT costs no more than PEFT's own.
        if x is not None and not layer.lora_variant and left_to_peft(layer, x) and len(layer.active_adapters) == 1:
            return FEW_ROWS_NOTE
        return super().adapters(layer, x)

    def _unfit_base(self, layer: Any, x: Tensor | None, names: Sequence[str]) -> str | None:
        if x is not None and x.dim() == 1 and layer.lora_variant:
            return "PEFT's DoRA makes two dimensions of one"
        return None if x is None else unfit_rows(layer, x, len(names) == 1 and not layer.lora_variant)

    def note(self, layer: Any) -> str | None:
        """See `Way.note`."""
        return None if layer.lora_variant else FEW_ROWS_NOTE

    def example(self, layer: Any, adapters: list[Active]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        plain, one = plain_example(layer), adapters[0].low_rank
        return None if plain is None else (*plain, one.a, one.b, 1.0)

    def few(
        self, layer: Any, adapters: list[Active], weight: Tensor, bias: Tensor | None, rests: Shortcut
    ) -> Few | None:
        """See `Way.few`."""
        one, p = adapters[0]
        base = layer._modules["base_layer"]
        if p > 0:
            return None
        if one.magnitude is None:
            return lora.few(base, weight, bias, one)
        rests.rest_on(vars(_theirs()), "ENABLE_DORA_CACHING")
        short = lora.few(base, weight, bias, one._replace(kept=Kept()))
        if short is None:
            return None
        # PEFT's DoRA makes two dimensions of one.
        return Few(lambda x: short.run(x) if x.dim() > 1 else None, short.rows)

    def run(self, layer: Any, x: Tensor, adapters: list[Active]) -> Tensor:
        """See `Way.run`."""
        return run_linear(layer._modules["base_layer"], x, adapters)


def run_linear(base: nn.Module, x: Tensor, adapters: Sequence[Active]) -> Tensor:
    """Return the output of a linear layer, with PEFT's draws of dropout."""
    if all(p == 0 for _, p in adapters) and plain_tensors(base, x) is not None:
        return lora.linear(base, x, [one for one, _ in adapters])
    result: Tensor = base(x)
    for one, p in adapters:
        seen = dropped(x, one.a, p)
        if one.magnitude is None:
            result = lora.add(result, x if seen is None else seen, one)
        else:
            result = dora.rescale_linear(base, result, x.to(result.dtype), one, seen)
    return result


def run_conv(base: Convolution, x: Tensor, adapters: Sequence[Active]) -> Tensor:
    """Return the output of a convolution, with PEFT's draws of dropout."""
    if all(p == 0 for _, p in adapters):
        return lora_conv.conv(base, x, [one for one, _ in adapters])
    result: Tensor = base(x)
    for one, p in adapters:
        result = lora_conv.add(base, result, x, one, dropped(x, one.a, p))
    return result


FEW_ROWS_NOTE = (
    f"calls of fewer than {FEW_ROWS} rows run in PEFT's own code, which is as fast there, but for the few rows of "
    "generating without gradients"
)


def left_to_peft(layer: Any, x: Tensor) -> bool:
    """Whether an input of one adapter has few rows, and not so few, without gradients, as peftk has a short way for."""
    if x.numel() >= FEW_ROWS * layer.in_features:
        return False
    return torch.is_grad_enabled() or layer.training or not few(x, layer.in_features)


def unfit_rows(layer: Any, x: Tensor, small: bool) -> str | None:
    """Say why the input of a linear layer is left to PEFT, or return None.

    Args:
        layer: The layer.
        x: Its input.
        small: Whether the adapter costs PEFT two small products alone.
    """
    if x.shape[-1:] != (layer.in_features,):
        return "an input of another size"
    return FEW_ROWS_NOTE if small and left_to_peft(layer, x) else None


CONV_NOTE = f"calls of fewer than {FEW_PIXELS} places, and training without DoRA, run in PEFT's own code, as fast there"


def conv_pays(layer: Any, x: Tensor) -> bool:
    """Whether a convolution with LoRA is faster here than in PEFT, whose products are cheap beside the base layer."""
    if x.numel() < FEW_PIXELS * layer.in_features:
        return False
    return bool(layer.lora_variant) or not torch.is_grad_enabled()


def dropped(x: Tensor, like: Tensor, p: float) -> Tensor | None:
    """Return the input of an adapter as PEFT drops it, in the dtype of the adapter, or None if nothing drops."""
    return tf.dropout(x.to(like.dtype), p, training=True) if p > 0 else None


class OnConvolution(Factored):
    """Convolutions; a subclass has their number of dimensions."""

    copied: ClassVar[tuple[str, ...]] = SHARED
    copied_by_some = (
        "peft.tuners.lora.variants._DoraConvNdVariant.forward",
        "peft.tuners.lora.dora._DoraConvNdLayer.forward",
        "peft.tuners.lora.dora._DoraConvNdLayer.get_weight_norm",
        "peft.tuners.lora.dora._DoraConvNdLayer.get_lora_weight",
    )

    def _unfit_base(self, layer: Any, x: Tensor | None, names: Sequence[str]) -> str | None:
        base = layer._modules["base_layer"]
        kind = type(base)
        if kind is not self.factor_class:
            return f"the base layer is a {kind.__name__}"
        if base.groups > 1 and layer.lora_variant:
            return "PEFT's DoRA on groups has an update of its own"
        for name in names:
            a, b = layer.lora_A[name], layer.lora_B[name]
            if _geometry(a) != _geometry(base) or a.groups != 1 or b.groups != base.groups:
                return "PEFT's convolution A has another geometry than the base layer"
        if x is None:
            return None
        dims = len(base.kernel_size)
        shapes = (dims + 2,) if layer.lora_variant else (dims + 1, dims + 2)
        if x.dim() not in shapes or x.shape[-dims - 1] != base.in_channels:
            return "an input of another shape"
        return None if conv_pays(layer, x) else CONV_NOTE

    def note(self, layer: Any) -> str | None:
        """See `Way.note`."""
        return CONV_NOTE

    def run(self, layer: Any, x: Tensor, adapters: list[Active]) -> Tensor:
        """See `Way.run`."""
        return run_conv(layer._modules["base_layer"], x, adapters)


def _geometry(conv: Convolution) -> tuple[Any, ...]:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode


class Conv1d(OnConvolution):
    """Convolutions over sequences."""

    layers = ("peft.tuners.lora.layer.Conv1d",)
    operator = "conv1d"
    variant_class, magnitude_class = "DoraConv1dVariant", "DoraConv1dLayer"
    factor_class = nn.Conv1d


class Conv2d(OnConvolution):
    """Convolutions over images."""

    layers = ("peft.tuners.lora.layer.Conv2d",)
    operator = "conv2d"
    variant_class, magnitude_class = "DoraConv2dVariant", "DoraConv2dLayer"
    factor_class = nn.Conv2d


class Conv3d(OnConvolution):
    """Convolutions over volumes."""

    layers = ("peft.tuners.lora.layer.Conv3d",)
    operator = "conv3d"
    variant_class, magnitude_class = "DoraConv3dVariant", "DoraConv3dLayer"
    factor_class = nn.Conv3d


class Embedding(LoRAWay):
    """Embeddings."""

    layers = ("peft.tuners.lora.layer.Embedding",)
    operator = "embedding"
    copied = (
        *SHARED,
        "peft.tuners.lora.layer.Embedding._embed",
        "peft.tuners.tuners_utils.BaseTunerLayer._get_embed_scale",
    )
    variant_class, magnitude_class = "DoraEmbeddingVariant", "DoraEmbeddingLayer"
    copied_by_some = (
        "peft.tuners.lora.variants.DoraEmbeddingVariant.forward",
        "peft.tuners.lora.dora.DoraEmbeddingLayer.forward",
        "peft.tuners.lora.dora.DoraLinearLayer.get_weight_norm",
        "peft.tuners.lora.dora.DoraEmbeddingLayer.get_lora_weight",
    )

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        if x is not None and x.numel() < FEW_ROWS and not layer.lora_variant:
            return FEW_ROWS_NOTE
        modules = layer._modules
        firsts, seconds = modules["lora_embedding_A"], modules["lora_embedding_B"]
        names = active(layer, firsts)
        if not names:
            return NONE_ACTIVE
        found: list[Any] = []
        parameters: list[Any] = []
        for name in names:
            a, b, scale = firsts[name], seconds[name], scale_of(layer, name)
            if scale is None:
                return "a scale that is no number"
            why = self._variant(layer, name)
            if why is not None:
                return why
            magnitude = parameter(layer.lora_magnitude_vector[name]) if name in layer.lora_variant else None
            parameters += (a, b) if magnitude is None else (a, b, magnitude)
            found.append(LowRank(a, b, scale, magnitude=magnitude))
        return unfit_embedding(layer, x, parameters) or found

    def note(self, layer: Any) -> str | None:
        """See `Way.note`."""
        return None if layer.lora_variant else FEW_ROWS_NOTE

    def run(self, layer: Any, x: Tensor, adapters: list[LowRank]) -> Tensor:
        """See `Way.run`."""
        return lora_embedding.embedding(layer._modules["base_layer"], x, adapters)


def unfit_embedding(layer: Any, x: Tensor | None, parameters: Sequence[Any]) -> str | None:
    """Say why the arithmetic cannot take an embedding and the parameters of its adapters, or return None."""
    if x is not None and x.dtype not in (torch.int64, torch.int32):
        return "an input that is no index"
    base = layer._modules["base_layer"]
    scaled = hasattr(base, "embed_scale")
    if not (type(base) is nn.Embedding or scaled) or base.max_norm is not None or base.sparse:
        return f"the base layer is a {type(base).__name__}, or one with max_norm or sparse gradients"
    if getattr(layer, "input_fns", None) or getattr(layer, "output_fns", None):
        return "the embedding is split over devices"
    why = unfit(layer, None, parameters)
    if why is None and x is not None and parameters[0].device != x.device:
        why = "the adapter is on another device than its input"
    return why
