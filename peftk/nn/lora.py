"""LoRA: a low-rank update beside a frozen layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ._base import Adapter, AdapterLayer
from .config import (
    PeftConfig,
    PeftType,
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_regex,
    pattern_key,
    refuse_unimplemented,
)

MAX_RANK = 65_536
MAX_ALPHA = 1e6


@dataclass
class LoraRuntimeConfig:
    """Settings of PEFT that are never saved.

    Args:
        ephemeral_gpu_offload: Not implemented; must be False.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfig, method=PeftType.LORA):
    """Configuration of LoRA, with the fields and defaults of PEFT 0.21.

    ``y = base(x) + s * B(A(dropout(x)))`` with ``s = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with `use_rslora`.

    Args:
        r: Rank.
        target_modules: Names or name endings of the modules to adapt, one regular expression for the whole name,
            "all-linear", or None for the default of the model's type.
        exclude_modules: Names, endings or one regular expression of modules to leave alone.
        lora_alpha: Numerator of the scale.
        lora_dropout: Probability of dropping an input element in training, in [0, 1).
        fan_in_fan_out: For layers that store (in, out); has no meaning on nn.Linear, where it is set to False with a
            warning.
        bias: Which biases of the model are trained: "none", "all" or "lora_only".
        use_rslora: Rank-stabilised scale.
        modules_to_save: Modules trained and saved in full beside the adapter.
        init_lora_weights: True (A uniform, B zero), "gaussian" (A normal with deviation 1/r, B zero), "orthogonal",
            or False (both random: not the identity).
        layers_to_transform: Indices of the layers to adapt.
        layers_pattern: Name of the list that the indices count in.
        rank_pattern: Name ending or expression to the rank of the modules it matches.
        alpha_pattern: Name ending or expression to the alpha of the modules it matches.
        lora_bias: Give B a bias.

    The remaining fields belong to variants that are not implemented; a value other than the default raises
    NotImplementedError.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; the scale of
    `use_rslora`: Kalajdzievski, arXiv 2312.03732.

    Example:
        >>> from peftk import LoraConfig
        >>> LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]).r
        4
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    _meaning = (
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "bias",
        "modules_to_save",
    )
    _never_in_file = frozenset({"runtime_config"})

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_int("r", self.r, 1, MAX_RANK)
        check_number("lora_alpha", self.lora_alpha, 0, MAX_ALPHA, above=True)
        check_number("lora_dropout", self.lora_dropout, 0, 1)
        check_choice("bias", self.bias, ("none", "all", "lora_only"))
        for name in ("fan_in_fan_out", "use_rslora", "lora_bias"):
            check_bool(name, getattr(self, name))
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            patterns = {} if patterns is None else patterns
            setattr(self, name, patterns)
            if not isinstance(patterns, dict):
                raise TypeError(f"{name}: expected a dict from name patterns to numbers, got {patterns!r}")
            for key, value in patterns.items():
                if not isinstance(key, str):
                    raise TypeError(f"{name}: expected strings as keys, got {key!r}")
                check_regex(f"{name} key", key)
                if name == "rank_pattern":
                    check_int(f"{name}[{key!r}]", value, 1, MAX_RANK)
                else:
                    check_number(f"{name}[{key!r}]", value, 0, MAX_ALPHA, above=True)
        self._check_targets()
        self._check_init()
        if not isinstance(self.runtime_config, LoraRuntimeConfig):
            raise TypeError(f"runtime_config: expected a LoraRuntimeConfig, got {self.runtime_config!r}")
        refuse_unimplemented(self, _NOT_IMPLEMENTED)

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if not isinstance(init, (bool, str)):
            raise TypeError(f"init_lora_weights: expected a bool or a string, got {init!r}")
        if init not in (True, False, "gaussian", "orthogonal"):
            raise NotImplementedError(
                f"init_lora_weights={init!r}: not implemented; expected True, False, 'gaussian' or 'orthogonal'"
            )
        if init == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError(f"r: init_lora_weights='orthogonal' needs an even rank, got {self.r}")
        if self.lora_bias and isinstance(init, str):
            raise ValueError(f"lora_bias: needs init_lora_weights True or False, got {init!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, without `runtime_config`, which is never saved."""
        return {name: value for name, value in super().to_dict().items() if name not in self._never_in_file}


_NOT_IMPLEMENTED = (
    "megatron_config",
    "megatron_core",
    "trainable_token_indices",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_dora",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "qalora_group_size",
    "monteclora_config",
    "layer_replication",
    "runtime_config",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)


