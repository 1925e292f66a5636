"""OFT."""

from __future__ import annotations

import torch

from peftk.nn import OFTConfig
from peftk.testing.cases import cayley
from support.layer_cases import Case, Toy


def _config(block_size=4, **values):
    return OFTConfig(oft_block_size=block_size, init_weights=False, **values)


CASES = {
    "oft": Case(_config(), together="oft_exact"),
    "oft_blocks": Case(OFTConfig(r=2, oft_block_size=0, init_weights=False, num_cayley_neumann_terms=3)),
    "oft_exact": Case(_config(3, use_cayley_neumann=False)),
    "oft_shared": Case(_config(6, block_share=True)),
    "coft": Case(_config(coft=True, eps=0.5)),
    "oft_gpt2": Case(_config(), "conv1d"),
    "oft_conv": Case(_config(6), "conv", together="oft_conv_exact"),
    "oft_conv_exact": Case(_config(use_cayley_neumann=False), "conv"),
    "oft_conv_uneven": Case(_config(), "conv_uneven"),
    "oft_conv_same": Case(_config(use_cayley_neumann=False), "conv_same"),
    "oft_pointwise": Case(_config(block_share=True), "pointwise_strided"),
    "oft_embedding": Case(_config(), "embedding", together="oft_embedding_exact"),
    "oft_embedding_exact": Case(_config(2, use_cayley_neumann=False, block_share=True), "embedding"),
}

IDENTITIES = {
    "oft": Case(OFTConfig(oft_block_size=4)),
    "oft_exact": Case(OFTConfig(oft_block_size=4, use_cayley_neumann=False)),
    "oft_shared": Case(OFTConfig(oft_block_size=4, block_share=True)),
    "coft": Case(OFTConfig(oft_block_size=4, coft=True)),
    "oft_gpt2": Case(OFTConfig(oft_block_size=4), "conv1d"),
    "oft_conv": Case(OFTConfig(oft_block_size=4), "conv"),
    "oft_conv_uneven": Case(OFTConfig(oft_block_size=4), "conv_uneven"),
    "oft_pointwise": Case(OFTConfig(oft_block_size=4, use_cayley_neumann=False), "pointwise"),
    "oft_embedding": Case(OFTConfig(oft_block_size=4), "embedding"),
}


TOYS = {"oft": Toy(OFTConfig(oft_block_size=4, target_modules=["query"], init_weights=False), {"module_dropout": 0.5})}

LARGE = {
    "oft": OFTConfig(oft_block_size=16),
    "oft, exact": OFTConfig(oft_block_size=16, use_cayley_neumann=False),
}

FULL = [
    OFTConfig(target_modules="all-linear"),
    OFTConfig(r=2, oft_block_size=0, coft=True, eps=0.1, block_share=True, bias="oft_only"),
]

ROTATES = True


def dense(layer, name, weight, bias):
    if layer.kind == "Embedding":
        return weight @ rotation(layer.oft_embedding_R[name]), bias
    rotated = weight.flatten(1) @ rotation(layer.oft_R[name]).T
    return rotated.view(weight.shape), bias


def rotation(parameters):
    """The dense matrix R of ``y = (x R) W^T``."""
    blocks = cayley.transform(parameters.weight.double(), parameters.block_size, parameters.neumann_terms)
    return torch.block_diag(*(blocks.expand(parameters.block_count, -1, -1) if parameters.block_share else blocks))
