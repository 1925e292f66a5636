"""OFT and BOFT on the output side, as LyCORIS and kohya's scripts have them: outputs of a frozen layer are mixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..methods import output_rotation
from ..methods._base_layer import features_of
from ..methods.output_rotation import Turn
from ..ops.kept import Kept
from .base.adapter_layer import Adapter, AdapterLayer
from .base.config import Form, PeftConfig, PeftType, check_bool, check_choice, check_int, check_number
from .base.kinds import settle_fan_in_fan_out
from .base.merging import Merged

MAX_BLOCK = 65_536
MAX_FACTORS = 16
SIZES_SHOWN = 8


@dataclass
class OutputOFTConfig(PeftConfig, method=PeftType.OUTPUT_OFT):
    """Configuration of OFT and BOFT on the output side. Hugging Face PEFT has neither, and refuses their files.

    ``W' = diag(s) R^T W`` with R block diagonal and orthogonal, ``blocks * block_size == out_features``, or a butterfly
    of such matrices. `OFTConfig` and `BOFTConfig` rotate the input instead. The bias stays as it is.

    Args:
        block_size: Size b of a block. It divides the outputs of every layer; with m factors it is even, and
            ``b * 2^(m - 1)`` divides them. Blocks of 1 turn nothing.
        butterfly_factors: Number m of factors of BOFT, 1 to 16; 0 is OFT, one block-diagonal rotation (diag-OFT).
        target_modules: As in `LoraConfig`.
        constraint: The largest Frobenius norm of all skew-symmetric matrices of a layer together, over its number of
            outputs; 0 for none. Where it is reached the matrices are scaled, and gradients pass through that.
        use_rescale: A trained factor s for every output.
        fan_in_fan_out: As in `LoraConfig`.
        bias: Which biases of the model are trained: "none", "all" or "oft_only".
        init_weights: True (the identity) or False (normal with deviation 0.1).
        exclude_modules: As in `LoraConfig`.
        layers_to_transform: As in `LoraConfig`.
        layers_pattern: As in `LoraConfig`.
        modules_to_save: As in `LoraConfig`.
        block_size_pattern: Other block sizes, by expressions for the names of modules, as `rank_pattern`.
        factors_pattern: Other numbers of factors, likewise.

    Source: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280; Liu et al.,
    Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243.

    Example:
        >>> from peftk import OutputOFTConfig
        >>> OutputOFTConfig(block_size=16, target_modules=["query", "value"]).butterfly_factors
        0
    """

    block_size: int = 32
    butterfly_factors: int = 0
    target_modules: list[str] | str | None = None
    constraint: float = 0.0
    use_rescale: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    factors_pattern: dict[str, int] = field(default_factory=dict)

    _forms = (
        Form("OFT and BOFT on the output", {"block_size": 4}),
        Form("OFT and BOFT on the output, butterfly", {"block_size": 2, "butterfly_factors": 2}),
    )
    _meaning = (
        "block_size",
        "butterfly_factors",
        "block_size_pattern",
        "factors_pattern",
        "constraint",
        "use_rescale",
        "bias",
        "modules_to_save",
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_int("block_size", self.block_size, 1, MAX_BLOCK)
        check_int("butterfly_factors", self.butterfly_factors, 0, MAX_FACTORS)
        check_number("constraint", self.constraint, 0, 1e6)
        check_choice("bias", self.bias, ("none", "all", "oft_only"))
        for name in ("use_rescale", "fan_in_fan_out", "init_weights"):
            check_bool(name, getattr(self, name))
        for name, low, high in (("block_size_pattern", 1, MAX_BLOCK), ("factors_pattern", 0, MAX_FACTORS)):
            patterns = getattr(self, name)
            patterns = {} if patterns is None else patterns
            setattr(self, name, patterns)
            if not isinstance(patterns, dict):
                raise TypeError(f"{name}: expected a dict from name patterns to numbers, got {patterns!r}")
            self._check_keys(name)
            for key, value in patterns.items():
                check_int(f"{name}[{key!r}]", value, low, high)
        self._check_targets()

    def sizes(self, out: int, module_name: str) -> tuple[int, int]:
        """Return the block size and the number of factors on a layer with `out` outputs.

        Raises:
            ValueError: They do not fit; the message names sizes that would.
        """
        size = self._of_module(self.block_size_pattern, module_name, self.block_size)
        factors = self._of_module(self.factors_pattern, module_name, self.butterfly_factors)
        joined = 1 << max(factors - 1, 0)

        def fits(size: int) -> bool:
            return out % (size * joined) == 0 and (factors == 0 or size % 2 == 0)

        if fits(size):
            return size, factors
        sizes = sorted((s for s in range(2, out // joined + 1) if fits(s)), key=lambda s: (abs(s - size), s))
        near = f"sizes that do: {sorted(sizes[:SIZES_SHOWN])}" if sizes else "no size does; take fewer factors"
        raise ValueError(
            f"block_size: {size} does not fit the {out} outputs of module {module_name!r} with {factors} factors, "
            f"which need {'an even' if factors else 'a'} block size that, times {joined}, divides them; {near}"
        )


class OutputOFTLinear(AdapterLayer):
    """An nn.Linear, or GPT-2's Conv1D, whose output is rotated by adapters: ``y = s * (x W^T) R + bias``.

    Parameters per adapter: `output_oft_blocks.<name>` (blocks, b, b), or (m, blocks, b, b) with factors, of
    which the skew-symmetric part counts; and with `use_rescale` `output_oft_scale.<name>` (out, 1, ...), with as many
    dimensions as the weight. Their meaning is that of LyCORIS's `oft_blocks` and `rescale`: ``Q = B - B^T``,
    ``R = (I + Q)(I - Q)^-1``. Of several active adapters the first one rotates first.

    Saved for backward: the unrotated output and parameters.

    Args:
        base_layer: The layer to adapt; it is frozen.
        config: An OutputOFTConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is neither, or holds integers that its call cannot multiply by.
        ValueError: The blocks do not fit the layer.

    Source: Qiu et al., arXiv 2306.07280; Liu et al., arXiv 2311.06243.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.OutputOFTLinear(torch.nn.Linear(8, 8), peftk.OutputOFTConfig(block_size=4))
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    base_kinds: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    adapter_layer_names = ("output_oft_blocks", "output_oft_scale")
    parameter_names = frozenset(adapter_layer_names)
    other_param_names = ("output_oft_bound",)
    config_class = OutputOFTConfig

    @classmethod
    def _create(cls, base_layer: nn.Module, config: OutputOFTConfig, module_name: str, initialise: bool) -> Adapter:
        settle_fan_in_fan_out(config, base_layer)
        out = features_of(base_layer)[1]
        size, factors = config.sizes(out, module_name)
        stages = (factors,) if factors else ()
        blocks = torch.zeros(*stages, out // size, size, size)
        scale = torch.ones(out, *[1] * (1 + len(getattr(base_layer, "kernel_size", ()))))
        if initialise and not config.init_weights:
            nn.init.normal_(blocks, std=0.1)
            nn.init.normal_(scale, mean=1.0, std=0.1)
        parts: dict[str, nn.Module | nn.Parameter] = {"output_oft_blocks": nn.Parameter(blocks)}
        if config.use_rescale:
            parts["output_oft_scale"] = nn.Parameter(scale)
        return Adapter(parts, {"output_oft_bound": float(config.constraint) * out})

    def turn(self, name: str, dtype: torch.dtype | None = None) -> Turn:
        """Return the tensors of one adapter, as its arithmetic takes them; computed in a dtype if one is given."""
        square = self.output_oft_blocks[name]
        scale = self.output_oft_scale.get(name)
        bound = self.output_oft_bound[name]
        if dtype is not None:
            return Turn(_blocks(square.to(dtype), bound), scale)
        kept = self._kept.setdefault(name, Kept())
        return Turn(kept.get((square,), lambda: _blocks(square, bound)), scale)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return output_rotation.linear(self.base_layer, x, [self.turn(name) for name in names], args, kwargs)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense matrix, (out, out), by which one adapter multiplies outputs as rows."""
        square = self.output_oft_blocks[adapter]
        return output_rotation.rotation(self.turn(adapter), self.out_features).to(square.dtype)

    def _merge_order(self, names: list[str]) -> list[str]:
        return names

    def _merge_into(self, tensors: Merged, name: str) -> None:
        weight = tensors["weight"]
        tensors["weight"] = output_rotation.merged(weight, self.turn(name, weight.dtype))


def _blocks(square: Tensor, bound: float) -> Tensor:
    blocks = output_rotation.rotations(square, bound)
    return output_rotation.interleaved(blocks) if blocks.dim() == 4 else blocks


class OutputOFTConv(OutputOFTLinear):
    """An nn.Conv1d, nn.Conv2d or nn.Conv3d whose output channels are rotated by adapters.

    It is the convolution that merging gives, with the geometry and groups of the layer: the rows of the flattened
    filters are mixed. Parameters per adapter: those of `OutputOFTLinear`.

    Args:
        base_layer: The convolution to adapt; it is frozen.
        config: An OutputOFTConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is no convolution.
        ValueError: The blocks do not fit the layer.

    Source: Qiu et al., arXiv 2306.07280; Liu et al., arXiv 2311.06243.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.OutputOFTConv(torch.nn.Conv2d(4, 8, 3), peftk.OutputOFTConfig(block_size=4))
        >>> layer(torch.randn(1, 4, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """

    base_kinds = ("Conv1d", "Conv2d", "Conv3d")

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        return output_rotation.conv(self.base_layer, x, [self.turn(name) for name in names], args, kwargs)


__all__ = ["OutputOFTConfig", "OutputOFTConv", "OutputOFTLinear"]
