"""Folders of saved adapters: on this machine, or in a repository that `huggingface_hub` fetches."""

from __future__ import annotations

import os
from typing import Any

ARGUMENTS = (
    "subfolder",
    "revision",
    "token",
    "use_auth_token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
)
"""The keyword arguments that say where a folder is."""


def local_folder(model_id: str | os.PathLike[str], **arguments: Any) -> str:
    """Return the folder of a saved adapter; a name that is no folder is looked up by `huggingface_hub`.

    Args:
        model_id: A folder, or the name of a repository, "owner/name".
        **arguments: Those of `ARGUMENTS`; None means that it is not given.

    Raises:
        TypeError: An argument is unknown.
        ValueError: There is no such folder, and no such repository.
    """
    unknown = sorted(arguments.keys() - set(ARGUMENTS))
    if unknown:
        raise TypeError(f"{unknown[0]}: expected one of {', '.join(ARGUMENTS)}, got another keyword argument")
    given = {name: value for name, value in arguments.items() if value is not None}
    subfolder = given.pop("subfolder", None)
    folder = os.fspath(model_id)
    if not os.path.isdir(folder):
        folder = _fetched(folder, subfolder, given)
    if subfolder is None:
        return folder
    inside = os.path.join(folder, subfolder)
    if not os.path.isdir(inside):
        raise ValueError(f"subfolder: expected a folder inside of {folder!r}, got {subfolder!r}")
    return inside


def _fetched(name: str, subfolder: str | None, given: dict[str, Any]) -> str:
    wrong = f"model_id: expected the folder of a saved adapter, or the name of a repository, got {name!r}"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise ValueError(f"{wrong}, which is no folder; to fetch a repository, install huggingface_hub") from None
    token = given.pop("use_auth_token", None)
    given.setdefault("token", token)
    inside = f"{subfolder}/" if subfolder else ""
    try:
        # X-LoRA has its experts in sub-folders. Nothing else is fetched: no code, no pickles.
        return snapshot_download(name, allow_patterns=[f"{inside}*.json", f"{inside}*.safetensors"], **given)
    except HFValidationError:
        raise ValueError(f"{wrong}, which is neither") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{wrong}; it is no folder, and huggingface_hub says: {error}") from error


def push_folder(folder: str, repo_id: str, *, private: bool | None, token: Any, **options: Any) -> str:
    """Upload a folder to a repository, which is created, and return the address of the commit.

    Raises:
        ImportError: `huggingface_hub` is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("push_to_hub: expected huggingface_hub; install it, or upload the saved folder") from error
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=repo.repo_id, folder_path=folder, **options)
    return str(commit.commit_url)


def split_hub_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keyword arguments that say where a folder is, and the others."""
    own = {name: value for name, value in arguments.items() if name in ARGUMENTS}
    return own, {name: value for name, value in arguments.items() if name not in ARGUMENTS}


__all__ = ["ARGUMENTS", "local_folder", "push_folder", "split_hub_arguments"]
