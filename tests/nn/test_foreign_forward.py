"""Layers derived from those of torch whose call computes something else from their weight."""

from __future__ import annotations

import pytest
import torch
from support.layer_cases import CASES
from torch import nn
from torch.nn import functional as tf

import peftk
from peftk.nn import layer_class_for
from peftk.testing.compare import assert_close


class Normalised(nn.Linear):
    def forward(self, x):
        return tf.linear(x, tf.normalize(self.weight, dim=1), self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.weight - mean, self.bias)


class Positions(nn.Embedding):
    def forward(self, mask):
        return super().forward(mask.cumsum(1))


FOREIGN = {"linear": (Normalised, (12, 10), (3, 12)), "conv": (Standardised, (4, 6, 3), (2, 4, 5, 5))}


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.base in FOREIGN])
def test_the_adapter_acts_on_the_call_and_merging_is_refused_by_name(name):
    case = CASES[name]
    kind, sizes, shape = FOREIGN[case.base]
    torch.manual_seed(0)
    base = kind(*sizes)
    layer = layer_class_for(case.config, base)(base, case.config).eval()
    x, weight = torch.randn(shape), base.weight.detach().clone()
    y = layer(x)
    # By that initialisation an adapter begins as none.
    if getattr(case.config, "init_lora_weights", None) != "orthogonal":
        assert (y - base(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=f"merge: this layer has the forward of {kind.__name__}.*unload"):
        layer.merge()
    assert torch.equal(base.weight, weight) and torch.equal(layer(x), y)
    if case.base == "linear" and name == "lora":
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert_close(y, (base(x) + layer.scaling["default"] * x @ a.T @ b.T).double(), torch.float32)


def test_embeddings_that_look_up_something_else_are_refused_and_scaled_ones_are_not():
    with pytest.raises(TypeError, match=r"module 'e'.*forward of Positions.*looks up its argument"):
        peftk.get_peft_model(nn.ModuleDict({"e": Positions(9, 4)}), peftk.LoraConfig(target_modules=["e"]))
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    scaled = Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=2.0)
    layer = peftk.nn.LoRAEmbedding(scaled, peftk.LoraConfig(r=2, init_lora_weights=False)).eval()
    x = torch.tensor([1, 3])
    y = layer(x)
    layer.merge()
    assert_close(layer(x), y.detach().double(), torch.float32)


def test_subclasses_without_a_forward_of_their_own_merge():
    class Named(nn.Linear):
        pass

    layer = peftk.nn.LoRALinear(Named(4, 4), peftk.LoraConfig(r=2, init_lora_weights=False)).eval()
    x = torch.randn(2, 4)
    y = layer(x)
    layer.merge()
    assert_close(layer(x), y.detach().double(), torch.float32)
