"""LoHa."""

from __future__ import annotations

import torch

from peftk.nn import LoHaConfig
from peftk.testing.cases import dora
from support.layer_cases import Case, Toy


def _config(r=2, **values):
    return LoHaConfig(r=r, init_weights=False, **values)


# Of the sizes of these layers, rank 2 runs as a low-rank product and rank 7 is written into the weight.
CASES = {
    "loha": Case(_config(alpha=3), together="loha_written"),
    "loha_written": Case(_config(7), together="loha"),
    "loha_dora": Case(_config(alpha=3, use_dora=True)),
    "loha_dora_written": Case(_config(7, use_dora=True)),
    "loha_dora_conv": Case(_config(1, use_dora=True), "conv"),
    "loha_dora_tucker_groups": Case(_config(use_effective_conv2d=True, use_dora=True), "conv_groups"),
    "loha_dora_sequence": Case(_config(3, use_dora=True), "sequence_uneven"),
    "loha_dora_inputs": Case(_config(alpha=3, use_dora=True, dora_inputs=True)),
    "loha_dora_inputs_conv": Case(_config(1, use_dora=True, dora_inputs=True), "conv"),
    "loha_dora_inputs_groups": Case(_config(5, use_dora=True, dora_inputs=True), "conv_groups"),
    "loha_conv": Case(_config(1, alpha=2), "conv", together="loha_tucker"),
    "loha_conv_written": Case(_config(5), "conv_uneven"),
    "loha_tucker": Case(_config(3, use_effective_conv2d=True), "conv", together="loha_conv"),
    "loha_tucker_groups": Case(_config(use_effective_conv2d=True), "conv_groups"),
    "loha_tucker_same": Case(_config(1, use_effective_conv2d=True), "conv_same"),
    "loha_pointwise": Case(_config(1, use_effective_conv2d=True), "pointwise_strided"),
    "loha_sequence": Case(_config(1), "sequence", together="loha_sequence_tucker"),
    "loha_sequence_tucker": Case(_config(4, use_effective_conv2d=True), "sequence"),
    "loha_sequence_uneven": Case(_config(3), "sequence_uneven"),
    "loha_volume": Case(_config(2, use_effective_conv2d=True), "volume_same"),
}

IDENTITIES = {
    "loha": Case(LoHaConfig(r=2)),
    "loha_written": Case(LoHaConfig(r=7)),
    "loha_dora": Case(LoHaConfig(r=2, use_dora=True)),
    "loha_dora_conv": Case(LoHaConfig(r=2, use_dora=True), "conv_uneven"),
    "loha_conv": Case(LoHaConfig(r=1), "conv"),
    "loha_conv_written": Case(LoHaConfig(r=4), "conv_uneven"),
    "loha_tucker": Case(LoHaConfig(r=3, use_effective_conv2d=True), "conv"),
    "loha_pointwise": Case(LoHaConfig(r=1), "pointwise"),
    "loha_sequence": Case(LoHaConfig(r=2, use_effective_conv2d=True), "sequence_uneven"),
    "loha_volume": Case(LoHaConfig(r=1), "volume"),
}


TOYS = {"loha": Toy(LoHaConfig(r=2, target_modules=["query"], init_weights=False), {"rank_dropout": 0.5})}

LARGE = {"loha": LoHaConfig(r=2, init_weights=False), "loha, written": LoHaConfig(r=9, init_weights=False)}

FULL = [
    LoHaConfig(
        r=4,
        alpha=7,
        rank_dropout=0.1,
        module_dropout=0.2,
        use_effective_conv2d=True,
        target_modules=["b", "a"],
        rank_pattern={"a": 2},
        alpha_pattern={"b": 3},
        init_weights=False,
    )
]

ROTATES = False


def dense(layer, name, weight, bias):
    w1_a, w1_b, w2_a, w2_b = (getattr(layer, f"hada_{n}")[name].double() for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if name in layer.hada_t1:
        # On an nn.Conv1d, PEFT's cores have a last dimension of one.
        t1, t2 = (core[name].double().flatten(2) for core in (layer.hada_t1, layer.hada_t2))
        first = sum(
            torch.einsum("p,q,k->pqk", w1_a[i], w1_b[j], t1[i, j]) for i in range(len(t1)) for j in range(len(t1))
        )
        second = sum(
            torch.einsum("p,q,k->pqk", w2_a[i], w2_b[j], t2[i, j]) for i in range(len(t2)) for j in range(len(t2))
        )
    else:
        first, second = w1_a @ w1_b, w2_a @ w2_b
    weight = weight + layer.scaling[name] * (first * second).reshape(weight.shape)
    magnitude = layer.hada_magnitude_vector
    if name in magnitude:
        weight = dora.decomposed(weight, magnitude[name].double(), of_inputs=layer.dora_inputs[name])
    return weight, bias
