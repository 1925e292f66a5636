"""What is kept of an adapter between calls that record nothing is made again after any write to its parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk.ops.kept import Kept
from peftk.testing.compare import assert_close, assert_same_bits


class Maker:
    """Doubles a tensor, and counts how often."""

    def __init__(self, source: Tensor) -> None:
        self.source, self.times = source, 0

    def __call__(self) -> Tensor:
        self.times += 1
        return self.source * 2


def test_a_value_is_made_once() -> None:
    kept, maker = Kept(), Maker(torch.randn(3, 4))
    with torch.no_grad():
        first, second = kept.get((maker.source,), maker), kept.get((maker.source,), maker)
    assert first is second and maker.times == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.add_(1),
        lambda p: p.data.mul_(3),
        lambda p: p.data.view(-1)[7:8].zero_(),
        lambda p: p.detach().numpy().__setitem__((0, 0), 5.0),
        lambda p: setattr(p, "data", torch.randn(3, 4)),
    ],
)
def test_no_write_is_overlooked(write: Callable[[Tensor], object]) -> None:
    parameter = nn.Parameter(torch.randn(3, 4))
    kept, maker = Kept(), Maker(parameter)
    with torch.no_grad():
        kept.get((parameter,), maker)
        write(parameter)
        assert_same_bits(kept.get((parameter,), maker), parameter * 2)
    assert maker.times == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1024, 1025, 2048, 5000])
def test_no_write_to_a_large_tensor_is_overlooked(count: int, dtype: torch.dtype) -> None:
    """Of which checksums are kept, or, in dtypes that have none, a copy."""
    source = torch.randn(count, dtype=dtype)
    kept, maker = Kept(), Maker(source)
    with torch.no_grad():
        kept.get((source,), maker)
        sums = dtype is not torch.float64 and count > 1024
        assert (kept._entry.kept[0].dtype is torch.int32) is sums
        kept.get((source,), maker)
        assert maker.times == 1
        writes: list[Callable[[Tensor], object]] = [
            *(lambda t, at=at: t[at].neg_() for at in (0, 1, 1023, count - 1)),
            lambda t: t.neg_(),
            lambda t: t.mul_(2),
            lambda t: t.copy_(t.flip(0)),
        ]
        for number, write in enumerate(writes):
            write(source.data)
            assert_same_bits(kept.get((source,), maker), source * 2)
            assert maker.times == 2 + number
        # As many pieces, and as many zeros behind the numbers.
        padded = torch.zeros(count, dtype=dtype)
        kept.get((padded,), Maker(padded))
        fewer = Maker(padded[:-1].clone())
        assert kept.get((fewer.source,), fewer).numel() == count - 1 and fewer.times == 1


def test_training_drops_what_is_kept() -> None:
    parameter = nn.Parameter(torch.randn(3, 4))
    kept, maker = Kept(), Maker(parameter)
    with torch.no_grad():
        kept.get((parameter,), maker)
    assert kept.get((parameter,), maker).requires_grad and kept._entry is None
    with torch.no_grad():
        assert not kept.get((parameter,), maker).requires_grad
    assert maker.times == 3


@pytest.mark.parametrize(
    "other", [torch.randn(4, 3), torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 3).T, torch.zeros(3, 4)]
)
def test_another_tensor_has_a_value_of_its_own(other: Tensor) -> None:
    kept, maker = Kept(), Maker(torch.zeros(3, 4).fill_(-0.0))
    with torch.no_grad():
        kept.get((maker.source,), maker)
        assert_same_bits(kept.get((other,), Maker(other)), other * 2)


def test_copies_and_pickles_keep_nothing() -> None:
    kept, maker = Kept(), Maker(torch.randn(3, 4))
    with torch.no_grad():
        kept.get((maker.source,), maker)
    assert copy.deepcopy(kept)._entry is None and pickle.loads(pickle.dumps(kept))._entry is None


@pytest.mark.parametrize(
    ("layer", "container"),
    [
        (lambda: peftk.nn.OFTLinear(nn.Linear(16, 8), peftk.OFTConfig(oft_block_size=4, init_weights=False)), "oft_R"),
        (
            lambda: peftk.nn.BOFTLinear(
                nn.Linear(16, 8), peftk.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, init_weights=False)
            ),
            "boft_R",
        ),
    ],
)
def test_layers_follow_their_parameters(layer: Callable[[], nn.Module], container: str) -> None:
    torch.manual_seed(0)
    made = layer().eval()
    x = torch.randn(2, 16)
    held = getattr(made, container)["default"]
    parameter = held if isinstance(held, nn.Parameter) else held.weight
    for _ in range(3):
        with torch.no_grad():
            made(x)
            assert_close(made(x), made.double()(x.double()), torch.float32)
            made.float()
            parameter.data.mul_(0.7)
        with torch.no_grad():
            found = made(x)
        assert_close(found, made(x).detach().double(), torch.float32)
        made(x).square().sum().backward()
        with torch.inference_mode():
            assert_close(made(x), found.double(), torch.float32)
