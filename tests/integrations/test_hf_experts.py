"""`experts_implementation="peftk"` beside transformers' own, on models of every style of experts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from support.experts import EXPERTS, IDS, KINDS, filled, loss_and_gradients, made
from torch import Tensor, nn

import peftk
from peftk.integrations import hf_experts
from peftk.methods import lora_parameter
from peftk.methods.lora_parameter import Stacked
from peftk.testing.compare import assert_close


@pytest.fixture(autouse=True)
def name() -> str:
    return hf_experts.register()


def switched(model: nn.Module) -> nn.Module:
    other: Any = copy.deepcopy(model)
    other.set_experts_implementation("peftk")
    assert other.config._experts_implementation == "peftk"
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_of_trained_experts(kind: str) -> None:
    model = made(kind)
    expected, expected_grads = loss_and_gradients(model)
    found, grads = loss_and_gradients(switched(model))
    assert_close(found, expected, torch.float64)
    assert grads.keys() == expected_grads.keys() and any("experts" in n for n in grads)
    for n, grad in grads.items():
        assert_close(grad, expected_grads[n], torch.float64, what=n)


@pytest.mark.parametrize("library", [peft, peftk], ids=["peft", "peftk"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_the_experts(kind: str, library: Any) -> None:
    model = made(kind)
    results = []
    for base in (model, switched(model)):
        config = library.LoraConfig(r=3, target_modules=[], target_parameters=EXPERTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = filled(library.get_peft_model(copy.deepcopy(base), config))
        results.append(loss_and_gradients(adapted))
    (expected, expected_grads), (found, grads) = results
    assert_close(found, expected, torch.float64)
    for n, grad in grads.items():
        assert_close(grad, expected_grads[n], torch.float64, what=n)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_router_losses_and_generation(kind: str) -> None:
    model: Any = made(kind)
    model.config.output_router_logits = kind != "deepseek"
    other: Any = switched(model)
    model.train(), other.train()
    for one in (model, other):
        one.gradient_checkpointing_enable()
    (expected, expected_grads), (found, grads) = loss_and_gradients(model), loss_and_gradients(other)
    assert_close(found, expected, torch.float64)
    for n, grad in grads.items():
        assert_close(grad, expected_grads[n], torch.float64, what=n)
    for one in (model, other):
        one.gradient_checkpointing_disable()
        # transformers 5.17 itself cannot generate with them.
        one.config.output_router_logits = False
        one.eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(other.generate(IDS, **options), model.generate(IDS, **options))


def test_no_gradient_of_the_size_of_a_frozen_stack() -> None:
    model = switched(made("qwen3")).requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    _, grads = loss_and_gradients(model)
    assert list(grads) == ["model.embed_tokens.weight"] and grads["model.embed_tokens.weight"].any()


def test_half_precision_and_compiling() -> None:
    model = made("mixtral").bfloat16()
    other = switched(model)
    with torch.no_grad():
        expected, found = model(input_ids=IDS).logits, other(input_ids=IDS).logits
        exact = made("mixtral")(input_ids=IDS).logits
        assert (found - exact).norm() <= 1.5 * (expected - exact).norm()
        wide = switched(made("mixtral")).float()
        compiled = torch.compile(wide, backend="aot_eager")
        assert_close(compiled(input_ids=IDS).logits, exact, torch.float32)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_one_graph_whatever_the_routing(kind: str, adapted: bool, trained: bool) -> None:
    base: Any = made(kind)
    module = copy.deepcopy(base.model.layers[0].mlp.experts)
    # Rows of whole 16 bytes, which torch's product wants.
    for name, parameter in list(module.named_parameters()):
        sizes = [16 if size == 12 else 32 if size == 24 else size for size in parameter.shape]
        setattr(module, name, nn.Parameter(torch.randn(sizes).mul(0.3).bfloat16(), requires_grad=trained))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16() / 2

    adapters = {}
    if adapted:
        shapes = {"gate_up_proj": (16, 32), "down_proj": (16, 16)}
        adapters = {n: [Stacked(normal(4, 3, i), normal(4, o, 3), 0.5)] for n, (i, o) in shapes.items()}

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return lora_parameter.experts(module, x, index, weights, adapters)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        x = normal(tokens, 16).requires_grad_()
        # One number is no expert.
        index = torch.randint(0, 5, (tokens, 2), generator=generator)
        weights = torch.rand(tokens, 2, generator=generator).bfloat16()
        found = []
        for call in (run, compiled):
            x.grad = None
            module.zero_grad()
            y = call(x, index, weights)
            y.square().sum().backward()
            found.append([y.detach(), x.grad, *(p.grad for p in module.parameters() if trained)])
        for eager, traced in zip(*found, strict=True):
            assert_close(traced, eager.double(), torch.bfloat16)


def test_registering_twice_and_a_name_that_is_none() -> None:
    assert hf_experts.register() == "peftk"
    with pytest.raises((KeyError, ValueError)):
        made("qwen3").set_experts_implementation("peftkk")
