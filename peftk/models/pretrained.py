"""The part of `PeftModel` that has to do with files and repositories."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint.hub import local_folder, push_folder, split_hub_arguments
from ..nn import AdapterLayer, PeftConfig
from ..nn.base.config import check_bool, check_choice
from ..nn.base.foreign_config import as_config
from .foreign_files import peft_folder
from .loading import LoadResult, read_into_plan
from .model_card import write_model_card
from .saving import save_adapter
from .xlora import tuner_for_file

P = TypeVar("P", bound="Pretrained")

_PLACES = ("device_map", "max_memory", "offload_dir", "offload_folder", "offload_index")


class Pretrained(nn.Module):
    """Saving and loading adapters, with the arguments of Hugging Face PEFT in its order."""

    if TYPE_CHECKING:
        base_model: Any

        @property
        def peft_config(self) -> dict[str, PeftConfig]:
            """The configuration of every adapter, by name."""

        @classmethod
        def _for_task(cls, config: PeftConfig) -> Any:
            """Return the class for a configuration."""

        def _start(self, tuner: Any, plan: Any) -> None: ...

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
    ) -> None:
        """Write adapters in PEFT's format: "default" into the folder itself, others into sub-folders of their name.

        Args:
            save_directory: The folder; it is created.
            safe_serialization: Must be True: pickles are not written.
            selected_adapters: Which adapters; None means all.
            save_embedding_layers: Whether to write the embeddings of the base model too; "auto" does so, with a
                warning, where its vocabulary was resized, because nobody else has the new rows.
            is_main_process: Write only if True.
            path_initial_model_for_weight_conversion: The folder of the adapter as it was before it was trained; what
                it has learned since is then written as a LoRA adapter of twice the rank.
            state_dict: Take the values from this state dict of the whole model, as it is gathered under FSDP.
            save_function: Accepted for scripts that pass it; adapters are written as safetensors by this package.
            max_shard_size: Accepted for scripts that pass it; an adapter is one file.
            push_to_hub: Must be False: call `push_to_hub`.

        Raises:
            ValueError: An argument is not one of the above.
        """
        if safe_serialization is not True:
            raise ValueError(f"safe_serialization: expected True (pickles are refused), got {safe_serialization!r}")
        check_choice("save_embedding_layers", save_embedding_layers, ("auto", True, False))
        if save_function is not None and not callable(save_function):
            raise TypeError(f"save_function: expected a function, got {type(save_function).__name__}")
        if push_to_hub:
            raise ValueError("push_to_hub: expected False; call model.push_to_hub(repo_id), which saves and uploads")
        folder = os.fspath(save_directory)
        if os.path.isfile(folder):
            raise ValueError(f"save_directory: expected a folder, got the file {folder!r}")
        chosen = list(self.peft_config) if selected_adapters is None else selected_adapters
        names = self.base_model._known(chosen, "selected_adapters")
        options = save_embedding_layers, path_initial_model_for_weight_conversion, state_dict
        for name in names if is_main_process else ():
            save_adapter(self.base_model, name, folder if name == "default" else os.path.join(folder, name), *options)
        if names and is_main_process:
            self.create_or_update_model_card(folder)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write `README.md`, a model card for the hub, into a folder; one that is there stays as it is."""
        named = hasattr(self.base_model.model, "config")
        write_model_card(os.fspath(output_dir), self.peft_config, named)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload adapter",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """Save the adapters and upload them, with a model card, through `huggingface_hub`.

        Args:
            repo_id: The name of the repository, "owner/name"; it is created.
            commit_message: What the commit says.
            private: Whether a new repository is private; None means as its owner has set.
            token: The token of the hub; None means the one that one has logged in with.
            revision: The branch.
            create_pr: Open a pull request instead of writing to the branch.
            **kwargs: Arguments of `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ImportError: `huggingface_hub` is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            options = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
            return push_folder(folder, repo_id, private=private, token=token, **options)

    @classmethod
    def from_pretrained(
        cls: type[P],
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | Mapping[str, Any] | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        dialect: str = "auto",
        **kwargs: Any,
    ) -> P:
        """Load an adapter that peftk or PEFT has saved onto its base model.

        The whole file is read and checked before the model is touched; if anything is wrong, it stays as it is.

        Args:
            model: The base model; its layers are replaced in place.
            model_id: The folder of the adapter; the name of a repository, which `huggingface_hub` fetches; or a
                safetensors file of kohya's scripts, LyCORIS, diffusers or ComfyUI.
            adapter_name: The name that the adapter gets.
            is_trainable: Whether it can be trained further; if not, the model is put into evaluation mode.
            config: The configuration in place of that of the folder.
            autocast_adapter_dtype: Keep adapter parameters in float32 on a half-precision base.
            ephemeral_gpu_offload: Must be False: PEFT moves weights of DoRA to a GPU and back.
            low_cpu_mem_usage: Accepted for scripts that pass it: what is loaded is never initialised first.
            key_mapping: Regular expressions to replacements for the keys of the file without `base_model.model.`, of
                which the first that is found counts. None means the `_checkpoint_conversion_mapping` of the model.
            adapters: For X-LoRA: names to the folders of the experts; None means the sub-folders 0, 1, ... of
                `model_id`.
            dialect: What wrote `model_id`: "auto" finds out; "peft", "kohya", "lycoris", "diffusers" and "comfyui"
                refuse what is otherwise.
            **kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` say where the
                adapter is; `torch_device` and `use_safetensors` are accepted, as far as they ask for what happens.

        Raises:
            NotImplementedError: An argument asks for a feature that is not here.
            ValueError: The file is damaged, its keys or shapes do not fit the model, or what another program has
                written into it has no adapter here that means the same.
        """
        check_bool("low_cpu_mem_usage", low_cpu_mem_usage)
        check_bool("is_trainable", is_trainable)
        check_base(model)
        given = None if config is None else as_config("config", config)
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(peft_folder(model, model_id, dialect))
            folder = _folder(place, ephemeral_gpu_offload, kwargs)
            tuner = tuner_for_file(model, folder, adapters, key_mapping, given)
            before = stack.enter_context(tuner._whole())
            options = is_trainable, autocast_adapter_dtype, None, key_mapping, given
            read = read_into_plan(tuner, folder, adapter_name, *options)
            before.keep([*read.changed, *read.plan.changed()])
            made = cls._for_task(read.plan.config)
            result: P = made.__new__(made)
            result._start(tuner, read.plan)
            read.fill()
            if not is_trainable:
                result.eval()
            return result

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        dialect: str = "auto",
        **kwargs: Any,
    ) -> LoadResult:
        """Load another saved adapter, or new values for one that exists; `set_adapter` activates it.

        On failure nothing changes. Arguments as in `from_pretrained`; the adapter goes where its layers are, whatever
        `torch_device` says.

        Returns:
            Two empty lists: a file whose keys do not fit is refused.
        """
        check_bool("low_cpu_mem_usage", low_cpu_mem_usage)
        tuner = self.base_model
        with peft_folder(tuner.model, model_id, dialect) as place, tuner._whole(self) as before:
            folder = _folder(place, ephemeral_gpu_offload, {"torch_device": torch_device, **kwargs})
            read = read_into_plan(
                tuner, folder, adapter_name, is_trainable, autocast_adapter_dtype, key_mapping=key_mapping
            )
            before.keep(read.changed)
            if adapter_name not in self.peft_config:
                tuner._commit(read.plan)
                if is_trainable:
                    tuner.set_requires_grad(adapter_name)
            read.fill()
            if not is_trainable:
                self.eval()
        return LoadResult([], [])


def local_adapter(model_id: str | os.PathLike[str], kwargs: dict[str, Any]) -> str:
    """Return the folder of an adapter; arguments of loading that ask for what is not here are refused by name."""
    return _folder(model_id, False, kwargs)


def _folder(model_id: str | os.PathLike[str], ephemeral_gpu_offload: object, kwargs: dict[str, Any]) -> str:
    """Check the arguments that PEFT has beside those of its signature, and return the folder of the adapter."""
    where, others = split_hub_arguments(kwargs)
    if ephemeral_gpu_offload:
        raise NotImplementedError("ephemeral_gpu_offload: expected False; weights are not moved to a GPU and back")
    device = others.pop("torch_device", None)
    if device is not None:
        torch.device(device)
    if others.pop("use_safetensors", None) is False:
        raise NotImplementedError("use_safetensors: expected True or nothing; pickles are not read")
    if others.pop("ignore_mismatched_sizes", False):
        raise NotImplementedError(
            "ignore_mismatched_sizes: expected False; a file that does not fit is refused. To take what fits of it, "
            "call set_peft_model_state_dict(model, load_peft_weights(folder), ignore_mismatched_sizes=True)"
        )
    for name in _PLACES:
        if others.pop(name, None) is not None:
            raise NotImplementedError(
                f"{name}: an adapter goes where its layers are; spread the base model over devices before, with "
                f"{name} of its own from_pretrained or accelerate.dispatch_model"
            )
    for name in ("torch_dtype", "dtype"):
        if others.pop(name, None) is not None:
            raise NotImplementedError(f"{name}: expected None; load the base model in that dtype")
    if others:
        raise TypeError(f"{sorted(others)[0]}: expected no such argument")
    return local_folder(model_id, **where)


def check_base(model: object) -> None:
    """Raise unless a model has no adapters yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, Pretrained):
        raise ValueError("model: it is a PeftModel already; use add_adapter or load_adapter, or unload it first")
    adapted = next((name for name, module in model.named_modules() if isinstance(module, AdapterLayer)), None)
    if adapted is not None:
        raise ValueError(f"model: module {adapted!r} is adapted already; call unload on the PeftModel that owns it")


__all__ = ["Pretrained", "check_base", "local_adapter"]
