"""Base models that share modules and weights, compute their weights, are checkpointed or called with other tensors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.layer_cases import BASES, CASES, TOYS, example, make
from support.toy_model import METHODS, Checkpointed, X, assert_unchanged, lora, snapshot, toy
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm
from transformers import GPT2Config, GPT2LMHeadModel

from peftk.models.peft_model import get_peft_model
from peftk.nn import LoraConfig, layer_class_for
from peftk.testing.compare import assert_close

IDS = torch.arange(6)[None]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- modules and weights that are shared --------------------------------------------------------------------------


class Shared(nn.Module):
    """One linear layer under three names, and a block under two."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = self.first
        self.heads = nn.ModuleList([self.first, nn.Linear(12, 12)])
        self.block = nn.ModuleDict({"query": nn.Linear(12, 12)})
        self.again = self.block

    def forward(self, x):
        return self.again["query"](self.second(self.first(self.block["query"](x)).relu()))


def test_a_module_of_several_names_is_adapted_under_one_and_says_so():
    base = Shared()
    with pytest.warns(UserWarning, match=r"module 'first' is \['second', 'heads\.0'\] too; it is adapted where it is"):
        model = get_peft_model(base, lora(target_modules=["first"]))
    assert base.second is base.heads[0] is base.first.base_layer
    before = snapshot(model)
    for method in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"shared by .*second\.weight.*first\.base_layer\.weight.*heads\.0\.weight"
        ):
            method()
        assert_unchanged(model, before)
    with warnings.catch_warnings():
        # It has been said.
        warnings.simplefilter("error")
        model.add_adapter("other", lora(target_modules=["first"]))
    base = Shared()
    with pytest.warns(UserWarning, match="'second' is the same module as 'first', under which name it is adapted; the"):
        get_peft_model(Shared(), lora(target_modules=["first", "second"]))
    for names, other in ((["second"], "second"), (["heads.0"], r"heads\.0")):
        with pytest.raises(ValueError, match=f"'{other}' is the same module as 'first', under which name it is"):
            get_peft_model(base, lora(target_modules=names))


def test_a_module_in_a_shared_block_is_adapted_wherever_the_block_is():
    base = Shared()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base, lora(target_modules=["query"]))
    assert base.again["query"] is base.block["query"]
    y = model(X)
    model.merge_adapter()
    assert_close(model(X), y.detach().double(), torch.float32)
    model.unmerge_adapter()
    assert torch.equal(model(X), y)
    assert_close(model.merge_and_unload()(X), y.detach().double(), torch.float32)


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 16, "n_positions": 8}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["lm_head", "wte"]])
def test_tied_embeddings_are_not_merged_behind_each_other(targets):
    base = gpt2()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    y = model(input_ids=IDS).logits
    before = snapshot(model)
    for method in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"shared by .*wte.*lm_head.*give the layer a copy"):
            method()
        assert_unchanged(model, before)
    layer = base.lm_head if "lm_head" in targets else base.transformer.wte
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone())
    with pytest.warns(UserWarning, match=r"no longer tied; tie_word_embeddings is set to False"):
        merged = model.merge_and_unload()
    assert_close(merged(input_ids=IDS).logits, y.detach().double(), torch.float32)


def test_a_trained_head_is_not_tied_again_when_the_merged_model_is_loaded(tmp_path):
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    model = get_peft_model(gpt2(), config).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1)
    y = model(input_ids=IDS).logits
    assert copy.deepcopy(model).unload().config.tie_word_embeddings
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_close(loaded(input_ids=IDS).logits, y.detach().double(), torch.float32)


# -- weights that are computed ------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Twice the weight."""

    def forward(self, weight):
        return 2 * weight


def parametrized(base):
    parametrize.register_parametrization(base, "weight", Twice())


def normed(base):
    parametrizations.weight_norm(base)
    with torch.no_grad():
        base.parametrizations.weight.original0.mul_(2)


