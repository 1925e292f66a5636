"""What an adapter file is, whoever wrote it: dialect, methods, modules, and what is missing in it.

It is said from the names and shapes of the header alone. No tensor is read, and nothing is decided for a model: a
dialect that peftk does not load is named all the same.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .container import CheckpointError, shown
from .reader import header

__all__ = ["DIALECTS", "Description", "Found", "describe", "recognise", "told"]

_LORA_DOWN_UP = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
_LYCORIS = ("dora_scale", "scalar", "rescale", "oft_blocks", "diff", "diff_b", "w_norm", "b_norm", "on_input")
_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2")
_OLD_DIFFUSERS = ("lora.down.weight", "lora.up.weight", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
METHODS: dict[str, tuple[tuple[str, ...], ...]] = {
    "LoRA": (
        ("lora_down.weight", "lora_up.weight"),
        ("lora_A.weight", "lora_B.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("lora_embedding_A", "lora_embedding_B"),
    ),
    "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "LoKr": (
        ("lokr_w1", "lokr_w2"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    ),
    "OFT or BOFT on the output": (("oft_blocks",), ("output_oft_blocks",)),
    "GLoRA": (_GLORA,),
    "(IA)3": (("on_input",),),
    "whole weights": (("diff",), ("w_norm",)),
}
"""A method that other programs write to the sets of tensors that one module has of it."""

_PARTS = {"alpha", "lora_alpha", *_LORA_DOWN_UP, *_LYCORIS, *_GLORA, *_HADA, *_LOKR, *_OLD_DIFFUSERS}
_PARTS |= {part for sets in METHODS.values() for needed in sets for part in needed}
_LEARNED: dict[str, str] = {}


def learn(parts: Iterable[str], method: str) -> None:
    """Take in how the tensors of one of this package's layers end in files of PEFT, and what its method is called."""
    for part in parts:
        _LEARNED.setdefault(part, method)


_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lora_prior_")
_DIFFUSERS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "prior.")
PREFIXES = {
    "PEFT": ("base_model.model.",),
    "kohya": _KOHYA,
    "LyCORIS": ("lycoris_",),
    "diffusers": _DIFFUSERS,
    "ComfyUI": ("diffusion_model.",),
}
"""A dialect to what the names of its modules begin with."""

DIALECTS = {name.lower(): name for name in PREFIXES}
"""What a user calls a dialect to how messages name it."""


@dataclass
class Found:
    """The tensors of one module in a file.

    Attributes:
        dialect: Whose names and tensors they are.
        method: That of the tensors, or None where no method has them.
        parts: The end of a name to the shape of the tensor.
        missing: What the method has besides.
    """

    dialect: str
    method: str | None
    parts: dict[str, torch.Size]
    missing: tuple[str, ...] = ()


@dataclass
class Description:
    """What a file holds.

    Attributes:
        dialect: The dialect of all modules, "several" if they have more than one, or None if no adapter is in it.
        certain: Whether every tensor is one that the dialect has, and no module lacks any.
        modules: The name of a module, as the file writes it, to what it has.
        others: Names of tensors that are no adapter's; in a file of PEFT, those of modules that it has in full.
        metadata: The strings of the header.
    """

    dialect: str | None
    certain: bool
    modules: dict[str, Found]
    others: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """The methods, the most frequent one first."""
        counted = Counter(found.method for found in self.modules.values() if found.method is not None)
        return [name for name, _ in counted.most_common()]

    def __str__(self) -> str:
        if self.dialect is None:
            return f"no adapter of a dialect that is known ({len(self.others)} other tensors)"
        who = "several dialects" if self.dialect == "several" else f"the dialect of {self.dialect}"
        sure = "" if self.certain else ", probably"
        what = " and ".join(self.methods) or "unknown tensors"
        return f"{who}{sure}: {what} on {len(self.modules)} modules"

    def problems(self) -> list[str]:
        """Return a sentence for everything that keeps the file from being certain."""
        found = [
            f"module {shown(name)}: {', '.join(one.missing)} missing beside {', '.join(sorted(one.parts))}"
            for name, one in self.modules.items()
            if one.missing
        ]
        found += [
            f"module {shown(name)}: no method has just {', '.join(sorted(one.parts))}"
            for name, one in self.modules.items()
            if one.method is None
        ]
        if self.dialect == "several":
            counted = Counter(one.dialect for one in self.modules.values())
            found.append("dialects: " + ", ".join(f"{name} on {count} modules" for name, count in counted.items()))
        prefixes = PREFIXES["PEFT"] if self.dialect == "PEFT" else ()
        found += [f"key {shown(name)}: of no adapter" for name in self.others if not name.startswith(prefixes)]
        return found


