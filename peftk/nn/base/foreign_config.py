"""Configurations that somebody else has made: objects of Hugging Face PEFT, and dictionaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...checkpoint.container import shown
from .config import PeftConfig


def as_config(argument: str, value: object) -> PeftConfig:
    """Return a configuration of this package for one of it, of Hugging Face PEFT, or a dictionary with its fields.

    Args:
        argument: What messages call it.
        value: The configuration; it is copied unless it is of this package.

    Raises:
        TypeError: It is none of these.
        ValueError: Its method is not here, or a field has a value that no adapter can have.
        NotImplementedError: A field asks for a feature that is not here.
    """
    if isinstance(value, PeftConfig):
        return value
    if isinstance(value, Mapping):
        return get_peft_config(value)
    if not (dataclasses.is_dataclass(value) and hasattr(value, "peft_type") and hasattr(value, "to_dict")):
        raise TypeError(
            f"{argument}: expected a configuration of peftk or of Hugging Face PEFT, or a dict of its fields, got "
            f"{type(value).__module__}.{type(value).__name__}"
        )
    fields = {field.name: field for field in dataclasses.fields(value)}
    values = {name: getattr(value, name) for name in fields}
    kind = getattr(values["peft_type"], "value", values["peft_type"])
    target = PeftConfig._by_type.get(str(kind))
    if target is None:
        raise ValueError(f"{argument}: expected one of the methods {sorted(PeftConfig._by_type)}, got {kind}")
    known = {field.name for field in dataclasses.fields(target)} - target._never_in_file
    for name in values.keys() - known:
        # What the library has beyond this package is no loss where nobody asked for it.
        if not _is_default(fields[name], values[name]):
            raise NotImplementedError(f"{name}={shown(values[name])}: {target.__name__} does not implement this field")
    taken = {name: _plain(values[name]) for name in known & values.keys()}
    return target(**{**taken, "peft_type": str(kind)})


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    # None and an empty container ask for the same: nothing.
    nothing = [v is None or (isinstance(v, (dict, list, set, tuple)) and not v) for v in (value, default)]
    return bool(value == default) or all(nothing)


def _plain(value: Any) -> Any:
    """Return the value of a field without the library's own classes."""
    value = getattr(value, "value", value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """Return the configuration whose fields a dictionary holds, `peft_type` among them.

    Raises:
        TypeError: `config_dict` is no dictionary, or has a field that the method does not have.
        ValueError: `peft_type` is missing or unknown.

    Example:
        >>> import peftk
        >>> peftk.get_peft_config({"peft_type": "LORA", "r": 4}).r
        4
    """
    if not isinstance(config_dict, Mapping):
        raise TypeError(f"config_dict: expected a dict of the fields of a configuration, got {shown(config_dict)}")
    return PeftConfig.from_peft_type(**config_dict)


__all__ = ["as_config", "get_peft_config"]
