"""One adapted module in the form that programs share, what it is called in each of their dialects, and its update.

The form is that of LyCORIS: its names of tensors, and a scale of alpha / rank. An update is computed here in float64
by its formula alone, so that two files can be compared whatever wrote them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .recognise import Found

__all__ = [
    "COMPONENTS",
    "DOWN",
    "METHODS",
    "OTHER_MAGNITUDES",
    "OUTPUT",
    "TYPES",
    "UP",
    "WHOLE",
    "Adapted",
    "as_lycoris",
    "common_name",
    "component_of",
    "magnitudes_of_inputs",
    "outputs",
    "update",
    "weight_shape",
]

MAGNITUDES = "dora_scale"
OUTPUT = "OFT or BOFT on the output"

DOWN = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight")
"""What the first factor of LoRA is called."""

UP = ("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight")
"""What the second one is called."""

OTHER_MAGNITUDES = (
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "hada_magnitude_vector",
    "lokr_magnitude_vector",
)
"""What magnitudes are called in files of PEFT and diffusers, and in this package's."""

WHOLE = "whole weights"
"""LyCORIS' name of it is "full": the change of a weight, as large as that. Here it is LoKr with a first factor of 1."""

TYPES = {"LoRA": "LORA", "LoHa": "LOHA", "LoKr": "LOKR", OUTPUT: "OUTPUT_OFT", WHOLE: "LOKR"}
"""The methods that more than one program has, with one meaning, and their types in a configuration."""


class Component(NamedTuple):
    """A part of a pipeline, such as its text encoder, by what names of its modules begin with.

    Attributes:
        kohya: In files of kohya's scripts and LyCORIS.
        diffusers: In those of diffusers.
        comfyui: In those of ComfyUI, or None where it has kohya's names.
    """

    kohya: str
    diffusers: str
    comfyui: str | None = None


COMPONENTS = {
    "unet": Component("lora_unet_", "unet.", "diffusion_model."),
    "transformer": Component("lora_unet_", "transformer.", "diffusion_model."),
    "text_encoder": Component("lora_te1_", "text_encoder."),
    "text_encoder_2": Component("lora_te2_", "text_encoder_2."),
    "text_encoder_3": Component("lora_te3_", "text_encoder_3."),
    "prior": Component("lora_prior_", "prior."),
}

_OTHERS = {"lora_te_": "text_encoder", "lora_transformer_": "transformer"}


def component_of(prefix: str) -> str:
    """Return the component whose names begin so; an empty string for prefixes that name none."""
    if prefix in _OTHERS:
        return _OTHERS[prefix]
    return next((name for name, prefixes in COMPONENTS.items() if prefix and prefix in prefixes), "")


def common_name(part: str) -> str | None:
    """Return LyCORIS' name of a tensor, or None if it has none that others understand."""
    if part in DOWN:
        return "lora_down.weight"
    if part in UP:
        return "lora_up.weight"
    if part in ("alpha", "lora_alpha"):
        return "alpha"
    if part == MAGNITUDES or part in OTHER_MAGNITUDES:
        return MAGNITUDES
    if part in ("output_oft_blocks", "output_oft_scale"):
        return {"output_oft_blocks": "oft_blocks", "output_oft_scale": "rescale"}[part]
    known = ("lora_mid.weight", "oft_blocks", "rescale")
    return part if part in known or part.startswith(("hada_", "lokr_")) else None


