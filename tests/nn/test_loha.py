"""LoHa beside Hugging Face PEFT: dropout, the Tucker form's gradients, what is saved, both routes."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.layer_cases import CASES, example, make, reference
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftk.nn import LoHaConfig, LoHaConv, LoHaLinear
from peftk.ops._hadamard_linear import low_rank_pays
from peftk.testing.compare import assert_close
from peftk.testing.memory import saved_bytes


def pair(base, **values):
    """One layer adapted by both libraries, with equal parameters."""
    values = {"r": 2, "init_weights": False} | values
    cls = LoHaConv if isinstance(base, nn.Conv2d) else LoHaLinear
    ours = cls(copy.deepcopy(base), LoHaConfig(**values))
    model = peft.get_peft_model(nn.Sequential(base), peft.LoHaConfig(target_modules=["0"], **values))
    theirs = model.base_model.model[0]
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "values", [{"rank_dropout": 0.4}, {"module_dropout": 0.5}, {"rank_dropout": 0.4, "module_dropout": 0.3}]
)
@pytest.mark.parametrize("base", [nn.Linear(12, 10), nn.Conv2d(4, 6, 3, padding=1)], ids=["linear", "conv"])
def test_dropout_is_that_of_peft_from_the_same_seed(base, values):
    ours, theirs = pair(base, **values)
    x = torch.randn(3, 12) if isinstance(base, nn.Linear) else torch.randn(2, 4, 5, 5)
    outputs = []
    for seed in range(8):
        pairs = []
        for layer in (ours, theirs):
            torch.manual_seed(seed)
            pairs.append(layer.train()(x))
        assert_close(pairs[0], pairs[1].double(), torch.float32)
        outputs.append(pairs[0])
    assert any(not torch.equal(outputs[0], y) for y in outputs)
    assert_close(ours.eval()(x), reference(ours, x), torch.float32)


def test_a_dropped_layer_has_gradients_of_zeros_and_in_peft_none():
    for layer, value in zip(pair(nn.Linear(12, 10), module_dropout=0.999999), (0, None), strict=True):
        layer.train()(torch.randn(3, 12, requires_grad=True)).sum().backward()
        grads = [p.grad for n, p in layer.named_parameters() if "hada" in n]
        assert all(grad is None if value is None else not grad.any() for grad in grads)


def test_nothing_kept_is_no_update_and_not_nan():
    ours, theirs = pair(nn.Linear(3, 1), rank_dropout=0.9)
    x = torch.randn(2, 3)
    torch.manual_seed(0)
    y = ours.train()(x)
    torch.manual_seed(0)
    assert theirs.train()(x).isnan().all()
    assert torch.equal(y, ours.base_layer(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["loha", "loha_written", "loha_tucker"])
def test_checkpointing_replays_dropout(name, reentrant):
    case = copy.deepcopy(CASES[name])
    case.config.rank_dropout, case.config.module_dropout = 0.3, 0.2
    layer, results = make(case), []
    x = example(case).requires_grad_()
    for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(4)
        run().square().sum().backward()
        results.append([x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_d2_the_tucker_gradients_of_peft_are_wrong():
    ours, theirs = pair(nn.Conv2d(3, 5, (3, 2), padding=1), use_effective_conv2d=True)
    x = torch.randn(2, 3, 6, 5)
    exact = reference(ours, x)
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    truth = dict(zip(trained, torch.autograd.grad(exact.square().sum(), list(trained.values())), strict=True))
    for layer in (ours, theirs):
        y = layer(x)
        assert_close(y, exact, torch.float32)
        y.square().sum().backward()
    wrong = set()
    for name, p in theirs.named_parameters():
        if name in truth:
            assert_close(trained[name].grad, truth[name].double(), torch.float32, what=name)
            relative = (p.grad - truth[name]).norm() / truth[name].norm()
            wrong |= {name.split(".")[0]} if relative > 0.1 else set()
    assert wrong == {"hada_w1_a", "hada_w2_a"}


@pytest.mark.parametrize(("alpha", "r"), [(1, 4), (8, 4)])
def test_merging_applies_the_scale_once(alpha, r):
    """Where alpha is not the rank, too."""
    layer = LoHaLinear(nn.Linear(6, 5), LoHaConfig(r=r, alpha=alpha, init_weights=False))
    delta = layer.get_delta_weight("default")
    before = layer.base_layer.weight.clone()
    layer.merge()
    assert_close(layer.base_layer.weight, before.double() + delta.double(), torch.float32)
    factors = [layer.get_parameter(f"hada_{n}.default").double() for n in ("w1_a", "w1_b", "w2_a", "w2_b")]
    assert_close(delta, alpha / r * (factors[0] @ factors[1]) * (factors[2] @ factors[3]), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("r", "low_rank"), [(2, True), (12, False)])
def test_what_is_saved_for_backward(r, low_rank, dtype):
    tokens, features, out = 64, 96, 80
    assert low_rank_pays(tokens, out, features, r, r) is low_rank
    layer = LoHaLinear(nn.Linear(features, out, dtype=dtype), LoHaConfig(r=r, init_weights=False))
    x = torch.randn(tokens, features, dtype=dtype)
    budget = tokens * r * r * x.element_size() if low_rank else 0
    assert saved_bytes(lambda: layer(x), [x, *layer.parameters()]) <= budget


def test_the_route_follows_from_the_sizes():
    assert low_rank_pays(1 << 20, 1024, 1024, 13, 13) and not low_rank_pays(1 << 20, 1024, 1024, 14, 14)
    assert low_rank_pays(1 << 20, 4096, 4096, 26, 26) and not low_rank_pays(1 << 20, 4096, 4096, 27, 27)
    # A single token pays for no written weight.
    assert low_rank_pays(1, 1024, 1024, 64, 64)


def test_peft_pads_the_update_with_zeros():
    ours, theirs = pair(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    x = torch.randn(1, 3, 5, 5)
    expected = reference(ours, x)
    assert_close(ours(x), expected, torch.float32)
    with pytest.raises(AssertionError):
        assert_close(theirs(x), expected, torch.float32)


def test_other_layers_are_refused():
    for base in (nn.Conv1d(3, 4, 1), nn.Embedding(4, 4), nn.ConvTranspose2d(3, 4, 1)):
        with pytest.raises(TypeError, match=type(base).__name__):
            LoHaLinear(base, LoHaConfig(r=2))
