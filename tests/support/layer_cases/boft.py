"""BOFT."""

from __future__ import annotations

import torch

from peftk.nn import BOFTConfig
from peftk.testing.cases import butterfly, cayley
from support.layer_cases import Case, Toy

FIRST_NEXT_TO_WEIGHT = True


def _config(size=2, factors=2, **values):
    return BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, init_weights=False, **values)


def _fresh(size=2, factors=2, **values):
    return BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, **values)


CASES = {
    "boft": Case(_config(), together="boft_one_factor"),
    "boft_one_factor": Case(_config(3, 1)),
    "boft_number": Case(BOFTConfig(boft_block_size=0, boft_block_num=2, boft_n_butterfly_factor=2, init_weights=False)),
    "boft_gpt2": Case(_config(), "conv1d"),
    "boft_conv": Case(_config(), "conv", together="boft_conv_one_factor"),
    "boft_conv_one_factor": Case(_config(6, 1), "conv"),
    "boft_conv_uneven": Case(_config(), "conv_uneven"),
    "boft_conv_same": Case(_config(2, 3), "conv_same"),
    "boft_pointwise": Case(_config(6), "pointwise_strided"),
}

IDENTITIES = {
    "boft": Case(_fresh()),
    "boft_one_factor": Case(_fresh(4, 1)),
    "boft_gpt2": Case(_fresh(), "conv1d"),
    "boft_conv": Case(_fresh(), "conv"),
    "boft_conv_uneven": Case(_fresh(6, 1), "conv_uneven"),
    "boft_pointwise": Case(_fresh(6), "pointwise"),
}


TOYS = {
    "boft": Toy(
        BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=["query"], init_weights=False),
        {"boft_dropout": 0.5},
    )
}

LARGE = {
    "boft": BOFTConfig(boft_n_butterfly_factor=2),
    "boft, chain": BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=7),
}

FULL = [BOFTConfig(boft_block_size=0, boft_block_num=2, boft_dropout=0.1, bias="boft_only")]

ROTATES = True


def dense(layer, name, weight, bias):
    rotated = weight.flatten(1) @ rotation(layer.boft_R[name].double()).T
    scaled = layer.boft_s[name].double().view(-1, 1) * rotated
    return scaled.view(weight.shape), bias


def rotation(square):
    """The dense matrix R."""
    factors = torch.stack([cayley.transform(stage, stage.shape[-1]) for stage in square])
    product = torch.eye(square.shape[1] * square.shape[2], dtype=torch.float64)
    for stage in butterfly.stages(factors):
        product = stage @ product
    return product