@dataclass
class Adapted:
    """One module of an adapter.

    Attributes:
        source: Its name in the file it was read from.
        component: A key of `COMPONENTS`, or an empty string where the file does not say.
        path: Where it is in the model, with dots; or with underscores for them, where only that is known.
        method: One of `METHODS`.
        parts: The tensors, by LyCORIS' names, without alpha.
        alpha: The number that, over the rank, is the scale; None where the method has a scale of 1 whatever it is. That
            of a rotation is its constraint.
        keys: LyCORIS' name of a tensor, alpha included, to its key in the file.
        notes: What of it could not be taken over bit by bit.
        joined: The keys, as in `keys`, of further modules that are in this one.
        unused: Further keys in the file, and why nothing is lost without them.
    """

    source: str
    component: str
    path: str
    method: str
    parts: dict[str, Tensor]
    alpha: float | None
    keys: dict[str, str]
    notes: list[str] = field(default_factory=list)
    joined: list[dict[str, str]] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)

    @property
    def flat(self) -> str:
        """The path as kohya writes it."""
        return self.path.replace(".", "_")

    @property
    def rank(self) -> int | None:
        """The rank, or None where nothing is factorised."""
        return rank_of(self.method, self.parts)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        rank = self.rank
        return 1.0 if rank is None or self.alpha is None else self.alpha / rank


def rank_of(method: str, parts: Mapping[str, Tensor]) -> int | None:
    """Return the rank that the tensors of a module have, or None where nothing is factorised.

    Raises:
        ValueError: They have several.
    """
    if method == OUTPUT:
        return None
    ranks = {
        "LoRA": {"lora_down.weight": 0, "lora_up.weight": 1, "lora_mid.weight": 0},
        "LoHa": {"hada_w1_b": 0, "hada_w2_b": 0, "hada_t1": 0, "hada_t2": 0},
        "LoKr": {"lokr_w1_b": 0, "lokr_w2_b": 0, "lokr_t2": 0},
    }[method]
    if method != "LoRA":
        # Beside a core the first factors lie the other way round.
        for number in "12":
            name = f"{'hada' if method == 'LoHa' else 'lokr'}_{{}}{number}"
            ranks[f"{name.format('w')}_a"] = 0 if name.format("t") in parts else 1
    found = {
        name: parts[name].shape[axis] for name, axis in ranks.items() if name in parts and parts[name].dim() > axis
    }
    if len(set(found.values())) > 1 or 0 in found.values():
        ranks_found = ", ".join(f"{n} {r}" for n, r in found.items())
        raise ValueError(f"expected tensors of one rank above 0, got {ranks_found}")
    return next(iter(found.values()), None)


def update(module: Adapted) -> Tensor:
    """Return what the adapter adds to a weight, without magnitudes, in float64: (out, in times the kernel).

    A rotation adds nothing by itself: what it adds to the identity is returned, (out, out).

    Raises:
        ValueError: The tensors do not fit each other.
    """
    parts = {name: tensor.double() for name, tensor in module.parts.items()}
    if module.method == OUTPUT:
        parts["alpha"] = torch.tensor(module.alpha or 0.0, dtype=torch.float64)
    try:
        found = _FORMULAS[module.method](parts)
    except RuntimeError as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in module.parts.items()}
        raise ValueError(f"tensors that do not fit each other: {shapes} ({str(error).splitlines()[0]})") from None
    return found.flatten(1) * module.scale


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ij...,ip,jr->pr...", core, a, b).contiguous()


def _lora(parts: dict[str, Tensor]) -> Tensor:
    down, up = parts["lora_down.weight"], parts["lora_up.weight"].flatten(1)
    if "lora_mid.weight" in parts:
        return _tucker(parts["lora_mid.weight"], up.mT, down.flatten(1))
    return (up @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


def _loha(parts: dict[str, Tensor]) -> Tensor:
    halves = []
    for number in "12":
        a, b, core = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"], parts.get(f"hada_t{number}")
        halves.append(a @ b if core is None else _tucker(core, a, b))
    return halves[0] * halves[1]


def _lokr(parts: dict[str, Tensor]) -> Tensor:
    first, second = (_factor(parts, number) for number in "12")
    product = torch.einsum("lm,kn...->lkmn...", first, second)
    return product.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])


def _factor(parts: dict[str, Tensor], number: str) -> Tensor:
    if f"lokr_w{number}" in parts:
        return parts[f"lokr_w{number}"]
    a, b, core = parts[f"lokr_w{number}_a"], parts[f"lokr_w{number}_b"], parts.get(f"lokr_t{number}")
    return a @ b if core is None else _tucker(core, a, b)


