"""The configurations that the layer tests share, and the formulas with dense matrices in float64."""

from __future__ import annotations

import torch
from torch import nn

from peftk.nn import LoraConfig, LoRALinear, OFTConfig, OFTLinear

LAYERS = {LoraConfig: LoRALinear, OFTConfig: OFTLinear}

# Every configuration here has a random, non-trivial adapter.
CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=5, init_lora_weights=False),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False),
    "lora_bias": LoraConfig(r=2, lora_bias=True, init_lora_weights=False),
    "lora_orthogonal": LoraConfig(r=4, init_lora_weights="orthogonal"),
    "oft": OFTConfig(oft_block_size=4, init_weights=False),
    "oft_blocks": OFTConfig(r=2, oft_block_size=0, init_weights=False, num_cayley_neumann_terms=3),
    "oft_exact": OFTConfig(oft_block_size=3, use_cayley_neumann=False, init_weights=False),
    "oft_shared": OFTConfig(oft_block_size=6, block_share=True, init_weights=False),
    "coft": OFTConfig(oft_block_size=4, coft=True, eps=0.5, init_weights=False),
}

IDENTITIES = {
    "lora": LoraConfig(r=3),
    "gaussian": LoraConfig(r=3, init_lora_weights="gaussian"),
    "lora_bias": LoraConfig(r=3, lora_bias=True),
    "oft": OFTConfig(oft_block_size=4),
    "oft_exact": OFTConfig(oft_block_size=4, use_cayley_neumann=False),
    "oft_shared": OFTConfig(oft_block_size=4, block_share=True),
    "coft": OFTConfig(oft_block_size=4, coft=True),
}

I, O = 12, 10  # noqa: E741


def make(config, *, dtype=torch.float32, bias=True, features=(I, O), seed=0, **kwargs):
    torch.manual_seed(seed)
    return LAYERS[type(config)](nn.Linear(*features, bias=bias, dtype=dtype), config, **kwargs)


def with_hook(layer):
    """Make the layer take the path that calls its base layer."""
    layer.base_layer.register_forward_hook(lambda *_: None)
    return layer


def reference(layer, x, names=("default",)):
    """The naive formula in float64, with dense matrices."""
    base = layer.base_layer
    x, weight = x.double(), base.weight.double()
    bias = 0 if base.bias is None else base.bias.double()
    if isinstance(layer, OFTLinear):
        for name in names:
            x = x @ dense_rotation(layer.oft_R[name])
        return x @ weight.T + bias
    y = x @ weight.T + bias
    for name in names:
        a, b = layer.lora_A[name], layer.lora_B[name]
        delta = (x @ a.weight.double().T) @ b.weight.double().T
        y = y + layer.scaling[name] * (delta + (0 if b.bias is None else b.bias.double()))
    return y


def dense_rotation(rotation):
    size = rotation.block_size
    rows, columns = torch.triu_indices(size, size, 1)
    eye = torch.eye(size, dtype=torch.float64)
    blocks = []
    for packed in rotation.weight.double():
        s = torch.zeros(size, size, dtype=torch.float64).index_put((rows, columns), packed)
        s = s - s.T
        terms = rotation.neumann_terms
        if terms is None:
            blocks.append((eye - s) @ torch.linalg.inv(eye + s))
        elif terms == 3:
            blocks.append(eye + 2 * s + 2 * s @ s + s @ s @ s)
        else:
            assert terms == 5
            blocks.append(eye + 2 * (s + s @ s + s @ s @ s) + s @ s @ s @ s)
    return torch.block_diag(*(blocks * rotation.block_count if rotation.block_share else blocks))
