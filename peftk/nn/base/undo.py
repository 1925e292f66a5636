"""Changes of several steps: they happen as a whole, or everything is as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set)


class Before:
    """What modules, parameters and tensors were; references where a change puts something else in their place."""

    def __init__(
        self, modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter], values: Iterable[Tensor]
    ) -> None:
        self._modules: list[tuple[nn.Module, dict[str, Any], list[Any], list[tuple[Any, Any]]]] = []
        for module in modules:
            own = module.__dict__.copy()
            containers = [value for value in own.values() if isinstance(value, _CONTAINERS)]
            # Most are empty, as the tables of hooks are: nothing of those is kept but that.
            self._modules.append((module, own, containers, [(value, value.copy()) for value in containers if value]))
        # Nobody changes the memory of a packed weight, and not everybody may look at it.
        self._parameters = [(p, p.requires_grad, p.data if type(p) is nn.Parameter else None) for p in parameters]
        self._values: list[tuple[Tensor, Tensor]] = []
        self.keep(values)

    def keep(self, values: Iterable[Tensor]) -> None:
        """Keep the numbers in these tensors, too, before they are changed in place."""
        self._values += [(value, value.detach().clone()) for value in values]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; calling it again, if it was interrupted, does the rest."""
        for module, own, containers, held in self._modules:
            module.__dict__.clear()
            module.__dict__.update(own)
            for container in containers:
                container.clear()
            for container, content in held:
                container.extend(content) if isinstance(container, list) else container.update(content)
        moved = set()
        for parameter, required, data in self._parameters:
            if data is not None and (parameter.data.data_ptr() != data.data_ptr() or parameter.shape != data.shape):
                moved.add(id(parameter))
                parameter.data = data
            parameter.requires_grad_(required)
        for tensor, value in self._values:
            tensor.data.copy_(value)
        for module, own, *_ in self._modules:
            # The counters of merged tensors went on while other values stood in them.
            for key in own.get("_versions", ()):
                parameter = getattr(module._holder, key)
                if id(parameter) in moved:
                    module.__dict__["_versions"][key] = parameter._version


@contextlib.contextmanager
def all_or_nothing(
    modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter] = (), values: Iterable[Tensor] = ()
) -> Iterator[Before]:
    """Undo what a block has done if it ends in an exception, KeyboardInterrupt and lack of memory included.

    Gives the block what is kept, for values that only the block can name.

    Args:
        modules: Those whose attributes, children, parameters and hooks the block may change; not those below them.
        parameters: Those that it may freeze, unfreeze or give other memory; nothing is copied.
        values: Tensors whose numbers it may change in place; they are copied.
    """
    before = Before(modules, parameters, values)
    try:
        yield before
    except BaseException:
        _insist(before.restore)
        raise


@contextlib.contextmanager
def undone_if_interrupted(restore: Callable[[], object]) -> Iterator[None]:
    """Call `restore` after a block that ends in an exception; it may be called again where it was interrupted."""
    try:
        yield
    except BaseException:
        _insist(restore)
        raise


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Put torch's random numbers, default device and grad mode back if a block ends in an exception.

    The ``with`` blocks of torch end in Python: an interruption there would leave their device, or their mode, for good.
    """
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators.extend(torch.cuda.default_generators)
    drawn = [generator.get_state() for generator in generators]
    modes, grad = torch._C._len_torch_function_stack(), torch.is_grad_enabled()

    def restore() -> None:
        while torch._C._len_torch_function_stack() > modes:
            torch.overrides._pop_mode()
        torch.set_grad_enabled(grad)
        for generator, state in zip(generators, drawn, strict=True):
            generator.set_state(state)

    try:
        yield
    except BaseException:
        _insist(restore)
        raise


@contextlib.contextmanager
def put_back(restore: Callable[[], None]) -> Iterator[None]:
    """Call `restore` after a block, however it ends.

    Args:
        restore: What may be called again where an exception has stopped it: it then does the rest.
    """
    try:
        try:
            yield
        finally:
            restore()
    except BaseException:
        _insist(restore)
        raise


def _insist(restore: Callable[[], object]) -> None:
    """Call what puts things back until nobody interrupts it."""
    while True:
        try:
            restore()
            break
        except KeyboardInterrupt:
            # The exception that brought us here is on its way already.
            continue


__all__ = ["Before", "all_or_nothing", "process_kept", "put_back", "undone_if_interrupted"]
