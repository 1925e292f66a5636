"""C3A: a block-circular convolution beside a frozen layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..methods import c3a
from ..methods._base_layer import Few, features_of
from ..ops.shortcut import Shortcut
from .base.adapter_layer import Adapter, AdapterLayer
from .base.config import Form, PeftConfig, PeftType, check_choice, check_int
from .base.merging import Merged

MAX_BLOCK = 2**20


@dataclass
class C3AConfig(PeftConfig, method=PeftType.C3A):
    """Configuration of C3A, with the fields and defaults of PEFT 0.21.

    ``y = base(x) + C x / in_features`` with C made of circulant blocks of size `block_size`.

    Args:
        block_size: Size of a block; it must divide the input and the output size of every adapted layer.
        target_modules: As in `LoraConfig`.
        bias: Which biases of the model are trained: "none", "all" or "c3a_only".
        modules_to_save: As in `LoraConfig`.
        layers_to_transform: As in `LoraConfig`.
        layers_pattern: As in `LoraConfig`.
        block_size_pattern: Name ending or expression to the block size of the modules it matches, by PEFT's rule for
            this method: the first key that matches after a dot counts, else one that is the whole name, and of an
            expression with ``|`` outside of brackets only the last part must end where the name does.
        init_weights: "xavier_uniform" (the default; False means the same), "kaiming_uniform", "gaussian", or True for
            zeros, with which a fresh adapter changes nothing.
        exclude_modules: As in `LoraConfig`. PEFT's C3A has no such field: in a file, `target_modules` names the
            modules that are left.

    Source: Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342.

    Example:
        >>> from peftk import C3AConfig
        >>> C3AConfig(block_size=16, target_modules=["query", "value"]).block_size
        16
    """

    block_size: int = 256
    target_modules: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    block_size_pattern: dict[str, Any] | None = field(default_factory=dict)
    init_weights: bool | str = "xavier_uniform"
    exclude_modules: list[str] | str | None = None

    _forms = (Form("C3A", {"block_size": 4}),)
    _meaning = ("block_size", "block_size_pattern", "bias", "modules_to_save")
    _pattern = r".*\.{}$"
    _default_targets: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",))

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_int("block_size", self.block_size, 1, MAX_BLOCK)
        check_choice("bias", self.bias, ("none", "all", "c3a_only"))
        check_choice("init_weights", self.init_weights, (True, False, "gaussian", "kaiming_uniform", "xavier_uniform"))
        patterns = {} if self.block_size_pattern is None else self.block_size_pattern
        self.block_size_pattern = patterns
        if not isinstance(patterns, dict):
            raise TypeError(f"block_size_pattern: expected a dict from name patterns to sizes, got {patterns!r}")
        self._check_keys("block_size_pattern")
        for key, value in patterns.items():
            check_int(f"block_size_pattern[{key!r}]", value, 1, MAX_BLOCK)
        self._check_targets()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, without `exclude_modules` where it is not set."""
        values = super().to_dict()
        if values["exclude_modules"] is None:
            del values["exclude_modules"]
        return values

    def file_values(self, adapted: Callable[[], Iterable[str]]) -> dict[str, Any]:
        """See `PeftConfig.file_values`; PEFT's C3A excludes nothing, so the modules that are left are named."""
        values = self.to_dict()
        if values.pop("exclude_modules", None):
            targets = "|".join(re.escape(name) for name in adapted())
            values.update(target_modules=targets, layers_to_transform=None, layers_pattern=None)
        return values


