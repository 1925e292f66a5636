"""How many functions of this package a call walks through: each costs a microsecond, and a reader's patience.

What is counted are the Python frames of files of peftk, from the `forward` of the layer on, in a call like those before
it: the same layer, dtype, device and mode, with gradients, on the native backend.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import pytest
import torch
from torch import nn

import peftk
from peftk import LoraConfig, OFTConfig
from peftk.kernels import native as native_kernels
from peftk.nn import LoRALinear, OFTConv2d
from peftk.runtime import timings

pytestmark = pytest.mark.skipif(native_kernels.unavailable() is not None, reason=str(native_kernels.unavailable()))

FOLDER = os.path.dirname(peftk.__file__) + os.sep


class Limit(NamedTuple):
    """How many calls a pass may take, and how many files a forward pass may walk through."""

    forward: int
    files: int
    backward: int


def lora(rows=64):
    return LoRALinear(nn.Linear(64, 64), LoraConfig(r=8)), torch.randn(rows, 64)


def oft(**values):
    return OFTConv2d(nn.Conv2d(8, 8, 3), OFTConfig(oft_block_size=8, **values)), torch.randn(2, 8, 9, 9)


LAYERS = {
    "lora": (lora, Limit(forward=26, files=7, backward=15)),
    "lora_few_rows": (lambda: lora(8), Limit(forward=26, files=7, backward=15)),
    # The fifth pass: the series is looked at in the first, second and fourth, and then ever more seldom.
    "oft_conv": (oft, Limit(forward=35, files=13, backward=40)),
    "oft_conv_exact": (lambda: oft(use_cayley_neumann=False), Limit(forward=35, files=13, backward=40)),
}


def walk(run):
    """Return the file and name of every function of the package that is called."""
    seen = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(FOLDER):
            seen.append((frame.f_code.co_filename.removeprefix(FOLDER), frame.f_code.co_name))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("name", LAYERS)
def test_a_warm_call_walks_no_further_than_this(name, monkeypatch):
    # A tuned table adds its look-up to every operator, and only some classes of CPUs have one.
    monkeypatch.setattr(timings, "cells_of", lambda operator, device: None)
    make, limit = LAYERS[name]
    layer, x = make()
    x.requires_grad_()
    results = []
    for _ in range(4):
        layer(x).sum().backward()
    forward = walk(lambda: results.append(layer(x)))
    grad = torch.ones_like(results[0])
    backward = walk(lambda: results[0].backward(grad))
    for what, found, most in (("forward", forward, limit.forward), ("backward", backward, limit.backward)):
        listed = "\n".join(f"{file}: {function}" for file, function in found)
        assert len(found) > 0, what
        assert len(found) <= most, f"{what} walks through {len(found)} functions, expected at most {most}:\n{listed}"
    assert len({file for file, _ in forward}) <= limit.files, forward
