"""The configuration of LoRA, and what the configurations of its relatives share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...checkpoint.container import shown
from ..base.config import (
    Form,
    PeftConfig,
    PeftType,
    check_bool,
    check_choice,
    check_dora_inputs,
    check_int,
    check_names,
    check_number,
    check_patterns,
    refuse_unimplemented,
)
from .start import starts_inside

MAX_RANK = 65_536
MAX_ALPHA = 1e6
MAX_TOKENS = 2**40


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
        fan_in_fan_out: Whether the layers store (in, out), as GPT-2's Conv1D does; set to what they do, with a
            warning if that is a change.
        bias: Which biases of the model are trained: "none", "all" or "lora_only".
        use_rslora: Rank-stabilised scale.
        modules_to_save: Modules trained and saved in full beside the adapter.
        init_lora_weights: True (A uniform, B zero), "gaussian" (A normal with deviation 1/r, B zero), "orthogonal",
            or False (both random: not the identity). On linear layers also "pissa" (the largest singular values of the
            weight, which the layer then lacks), "pissa_niter_<n>" (the same by n random iterations) and "olora" (the
            first columns of its QR decomposition).
        layers_to_transform: Indices of the layers to adapt.
        layers_pattern: Name of the list that the indices count in.
        rank_pattern: Name ending or expression to the rank of the modules it matches.
        alpha_pattern: Name ending or expression to the alpha of the modules it matches.
        lora_bias: Give B a bias.
        use_dora: Give every output a magnitude of its own (DoRA).
        trainable_token_indices: Rows of the input embeddings that are trained, such as those of new tokens; or names of
            embeddings to their rows. Layers that share the weight of such an embedding follow it, unless they are named
            with other rows.
        target_parameters: Full names, or endings after a dot, of parameters of two or three dimensions in any module:
            the stacked weights of experts. `target_modules` may then be None or empty, and means no module.
        ensure_weight_tying: Let the trained copies of tied modules in `modules_to_save` be tied, whichever of them is
            named; raise an error where tied layers are named with other rows; warn where nothing is tied. For
            `target_modules` it is not implemented.
        dora_inputs: Give every input a magnitude instead, or every input channel of a convolution, as LyCORIS can
            (`wd_on_output=False`). Hugging Face PEFT does not have this: such an adapter cannot be read by it. It acts
            alone on its layers.

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
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    alpha_pattern: dict[str, Any] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
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
    # By name alone: the fields of AdaLoRA follow.
    dora_inputs: bool = field(default=False, kw_only=True)

    _forms: ClassVar[tuple[Form, ...]] = (
        Form("LoRA", {"r": 4}),
        Form("DoRA", {"r": 4, "use_dora": True}),
    )
    _meaning: ClassVar[tuple[str, ...]] = (
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "dora_inputs",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "init_lora_weights",
    )
    _never_in_file = frozenset({"runtime_config"})
    _only_here = frozenset({"dora_inputs"})

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_int("r", self.r, 1, MAX_RANK)
        self._check_alpha()
        check_number("lora_dropout", self.lora_dropout, 0, 1)
        check_choice("bias", self.bias, ("none", "all", "lora_only"))
        for name in ("fan_in_fan_out", "use_rslora", "lora_bias", "use_dora", "ensure_weight_tying"):
            check_bool(name, getattr(self, name))
        check_dora_inputs(self)
        self._check_patterns()
        self._check_targets()
        self._check_init()
        self._check_tokens()
        if self.target_parameters is not None:
            check_names("target_parameters", self.target_parameters)
        if not isinstance(self.runtime_config, LoraRuntimeConfig):
            raise TypeError(f"runtime_config: expected a LoraRuntimeConfig, got {self.runtime_config!r}")
        refuse_unimplemented(self, _NOT_IMPLEMENTED)

    def _check_alpha(self) -> None:
        check_number("lora_alpha", self.lora_alpha, 0, MAX_ALPHA, above=True)

    def _check_patterns(self) -> None:
        check_patterns(self, MAX_RANK, MAX_ALPHA)

    def _check_tokens(self) -> None:
        tokens = self.trainable_token_indices
        if tokens is None:
            return
        if not isinstance(tokens, (list, tuple, dict)):
            raise TypeError(f"trainable_token_indices: expected a list of ints or a dict of lists, got {shown(tokens)}")
        for name, indices in tokens.items() if isinstance(tokens, dict) else [("", tokens)]:
            where = f"trainable_token_indices[{shown(name)}]" if name else "trainable_token_indices"
            if not isinstance(name, str) or not isinstance(indices, (list, tuple)):
                raise TypeError(f"{where}: expected the name of an embedding and a list, got {shown(indices)}")
            if not indices:
                raise ValueError(f"{where}: expected at least one index, got an empty list")
            for index in indices:
                check_int(where, index, 0, MAX_TOKENS)
            if len({*indices}) != len(indices):
                raise ValueError(f"{where}: expected every index once")

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if not isinstance(init, (bool, str)):
            raise TypeError(f"init_lora_weights: expected a bool or a string, got {init!r}")
        if init not in (True, False, "gaussian", "orthogonal") and not starts_inside(init):
            raise NotImplementedError(
                f"init_lora_weights={shown(init)}: not implemented; expected True, False, 'gaussian', 'orthogonal', "
                "'pissa', 'pissa_niter_<number>' or 'olora'"
            )
        if starts_inside(init) and self.use_dora:
            raise NotImplementedError(f"use_dora: not implemented with init_lora_weights={init!r}")
        if init == "orthogonal" and any(r % 2 for r in (self.r, *(self.rank_pattern or {}).values())):
            raise ValueError(f"r: init_lora_weights='orthogonal' needs an even rank, got {self.r}")
        if self.lora_bias and isinstance(init, str):
            raise ValueError(f"lora_bias: needs init_lora_weights True or False, got {init!r}")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias: cannot be combined with use_dora=True")

    def _meant(self, name: str) -> Any:
        value = super()._meant(name)
        # The other ways to start change no meaning of a trained factor.
        return value if name != "init_lora_weights" or starts_inside(value) else True

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, without `runtime_config`, which is never saved."""
        return {name: value for name, value in super().to_dict().items() if name not in self._never_in_file}


_NOT_IMPLEMENTED = (
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "qalora_group_size",
    "monteclora_config",
    "layer_replication",
    "runtime_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)


__all__ = ["MAX_ALPHA", "MAX_RANK", "LoraConfig", "LoraRuntimeConfig"]
