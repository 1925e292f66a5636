"""OFT: a block-diagonal rotation of the input of a frozen layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..methods import oft
from ..methods._base_layer import Few, features_of, listened_to, observed
from ..methods.oft import orthogonality_error
from ..ops.shortcut import Shortcut
from .base.adapter_layer import Adapter, AdapterLayer
from .base.config import Form, PeftConfig, PeftType, check_bool, check_choice, check_int, check_number, warn_of_field
from .base.kinds import settle_fan_in_fan_out
from .base.merging import Merged
from .oft_rotation import SERIES_REFUSED, SERIES_WARNS, Rotation

MAX_NEUMANN_TERMS = 64
MAX_BLOCK = 65_536


@dataclass
class OFTConfig(PeftConfig, method=PeftType.OFT):
    """Configuration of OFT, with the fields and defaults of PEFT 0.21.

    ``y = base(x R)`` with R block diagonal and orthogonal, ``r * oft_block_size == in_features``. A convolution's
    filters are rotated instead, flattened: ``r * oft_block_size == in_channels * kernel height * kernel width``.

    Args:
        r: Number of blocks; 0 if `oft_block_size` is given. Exactly one of the two is non-zero.
        oft_block_size: Size of a block; 0 if `r` is given. A size that does not divide the layer's input is replaced
            by the nearest one that does, with a warning.
        module_dropout: Probability, in training, that a block is replaced by the identity, in [0, 1).
        target_modules: As in `LoraConfig`.
        fan_in_fan_out: As in `LoraConfig`; GPT-2's Conv1D, which PEFT refuses for OFT, is supported.
        bias: Which biases of the model are trained: "none", "all" or "oft_only".
        exclude_modules: As in `LoraConfig`.
        init_weights: True (the identity) or False (normal with deviation 0.1).
        layers_to_transform: As in `LoraConfig`.
        layers_pattern: As in `LoraConfig`.
        modules_to_save: As in `LoraConfig`.
        coft: Constrain the rotation: each block's skew matrix is kept in a ball of radius ``eps / sqrt(blocks)``.
        eps: Size of that ball.
        block_share: One block for the whole layer.
        use_cayley_neumann: Approximate ``(I + S)(I - S)^-1`` by a series, instead of computing
            ``(I - S)(I + S)^-1`` exactly. The two are each other's transpose: a trained file needs its own setting.
        num_cayley_neumann_terms: Number of terms of the series, 1 to 64. Far outside its radius (a skew matrix of
            spectral norm 1) the series is no rotation and the layer warns.

    Source: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280; the series and
    the input-side form: Qiu et al., Orthogonal Finetuning Made Scalable, arXiv 2506.19847.

    Example:
        >>> from peftk import OFTConfig
        >>> OFTConfig(oft_block_size=16, target_modules=["query", "value"]).oft_block_size
        16
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    _forms = (
        Form("OFT, exact", {"oft_block_size": 4, "use_cayley_neumann": False}),
        Form("OFT, series", {"oft_block_size": 4}),
    )
    _meaning = (
        "r",
        "oft_block_size",
        "coft",
        "eps",
        "block_share",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "bias",
        "modules_to_save",
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_int("r", self.r, 0, MAX_BLOCK)
        check_int("oft_block_size", self.oft_block_size, 0, MAX_BLOCK)
        if bool(self.r) == bool(self.oft_block_size):
            raise ValueError(
                f"r, oft_block_size: expected exactly one of them to be non-zero (r * oft_block_size is the input "
                f"size), got r={self.r} and oft_block_size={self.oft_block_size}"
            )
        check_number("module_dropout", self.module_dropout, 0, 1)
        check_number("eps", self.eps, 0, 1e6, above=True)
        check_choice("bias", self.bias, ("none", "all", "oft_only"))
        for name in ("fan_in_fan_out", "init_weights", "coft", "block_share", "use_cayley_neumann"):
            check_bool(name, getattr(self, name))
        check_int("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 1, MAX_NEUMANN_TERMS)
        self._check_targets()

    @classmethod
    def _check_file(cls, values: Mapping[str, Any]) -> None:
        if "oft_block_size" not in values:
            raise ValueError(
                "oft_block_size: missing from the file, which was written by PEFT before 0.14; such weights mean "
                "another rotation and cannot be read"
            )
        if values.get("use_cayley_neumann"):
            from packaging.version import InvalidVersion, Version

            written_by = str(values.get("peft_version") or "0").partition("@")[0]
            try:
                old = Version(written_by) < Version("0.18")
            except InvalidVersion:
                raise ValueError(f"peft_version: expected a version number, got {written_by!r}") from None
            if old:
                warn_of_field(
                    f"peft_version: the file was written by PEFT {written_by}; the last term of the Cayley-Neumann "
                    "series changed in 0.18, so the rotation differs slightly from the one that was trained",
                    stacklevel=3,
                )


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of `number` nearest to `wanted`, the smaller of two equally near ones."""
    if wanted >= number:
        return number
    step = next(step for step in range(number) if number % max(wanted - step, 1) == 0 or number % (wanted + step) == 0)
    lower = max(wanted - step, 1)
    return lower if number % lower == 0 else wanted + step


class OFTLinear(AdapterLayer):
    """An nn.Linear, or GPT-2's Conv1D, whose input is rotated by OFT adapters: ``y = (x R) W^T + bias``.

    Parameters per adapter: `oft_R.<name>.weight` (blocks, b (b - 1) / 2), or one row with `block_share`. Several
    active adapters rotate one after another, in the order in which they are active; merging keeps that order.

    Args:
        base_layer: The layer to adapt; it is frozen.
        config: An OFTConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is neither, or holds integers that its call cannot multiply by.

    Source: Qiu et al., arXiv 2506.19847.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.OFTLinear(torch.nn.Linear(8, 8), peftk.OFTConfig(oft_block_size=4))
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    base_kinds: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("oft_R",)
    other_param_names = ("r", "oft_block_size")
    config_class = OFTConfig
    update_fields = {"r": "r"}  # noqa: RUF012 - a ClassVar of the base

    @classmethod
    def _create(cls, base_layer: nn.Module, config: OFTConfig, module_name: str, initialise: bool) -> Adapter:
        settle_fan_in_fan_out(config, base_layer)
        features = cls._rotated_features(base_layer, module_name)
        name = "oft_block_size" if config.oft_block_size else "r"
        wanted = getattr(config, name)
        size = nearest_divisor(features, wanted)
        if size != wanted:
            warn_of_field(
                f"{name}: {wanted} does not divide the input size {features} of module {module_name!r}; "
                f"{size} is used instead",
                stacklevel=2,
            )
        block_size = size if name == "oft_block_size" else features // size
        if block_size == 1:
            raise ValueError(
                f"{name}: {wanted} gives blocks of size 1 on module {module_name!r} (input size {features}), which "
                "have nothing to train; choose another value or exclude the module"
            )
        rotation = Rotation(features, block_size, config, module_name)
        if initialise and not config.init_weights:
            nn.init.normal_(rotation.weight, std=0.1)
        return Adapter(
            {cls.adapter_layer_names[0]: rotation}, {"r": features // block_size, "oft_block_size": block_size}
        )

    @staticmethod
    def _rotated_features(base_layer: Any, module_name: str) -> int:
        return features_of(base_layer)[0]

    def _rotations(self, names: Iterable[str]) -> list[Any]:
        container = self.__dict__["_modules"][self.adapter_layer_names[0]]._modules
        return [container[name] for name in names]

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        rotations = self._rotations(names)
        if listened_to(Rotation, *rotations):
            for rotation in rotations:
                x = rotation(x)
            return self.base_layer(x, *args, **kwargs)
        base = self._modules["base_layer"]
        assert base is not None
        return oft.linear(base, x, [rotation.blocks() for rotation in rotations], args, kwargs)

    def _few(self, name: str, weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        (rotation,) = self._rotations([name])
        if rotation.coft or listened_to(Rotation, rotation):
            return None
        rests.rest_on(rotation.__dict__, "coft", "block_size", "neumann_terms")
        rotation.look()
        arguments = rotation.weight, rotation.block_size, rotation.neumann_terms
        return oft.few(weight, bias, *arguments, rotation.kept)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense rotation R of one adapter, (in, in), without dropout."""
        (rotation,) = self._rotations([adapter])
        blocks = _resting(rotation, rotation.weight.dtype)
        return oft.rotation(blocks, rotation.block_count).to(rotation.weight.dtype)

    def _merge_into(self, tensors: Merged, name: str) -> None:
        tensors["weight"] = oft.merged(tensors["weight"], self._blocks_to_merge(tensors, name))

    def _blocks_to_merge(self, tensors: Merged, name: str) -> Tensor:
        """Return the blocks in the dtype of the merge, and note in `tensors` if they are no rotations."""
        (rotation,) = self._rotations([name])
        blocks = _resting(rotation, tensors["weight"].dtype)
        if rotation.neumann_terms is not None:
            error = orthogonality_error(blocks)
            if error > SERIES_WARNS:
                tensors.warnings.append(functools.partial(rotation.tell, "merging", error))
            if error > SERIES_REFUSED:
                tensors.faults.append(
                    f"would write a rotation that is none: {rotation.describe(error)}; at most {SERIES_REFUSED:g} is "
                    "merged. Train again with use_cayley_neumann=False, the exact transform, or a smaller learning rate"
                )
        return blocks


class OFTConv2d(OFTLinear):
    """An nn.Conv2d whose flattened filters are rotated by OFT adapters: ``W'[o] = R W[o]``.

    It is the convolution that merging gives, computed from rotated filters. PEFT rotates and folds the image instead,
    which sums overlapping patches: there, for kernels larger than 1, even an untrained adapter changes the output, and
    merging changes it again. A file trained by PEFT on such a layer therefore gives here what it gives there merged.

    Parameters per adapter: `oft_R.<name>.weight` (blocks, b (b - 1) / 2), over in_channels * height * width of the
    kernel. Stride, padding, padding mode and dilation are those of the layer.

    Args:
        base_layer: The nn.Conv2d to adapt, without groups; it is frozen.
        config: An OFTConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense nn.Conv2d.
        ValueError: It has groups.

    Source: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.OFTConv2d(torch.nn.Conv2d(4, 8, 3), peftk.OFTConfig(oft_block_size=4))
        >>> layer(torch.randn(1, 4, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """

    base_kinds = ("Conv2d",)

    @staticmethod
    def _rotated_features(base_layer: nn.Conv2d, module_name: str) -> int:
        if base_layer.groups != 1:
            raise ValueError(
                f"target_modules: module {module_name!r} is a convolution with groups={base_layer.groups}; OFT rotates "
                "all input channels together, so expected groups=1"
            )
        return base_layer.weight[0].numel()

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        blocks = []
        for name in names:
            rotation = self.oft_R._modules[name]
            if observed(Rotation, rotation):
                raise NotImplementedError(
                    f"oft_R.{name}: a hook, a wrapper or another forward is on the rotation of a convolution, which is "
                    "computed with its filters and never called; remove it"
                )
            blocks.append(rotation.blocks())
        base = self._modules["base_layer"]
        assert isinstance(base, nn.Conv2d)
        return oft.conv2d(base, x, blocks, args, kwargs)


def _resting(rotation: Rotation, dtype: torch.dtype) -> Tensor:
    """The blocks without dropout, whatever mode the layer is in."""
    training = rotation.training
    rotation.training = False
    try:
        return rotation.blocks(dtype)
    finally:
        rotation.training = training


__all__ = ["OFTConfig", "OFTConv2d", "OFTLinear"]
