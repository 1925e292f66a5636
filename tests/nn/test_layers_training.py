"""Adapted layers in training: gradients, dropout, checkpointing, COFT, compilation."""

from __future__ import annotations

import peft
import pytest
import torch
from support.layer_cases import CASES, LARGE, Case, I, O, example, make, reference, with_hook
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftk.nn import LoraConfig, OFTConfig
from peftk.testing.compare import assert_close
from peftk.testing.memory import largest_bytes


@pytest.mark.parametrize("cls", [LoraConfig, OFTConfig])
def test_biases_of_the_base_are_trained_when_asked(cls):
    layer = make(cls(bias="all"))
    x = torch.randn(3, I)
    layer(x).sum().backward()
    assert_close(layer.base_layer.bias.grad, torch.full((O,), 3.0, dtype=torch.float64), torch.float32)
    assert not layer.base_layer.weight.requires_grad
    assert not make(cls()).base_layer.bias.requires_grad


def test_dropout_acts_in_training_only_and_replays():
    lora = make(LoraConfig(r=3, lora_dropout=0.5, init_lora_weights=False))
    oft = make(OFTConfig(oft_block_size=2, module_dropout=0.5, init_weights=False))
    shared = make(OFTConfig(oft_block_size=2, module_dropout=0.5, block_share=True, init_weights=False))
    x = torch.randn(8, I)
    for layer in (lora, oft, shared):
        assert layer.training
        torch.manual_seed(5)
        first, second = layer(x), layer(x)
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        assert torch.equal(layer(x), first)
        layer.eval()
        assert torch.equal(layer(x), layer(x))
        assert_close(layer(x), reference(layer, x), torch.float32)
        layer.train()
        layer.merge()
        expected = layer(x)
        layer.unmerge()
        layer.eval()
        assert_close(layer(x), expected.double(), torch.float32)


