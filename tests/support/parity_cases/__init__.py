"""The models and configurations on which peftk and Hugging Face PEFT must agree; a module of this package is a method.

Its `CASES` map a name to (model, configuration class, arguments), for both libraries alike. What PEFT does wrong is a
test of its own instead, in tests/nn/test_peft_parity.py or beside the method.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import warnings

import peft
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peftk import get_peft_model

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 40} | dict.fromkeys(
    ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0
)
TOKENS = torch.arange(12).reshape(2, 6)


class MLP(nn.Module):
    """Two layers, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self.norm(self.second(self.first(x).relu())))


class CNN(nn.Module):
    """Convolutions of several shapes, and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.pointwise = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.pointwise(self.second(self.first(x).relu()).relu()).mean((2, 3)))


class Sequences(nn.Module):
    """Convolutions of one dimension."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(4, 6, 3, padding=1)
        self.second = nn.Conv1d(6, 8, 2, stride=2, bias=False, groups=2)
        self.pointwise = nn.Conv1d(8, 4, 1)

    def forward(self, x):
        return self.pointwise(self.second(self.first(x).relu()).relu())


class Volumes(nn.Module):
    """Convolutions of three dimensions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(2, 6, (2, 3, 1), padding=(1, 1, 0))
        self.second = nn.Conv3d(6, 4, 1, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


MODELS = {
    "mlp": MLP,
    "sequences": Sequences,
    "volumes": Volumes,
    "cnn": CNN,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
    "bert": lambda: BertModel(BertConfig(**SMALL, **DROPOUT)),
    "bert_cls": lambda: BertForSequenceClassification(BertConfig(**SMALL, **DROPOUT, num_labels=3)),
    "bert_tokens": lambda: BertForTokenClassification(BertConfig(**SMALL, **DROPOUT, num_labels=3)),
    "bert_qa": lambda: BertForQuestionAnswering(BertConfig(**SMALL, **DROPOUT)),
    "roberta_cls": lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, **DROPOUT, num_labels=3)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama_gqa": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1)),
}

_METHODS = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
CASES = {name: case for method in _METHODS for name, case in method.CASES.items()}


def theirs_of(config):
    """The configuration class of PEFT with the same name."""
    return getattr(peft, config.__name__)


def build(case, seed=0):
    """The same base model, adapted by both libraries from the same seed."""
    kind, config, values = CASES[case]
    torch.manual_seed(seed)
    base = MODELS[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        ours = get_peft_model(copy.deepcopy(base), config(**values))
        torch.manual_seed(seed)
        theirs = peft.get_peft_model(copy.deepcopy(base), theirs_of(config)(**copy.deepcopy(values)))
    return base, ours, theirs


def run(case, model):
    kind = CASES[case][0]
    if kind == "mlp":
        return model(torch.linspace(-1, 1, 36).reshape(3, 12))
    if kind == "sequences":
        return model(torch.linspace(-1, 1, 2 * 4 * 9).reshape(2, 4, 9).sin())
    if kind == "volumes":
        return model(torch.linspace(-1, 1, 2 * 2 * 3 * 4 * 2).reshape(2, 2, 3, 4, 2).sin())
    if kind == "cnn":
        return model(torch.linspace(-1, 1, 2 * 3 * 5 * 6).reshape(2, 3, 5, 6).sin())
    outputs = model(input_ids=TOKENS)
    return torch.cat([t.flatten() for t in outputs.to_tuple() if torch.is_tensor(t)])


def train(case, model, steps=2):
    """A few large steps, so that the adapter matters."""
    generator = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for step in range(steps):
        optimizer.zero_grad()
        y = run(case, model)
        (y * torch.randn(y.shape, generator=generator)).mean().backward()
        if step + 1 < steps:
            optimizer.step()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return grads