def low_rank_delta(a: Tensor, b: Tensor, scale: float | Tensor = 1.0, *, gate: Tensor | None = None) -> Tensor:
    """Return the dense update ``scale * (B * gate) A`` of shape (out, in), in the dtype of the factors."""
    return ((b if gate is None else b * gate) @ a) * scale


class LoRALinear(AdapterLayer):
    """An nn.Linear with LoRA adapters: ``y = x W^T + bias + s * (dropout(x) A^T) B^T``.

    Parameters per adapter: `lora_A.<name>.weight` (r, in), `lora_B.<name>.weight` (out, r) and, with `lora_bias`,
    `lora_B.<name>.bias` (out,).

    Args:
        base_layer: The nn.Linear to adapt; it is frozen.
        config: A LoraConfig; `rank_pattern` and `alpha_pattern` are matched against `module_name`.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense nn.Linear.

    Source: Hu et al., arXiv 2106.09685.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.LoRALinear(torch.nn.Linear(8, 8), peftk.LoraConfig(r=4))
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")
    config_class = LoraConfig

    @classmethod
    def _create(cls, base_layer: nn.Module, config: LoraConfig, module_name: str, initialise: bool) -> Adapter:
        if config.fan_in_fan_out:
            warnings.warn("fan_in_fan_out: has no meaning on nn.Linear and is set to False", stacklevel=2)
            config.fan_in_fan_out = False
        r = config.rank_pattern.get(pattern_key(config.rank_pattern, module_name), config.r)
        alpha = config.alpha_pattern.get(pattern_key(config.alpha_pattern, module_name), config.lora_alpha)
        if config.lora_bias and base_layer.bias is None:
            warnings.warn(
                f"lora_bias: module {module_name!r} has no bias, so this adapter can never be merged", stacklevel=2
            )
        linear = nn.Linear if initialise else _uninitialised_linear
        a = linear(base_layer.in_features, r, bias=False)
        b = linear(r, base_layer.out_features, bias=config.lora_bias)
        if initialise:
            _initialise(a, b, config.init_lora_weights)
        scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        settings = {"r": r, "lora_alpha": alpha, "scaling": scaling, "lora_dropout": float(config.lora_dropout)}
        return Adapter({"lora_A": a, "lora_B": b}, settings)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self._can_fuse(x, args, kwargs):
            frozen = self._modules["base_layer"]._parameters
            result = self._add(names[0], F.low_rank_linear, x, frozen["weight"], frozen["bias"])
            names = names[1:]
        else:
            result = self.base_layer(x, *args, **kwargs)
            if x.dtype != result.dtype:
                x = x.to(result.dtype)
        for name in names:
            result = self._add(name, F.low_rank_add, result, x)
        return result

    def _add(self, name: str, function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
        """Call one of the low-rank functions with the factors, the scale and the dropout of an adapter."""
        scale, p, b = self.scaling[name], self.lora_dropout[name], self.lora_B[name]
        dropout = {"dropout_p": p} if self.training and p > 0 else {}
        result = function(*args, self.lora_A[name].weight, b.weight, scale, **dropout)
        return result if b.bias is None else result + (b.bias * scale).to(result.dtype)

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float | Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, (out, in), in the adapter's dtype."""
        return low_rank_delta(*self._factors(adapter))

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if an adapter has a bias and the base layer has none to merge it into."""
        for name in self._to_merge(adapter_names):
            if self.lora_B[name].bias is not None and self.base_layer.bias is None:
                raise ValueError(
                    f"merge: adapter {name!r} has a bias (lora_bias=True) but the base layer has none to merge it into"
                )

    def _merge_into(self, tensors: dict[str, Tensor], name: str) -> None:
        weight = tensors["weight"]
        a, b, scale = self._factors(name)
        tensors["weight"] = weight + low_rank_delta(a.to(weight.dtype), b.to(weight.dtype), scale)
        bias = self.lora_B[name].bias
        if bias is not None:
            tensors["bias"] = tensors["bias"] + bias.to(weight.dtype) * scale


def _uninitialised_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias)


@torch.no_grad()
def _initialise(a: nn.Linear, b: nn.Linear, how: bool | str) -> None:
    if how is False:
        return
    r = a.out_features
    if how == "orthogonal":
        q, _ = torch.linalg.qr(torch.randn(r, r))
        a.weight.copy_((torch.randn(a.in_features, r // 2) @ q[0::2]).T / 10)
        b.weight.copy_((torch.randn(r // 2, b.out_features).T @ q[1::2]) / 10)
        return
    if how == "gaussian":
        nn.init.normal_(a.weight, std=1 / r)
    else:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    nn.init.zeros_(b.weight)
    if b.bias is not None:
        nn.init.zeros_(b.bias)


__all__ = ["LoRALinear", "LoraConfig", "LoraRuntimeConfig"]
