"""`trainable_token_indices`: rows of embeddings and of layers tied to them, against PEFT and dense weights."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import peftk
from peftk import AdaLoraConfig, LoraConfig, PeftModel, get_layer_status, get_peft_model
from peftk.nn.trainable_tokens import TiedTokens, TrainableTokens
from peftk.testing.compare import assert_close, assert_same_bits

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.tensor([[1, 5, 7, 1], [0, 9, 5, 3]])
ROWS = "trainable_tokens_delta"


def llama(tie: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=40, tie_word_embeddings=tie)).eval()


def config(tokens, **values):
    return LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=tokens, **values)


def fill(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ROWS in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: nn.Module, ids: torch.Tensor = IDS, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def by_file_name(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace(f".{ROWS}", f".token_adapter.{ROWS}"): tensor for name, tensor in tensors.items()}


CHOICES = {
    "list": [1, 5],
    "name": {"embed_tokens": [5, 1]},
    "both": {"embed_tokens": [1, 5], "lm_head": [1, 5]},
    "apart": {"embed_tokens": [1, 5], "lm_head": [2]},
    "head": {"lm_head": [3, 2, 7]},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("tie", [False, True], ids=["free", "tied"])
def test_outputs_gradients_and_files_are_those_of_peft(tie, choice, tmp_path):
    base = llama(tie)
    expected = logits(base)
    torch.manual_seed(1)
    ours = get_peft_model(copy.deepcopy(base), config(CHOICES[choice]))
    torch.manual_seed(1)
    values = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(**values, trainable_token_indices=copy.deepcopy(CHOICES[choice]))
    )
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    # The products of a head's rows are rounded apart from those of the other rows.
    assert_close(logits(ours), expected.double(), torch.float32, what="an untrained adapter")
    embeddings = ours.get_base_model().model.embed_tokens
    assert_same_bits(embeddings(IDS), base.model.embed_tokens(IDS), what="an untrained embedding")
    theirs.load_state_dict(by_file_name(ours.state_dict()), strict=False)
    for model in (ours, theirs):
        fill(model)
        y = logits(model)
        (y * torch.sin(torch.arange(y.numel()).view_as(y))).sum().backward()
    assert_close(logits(ours), logits(theirs).double(), torch.float32)
    assert (logits(ours) - expected).abs().max() > 0.01
    gradients = by_file_name({n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    others = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == others.keys() and sum(ROWS in name for name in gradients) >= 1
    for name, gradient in others.items():
        assert_close(gradients[name], gradient.double(), torch.float32, what=name)
    for mode in (False, True):
        ours.save_pretrained(tmp_path / "ours", save_embedding_layers=mode)
        theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=mode)
        files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
        # PEFT writes the rows of a tied layer once more beside whole embeddings.
        extra = {name for name in files[1] if mode and tie and name.endswith(f"lm_head.token_adapter.{ROWS}")}
        assert files[0].keys() | extra == files[1].keys()
        fresh = PeftModel.from_pretrained(llama(tie), tmp_path / "theirs")
        assert_close(logits(fresh), logits(theirs).double(), torch.float32)
        back = peft.PeftModel.from_pretrained(llama(tie), str(tmp_path / "ours"))
        assert_close(logits(back), logits(ours).double(), torch.float32)
    saved = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert saved[0]["trainable_token_indices"] == saved[1]["trainable_token_indices"] == CHOICES[choice]


@pytest.mark.parametrize("tie", [False, True], ids=["free", "tied"])
def test_the_truth_is_a_model_with_other_rows(tie):
    model = fill(get_peft_model(llama(tie), config([5, 1]))).double()
    x = IDS
    got = logits(model, x)
    grads = torch.autograd.grad(
        got.sin().sum(), model.get_parameter(f"base_model.model.model.embed_tokens.{ROWS}.default")
    )
    rows = model.get_parameter(f"base_model.model.model.embed_tokens.{ROWS}.default").detach().clone().requires_grad_()
    plain = copy.deepcopy(model).merge_and_unload()
    weight = llama(tie).double().model.embed_tokens.weight.detach().clone()
    weight = weight.index_put((torch.tensor([5, 1]),), rows)
    swapped = {"model.embed_tokens.weight": weight, **({"lm_head.weight": weight} if tie else {})}
    truth = torch.func.functional_call(plain, swapped, kwargs={"input_ids": x}, tie_weights=False).logits
    assert_close(got, truth, torch.float64)
    assert_close(grads[0], torch.autograd.grad(truth.sin().sum(), rows)[0], torch.float64)


@pytest.mark.parametrize("tie", [False, True], ids=["free", "tied"])
def test_merging_switching_and_taking_off(tie, tmp_path):
    base = llama(tie)
    original, plain = base.model.embed_tokens.weight.detach().clone(), logits(base)
    model = fill(get_peft_model(base, config([1, 5])))
    y = logits(model)
    with model.disable_adapter():
        assert_same_bits(logits(model), plain)
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        assert_close(logits(model), y.double(), torch.float32)
        with model.disable_adapter():
            assert_same_bits(logits(model), plain)
        assert model.get_base_model().model.embed_tokens.merged_adapters == ["default"]
        model.unmerge_adapter()
        assert_same_bits(model.get_base_model().model.embed_tokens.weight, original)
        assert_same_bits(logits(model), y)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(logits(copied), y)
        if tie:
            inner = copied.get_base_model()
            head, embeddings = inner.lm_head, inner.model.embed_tokens
            assert getattr(head, ROWS)["default"] is getattr(embeddings, ROWS)["default"]
            assert head.base_layer.weight is embeddings.base_layer.weight
    other = copy.deepcopy(model)
    done = other.merge_and_unload()
    assert_close(logits(done), y.double(), torch.float32)
    assert type(done.model.embed_tokens) is nn.Embedding and type(done.lm_head) is nn.Linear
    assert (done.lm_head.weight is done.model.embed_tokens.weight) is tie
    with torch.no_grad():
        getattr(model.get_base_model().model.embed_tokens, ROWS)["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="safe_merge"):
        model.merge_adapter(safe_merge=True)
    assert (
        not model.get_base_model().model.embed_tokens.merged and not model.get_base_model().lm_head.merged
        if tie
        else True
    )
    back = model.unload()
    assert_same_bits(logits(back), plain)


def test_several_adapters(tmp_path):
    model = fill(get_peft_model(llama(True), config([1, 5])))
    with pytest.raises(ValueError, match="is none of them; call resize_token_embeddings"):
        model.add_adapter("far", config([40]))
    model.add_adapter("other", config([9]))
    model.add_adapter("same", config([5, 7]))
    model.add_adapter("none", LoraConfig(r=2, target_modules=["q_proj"]))
    fill(model).eval()
    alone = {}
    for name in ("default", "other", "same", "none"):
        model.set_adapter(name)
        alone[name] = logits(model)
        rows = {n for n, p in model.named_parameters() if ROWS in n and p.requires_grad}
        assert rows == ({f"base_model.model.model.embed_tokens.{ROWS}.{name}"} if name != "none" else set())
    model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter()
    assert_close(logits(model), both.double(), torch.float32)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match=r"'default' and 'same' both train the row of token 5"):
        model.set_adapter(["default", "same"])
    assert model.active_adapters == ["default", "other"]
    with pytest.raises(ValueError, match="both train the row of token 5"):
        model.merge_adapter(["default", "same"])
    # Every sample with its own rows.
    ids = IDS[:1].expand(5, -1)
    names = ["same", "__base__", "default", "other", "none"]
    mixed = logits(model, ids, adapter_names=names)
    with model.disable_adapter():
        plain = logits(model)
    for row, name in enumerate(names):
        expected = (alone[name] if name != "__base__" else plain)[0]
        assert_close(mixed[row], expected.double(), torch.float32, what=name)
    model.delete_adapter("default")
    model.set_adapter("same")
    assert_same_bits(logits(model), alone["same"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(True), tmp_path / "same", adapter_name="again")
    assert_same_bits(logits(again), alone["same"])
    again.load_adapter(tmp_path / "other", "second")
    again.set_adapter("second")
    assert_close(logits(again), alone["other"].double(), torch.float32)
    with pytest.raises(ValueError, match="trainable_token_indices: the file has"):
        again.load_adapter(tmp_path / "same", "second")


def test_status_and_parameters():
    model = get_peft_model(llama(True), config([1, 5]))
    found = {row.name.rpartition(".")[2]: row for row in get_layer_status(model)}
    assert found["embed_tokens"].module_type == "TrainableTokens" and found["lm_head"].module_type == "TiedTokens"
    assert all(row.requires_grad == {"default": True} for row in found.values())
    assert isinstance(model.get_base_model().model.embed_tokens, TrainableTokens) and isinstance(
        model.get_base_model().lm_head, TiedTokens
    )
    layer = model.get_base_model().model.embed_tokens
    assert layer.token_adapter.trainable_tokens_delta["default"] is layer.trainable_tokens_delta["default"]
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == 2 * 16 + sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_bases(dtype):
    base = llama(True).to(dtype)
    expected = logits(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5]))
    rows = getattr(model.get_base_model().model.embed_tokens, ROWS)["default"]
    assert rows.dtype is torch.float32
    assert_same_bits(model.get_base_model().model.embed_tokens(IDS), base.model.embed_tokens.base_layer(IDS))
    assert_close(logits(model), expected.double(), dtype)
    fill(model)
    y = logits(model)
    y.float().square().sum().backward()
    assert rows.grad.dtype is torch.float32 and rows.grad.abs().sum() > 0
    exact = copy.deepcopy(model).merge_and_unload().double()
    assert_close(y, logits(exact), dtype)


def test_gpt2_t5_and_scaled_embeddings():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    models = {
        "gpt2": (GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)), "c_attn", {}),
        "t5": (
            T5ForConditionalGeneration(
                T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, dropout_rate=0.0)
            ),
            "q",
            {"decoder_input_ids": IDS},
        ),
    }
    text = SIZES | {"head_dim": 8, "num_key_value_heads": 1, "vocab_size": 40}
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    gemma = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4})
    models["gemma"] = (Gemma3ForConditionalGeneration(gemma), "q_proj", {})
    for name, (base, target, more) in models.items():
        base.eval()
        plain = logits(base, **more)
        values = {"r": 2, "target_modules": [target], "trainable_token_indices": [1, 5]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = fill(get_peft_model(copy.deepcopy(base), LoraConfig(**values)))
            theirs = fill(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**values)))
        y = logits(ours, **more)
        assert (y - plain).abs().max() > 1e-3, name
        assert_close(y, logits(theirs, **more).double(), torch.float32, what=name)
        ours.merge_adapter()
        assert_close(logits(ours, **more), y.double(), torch.float32, what=name)
        ours.unmerge_adapter()
        assert_same_bits(logits(ours, **more), y)


def test_the_padding_row_gets_no_gradient_and_the_bias_of_a_tied_head_stays():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(6, 4, padding_idx=0)
            self.mix = nn.Linear(4, 4)
            self.head = nn.Linear(4, 6)
            self.head.weight = self.embed_tokens.weight

        def forward(self, ids):
            return self.head(self.mix(self.embed_tokens(ids)))

    model = get_peft_model(Small(), LoraConfig(r=1, target_modules=["mix"], trainable_token_indices=[0, 4]))
    base = model.get_base_model()
    ids = torch.tensor([[0, 4, 2]])
    with torch.no_grad():
        base.head.bias.copy_(torch.arange(6.0))
    y = model(ids)
    rows = getattr(base.embed_tokens, ROWS)["default"]
    weight = base.embed_tokens.base_layer.weight.detach()
    hidden = base.mix(weight[ids])
    assert_close(y, hidden @ weight.T + base.head.bias, torch.float32)
    # Through the embedding alone.
    gradient = torch.autograd.grad(base.embed_tokens(ids).sum(), rows)[0]
    assert torch.equal(gradient, torch.tensor([[0.0] * 4, [1.0] * 4]))


def test_peft_loses_the_bias_of_a_head_and_refuses_several_adapters():
    base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 6))
    values = {"r": 1, "target_modules": ["0"], "trainable_token_indices": {"1": [2]}}
    x = torch.randn(2, 3)
    expected = base(x)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**values))
    assert_close(theirs(x), expected - base[1].bias, torch.float32)
    theirs.add_adapter("other", peft.LoraConfig(**values | {"trainable_token_indices": {"1": [3]}}))
    with pytest.raises(ValueError, match="Only one adapter can be set"):
        theirs.base_model.set_adapter(["default", "other"])
    ours = get_peft_model(base, LoraConfig(**values))
    assert_close(ours(x), expected, torch.float32)


def test_adalora_trains_tokens_too(tmp_path):
    values = {"target_modules": ["q_proj"], "init_r": 2, "target_r": 1, "total_step": 5}
    model = fill(get_peft_model(llama(True), AdaLoraConfig(**values, trainable_token_indices=[2])))
    logits(model).sum().backward()
    model.update_and_allocate(0)
    model.eval().save_pretrained(tmp_path)
    assert_same_bits(logits(PeftModel.from_pretrained(llama(True), tmp_path)), logits(model))


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_copies_of_tied_modules_stay_tied(names, tmp_path):
    values = {"r": 2, "target_modules": ["q_proj"], "ensure_weight_tying": True, "init_lora_weights": False}
    models = []
    for library in (peftk, peft):
        torch.manual_seed(1)
        model = library.get_peft_model(llama(True), library.LoraConfig(**values, modules_to_save=list(names)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.linspace(0, 1, parameter.numel()).view_as(parameter))
        logits(model).square().sum().backward()
        models.append(model)
    ours, theirs = models
    assert_close(logits(ours), logits(theirs).double(), torch.float32)
    found, expected = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in models)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient.double(), torch.float32, what=name)
    for who, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(str(tmp_path / who), save_embedding_layers=False)
        for library in (peftk, peft):
            loaded = library.PeftModel.from_pretrained(llama(True), str(tmp_path / who))
            assert_close(logits(loaded), logits(theirs).double(), torch.float32)
    keys = [load_file(tmp_path / who / "adapter_model.safetensors").keys() for who in ("ours", "theirs")]
    assert keys[0] == keys[1]
    y = logits(ours)
    done = copy.deepcopy(ours).merge_and_unload()
    assert done.lm_head.weight is done.model.embed_tokens.weight
    assert_close(logits(done), y.double(), torch.float32)
    assert_same_bits(logits(ours.unload()), logits(llama(True)))


def test_what_is_interrupted_changes_nothing(monkeypatch):
    base = llama(True)
    before = {n: (type(m), [p.requires_grad for p in m.parameters(recurse=False)]) for n, m in base.named_modules()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TiedTokens, "attach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(base, config([1]))
    assert before == {
        n: (type(m), [p.requires_grad for p in m.parameters(recurse=False)]) for n, m in base.named_modules()
    }


def test_what_is_refused_changes_nothing():
    for tokens, values, match in (
        ({"embed_token": [1]}, {}, "trainable_token_indices: no module has this name.*embed_tokens"),
        ({"norm": [1]}, {}, r"module 'model.norm' is a LlamaRMSNorm, whose rows cannot be trained"),
        ([1, 99], {}, "has 40 rows, and 99 is none of them"),
        ([1], {"modules_to_save": ["embed_tokens"]}, "or trained in full by"),
        ([1], {"modules_to_save": ["lm_head"]}, "or what shares its weight"),
        ({"q_proj": [1]}, {}, "is adapted by target_modules"),
        ({"embed_tokens": [1], "lm_head": [2]}, {"ensure_weight_tying": True}, "ensure_weight_tying: .* other rows"),
    ):
        base = llama(True)
        before = {name: type(module) for name, module in base.named_modules()}
        with pytest.raises((ValueError, TypeError), match=match):
            get_peft_model(base, config(tokens, **values))
        assert before == {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(NotImplementedError, match="ensure_weight_tying"):
        get_peft_model(llama(True), LoraConfig(r=1, target_modules=["embed_tokens"], ensure_weight_tying=True))
    with pytest.warns(UserWarning, match="ensure_weight_tying: nothing that the adapter trains"):
        get_peft_model(llama(False), config([1], ensure_weight_tying=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(llama(True), config([1], ensure_weight_tying=True))
    with pytest.raises(ValueError, match="two methods cannot share"):
        model.add_adapter("lora", LoraConfig(r=1, target_modules=["embed_tokens"]))
    layer = TrainableTokens.around(nn.Embedding(4, 2, max_norm=1.0), "e")
    with pytest.raises(ValueError, match="max_norm"):
        TrainableTokens.of_rows(layer.base_layer, [1], "e")


def test_a_resized_vocabulary_and_offloaded_layers(tmp_path):
    from accelerate import cpu_offload

    base = llama(False)
    base.resize_token_embeddings(44)
    model = fill(get_peft_model(base, config([42, 43])))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {
        "base_model.model.model.embed_tokens.token_adapter.base_layer.weight",
        "base_model.model.lm_head.weight",
    } < keys
    ids = torch.tensor([[42, 3, 43]])
    other = llama(False, seed=3)
    other.resize_token_embeddings(44)
    other.model.layers.load_state_dict({n: p for n, p in llama(False).model.layers.state_dict().items()})
    loaded = PeftModel.from_pretrained(other, tmp_path)
    assert_close(logits(loaded, ids), logits(model, ids).double(), torch.float32)
    expected = logits(loaded, ids)
    cpu_offload(loaded, execution_device="cpu")
    assert_close(logits(loaded, ids), expected.double(), torch.float32)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() > 0
