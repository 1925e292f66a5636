"""Which modules of a model a configuration names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import nn

from ..checkpoint.container import LISTED, shown
from ..checkpoint.patterns import matcher
from ..methods._base_layer import kind_of
from ..nn import layer_class_for
from ..nn.base.adapter_layer import AdapterLayer
from ..nn.base.config import PeftConfig, TaskType, warn_of_field
from ..nn.base.kinds import QUANTISERS, quantised_by
from ..nn.base.saved import ModulesToSaveWrapper
from ..nn.base.walking import all_modules
from .names import is_inside, named_children, named_modules, unwrapped, without_wrappers

_QV = ("q_proj", "v_proj")
_FUSED = ("query_key_value",)

DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    # Renamed in transformers 5; names that a model does not have are left out.
    **dict.fromkeys(("vit", "dinov2"), ("query", "value", *_QV)),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"), _QV),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), _FUSED),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", *_QV),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "phi": (*_QV, "fc1", "fc2"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
"""What is adapted when a configuration names no target, by the `model_type` of a transformers model."""

ALL_LINEAR = "all-linear"
MOST_ENDINGS = 20
# Finding the nearest of very many names is not worth the time.
MOST_COMPARED, MOST_LETTERS = 2_000, 200
# The output projection of nn.MultiheadAttention, which reads its weight and never calls it.
_NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear
HEADS: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""The task heads that are trained and saved in full, by task."""


_RENAMED = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
"""What transformers has renamed in some models, such as DINOv2 and ViT."""


def closest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Return the candidates nearest to `name`: whole names, and the endings that a configuration may use."""
    endings = {ending for candidate in candidates for ending in _endings(candidate)}
    compared = sorted(endings, key=lambda ending: (len(ending), ending))[:MOST_COMPARED]
    return difflib.get_close_matches(name[:MOST_LETTERS], sorted(compared), n=count, cutoff=0.5)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts)) if not parts[i].isdigit()]


def _suffixes(key: str) -> list[str]:
    """Return the name itself and its endings after a dot."""
    parts = key.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def unknown_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names that are neither names of modules nor their endings."""
    return set(names) - {suffix for key in candidates(model) for suffix in _suffixes(key)}


def _selector(spec: Iterable[str] | str) -> Callable[[str], bool]:
    """Return the test whether a name of a module is meant: by its whole by an expression, by its ending by a list."""
    if isinstance(spec, str):
        return matcher(spec)
    names = frozenset(spec)
    return lambda key: not names.isdisjoint(_suffixes(key))


def _unless_excluded(config: PeftConfig) -> Callable[[str], bool]:
    """Return the test whether a name is neither in `exclude_modules` nor in a module that is trained in full."""
    excluded = _selector(config.exclude_modules or ())
    saved = frozenset(config.modules_to_save or ())

    def kept(key: str) -> bool:
        if excluded(key):
            return False
        parts = key.split(".") if saved else []
        inner = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
        return saved.isdisjoint(inner)

    return kept


