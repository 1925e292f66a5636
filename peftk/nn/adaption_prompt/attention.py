"""Llama-Adapter: adaption prompts with a gate that starts at zero, beside the attention of the top layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...methods import adaption_prompt
from ..base.adapter_layer import Adapter, AdapterLayer
from ..base.config import PeftConfig, check_adapter_name
from ..base.freezing import note_rerun, set_trainable
from ..base.merging import Merged
from .config import ATTENTIONS, AdaptionPromptConfig


class Prompt(nn.Module):
    """The parameters of an adapter that is not active on a layer.

    Args:
        adaption_prompt: The prompt, (1, adapter_len, hidden_size).
        adaption_gate: The gate, (1,).
    """

    def __init__(self, adaption_prompt: nn.Parameter, adaption_gate: nn.Parameter) -> None:
        super().__init__()
        self.adaption_prompt = adaption_prompt
        self.adaption_gate = adaption_gate


class AdaptedAttention(AdapterLayer):
    """An attention module of a llama, mistral or gpt2 model with adaption prompts.

    ``y = o(a + gate * softmax(q k(P)^T / sqrt(head_dim)) v(P))`` where q, after the rotary embedding, and a are the
    query and the heads' output of the module itself, which computes them as it would alone, with any attention
    implementation. For gpt2 the prompts' share is added to the module's output instead. Of several adapters one is
    active at a time.

    Parameters, named as by PEFT: `adaption_prompt` (1, adapter_len, hidden_size) and `adaption_gate` (1,) of the active
    adapter; those of the others are below `inactive.<adapter>`. They have the dtype of the query projection.

    Args:
        base_layer: The attention module; it is frozen.
        config: The configuration, of which `adapter_len` is read.
        adapter_name: The name of the first adapter.
        module_name: The path of the module in its model, for messages.

    Raises:
        TypeError: `base_layer` is no such attention module.
        ValueError: The prompt is longer than the model's context.
    """

    base_kinds = ()
    adapter_layer_names = ("adaption_prompt", "adaption_gate")
    config_class = AdaptionPromptConfig

    def _wrap(self, base_layer: Any, module_name: str) -> None:
        nn.Module.__init__(self)
        self.module_name = module_name
        self.model = base_layer
        self.adaption_prompt: nn.Parameter | None
        self.adaption_gate: nn.Parameter | None
        self.register_parameter("adaption_prompt", None)
        self.register_parameter("adaption_gate", None)
        self.inactive = nn.ModuleDict()
        self.train(base_layer.training)
        self._names: list[str] = []
        self._current: str | None = None
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self._original: dict[str, Tensor] = {}
        self._start_scaling()
        self.updated = {}
        self.attention = ATTENTIONS[base_layer.config.model_type]
        # What the hooks of one forward pass hand on. They fire only while `_listening`: prompts pass through the same
        # projections, and so does everything while the adapter is off.
        self._listening = False
        self._query: Tensor | None = None
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._handles = [getattr(base_layer, self.attention.query).register_forward_hook(self._keep_query)]
        if self.attention.output is not None:
            output = getattr(base_layer, self.attention.output)
            self._handles.append(output.register_forward_pre_hook(self._add_before_output))

    def unwrap(self) -> nn.Module:
        """Return the attention module without the hooks of this layer."""
        for handle in self._handles:
            handle.remove()
        return self.model

    @property
    def base_layer(self) -> nn.Module:
        """The attention module."""
        return self.model

    @classmethod
    def make(
        cls,
        base_layer: Any,
        config: PeftConfig,
        module_name: str = "",
        *,
        autocast_adapter_dtype: bool = True,
        initialise: bool = True,
    ) -> Adapter:
        """Create a prompt (standard normal) and a gate (zero) in the dtype and on the device of the query projection.

        `autocast_adapter_dtype` changes nothing, as in PEFT: keys, values and queries meet in the dtype of the base.
        """
        where = f"module {module_name!r}: " if module_name else ""
        if not isinstance(config, cls.config_class):
            raise TypeError(
                f"{where}config: {cls.__name__} expects a {cls.config_class.__name__}, got {type(config).__name__}"
            )
        reason = cls.refusal(base_layer)
        if reason is not None:
            raise TypeError(f"{where}{cls.__name__} cannot wrap {type(base_layer).__name__}: {reason}")
        length = config.adapter_len
        if length is None:
            raise ValueError(f"{where}adapter_len: expected a number from 1, got None; an adaption prompt needs it")
        context = getattr(base_layer.config, "max_position_embeddings", None)
        if context is not None and length > context:
            raise ValueError(f"{where}adapter_len: expected at most {context}, the context of the model, got {length}")
        weight = getattr(base_layer, ATTENTIONS[base_layer.config.model_type].query).weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        device = weight.device if initialise else "meta"
        prompt = torch.empty(1, length, base_layer.config.hidden_size, device=device, dtype=dtype)
        if initialise:
            prompt.normal_()
        gate = torch.zeros(1, device=device, dtype=dtype)
        parts: dict[str, nn.Module | nn.Parameter] = {
            "adaption_prompt": nn.Parameter(prompt),
            "adaption_gate": nn.Parameter(gate),
        }
        return Adapter(parts, layer_class=cls, device=weight.device)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Say why a module cannot have adaption prompts, or return None if it can."""
        kind = getattr(getattr(layer, "config", None), "model_type", None)
        if kind not in ATTENTIONS:
            return f"only the attention modules of transformers models of type {sorted(ATTENTIONS)} are supported"
        if getattr(layer, "is_cross_attention", False):
            return "cross-attention has no adaption prompts"
        parts = ATTENTIONS[kind].parts
        complete = all(isinstance(getattr(layer, part, None), nn.Module) for part in parts)
        if not complete or not isinstance(getattr(layer, "head_dim", None), int):
            return f"the attention module of a {kind} model has {', '.join(parts)} and head_dim"
        if any(isinstance(child, AdapterLayer) for child in layer.modules()):
            return "a layer in it has an adapter of another method"
        return None

    # -- the forward pass ---------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention module with the active adapter; arguments and results are the module's own."""
        if not torch.compiler.is_compiling():
            note_rerun()
        if self.disable_adapters or self._current is None:
            return self.model(*args, **kwargs)
        if self.attention.output is not None:
            self._rotary = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
        self._listening = True
        try:
            result = self.model(*args, **kwargs)
            query, self._query = self._query, None
        finally:
            done = not self._listening
            self._listening, self._query, self._rotary = False, None, None
        if self.attention.output is not None:
            if not done:
                raise RuntimeError(
                    f"adaption prompt: {type(self.model).__name__} did not call its {self.attention.output}"
                )
            return result
        if query is None:
            raise RuntimeError(f"adaption prompt: {type(self.model).__name__} did not call its {self.attention.query}")
        return result[0] + self._share(query).to(result[0].dtype), *result[1:]

    def _keep_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._listening and self._query is None:
            self._query = output

    def _add_before_output(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._listening or self._query is None:
            return None
        query, self._query = self._query, None
        # The prompt goes through projections of the same module, whose hooks must not answer.
        self._listening = False
        return args[0] + self._share(query).to(args[0].dtype), *args[1:]

    def _share(self, projected: Tensor) -> Tensor:
        """Return what the prompts add to the heads' output: (batch, tokens, heads * head_dim)."""
        prompt, gate, head_dim = self.adaption_prompt, self.adaption_gate, self.model.head_dim
        assert gate is not None and self._current is not None and isinstance(head_dim, int)
        if len(self.attention.keys) == 1:
            query, *_ = projected.chunk(3, -1)
            _, key, value = getattr(self.model, self.attention.keys[0])(prompt).chunk(3, -1)
        else:
            query = projected
            key, value = (getattr(self.model, name)(prompt) for name in self.attention.keys)
        strength = self._strengths.get(self._current, 1.0)
        return adaption_prompt.share(query, key, value, gate * strength, head_dim, self._rotary)

    # -- adapters ---------------------------------------------------------------------------------------------

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters on this layer."""
        return list(self._names)

    def adapter(self, adapter_name: str) -> Adapter:
        """Return the parameters of an adapter."""
        source = self if adapter_name == self._current else self.inactive[adapter_name]
        return Adapter({name: getattr(source, name) for name in self.adapter_layer_names}, layer_class=type(self))

    def attach(self, adapter_name: str, adapter: Adapter) -> None:
        """Add a made adapter under a new name; it is neither active nor trainable yet."""
        check_adapter_name(adapter_name)
        if adapter_name in self._names:
            raise ValueError(f"adapter_name: {adapter_name!r} exists already on this layer")
        for parameter in adapter.parts.values():
            parameter.requires_grad_(False)
        parts = {name: part for name, part in adapter.parts.items() if isinstance(part, nn.Parameter)}
        self.inactive[adapter_name] = Prompt(**parts)
        self._names.append(adapter_name)

    def check_set_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Raise ValueError if this layer has several of these adapters."""
        self._found(adapter_names)

    def _found(self, adapter_names: str | Sequence[str]) -> list[str]:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        found = [name for name in dict.fromkeys(names) if name in self._names]
        if len(found) > 1:
            raise ValueError(f"adapter_names: only one adaption prompt can be active at a time, got {found}")
        return found

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make this adapter, and no other, active and (unless `inference_mode`) trainable."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        found = self._found(names)
        self._put_away()
        if found:
            chosen = self.inactive.pop(found[0])
            for name in self.adapter_layer_names:
                setattr(self, name, getattr(chosen, name))
            self._current = found[0]
        for name in self._names:
            for parameter in self.adapter(name).parts.values():
                set_trainable(parameter, name in found and not inference_mode)
        self.active_adapters = names

    def switched(self) -> list[nn.Module]:
        """See `AdapterLayer.switched`; the parameters of the active adapter stand in the layer itself."""
        return [self, *self.inactive.modules()]

    def _put_away(self) -> None:
        if self._current is not None:
            assert self.adaption_prompt is not None and self.adaption_gate is not None
            self.inactive[self._current] = Prompt(self.adaption_prompt, self.adaption_gate)
            self.adaption_prompt = self.adaption_gate = self._current = None

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters without activating them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in self._names:
            if name in names:
                for parameter in self.adapter(name).parts.values():
                    parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; `requires_grad` stays as it is."""
        self.disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        if adapter_name == self._current:
            self._put_away()
        if adapter_name in self._names:
            self._names.remove(adapter_name)
            del self.inactive[adapter_name]
            self._strengths.pop(adapter_name, None)
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    # -- merging ----------------------------------------------------------------------------------------------

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if one of these adapters is on this layer: no weight can hold what it adds."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names: expected a list of adapter names, got {adapter_names!r}")
        names = self.active_adapters if adapter_names is None else adapter_names
        found = [name for name in names if name in self._names]
        if found:
            raise ValueError(
                f"merge: {found[0]!r} is an adaption prompt, which attends to the input and which no weight can hold; "
                "use unload to take it off the model"
            )

    def merged_tensors(self, adapter_names: Sequence[str] | None = None) -> Merged:
        """Raise ValueError: see `check_merge`."""
        self.check_merge(adapter_names)
        return Merged({})

    def merge(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, *, keep_base: str = "device"
    ) -> None:
        """Raise ValueError: see `check_merge`."""
        self.check_merge(adapter_names)

    def get_base_layer(self) -> nn.Module:
        """Return the attention module."""
        return self.model

    def extra_repr(self) -> str:
        """Name the active adapter and the length of every prompt."""
        prompts = {name: self.adapter(name).parts["adaption_prompt"] for name in self._names}
        lengths = {name: prompt.shape[1] for name, prompt in prompts.items() if isinstance(prompt, nn.Parameter)}
        disabled = ", disabled" if self.disable_adapters else ""
        return f"active_adapters={self.active_adapters}{disabled}, adapter_len={lengths}"


__all__ = ["AdaptedAttention", "AdaptionPromptConfig"]
