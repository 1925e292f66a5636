"""The one wrapper round a frozen layer; a method adds its parameters, its forward and its merged weight."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checkpoint.recognise import learn
from ...methods._base_layer import features_of, kind_of
from .config import PeftConfig, check_adapter_name
from .filed import Filed
from .freezing import check_not_rerun, note_rerun, set_trainable
from .kinds import HALF, dtype_of, why_unsupported
from .memory import give_memory, with_memory
from .merging import Mergeable
from .offloading import TAKE_OFF, call_onloaded, cast_for_calls, comes_and_goes, hooked, onloaded
from .readable import Readable
from .scaling import Scalable
from .shortened import Shortened
from .updating import Updatable


@dataclass
class Adapter:
    """The parameters and settings of one adapter on one layer, before they are attached to it.

    Attributes:
        parts: Container name (`lora_A`, `oft_R`, ...) to the parameter, or to the module that holds the parameters.
        settings: Attribute name (`r`, `scaling`, ...) to this adapter's value.
        layer_class: The class of the layer that it belongs to.
        device: Where its parameters belong, if they have no memory yet.
        target: The full name of the parameter that it adapts; empty where it adapts a module.
        rest: Makes what is in no file and is found from the layer, once the others have memory; or None.
    """

    parts: dict[str, nn.Module | nn.Parameter]
    settings: dict[str, Any] = field(default_factory=dict)
    layer_class: type[AdapterLayer] = field(default_factory=lambda: AdapterLayer)
    device: torch.device | None = None
    target: str = ""
    rest: Callable[[], dict[str, nn.Module]] | None = None

    def materialise(self) -> None:
        """Give memory, with any values, to parameters that were made without."""
        for container, part in self.parts.items():
            if isinstance(part, nn.Module):
                give_memory(part, self.device)
            elif part.is_meta:
                self.parts[container] = with_memory(part, self.device)
        if self.rest is not None:
            self.parts.update(self.rest())
            self.rest = None

    def saved_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the file key, after the path of the layer, and the tensor of everything that a file holds."""
        for container, part in self.parts.items():
            if container in self.layer_class.constant_names:
                continue
            if isinstance(part, nn.Parameter):
                yield self.layer_class.file_names.get(container, container), part
                continue
            for name, parameter in part.named_parameters():
                # FSDP may have wrapped the part.
                key = f"{container}.{name.replace('_fsdp_wrapped_module.', '')}"
                yield self.layer_class.file_names.get(key, key), parameter


