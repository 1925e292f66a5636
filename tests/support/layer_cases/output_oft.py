"""OFT and BOFT on the output."""

from __future__ import annotations

import torch

from peftk.nn import OutputOFTConfig
from support.layer_cases import Case, Toy

FIRST_NEXT_TO_WEIGHT = True
TURNS_OUTPUT = True


def _config(size=2, factors=0, **values):
    return OutputOFTConfig(block_size=size, butterfly_factors=factors, init_weights=False, **values)


CASES = {
    "output_oft": Case(_config(5), together="output_oft_scaled"),
    "output_oft_scaled": Case(_config(use_rescale=True)),
    "output_oft_bounded": Case(_config(constraint=0.02)),
    "output_oft_gpt2": Case(_config(), "conv1d"),
    "output_boft": Case(_config(2, 2), "conv_eight", together="output_oft_eight"),
    "output_oft_eight": Case(_config(4, use_rescale=True), "conv_eight"),
    "output_oft_conv": Case(_config(3), "conv", together="output_oft_conv_scaled"),
    "output_oft_conv_scaled": Case(_config(use_rescale=True), "conv"),
    "output_oft_conv_uneven": Case(_config(6), "conv_uneven"),
    "output_oft_conv_groups": Case(_config(), "conv_groups"),
    "output_oft_pointwise": Case(_config(), "pointwise_strided"),
    "output_oft_sequence": Case(_config(3), "sequence_uneven"),
    "output_oft_volume": Case(_config(use_rescale=True), "volume_same"),
}

IDENTITIES = {
    "output_oft": Case(OutputOFTConfig(block_size=5)),
    "output_oft_scaled": Case(OutputOFTConfig(block_size=2, use_rescale=True)),
    "output_oft_gpt2": Case(OutputOFTConfig(block_size=2), "conv1d"),
    "output_boft": Case(OutputOFTConfig(block_size=2, butterfly_factors=2), "conv_eight"),
    "output_oft_conv": Case(OutputOFTConfig(block_size=3), "conv"),
    "output_oft_volume": Case(OutputOFTConfig(block_size=3), "volume"),
}


TOYS = {
    "output_oft": Toy(
        OutputOFTConfig(block_size=2, butterfly_factors=2, target_modules=["query"], init_weights=False), {}
    )
}

LARGE = {
    "output_oft": OutputOFTConfig(block_size=16),
    "output_oft, butterfly": OutputOFTConfig(block_size=8, butterfly_factors=5),
}

FULL = [
    OutputOFTConfig(target_modules="all-linear", use_rescale=True, constraint=0.1),
    OutputOFTConfig(block_size=4, butterfly_factors=2, bias="oft_only", block_size_pattern={"key": 8}),
]

ROTATES = False


def dense(layer, name, weight, bias):
    square = layer.output_oft_blocks[name].double()
    skew = square - square.mT
    bound = layer.output_oft_bound[name]
    if bound and skew.norm() > bound:
        skew = skew * (bound / (skew.norm() + 1e-8))
    eye = torch.eye(skew.shape[-1], dtype=torch.float64)
    blocks = (eye + skew) @ torch.linalg.inv(eye - skew)
    rows = weight.flatten(1)
    if blocks.dim() == 3:
        rows = torch.block_diag(*blocks).mT @ rows
    else:
        for stage, turned in enumerate(blocks):
            # Numbers that lie half a block times 2^stage apart take turns.
            order = torch.arange(len(rows)).view(-1, 2, skew.shape[-1] // 2 << stage).transpose(1, 2).flatten()
            rows = torch.empty_like(rows).index_copy(0, order, torch.block_diag(*turned) @ rows[order])
    if name in layer.output_oft_scale:
        rows = layer.output_oft_scale[name].double().view(-1, 1) * rows
    return rows.view(weight.shape), bias
