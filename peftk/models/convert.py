"""Adapter files of one program written as those of another: read, planned, written, and compared before they count.

A file that was written here says in its metadata what it was made from, so that the way back gives the same tensors,
keys and configuration, bit by bit.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from ..checkpoint.adapted import Adapted, difference
from ..checkpoint.container import CheckpointError, capped, shown
from ..checkpoint.peft import WEIGHTS_NAME, write_adapter
from ..checkpoint.writer import replace_together, snapshot, write_safetensors
from .adapter_source import Source, read_source
from .convert_plan import Plan

__all__ = ["convert"]

LIMIT = 1e-6
"""How far an update may be from that of the file it was made from, relative to it, before a file is refused."""


def convert(
    source: Source, plan: Plan, out: str | os.PathLike[str], *, force: bool = False, progressbar: bool = False
) -> list[tuple[str, float]]:
    """Write a plan, compare what was written with the source, and only then give it its name.

    Args:
        source: The adapter.
        plan: What `plan_for` has made of it.
        out: The file; for PEFT, the folder.
        force: Whether to replace what is there.
        progressbar: Whether to show one while modules are compared.

    Returns:
        The names of the modules, and how far their updates are from those of the source, relative to them.

    Raises:
        ValueError: `out` is there already, is the source, or is in no folder.
        CheckpointError: A module would have another update. Nothing is written.
    """
    target = Path(out)
    if Path(source.path).resolve() in (target.resolve(), (target / WEIGHTS_NAME).resolve()):
        raise ValueError(f"out: expected another place than that of the source, got {str(target)!r}")
    if os.path.lexists(target) and not force:
        raise ValueError(f"out: {str(target)!r} is there already; choose another name, or --force to replace it")
    if (plan.dialect == "peft") is target.is_file() and os.path.lexists(target):
        raise ValueError(f"out: expected a {'folder' if plan.dialect == 'peft' else 'file'}, got {str(target)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"out: expected a name in a folder that is there, got {str(target)!r}")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as folder:
        trial = Path(folder) / target.name
        _write(plan, trial)
        found = _compared(source, read_source(trial), plan, progressbar)
        if plan.dialect == "peft" and os.path.lexists(target):
            # No rename takes the place of a folder that is not empty.
            _write(plan, target)
        else:
            os.replace(trial, target)
    return found


def _write(plan: Plan, target: Path) -> None:
    if plan.dialect == "peft":
        assert plan.config is not None
        write_adapter(target, plan.tensors, plan.config, metadata=plan.metadata)
        return
    copies = snapshot(plan.tensors)
    replace_together(target.parent, {target.name: lambda stream: write_safetensors(stream, copies, plan.metadata)})


def _compared(source: Source, written: Source, plan: Plan, progressbar: bool) -> list[tuple[str, float]]:
    """Hold the updates of what was written to those of the source."""
    from tqdm import tqdm

    owners = {key: module for module in written.modules for key in module.keys.values()}
    problems, found = [], []
    # By the keys that the plan maps: the names alone may have lost their dots.
    targets: dict[str, list[str]] = {}
    for key, target, _ in plan.rows:
        if target:
            targets.setdefault(key, []).append(target)
    used: set[str] = set()
    for module in tqdm(source.modules, desc="Comparing", unit="module", disable=not progressbar):
        # A module may have become several, and several may have become one.
        keys = next((targets[key] for key in module.keys.values() if key in targets), [])
        if not keys:
            continue
        others = [owners[key] for key in keys if key in owners]
        if len(others) < len(keys):
            problems.append(f"module {shown(module.source)}: is not in what was written")
            continue
        used |= {other.source for other in others}
        outputs = plan.outputs.get(module.source)
        try:
            apart = difference(module, *others, outputs=outputs)
        except ValueError as error:
            problems.append(str(error))
            continue
        found.append((module.source, apart))
        if not apart <= _limit(module, outputs is not None):
            problems.append(f"module {shown(module.source)}: its update would be {apart:.1e} from what it is")
    if len(used) != len(written.modules):
        problems.append(f"expected {len(used)} modules in what was written, got {len(written.modules)}")
    if problems:
        raise CheckpointError(source.path, "would not be the same adapter", *capped(problems, "problems"))
    return found


def _limit(module: Adapted, joined: bool) -> float:
    # What is multiplied into a tensor is rounded to its dtype.
    multiplied = joined or module.notes or "lora_mid.weight" in module.parts
    return max([LIMIT, *(torch.finfo(tensor.dtype).eps for tensor in module.parts.values() if multiplied)])
