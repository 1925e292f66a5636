"""AdaLoRA: the rank allocator step by step beside PEFT's, files of pruned adapters, the regulariser, bad input."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import peftk
from peftk import AdaLoraConfig, LoraConfig, PeftModel
from peftk.nn import AdaLoRAConv, AdaLoRALinear, PeftConfig
from peftk.testing.compare import assert_close

SETTINGS = {"init_r": 6, "target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3, "target_modules": ["a", "b", "c"]}
X = torch.linspace(-1, 1, 60).reshape(5, 12)


class Net(nn.Module):
    """Three layers of two shapes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(12, 16)
        self.b = nn.Linear(16, 12)
        self.c = nn.Linear(12, 16, bias=False)

    def forward(self, x):
        return self.c(self.b(self.a(x).tanh()).tanh())


def pair(**changes):
    values = SETTINGS | changes
    torch.manual_seed(0)
    base = Net()
    torch.manual_seed(1)
    ours = peftk.get_peft_model(copy.deepcopy(base), AdaLoraConfig(**values))
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(**copy.deepcopy(values)))
    return base, ours, theirs


def train_step(models, step, optimizers, allocate=True):
    """One step with the same gradients: those of the first model are given to the second."""
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(5, 16, generator=generator)
    grads = {}
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        (model(X) * weights).sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.grad = grads.setdefault(name, p.grad).clone()
        optimizer.step()
        if allocate:
            model.base_model.update_and_allocate(step)


def optimizers_of(models):
    return [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in models]


@pytest.mark.parametrize("changes", [{}, {"deltaT": 2}, {"tinit": 0, "tfinal": 0}, {"beta1": 0.5, "beta2": 0.9}])
def test_masks_budgets_and_the_pattern_are_those_of_peft(changes):
    _, ours, theirs = models = pair(**changes)
    models = models[1:]
    thresholds = []
    allocator, reference = ours.base_model.rankallocator, theirs.base_model.rankallocator
    prune_to = allocator.prune_to
    allocator.prune_to = lambda budget: thresholds.append(prune_to(budget))
    optimizers = optimizers_of(models)
    for step in range(SETTINGS["total_step"] + 1):
        train_step(models, step, optimizers)
        assert allocator.budget(step) == reference.budget_schedule(step)
        for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            if "lora_E" in name:
                assert torch.equal(p == 0, q == 0), (step, name)
            assert_close(p, q.double(), torch.float32, what=name)
        mine, other = ours.peft_config["default"].rank_pattern, theirs.peft_config["default"].rank_pattern
        assert mine == other
    assert mine is not None
    assert sum(map(sum, mine.values())) == 3 * SETTINGS["target_r"]
    assert any(t is not None for t in thresholds)


def test_the_threshold_is_that_of_the_importance_of_peft():
    _, ours, theirs = pair(tinit=0)
    optimizers = optimizers_of((ours, theirs))
    for step in range(3):
        train_step((ours, theirs), step, optimizers, allocate=False)
        ours.base_model.rankallocator.update_importance()
        theirs.base_model.rankallocator.update_ipt(theirs.base_model.model)
    mine = torch.cat(ours.base_model.rankallocator.scores())
    reference = theirs.base_model.rankallocator
    expected = []
    for layer in "abc":
        a, b, e = (reference._element_score(f"{layer}.lora_{c}.default").double() for c in "ABE")
        expected.append(e.view(-1) + a.mean(1) + b.mean(0))
    expected = torch.cat(expected)
    assert_close(mine, expected, torch.float32)
    budget = 10
    threshold = ours.base_model.rankallocator.prune_to(budget)
    assert_close(threshold, expected.kthvalue(18 - budget).values, torch.float32)
    pattern = ours.peft_config["default"].rank_pattern
    assert pattern == reference.mask_to_budget(theirs.base_model.model, budget)
    assert sum(map(sum, pattern.values())) == budget


def finish(*models):
    optimizers = optimizers_of(models)
    for step in range(SETTINGS["total_step"] + 1):
        train_step(models, step, optimizers)


