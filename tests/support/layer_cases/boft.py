"""BOFT."""

from __future__ import annotations

import torch

from peftk.nn import BOFTConfig
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
    """The dense matrix R, with permutations as matrices."""
    count, size = square.shape[1:3]
    eye, features = torch.eye(size, dtype=torch.float64), count * size
    product = torch.eye(features, dtype=torch.float64)
    for stage, matrices in enumerate(square):
        skews = [(q - q.T) / 2 for q in matrices]
        factor = torch.block_diag(*((eye - s) @ torch.linalg.inv(eye + s) for s in skews))
        if stage:
            half, order = size // 2, []
            for start in range(0, features, size << stage):
                halves = [range(at, at + half) for at in range(start, start + (size << stage), half)]
                for part in halves[0::2] + halves[1::2]:
                    order += part
            permutation = torch.eye(features, dtype=torch.float64)[order]
            factor = permutation @ factor @ permutation.T
        product = factor @ product
    return product
