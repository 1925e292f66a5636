"""Calls that few make: an accelerated layer gives PEFT's value, dtype and shape, or PEFT's error."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import peft
import pytest
import torch
from support.peft_layers import ADALORA_CONV, CONV, LINEAR, METHODS, Kinds, adapted, error, fill, inputs, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftk
from peftk.integrations.hf_peft import lora

WIDTH = 32
Run = Callable[[nn.Module], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def no_rule_of_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "FEW_ROWS", 0)
    monkeypatch.setattr(lora, "conv_pays", lambda layer, x: True)


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).to(dtype)


def second(model: nn.Module) -> nn.Module:
    return model.base_model.model.second


def called(x: Tensor, **kwargs: object) -> Run:
    return lambda model: [second(model)(x, **kwargs)]


def in_inference_mode(model: nn.Module) -> Sequence[Tensor]:
    with torch.inference_mode():
        return [second(model)(ramp(70, WIDTH))]


def checkpointed(model: nn.Module) -> Sequence[Tensor]:
    x = ramp(70, WIDTH).requires_grad_()
    torch.manual_seed(5)
    y = checkpoint(second(model.train()), x, use_reentrant=False)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in second(model).parameters() if p.grad is not None)]


def twice(layer: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """A penalty on the gradient, as in sharpness-aware training: its own gradients."""
    x.requires_grad_()
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    first = torch.autograd.grad(layer(x).square().sum(), trained, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), trained, materialize_grads=True)


def exported(model: nn.Module) -> Sequence[Tensor]:
    return [torch.export.export(second(model), (ramp(70, WIDTH),)).module()(ramp(70, WIDTH))]


def without_casting(model: nn.Module) -> Sequence[Tensor]:
    with peft.helpers.disable_input_dtype_casting(model):
        return [second(model)(ramp(4, WIDTH))]


def trained(model: nn.Module) -> Sequence[Tensor]:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return _gradients(model)


def frozen(model: nn.Module) -> Sequence[Tensor]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return _gradients(model)


def _gradients(model: nn.Module) -> Sequence[Tensor]:
    y, gradients, _ = step(model, inputs())
    return [y, *gradients.values()]


CALLS: dict[str, Run] = {
    "inference mode": in_inference_mode,
    "empty": called(torch.zeros(0, WIDTH)),
    "one dimension": called(ramp(WIDTH)),
    "three dimensions, strided": called(ramp(5, WIDTH, 6).transpose(1, 2)),
    "four dimensions": called(ramp(5, 2, 3, WIDTH)),
    "wrong size": called(ramp(3, WIDTH + 1)),
    "integers": called(torch.ones(3, WIDTH, dtype=torch.long)),
    "float64": called(ramp(3, WIDTH, dtype=torch.float64)),
    "bfloat16": called(ramp(3, WIDTH, dtype=torch.bfloat16)),
    "a parameter": called(nn.Parameter(ramp(4, WIDTH))),
    "an unknown keyword": called(ramp(4, WIDTH), foo=1),
    "by name": lambda model: [second(model)(x=ramp(4, WIDTH))],
    "float64 model": lambda model: [second(model.double())(ramp(3, WIDTH, dtype=torch.float64))],
    "meta": lambda model: [torch.zeros(second(model.to("meta"))(ramp(4, WIDTH).to("meta")).shape)],
    "vmap": lambda model: [torch.func.vmap(second(model))(ramp(3, 4, WIDTH))],
    "checkpointed": checkpointed,
    "differentiated twice": lambda model: twice(second(model), ramp(70, WIDTH)),
    "exported": exported,
    "without casting": without_casting,
    "everything trained": trained,
    "nothing trained": frozen,
}
IMAGES: dict[str, Run] = {
    "no batch": lambda model: [model.base_model.model.conv(ramp(4, 8, 8))],
    "empty": lambda model: [model.base_model.model.conv(torch.zeros(0, 4, 8, 8))],
    "differentiated twice": lambda model: twice(model.base_model.model.conv, ramp(2, 4, 8, 8)),
    "wrong channels": lambda model: [model.base_model.model.conv(ramp(1, 5, 8, 8))],
    "channels last": lambda model: [
        model.base_model.model.conv(ramp(2, 4, 8, 8).to(memory_format=torch.channels_last))
    ],
}


def outcome(make: Callable[[], nn.Module], run: Run, accelerate: bool) -> Sequence[Tensor] | str:
    model = make()
    if accelerate:
        assert peftk.accelerate(model).accelerated > 0
    try:
        return run(model)
    except Exception as problem:
        # Names of generated things have numbers.
        return re.sub(r"\d+", "", f"{type(problem).__name__}: {problem}"[:80])


def check(make: Callable[[], nn.Module], run: Run, limit: float = 1e-5) -> None:
    expected, got = (outcome(make, run, accelerate) for accelerate in (False, True))
    if isinstance(expected, str) or isinstance(got, str):
        assert got == expected
        return
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad)
        assert error(one, other) < limit


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("method", METHODS)
def test_linear(method: str, call: str) -> None:
    # PEFT's gradient of C3A's input is not that of its value, so no other layer may be below it.
    targets = ["second"] if method == "c3a" else LINEAR
    if method == "c3a" and call in ("everything trained", "checkpointed", "differentiated twice"):
        pytest.skip("PEFT's gradient of C3A's input is not that of its value")
    check(lambda: adapted(method, 1, target_modules=targets).eval(), CALLS[call])


@pytest.mark.parametrize("call", IMAGES)
@pytest.mark.parametrize("method", ["lora", "adalora", "loha", "lokr", "boft"])
@pytest.mark.parametrize("seed", [1, 4])
def test_convolution(method: str, call: str, seed: int) -> None:
    if method == "adalora" and not ADALORA_CONV:
        pytest.skip("this version of PEFT has AdaLoRA on linear layers alone")
    # PEFT's gradients of LoHa's Tucker form are not those of its value.
    plain = {"use_effective_conv2d": False} if (method, call) == ("loha", "differentiated twice") else {}
    check(lambda: adapted(method, seed, target_modules=CONV, **plain).eval(), IMAGES[call])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "c3a"])
def test_trained_biases(method: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        config = METHODS[method](random.Random(1))
        config.target_modules, config.bias = LINEAR, "all"
        return fill(peft.get_peft_model(Kinds(), config), 1).eval()

    check(make, _gradients, 1e-4)
