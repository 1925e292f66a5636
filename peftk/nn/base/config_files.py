"""Configurations in files, and from the fields of any method: the names of Hugging Face PEFT for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...checkpoint.container import shown
from ...checkpoint.hub import local_folder

if TYPE_CHECKING:
    from .config import PeftConfig


class ConfigFiles:
    """The part of `PeftConfig` that reads and writes `adapter_config.json`."""

    if TYPE_CHECKING:
        _by_type: ClassVar[dict[str, type[PeftConfig]]]

        @classmethod
        def from_dict(cls, values: Mapping[str, Any]) -> PeftConfig:
            """Build a configuration."""

        def file_values(self, adapted: Callable[[], Iterable[str]]) -> dict[str, Any]:
            """Return the fields for a file."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder, which is created.

        Args:
            save_directory: The folder.
            **kwargs: `auto_mapping_dict` takes the place of the field `auto_mapping`.
        """
        from ...checkpoint import peft as files

        mapping = kwargs.pop("auto_mapping_dict", None)
        if kwargs:
            raise TypeError(f"{sorted(kwargs)[0]}: expected auto_mapping_dict or nothing, got another keyword argument")
        values = self.file_values(lambda: ())
        if mapping is not None:
            values["auto_mapping"] = mapping
        files.write_config(save_directory, values)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read `adapter_config.json` from a folder, or from a repository through `huggingface_hub`.

        Args:
            pretrained_model_name_or_path: The folder, or the name of the repository.
            subfolder: The folder inside of it.
            **kwargs: `revision`, `token` and the like say where it is; anything else replaces a field.

        Raises:
            ValueError: There is no such file, or it describes nothing that this package has.
        """
        from ...checkpoint import peft as files
        from ...checkpoint.hub import split_hub_arguments

        where, fields = split_hub_arguments(kwargs)
        folder = local_folder(pretrained_model_name_or_path, subfolder=subfolder, **where)
        found: PeftConfig = cls.from_dict({**files.read_config(folder), **fields})
        return found

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Return the fields in a JSON file, as they stand there."""
        with open(path_json_file, encoding="utf-8") as stream:
            values = json.load(stream)
        if not isinstance(values, dict):
            raise ValueError(f"path_json_file: expected a JSON object in {os.fspath(path_json_file)!r}")
        return {**values, **kwargs}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Return the configuration of the method `peft_type`, with the other arguments as its fields.

        Raises:
            TypeError: The method has no such field.
            ValueError: `peft_type` is missing or unknown.
        """
        kind = kwargs.pop("peft_type", None)
        kind = getattr(kind, "value", kind)
        target = cls._by_type.get(kind) if isinstance(kind, str) else None
        if target is None:
            raise ValueError(f"peft_type: expected one of {sorted(cls._by_type)}, got {shown(kind)}")
        if not issubclass(target, cls):
            raise ValueError(f"peft_type: {cls.__name__} cannot hold a configuration of type {kind!r}")
        made: PeftConfig = target(**kwargs)
        return made

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments: every one is checked when a configuration is made of them."""
        return kwargs


__all__ = ["ConfigFiles"]