def test_pruned_files_load_both_ways(tmp_path):
    base, ours, theirs = pair()
    finish(ours, theirs)
    y = ours.eval()(X)
    assert_close(y, theirs.eval()(X).double(), torch.float32)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in other.items()}
    assert sum(v.shape[0] for k, v in mine.items() if k.endswith("lora_E")) == 6
    assert not any("ranknum" in key for key in mine)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    for who in ("ours", "theirs"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / who)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / who))
        for model in (loaded, again):
            assert_close(model(X), y.double(), torch.float32)
        for (name, p), (_, q) in zip(loaded.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(p, q), name
        assert not any(p.requires_grad for p in loaded.parameters())
        loaded.save_pretrained(tmp_path / "again")
        assert all(
            torch.equal(v, load_file(tmp_path / who / "adapter_model.safetensors")[k])
            for k, v in load_file(tmp_path / "again" / "adapter_model.safetensors").items()
        )
        merged = loaded.merge_and_unload()
        assert_close(merged(X), y.double(), torch.float32)


def test_a_pruned_adapter_trains_on_and_is_pruned_further(tmp_path):
    base, ours, _ = pair()
    finish(ours)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    first = copy.deepcopy(loaded.peft_config["default"].rank_pattern)
    loaded.peft_config["default"].target_r = 1
    finish(loaded)
    second = loaded.peft_config["default"].rank_pattern
    assert sum(map(sum, second.values())) == 3
    for key, kept in second.items():
        assert len(kept) == 6
        assert all(was or not now for now, was in zip(kept, first[key.removesuffix(".default")], strict=True))
    loaded.save_pretrained(tmp_path / "second")
    y = loaded.eval()(X)
    for library in (PeftModel, peft.PeftModel):
        again = library.from_pretrained(copy.deepcopy(base), str(tmp_path / "second"))
        assert_close(again(X), y.double(), torch.float32)


def test_a_layer_may_lose_its_whole_rank(tmp_path):
    base, ours, _ = pair(target_r=0)
    finish(ours)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert {layer.r["default"] for _, layer in loaded.base_model._layers()} == {0}
    assert torch.equal(loaded(X), base(X))
    assert torch.equal(loaded.merge_and_unload()(X), base(X))
    assert peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)) is not None


def test_d11_equal_ranks_prune_nothing_and_peft_fails():
    _, ours, theirs = pair(init_r=4, target_r=4)
    finish(ours)
    assert all(all(kept) for kept in ours.peft_config["default"].rank_pattern.values())
    with pytest.raises(RuntimeError, match="kthvalue"):
        finish(theirs)
    with pytest.warns(UserWarning, match="target_r"):
        AdaLoraConfig(init_r=2, target_r=4, total_step=9)


def test_d10_ranknum_is_never_trained_and_peft_trains_it():
    torch.manual_seed(0)
    base = Net().bfloat16()
    ours = peftk.get_peft_model(copy.deepcopy(base), AdaLoraConfig(**SETTINGS))
    theirs = peft.get_peft_model(base, peft.AdaLoraConfig(**SETTINGS))
    assert any("ranknum" in n for n, p in theirs.named_parameters() if p.requires_grad)
    for change in (lambda: None, lambda: ours.set_adapter("default"), lambda: ours.set_requires_grad("default")):
        change()
        assert not any("ranknum" in n for n, p in ours.named_parameters() if p.requires_grad)
    assert {p.dtype for n, p in ours.named_parameters() if "lora_" in n} == {torch.float32}


def test_the_regulariser_is_that_of_peft():
    class WithLoss(Net):
        def forward(self, x):
            return type("Output", (), {"loss": super().forward(x).square().mean()})()

    torch.manual_seed(0)
    base = WithLoss()
    models = []
    for library in (peftk, peft):
        torch.manual_seed(1)
        config = library.AdaLoraConfig(**SETTINGS, orth_reg_weight=0.3, init_lora_weights=False)
        models.append(library.get_peft_model(copy.deepcopy(base), config))
    ours, theirs = models
    loss = ours(X).loss + ours.orthogonality_loss()
    # PeftModel without a task type bypasses the forward that adds the term.
    expected = theirs.base_model(X).loss
    assert_close(loss, expected.double(), torch.float32)
    loss.backward()
    expected.backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_close(p.grad, q.grad.double(), torch.float32, what=name)


