"""Every method from tensors alone: base layers of torch, the functions of `peftk.methods`, dense formulas beside."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from support import method_forms
from support.method_forms import FORMS, PLAIN, TOKENS, Form, I
from torch import Tensor, nn
from torch.nn import functional as tf

import peftk.methods
from peftk.methods._base_layer import CONVOLUTIONS, plain_tensors
from peftk.ops.conv import convolution
from peftk.testing.compare import assert_close


def inputs(name: str, dtype: torch.dtype) -> tuple[Form, nn.Module, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    form, make = FORMS[name]
    base = make().to(dtype).requires_grad_(False)
    if form.kind == "embedding":
        x = torch.randint(I, (3, TOKENS))
    else:
        size = (2, TOKENS, I) if form.kind == "linear" else (2, 4, 6, 5, 3)[: base.weight.dim()]
        x = torch.randn(size, dtype=dtype).requires_grad_()
    shapes = form.shapes(rows(base).shape)
    return form, base, x, {n: (0.4 * torch.randn(s, dtype=dtype)).requires_grad_() for n, s in shapes.items()}


def rows(base: nn.Module) -> Tensor:
    """The weight with the outputs as rows."""
    own = base.weight.detach()
    return own if isinstance(base, (nn.Linear, *CONVOLUTIONS)) else own.mT


def dense(form: Form, base: nn.Module, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    """The output of the dense weight that the formula gives."""
    bias = getattr(base, "bias", None)
    weight, bias = form.weight(rows(base), None if bias is None else bias.detach(), t)
    if form.kind == "embedding":
        return tf.embedding(x, weight.mT)
    if form.kind == "linear":
        return tf.linear(x, weight, bias)
    pad = base._reversed_padding_repeated_twice
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    return convolution(tf.pad(x, pad, mode=mode), weight, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", FORMS)
def test_output_and_gradients_are_those_of_the_dense_weight(name: str, dtype: torch.dtype) -> None:
    form, base, x, tensors = inputs(name, dtype)
    wide = copy.deepcopy(base).double()
    exact = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    far = x.detach().double().requires_grad_() if x.is_floating_point() else x
    y, truth = form.run(base, x, tensors), dense(form, wide, far, exact)
    assert_close(y, truth, dtype, what="output")
    grad = 1 + torch.randn(y.shape, dtype=torch.float64)
    leaves = [*tensors, *(["x"] if x.is_floating_point() else [])]
    found = torch.autograd.grad(y, [x if n == "x" else tensors[n] for n in leaves], grad.to(y))
    expected = torch.autograd.grad(truth, [far if n == "x" else exact[n] for n in leaves], grad.to(y).double())
    for n, left, right in zip(leaves, found, expected, strict=True):
        assert_close(left, right, dtype, what=f"d{n}")
    with torch.no_grad():
        assert_close(form.run(base, x, tensors), truth, dtype, what="output without gradients")


@pytest.mark.parametrize("name", [n for n, (form, _) in FORMS.items() if form.kind == "linear"])
def test_which_forms_run_the_base_layer_inside(name: str) -> None:
    """The forms are what they are called: plain layers are not called, and others are, once."""
    form, base, x, tensors = inputs(name, torch.float32)
    assert (plain_tensors(base, x) is not None) is name.endswith(PLAIN)
    calls = []
    base.forward = lambda x, forward=base.forward: calls.append(1) or forward(x)
    form.run(base, x, tensors)
    assert len(calls) == 1, "a replaced forward is called"


@pytest.mark.parametrize("name", [n for n, (form, _) in FORMS.items() if form.merged and n.endswith("fused")])
def test_merged_weights_are_the_dense_ones(name: str) -> None:
    form, base, _, tensors = inputs(name, torch.float64)
    own = base.weight.detach(), base.bias.detach()
    t = {n: v.detach() for n, v in tensors.items()}
    for found, expected in zip(form.merged(*own, t), form.weight(*own, t), strict=True):
        assert_close(found, expected, torch.float64)


def test_every_method_is_here() -> None:
    """A new method needs a file in `support/method_forms`, or a test in this folder that names its module."""
    here, forms = Path(__file__).parent, Path(method_forms.__file__).parent
    text = "".join(path.read_text() for path in (*sorted(here.glob("test_*.py")), *sorted(forms.glob("*.py"))))
    for module in pkgutil.iter_modules(peftk.methods.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"peftk.methods.{module.name}")
            assert f" {module.name}." in text, f"peftk.methods.{module.name} is not run: put a test of it beside these"
    assert "peftk" + ".nn" not in text, "no layer of the package is in sight"