def _rotation(parts: dict[str, Tensor]) -> Tensor:
    square = parts["oft_blocks"]
    size = square.shape[-1]
    if square.dim() not in (3, 4) or square.shape[-2] != size:
        raise ValueError(f"oft_blocks: expected square blocks, got shape {tuple(square.shape)}")
    stages = square if square.dim() == 4 else square[None]
    out = stages.shape[1] * size
    if square.dim() == 4 and (size % 2 or stages.shape[1] % (1 << min(len(stages) - 1, 62))):
        raise ValueError(f"oft_blocks: expected a butterfly (m, blocks, b, b), got shape {tuple(square.shape)}")
    skew = stages - stages.mT
    norm, bound = skew.norm() + 1e-8, parts["alpha"] * out
    skew = skew * torch.where((bound > 0) & (norm > bound), bound / norm, torch.ones_like(norm))
    eye = torch.eye(size, dtype=torch.float64, device=skew.device)
    turned = (eye + skew) @ torch.linalg.inv(eye - skew)
    rows = torch.eye(out, dtype=torch.float64, device=skew.device)
    if square.dim() == 3:
        rows = torch.block_diag(*turned[0]).mT
    else:
        for stage, blocks in enumerate(turned):
            # Numbers that lie half a block times 2^stage apart take turns.
            order = torch.arange(out).view(-1, 2, (size // 2) << stage).transpose(1, 2).flatten()
            rows = torch.empty_like(rows).index_copy(0, order, torch.block_diag(*blocks) @ rows[order])
    if "rescale" in parts:
        if parts["rescale"].numel() != out:
            raise ValueError(f"rescale: expected {out} numbers, got shape {tuple(parts['rescale'].shape)}")
        rows = parts["rescale"].reshape(-1, 1) * rows
    return rows - torch.eye(out, dtype=torch.float64, device=skew.device)


_FORMULAS = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr, OUTPUT: _rotation}
METHODS = tuple(TYPES)
"""The methods that more than one program has, with one meaning."""


def weight_shape(module: Adapted) -> torch.Size:
    """Return the shape of the weight as far as the tensors tell: that of a convolution may be flattened in them.

    Those of a rotation tell its number of outputs alone; the inputs count as one.

    Raises:
        ValueError: The tensors do not fit each other.
    """
    if module.method == OUTPUT:
        blocks, scale = module.parts["oft_blocks"], module.parts.get("rescale")
        if blocks.dim() not in (3, 4):
            raise ValueError(
                f"oft_blocks: expected (blocks, b, b) or (m, blocks, b, b), got shape {tuple(blocks.shape)}"
            )
        dims = 2 if scale is None else max(scale.dim(), 2)
        return torch.Size([blocks.shape[-3] * blocks.shape[-1], *[1] * (dims - 1)])
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in module.parts.items()}
    try:
        return _FORMULAS[module.method](shapes).shape
    except (RuntimeError, IndexError) as error:
        found = {name: tuple(tensor.shape) for name, tensor in module.parts.items()}
        raise ValueError(f"tensors that do not fit each other: {found} ({str(error).splitlines()[0]})") from None


def outputs(one: Found) -> int | None:
    """Return how many outputs the weight of a module has by the shapes of its tensors, or None if they do not tell."""
    parts = {common_name(part) or part: torch.empty(shape, device="meta") for part, shape in one.parts.items()}
    if one.method == WHOLE:
        return parts["diff"].shape[0] if "diff" in parts else None
    if one.method not in _FORMULAS:
        return None
    parts.pop("alpha", None)
    try:
        return weight_shape(Adapted("", "", "", one.method, parts, None, {}))[0]
    except (KeyError, ValueError):
        return None


