"""The adapters of an X-LoRA model: its experts, its classifier, and the two passes of a forward."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.container import shown
from ..nn import LoraConfig, PeftConfig, XLoraConfig
from ..nn.base.config import check_int, check_number
from ..nn.base.memory import give_memory
from ..nn.base.undo import put_back
from ..nn.lora.start import starts_inside
from ..nn.xlora.layer import GATED, Gates, XLoraClassifier, XLoraLayer
from .adapters import Tuner
from .loading import Reading, config_values, naming_the_file, read_config, read_into_plan
from .plan import Plan, attach
from .tuners import tuner_class

_CHECKPOINT = "_gradient_checkpointing_func"
"""Where a module of transformers keeps what it checkpoints with."""
PREFIX = "base_model.internal_xlora_classifier."


@dataclass
class XLoraPlan(Plan):
    """An X-LoRA adapter before it is attached.

    Attributes:
        classifier: Its classifier.
        device: Where the classifier belongs, if it has no memory yet.
        experts: Every expert, read and checked.
    """

    classifier: XLoraClassifier = field(kw_only=True)
    experts: list[Reading] = field(default_factory=list)
    device: torch.device | None = None

    def materialise(self) -> None:
        """See `Plan.materialise`; the experts have memory already."""
        give_memory(self.classifier, self.device)

    def changed(self) -> list[Tensor]:
        """See `Plan.changed`; an expert's file may hold embeddings of the base model."""
        return [tensor for read in self.experts for tensor in read.changed]


def tuner_for(model: nn.Module, config: PeftConfig) -> Tuner:
    """Return an empty tuner for a model whose first adapter has this configuration."""
    return XLoraModel(model) if isinstance(config, XLoraConfig) else tuner_class(type(config))(model)


def tuner_for_file(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | None,
    key_mapping: Mapping[str, str] | None = None,
    given: PeftConfig | None = None,
) -> Tuner:
    """Return an empty tuner for an adapter that is about to be read, with a configuration that is given or its own.

    The experts of X-LoRA are read from `adapters` or from the sub-folders 0, 1, ...; the folders that the file names
    are not followed: a file does not choose what is opened.
    """
    config = read_config(folder) if given is None else given
    if not isinstance(config, XLoraConfig):
        if adapters is not None:
            raise ValueError(f"adapters: only for X-LoRA, and {os.fspath(folder)!r} holds {config._kind}")
        return tuner_class(type(config))(model)
    experts = config.adapters or {}
    if adapters is not None:
        if not isinstance(adapters, Mapping):
            raise TypeError(f"adapters: expected a dict of names to folders, got {adapters!r}")
        if len(adapters) != len(experts):
            raise ValueError(
                f"adapters: expected the folders of {len(experts)} experts, {list(experts)}, got {len(adapters)}"
            )
        return XLoraModel(model, [os.fspath(path) for path in adapters.values()], key_mapping)
    inside = [os.path.join(folder, str(index)) for index in range(len(experts))]
    missing = [path for path in inside if not os.path.isdir(path)]
    if missing:
        raise ValueError(
            f"model_id: the experts are expected in the sub-folders {shown(inside)}, and {shown(missing)} are missing; "
            f"or name the folders with adapters={shown(config.adapters)}, if these are they"
        )
    return XLoraModel(model, inside, key_mapping)


