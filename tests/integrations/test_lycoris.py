"""`peftk.accelerate` on LyCORIS's networks against LyCORIS itself: values, gradients, random numbers, what is kept."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lycoris")

import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.locon import LoConModule
from safetensors.torch import save_file
from support.lycoris_modules import ALGORITHMS, BASES, fill, options, step
from torch import Tensor, nn

import peftk
from peftk.integrations.lycoris import library, network_module

GROUPS, EACH = 6, 14
"""Five algorithms times these make 420 configurations, of which LyCORIS itself cannot run some."""

LIMIT = 2e-5
"""Both round in float32 in another order: some 1e-7 each, and factors multiply up to four of them."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("LyCORIS")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)
    LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["Linear", "Conv1d", "Conv2d", "Conv3d"]})


def difference(found: Tensor | None, expected: Tensor | None, largest: float) -> float:
    """The size of a difference beside the gradient, or a hundredth of the largest one, where numbers cancel out."""
    if found is None or expected is None:
        given = expected if found is None else found
        return 0.0 if given is None else given.abs().max().item() / largest
    return (found - expected).norm().item() / max(expected.norm().item(), 1e-2 * largest)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("group", range(GROUPS))
def test_a_module_gives_what_lycoris_gives(algorithm: str, group: int) -> None:
    draw = random.Random(f"{algorithm} {group}")
    taken = ran = 0
    for number in range(EACH):
        torch.manual_seed(100 * group + number)
        name = draw.choice(list(BASES))
        make, shape = BASES[name]
        base, chosen, training = make(), options(algorithm, draw), draw.random() < 0.6
        base.requires_grad_(draw.random() < 0.1)
        module = ALGORITHMS[algorithm](lora_name="x", org_module=base, **chosen)
        fill(module)
        module.train(training).apply_to()
        x = torch.randn(shape, requires_grad=True)
        try:
            y, expected, after = step(base, module, x)
        except RuntimeError:
            # LyCORIS's bypass_mode does not run on some layers, and OFT's dropout not in it.
            continue
        if not y.isfinite().all():
            # Its rank_dropout has dropped every row, and divided by none.
            continue
        report = peftk.accelerate(module)
        ran, taken = ran + 1, taken + report.accelerated
        z, found, same = step(base, module, x)
        what = f"{algorithm} on {name}, {'training' if training else 'evaluation'}, {chosen}: {report}"
        assert same == after, what
        assert (y - z).norm() <= LIMIT * y.norm(), what
        largest = max(g.norm().item() for g in expected if g is not None)
        for mine, theirs in zip(found, expected, strict=True):
            assert difference(mine, theirs, largest) < LIMIT, what
        with torch.no_grad():
            module.eval()
            quick = base(x)
            report.restore()
            assert (base(x) - quick).norm() <= LIMIT * y.norm(), what
        module.train(training)
        assert torch.equal(step(base, module, x)[0], y), what
    assert ran > EACH // 2 and taken > ran // 4, (ran, taken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_precision_layers(algorithm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 64).requires_grad_(False)
    wide = copy.deepcopy(base)
    module = ALGORITHMS[algorithm](lora_name="x", org_module=base, lora_dim=4)
    fill(module)
    x = torch.randn(40, 64, requires_grad=True)
    truth_of = copy.deepcopy(module)
    truth_of.org_module = [wide]
    truth_of.org_forward = wide.forward
    truth_of.apply_to()
    truth = wide(x)
    base.to(dtype)
    module.apply_to()
    theirs = (base(x.to(dtype)) - truth).norm()
    assert peftk.accelerate(module, strict=True)
    mine = (base(x.to(dtype)) - truth).norm()
    assert base(x.to(dtype)).dtype is dtype and mine <= 1.2 * theirs


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        image = torch.tanh(self.first(x)).view(-1, 2, 4, 4)
        return self.second(torch.tanh(self.conv(image)).flatten(1))


def network(algorithm: str, model: nn.Module, seed: int = 3, **chosen: Any) -> LycorisNetwork:
    torch.manual_seed(seed)
    made = create_lycoris(model.requires_grad_(False), 1.0, 2, 1, algo=algorithm, **chosen)
    for module in made.loras:
        fill(module)
    return made


NETWORKS = {
    "locon": {"dropout": 0.0},
    "loha": {"use_tucker": True},
    "lokr": {"factor": 4, "dora_wd": True},
    "diag-oft": {"constraint": 0.1, "rescaled": True},
    "boft": {},
}


def states(model: nn.Module, net: LycorisNetwork) -> tuple[Any, ...]:
    """Whatever acceleration might leave behind."""
    return (
        [(type(m), sorted(m.__dict__), sorted(m._modules)) for m in (*model.modules(), *net.modules())],
        [getattr(m.__dict__.get("forward"), "__func__", None) for m in model.modules()],
        [getattr(lora.__dict__.get("org_forward"), "__func__", None) for lora in net.loras],
    )