def test_a_model_with_a_task_adds_the_regulariser_to_its_loss():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**sizes, vocab_size=32, hidden_dropout_prob=0.0))
    ids = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.tensor([0, 1])}
    given = {"target_modules": ["query"], "total_step": 9, "init_r": 4, "target_r": 2, "orth_reg_weight": 0.3}
    losses = []
    for library in (peft, peftk):
        torch.manual_seed(1)
        config = library.AdaLoraConfig(task_type="SEQ_CLS", **given)
        losses.append(library.get_peft_model(copy.deepcopy(base), config).eval()(**ids).loss)
    assert torch.allclose(*losses)
    for options in ({"orth_reg_in_loss": False, "task_type": "SEQ_CLS"}, {}):
        torch.manual_seed(1)
        model = peftk.get_peft_model(copy.deepcopy(base), peftk.AdaLoraConfig(**given, **options)).eval()
        plain = model(**ids).loss
        assert torch.allclose(plain + model.orthogonality_loss(), losses[0])
    assert "orth_reg_in_loss" not in config.to_dict()


def test_the_number_of_kernels_does_not_grow_with_the_layers():
    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            views = ("detach", "unbind", "alias", "view", "select", "unsqueeze", "transpose", "t", "expand", "_to_copy")
            self.count += func._schema.name.removeprefix("aten::") not in views
            return func(*args, **(kwargs or {}))

    counts = []
    for depth in (2, 8):
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth)))
        model = peftk.get_peft_model(model, AdaLoraConfig(init_r=3, target_r=1, total_step=9, target_modules=r"\d"))
        model(torch.randn(4, 6)).sum().backward()
        allocator = model.base_model.rankallocator
        with Ops() as update:
            allocator.update_importance()
        with Ops() as prune:
            allocator.prune_to(depth)
        with Ops() as regulariser:
            model.orthogonality_loss()
        counts.append((update.count, prune.count, regulariser.count))
    assert counts[0] == counts[1]


def test_parameters_without_gradient_count_as_unimportant():
    _, ours, _ = pair()
    with pytest.raises(ValueError, match="backward"):
        ours.update_and_allocate(1)
    ours(X).sum().backward()
    ours.get_base_model().a.lora_A["default"].grad = None
    ours.update_and_allocate(1)
    late = pair()[1]
    late(X).sum().backward()
    with pytest.raises(ValueError, match="every training step"):
        late.update_and_allocate(SETTINGS["total_step"] - SETTINGS["tfinal"])
    for step in (-1, True, 1.0):
        with pytest.raises((ValueError, TypeError), match="global_step"):
            late.update_and_allocate(step)


def test_one_adapter_is_trainable():
    _, ours, _ = pair()
    with pytest.raises(ValueError, match="inference_mode"):
        ours.add_adapter("other", AdaLoraConfig(**SETTINGS))
    ours.add_adapter("other", AdaLoraConfig(**SETTINGS, inference_mode=True))
    assert ours.base_model.rankallocator.adapter_name == "default"
    ours(X).sum().backward()
    ours.update_and_allocate(1)
    copied = copy.deepcopy(ours)
    assert copied.base_model.rankallocator.layers[0][1] is copied.get_base_model().a
    ours.delete_adapter("default")
    with pytest.raises(ValueError, match="AdaLoRA"):
        ours.update_and_allocate(1)
    plain = peftk.get_peft_model(Net(), LoraConfig(r=2, target_modules=["a"]))
    for call in (lambda: plain.update_and_allocate(1), plain.orthogonality_loss):
        with pytest.raises(ValueError, match="AdaLoRA"):
            call()


