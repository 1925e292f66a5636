"""What the header of a converted file says of the one that it was made from, and that one made from it again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.container import DTYPES, CheckpointError
from .adapter_source import PROVENANCE, Source

__all__ = ["of", "restored"]

Rows = list[tuple[str, str, str]]
"""Keys of a source, what they become, and notes; see `Plan`."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def of(source: Source, rows: Iterable[tuple[str, str, str]], tensors: Mapping[str, Tensor]) -> str:
    """Return what is needed to get a source back, bit by bit where nothing of it is lost.

    Args:
        source: The adapter.
        rows: What becomes of its keys.
        tensors: What is written.
    """
    origins: dict[str, list[Any]] = {}
    exact = True
    for key, target, _ in rows:
        before = source.file[key]
        after = tensors.get(target) if target else None
        if after is not None and before.dtype == after.dtype and torch.equal(_bits(before), _bits(after)):
            origins[key] = [target, list(before.shape)]
        elif not before.dtype.is_complex and _is_one_number(before):
            origins[key] = [float(before.flatten()[0]), list(before.shape), str(before.dtype).removeprefix("torch.")]
        else:
            exact = False
    exact = exact and len(origins) == len(source.file)
    told = {
        "dialect": source.dialect,
        "sha256": hashlib.sha256(Path(source.file.path).read_bytes()).hexdigest(),
        "exact": exact,
        "paths": sorted({module.path for module in source.modules if source.dialect not in ("kohya", "LyCORIS")}),
        "tensors": origins if exact else {},
        "metadata": _kept_metadata(source),
        "config": source.config,
    }
    return _json(told)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _kept_metadata(source: Source) -> dict[str, Any]:
    kept: dict[str, Any] = {k: v for k, v in source.file.metadata.items() if not k.startswith("peftk_")}
    origin = source.origin
    if origin is not None:
        # What the source was made from itself; what that was made from is in its own file.
        inner = {k: v for k, v in (origin.get("metadata") or {}).items() if k != PROVENANCE}
        kept[PROVENANCE] = origin | {"metadata": inner}
    return kept


def _is_one_number(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are the same, to the bit."""
    return tensor.numel() > 0 and torch.equal(_bits(tensor), _bits(tensor.flatten()[:1].expand(tensor.numel())))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def restored(
    source: Source, origin: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Rows, dict[str, str], dict[str, Any] | None]:
    """Return tensors, rows, metadata and configuration of the file that a source was made from.

    Raises:
        CheckpointError: The header says something that is never written.
    """
    tensors: dict[str, Tensor] = {}
    rows: Rows = []
    most = max((source.file[key].numel() for key in source.file), default=1)
    try:
        for key, (what, shape, *dtype) in origin["tensors"].items():
            if dtype:
                # One number is written so, and biases that are all zero; a file may ask for whatever memory it likes.
                if math.prod(shape) > most:
                    raise ValueError(f"{key}: expected no more numbers than in a tensor of the file, got shape {shape}")
                tensors[key] = torch.full(shape, what, dtype=_DTYPES[dtype[0]])
                continue
            tensors[key] = source.file[what].reshape(shape)
            rows.append((what, key, "as it was"))
        metadata = {name: value for name, value in origin["metadata"].items() if name != PROVENANCE}
        if PROVENANCE in origin["metadata"]:
            metadata[PROVENANCE] = _json(origin["metadata"][PROVENANCE])
        config = origin["config"]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(source.path, f"metadata {PROVENANCE}: not what peftk writes: {error!r}") from None
    used = {what for what, _, _ in rows}
    if len(used) < len(rows):
        raise CheckpointError(source.path, f"metadata {PROVENANCE}: not what peftk writes: a tensor for two keys")
    rows += [(key, "", "not in the original") for key in source.file if key not in used]
    return tensors, rows, metadata, config
