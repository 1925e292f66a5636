"""X-LoRA: the same as Hugging Face PEFT on small models, and one product for all experts."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
import torch.utils.checkpoint
from support.parity_cases import TOKENS
from support.toy_model import assert_unchanged, snapshot, trainable
from support.xlora_models import CLASSIFIER, EXPERTS, Output, llama, make, pair, save_experts, saved_tokens
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peftk import LoraConfig, PeftModel
from peftk import functional as F
from peftk.testing.compare import assert_close

SETTINGS = {
    "default": {},
    "layerwise, temperature": {"layerwise_scalings": True, "softmax_temperature": 0.5},
    "deep": {"xlora_depth": 3, "xlora_size": 8},
    "deep, no dropout, no softmax": {
        "xlora_depth": 2,
        "xlora_size": 8,
        "xlora_dropout_p": 0.0,
        "enable_softmax": False,
    },
    "top 1": {"top_k_lora": 1},
    "top 2, softmax of those, layerwise": {
        "top_k_lora": 2,
        "enable_softmax": False,
        "enable_softmax_topk": True,
        "layerwise_scalings": True,
    },
    "both softmaxes": {"top_k_lora": 2, "enable_softmax_topk": True},
    "experts in the first pass": {"scaling_pass_value": 0.3, "global_scaling_weight": 2.0},
    "experts in the first pass, top 2": {"scaling_pass_value": 0.3, "top_k_lora": 2},
    "trained experts": {"use_trainable_adapters": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_names_outputs_and_gradients_are_those_of_peft(name, experts):
    base = llama()
    ours, theirs = pair(base, experts, **SETTINGS[name])
    mine = [(n, p.shape, p.requires_grad) for n, p in ours.named_parameters()]
    assert mine == [(n, p.shape, p.requires_grad) for n, p in theirs.named_parameters()]
    mask = torch.ones_like(TOKENS)
    mask[1, :2] = 0
    call = {"input_ids": TOKENS, "labels": TOKENS, "attention_mask": mask}
    y, z = ours(**call), theirs(**call)
    assert_close(y.logits, z.logits.double(), torch.float32)
    assert_close(y.loss, z.loss.double(), torch.float32)
    assert (y.logits - base(TOKENS).logits).abs().max() > 0.05
    assert_close(ours.get_latest_scalings(), theirs.get_latest_scalings().double(), torch.float32)
    y.loss.backward()
    z.loss.backward()
    moved = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert set(moved) == {n for n, p in theirs.named_parameters() if p.grad is not None}
    for parameter, (place, other) in zip(ours.parameters(), theirs.named_parameters(), strict=True):
        if other.grad is not None:
            assert_close(parameter.grad, other.grad.double(), torch.float32, what=place)


def test_half_precision_is_that_of_peft(experts):
    base = llama().to(torch.bfloat16)
    ours, theirs = pair(base, experts)
    mine = [(n, p.dtype, p.requires_grad) for n, p in ours.named_parameters()]
    assert mine == [(n, p.dtype, p.requires_grad) for n, p in theirs.named_parameters()]
    truth = copy.deepcopy(ours).double()(TOKENS).logits
    errors = [(model(TOKENS).logits.double() - truth).norm() / truth.norm() for model in (ours, theirs)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("flat", [False, True])
def test_the_formula(flat, tmp_path):
    base, paths = saved_tokens(tmp_path, flat=flat)
    model = make(base, paths, layerwise_scalings=True, global_scaling_weight=0.5).double()
    hidden = base.embed(TOKENS)
    plain = hidden + base.second.base_layer(base.first.base_layer(hidden).tanh())
    logits = model.internal_xlora_classifier.layers[0](plain)
    weights = torch.softmax(logits.view(2, 6, 2, 2), -1)

    def layer(module, number, x):
        y = module.base_layer(x)
        for index, name in enumerate("01"):
            if name in module.lora_A:
                delta = x @ module.lora_A[name].weight.T @ module.lora_B[name].weight.T
                y = y + 0.5 * module.scaling[name] * weights[:, :, number, index, None] * delta
        return y

    expected = hidden + layer(base.second, 1, layer(base.first, 0, hidden).tanh())
    assert_close(model(TOKENS).logits, expected @ base.embed.weight.T, torch.float64)
    assert_close(model.get_latest_scalings(), weights, torch.float64)


def test_gpt2(tmp_path):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 40, "use_cache": False}
    base = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    paths = save_experts(
        base, [{"r": 2, "target_modules": ["c_attn"]}, {"r": 3, "target_modules": ["c_attn"]}], tmp_path
    )
    model = make(copy.deepcopy(base), paths)
    with torch.no_grad():
        model.internal_xlora_classifier.layers[0].weight.zero_()
        model.internal_xlora_classifier.layers[0].bias.copy_(torch.tensor([9e9, 0.0]))
    alone = PeftModel.from_pretrained(base, paths["0"])
    assert_close(model(TOKENS).logits, alone(TOKENS).logits.double(), torch.float32)


class Pixels(nn.Module):
    """Tokens that are the places of an image, in rows, or of a sequence."""

    def __init__(self, kind=nn.Conv2d, **geometry):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.conv = kind(16, 16, **geometry)
        self.size = (2, 3) if kind is nn.Conv2d else (6,)

    def forward(self, input_ids, output_hidden_states=False, return_dict=True):
        hidden = self.embed(input_ids)
        image = hidden.mT.unflatten(-1, self.size)
        return Output(self.conv(image), (hidden,))


GEOMETRIES = {
    "pointwise": {"kernel_size": 1},
    "strided pointwise": {"kernel_size": 1, "stride": 2},
    "wide": {"kernel_size": (1, 3), "padding": (0, 2), "dilation": (1, 2), "padding_mode": "circular"},
    "groups": {"kernel_size": 1, "groups": 2},
    "sequence": {"kind": nn.Conv1d, "kernel_size": 3, "padding": 1},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions(name, tmp_path):
    torch.manual_seed(0)
    base = Pixels(**GEOMETRIES[name])
    paths = save_experts(base, [{"r": 2, "target_modules": ["conv"]}, {"r": 4, "target_modules": ["conv"]}], tmp_path)
    model = make(base, paths, global_scaling_weight=0.5).double()
    y = model(TOKENS).logits
    layer, hidden = base.conv, base.embed(TOKENS)
    image = hidden.mT.unflatten(-1, base.size)
    expected = layer.base_layer(image)
    for index, expert in enumerate("01"):
        weights = model.get_latest_scalings()[:, :, 0, index].view(2, 1, *base.size)
        delta = layer.lora_B[expert](layer.lora_A[expert](image * weights))
        expected = expected + 0.5 * layer.scaling[expert] * delta
    assert_close(y, expected, torch.float64)
    # One token: one weight for the whole image.
    gates = layer.gates
    with gates.using(torch.tensor([0.3, 0.7], dtype=torch.float64).expand(2, 1, 1, 2)):
        one = layer(image)
    with gates.using(torch.tensor([0.3, 0.7], dtype=torch.float64).expand(2, 6, 1, 2)):
        assert_close(layer(image), one, torch.float64)
    with gates.using(torch.tensor([0.3, 0.7], dtype=torch.float64)):
        assert_close(layer(image), one, torch.float64)
    with gates.using(torch.rand(2, 5, 1, 2).double()), pytest.raises(ValueError, match=r"layer 'conv' got an input"):
        layer(image)


def test_embeddings_are_those_of_peft(tmp_path):
    base = llama()
    configs = [{"r": 2, "target_modules": ["embed_tokens", "q_proj"]}, {"r": 3, "target_modules": ["embed_tokens"]}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = pair(base, save_experts(base, configs, tmp_path), layerwise_scalings=True)
    y, z = (model(input_ids=TOKENS, labels=TOKENS) for model in (ours, theirs))
    assert_close(y.logits, z.logits.double(), torch.float32)
    assert (y.logits - base(TOKENS).logits).abs().max() > 0.05
    for model, output in ((ours, y), (theirs, z)):
        output.loss.backward()
        assert trainable(model) == {f"{CLASSIFIER}layers.0.weight", f"{CLASSIFIER}layers.0.bias"}
    found, expected = (m.internal_xlora_classifier.layers[0].weight.grad for m in (ours, theirs))
    assert_close(found, expected.double(), torch.float32)


def test_one_product_for_all_experts_and_none_in_the_first_pass(experts, monkeypatch):
    ours, theirs = pair(llama(), experts)
    calls = []
    for name in ("low_rank_linear", "low_rank_add"):
        function = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *a, function=function, **k: calls.append(k) or function(*a, **k))
    ours(TOKENS)
    assert len(calls) == 6
    # One gate serves all layers with the same experts.
    assert len({call["gate"].data_ptr() for call in calls}) == 3
    products = []
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            for factor in module.lora_A.values():
                factor.register_forward_hook(lambda *_: products.append(1))
    theirs(TOKENS)
    assert len(products) == 2 * sum(len(values["target_modules"]) for values in EXPERTS) * 2


def test_hooks_on_the_base_layer_see_it(experts):
    model = make(llama(), experts)
    y = model(TOKENS).logits
    seen = []
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert_close(model(TOKENS).logits, y.double(), torch.float32)
    assert len(seen) == 2


def test_training(experts, tmp_path):
    base = llama()
    adapters = save_experts(
        base, [v | {"lora_dropout": p} for v, p in zip(EXPERTS, (0.5, 0.5, 0.2), strict=True)], tmp_path
    )
    for paths, random in ((experts, False), (adapters, True)):
        model = make(copy.deepcopy(base), paths, xlora_depth=2, xlora_size=8).train()
        assert trainable(model) == {f"{CLASSIFIER}layers.{i}.{n}" for i in (0, 3) for n in ("weight", "bias")}
        before = {n: p.clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            losses.append(model(TOKENS, labels=TOKENS).loss)
        assert losses[0] == losses[1]
        model.internal_xlora_classifier.eval()
        torch.manual_seed(0)
        quiet = model(TOKENS, labels=TOKENS).loss
        torch.manual_seed(1)
        assert torch.equal(quiet, model(TOKENS, labels=TOKENS).loss) is not random
        losses[0].backward()
        optimizer.step()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == trainable(model)


def test_gradient_checkpointing(experts):
    model = make(llama(), experts, layerwise_scalings=True).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            functions = [
                m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "gradient_checkpointing")
            ]
        model.zero_grad()
        # Two passes before one backward: each layer has to find the weights of its own pass again.
        losses = [model(tokens, labels=tokens).loss for tokens in (TOKENS, TOKENS.flip(1))]
        sum(losses).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert_close(gradients[1][name], gradient.double(), torch.float32, what=name)
    after = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert all(one is other for one, other in zip(functions, after, strict=True))


def test_generation(experts):
    base = llama()
    ours, theirs = pair(base, experts, xlora_depth=2, xlora_size=8)
    call = {"input_ids": TOKENS, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    call |= {"output_logits": True, "return_dict_in_generate": True}
    y, z = ours.generate(**call), theirs.generate(**call)
    assert torch.equal(y.sequences, z.sequences)
    for mine, other in zip(y.logits, z.logits, strict=True):
        assert_close(mine, other.double(), torch.float32)
    assert "forward" not in ours.get_base_model().__dict__
    with pytest.raises(ValueError, match="use_cache: expected False"):
        ours.generate(**call, use_cache=True)
    with pytest.raises(ValueError, match="use_cache: expected False"):
        ours(TOKENS, use_cache=True)
    with ours.disable_adapter():
        assert torch.equal(ours.generate(**call).sequences, base.generate(**call).sequences)


def test_methods_of_peft(experts):
    ours, theirs = pair(llama(), experts)
    assert ours.get_latest_scalings() is None
    for model in (ours, theirs):
        model.set_topk_lora(2)
        model.set_global_scaling_weight(0.5)
        model.set_scaling_pass_value(None)
        model.enable_scalings_logging()
        for tokens in (TOKENS, TOKENS[:, :3], TOKENS):
            model(tokens)
        model.disable_scalings_logging()
        model(TOKENS)
        assert model.get_global_scaling_weight() == 0.5
    assert ours.peft_config["default"].top_k_lora == 2
    assert ours.peft_config["default"].scaling_pass_value == 1 / 3
    assert_close(ours(TOKENS).logits, theirs(TOKENS).logits.double(), torch.float32)
    assert len(ours.get_scalings_log()) == len(theirs.get_scalings_log()) == 3
    buckets, others = ours.get_bucketed_scalings_log(), theirs.get_bucketed_scalings_log()
    assert {size: positions for size, (positions, _) in buckets.items()} == {6: [0, 2], 3: [1]}
    for size, (_, found) in buckets.items():
        for mine, other in zip(found, others[size][1], strict=True):
            assert_close(mine, other.double(), torch.float32)
    ours.clear_scalings_log()
    assert ours.get_scalings_log() == []
    ours.set_topk_lora(None)
    for method, value in (("set_topk_lora", 4), ("set_topk_lora", 0), ("set_global_scaling_weight", float("nan"))):
        with pytest.raises(ValueError, match=r"value|weight"):
            getattr(ours, method)(value)


def test_copies_and_pickles_agree(experts):
    model = make(llama(), experts)
    # Before the first pass: a transformers model that was asked for hidden states cannot be pickled any more.
    pickled = pickle.loads(pickle.dumps(model))
    y = model(TOKENS, labels=TOKENS)
    y.loss.backward()
    for other in (copy.deepcopy(model), pickled):
        assert torch.equal(other(TOKENS).logits, y.logits)
        other.set_global_scaling_weight(0.0)
        assert_close(other(TOKENS).logits, llama()(TOKENS).logits.double(), torch.float32)
        assert torch.equal(model(TOKENS).logits, y.logits)


def test_compiled_models_agree(tmp_path):
    model = make(*saved_tokens(tmp_path), top_k_lora=1)
    y = model(TOKENS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for tokens in (TOKENS, TOKENS.flip(1)):
        assert_close(compiled(tokens).logits, model(tokens).logits.double(), torch.float32)
    compiled(TOKENS).logits.sum().backward()
    found = model.internal_xlora_classifier.layers[0].weight.grad.clone()
    model.zero_grad()
    y.sum().backward()
    assert_close(found, model.internal_xlora_classifier.layers[0].weight.grad.double(), torch.float32)
    torch._dynamo.reset()


def test_switching_off_and_taking_off(experts):
    base = llama()
    model = make(copy.deepcopy(base), experts)
    y, expected = model(TOKENS).logits, base(TOKENS).logits
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, expected)
    assert torch.equal(model(TOKENS).logits, y)
    model.set_adapter("default", inference_mode=True)
    assert not trainable(model)
    before = snapshot_of(model)
    for call, message in (
        (model.merge_adapter, "no weight can hold"),
        (model.merge_and_unload, "no weight can hold"),
        (lambda: model.set_adapter("0"), "act together"),
        (lambda: model.delete_adapter("0"), "cannot be deleted"),
        (lambda: model.delete_adapter("default"), "cannot be deleted"),
        (lambda: model.add_adapter("more", LoraConfig(r=2)), "takes no further adapters"),
        (lambda: model.load_adapter(experts["0"], "more"), "takes no further adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert_same(model, before)
    plain = model.unload()
    assert torch.equal(plain(TOKENS).logits, expected)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]


def snapshot_of(model):
    modules, tensors, _ = snapshot(model.get_base_model())
    return modules, tensors, list(model.peft_config), list(model.active_adapters), trainable(model)


def assert_same(model, before):
    assert_unchanged(model.get_base_model(), (*before[:2], None))
    assert (list(model.peft_config), list(model.active_adapters), trainable(model)) == before[2:]
