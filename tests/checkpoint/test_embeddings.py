"""Embeddings of a resized vocabulary: nobody else has the new rows, so they belong to the file of the adapter."""

from __future__ import annotations

import json
import shutil
import warnings

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from peftk import LoraConfig, OFTConfig, PeftModel, get_peft_model
from peftk.checkpoint import CheckpointError
from peftk.models.embeddings import resized

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
OPT = {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32}
KINDS = {
    "llama": (AutoModelForCausalLM, SMALL, "q_proj"),
    "qwen2": (AutoModelForCausalLM, {**SMALL, "num_key_value_heads": 4, "tie_word_embeddings": True}, "q_proj"),
    "gpt2": (AutoModelForCausalLM, GPT2, "c_attn"),
    "opt": (AutoModelForCausalLM, OPT, "q_proj"),
    "bert": (AutoModelForMaskedLM, SMALL, "query"),
    "t5": (AutoModelForSeq2SeqLM, {**T5, "decoder_start_token_id": 0}, "q"),
}
IDS = torch.tensor([[3, 68, 69, 5]])


class Bases:
    """Models of one kind, saved in a folder, loaded from it and resized with new rows of their own."""

    def __init__(self, kind, folder):
        self.cls, values, self.target = KINDS[kind]
        self.folder = folder
        torch.manual_seed(0)
        self.cls.from_config(AutoConfig.for_model(kind, **values)).save_pretrained(folder)

    def __call__(self, seed, size=70):
        model = self.cls.from_pretrained(self.folder).eval()
        torch.manual_seed(seed)
        if size is not None:
            model.resize_token_embeddings(size, mean_resizing=False)
            with torch.no_grad():
                for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                    layer.weight[64:].normal_()
        return model


@pytest.fixture
def llama(tmp_path):
    return Bases("llama", tmp_path / "base")


def logits(model, ids=IDS):
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits


def lora(*targets, **values):
    return LoraConfig(target_modules=list(targets), init_lora_weights=False, **values)


def keys(folder):
    return set(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("found", ["base", "no base"])
@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_come_back(tmp_path, kind, found):
    bases = Bases(kind, tmp_path / "base")
    first, second = bases(1), bases(2)
    if found == "no base":
        shutil.rmtree(tmp_path / "base")
    model = get_peft_model(first, lora(bases.target))
    with pytest.warns(UserWarning, match="the vocabulary of the base model was resized"):
        model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert (logits(second) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(PeftModel.from_pretrained(second, tmp_path / "adapter")), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_of_its_own_size_is_not_written(tmp_path, kind):
    bases = Bases(kind, tmp_path / "base")
    for size in (None, 64):
        assert resized(bases(1, size)) is None
    # Without its base, a model of which no method was called has nothing to tell.
    model = bases(1, None)
    shutil.rmtree(tmp_path / "base")
    assert resized(model) is None
    assert resized(nn.Linear(2, 2)) is None


def test_the_cache_of_the_hub_is_read(tmp_path, llama, monkeypatch):
    model = llama(1)
    model.name_or_path = "someone/something"
    file = tmp_path / "cached.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(file))
    for content, says in (('{"vocab_size": 70}', None), ('{"vocab_size": 64}', "saved with 64"), ("{", "made for 64")):
        file.write_text(content)
        assert says is None or says in resized(model)
        assert (resized(model) is None) is (says is None)
    file.write_text('{"text_config": {"vocab_size": 32}}')
    assert "saved with 32" in resized(model)


def test_the_argument_decides(tmp_path, llama):
    model = get_peft_model(llama(1), lora("q_proj"))
    plain = get_peft_model(llama(1, None), lora("q_proj"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.save_pretrained(tmp_path / "plain")
        model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
        model.save_pretrained(tmp_path / "with", save_embedding_layers=True)
    both = {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"}
    assert keys(tmp_path / "without") == keys(tmp_path / "plain")
    assert keys(tmp_path / "with") == keys(tmp_path / "plain") | both
    with pytest.raises(ValueError, match="save_embedding_layers: expected one of"):
        model.save_pretrained(tmp_path / "x", save_embedding_layers="always")
    simple = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0"))
    with pytest.raises(ValueError, match="save_embedding_layers: expected a model whose get_input_embeddings"):
        simple.save_pretrained(tmp_path / "x", save_embedding_layers=True)
    assert not (tmp_path / "x").exists()
    # What is not in the file is told when it is loaded.
    with pytest.warns(UserWarning, match=r"without/adapter_model.safetensors: .*lm_head.* are not in this file"):
        PeftModel.from_pretrained(llama(2), tmp_path / "without")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(llama(2), tmp_path / "with")
        PeftModel.from_pretrained(llama(2, None), tmp_path / "plain")


CASES = {
    "beside": lora("q_proj"),
    "in full": lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]),
    "one in full": lora("q_proj", modules_to_save=["embed_tokens"]),
    "adapted": lora("q_proj", "embed_tokens", "lm_head"),
    "one adapted": lora("q_proj", "lm_head"),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj", "lm_head"], init_weights=False),
}


@pytest.mark.filterwarnings("ignore:save_embedding_layers")
@pytest.mark.parametrize("case", CASES)
def test_either_library_reads_what_the_other_wrote(tmp_path, llama, case):
    ours = get_peft_model(llama(1), CASES[case])
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    expected = logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(2), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=True)
    again = PeftModel.from_pretrained(llama(2 if case == "beside" else 1), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    mine = PeftModel.from_pretrained(llama(3), tmp_path / "ours")
    torch.testing.assert_close(logits(mine), expected, rtol=1e-4, atol=1e-5)
    with mine.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(logits(mine), logits(ours), rtol=1e-4, atol=1e-5)


def test_a_model_of_another_size_is_told_how_to_become_it(tmp_path, llama):
    get_peft_model(llama(1), lora("q_proj")).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    for size in (None, 80):
        with pytest.raises(CheckpointError, match=r"of 70 entries, and the model has \d+; call resize_token"):
            PeftModel.from_pretrained(llama(2, size), tmp_path / "a")


def test_what_is_merged_is_not_in_the_embeddings(tmp_path, llama):
    model = get_peft_model(llama(1), lora("q_proj", "lm_head")).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "before", save_embedding_layers=True)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged", save_embedding_layers=True)
    before, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert before.keys() == merged.keys() and all(torch.equal(before[key], merged[key]) for key in before)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(2), tmp_path / "merged")), expected)
    values = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert values == json.loads((tmp_path / "before" / "adapter_config.json").read_text())