def recognise(shapes: Mapping[str, torch.Size], metadata: Mapping[str, str] | None = None) -> Description:
    """Say what the tensors of a file are.

    Args:
        shapes: Key to shape.
        metadata: The strings of the header.
    """
    grouped: dict[str, dict[str, torch.Size]] = {}
    others = []
    for key, shape in shapes.items():
        name, part = _split(key)
        if part is None:
            others.append(key)
        else:
            grouped.setdefault(name, {})[part] = shape
    modules = {name: _found(name, parts) for name, parts in grouped.items()}
    dialects = {found.dialect for found in modules.values()}
    if {"kohya", "LyCORIS"} == dialects:
        # Files of LyCORIS have kohya's names, and plain LoRA on some of the modules.
        dialects = {"LyCORIS"}
        for found in modules.values():
            found.dialect = "LyCORIS"
    dialect = None if not modules else dialects.pop() if len(dialects) == 1 else "several"
    whole = all(found.method is not None and not found.missing for found in modules.values())
    in_full = dialect == "PEFT" and all(name.startswith(PREFIXES["PEFT"]) for name in others)
    certain = whole and (not others or in_full) and dialect not in (None, "several")
    return Description(dialect, certain, modules, others, dict(metadata or {}))


def _split(key: str) -> tuple[str, str | None]:
    """Return the name of a module and the longest end of a key that is known, or the key and None."""
    words = key.split(".")
    for count in (3, 2, 1):
        part = ".".join(words[-count:])
        if len(words) > count and (part in _PARTS or part in _LEARNED):
            return ".".join(words[:-count]), part
    return key, None


def _found(name: str, parts: dict[str, torch.Size]) -> Found:
    method, missing = _method(parts)
    return Found(_dialect(name, parts), method, parts, missing)


def _method(parts: Iterable[str]) -> tuple[str | None, tuple[str, ...]]:
    """Return the method that has most of these tensors, and what is missing of it."""
    have = set(parts)
    candidates = [
        (len(have & set(needed)), -len(set(needed) - have), name, tuple(n for n in needed if n not in have))
        for name, sets in METHODS.items()
        for needed in sets
        if have & set(needed)
    ]
    if not candidates:
        return next((_LEARNED[part] for part in sorted(have) if part in _LEARNED), None), ()
    *_, name, missing = max(candidates, key=lambda candidate: candidate[:2])
    return name, missing


def _dialect(name: str, parts: Mapping[str, torch.Size]) -> str:
    for dialect, prefixes in PREFIXES.items():
        if name.startswith(prefixes):
            # kohya's names with what only LyCORIS has in them.
            of_lycoris = dialect == "kohya" and any(part in (*_LYCORIS, *_HADA, *_LOKR, *_GLORA) for part in parts)
            return "LyCORIS" if of_lycoris else dialect
    return "bare names"


def describe(path: str | os.PathLike[str]) -> Description:
    """Say what a safetensors file is, by its header.

    Raises:
        CheckpointError: It is no safetensors file, or one with a header that is wrong.
    """
    entries, metadata = header(Path(path))
    return recognise({entry.name: torch.Size(entry.shape) for entry in entries}, metadata)


def told(path: str | os.PathLike[str]) -> str | None:
    """Return a few words about a file for a message, or None if nothing can be said."""
    try:
        return str(describe(path))
    except CheckpointError:
        return None
