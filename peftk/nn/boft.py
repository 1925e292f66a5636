"""BOFT: an orthogonal butterfly of the input of a frozen layer, and a scale of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..methods import boft
from ..methods._base_layer import Few, features_of
from ..methods.boft import Butterfly
from ..ops import _seed
from ..ops.kept import Kept
from ..ops.shortcut import Shortcut
from .base.adapter_layer import Adapter, AdapterLayer
from .base.config import Form, PeftConfig, PeftType, check_bool, check_choice, check_int, check_number, warn_of_field
from .base.kinds import settle_fan_in_fan_out
from .base.merging import Merged

MAX_BLOCK = 65_536
MAX_FACTORS = 16
SIZES_SHOWN = 8


@dataclass
class BOFTConfig(PeftConfig, method=PeftType.BOFT):
    """Configuration of BOFT, with the fields and defaults of PEFT 0.21.

    ``y = s * (x R W^T) + bias`` with R a product of m permuted block-diagonal orthogonal matrices.

    Args:
        boft_block_size: Size b of a block; 0 if `boft_block_num` is given. Exactly one of the two is non-zero.
        boft_block_num: Number of blocks of a factor; 0 if `boft_block_size` is given.
        boft_n_butterfly_factor: Number m of factors, 1 to 16. For m > 1 the block size is even, and b * 2^(m - 1)
            divides the layer's input. PEFT computes more than one factor only with its CUDA extension, and silently
            trains one without it.
        target_modules: As in `LoraConfig`.
        exclude_modules: As in `LoraConfig`.
        boft_dropout: Share, in training, of the blocks of one random factor that are replaced by the identity, in
            [0, 1).
        fan_in_fan_out: As in `LoraConfig`.
        bias: Which biases of the model are trained: "none", "all" or "boft_only".
        modules_to_save: As in `LoraConfig`.
        init_weights: True (the identity) or False (normal with deviation 0.1).
        layers_to_transform: As in `LoraConfig`.
        layers_pattern: As in `LoraConfig`.

    Source: Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243.

    Example:
        >>> from peftk import BOFTConfig
        >>> BOFTConfig(boft_n_butterfly_factor=2, target_modules=["query", "value"]).boft_block_size
        4
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    _forms = (Form("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),)
    _meaning = ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "bias", "modules_to_save")

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_int("boft_block_size", self.boft_block_size, 0, MAX_BLOCK)
        check_int("boft_block_num", self.boft_block_num, 0, MAX_BLOCK)
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            raise ValueError(
                f"boft_block_size, boft_block_num: expected exactly one of them to be non-zero (their product is the "
                f"input size), got boft_block_size={self.boft_block_size} and boft_block_num={self.boft_block_num}"
            )
        check_int("boft_n_butterfly_factor", self.boft_n_butterfly_factor, 1, MAX_FACTORS)
        check_number("boft_dropout", self.boft_dropout, 0, 1)
        check_choice("bias", self.bias, ("none", "all", "boft_only"))
        check_bool("fan_in_fan_out", self.fan_in_fan_out)
        check_bool("init_weights", self.init_weights)
        self._check_targets()

    def settle_with_file(self, shapes: Callable[[], Mapping[str, torch.Size]]) -> None:
        """Take the number of factors from the tensors of a file, if all of them hold fewer than it says.

        PEFT without its CUDA extension trains and saves one factor, whatever the configuration asks for.
        """
        if self.boft_n_butterfly_factor == 1:
            return
        found = {shape[0] for key, shape in shapes().items() if key.endswith(".boft_R") and len(shape) == 4}
        if len(found) == 1 and 1 <= min(found) < self.boft_n_butterfly_factor:
            (count,) = found
            warn_of_field(
                f"boft_n_butterfly_factor: the file's configuration says {self.boft_n_butterfly_factor}, but its "
                f"tensors hold {count}, as PEFT writes without its CUDA extension; {count} is what was trained, and "
                "is used",
                stacklevel=4,
            )
            self.boft_n_butterfly_factor = count


def block_size_for(config: BOFTConfig, features: int, module_name: str) -> int:
    """Return the block size that a configuration means on a layer.

    Raises:
        ValueError: It does not fit; the message names values that would.
    """
    factors = config.boft_n_butterfly_factor
    joined = 1 << (factors - 1)

    def fits(size: int) -> bool:
        return features % (size * joined) == 0 and (factors == 1 or size % 2 == 0)

    by_size = bool(config.boft_block_size)
    name, wanted = ("boft_block_size", config.boft_block_size) if by_size else ("boft_block_num", config.boft_block_num)
    if features % wanted == 0 and fits(wanted if by_size else features // wanted):
        return wanted if by_size else features // wanted
    sizes = [size for size in range(1, features // joined + 1) if fits(size)]
    values = sorted(sizes if by_size else [features // size for size in sizes], key=lambda v: (abs(v - wanted), v))
    if values:
        nearest = f"values that do: {sorted(values[:SIZES_SHOWN])}"
    else:
        most = next(m for m in range(factors, 0, -1) if m == 1 or features % (2 << (m - 1)) == 0)
        nearest = f"no value does; the largest boft_n_butterfly_factor for this input is {most}"
    demand = "divides it" if factors == 1 else f"is even (the block size) and, times 2^{factors - 1}, divides it"
    raise ValueError(
        f"{name}: {wanted} does not fit the input size {features} of module {module_name!r} with "
        f"boft_n_butterfly_factor={factors}, which needs a block size that {demand}; {nearest}"
    )


class BOFTLinear(AdapterLayer):
    """An nn.Linear, or GPT-2's Conv1D, with BOFT adapters: ``y = s * (x R W^T) + bias``.

    Parameters per adapter: `boft_R.<name>` (m, blocks, b, b), of which the skew-symmetric part counts, and
    `boft_s.<name>` (out, 1). ``R = R_(m-1) ... R_0`` has blocks of b * 2^(m - 1) features. The bias is neither scaled
    nor rotated. Of several active adapters, the last one rotates x first, as in PEFT; their scales multiply.

    Saved for backward: x, the unscaled output (for the gradient of the scale) and parameters.

    Args:
        base_layer: The layer to adapt; it is frozen.
        config: A BOFTConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is neither, or holds integers that its call cannot multiply by.
        ValueError: The blocks do not fit the layer.

    Source: Liu et al., arXiv 2311.06243.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.BOFTLinear(torch.nn.Linear(8, 8), peftk.BOFTConfig(boft_n_butterfly_factor=2))
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    base_kinds: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    adapter_layer_names = ("boft_R", "boft_s")
    parameter_names = frozenset(adapter_layer_names)
    other_param_names = ("boft_block_size", "boft_block_num", "boft_dropout")
    config_class = BOFTConfig

    @classmethod
    def _create(cls, base_layer: nn.Module, config: BOFTConfig, module_name: str, initialise: bool) -> Adapter:
        settle_fan_in_fan_out(config, base_layer)
        features = cls._rotated_features(base_layer, module_name)
        size = block_size_for(config, features, module_name)
        count = features // size
        rotation = torch.zeros(config.boft_n_butterfly_factor, count, size, size)
        scale = torch.ones(cls._scale_shape(features_of(base_layer)[1]))
        if initialise and not config.init_weights:
            nn.init.normal_(rotation, std=0.1)
            nn.init.normal_(scale, mean=1.0, std=0.1)
        return Adapter(
            {"boft_R": nn.Parameter(rotation), "boft_s": nn.Parameter(scale)},
            {"boft_block_size": size, "boft_block_num": count, "boft_dropout": float(config.boft_dropout)},
        )

    @staticmethod
    def _rotated_features(base_layer: Any, module_name: str) -> int:
        return features_of(base_layer)[0]

    @staticmethod
    def _scale_shape(out: int) -> tuple[int, int]:
        return out, 1

    def butterfly(self, name: str) -> Butterfly:
        """Return the tensors of one adapter, as its arithmetic takes them, with dropout in training."""
        square = self.boft_R[name]
        drawn = self._draw(name, square)
        if drawn is not None:
            return Butterfly(boft.rotations(square, drawn), self.boft_s[name])
        return boft.resting(square, self.boft_s[name], self._kept.setdefault(name, Kept()))

    def _draw(self, name: str, square: Tensor) -> Tensor | None:
        """Draw which blocks rotate in this pass: None for all of them."""
        count, blocks = square.shape[:2]
        dropped = int(self.boft_dropout[name] * blocks) if self.training else 0
        if not dropped:
            return None
        _seed.refuse_capture(square.device)
        # Drawn on the CPU's default generator, so that activation checkpointing replays it.
        chosen = torch.randperm(blocks, device="cpu")[:dropped] + torch.randint(count, (1,), device="cpu") * blocks
        return torch.ones(count * blocks, dtype=torch.bool, device="cpu").index_fill(0, chosen, False)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return boft.linear(self.base_layer, x, [self.butterfly(name) for name in names], args, kwargs)

    def _few(self, name: str, weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        return boft.few(weight, bias, self.boft_R[name], self.boft_s[name], self._kept.setdefault(name, Kept()))

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return the dense rotation R (in, in) and the scale s (out, 1) of one adapter, without dropout."""
        square, scale = self.boft_R[adapter], self.boft_s[adapter].detach()
        return boft.rotation(Butterfly(boft.rotations(square), scale)).to(square.dtype), scale

    def _merge_order(self, names: list[str]) -> list[str]:
        return names

    def _merge_into(self, tensors: Merged, name: str) -> None:
        weight = tensors["weight"]
        factors = boft.rotations(self.boft_R[name].to(weight.dtype))
        tensors["weight"] = boft.merged(weight, Butterfly(factors, self.boft_s[name]))


class BOFTConv2d(BOFTLinear):
    """An nn.Conv2d with BOFT adapters on its flattened filters: ``W'[o] = s[o] * R W[o]``.

    It is the convolution that merging gives, computed from rotated filters, with the stride, padding, padding mode and
    dilation of the layer, for kernels of any shape.

    Parameters per adapter: `boft_R.<name>` (m, blocks, b, b) over in_channels * height * width of the kernel, and
    `boft_s.<name>` (1, out).

    Args:
        base_layer: The nn.Conv2d to adapt, without groups; it is frozen.
        config: A BOFTConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense nn.Conv2d.
        ValueError: It has groups, or the blocks do not fit.

    Source: Liu et al., arXiv 2311.06243.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.BOFTConv2d(torch.nn.Conv2d(4, 8, 3), peftk.BOFTConfig(boft_block_size=4))
        >>> layer(torch.randn(1, 4, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """

    base_kinds = ("Conv2d",)

    @staticmethod
    def _rotated_features(base_layer: nn.Conv2d, module_name: str) -> int:
        if base_layer.groups != 1:
            raise ValueError(
                f"target_modules: module {module_name!r} is a convolution with groups={base_layer.groups}; BOFT "
                "rotates all input channels together, so expected groups=1"
            )
        return base_layer.weight[0].numel()

    @staticmethod
    def _scale_shape(out: int) -> tuple[int, int]:
        return 1, out

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return boft.conv2d(self.base_layer, x, [self.butterfly(name) for name in names], args, kwargs)


__all__ = ["BOFTConfig", "BOFTConv2d", "BOFTLinear"]