@pytest.mark.parametrize("compute", [parametrized, normed])
@pytest.mark.parametrize("name", CASES)
def test_computed_weights_are_those_that_they_are(name, compute):
    case = CASES[name]
    if case.base == "embedding" and compute is normed:
        pytest.skip("the row of the padding has no direction")
    torch.manual_seed(0)
    base = BASES[case.base][0](bias=case.base != "embedding")
    plain = copy.deepcopy(base)
    compute(base)
    plain.weight.data.mul_(2)
    layers = []
    for one in (base, plain):
        torch.manual_seed(1)
        layers.append(layer_class_for(case.config, one)(one, case.config))
    x = example(case)
    y, z = (layer(x) for layer in layers)
    assert_close(y, z.detach().double(), torch.float32)
    for output in (y, z):
        output.sum().backward()
    found, expected = map(gradients, layers)
    assert found.keys() == expected.keys() and found
    for key, grad in found.items():
        assert_close(grad, expected[key].double(), torch.float32, what=key)
    before = copy.deepcopy(layers[0].state_dict())
    with pytest.raises(ValueError, match="the base weight is computed from other parameters"):
        layers[0].merge()
    assert not layers[0].merged
    assert all(torch.equal(value, before[key]) for key, value in layers[0].state_dict().items())


def test_a_model_with_computed_weights_names_the_module_that_cannot_be_merged():
    base = toy()
    parametrized(base.layers[1].query)
    model = get_peft_model(base, lora())
    before = snapshot(model)
    for method in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"module 'layers\.1\.query': merge: the base weight is computed"):
            method()
        assert_unchanged(model, before)
    layer = make(CASES["lora_bias"])
    parametrize.register_parametrization(layer.base_layer, "bias", Twice())
    with pytest.raises(ValueError, match="the base bias is computed from other parameters"):
        layer.merge()
    assert not layer.merged


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_a_hook_computes():
    base = weight_norm(nn.Linear(12, 12))
    with torch.no_grad():
        base.weight_g.mul_(2)
    layer = layer_class_for(lora(), base)(base, lora())
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    y = layer(X)
    expected = nn.functional.linear(X, base.weight, base.bias) + X @ a.T @ b.T * layer.scaling["default"]
    assert_close(y, expected.detach().double(), torch.float32)
    # What the norms of the weight are is known once the layer is called.
    with pytest.raises(NotImplementedError, match=r"use_dora.*computed by a hook"):
        layer_class_for(lora(use_dora=True), base)(base, lora(use_dora=True))


# -- other ways to call a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_gradients_with_dropout_are_those_without_checkpointing(method, use_reentrant):
    config = copy.deepcopy(METHODS[method])
    for name, value in TOYS[method].dropout.items():
        setattr(config, name, value)
    found = []
    for base in (Checkpointed(use_reentrant), toy()):
        torch.manual_seed(1)
        model = get_peft_model(base, config).train()
        torch.manual_seed(2)
        model(X).square().sum().backward()
        found.append({name.replace("model.toy.", "model."): grad for name, grad in gradients(model).items()})
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 3
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


@pytest.mark.parametrize("method", METHODS)
def test_functional_calls(method):
    model, other = (get_peft_model(toy(seed), METHODS[method]) for seed in (0, 1))
    y = other(X)
    y.square().sum().backward()
    expected = gradients(other)
    values = {name: p.detach() for name, p in other.named_parameters()}
    before = snapshot(model)
    assert_close(torch.func.functional_call(model, values, (X,)), y.detach().double(), torch.float32)

    def loss(trained):
        return torch.func.functional_call(model, values | trained, (X,)).square().sum()

    trained = {name: values[name] for name in expected}
    for name, grad in torch.func.grad(loss)(trained).items():
        assert_close(grad, expected[name].double(), torch.float32, what=name)
    leaves = {name: value.clone().requires_grad_() for name, value in trained.items()}
    loss(leaves).backward()
    for name, leaf in leaves.items():
        assert_close(leaf.grad, expected[name].double(), torch.float32, what=name)
    assert_unchanged(model, before)
    assert not gradients(model)
