"""Operators and backends: how an operator is defined, and which backend runs a call.

An operator is one schema in the ``peftk::`` namespace with one implementation for all devices. That
implementation chooses a backend when it runs, inside the opaque operator, so ``torch.compile`` never sees the
choice and switching backends needs no recompilation. A backend is a package of `PACKAGES` with a module for each
family, imported here by name when it is first asked for; its functions carry the operator's name and exact signature,
and a function ``<operator>_supports`` beside them returns None or the reason why this call cannot run there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import settings, timings

logger = logging.getLogger("peftk")

_library = torch.library.Library("peftk", "DEF")
OPERATORS: dict[str, Operator] = {}
TRITON_FIRST = ("triton", "native", "torch")
"""The order on GPUs of operators whose Triton kernels were measured to be faster than those in CUDA C++ on an H200: by
more than `timings.TIE` on the device, and without losing as much to the slower launches of Triton."""
PACKAGES = {"torch": "peftk.kernels.torch", "native": "peftk.kernels.native", "triton": "peftk.triton_kernels"}


@functools.cache
def backend_module(backend: str, family: str) -> ModuleType | str:
    """Import one backend's module of a family, or return the reason why it is not there."""
    name = PACKAGES[backend]
    try:
        if (unavailable := getattr(importlib.import_module(name), "unavailable", None)) and (reason := unavailable()):
            return reason
        return importlib.import_module(f"{name}.{family}")
    except ImportError as error:
        if error.name == f"{name}.{family}":
            return f"family {family!r} has no {backend} kernels"
        if error.name == name:
            return f"the package {name} is missing; install peftk anew"
        return f"{backend} cannot be imported: {error}"


