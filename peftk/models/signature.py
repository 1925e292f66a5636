"""Classes of adapted models that tell which arguments the base model takes."""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T", bound=nn.Module)
_classes: weakref.WeakKeyDictionary[type, dict[type, type]] = weakref.WeakKeyDictionary()


def with_signature_of(cls: type[T], base: type[nn.Module]) -> type[T]:
    """Return a subclass of `cls` whose `forward` has the signature of `base.forward`.

    Tools look at the signature to find the inputs and the labels of a model; some of them, transformers.Trainer for
    one, look at the class and not at the object. `cls` itself is returned if it defines no `forward` of the open form
    (*args, **kwargs), or if the signature of the base cannot be known.
    """
    subclasses = _classes.setdefault(base, {})
    if cls not in subclasses:
        subclasses[cls] = _make(cls, base)
    return subclasses[cls]


def _make(cls: type[T], base: type[nn.Module]) -> type[T]:
    forward = cls.forward
    kinds = [p.kind for p in inspect.signature(forward).parameters.values()][1:]
    is_open = kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]
    try:
        signature = inspect.signature(base.forward)
    except (TypeError, ValueError):
        return cls
    if not is_open or not isinstance(forward, types.FunctionType):
        return cls
    # A copy, because a signature belongs to a function; a function around this one would cost every call a frame.
    twin = types.FunctionType(forward.__code__, forward.__globals__, "forward", None, forward.__closure__)
    twin.__doc__, twin.__module__ = forward.__doc__, forward.__module__
    twin.__qualname__ = forward.__qualname__
    twin.__dict__["__signature__"] = signature
    name = f"{cls.__name__}[{base.__name__}]"
    # A saved trace names the class in a grammar without brackets.
    scripted = f"__torch__.{cls.__module__}.{cls.__name__}"
    contents = {"__module__": cls.__module__, "_public_class": cls, "_jit_override_qualname": scripted}
    return type(name, (cls,), contents | {"forward": twin})


def restore(cls: type[T], base: type[nn.Module]) -> T:
    """Return an empty object of the class for `base`, for copies and pickles to fill."""
    kind = with_signature_of(cls, base)
    return kind.__new__(kind)


def refuse_forward_of_trl(forward: Any) -> None:
    """Raise TypeError for the `forward` by which trainers of TRL replace that of a model that is not PEFT's.

    It calls `base_model` for hidden states, which of an adapted model is the whole model.
    """
    function = getattr(forward, "__func__", forward)
    if getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] == "trl":
        raise TypeError(
            "model: trainers of TRL expected a model of Hugging Face PEFT, got one of peftk; make it with "
            "peft.get_peft_model (or give the trainer a peft_config of PEFT) and call peftk.accelerate(model), or "
            'peftk.accelerate("peft") before: the adapters then run on peftk\'s kernels'
        )