class AdapterLayer(Mergeable, Scalable, Shortened, Filed, Updatable, Readable):
    """A frozen layer with any number of named adapters, of which some are active.

    Subclasses say what they wrap and hold in class attributes, and implement `_create`, `_adapted` and `_merge_into`.
    Everything else (activation, disabling, deletion, dtype and device here, merging in `Mergeable`, strengths in
    `Scalable`) is written once.

    Attributes:
        base_kinds: Which of `KINDS` the class wraps.
        peft_class_prefix: What stands before the kind in the name of PEFT's class for it.
        adapter_layer_names: The containers of parameters, in PEFT's order. An adapter need not have all of them.
        parameter_names: Those that hold bare parameters (`hada_w1_a.<adapter>`); the others hold modules
            (`lora_A.<adapter>.weight`).
        constant_names: Those that are never trained and never saved.
        file_names: File keys where they differ from `<container>` or `<container>.<parameter>`.
        other_param_names: Dicts of settings; every adapter has an entry in the first.

    Args:
        base_layer: The layer to adapt; it is frozen (its bias is trained if the configuration says so).
        config: The method's configuration.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model, for patterns and messages.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not supported.
        ValueError: `config` does not fit the layer.
    """

    base_kinds: ClassVar[tuple[str, ...]] = ("Linear",)
    peft_class_prefix: ClassVar[str] = ""
    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    parameter_names: ClassVar[frozenset[str]] = frozenset()
    constant_names: ClassVar[frozenset[str]] = frozenset()
    file_names: ClassVar[dict[str, str]] = {}
    other_param_names: ClassVar[tuple[str, ...]] = ()
    config_class: ClassVar[type[PeftConfig]] = PeftConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What adapts whole modules keeps no settings of an adapter.
        for trait in ("adapter_layer_names", "other_param_names") if cls.base_kinds else ("adapter_layer_names",):
            if "config_class" in cls.__dict__ and not getattr(cls, trait):
                raise TypeError(f"{cls.__name__}.{trait}: expected the names of what its adapters have, got none")
        method = cls.config_class._method
        learn(cls._keys(), cls.__name__ if method is None else method.value)

    @classmethod
    def _keys(cls) -> Iterator[str]:
        """Yield how the keys of a file end, after the path of the layer."""
        for container in cls.adapter_layer_names:
            if container not in cls.constant_names:
                bare = container in cls.parameter_names
                for key in (container,) if bare else (f"{container}.weight", f"{container}.bias"):
                    yield cls.file_names.get(key, key)

    def __init__(
        self,
        base_layer: nn.Module,
        config: PeftConfig,
        adapter_name: str = "default",
        *,
        module_name: str = "",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        adapter = self.make(base_layer, config, module_name, autocast_adapter_dtype=autocast_adapter_dtype)
        self._wrap(base_layer, module_name)
        base_layer.requires_grad_(False)
        if config.bias_mode != "none" and self.bias is not None:
            self.bias.requires_grad_(True)
        self.attach(adapter_name, adapter)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    @classmethod
    def around(cls, base_layer: nn.Module, module_name: str = "") -> AdapterLayer:
        """Wrap `base_layer` without any adapter and without touching its parameters."""
        layer = cls.__new__(cls)
        layer._wrap(base_layer, module_name)
        return layer

    def _wrap(self, base_layer: nn.Module, module_name: str) -> None:
        nn.Module.__init__(self)
        self.module_name = module_name
        self.base_layer = base_layer
        self.train(base_layer.training)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict() if name in self.parameter_names else nn.ModuleDict())
        for name in self.other_param_names:
            setattr(self, name, {})
        self.kind = kind_of(base_layer)
        self.in_features, self.out_features = self._features()
        # The adapter of every sample, while a batch that mixes adapters runs.
        self.batch_adapters: Sequence[str] | None = None
        self._was_mixed = False  # Whether the last pass that recorded anything was such a batch.
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self._switched = False
        self._shortcut = None
        self.updated = {}
        self._start_scaling()
        # The tensors that merging replaced. Plain attributes: they are neither saved nor moved with the model.
        self._original: dict[str, Tensor] = {}
        # The versions that autograd counted for the merged ones: a higher one was written to.
        self._versions: dict[str, int] = {}

    def _features(self) -> tuple[int, int]:
        """Return the sizes of the inputs and outputs of what is adapted."""
        return features_of(self.base_layer)

    @classmethod
    def make(
        cls,
        base_layer: nn.Module,
        config: PeftConfig,
        module_name: str = "",
        *,
        autocast_adapter_dtype: bool = True,
        initialise: bool = True,
    ) -> Adapter:
        """Create the parameters of one adapter for `base_layer`, in its dtype and on its device.

        They are initialised in float32 on the CPU and rounded to the base dtype, as PEFT does; with
        `autocast_adapter_dtype` they are then kept in float32 on a half-precision base. On a quantised base they are
        float32, unless the layer says what it computes in. Without `initialise` they have no memory yet; see
        `Adapter.materialise`.
        """
        where = f"module {module_name!r}: " if module_name else ""
        if not isinstance(config, cls.config_class):
            raise TypeError(
                f"{where}config: {cls.__name__} expects a {cls.config_class.__name__}, got {type(config).__name__}"
            )
        with onloaded([base_layer]):
            reason = cls.refusal(base_layer)
            if reason is not None:
                raise TypeError(f"{where}{cls.__name__} cannot wrap {type(base_layer).__name__}: {reason}")
            if initialise and base_layer.weight.device.type == "meta":
                raise ValueError(
                    f"{where}its weight is on the meta device, so the adapter has no place; load the weights of the "
                    "base model before its adapters"
                )
            return cls._made(base_layer, config, module_name, autocast_adapter_dtype, initialise)

    @classmethod
    def _made(
        cls, base_layer: Any, config: PeftConfig, module_name: str, autocast_adapter_dtype: bool, initialise: bool
    ) -> Adapter:
        with contextlib.nullcontext() if initialise else torch.device("meta"):
            adapter = cls._create(base_layer, config, module_name, initialise)
        adapter.layer_class, adapter.device = cls, base_layer.weight.device
        cls._place(adapter.parts.values(), base_layer, autocast_adapter_dtype)
        return adapter

    @staticmethod
    def _place(parts: Iterable[nn.Module | nn.Parameter], base_layer: Any, autocast_adapter_dtype: bool) -> None:
        """Move made parameters to the device of the layer, and round them to its dtype."""
        dtype = dtype_of(base_layer)
        for part in parts:
            for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
                device = parameter.device if parameter.is_meta else base_layer.weight.device
                value = parameter.data.to(device=device, dtype=dtype)
                parameter.data = value.float() if autocast_adapter_dtype and dtype in HALF else value

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Say why this class cannot wrap `layer`, or return None if it can."""
        return why_unsupported(layer, cls.base_kinds)

    @classmethod
    def _create(cls, base_layer: Any, config: Any, module_name: str, initialise: bool) -> Adapter:
        # Every class takes its own kinds of layers, and its own configuration.
        raise NotImplementedError

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with the adapters `names` applied."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer with the active adapters; extra arguments go to the base layer."""
        # Straight from the dictionary: a look-up that goes through nn.Module runs Python of its own.
        own = self.__dict__
        if eager := not (args or kwargs or torch.compiler.is_dynamo_compiling()):
            shortcut = own["_shortcut"]
            if shortcut is not None and type(x) is Tensor and x.numel() <= shortcut.most:
                if not shortcut.unchanged(own, shortcut.calls, shortcut.empty, shortcut.entries):
                    own["_shortcut"] = None
                elif (y := shortcut.run(x)) is not None:
                    return y
        if own["_switched"] and not torch.compiler.is_compiling():
            note_rerun()
        if own["batch_adapters"] is not None or "adapter_names" in kwargs:
            return self._with_names(x, args, kwargs)
        if own["_was_mixed"] and torch.is_grad_enabled():
            self.__dict__["_was_mixed"] = check_not_rerun()
        if own["disable_adapters"] or own["merged_adapters"]:
            return self.base_layer(x, *args, **kwargs)
        attached = own[self.other_param_names[0]]
        names = own["active_adapters"]
        if len(names) != 1 or names[0] not in attached:
            names = [name for name in names if name in attached]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if own["_strengths"] or "forward" in own["_modules"]["base_layer"].__dict__:
            return self._onloaded(self._chosen, x, names, args, kwargs)
        if eager and own["_shortcut"] is None and len(names) == 1 and not torch.is_grad_enabled():
            own["_shortcut"] = self._find_shortcut(x, names[0])
        return self._adapted(x, names, *args, **kwargs)

    def _with_names(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names = kwargs.pop("adapter_names", None)
        names = self.batch_adapters if names is None else names
        if names is None:
            # Not by calling the layer, whose hooks are running already.
            return AdapterLayer.forward(self, x, *args, **kwargs)
        return self._mixed(x, names, args, kwargs)

    def _mixed(self, x: Tensor, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the output for a batch whose samples have the adapters `names`, one for each."""
        raise ValueError("adapter_names: only LoRA adapters can be mixed in a batch")

    def _chosen(self, x: Tensor, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.__dict__["_strengths"]:
            return self._at_strength(x, names, args, kwargs)
        return self._adapted(x, names, *args, **kwargs)

    def _onloaded(
        self,
        run: Callable[[Tensor, list[str], tuple[Any, ...], dict[str, Any]], Tensor],
        x: Tensor,
        names: list[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return what `run` does with the adapters `names`, where hooks bring parameters in for each call."""
        if "forward" not in self._modules["base_layer"].__dict__:
            return run(x, names, args, kwargs)
        parts = list(self._hooked(names))
        if self.training and torch.is_grad_enabled():
            self._check_trainable(parts)
        with onloaded(module for _, module in parts):
            return call_onloaded(self.base_layer, lambda y, *a, **k: run(y, names, a, k), (x, *args), kwargs)

    def _check_trainable(self, parts: list[tuple[str, nn.Module]]) -> None:
        where = f"module {self.module_name!r}: " if self.module_name else ""
        if cast_for_calls(self.base_layer):
            raise RuntimeError(
                f"{where}its weight is cast for each call (layer-wise casting of diffusers), and the backward pass "
                "would find it as it is stored; train without that, or call eval()"
            )
        for name, module in parts:
            if comes_and_goes(module) and any(p.requires_grad for p in module.parameters(recurse=False)):
                raise RuntimeError(
                    f"{where}the parameters of {name} are only there while it is called (offloaded, or cast for each "
                    "call), so that their gradients would be lost; train without that, or call eval()"
                )

    def _hooked(self, names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of these adapters, with their names, whose calls run hooks that may bring parameters in."""
        for container in self.adapter_layer_names:
            held = getattr(self, container)
            if hooked(held):
                yield container, held
            for name in names:
                for module in held._modules[name].modules() if name in held._modules else ():
                    if hooked(module):
                        yield f"{container}.{name}", module

    # -- adapters ---------------------------------------------------------------------------------------------

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters on this layer."""
        return list(getattr(self, self.other_param_names[0]))

    def adapter(self, adapter_name: str) -> Adapter:
        """Return the parameters of an adapter of this layer."""
        containers = {name: getattr(self, name) for name in self.adapter_layer_names}
        parts = {name: container[adapter_name] for name, container in containers.items() if adapter_name in container}
        return Adapter(parts, layer_class=type(self))

    def attach(self, adapter_name: str, adapter: Adapter) -> None:
        """Add a made adapter under a new name; it is neither active nor trainable yet."""
        check_adapter_name(adapter_name)
        if adapter_name in self.adapter_names:
            raise ValueError(f"adapter_name: {adapter_name!r} exists already on this layer")
        for container, part in adapter.parts.items():
            part.requires_grad_(False)
            if isinstance(part, nn.Module):
                part.train(self.training)
            getattr(self, container)[adapter_name] = part
        for name, value in adapter.settings.items():
            getattr(self, name)[adapter_name] = value
        if "scaling" in adapter.settings:
            self._first_scaling[adapter_name] = adapter.settings["scaling"]

    def add_adapter(
        self,
        adapter_name: str,
        config: PeftConfig,
        *,
        module_name: str = "",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Make and attach another adapter; `set_adapter` activates it."""
        self.check_add(config)
        adapter = self.make(self.base_layer, config, module_name, autocast_adapter_dtype=autocast_adapter_dtype)
        self.attach(adapter_name, adapter)

    def check_add(self, config: PeftConfig, initialise: bool = True) -> None:
        """Raise ValueError if an adapter of this configuration cannot be added, or initialised, in this state."""
        for container in self.adapter_layer_names:
            if comes_and_goes(getattr(self, container)):
                raise ValueError(
                    f"adapter_name: the parameters in {container} are offloaded, and those of another adapter would "
                    f"not be; {TAKE_OFF}, add the adapter, and offload again"
                )

    def check_set_adapter(self, adapter_names: Sequence[str]) -> None:
        """Raise ValueError if these adapters cannot be active together on this layer."""

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters, and no others, active and (unless `inference_mode`) trainable.

        Names that this layer does not have are ignored here: an adapter need not cover every layer of a model.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if self.merged_adapters:
            warnings.warn("set_adapter: the layer is merged; it is unmerged first", stacklevel=2)
            self.unmerge()
        for name, part in self._trainable():
            set_trainable(part, name in names and not inference_mode)
        # A first choice changes nothing for passes before it: none had an adapter.
        self._switched = self._switched or (bool(self.active_adapters) and names != self.active_adapters)
        self.active_adapters = names

    def switched(self) -> list[nn.Module]:
        """Return the modules whose attributes change when adapters are chosen, switched off or merged."""
        return [self]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters without activating them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, part in self._trainable():
            if name in names:
                part.requires_grad_(requires_grad)

    def _trainable(self) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        for container in self.adapter_layer_names:
            if container not in self.constant_names:
                yield from getattr(self, container).items()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; a merged layer is unmerged before it is switched off.

        `requires_grad` stays as it is, so that switching off and on restores the layer exactly.
        """
        if not enabled and self.merged_adapters:
            self.unmerge()
        self.disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; a merged one must be unmerged first."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter_name: {adapter_name!r} is merged; unmerge it before deleting it")
        for name in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, name)
            if adapter_name in container:
                del container[adapter_name]
        for values in (self._first_scaling, self._strengths, self._kept, self.updated):
            values.pop(adapter_name, None)
        # It would keep the parameters in memory until the next call.
        self._shortcut = None
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def unwrap(self) -> nn.Module:
        """Return the wrapped layer, which is about to take this one's place."""
        return self.base_layer