def test_oft_dropout_replaces_blocks_by_the_identity():
    layer = make(OFTConfig(oft_block_size=2, module_dropout=0.5, init_weights=False))
    rotation = layer.oft_R["default"]
    full = rotation.eval().blocks()
    rotation.train()
    kept = torch.zeros(6)
    for _ in range(40):
        blocks = rotation.blocks()
        identity = (blocks == torch.eye(2)).flatten(1).all(1)
        whole = (blocks == full).flatten(1).all(1)
        assert (identity ^ whole).all()
        kept += whole
    assert (kept > 0).all()
    assert (kept < 40).all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_dropout=0.4, init_lora_weights=False),
        OFTConfig(oft_block_size=2, module_dropout=0.4, init_weights=False),
        OFTConfig(oft_block_size=2, coft=True, eps=0.1, init_weights=False),
    ],
    ids=["lora", "oft", "coft"],
)
def test_checkpointing_replays_the_same_pass(config, reentrant):
    layer = make(config)
    x = torch.randn(8, I, requires_grad=True)
    results = []
    for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        run().square().sum().backward()
        results.append([x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_layer_used_twice_in_one_pass_trains():
    for config in (CASES["lora"], CASES["oft"], CASES["coft"]):
        layer = make(config, features=(I, I))
        layer(layer(torch.randn(2, I))).sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", ["plain", "hook", "trained base"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.together])
def test_several_adapters_train_together(name, variant):
    case = CASES[name]
    layer = make(case, bias=case.base != "embedding")
    layer.add_adapter("b", CASES[case.together].config)
    layer.set_adapter(["default", "b"])
    layer.base_layer.weight.requires_grad_(variant == "trained base")
    x = example(case)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    truth = reference(layer, x, ("default", "b"))
    # A rotation of what comes out changes no sum of squares.
    weights = torch.linspace(1, 2, truth.numel()).view_as(truth)
    expected = torch.autograd.grad((weights * truth).square().sum(), trained.values())
    y = (with_hook(layer) if variant == "hook" else layer)(x)
    found = torch.autograd.grad((weights * y).square().sum(), trained.values())
    for key, mine, theirs in zip(trained, found, expected, strict=True):
        if key == "base_layer.weight" and case.base == "embedding":
            theirs[layer.base_layer.padding_idx] = 0
        assert_close(mine, theirs.double(), torch.float32, what=key)


@pytest.mark.parametrize("eps", [1e-3, 0.3, 1e3])
def test_coft_keeps_every_block_in_its_ball(eps):
    layer = make(OFTConfig(oft_block_size=4, coft=True, eps=eps, init_weights=False))
    rotation = layer.oft_R["default"]
    start = rotation.weight.detach().clone()
    layer.eval()(torch.randn(2, I))
    norms = rotation.weight.double().norm(dim=1) * 2**0.5
    limit = eps / len(norms) ** 0.5
    outside = start.double().norm(dim=1) * 2**0.5 > limit
    assert_close(norms[outside], torch.full_like(norms[outside], limit), torch.float32)
    assert torch.equal(rotation.weight[~outside], start[~outside])
    projected = rotation.weight.detach().clone()
    layer(torch.randn(2, I))
    assert torch.equal(rotation.weight, projected)


@pytest.mark.parametrize("name", [*CASES, "dropout"])
def test_compiles_without_a_graph_break(name):
    case = CASES.get(name) or Case(LoraConfig(r=3, lora_dropout=0.3, init_lora_weights=False))
    layer = make(case, bias=case.base != "embedding")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = example(case)
    x = x.requires_grad_() if x.is_floating_point() else x
    y = compiled(x)
    y.sum().backward()
    assert x.grad is not None or not x.requires_grad
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    if name != "dropout":
        assert_close(y, reference(layer, x.detach()), torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_a_graph_break_in_inference(name):
    layer = make(CASES[name], bias=CASES[name].base != "embedding").eval()
    x = example(CASES[name])
    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        layer.set_scale("default", 0.5)
        half = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert_close(half, layer(x).double(), torch.float32)
        layer.set_scale("default", 1.0)
    assert_close(y, reference(layer, x).detach(), torch.float32)


def test_batches_that_mix_adapters_compile_without_a_graph_break():
    layer = make(CASES["lora"]).eval()
    x = torch.randn(3, 12)
    names = ["default", "__base__", "default"]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda x: layer(x, adapter_names=names), fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), layer(x, adapter_names=names).double(), torch.float32)


@pytest.mark.parametrize("name", LARGE)
def test_nothing_of_the_size_of_the_weight_is_made_in_float32(name):
    """Of a half-precision layer, inside the operators included: no update, no rotation, no permutation."""
    tokens, size = 60, 512 if getattr(LARGE[name], "boft_n_butterfly_factor", 0) > 2 else 256
    layer = make(LARGE[name], dtype=torch.bfloat16, features=(size, size))
    x = torch.randn(tokens, size, dtype=torch.bfloat16, requires_grad=True)
    assert largest_bytes(lambda: layer(x).sum().backward()) < 4 * size * size


@pytest.mark.parametrize("method", ["LoHa", "LoKr", "BOFT"])
def test_peft_makes_matrices_of_the_size_of_the_weight(method):
    """So the measure of the test above sees them."""
    config = getattr(peft, f"{method}Config")(target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16)), config)
    x = torch.randn(60, 256, dtype=torch.bfloat16, requires_grad=True)
    assert largest_bytes(lambda: layer(x).sum().backward()) >= 4 * 256 * 256


def test_every_trainable_tensor_moves_after_one_step():
    for name, case in {**CASES, "oft_fresh": Case(OFTConfig(oft_block_size=4))}.items():
        layer = make(case, bias=case.base != "embedding")
        trained = [p for p in layer.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        layer(example(case)).square().sum().backward()
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, trained, strict=True)), name


# Not COFT: its projection changes the parameters in the middle of gradcheck. Not DoRA: its gradient takes the norm for
# a constant.
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not (getattr(case.config, "coft", False) or case.decomposes)]
)
def test_float64_gradients(name):
    case = CASES[name]
    layer = make(case, dtype=torch.float64, bias=case.base != "embedding")
    trained = {n: p.detach().requires_grad_() for n, p in layer.named_parameters() if p.requires_grad}

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(trained, values, strict=True)), (x,))

    x = example(case, dtype=torch.float64)
    x = x.requires_grad_() if x.is_floating_point() else x
    fast = case.base not in ("linear", "conv1d")
    assert torch.autograd.gradcheck(run, (x, *trained.values()), fast_mode=fast)
    if x.is_floating_point():
        assert torch.autograd.gradgradcheck(run, (x, *trained.values()), fast_mode=True)