NAN = float("nan")
BAD = [
    *(("total_step", v) for v in [None, 0, -1, True, 1.5, "9"]),
    *(("init_r", v) for v in [0, -1, True, 2**70, "4", None]),
    *(("target_r", v) for v in [-1, True, 0.5]),
    *(("tinit", v) for v in [-1, True, 12, 0.5]),
    *(("tfinal", v) for v in [-1, True, 12]),
    *(("deltaT", v) for v in [0, -1, True, 1.5]),
    *((name, v) for name in ("beta1", "beta2") for v in [0, 1, NAN, -0.5, True, "0"]),
    *(("orth_reg_weight", v) for v in [-1, NAN, "1", True]),
    *(("lora_alpha", v) for v in [NAN, "8", True]),
    *(("init_lora_weights", v) for v in ["gaussian", 1, None]),
    *(("rank_pattern", v) for v in [{"a": [True] * 6}, {"a.lora_E": [True]}, {"a.lora_E": [1] * 6}, [1], {1: []}]),
    ("use_dora", True),
    ("loftq_config", {"loftq_bits": 4}),
    ("use_rslora", True),
    ("lora_bias", True),
    ("alpha_pattern", {"a": 3}),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        AdaLoraConfig(**(SETTINGS | {name: value}))


def test_fields_and_files_are_those_of_peft(tmp_path):
    ours, theirs = AdaLoraConfig(**SETTINGS), peft.AdaLoraConfig(**SETTINGS)
    mine = {k: v for k, v in ours.to_dict().items() if k not in ("runtime_config", "target_modules")}
    other = {k: v for k, v in theirs.to_dict().items() if k not in ("runtime_config", "target_modules")}
    assert mine == other
    theirs.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(tmp_path) == ours
    with pytest.warns(UserWarning, match=r"^r: "):
        AdaLoraConfig(**SETTINGS, r=4)


def test_layers_that_have_no_adalora_are_refused():
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=4)
    for base in (nn.ConvTranspose2d(4, 4, 1), nn.Embedding(4, 4)):
        with pytest.raises(TypeError, match=type(base).__name__):
            AdaLoRALinear(base, config)


def test_convolutions_are_pruned_as_in_peft(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(64, 3))
    values = {
        "target_modules": ["0", "2", "4"],
        "init_r": 4,
        "target_r": 2,
        "total_step": 6,
        "init_lora_weights": False,
    }
    models = []
    for library in (peftk, peft):
        torch.manual_seed(1)
        models.append(library.get_peft_model(copy.deepcopy(base), library.AdaLoraConfig(**values)))
        with torch.no_grad():
            for name, parameter in models[-1].named_parameters():
                if "lora_" in name:
                    parameter.mul_(0.2)
    ours, theirs = models
    x = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 4, 4)
    for step in range(7):
        for model in models:
            model.zero_grad()
            model(x).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.sub_(0.01 * parameter.grad)
            (model if model is ours else model.base_model).update_and_allocate(step)
    found = {name: p for name, p in ours.named_parameters() if "lora_" in name}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            assert_close(found[name], parameter.double(), torch.float32, what=name)
    assert any((p == 0).any() for name, p in found.items() if "lora_E" in name and ".0." in name)
    ours.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), ours.eval()(x).double(), torch.float32)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert_close(loaded(x), ours(x).double(), torch.float32)


def test_convolutions_with_groups_are_refused_by_name():
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=4)
    with pytest.raises(ValueError, match="'m' is a convolution with groups=2; AdaLoRA"):
        AdaLoRAConv(nn.Conv2d(4, 4, 1, groups=2), config, module_name="m")


def test_a_pattern_that_matches_no_module_is_named():
    with pytest.warns(UserWarning, match=r"rank_pattern.*no\.such"):
        peftk.get_peft_model(Net(), AdaLoraConfig(**SETTINGS, rank_pattern={"no.such.lora_E": [True] * 6}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peftk.get_peft_model(Net(), AdaLoraConfig(**SETTINGS, rank_pattern={"a.lora_E": [True] * 5 + [False]}))
    assert model.get_base_model().a.r["default"] == 5
