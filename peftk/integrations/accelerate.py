"""`peftk.accelerate`: the layers of another library's model, or of a process, on this package's arithmetic."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from typing import Any

from torch import Tensor, nn

from ..nn.base.undo import undone_if_interrupted
from ..runtime.registry import explain
from .exchange import switch_off, wrapped
from .fingerprints import name_of
from .report import Report, Row, restorer
from .way import Way, forward_of
from .ways import way_of

LIBRARIES = {
    "peft": ("hf_peft", "peft", "peft"),
    "lycoris": ("lycoris", "lycoris-lora", "lycoris.modules.base"),
    "adapters": ("adapterhub", "adapters", "adapters.methods.lora"),
}
"""The libraries, the packages here that know them, the names that they are installed by, and a module that whoever has
made their layers has imported; somebody may have a module of his own called `adapters`."""

_lock = threading.RLock()
_patched: dict[type[nn.Module], tuple[Any, Any, Way]] = {}
"""The classes whose `forward` is replaced, what stood in their own dictionary, what stands there now, and its way."""


def accelerate(target: nn.Module | str, *, correct: bool = False, strict: bool = False, force: bool = False) -> Report:
    """Run the adapter layers of Hugging Face PEFT, or the modules of LyCORIS's networks, on this package's kernels.

    The parameters, names, files, merging, switching and everything else stay the library's. A layer gets a subclass of
    its class that differs in `forward` alone. A call that this package does not take (a batch that mixes adapters,
    hooks on an adapter's modules, ...) runs in the library's own code, as before.

    Args:
        target: A model with PEFT's layers, a network of LyCORIS or a model that one is applied to; or "peft" or
            "lycoris", for the classes themselves: all layers of this process, those that are made later too, and all
            networks that are applied later.
        correct: Give this package's values where those of PEFT are wrong: OFT on convolutions with kernels larger than
            1 x 1, and several C3A adapters at once. Otherwise such layers run in PEFT's own code.
        strict: Raise if a layer cannot be accelerated, and change nothing.
        force: Go on with versions of the library whose functions are not known.

    Returns:
        A `Report`: ``print`` it, and call its ``restore()`` to undo everything.

    Raises:
        ImportError: The library is not installed.
        TypeError: `target` is neither a module nor a name.
        ValueError: The model has no layers of either library, or `target` is no library that is known.
        RuntimeError: `strict`, and a layer runs in the library's own code.

    Example:
        >>> import peft, peftk, torch  # doctest: +SKIP
        >>> model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))  # doctest: +SKIP
        >>> print(peftk.accelerate(model))  # doctest: +SKIP
    """
    if isinstance(target, str):
        if target not in LIBRARIES:
            raise ValueError(f"target: expected a model or one of {', '.join(map(repr, LIBRARIES))}; got {target!r}")
        with _lock:
            return _classes(_library(target), correct=correct, strict=strict, force=force)
    if not isinstance(target, nn.Module):
        raise TypeError(
            f"target: expected a torch.nn.Module with layers of PEFT or LyCORIS, or one of "
            f"{', '.join(map(repr, LIBRARIES))}; "
            f"got {type(target).__name__}"
        )
    with _lock:
        return _model(target, correct=correct, strict=strict, force=force)


def _library(name: str) -> Any:
    package, distribution, module = LIBRARIES[name]
    if not _installed(name, module):
        raise ImportError(f"peftk.accelerate: {name} is not installed; run `pip install {distribution}`", name=name)
    return importlib.import_module(f"..{package}.library", __name__)


def _installed(name: str, module: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None and importlib.util.find_spec(module) is not None
    except ValueError:
        # Something without a specification is in its place, as AdapterHub puts there.
        return module in sys.modules
    except ImportError:
        # Another module has its name.
        return False


def _model(model: nn.Module, *, correct: bool, strict: bool, force: bool) -> Report:
    # Whoever has made layers of a library has imported it.
    there = [name for name, (*_, module) in LIBRARIES.items() if module in sys.modules]
    libraries = [_library(name) for name in there or ["peft"]]
    found = {library: list(library.layers_of(model)) for library in libraries}
    if not any(found.values()):
        own = any(type(module).__module__.startswith("peftk.") for module in model.modules())
        make = " or ".join(library.MAKE for library in libraries)
        hint = "it has peftk's own layers, which are fast already" if own else f"call {make} first, with such a method"
        names = " or ".join(library.SHOWN for library in libraries)
        raise ValueError(
            f"target: expected a model with layers of {names} of a method that is accelerated, got "
            f"{type(model).__name__} without; {hint}"
        )
    rows: list[Row] = []
    chosen: list[tuple[Any, nn.Module, Way]] = []
    backends: dict[Any, str | None] = {}
    ways: dict[type, Way | str] = {}
    for library, layers in found.items():
        for path, layer in layers:
            owner, cls = library.holder(layer)
            if cls not in ways:
                ways[cls] = way_of(library, name_of(cls), correct, force)
            way = library.foreign(layer) or ways[cls]
            rows.append(_look(path, _written(cls), owner, way, backends))
            # What is left to its library for its state alone may get another state.
            if isinstance(way, Way):
                chosen.append((library, layer, way))
    _check(rows, strict)
    before = [library.state(layer) for library, layer, _ in chosen]
    with undone_if_interrupted(lambda: [put_back() for put_back in before]):
        for library, layer, way in chosen:
            library.exchange(layer, way)
    undo = [restorer([layer for _, layer in layers], library.restore) for library, layers in found.items()]
    return Report(type(model).__name__, rows, lambda: sum(one() for one in undo))


def _look(path: str, kind: str, owner: Any, way: Way | str, backends: dict[Any, str | None]) -> Row:
    reason: Any = way
    if isinstance(way, Way):
        found = way.adapters(owner, None)
        if type(found) is list:
            return Row(path, kind, way.operator, _backend(owner, way, found, backends), way.note(owner))
        reason = found
    return Row(path, kind, None, None, reason)


def _backend(owner: Any, way: Way, adapters: list[Any], backends: dict[Any, str | None]) -> str | None:
    args = way.example(owner, adapters)
    if args is None:
        return None
    key = (way.operator, *((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in args))
    if key not in backends:
        backends[key] = explain(way.operator, *args).chosen
    return backends[key]


def _written(cls: type[nn.Module]) -> str:
    # As in PEFT's repr: the tuner and the class.
    parts = cls.__module__.split(".")
    return f"{parts[2]}.{cls.__name__}" if len(parts) > 2 else cls.__name__


def _check(rows: list[Row], strict: bool) -> None:
    left = [row for row in rows if not row.accelerated]
    if strict and left:
        first = "; ".join(f"{row.name} ({row.kind}): {row.reason}" for row in left[:3])
        raise RuntimeError(
            f"strict: {len(left)} of {len(rows)} cannot be accelerated, and nothing was changed; {first}"
            + ("; ..." if len(left) > 3 else "")
        )


def _classes(library: Any, *, correct: bool, strict: bool, force: bool) -> Report:
    rows, chosen = [], []
    for name, cls in library.classes():
        way = way_of(library, name, correct, force)
        if isinstance(way, Way):
            rows.append(Row(_written(cls), _written(cls), way.operator, None, None))
            chosen.append((cls, way))
        else:
            rows.append(Row(_written(cls), _written(cls), None, None, way))
    _check(rows, strict)
    fresh = [cls for cls, _ in chosen if cls not in _patched]

    def undo() -> int:
        with _lock:
            return sum(_unpatch(cls) for cls, _ in chosen)

    with undone_if_interrupted(lambda: [_unpatch(cls) for cls in fresh]):
        for cls, way in chosen:
            _patch(cls, way)

    return Report(library.NAME, rows, undo)


def _patch(cls: type[nn.Module], way: Way) -> None:
    if cls in _patched:
        _, mine, before = _patched[cls]
        if before == way and cls.__dict__.get("forward") is mine:
            return
        _unpatch(cls)
    mine = wrapped(forward_of(cls), way)
    # Noted first: an interruption leaves nothing that nobody can undo.
    _patched[cls] = cls.__dict__.get("forward"), mine, way
    cls.forward = mine


def _unpatch(cls: type[nn.Module]) -> bool:
    if cls not in _patched:
        return False
    own, mine, _ = _patched[cls]
    switch_off(mine)
    # Otherwise somebody else has replaced it since, and undoes that himself.
    stands = cls.__dict__.get("forward") is mine
    if stands and own is None:
        # It inherits its `forward`.
        del cls.forward
    elif stands:
        cls.forward = own
    del _patched[cls]
    return stands
