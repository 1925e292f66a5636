"""The model card of a saved adapter: what the hub shows, and by what it finds the base model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint.writer import replace_together
from ..nn import PeftConfig


def write_model_card(folder: str, configs: Mapping[str, PeftConfig], named: bool) -> None:
    """Write `README.md` into a folder, unless there is one.

    Args:
        folder: The folder.
        configs: The configuration of every adapter, by name.
        named: Whether the base model has a configuration, and so a name that the hub may know.
    """
    path = os.path.join(folder, "README.md")
    if os.path.lexists(path) or not configs:
        return
    base = next((c.base_model_name_or_path for c in configs.values() if c.base_model_name_or_path), None)
    # A folder of somebody's machine is no name that others know.
    known = base if named and base and not os.path.isabs(base) and not os.path.exists(base) else None
    tags = sorted({c._kind.lower() for c in configs.values()})
    lines = ["---", "library_name: peft", *([f"base_model: {known}"] if known else []), "tags:"]
    lines += [f"- base_model:adapter:{known}"] if known else []
    lines += [f"- {tag}" for tag in tags]
    lines += ["- peftk", "---", "", f"# Adapter: {', '.join(c._kind for c in configs.values())}", ""]
    lines += ["Load it onto its base model with Hugging Face PEFT, or with peftk:", "", "```python"]
    lines += ["from peftk import PeftModel", "", "model = PeftModel.from_pretrained(base_model, folder)", "```", ""]
    # As a whole or not at all: half a card would stay for ever.
    os.makedirs(folder, exist_ok=True)
    replace_together(Path(folder), {"README.md": lambda stream: stream.write("\n".join(lines).encode())})


__all__ = ["write_model_card"]