def as_lycoris(module: Adapted) -> dict[str, Tensor]:
    """Return the tensors of a module as LyCORIS loads them: it finds the blocks of a rotation by its own rules.

    Its OFT has no fewer blocks than a block has numbers. Its BOFT has as many factors as join all blocks, of which
    those that are missing are the identity.

    Raises:
        ValueError: It would make other blocks.
    """
    if module.method != OUTPUT:
        return module.parts
    blocks = module.parts["oft_blocks"]
    count, size = blocks.shape[-3], blocks.shape[-1]
    if blocks.dim() == 3:
        if size > count:
            raise ValueError(
                f"oft_blocks: LyCORIS has no fewer blocks than a block has numbers, got {count} blocks of {size}"
            )
        return module.parts
    if size % 2 or count & (count - 1):
        raise ValueError(f"oft_blocks: LyCORIS has a power of two of blocks, of an even size, got {count} of {size}")
    missing = count.bit_length() - len(blocks)
    if missing < 0:
        raise ValueError(f"oft_blocks: LyCORIS has {count.bit_length()} factors for {count} blocks, got {len(blocks)}")
    padded = torch.cat([blocks, blocks.new_zeros(missing, count, size, size)]) if missing else blocks
    return module.parts | {"oft_blocks": padded}


def difference(one: Adapted, *others: Adapted, outputs: Tensor | None = None) -> float:
    """Return how far the updates of two modules are apart, relative to the first: 0 for the same numbers.

    Args:
        one: A module.
        others: The other one, or several that have its outputs, one after the other.
        outputs: Which outputs of the other one are its own, in its order; None for all, as they are.

    Raises:
        ValueError: They are of other shapes, or their magnitudes differ.
    """
    other = others[0]
    if len(others) > 1 or outputs is not None:
        return _apart(one, [*others], slice(None) if outputs is None else outputs)
    left, right = one.parts.get(MAGNITUDES), other.parts.get(MAGNITUDES)
    if (left is None) is not (right is None) or (left is not None and not _same_magnitudes(left, right)):
        raise ValueError(f"module {one.source!r}: the magnitudes became others")
    same = one.method == other.method and one.scale == other.scale and _factors(one).keys() == _factors(other).keys()
    same = same and (one.method != OUTPUT or one.alpha == other.alpha)
    if same and all(_same(tensor, other.parts[name]) for name, tensor in _factors(one).items()):
        return 0.0
    return _of_updates(one, update(other))


def _apart(one: Adapted, others: list[Adapted], rows: Tensor | slice) -> float:
    mine, theirs = one.parts.get(MAGNITUDES), [other.parts.get(MAGNITUDES) for other in others]
    # In one dtype: what was joined has the widest of all.
    found = [scale.flatten().double() for scale in theirs if scale is not None]
    if mine is None:
        same = not found
    else:
        kept = slice(None) if magnitudes_of_inputs(one) else rows
        same = len(found) == len(others) and torch.equal(mine.flatten().double(), torch.cat(found)[kept])
    if not same:
        raise ValueError(f"module {one.source!r}: the magnitudes became others")
    return _of_updates(one, torch.cat([update(other) for other in others])[rows])


def _of_updates(one: Adapted, second: Tensor) -> float:
    first = update(one)
    if first.shape != second.shape:
        raise ValueError(f"module {one.source!r}: its update became one of shape {tuple(second.shape)}")
    apart, size = (first - second).norm().item(), first.norm().item()
    return apart / size if size else (math.inf if apart else 0.0)


def magnitudes_of_inputs(module: Adapted) -> bool:
    """Whether a module has magnitudes, (1, in, ...), of the inputs of its layer."""
    scale = module.parts.get(MAGNITUDES)
    return scale is not None and scale.shape[0] == 1 and scale.numel() > 1


def _same_magnitudes(one: Tensor | None, other: Tensor | None) -> bool:
    assert one is not None
    assert other is not None
    # The axis, whatever dimensions of a kernel follow.
    return one.shape[:2] == other.shape[:2] and torch.equal(one.flatten(), other.flatten())


def _factors(module: Adapted) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.parts.items() if name != MAGNITUDES}


def _same(one: Tensor, other: Tensor) -> bool:
    # A linear layer may be written as a 1 x 1 convolution.
    shapes = [str(tuple(tensor.shape)).replace(", 1", "") for tensor in (one, other)]
    return one.dtype == other.dtype and shapes[0] == shapes[1] and torch.equal(one.flatten(), other.flatten())