@pytest.mark.parametrize("algorithm", NETWORKS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_life_of_a_network(algorithm: str, when: str, tmp_path: Path) -> None:
    """Applying, saving, loading, strengths, merging and restoring stay LyCORIS's, and give what they give without."""
    models = Small(), Small()
    models[1].load_state_dict(models[0].state_dict())
    nets = [network(algorithm, model, **NETWORKS[algorithm]) for model in models]
    x = torch.randn(6, 16)
    fast, plain = models
    if when == "before":
        assert peftk.accelerate(nets[0], strict=True).accelerated == 3
    for net in nets:
        net.apply_to()
    clean = states(fast, nets[0]) if when == "after" else None
    report = peftk.accelerate(fast if when == "after" else nets[0], strict=True)
    assert report.accelerated == 3

    def agree() -> None:
        assert (fast(x) - plain(x)).norm() < LIMIT * plain(x).norm()

    agree()
    names = [list(net.state_dict()) for net in nets]
    assert names[0] == names[1] and str(nets[0]) == str(nets[1])
    for net, name in zip(nets, "ab", strict=True):
        net.set_multiplier(0.5)
        net.save_weights(tmp_path / f"{name}.safetensors", torch.float32, {})
    agree()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for net in nets:
        net.set_multiplier(1.0)
        net.onfly_merge(1.0)
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    for net in nets:
        net.onfly_restore()
    agree()
    copied = copy.deepcopy(fast)
    assert torch.equal(copied(x), fast(x))
    assert all(type(module) in ALGORITHMS.values() for module in pickle.loads(pickle.dumps(nets[0])).loras)
    if clean is not None:
        assert report.restore() == 3 and report.restore() == 0
        assert states(fast, nets[0]) == clean
        assert torch.equal(fast(x), plain(x))
        peftk.accelerate(fast)
    for net in nets:
        net.restore()
    assert torch.equal(fast(x), plain(x))
    for net in nets:
        net.apply_to()
    agree()
    for net in nets:
        net.restore()
        net.merge_to(1.0)
    assert torch.equal(fast(x), plain(x))


@pytest.mark.parametrize("algorithm", NETWORKS)
def test_training_has_the_same_losses(algorithm: str) -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(12, 16)
    losses = []
    for accelerated in (False, True):
        other = copy.deepcopy(model)
        net = network(algorithm, other, **NETWORKS[algorithm])
        net.apply_to()
        if accelerated:
            assert peftk.accelerate(net).accelerated == 3
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        torch.manual_seed(4)
        found = []
        for _ in range(6):
            loss = (other(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_all_networks_of_a_process() -> None:
    before = {cls: dict(vars(cls)) for cls in ALGORITHMS.values()}
    report = peftk.accelerate("lycoris")
    try:
        assert report.accelerated == len(report) == 5
        model = Small()
        net = network("loha", model)
        net.apply_to()
        x = torch.randn(6, 16)
        fast = model(x)
        assert all(hasattr(module.forward, "_peftk_original") for module in net.loras)
    finally:
        assert report.restore() == 5
    assert {cls: dict(vars(cls)) for cls in ALGORITHMS.values()} == before
    # The layers hold the function still, and it is LyCORIS's again.
    plain = model(x)
    assert (plain - fast).norm() < LIMIT * plain.norm()
    net.restore()
    net.apply_to()
    assert torch.equal(model(x), plain)


def test_two_networks_on_one_model() -> None:
    """Networks stand before each other; what changes the weight itself is left to LyCORIS there."""
    model = Small()
    first, second = network("lokr", model, seed=1), network("locon", model, seed=2)
    for net in (first, second):
        net.apply_to()
    x = torch.randn(6, 16)
    expected = model(x)
    report = peftk.accelerate(model)
    assert len(report) == len(list(library.layers_of(model))) == 6
    assert len({row.name for row in report}) == 3, "both networks have the same names"
    assert (model(x) - expected).norm() < LIMIT * expected.norm()
    first.restore()
    alone = model(x)
    second.restore()
    report.restore()
    second.apply_to()
    assert (model(x) - alone).norm() < LIMIT * alone.norm()


def test_a_rotation_behind_another_adapter_is_left_to_lycoris() -> None:
    base = nn.Linear(12, 16).requires_grad_(False)
    for algorithm in ("locon", "diag-oft"):
        module = ALGORITHMS[algorithm](lora_name=algorithm, org_module=base, lora_dim=4)
        fill(module)
        module.apply_to()
    x = torch.randn(3, 12)
    expected = base(x)
    report = peftk.accelerate(base)
    assert [row.accelerated for row in report] == [True, False]
    assert report[1].reason == "another adapter, or another function, stands before the layer"
    assert (base(x) - expected).norm() < LIMIT * expected.norm()


def test_what_is_left_to_lycoris_says_why() -> None:
    def reason(algorithm: str, base: nn.Module, training: bool = False, **chosen: Any) -> Any:
        module = ALGORITHMS[algorithm](lora_name="x", org_module=base, lora_dim=2, **chosen).train(training)
        module.apply_to()
        (row,) = peftk.accelerate(module)
        return row.reason

    image = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular").requires_grad_(False)
    assert reason("loha", image) == "LyCORIS ignores the padding mode of the convolution"
    dilated = nn.Conv2d(4, 8, 3, dilation=2).requires_grad_(False)
    assert reason("locon", dilated, bypass_mode=True) == "bypass_mode ignores the dilation of the convolution"
    assert reason("lokr", dilated, bypass_mode=True) == "bypass_mode on a convolution"
    linear = nn.Linear(8, 8)
    assert reason("diag-oft", linear) == "a weight that is trained, or that is not dense"
    linear.requires_grad_(False)
    assert "which acts in bypass_mode" in reason("loha", linear, True, dropout=0.5, bypass_mode=True)
    assert reason("boft", linear, True, rank_dropout=0.5) == "rank_dropout in training"
    module = LoConModule("x", nn.Linear(8, 8), lora_dim=2)
    module.forward = module.forward
    (row,) = peftk.accelerate(module)
    assert "another library has replaced `forward` of the module" in row.reason


def test_an_unknown_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: dict(found) for name, found in network_module.FINGERPRINTS.known.items()}
    known["lycoris.modules.loha.LohaModule.get_weight"] = {"0": ["4.0.0"]}
    monkeypatch.setattr(network_module.FINGERPRINTS, "known", known)
    monkeypatch.setattr(network_module.FINGERPRINTS, "_seen", {})
    net = network("loha", Small())
    with pytest.raises(RuntimeError, match="strict: 3 of 3 cannot be accelerated, and nothing was changed"):
        peftk.accelerate(net, strict=True)
    reason = str(peftk.accelerate(net)[0].reason)
    assert "LohaModule.get_weight of lycoris-lora" in reason and "known: 4.0.0" in reason
    assert peftk.accelerate(net, force=True).accelerated == 3


def test_layers_that_are_trained_too() -> None:
    """The gradient of a weight that is trained is LyCORIS's."""
    gradients = []
    for accelerated in (False, True):
        model = Small()
        model.load_state_dict(gradients[0][0] if gradients else model.state_dict())
        net = network("locon", model)
        model.requires_grad_(True)
        net.apply_to()
        if accelerated:
            assert peftk.accelerate(net).accelerated == 3
        torch.manual_seed(0)
        model(torch.randn(6, 16)).square().sum().backward()
        found = {name: p.grad for name, p in (*model.named_parameters(), *net.named_parameters())}
        gradients.append((copy.deepcopy(model.state_dict()), found))
    for name, expected in gradients[0][1].items():
        assert (gradients[1][1][name] - expected).norm() <= LIMIT * expected.norm() + 1e-6, name


def test_autocast() -> None:
    for algorithm, chosen in NETWORKS.items():
        model = Small()
        net = network(algorithm, model, **chosen)
        net.apply_to()
        x = torch.randn(6, 16)
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = model(x)
            assert peftk.accelerate(net, strict=True)
            mine = model(x)
        assert mine.dtype is theirs.dtype
        assert (mine - exact).norm() <= 1.3 * (theirs - exact).norm() + 1e-3 * exact.norm(), algorithm


def test_a_network_made_from_a_file(tmp_path: Path) -> None:
    model = Small()
    made = network("lokr", model, factor=4)
    made.apply_to()
    save_file({name: value.contiguous() for name, value in made.state_dict().items()}, tmp_path / "x.safetensors")
    made.restore()
    loaded, _ = create_lycoris_from_weights(1.0, str(tmp_path / "x.safetensors"), model)
    loaded.apply_to()
    x = torch.randn(6, 16)
    expected = model(x)
    assert peftk.accelerate(model).accelerated == 3
    assert (model(x) - expected).norm() < LIMIT * expected.norm()


def test_without_any_layers() -> None:
    without = r"layers of .*LyCORIS of a method that is accelerated, got Linear without; call .*create_lycoris first"
    with pytest.raises(ValueError, match=without):
        peftk.accelerate(nn.Linear(2, 2))
    assert issubclass(LoConModule, LycorisBaseModule)