@dataclass(frozen=True)
class Candidate:
    """One backend's answer to a call: whether it can run it, and how fast it was measured to be."""

    backend: str
    reason: str | None
    microseconds: float | None


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, which could, and why the others cannot."""

    operator: str
    chosen: str | None
    why: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen or 'no backend'} ({self.why})"]
        for c in self.candidates:
            speed = "not measured" if c.microseconds is None else f"{c.microseconds:.1f} us when tuned"
            lines.append(f"  {c.backend:<7} {'can run, ' + speed if c.reason is None else 'no: ' + c.reason}")
        return "\n".join(lines)


@dataclass(eq=False)
class Operator:
    """One operator of the ``peftk::`` namespace and the backends that may run it.

    Attributes:
        name: the operator's name, without the namespace.
        family: the file name of the family in every layer.
        bucket: maps the arguments to the tuple of integers that names a cell of the tuned table.
        prepare: maps the public function's arguments to the operator's; checks and casts them.
        finish: takes a backend's result and the arguments and returns the operator's result: what no backend is left to
            decide by itself.
        on_gpus: the order in which an untuned call on a GPU prefers backends.
    """

    name: str
    family: str
    bucket: Callable[..., tuple[Any, ...]]
    prepare: Callable[..., tuple[Any, ...]] | None = None
    finish: Callable[..., Any] | None = None
    on_gpus: tuple[str, ...] = settings.BACKENDS
    _kernels: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None] | str] = field(default_factory=dict)
    _stepped_down: set[str] = field(default_factory=set)

    def kernel(self, backend: str) -> tuple[Callable[..., Any], Callable[..., Any] | None] | str:
        """Return a backend's function and predicate, or the reason why it has none."""
        found = self._kernels.get(backend)
        if found is None:
            module = backend_module(backend, self.family)
            if isinstance(module, str):
                found = module
            elif not hasattr(module, self.name):
                found = f"{backend} has no kernel for {self.name}"
            else:
                found = getattr(module, self.name), getattr(module, f"{self.name}_supports", None)
            self._kernels[backend] = found
        return found

    def function(self, backend: str) -> Callable[..., Any]:
        """Return a backend's function, which must be there."""
        kernel = self.kernel(backend)
        assert not isinstance(kernel, str), kernel
        return kernel[0]

    def reason(self, backend: str, args: tuple[Any, ...]) -> str | None:
        """Return None if a backend can run the call, else why it cannot."""
        kernel = self.kernel(backend)
        if isinstance(kernel, str):
            return kernel
        return None if kernel[1] is None else kernel[1](*args)

    def select(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """Return the function that runs a call.

        Raises:
            RuntimeError: if a backend was named and cannot run it; the message lists every reason.
        """
        # Every call walks through here, and finds no frame of Python that it can do without.
        asked = settings.backend() if settings.choice.open else settings.backend_of_environment()
        if asked != "auto":
            if (reason := self.reason(asked, args)) is None:
                return self.function(asked)
            raise RuntimeError(
                f"backend: expected one that can run {self.name}; got {asked!r}, which cannot: {reason}\n"
                + str(self.explain(args))
            )
        cells = timings.cells_of(self.name, args[0].device)
        measured = None if cells is None else cells.get(timings.cell(args, self.bucket))
        # What `reason` and `function` do.
        for backend in measured or (self.on_gpus if args[0].is_cuda else settings.BACKENDS):
            kernel = self._kernels.get(backend) or self.kernel(backend)
            if isinstance(kernel, str):
                reason = kernel
            else:
                reason = None if kernel[1] is None else kernel[1](*args)
                if reason is None:
                    return kernel[0]
            if measured is None and reason not in self._stepped_down:
                self._stepped_down.add(reason)
                logger.info("%s: %s is not used: %s", self.name, backend, reason)
        return self.function("torch")

    def explain(self, args: tuple[Any, ...]) -> Explanation:
        """Say what `select` does for these arguments, and why."""
        measured = timings.lookup(self.name, args, self.bucket)
        order = self.on_gpus if args[0].is_cuda else settings.BACKENDS
        candidates = tuple(Candidate(b, self.reason(b, args), (measured or {}).get(b)) for b in order)
        able = [c.backend for c in candidates if c.reason is None]
        asked = settings.backend()
        if asked != "auto":
            return Explanation(self.name, asked if asked in able else None, "named by the user", candidates)
        if measured is None:
            return Explanation(self.name, able[0], "untuned: the first that can run", candidates)
        chosen = next((b for b in measured if b in able), "torch")
        owner = timings.measured_on(self.name, args, self.bucket)
        own = owner == timings.device_class(args[0].device.type, args[0].device.index)
        which = "tuned table" if own else f"tuned table of {owner}, the nearest class that has one"
        return Explanation(self.name, chosen, f"the fastest in the {which}, or as good", candidates)

    def __call__(self, *args: Any) -> Any:
        """Choose a backend and run it; this is what the dispatcher calls."""
        result = self._run(self.select(args), args)
        return result if self.finish is None else self.finish(result, *args)

    def differentiable(self, args: tuple[Any, ...]) -> Any:
        """Run the operator in plain PyTorch, which autograd records."""
        result = self._run(self.function("torch"), args)
        return result if self.finish is None else self.finish(result, *args)

    def _run(self, kernel: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if torch._C._is_any_autocast_enabled():
            # The public function has cast the operands. Autocast would cast them again, and CPU autocast
            # crashes in-place products of mixed dtypes.
            device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
            with torch.autocast(device, enabled=False):
                return kernel(*args)
        return kernel(*args)


_differentiable = threading.local()


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Let operators on tensors that require grad run in plain PyTorch here, where they otherwise refuse to run."""
    before = is_differentiable()
    _differentiable.on = True
    try:
        yield
    finally:
        _differentiable.on = before


def is_differentiable() -> bool:
    """Whether operators are differentiable here."""
    return getattr(_differentiable, "on", False)


_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter, bool, int, float, list, type(None), torch.dtype))


def define(
    family: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    flops: Callable[..., Any],
    bucket: Callable[..., tuple[Any, ...]],
    prepare: Callable[..., tuple[Any, ...]] | None = None,
    finish: Callable[..., Any] | None = None,
    on_gpus: tuple[str, ...] = settings.BACKENDS,
) -> Any:
    """Define an operator and return the function that calls it.

    Args:
        family: the file name of the family in every layer.
        schema: name, arguments and results in torch's schema language.
        fake: the operator on fake tensors: shapes, dtypes and devices of the results.
        flops: the number of floating-point operations, from the shapes of the arguments.
        bucket: see `Operator`.
        prepare: see `Operator`.
        finish: see `Operator`.
        on_gpus: see `Operator`.
    """
    name = schema.partition("(")[0]
    operator = OPERATORS[name] = Operator(name, family, bucket, prepare, finish, on_gpus)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, operator, "CompositeExplicitAutograd")
    overload = getattr(torch.ops.peftk, name).default
    torch.library.register_fake(f"peftk::{name}", fake, lib=_library)
    register_flop_formula(getattr(torch.ops.peftk, name))(flops)

    def refuse_autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            if is_differentiable():
                return operator.differentiable(args)
            raise RuntimeError(
                f"peftk::{name} is not differentiable by itself: call peftk.functional."
                f"{name.removesuffix('_backward')}, or detach the arguments"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    _library.impl(name, refuse_autograd, "Autograd")

    def call(*args: Any) -> Any:
        # The dispatcher costs 9 us a call from Python. It is skipped where nothing listens to it: no compiler, mode,
        # transform, profiler or tensor subclass.
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._are_functorch_transforms_active()
            or torch._C._autograd._profiler_enabled()
            or torch.is_grad_enabled()
            or not _PLAIN_TYPES.issuperset(map(type, args))
        ):
            return overload(*args)
        if finish is not None or torch._C._is_any_autocast_enabled():
            return operator(*args)
        return operator.select(args)(*args)

    return call


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call ``function.apply`` without the cost of binding default arguments, where nothing needs it.

    ``Function.apply`` binds the signature of every setup_context Function anew, 40 us a call. Compilers and
    function transforms get the ordinary call, which they recognise; everything else goes to the C++ base, or
    straight to ``forward`` when nothing is recorded.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return function.forward(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]  # The stub lacks the base.


def explain(operator: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend runs a call, which could, and why the others cannot.

    Args:
        operator: the name of a function of `peftk.functional`, or of its backward operator
            (``"block_rotate_backward"``, with that operator's own arguments).
        *args: the arguments of the call; nothing is computed with them.
        **kwargs: its keyword arguments.

    Returns:
        An `Explanation`; ``print`` it.

    Raises:
        ValueError: if there is no such operator.

    Example:
        >>> import peftk, torch
        >>> print(peftk.explain("block_rotate", torch.ones(2, 4), torch.eye(2).expand(2, 2, 2)))  # doctest: +SKIP
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(sorted(OPERATORS))}; got {operator!r}")
    found = OPERATORS[operator]
    return found.explain(found.prepare(*args, **kwargs) if found.prepare else args)
