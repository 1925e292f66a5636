"""C3A."""

from __future__ import annotations

from peftk.nn import C3AConfig
from peftk.testing.cases import circulant
from support.layer_cases import Case, Toy


def _config(block_size=2, init_weights="gaussian", **values):
    return C3AConfig(block_size=block_size, init_weights=init_weights, **values)


CASES = {
    "c3a": Case(_config(), together="c3a_one"),
    "c3a_one": Case(_config(1)),
    "c3a_xavier": Case(_config(2, "xavier_uniform")),
    "c3a_gpt2": Case(_config(), "conv1d"),
    "c3a_pointwise": Case(_config(), "pointwise", together="c3a_pointwise_kaiming"),
    "c3a_pointwise_kaiming": Case(_config(1, "kaiming_uniform"), "pointwise"),
    "c3a_pointwise_strided": Case(_config(), "pointwise_strided"),
}

IDENTITIES = {
    "c3a": Case(_config(init_weights=True)),
    "c3a_gpt2": Case(_config(init_weights=True), "conv1d"),
    "c3a_pointwise": Case(_config(init_weights=True), "pointwise"),
    "c3a_pointwise_strided": Case(_config(1, True), "pointwise_strided"),
}


TOYS = {"c3a": Toy(C3AConfig(block_size=4, target_modules=["query"]), {})}

LARGE = {"c3a": C3AConfig(block_size=64), "c3a, small blocks": C3AConfig(block_size=16)}

FULL = [C3AConfig(block_size=8, block_size_pattern={"a": 4}, init_weights=True, bias="c3a_only")]

ROTATES = False


def dense(layer, name, weight, bias):
    return weight + circulant.dense(layer.c3a_kernel[name].double()).view(weight.shape) / weight.shape[1], bias
