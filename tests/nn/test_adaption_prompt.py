"""Llama-Adapter: the formula, identity at the start, several adapters, generation, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle

import peft
import pytest
import torch
from support.parity_cases import GPT2_SIZES, MODELS, SMALL, TOKENS
from support.toy_model import assert_unchanged, lora, snapshot, toy, trainable
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftk import AdaptionPromptConfig, LoraConfig, PeftModel, get_model_status, get_peft_model
from peftk.nn import AdaptedAttention
from peftk.testing.compare import LIMITS, assert_close, assert_same_bits

KINDS = ("llama", "llama_gqa", "mistral", "gpt2")
# Heads that are wider together than the hidden states, shared keys and values, and biases everywhere.
WIDE = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "attention_bias": True}


def prompts(length=3, layers=2, **kwargs):
    return AdaptionPromptConfig(adapter_len=length, adapter_layers=layers, **kwargs)


def open_gates(model, value=0.7):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(value)
    return model


def adapted(kind="llama", seed=0, **kwargs):
    torch.manual_seed(seed)
    base = MODELS[kind]().eval()
    return base, open_gates(get_peft_model(copy.deepcopy(base), prompts(**kwargs)))


def attentions(model):
    return [layer for _, layer in model.base_model._layers()]


def wide_attention(dtype=torch.float64, **changes):
    """One adapted attention module with random biases, and what a layer of the model passes to it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SMALL | WIDE | changes))).to(dtype)
    attention = model.model.layers[1].self_attn
    for name, parameter in attention.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    hidden = torch.randn(2, 5, 16, dtype=dtype)
    position = model.model.rotary_emb(hidden, torch.arange(3, 8)[None])
    layer = AdaptedAttention(attention, prompts(length=4))
    torch.nn.init.constant_(layer.adaption_gate, 0.6)
    return layer, hidden, {"position_embeddings": position, "attention_mask": None}