class XLoraModel(Tuner):
    """Holds a model with LoRA experts and the classifier that weights them.

    A forward pass runs the base model twice: first without experts (or all with `scaling_pass_value`) and without
    gradients, for the hidden states that the classifier reads; then with the experts.

    Args:
        model: The base model; its layers are replaced in place.
        experts: The folders of the experts; None means those that the configuration names.
        key_mapping: What the keys of their files go through; see `PeftModel.from_pretrained`.
    """

    _gates: Gates

    def __init__(
        self,
        model: nn.Module,
        experts: Sequence[str] | None = None,
        key_mapping: Mapping[str, str] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.lora_model = Tuner(model)
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapters: list[str] = []
        self._folders, self._key_mapping = experts, key_mapping
        self._start_allocating()
        self.train(model.training)

    @property
    def model(self) -> nn.Module:
        """The base model."""
        return self.lora_model.model

    # -- making -----------------------------------------------------------------------------------------------

    def _check_new(self, name: str, config: PeftConfig) -> None:
        """Raise unless this is the first adapter."""
        if self.peft_config:
            raise ValueError(
                "adapter_name: an X-LoRA model takes no further adapters; its experts are those of its configuration"
            )
        super()._check_new(name, config)

    def _plan(
        self, name: str, config: PeftConfig, *, autocast_adapter_dtype: bool = True, initialise: bool = True, **_: Any
    ) -> Plan:
        """Read the experts and make the classifier, without touching the model."""
        if not isinstance(config, XLoraConfig):
            raise TypeError(f"peft_config: expected an XLoraConfig, got {type(config).__name__}")
        # One object for the classifier, the gates and `peft_config`, so that what is changed later counts everywhere.
        config = copy.deepcopy(config)
        settings = getattr(self.model, "config", None)
        if getattr(settings, "use_cache", False):
            raise ValueError("use_cache: expected False in the configuration of the model, which X-LoRA runs twice")
        hidden = getattr(settings, "hidden_size", config.hidden_size)
        if hidden != config.hidden_size:
            raise ValueError(f"hidden_size: expected {hidden}, that of the model, got {config.hidden_size}")
        folders = list((config.adapters or {}).values()) if self._folders is None else list(self._folders)
        if not folders:
            raise ValueError("adapters: expected at least one expert, got none")
        if name in map(str, range(len(folders))):
            raise ValueError(f"adapter_name: {name!r} is the name of an expert; choose another one")
        if config.top_k_lora is not None:
            check_int("top_k_lora", config.top_k_lora, 1, len(folders))
        experts = [self._expert(str(index), folder, autocast_adapter_dtype) for index, folder in enumerate(folders)]
        adapted = {path for read in experts for path in read.plan.adapters}
        first = next(self.model.parameters())
        device = first.device if initialise else torch.device("meta")
        with contextlib.nullcontext() if initialise else device:
            classifier = XLoraClassifier(config, len(experts), len(adapted)).to(device=device, dtype=first.dtype)
        return XLoraPlan(name, config, {}, {}, classifier=classifier, experts=experts, device=first.device)

    def _expert(self, name: str, folder: str, autocast: bool) -> Reading:
        where = f"adapters: expert {folder!r}"
        saved = config_values(folder)
        config = naming_the_file(folder, lambda: PeftConfig.from_dict(saved))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"{where} is {config._kind}; only LoRA adapters can be experts")
        for field_name, wanted in (("bias", "none"), ("lora_bias", False), ("use_dora", False)):
            if getattr(config, field_name) != wanted:
                raise NotImplementedError(f"{where} has {field_name}={getattr(config, field_name)!r}")
        if starts_inside(config.init_lora_weights):
            raise NotImplementedError(f"{where} has init_lora_weights={config.init_lora_weights!r}")
        read = read_into_plan(Tuner(self.model), folder, name, True, autocast, saved, self._key_mapping)
        plan = read.plan
        if plan.tokens:
            raise NotImplementedError(f"{where} has trainable_token_indices: {sorted(plan.tokens)}")
        if plan.saved:
            raise NotImplementedError(f"{where} has modules_to_save: {sorted(plan.saved)}")
        for path, adapter in plan.adapters.items():
            if adapter.layer_class not in GATED:
                raise NotImplementedError(f"{where}: X-LoRA has no {adapter.layer_class.__name__}, as on {path!r}")
            adapter.layer_class = GATED[adapter.layer_class]
        return read

    def _commit(self, plan: Plan) -> None:
        """Attach the experts and the classifier."""
        assert isinstance(plan, XLoraPlan) and isinstance(plan.config, XLoraConfig)
        self.model.requires_grad_(False)
        self.peft_config[plan.name] = plan.config
        for read in plan.experts:
            attach(self.model, read.plan)
            read.fill()
            self.peft_config[read.plan.name] = read.plan.config
        self.internal_xlora_classifier = plan.classifier
        self.internal_xlora_classifier.train(self.training)
        names = [read.plan.name for read in plan.experts]
        self._gates = Gates(plan.config, names)
        for number, (path, layer) in enumerate(self._layers()):
            assert isinstance(layer, XLoraLayer)
            layer.gates, layer.number, layer.module_name = self._gates, number, path
            layer.set_adapter(names)
        self.set_adapter(plan.name, inference_mode=plan.config.inference_mode)

    def _plan_of(self, name: str) -> Plan:
        """Describe the X-LoRA adapter, or one of its experts."""
        if name in self.active_adapters:
            return XLoraPlan(name, self.peft_config[name], {}, {}, classifier=self.internal_xlora_classifier)
        return super()._plan_of(name)

    def _file_tensors(self, plan: Plan) -> dict[str, Tensor]:
        """Map file keys to tensors; the file of the X-LoRA adapter itself holds the classifier."""
        if isinstance(plan, XLoraPlan):
            tensors = plan.classifier.state_dict(keep_vars=True)
            return {PREFIX + name: tensor for name, tensor in tensors.items()}
        return super()._file_tensors(plan)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make the X-LoRA adapter (unless `inference_mode`) trainable; it is always the active one."""
        names = self._known(adapter_name)
        if len(names) != 1 or not isinstance(self.peft_config[names[0]], XLoraConfig):
            raise ValueError(f"adapter_name: the experts of X-LoRA act together under its own name, got {names}")
        self.active_adapters = names
        self.set_requires_grad(names, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze the classifier and, with `use_trainable_adapters`, the experts."""
        names = self._known(adapter_names, "adapter_names")
        if self.active_adapters[0] in names:
            self.internal_xlora_classifier.requires_grad_(requires_grad)
            for _, layer in self._layers():
                config = self.peft_config[self.active_adapters[0]]
                layer.set_requires_grad(self._gates.experts, requires_grad and config.use_trainable_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Raise ValueError: classifier and experts belong together."""
        self._known(adapter_name)
        raise ValueError("adapter_name: the adapters of an X-LoRA model cannot be deleted; use unload to remove all")

    def _check_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        for _, layer in self._layers():
            layer.check_merge(adapter_names)
        return []

    # -- running ----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predict the weights of the experts, then run the model with them."""
        if self._off():
            return self.model(*args, **kwargs)
        with self._gates.using(self._predict(args, kwargs)), self._checkpointing():
            return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Let what is computed again in the backward pass have the weights that it had."""
        modules = [m for m in self.model.modules() if m.training and getattr(m, "gradient_checkpointing", False)]
        if not modules or not torch.is_grad_enabled():
            yield
            return
        before = [getattr(module, _CHECKPOINT) for module in modules]
        if any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in before):
            raise NotImplementedError(
                "gradient checkpointing: X-LoRA needs use_reentrant=False; pass it to gradient_checkpointing_enable"
            )
        state = self._gates.state
        assert state is not None
        # Gates that one layer makes for several would be made in other places the second time.
        for _, layer in self._layers():
            assert isinstance(layer, XLoraLayer)
            self._gates.of(layer)

        def remembering(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
            def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                def resumed(*inner_args: Any, **inner_kwargs: Any) -> Any:
                    with self._gates.resuming(state):
                        return function(*inner_args, **inner_kwargs)

                return checkpoint(resumed, *args, **kwargs)

            return checkpointed

        def restore() -> None:
            for module, function in zip(modules, before, strict=True):
                setattr(module, _CHECKPOINT, function)

        with put_back(restore):
            for module, function in zip(modules, before, strict=True):
                setattr(module, _CHECKPOINT, remembering(function))
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate without a cache: every step runs the model twice."""
        if kwargs.get("use_cache"):
            raise ValueError("use_cache: expected False; X-LoRA runs the model twice at every step")
        kwargs["use_cache"] = False
        model: Any = self.model
        if self._off():
            return model.generate(*args, **kwargs)
        forward = model.forward

        @functools.wraps(forward)
        def two_passes(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with self._gates.using(self._predict(inner_args, inner_kwargs, forward)):
                return forward(*inner_args, **inner_kwargs)

        replaced = self.model.__dict__.get("forward")

        def restore() -> None:
            if replaced is not None:
                self.model.forward = replaced
            else:
                self.model.__dict__.pop("forward", None)

        with put_back(restore):
            self.model.forward = two_passes
            return model.generate(*args, **kwargs)

    def _off(self) -> bool:
        return all(layer.disable_adapters for _, layer in self._layers())

    def _predict(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[..., Any] | None = None
    ) -> Tensor:
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            raise ValueError("use_cache: expected False and no past_key_values; X-LoRA runs the model twice")
        forward = forward or self.model.forward
        config = self._gates.config
        kwargs = kwargs | {"output_hidden_states": True, "return_dict": True}
        # Only the hidden states are read: neither a loss nor the logits of every token.
        kwargs.pop("labels", None)
        if "logits_to_keep" in inspect.signature(forward).parameters:
            kwargs["logits_to_keep"] = 1
        value = config.scaling_pass_value
        first = next(self.internal_xlora_classifier.layers[-1].parameters())
        weights = first.new_full((len(self._gates.experts),), value) if value else None
        with torch.no_grad(), self._gates.using(weights):
            output = forward(*args, **kwargs)
        hidden = output.get("hidden_states") if isinstance(output, Mapping) else getattr(output, "hidden_states", None)
        if not hidden:
            raise TypeError(
                f"X-LoRA: expected a base model that returns hidden_states, got {type(output).__name__} from "
                f"{type(self.model).__name__}"
            )
        last = hidden[-1]
        if last.dim() != 3 or last.shape[-1] != config.hidden_size:
            raise ValueError(
                f"X-LoRA: expected hidden states (batch, tokens, hidden_size = {config.hidden_size}), got "
                f"{tuple(last.shape)}"
            )
        self._gates.latest = self.internal_xlora_classifier(last)
        if self._gates.logging:
            self._gates.log.append(self._gates.latest)
        return self._gates.latest

    # -- PEFT's methods ---------------------------------------------------------------------------------------

    def set_topk_lora(self, value: int | None) -> None:
        """Let only the `value` experts with the largest weights act on a token; None means all."""
        if value is not None:
            check_int("value", value, 1, len(self._gates.experts))
        self._gates.config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set the factor of every expert's output."""
        check_number("weight", weight, -1e6, 1e6)
        self._gates.config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """Return the factor of every expert's output."""
        return self._gates.config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set the weight of every expert in the first pass; None means one over their number."""
        if value is None:
            value = 1 / len(self._gates.experts)
        check_number("value", value, -1e6, 1e6)
        self._gates.config.scaling_pass_value = value

    def get_latest_scalings(self) -> Tensor | None:
        """Return the weights of the last forward pass, (batch, tokens, layers, experts), or None."""
        return self._gates.latest

    def enable_scalings_logging(self) -> None:
        """Keep the weights of every forward pass from now on."""
        self._gates.logging = True

    def disable_scalings_logging(self) -> None:
        """Stop keeping weights; the log stays."""
        self._gates.logging = False

    def get_scalings_log(self) -> list[Tensor]:
        """Return the weights that were kept, oldest first."""
        return list(self._gates.log)

    def clear_scalings_log(self) -> None:
        """Forget the weights that were kept."""
        self._gates.log.clear()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Return the log by number of tokens: the positions in the log, and the weights."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for position, weights in enumerate(self._gates.log):
            positions, found = buckets.setdefault(weights.shape[1], ([], []))
            positions.append(position)
            found.append(weights)
        return buckets


__all__ = ["XLoraModel", "XLoraPlan", "tuner_for", "tuner_for_file"]
