"""The toy model of the model tests, short configurations for it, and the check that a failure changes nothing."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftk.models.peft_model import PeftModel
from peftk.nn import LoraConfig, LoRALinear, OFTConfig
from support.layer_cases import TOYS

X = torch.linspace(-1, 1, 36).reshape(3, 12)


class Block(nn.Module):
    """One layer of the toy model."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(12, 12)
        self.value = nn.Linear(12, 12)
        self.conv = nn.ConvTranspose1d(1, 1, 1)

    def forward(self, x):
        return x + self.value(self.query(x).relu())


class Toy(nn.Module):
    """Three layers and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.classifier = nn.Linear(12, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def toy(seed=0):
    torch.manual_seed(seed)
    return Toy()


class Checkpointed(nn.Module):
    """The toy model with activation checkpointing of its layers."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.toy = toy()
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = x.clone().requires_grad_()
        for layer in self.toy.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return self.toy.classifier(x)


def lora(**kwargs):
    return LoraConfig(**({"r": 2, "target_modules": ["query"], "init_lora_weights": False} | kwargs))


def oft(**kwargs):
    return OFTConfig(**({"oft_block_size": 4, "target_modules": ["query"], "init_weights": False} | kwargs))


METHODS = {name: toy.config for name, toy in TOYS.items()}


def snapshot(model):
    """Everything that a failed call must leave alone."""
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    tensors = {
        name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)
    }
    extra = None
    if isinstance(model, PeftModel):
        layers = dict(model.base_model._layers())
        extra = (
            {name: config.to_dict() for name, config in model.peft_config.items()},
            list(model.active_adapters),
            {
                path: (layer.active_adapters, layer.merged_adapters, layer.disable_adapters)
                for path, layer in layers.items()
            },
            {path: dict(layer.scaling) for path, layer in layers.items() if isinstance(layer, LoRALinear)},
        )
    return modules, tensors, copy.deepcopy(extra)


def assert_unchanged(model, before):
    modules, tensors, extra = snapshot(model)
    assert modules == before[0], "modules"
    assert tensors.keys() == before[1].keys(), "names of parameters"
    for name, (identity, requires_grad, value) in tensors.items():
        assert (identity, requires_grad) == before[1][name][:2], name
        assert torch.equal(value, before[1][name][2]) or value.isnan().any(), name
    assert extra == before[2], "adapters"


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}
