"""A choice made by a ``with`` block holds where it was made, and leaves nothing behind, however blocks overlap."""

from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import peftk
from peftk.runtime import settings

MAX_DEPTH = 60
"""Autograd runs backward passes inside of backward passes, from this depth on, on threads of its own."""


def designs() -> tuple[Callable, Callable]:
    low_rank = pytest.importorskip("peftk.triton_kernels.low_rank")
    return low_rank.use_design, low_rank._named_design.get


def backends() -> tuple[Callable, Callable]:
    return peftk.use_backend, lambda: None if (name := settings.backend()) == "auto" else name


@pytest.fixture(params=[backends, designs], ids=["use_backend", "use_design"])
def choice(request: pytest.FixtureRequest) -> tuple[Callable, Callable, str, str]:
    """A context manager, what it chose, and two names."""
    return *request.param(), *(("torch", "native") if request.param is backends else ("D0", "D1"))


def test_blocks_that_end_in_another_order_leave_nothing(choice) -> None:
    use, chosen, one, two = choice
    first, second = use(one), use(two)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert chosen() == two
    second.__exit__(None, None, None)
    assert chosen() is None


def test_the_innermost_block_decides(choice) -> None:
    use, chosen, one, two = choice
    with use(one):
        with use(two):
            assert chosen() == two
        assert chosen() == one
        with pytest.raises(ZeroDivisionError), use(two):
            1 / 0  # noqa: B018
        assert chosen() == one
    assert chosen() is None


def test_threads_choose_for_themselves(choice) -> None:
    use, chosen, one, two = choice
    both = threading.Barrier(2, timeout=60)

    def run(name: str) -> list[str | None]:
        seen = [chosen()]
        with use(name):
            both.wait()
            seen.append(chosen())
            both.wait()
        seen.append(chosen())
        return seen

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(run, name) for name in (one, two)]
        assert [f.result() for f in found] == [[None, one, None], [None, two, None]]
        with use(one):
            assert pool.submit(chosen).result() is None
    assert chosen() is None


def test_tasks_choose_for_themselves(choice) -> None:
    use, chosen, one, two = choice

    async def run(name: str) -> str | None:
        with use(name):
            await asyncio.sleep(0)
            return chosen()

    async def neither() -> str | None:
        await asyncio.sleep(0)
        return chosen()

    async def together() -> list[str | None]:
        return await asyncio.gather(run(one), neither(), run(two))

    assert asyncio.run(together()) == [one, None, two]
    assert chosen() is None


def test_a_block_may_end_in_another_thread(choice) -> None:
    use, chosen, one, _ = choice
    block = use(one)
    block.__enter__()
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert chosen() is None


class Deep(torch.autograd.Function):
    """Its backward pass runs another one, until one of them runs on a thread of autograd's."""

    @staticmethod
    def forward(ctx, x: Tensor, depth: int, act: Callable[[], None]) -> Tensor:
        ctx.depth, ctx.act = depth, act
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        if ctx.depth:
            with torch.enable_grad():
                Deep.apply(torch.ones((), requires_grad=True), ctx.depth - 1, ctx.act).backward()
        else:
            ctx.act()
        return grad, None, None


def backward_elsewhere(act: Callable[[], None]) -> None:
    """Do something within a backward pass, on a thread of autograd's, as it is the rule on a GPU."""
    threads: list[int] = []

    def noted() -> None:
        threads.append(threading.get_ident())
        act()

    Deep.apply(torch.ones((), requires_grad=True), MAX_DEPTH + 5, noted).backward()
    assert threads != [threading.get_ident()]


def test_a_choice_holds_in_the_backward_pass_on_any_thread(choice) -> None:
    use, chosen, one, two = choice
    seen: list[str | None] = []

    def look() -> None:
        seen.append(chosen())
        with use(two):
            seen.append(chosen())
        seen.append(chosen())

    with use(one):
        backward_elsewhere(look)
    assert seen == [one, two, one]
    seen.clear()
    # The same threads, for a thread that chose nothing while another one has a block open.
    with use(one), ThreadPoolExecutor(1) as pool:
        pool.submit(backward_elsewhere, look).result()
    assert seen == [None, two, None]
    seen.clear()
    backward_elsewhere(look)
    assert seen == [None, two, None]


def test_a_backend_named_around_backward_runs_it() -> None:
    x, blocks = torch.ones(2, 4, dtype=torch.float64, requires_grad=True), torch.eye(4, dtype=torch.float64)[None]
    y = peftk.functional.block_rotate(x, blocks).sum()
    # C++ takes no float64.
    with peftk.use_backend("native"), pytest.raises(RuntimeError, match="block_rotate_backward; got 'native'"):
        y.backward(retain_graph=True)
    y.backward()


def test_an_open_block_does_not_disturb_the_end_of_the_process() -> None:
    script = "import peftk; block = peftk.use_backend('torch'); block.__enter__(); print('ready')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


def test_what_torch_keeps_is_counted_also_where_torch_does_not_count(monkeypatch) -> None:
    """Releases of torch before 2.12 take over a reference; using one that is gone ends the process."""
    keep = torch._C._stash_obj_in_tls
    counted = object()
    before = sys.getrefcount(counted)
    keep("peftk.test", counted)
    if sys.getrefcount(counted) == before:
        # It is a release that does not count, so what it took over here is given to it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(counted))
    else:

        def steals(key: str, value: object) -> None:
            keep(key, value)
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(value))

        monkeypatch.setattr(torch._C, "_stash_obj_in_tls", steals)
    for value in (("first",), ("second",), ("third",)):
        value = (*value, object())
        settings._keep_for_threads("peftk.test", value)
        # One reference is of this frame, one of the call, and one torch's.
        assert sys.getrefcount(value) == 3
        assert torch._C._get_obj_in_tls("peftk.test") is value
    assert sys.getrefcount(counted) == before
