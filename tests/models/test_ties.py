"""Weights that a transformers model ties: merging for good turns off the ties it broke, and what it saves loads."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peftk import LoraConfig, OFTConfig, get_peft_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(3, 10)[None]


def build(cls, config):
    torch.manual_seed(0)
    return cls(config).eval()


MODELS = {
    "bert": lambda: build(BertForMaskedLM, BertConfig(**SMALL)),
    "electra": lambda: build(ElectraForMaskedLM, ElectraConfig(embedding_size=32, **SMALL)),
    "llama": lambda: build(LlamaForCausalLM, LlamaConfig(tie_word_embeddings=True, **SMALL)),
    "t5": lambda: build(
        T5ForConditionalGeneration,
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0),
    ),
}
# The model, what is trained in full, the layers with adapters, and how many ties are left.
CASES = {
    "bert head": ("bert", ["cls"], ["query"], 1),
    "bert embeddings": ("bert", ["word_embeddings"], ["query"], 1),
    "bert elsewhere": ("bert", ["transform"], ["query"], 2),
    "electra head": ("electra", ["generator_lm_head"], ["query"], 0),
    "llama head": ("llama", ["lm_head"], ["q_proj"], 0),
    "llama embeddings": ("llama", ["embed_tokens"], ["q_proj"], 0),
    "t5 head": ("t5", ["lm_head"], ["q"], 2),
    "nothing": ("t5", None, ["q"], 3),
}


def logits(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def shared(model):
    places = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(names) for names in places.values() if len(names) > 1}


@pytest.mark.parametrize("method", ["lora", "oft"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_merged_saves_and_loads(tmp_path, case, method):
    kind, saved, targets, left = CASES[case]
    base = MODELS[kind]()
    before = shared(base)
    if method == "lora":
        config = LoraConfig(target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    else:
        config = OFTConfig(oft_block_size=4, target_modules=targets, modules_to_save=saved, init_weights=False)
    model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    expected = logits(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merged = model.merge_and_unload()
    told = [str(w.message) for w in told if "no longer tied" in str(w.message)]
    torch.testing.assert_close(logits(merged), expected)
    after = shared(merged)
    assert sum(len(names) - 1 for names in after) == left
    assert bool(told) is (after != before)
    # Whoever ties it again changes nothing.
    merged.tie_weights()
    torch.testing.assert_close(logits(merged), expected)
    assert shared(merged) == after
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), expected)
    assert shared(again) == after
    assert merged.config.tie_word_embeddings is (left != 0)


def test_the_switch_of_a_model_that_keeps_its_ties_is_not_touched():
    for kind, make in MODELS.items():
        base = make()
        targets = ["q"] if kind == "t5" else ["query", "q_proj"]
        targets = [t for t in targets if any(n.endswith(t) for n, _ in base.named_modules())]
        keys = copy.deepcopy(base._tied_weights_keys)
        merged = get_peft_model(base, LoraConfig(target_modules=targets)).merge_and_unload()
        assert merged.config.tie_word_embeddings and merged._tied_weights_keys == keys


def test_models_without_a_head_have_nothing_to_untie():
    base = AutoModel.from_config(BertConfig(**SMALL))
    merged = get_peft_model(base, LoraConfig(target_modules=["query"], modules_to_save=["pooler"])).merge_and_unload()
    assert merged.config.tie_word_embeddings
