"""Small models with X-LoRA, in both libraries, for the tests of it."""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftk import LoraConfig, XLoraConfig, get_peft_model
from support.parity_cases import SMALL

CLASSIFIER = "base_model.internal_xlora_classifier."
EXPERTS = (
    {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]},
    {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
)


def llama(**kwargs):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, use_cache=False, **kwargs)).eval()


def save_experts(base, configs, folder):
    paths = {}
    for number, values in enumerate(configs):
        torch.manual_seed(number)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**values, init_lora_weights=False))
        model.save_pretrained(folder / f"expert{number}")
        paths[str(number)] = str(folder / f"expert{number}")
    return paths


def make(base, adapters, seed=1, **values):
    torch.manual_seed(seed)
    return get_peft_model(base, XLoraConfig(**({"hidden_size": 16, "adapters": adapters} | values)))


def pair(base, adapters, **values):
    """The same X-LoRA model in both libraries."""
    values = {"hidden_size": 16, "adapters": adapters, "task_type": "CAUSAL_LM"} | values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.XLoraConfig(**values)).eval()
        ours = get_peft_model(copy.deepcopy(base), XLoraConfig(**values))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


class Output(NamedTuple):
    """What a model returns."""

    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] = ()


class Tokens(nn.Module):
    """A model of its own kind that returns its hidden states."""

    def __init__(self, flat=False):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16, bias=False)
        self.flat = flat

    def forward(self, input_ids, output_hidden_states=False, return_dict=True):
        hidden = self.embed(input_ids)
        inner = hidden.flatten(0, 1) if self.flat else hidden
        hidden = hidden + self.second(self.first(inner).tanh()).view_as(hidden)
        return Output(logits=hidden @ self.embed.weight.T, hidden_states=(hidden,))


def saved_tokens(tmp_path, **kwargs):
    torch.manual_seed(0)
    base = Tokens(**kwargs)
    configs = [{"r": 2, "target_modules": ["first", "second"]}, {"r": 3, "target_modules": ["first"], "lora_alpha": 4}]
    return base, save_experts(base, configs, tmp_path)
