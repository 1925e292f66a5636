"""`peftk.accelerate` on AdapterHub's adapters against AdapterHub itself; `make test-matrix` has it installed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("adapters")

import adapters
import adapters.composition as compose
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import peftk
from peftk.integrations.adapterhub import library, lora_linear

LIMIT = 2e-5
"""Both round in float32 in another order."""

CONFIGS = {
    "lora": {"r": 4, "alpha": 8},
    "lora everywhere": {"r": 2, "alpha": 3, "intermediate_lora": True, "output_lora": True, "dropout": 0.3},
    "dora": {"r": 4, "alpha": 8, "use_dora": True, "init_weights": "bert"},
    "ia3": {"architecture": "ia3"},
}
X = torch.arange(40).view(2, 20) % 60


def config_of(name: str) -> Any:
    if name == "ia3":
        return adapters.IA3Config()
    return adapters.LoRAConfig(**CONFIGS[name.removesuffix(" again")])


def made(*names: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model: Any = BertModel(BertConfig(vocab_size=60, **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0))
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=config_of(name))
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if ".loras." in n:
                around = 1 if ".m." in n or "ia3" in n else 0
                parameter.copy_(around + 0.3 * torch.randn(parameter.shape))
    return model


def step(model: Any, name: str, training: bool) -> tuple[Tensor, dict[str, Tensor], float]:
    model.train_adapter(name)
    model.train(training)
    model.zero_grad()
    torch.manual_seed(3)
    y = model(X).last_hidden_state
    after = torch.rand(()).item()
    (y * torch.sin(torch.arange(y.numel())).view_as(y)).sum().backward()
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, after


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-4)).item()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_gradients_and_random_numbers(name: str, training: bool) -> None:
    model = made(name)
    model.train_adapter(name)
    y, expected, after = step(model, name, training)
    report = peftk.accelerate(model)
    assert report.accelerated == len(report) >= 4, report
    z, found, same = step(model, name, training)
    assert error(z, y) < LIMIT and same == after
    assert found.keys() == expected.keys()
    for n, gradient in found.items():
        assert error(gradient, expected[n]) < 10 * LIMIT, n
    assert report.restore() == len(report)
    assert torch.equal(step(model, name, training)[0], y)


def test_training_has_the_same_losses() -> None:
    losses = []
    for accelerated in (False, True):
        model: Any = made("dora")
        model.train_adapter("dora")
        if accelerated:
            assert peftk.accelerate(model).accelerated
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(5):
            y = model(X).last_hidden_state
            loss = (y - torch.sin(torch.arange(y.numel())).view_as(y)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("setup", [compose.Stack, compose.Parallel, compose.Average])
def test_compositions_and_other_methods_are_left_alone(setup: Any) -> None:
    model: Any = made("lora", "lora again")
    model.add_adapter("bottleneck", config="seq_bn")
    model.set_active_adapters(setup("lora", "lora again"))
    model.eval()
    with torch.no_grad():
        expected = model(X).last_hidden_state
        report = peftk.accelerate(model)
        reasons = {str(row.reason) for row in report if not row.accelerated}
        assert f"a composition of adapters ({setup.__name__})" in reasons
        assert any("no arithmetic for this class" in reason for reason in reasons)
        assert torch.equal(model(X).last_hidden_state, expected)
        # What becomes active is accelerated, without another call.
        model.set_active_adapters("lora")
        fast = model(X).last_hidden_state
        report.restore()
        assert error(fast, model(X).last_hidden_state) < LIMIT


def test_merging_saving_and_switching_stay_adapterhub_s(tmp_path: Any) -> None:
    plain: Any = made("lora", "dora")
    fast: Any = copy.deepcopy(plain)
    peftk.accelerate(fast)
    assert repr(fast) == repr(plain)
    for model, folder in ((plain, "plain"), (fast, "fast")):
        model.eval()
        model.save_adapter(str(tmp_path / folder), "lora")
    one, two = (sorted(p.name for p in (tmp_path / folder).iterdir()) for folder in ("plain", "fast"))
    assert one == two
    with torch.no_grad():
        for act in (
            lambda m: m.set_active_adapters("dora"),
            lambda m: m.set_active_adapters(None),
            lambda m: m.merge_adapter("lora"),
            lambda m: m.reset_adapter(),
            lambda m: m.set_active_adapters("lora"),
            lambda m: m.load_adapter(str(tmp_path / "plain"), load_as="again", set_active=True),
            lambda m: m.delete_adapter("dora"),
        ):
            for model in (plain, fast):
                act(model)
            assert error(fast(X).last_hidden_state, plain(X).last_hidden_state) < LIMIT
    assert torch.equal(copy.deepcopy(fast)(X).last_hidden_state, fast(X).last_hidden_state)


def test_correct_dora_is_that_of_the_scaled_update() -> None:
    model: Any = made("dora")
    model.set_active_adapters("dora")
    assert {str(row.reason) for row in peftk.accelerate(model)} == {"DoRA on a weight that is trained"}
    model.train_adapter("dora")
    model.eval()
    report = peftk.accelerate(model, correct=True)
    layer = next(m for _, m in library.layers_of(model) if len(m.loras))
    assert any("correct=True" in str(row.reason) for row in report)
    module, x = layer.loras["dora"], torch.randn(2, 3, 32)
    with adapters.AdapterSetup("dora"), torch.no_grad():
        weight = layer.weight + module.scaling * module.lora_B @ module.lora_A
        weight = weight * (module.m.weight / weight.norm(dim=1, keepdim=True))
        assert error(layer(x), x @ weight.mT + layer.bias) < LIMIT


@pytest.fixture
def everywhere() -> Iterator[Any]:
    report = peftk.accelerate("adapters")
    yield report
    report.restore()


def test_all_layers_of_a_process(everywhere: Any) -> None:
    assert everywhere.accelerated == 1
    model: Any = made("lora")
    model.set_active_adapters("lora")
    model.eval()
    with torch.no_grad():
        fast = model(X).last_hidden_state
        everywhere.restore()
        assert error(fast, model(X).last_hidden_state) < LIMIT


def test_an_unknown_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_linear.FINGERPRINTS, "known", {})
    monkeypatch.setattr(lora_linear.FINGERPRINTS, "_seen", {})
    model = made("lora")
    with pytest.raises(RuntimeError, match="cannot be accelerated, and nothing was changed"):
        peftk.accelerate(model, strict=True)