def formula(layer, hidden, position_embeddings):
    """What the adapter adds, head by head and token by token."""
    attention = layer.model
    size, heads = attention.head_dim, attention.config.num_attention_heads
    group = heads // attention.config.num_key_value_heads
    query = attention.q_proj(hidden)
    key, value = attention.k_proj(layer.adaption_prompt)[0], attention.v_proj(layer.adaption_prompt)[0]
    cos, sin = (t.expand(hidden.shape[0], -1, -1) for t in position_embeddings)
    rows = []
    for batch in range(hidden.shape[0]):
        for token in range(hidden.shape[1]):
            parts = []
            for head in range(heads):
                q = query[batch, token, head * size : (head + 1) * size]
                turned = torch.cat((-q[size // 2 :], q[: size // 2]))
                q = q * cos[batch, token] + turned * sin[batch, token]
                k, v = (t[:, head // group * size : (head // group + 1) * size] for t in (key, value))
                parts.append(layer.adaption_gate * torch.softmax(k @ q / math.sqrt(size), 0) @ v)
            rows.append(attention.o_proj.weight @ torch.cat(parts))
    return torch.stack(rows).view(*hidden.shape)


def test_the_formula_where_heads_are_wider_than_the_hidden_states():
    layer, hidden, call = wide_attention()
    alone = layer.model(hidden_states=hidden, **call)[0]
    y = layer(hidden_states=hidden, **call)[0]
    expected = formula(layer, hidden, call["position_embeddings"])
    assert expected.abs().max() > 1e-2
    assert_close(y - alone, expected, torch.float64)


def test_gradients():
    layer, hidden, call = wide_attention()
    inputs = hidden[:1, :2].clone().requires_grad_(True), layer.adaption_prompt, layer.adaption_gate
    call["position_embeddings"] = tuple(t[:, :2] for t in call["position_embeddings"])
    assert torch.autograd.gradcheck(lambda x, *_: layer(hidden_states=x, **call)[0], inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit(kind):
    torch.manual_seed(0)
    base = MODELS[kind]()
    model = get_peft_model(copy.deepcopy(base), prompts())
    for tokens in (TOKENS, TOKENS[:1, :1], TOKENS[:1]):
        assert_same_bits(model(tokens).logits, base(tokens).logits)


def test_each_projection_runs_once_on_the_tokens():
    base, ours = adapted(layers=1)
    theirs = peft.get_peft_model(base, peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    counts = []
    for model in (ours, theirs):
        attention, seen = model.get_submodule("base_model.model.model.layers.1.self_attn").model, []
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(attention, name)
            projection.register_forward_pre_hook(lambda _, x, name=name, seen=seen: seen.append((name, x[0].shape)))
        model(TOKENS)
        tokens = [name for name, shape in seen if shape[1] == TOKENS.shape[1]]
        counts.append({name: tokens.count(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    assert counts == [dict.fromkeys(counts[0], 1), {"q_proj": 2, "k_proj": 1, "v_proj": 2, "o_proj": 2}]


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_padding_and_every_attention_implementation(kind):
    base, ours = adapted(kind)
    theirs = peft.get_peft_model(base, peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2)).eval()
    theirs.load_state_dict(ours.state_dict())
    mask = torch.ones_like(TOKENS)
    mask[1, :2] = 0
    for how in ("sdpa", "eager"):
        for model in (ours, theirs):
            model.get_base_model().set_attn_implementation(how)
        y, z = (m(TOKENS, attention_mask=mask, output_attentions=how == "eager") for m in (ours, theirs))
        assert_close(y.logits, z.logits.double(), torch.float32)
        if how == "eager":
            assert [t.shape for t in y.attentions] == [(2, len(z.attentions[0][0]), 6, 6)] * 2


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_generation_with_and_without_a_cache(kind):
    base, model = adapted(kind)
    call = {"input_ids": TOKENS, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    call |= {"output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (model.generate(**call, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        assert_close(one, other.double(), torch.float32)
    assert not torch.equal(cached.logits[-1], base.generate(**call).logits[-1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing(kind, reentrant):
    _, model = adapted(kind)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train().zero_grad()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 4
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert_close(gradients[1][name], gradient.double(), torch.float32, what=name)


def test_copies_pickles_and_compiled_models_agree():
    _, model = adapted("llama_gqa")
    y = model(TOKENS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS).logits, y)
        open_gates(other, 0.0)
        assert torch.equal(model(TOKENS).logits, y)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(TOKENS).logits, y.double(), torch.float32)
    torch._dynamo.reset()


def test_half_precision_stays_half_as_in_peft():
    torch.manual_seed(0)
    base = MODELS["llama_gqa"]().to(torch.bfloat16)
    made = []
    for build, config in ((get_peft_model, AdaptionPromptConfig), (peft.get_peft_model, peft.AdaptionPromptConfig)):
        torch.manual_seed(1)
        model = build(copy.deepcopy(base), config(adapter_len=3, adapter_layers=1))
        made.append([(n, p.dtype, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()])
    for mine, theirs in zip(*made, strict=True):
        assert mine[:3] == theirs[:3]
        assert torch.equal(mine[3], theirs[3])
    ours = open_gates(get_peft_model(base, prompts()))
    y, truth = ours(TOKENS).logits, copy.deepcopy(ours).double()(TOKENS).logits
    # The whole model is in bfloat16, and each of its layers rounds.
    assert y.dtype is torch.bfloat16
    assert (y.double() - truth).norm() <= 2 * LIMITS[torch.bfloat16] * truth.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted("llama_gqa")[1](TOKENS).logits.isfinite().all()


# -- several adapters ---------------------------------------------------------------------------------------------


def test_several_adapters(tmp_path):
    base, model = adapted()
    y = model(TOKENS).logits
    torch.manual_seed(2)
    model.add_adapter("top", prompts(length=5, layers=1))
    assert torch.equal(model(TOKENS).logits, y)
    model.set_adapter("top")
    assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
    open_gates(model, 0.3)
    z = model(TOKENS).logits
    assert not torch.equal(z, y)
    place = "base_model.model.model.layers.1.self_attn."
    assert trainable(model) == {place + "adaption_prompt", place + "adaption_gate"}
    assert {n for n in model.state_dict() if "inactive" in n} == {
        f"base_model.model.model.layers.{i}.self_attn.inactive.default.{name}"
        for i in (0, 1)
        for name in ("adaption_prompt", "adaption_gate")
    }
    open_gates(model, 0.7)  # both again
    model.set_adapter("top", inference_mode=True)
    assert not trainable(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only one adaption prompt can be active"):
        model.set_adapter(["default", "top"])
    assert model.active_adapters == ["top"]
    model.set_adapter("default")
    assert torch.equal(model(TOKENS).logits, y)
    model.double().set_adapter("top")
    assert attentions(model)[1].adaption_prompt.dtype is torch.float64
    status = get_model_status(model)
    assert (status.num_adapter_layers, status.active_adapters, status.merged_adapters) == (2, ["top"], [])
    assert status.requires_grad == {"default": False, "top": True}
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(TOKENS).logits, y)
    again.load_adapter(tmp_path / "top", "top")
    again.set_adapter("top")
    top = again(TOKENS).logits
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "top")).eval()
    assert_close(theirs(TOKENS).logits, top.double(), torch.float32)
    again.load_adapter(tmp_path / "top", "top")  # the same values once more
    assert torch.equal(again(TOKENS).logits, top)
    with pytest.raises(ValueError, match="adapter_len"):
        again.load_adapter(tmp_path, "top")
    with pytest.warns(UserWarning, match="'default' is active now"):
        again.delete_adapter("top")
    assert torch.equal(again(TOKENS).logits, y)
    again.delete_adapter("default")
    assert torch.equal(again(TOKENS).logits, base(TOKENS).logits)
    assert not [n for n, _ in again.named_parameters() if "adaption" in n]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_switching_off_and_taking_off(kind, capsys):
    base, model = adapted(kind)
    y = model(TOKENS).logits
    before = trainable(model)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
    assert torch.equal(model(TOKENS).logits, y)
    assert trainable(model) == before
    model.print_trainable_parameters()
    assert "trainable params: 98 ||" in capsys.readouterr().out
    plain = model.unload()
    assert torch.equal(plain(TOKENS).logits, base(TOKENS).logits)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_merging_is_refused_and_changes_nothing():
    _, model = adapted()
    before = snapshot(model)
    for call in (model.merge_adapter, model.merge_and_unload, attentions(model)[0].merge):
        with pytest.raises(ValueError, match="adaption prompt, which attends to the input and which no weight"):
            call()
    assert_unchanged(model, before)


# -- what is refused ----------------------------------------------------------------------------------------------

BAD = [
    *(("adapter_len", v) for v in [0, -1, True, 2.5, "8", 2**70]),
    *(("adapter_layers", v) for v in [0, -1, True, 2.5, "8", 2**70]),
    *(("target_modules", v) for v in ["", 3, ["self_attn"]]),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        AdaptionPromptConfig(**{name: value})


REFUSED = {
    "adapter_len: expected a number from 1, got None": ("llama", {"adapter_layers": 1}),
    "adapter_layers: expected a number from 1, got None": ("llama", {"adapter_len": 1}),
    "adapter_layers: expected at most 2, .* got 3": ("llama", {"adapter_len": 1, "adapter_layers": 3}),
    "adapter_len: expected at most 16, the context of the model, got 17": (
        "gpt2",
        {"adapter_len": 17, "adapter_layers": 1},
    ),
    r"'bert' are not supported; supported are \['gpt2', 'llama', 'mistral'\]": (
        "bert",
        {"adapter_len": 1, "adapter_layers": 1},
    ),
    "models of type None are not supported": ("mlp", {"adapter_len": 1, "adapter_layers": 1}),
    "target_modules: no module of the model has the name 'attn'; .* is called 'self_attn'": (
        "llama",
        {"adapter_len": 1, "adapter_layers": 1, "target_modules": "attn"},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_the_model_is_refused(message):
    kind, values = REFUSED[message]
    model = MODELS[kind]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, AdaptionPromptConfig(**values))
    assert_unchanged(model, before)


def test_modules_that_are_no_such_attention_are_refused():
    with pytest.raises(TypeError, match=r"'model.layers.1.mlp' is a .*LlamaMLP.* has q_proj, k_proj, v_proj, o_proj"):
        get_peft_model(MODELS["llama"](), prompts(layers=1, target_modules="mlp"))
    cross = GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, add_cross_attention=True))
    with pytest.raises(TypeError, match="cross-attention has no adaption prompts"):
        get_peft_model(cross, prompts(target_modules="crossattention"))
    with pytest.raises(TypeError, match="only the attention modules of transformers models"):
        AdaptedAttention(torch.nn.Linear(2, 2), prompts())


def test_no_other_method_shares_the_model():
    _, model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match="LORA cannot be added to a model with adapter 'default', which is ADAPTION"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    assert_unchanged(model, before)
    other = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="ADAPTION_PROMPT cannot be added to a model with adapter 'default'"):
        other.add_adapter("prompts", prompts())
    assert get_peft_model(toy(), lora()).peft_type == "LORA"


# -- where PEFT 0.21 is wrong: each test shows both, so that it fails if PEFT is ever put right --------------------


def test_peft_fails_where_heads_are_wider_than_the_hidden_states():
    base = LlamaForCausalLM(LlamaConfig(**(SMALL | WIDE)))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        theirs(TOKENS)
    assert_same_bits(get_peft_model(copy.deepcopy(base), prompts())(TOKENS).logits, base(TOKENS).logits)


def test_peft_adds_the_bias_of_the_output_projection_twice():
    base = LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True))
    for layer in base.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.bias)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    with pytest.raises(AssertionError):
        assert_close(theirs(TOKENS).logits, base(TOKENS).logits.double(), torch.float32)
    assert_same_bits(get_peft_model(copy.deepcopy(base), prompts())(TOKENS).logits, base(TOKENS).logits)
