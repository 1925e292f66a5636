"""The base of every adapter configuration, and the checks that all of them share."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from ...checkpoint.container import shown
from ...checkpoint.patterns import PATTERN, check_expression, keys_of
from .config_files import ConfigFiles

PEFT_FORMAT_VERSION = "0.21.2"
"""The release of Hugging Face PEFT whose configuration and checkpoint format peftk reads and writes."""
MAX_LISTS = 100


class TaskType(str, Enum):
    """What a model is trained for; it decides which task head is trained and saved beside the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, Enum):
    """The adapter methods that peftk implements, and the prompt methods that scripts ask about, which it refuses."""

    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    ADALORA = "ADALORA"
    BOFT = "BOFT"
    C3A = "C3A"
    LOKR = "LOKR"
    LOHA = "LOHA"
    LORA = "LORA"
    OFT = "OFT"
    OUTPUT_OFT = "OUTPUT_OFT"
    XLORA = "XLORA"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"


read_from: ContextVar[str | None] = ContextVar("read_from", default=None)
"""The configuration file that is being read, for messages about its fields."""


def warn_of_field(message: str, stacklevel: int = 1) -> None:
    """Warn about a field of a configuration; the message names the file that it comes from."""
    file = read_from.get()
    warnings.warn(message if file is None else f"{file}: {message}", stacklevel=stacklevel + 1)


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def check_dora_inputs(config: Any) -> None:
    """Raise unless `dora_inputs` is a bool, and False where there are no magnitudes."""
    check_bool("dora_inputs", config.dora_inputs)
    if config.dora_inputs and not config.use_dora:
        raise ValueError(
            "dora_inputs: says whose magnitudes use_dora gives; expected use_dora=True beside it, got False"
        )


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise unless `value` is an int (not a bool) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected an int from {low} to {high}, got {value}")


def check_number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """Raise unless `value` is a finite number in [low, high), or in (low, high] with `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    inside = low < value <= high if above else low <= value < high
    if not (math.isfinite(value) and inside):
        bounds = f"({low}, {high}]" if above else f"[{low}, {high})"
        raise ValueError(f"{name}: expected a finite number in {bounds}, got {shown(value)}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`, compared with its type."""
    if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
        raise ValueError(f"{name}: expected one of {', '.join(sorted(map(repr, choices)))}, got {shown(value)}")


def check_optional_str(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a string or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}: expected a string or None, got {shown(value)}")


def check_regex(name: str, value: str) -> None:
    """Raise ValueError unless `value` is a non-empty regular expression that can be matched in bounded time."""
    if not value:
        raise ValueError(f"{name}: expected a non-empty string")
    try:
        check_expression(value)
    except ValueError as error:
        raise ValueError(f"{name}: expected a regular expression, got {shown(value)}: {error}") from None


def check_list_name(name: str, value: str) -> None:
    """Raise ValueError unless `value` is the name of a list of layers, or a regular expression without repeats."""
    check_regex(name, value)
    if len(value) > 1000 or re.search(r"[*+{(]", value.replace("(?:", "")):
        raise ValueError(
            f"{name}: expected the name of a list of layers, such as 'layers', or several with '|' in between, got "
            f"{shown(value)}"
        )


def check_adapter_name(name: object) -> str:
    """Return `name`, or raise if it can name neither a parameter container nor a folder."""
    if not isinstance(name, str):
        raise TypeError(f"adapter_name: expected a string, got {name!r}")
    if (
        not name
        or any(c in name for c in "./\\\0")
        or any(hasattr(kind, name) for kind in (nn.ModuleDict, nn.ParameterDict))
    ):
        raise ValueError(
            f"adapter_name: expected a non-empty name without '.', '/' or '\\' that is no attribute of "
            f"nn.ModuleDict or nn.ParameterDict, got {name!r}"
        )
    return name


def check_names(name: str, value: object) -> None:
    """Raise unless `value` is a non-empty list, tuple or set of non-empty strings."""
    if isinstance(value, (str, bytes)) or not isinstance(value, (list, tuple, set, frozenset)):
        way_out = f"; write [{shown(value)}]" if isinstance(value, str) else ""
        raise TypeError(f"{name}: expected a list of module names, got {shown(value)}{way_out}")
    for item in value:
        if not isinstance(item, str) or not item:
            raise TypeError(f"{name}: expected non-empty strings, got {shown(item)}")


def check_patterns(config: PeftConfig, most_rank: int, most_alpha: float) -> None:
    """Check `rank_pattern` and `alpha_pattern`, and replace None by an empty dict."""
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        patterns = {} if patterns is None else patterns
        setattr(config, name, patterns)
        if not isinstance(patterns, dict):
            raise TypeError(f"{name}: expected a dict from name patterns to numbers, got {shown(patterns)}")
        config._check_keys(name)
        for key, value in patterns.items():
            if name == "rank_pattern":
                check_int(f"{name}[{shown(key)}]", value, 1, most_rank)
            else:
                check_number(f"{name}[{shown(key)}]", value, 0, most_alpha, above=True)