def _in_layers(config: PeftConfig) -> Callable[[str], bool]:
    """Return the test whether a name lies in one of the layers of `layers_to_transform`."""
    indices = config.layers_to_transform
    if indices is None or (isinstance(indices, (list, tuple)) and not indices):
        return lambda key: True
    wanted = frozenset(indices if isinstance(indices, (list, tuple)) else [indices])
    names = config.layers_pattern
    if not names:
        # PEFT's rule, which needs something before the list; a list at the top of the model is found second.
        texts = [r".*?\.[^.]*\.(?P<index>\d+)\.", r"[^.]*\.(?P<index>\d+)\."]
    else:
        texts = [rf"(?:^|.*?\.)(?:{p})\.(?P<index>\d+)\." for p in ([names] if isinstance(names, str) else names)]
    expressions = [re.compile(text) for text in texts]

    def inside(key: str) -> bool:
        found = next((match for match in (e.match(key) for e in expressions) if match), None)
        return found is not None and int(found["index"]) in wanted

    return inside


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that may be targeted: every named module but the insides of adapted layers.

    Names are those of the model without wrappers, such as activation checkpointing puts around its blocks.
    """
    result: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    stack = [("", unwrapped(model))]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        if name:
            result[name] = module
        if isinstance(module, AdapterLayer) and isinstance(module.base_layer, AdapterLayer):
            stack.append((f"{name}.base_layer", module.base_layer))
        elif name and isinstance(module, (AdapterLayer, ModulesToSaveWrapper)):
            # What such a layer wraps has no second name either, where something else holds it too.
            wrapped = module.base_layer if isinstance(module, AdapterLayer) else module
            seen.update(all_modules(wrapped) if wrapped._modules else (wrapped,))
        else:
            stack += named_children(name, module)
    return result


def places(model: nn.Module) -> dict[int, list[str]]:
    """Map the id of every module to where other modules hold it: more than one path if several hold the same object."""
    result: dict[int, list[str]] = {}
    for path, parent in named_modules(model):
        for name, child in parent._modules.items():
            if child is not None:
                result.setdefault(id(unwrapped(child)), []).append(f"{path}.{name}" if path else name)
    return result


def model_type(model: nn.Module) -> str | None:
    """Return the `model_type` of a transformers model, or None."""
    config = getattr(unwrapped(model), "config", None)
    kind = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return kind if isinstance(kind, str) else None


def fill_default_targets(model: nn.Module, config: PeftConfig) -> None:
    """Set `config.target_modules` if it is None or "all-linear".

    Raises:
        ValueError: The model's type has no default.
    """
    spec = config.target_modules
    if spec is None:
        kind = model_type(model)
        spec = {**DEFAULT_TARGETS, **config._default_targets}.get(kind) if kind else None
        if spec is None:
            raise ValueError(
                f"target_modules: None, and there is no default for model type {kind!r}. Please specify "
                f'`target_modules`: the names of the modules to adapt, or "{ALL_LINEAR}"'
            )
        present = candidates(model)
        config.target_modules = (
            spec if isinstance(spec, str) else {*spec} & {suffix for key in present for suffix in _suffixes(key)}
        )
        if not config.target_modules:
            raise ValueError(f"target_modules: the default {sorted(spec)} of model type {kind!r} is not in this model")
    elif isinstance(spec, str) and spec.lower() == ALL_LINEAR:
        config.target_modules = _all_linear(model, config)


def _all_linear(model: nn.Module, config: PeftConfig) -> set[str]:
    model, heads = unwrapped(model), []
    if callable(output := getattr(model, "get_output_embeddings", None)):
        heads.append(output())
    if all(head is None for head in heads) and config.task_type == TaskType.SEQ_CLS:
        heads = [getattr(model, name, None) for name in HEADS[TaskType.SEQ_CLS]]
    names = {
        name
        for name, module in candidates(model).items()
        if kind_of(module.base_layer if isinstance(module, AdapterLayer) else module) in ("Linear", "Conv1D")
        and not isinstance(module, _NEVER_CALLED)
        if not any(module is head for head in heads)
    }
    if not names:
        raise ValueError(f'target_modules: "{ALL_LINEAR}", but the model has no linear layer besides its head')
    return names


def resolve(model: nn.Module, config: PeftConfig, *, strict: bool = True) -> list[str]:
    """Return the names of the modules that `config` adapts, in the order of the model.

    Fills in `config.target_modules` where it is None or "all-linear".

    Args:
        model: The model, adapted or not.
        config: The configuration.
        strict: Refuse a target name that matches no module even if another one does. A configuration file may
            name modules that only other models of its family have.

    Raises:
        ValueError: Nothing is matched, or with `strict` one of the names matches nothing; the message names the
            closest modules.
        TypeError: A matched module is of a kind that cannot be adapted.
    """
    modules = candidates(model)
    if hasattr(config, "find_targets"):
        kept = config.find_targets(model_type(model), modules)
    else:
        kept = _named_targets(model, config, modules, strict)
    for key in kept:
        if not isinstance(modules[key], AdapterLayer):
            layer_class_for(config, modules[key], key)
    return kept


def _named_targets(model: nn.Module, config: PeftConfig, modules: dict[str, nn.Module], strict: bool) -> list[str]:
    if not config.target_modules and getattr(config, "target_parameters", None):
        return []
    fill_default_targets(model, config)
    if not isinstance(config.target_modules, str):
        config.target_modules = {without_wrappers(name) for name in config.target_modules}
    if strict and not isinstance(config.target_modules, str):
        config.target_modules = _renamed(model, config.target_modules)
    spec = config.target_modules
    by_name = list(filter(_selector(spec), modules))
    unknown = []
    if not isinstance(spec, str):
        unknown = sorted(unknown_names(model, spec))
    if unknown and (strict or not by_name):
        said = _same_module(model, modules, unknown) or f"not in the model: {describe_unknown(unknown, modules)}"
        if not by_name:
            raise ValueError(f"target_modules: {said}")
        # As in PEFT: lists of names are written for whole families of models.
        warn_of_field(f"target_modules: {said}; the other names are adapted", stacklevel=2)
    if not by_name:
        raise ValueError(f"target_modules: {_unmatched(spec, modules)}")
    if config.exclude_modules and not any(map(_selector(config.exclude_modules), by_name)):
        warn_of_field(
            f"exclude_modules: {shown(config.exclude_modules)} matches none of the {len(by_name)} targeted modules, so "
            "nothing is left out; a string is one pattern for the whole name, a list holds names or their endings",
            stacklevel=2,
        )
    # A whole name says which layer it means; endings leave that to `layers_to_transform`.
    whole = () if isinstance(spec, str) else spec
    allowed, in_layers = _unless_excluded(config), _in_layers(config)
    kept = [key for key in by_name if allowed(key) and (key in whole or in_layers(key))]
    if not kept:
        raise ValueError(
            f"target_modules: all {len(by_name)} matched modules are left out by exclude_modules="
            f"{shown(config.exclude_modules)}, modules_to_save={shown(config.modules_to_save)}, layers_to_transform="
            f"{shown(config.layers_to_transform)} or layers_pattern={shown(config.layers_pattern)}"
        )
    return kept


def _same_module(model: nn.Module, modules: dict[str, nn.Module], unknown: list[str]) -> str | None:
    """Say that an unknown name is a second one of a module, if it is."""
    meant = _selector(unknown)
    for paths in places(model).values():
        other = next((path for path in paths if path not in modules and meant(path)), None)
        if other is not None and paths[0] in modules:
            return f"{other!r} is the same module as {paths[0]!r}, under which name it is adapted"
    return None


def _renamed(model: nn.Module, names: Collection[str]) -> set[str]:
    """Return names with the new ones of what transformers has renamed in the model, with a warning."""
    unknown = unknown_names(model, names)
    new = {name: _RENAMED[name] for name in unknown & _RENAMED.keys()}
    absent = unknown_names(model, new.values())
    new = {name: other for name, other in new.items() if other not in absent}
    if new:
        warn_of_field(
            "target_modules: transformers has renamed "
            + ", ".join(f"{name!r} to {other!r}" for name, other in sorted(new.items()))
            + " in this model; the new names are used",
            stacklevel=2,
        )
    return {new.get(name, name) for name in names}


def _unmatched(pattern: str, modules: dict[str, nn.Module]) -> str:
    """Say that a pattern matches no module, and what to write if it was meant as a name."""
    said = f"a string is one pattern for a whole name, and {shown(pattern)} matches no module"
    names = [name for name in re.split(r"[,|\s]+", pattern) if name]
    if names and {*names} <= {suffix for key in modules for suffix in _suffixes(key)}:
        return (
            f"{said}; for the modules with {'this name' if len(names) == 1 else 'these names'} pass the list {names!r}"
        )
    if re.fullmatch(r"[\w.]+", pattern):
        return f"{said}; pass a list of names: {describe_unknown([pattern], modules)}"
    return f"{said}; {_inventory(modules)}"


def describe_unknown(names: Iterable[str], known: Iterable[str]) -> str:
    """Return "'qurey' (closest: query)" for each name; where nothing is like it, say what there is.

    Args:
        names: What is not among `known`.
        known: The names that exist. If they come with their modules, only the layers among them are listed.
    """
    names = list(names)
    parts, alien = [], False
    for name in names[:LISTED]:
        near = closest(name, known)
        alien = alien or not near
        parts.append(f"{name!r} (closest: {', '.join(near)})" if near else f"{shown(name)} (nothing is named like it)")
    if len(names) > LISTED:
        parts.append(f"and {len(names) - LISTED} more")
    return "; ".join(parts) + (f"; {_inventory(known)}" if alien else "")


def _inventory(known: Iterable[str]) -> str:
    """Say which names there are; of modules, by the last part of their names, which layers."""
    if not isinstance(known, Mapping) or not all(isinstance(value, nn.Module) for value in known.values()):
        names = [str(name) for name in known]
        return f"there {'is' if len(names) == 1 else 'are'} {_some(names)}" if names else "there is none"
    kinds: dict[str, dict[str, int]] = {}
    for path, module in known.items():
        kind = kind_of(module.base_layer if isinstance(module, AdapterLayer) else module)
        if kind is not None:
            last = path.rpartition(".")[2]
            kinds.setdefault(kind, {}).setdefault(last, 0)
            kinds[kind][last] += 1
    found = kinds.pop("Linear", {}) | kinds.pop("Conv1D", {})
    if found:
        return f"the linear layers of the model end in {_some(found)}"
    if not kinds:
        return "the model has no linear layer"
    return "the model has no linear layer; " + "; ".join(f"its {k} layers end in {_some(v)}" for k, v in kinds.items())


def _some(names: Collection[str]) -> str:
    """Return the first names, and how many are left out."""
    listed = list(names)[:MOST_ENDINGS]
    left = len(names) - len(listed)
    return ", ".join(listed) + (f" and {left} more" if left else "")


def resolve_saved(model: nn.Module, config: PeftConfig, asked: Iterable[str]) -> list[str]:
    """Return the names of the modules that `config.modules_to_save` means, by PEFT's rule: any name ending.

    Args:
        model: The model, adapted or not.
        config: The configuration.
        asked: The names that must match something; task heads that a model may or may not have are not among them.

    Raises:
        ValueError: One of `asked` matches nothing.
        TypeError: A matched module is a container or an adapted layer.
    """
    modules = candidates(model)
    asked, names = {*asked}, {*(getattr(config, "modules_to_save", None) or ())}
    # By their lengths, of which there are few: every name against every module would be their product.
    lengths = {len(name) for name in (*asked, *names)}
    endings = {key: {key[len(key) - n :] for n in lengths if n <= len(key)} for key in modules}
    unknown = sorted(asked.difference(*endings.values()))
    if unknown:
        raise ValueError(f"modules_to_save: not in the model: {describe_unknown(unknown, modules)}")
    matched = {key: None for key, ends in endings.items() if not names.isdisjoint(ends)}
    # A module inside one that is saved already is saved with it.
    found = [key for key in matched if not is_inside(key, matched)]
    for key in found:
        module = modules[key]
        containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList, AdapterLayer)
        if isinstance(module, containers):
            raise TypeError(
                f"modules_to_save: module {key!r} is a {type(module).__name__}, which cannot be saved whole"
            )
        for name, part in module.named_modules():
            if quantised_by(part) in QUANTISERS:
                raise TypeError(
                    f"modules_to_save: the weight of {'.'.join(filter(None, (key, name)))!r} is quantised "
                    f"({quantised_by(part)}), so it cannot be trained; keep that module in full precision"
                )
    return found