class C3ALinear(AdapterLayer):
    """An nn.Linear, or GPT-2's Conv1D, with C3A adapters: ``y = x W^T + bias + sum of circular convolutions of x``.

    Parameters per adapter: `c3a_kernel.<name>` (out / b, in / b, b), the first rows of the circulant blocks; their
    matrix is divided by `in_features`. Several active adapters are summed, each over the layer's own input, where PEFT
    feeds the second one with the first one's output.

    Args:
        base_layer: The layer to adapt; it is frozen.
        config: A C3AConfig; `block_size_pattern` is matched against `module_name`.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is neither, or holds integers that its call cannot multiply by.
        ValueError: The block size does not divide both of its sizes.

    Source: Chen et al., arXiv 2407.19342.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.C3ALinear(torch.nn.Linear(8, 12), peftk.C3AConfig(block_size=4))
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 12])
    """

    peft_class_prefix = "C3A"
    base_kinds: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    adapter_layer_names = ("c3a_kernel",)
    parameter_names = frozenset(("c3a_kernel",))
    other_param_names = ("block_size",)
    config_class = C3AConfig
    update_fields = {"block_size": "block_size"}  # noqa: RUF012 - a ClassVar of the base

    @classmethod
    def _create(cls, base_layer: Any, config: C3AConfig, module_name: str, initialise: bool) -> Adapter:
        inputs, outputs = features_of(base_layer)
        key = config.pattern_key(config.block_size_pattern or {}, module_name)
        size = config._of_module(config.block_size_pattern, module_name, config.block_size)
        if inputs % size or outputs % size:
            common = math.gcd(inputs, outputs)
            fitting = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
            name = "block_size" if key is None else f"block_size_pattern[{key!r}]"
            raise ValueError(
                f"{name}: {size} does not divide both sizes of module {module_name!r}, {inputs} inputs and {outputs} "
                f"outputs; expected one of {fitting}"
            )
        kernel = torch.zeros(outputs // size, inputs // size, size)
        if initialise and config.init_weights is not True:
            _initialise(kernel, config.init_weights, inputs, outputs)
        return Adapter({"c3a_kernel": nn.Parameter(kernel)}, {"block_size": size})

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return c3a.linear(self.base_layer, x, [self.c3a_kernel[name] for name in names], args, kwargs)

    def _few(self, name: str, weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        return c3a.few(weight, bias, self.c3a_kernel[name])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, (out, in), in the adapter's dtype."""
        return c3a.update(self.c3a_kernel[adapter])

    def _merge_into(self, tensors: Merged, name: str) -> None:
        tensors["weight"] = c3a.merged(tensors["weight"], self.c3a_kernel[name])


class C3AConv2d(C3ALinear):
    """A 1 x 1 nn.Conv2d with C3A adapters, which are those of `C3ALinear` at every place of the image.

    PEFT has none. Parameters per adapter: `c3a_kernel.<name>` (out / b, in / b, b). Stride, padding, padding mode and
    dilation are those of the layer.

    Args:
        base_layer: The nn.Conv2d to adapt, with a kernel of 1 x 1 and without groups; it is frozen.
        config: A C3AConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense nn.Conv2d.
        ValueError: Its kernel is larger, it has groups, or the block size does not divide both numbers of channels.

    Source: Chen et al., arXiv 2407.19342.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.C3AConv2d(torch.nn.Conv2d(4, 8, 1), peftk.C3AConfig(block_size=2))
        >>> layer(torch.randn(1, 4, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    base_kinds = ("Conv2d",)

    @classmethod
    def _create(cls, base_layer: nn.Conv2d, config: C3AConfig, module_name: str, initialise: bool) -> Adapter:
        if base_layer.kernel_size != (1, 1) or base_layer.groups != 1:
            raise ValueError(
                f"target_modules: module {module_name!r} is a convolution with kernel_size={base_layer.kernel_size} "
                f"and groups={base_layer.groups}; C3A adapts those with kernel_size=(1, 1) and groups=1"
            )
        return super()._create(base_layer, config, module_name, initialise)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return c3a.conv2d(self.base_layer, x, [self.c3a_kernel[name] for name in names], args, kwargs)


@torch.no_grad()
def _initialise(kernel: Tensor, how: bool | str, inputs: int, outputs: int) -> None:
    if how == "gaussian":
        nn.init.normal_(kernel)
        return
    # Glorot's bound, sqrt(6 / (inputs + outputs)), by the steps of PEFT: the last bit of a bound is in every value.
    bound = math.sqrt(3.0) * math.sqrt(2.0 / float(inputs + outputs))
    if how == "kaiming_uniform":
        bound = math.sqrt(1.0 / float(inputs))
    nn.init.uniform_(kernel, -bound, bound)


__all__ = ["C3AConfig", "C3AConv2d", "C3ALinear"]