class Form(NamedTuple):
    """One of the methods that a class of configurations configures.

    Attributes:
        name: Its name.
        fields: Those of an adapter on a layer of 16 features.
        kinds: The kinds of layers on which it is another one than the others of the class; all of them if empty.
    """

    name: str
    fields: Mapping[str, Any]
    kinds: tuple[str, ...] = ()


class LayerInFile(NamedTuple):
    """The shape of a layer's weight, and those of the tensors that a file has for it, by the ends of their keys."""

    weight: tuple[int, ...]
    tensors: Mapping[str, torch.Size]


@dataclass
class PeftConfig(ConfigFiles):
    """The fields that every adapter configuration has; names and defaults are those of Hugging Face PEFT.

    Args:
        task_type: One of `TaskType` or None; classification and question answering also train the task head.
        peft_type: The method; set by the subclass.
        auto_mapping: Class and library of the base model, for information only: nothing is imported from it.
        peft_version: The PEFT release whose format the configuration follows.
        base_model_name_or_path: Where the base model came from, for information only.
        revision: The revision of the base model, for information only.
        inference_mode: Whether the adapter is created frozen.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has a value that no adapter can have.
        NotImplementedError: A field asks for a feature that this release does not have.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    _by_type: ClassVar[dict[str, type[PeftConfig]]] = {}
    _method: ClassVar[PeftType | None] = None
    # The fields that change what a trained tensor means: a file that disagrees must not be loaded over it.
    _meaning: ClassVar[tuple[str, ...]] = ()
    _never_in_file: ClassVar[frozenset[str]] = frozenset()
    # The fields that PEFT does not have. At their defaults they are left out, so that it reads files without a warning.
    _only_here: ClassVar[frozenset[str]] = frozenset()
    # Whether the method cannot stand beside another one in a model.
    _alone: ClassVar[bool] = False
    # How PEFT's code for the method tries a key of a field like `rank_pattern` on the path of a module: by `re.match`.
    _pattern: ClassVar[str] = PATTERN
    # What is adapted where no target is named, by the `model_type` of a transformers model, if not `DEFAULT_TARGETS`.
    _default_targets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # The methods that it configures, each with a small example, for what tries all of them on all layers.
    _forms: ClassVar[tuple[Form, ...]]

    if TYPE_CHECKING:
        # Code for all methods reads fields that only some of them have.
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init_subclass__(cls, method: PeftType | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if method is not None:
            cls._method = method
            PeftConfig._by_type[method.value] = cls

    def __post_init__(self) -> None:
        """Check every field; called by the dataclass."""
        if self.task_type is not None:
            if not isinstance(self.task_type, str) or self.task_type not in list(TaskType):
                raise ValueError(
                    f"task_type: expected one of {[t.value for t in TaskType]} or None, got {shown(self.task_type)}"
                )
            self.task_type = TaskType(self.task_type)
        if self._method is not None:
            if self.peft_type is not None and self.peft_type != self._method:
                raise ValueError(
                    f"peft_type: {type(self).__name__} is {self._method.value}, got {shown(self.peft_type)}"
                )
            self.peft_type = self._method
        if self.peft_version is None:
            self.peft_version = PEFT_FORMAT_VERSION
        for name in ("peft_version", "base_model_name_or_path", "revision"):
            check_optional_str(name, getattr(self, name))
        if self.auto_mapping is not None and not isinstance(self.auto_mapping, Mapping):
            raise TypeError(f"auto_mapping: expected a dict or None, got {shown(self.auto_mapping)}")
        check_bool("inference_mode", self.inference_mode)

    def _check_targets(self) -> None:
        for name, kind in (("target_modules", set), ("exclude_modules", set), ("modules_to_save", list)):
            value = getattr(self, name)
            if isinstance(value, str) and kind is set:
                check_regex(name, value)
            elif value is not None:
                check_names(name, value)
                setattr(self, name, kind(value))
        beside = getattr(self, "target_parameters", None)
        if isinstance(self.target_modules, set) and not self.target_modules and not beside:
            raise ValueError("target_modules: expected at least one module name, got an empty list")
        indices = self.layers_to_transform
        if indices is not None:
            for index in indices if isinstance(indices, (list, tuple)) else [indices]:
                check_int("layers_to_transform", index, 0, 1_000_000)
        patterns = self.layers_pattern
        if patterns is not None and not isinstance(patterns, str):
            check_names("layers_pattern", patterns)
        if patterns is not None and len(patterns) > MAX_LISTS and not isinstance(patterns, str):
            raise ValueError(f"layers_pattern: expected at most {MAX_LISTS} names, got {len(patterns)}")
        for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
            check_list_name("layers_pattern", pattern)
        if patterns and indices is None:
            raise ValueError("layers_pattern: needs layers_to_transform as well, which is None")
        if isinstance(self.target_modules, str) and indices is not None:
            raise ValueError(
                f"layers_to_transform: works with a list of target_modules only, got the pattern "
                f"{shown(self.target_modules)}"
            )

    def _check_keys(self, name: str) -> None:
        """Raise unless the keys of the field `name`, like `rank_pattern`, are expressions for names of modules."""
        patterns = getattr(self, name)
        for key in patterns:
            if not isinstance(key, str):
                raise TypeError(f"{name}: expected strings as keys, got {shown(key)}")
            if not key:
                raise ValueError(f"{name}: expected non-empty keys")
        try:
            keys_of(self._pattern, tuple(patterns))
        except ValueError as error:
            raise ValueError(f"{name}: key {error}") from None

    @classmethod
    def pattern_key(cls, patterns: Collection[str], module_name: str) -> str | None:
        """Return the key of a field like `rank_pattern` that counts for a module, by PEFT's rule, or None.

        It is the first one that matches, not the closest; if none does, the one that is the name itself.
        """
        if not patterns:
            return None
        found = keys_of(cls._pattern, tuple(patterns)).first(module_name)
        return module_name if found is None and module_name in patterns else found

    @classmethod
    def _of_module(cls, patterns: Mapping[str, Any] | None, module_name: str, default: Any) -> Any:
        """Return what a field like `rank_pattern` says of a module, or the default."""
        key = cls.pattern_key(patterns or (), module_name)
        return default if patterns is None or key is None else patterns.get(key, default)

    def unused_keys(self, patterns: Collection[str], module_names: Collection[str]) -> list[str]:
        """Return the keys of a field like `rank_pattern` that mean none of these modules, whatever other keys do."""
        keys = keys_of(self._pattern, tuple(patterns))
        used = set(module_names).union(*(keys.matching(name) for name in module_names))
        return sorted(key for key in patterns if key not in used)

    def _meant(self, name: str) -> Any:
        """Return what a field of `_meaning` says of trained tensors: values of one meaning are equal."""
        return getattr(self, name)

    @classmethod
    def _check_file(cls, values: Mapping[str, Any]) -> None:
        """Refuse, or warn about, a configuration file whose age changes its meaning."""

    def settle_with_file(self, shapes: Callable[[], Mapping[str, torch.Size]]) -> None:
        """Change what the tensors of the file, whose shapes `shapes` reads, show to be otherwise, with a warning."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values: sets as sorted lists, enumerations as strings."""
        result = {}
        for field in dataclasses.fields(self):
            value = copy.deepcopy(getattr(self, field.name))
            if field.name in self._only_here and value == field.default:
                continue
            if isinstance(value, Enum):
                value = value.value
            elif isinstance(value, (set, frozenset)):
                value = sorted(value)
            result[field.name] = value
        return result

    @classmethod
    def fields_of(cls, layers: Mapping[str, LayerInFile]) -> dict[str, Any]:
        """Return the fields that only the shapes of a file tell, of a program that writes no configuration.

        Args:
            layers: The path of a layer to its weight and tensors.

        Raises:
            ValueError: No values give these shapes.
        """
        return {}

    def file_values(self, adapted: Callable[[], Iterable[str]]) -> dict[str, Any]:
        """Return what the configuration file holds, for PEFT to read too; `adapted` names the adapted modules."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeftConfig:
        """Build the configuration that `values`, the content of an adapter_config.json, describes.

        Keys that this release does not know are dropped with one warning that names them.

        Raises:
            ValueError: `peft_type` is missing, unknown, or not this class's.
        """
        kind = values.get("peft_type")
        target = PeftConfig._by_type.get(kind) if isinstance(kind, str) else None
        if target is None:
            raise ValueError(f"peft_type: expected one of {sorted(PeftConfig._by_type)}, got {shown(kind)}")
        if not issubclass(target, cls):
            raise ValueError(f"peft_type: {cls.__name__} cannot hold a configuration of type {kind!r}")
        target._check_file(values)
        known = {field.name for field in dataclasses.fields(target)} - target._never_in_file
        unknown = sorted(set(values) - known)
        if unknown:
            warn_of_field(
                f"adapter configuration: these keys are not known to {target.__name__} and are ignored: "
                f"{shown(unknown)}",
                stacklevel=2,
            )
        return target(**{name: value for name, value in values.items() if name in known})

    @property
    def bias_mode(self) -> str:
        """Which biases of the base model are trained; "none" for a method that has no such field."""
        return getattr(self, "bias", "none")

    @property
    def _kind(self) -> str:
        """What messages call the method."""
        return type(self).__name__ if self.peft_type is None else PeftType(self.peft_type).value

    @property
    def is_prompt_learning(self) -> bool:
        """False: peftk has no prompt methods."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False, unless a subclass says otherwise."""
        return False


def refuse_unimplemented(config: PeftConfig, names: Iterable[str]) -> None:
    """Raise NotImplementedError for the first of `names` whose value differs from its default."""
    defaults = {f.name: f for f in dataclasses.fields(config)}
    for name in names:
        field = defaults[name]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(config, name)
        # An empty dict where the default is None asks for the feature with its own defaults.
        empty = value is None or value is False or (isinstance(value, (list, tuple, set)) and not value)
        if not empty and (type(value) is not type(default) or value != default):
            raise NotImplementedError(
                f"{name}={shown(value)}: {type(config).__name__} does not implement this field yet; leave it at "
                f"{default!r}"
            )


__all__ = ["PEFT_FORMAT_VERSION", "PeftConfig", "PeftType", "TaskType"]
