"""LoKr."""

from __future__ import annotations

import torch

from peftk.nn import LoKrConfig
from peftk.testing.cases import dora
from support.layer_cases import Case, Toy


def _config(**values):
    return LoKrConfig(init_weights=False, **values)


# The linear layer is 12 x 10, the convolutions 4 x 6 (8 / 2 x 6 with groups).
CASES = {
    "lokr": Case(_config(r=1, alpha=3), together="lokr_full"),
    "lokr_full": Case(_config(r=8, alpha=5, decompose_factor=2)),
    "lokr_both": Case(_config(r=1, decompose_both=True, decompose_factor=5), together="lokr"),
    "lokr_thin": Case(_config(r=1, decompose_factor=1)),
    "lokr_dora": Case(_config(r=1, alpha=3, use_dora=True)),
    "lokr_dora_full": Case(_config(r=8, decompose_factor=2, use_dora=True)),
    "lokr_dora_conv": Case(_config(r=1, alpha=2, use_dora=True), "conv"),
    "lokr_dora_conv_groups": Case(_config(r=1, decompose_factor=2, use_dora=True), "conv_groups"),
    "lokr_dora_inputs": Case(_config(r=1, alpha=3, use_dora=True, dora_inputs=True)),
    "lokr_dora_inputs_conv": Case(_config(r=1, alpha=2, use_dora=True, dora_inputs=True), "conv"),
    "lokr_dora_inputs_groups": Case(_config(r=1, decompose_factor=2, use_dora=True, dora_inputs=True), "conv_groups"),
    "lokr_dora_sequence": Case(_config(r=8, decompose_factor=2, use_dora=True), "sequence"),
    "lokr_conv": Case(_config(r=1, alpha=2), "conv", together="lokr_conv_full"),
    "lokr_conv_full": Case(_config(r=8, decompose_factor=2), "conv"),
    "lokr_conv_tucker": Case(_config(r=1, alpha=3, use_effective_conv2d=True, decompose_factor=1), "conv_uneven"),
    "lokr_conv_both": Case(_config(r=1, decompose_both=True, use_effective_conv2d=True), "conv_same"),
    "lokr_conv_groups": Case(_config(r=1, decompose_factor=2), "conv_groups"),
    "lokr_pointwise": Case(_config(r=1, use_effective_conv2d=True), "pointwise_strided"),
    "lokr_sequence": Case(_config(r=1, decompose_factor=1), "sequence", together="lokr_sequence_full"),
    "lokr_sequence_full": Case(_config(r=8, alpha=5, decompose_factor=2), "sequence"),
    "lokr_sequence_tucker": Case(_config(r=1, use_effective_conv2d=True, decompose_factor=1), "sequence_uneven"),
    "lokr_volume": Case(_config(r=1, use_effective_conv2d=True, decompose_factor=1), "volume_same"),
    "lokr_volume_full": Case(_config(r=8), "volume"),
}

IDENTITIES = {
    "lokr": Case(LoKrConfig(r=1)),
    "lokr_full": Case(LoKrConfig(r=8)),
    "lokr_both": Case(LoKrConfig(r=1, decompose_both=True, decompose_factor=5)),
    "lokr_thin": Case(LoKrConfig(r=1, decompose_factor=1)),
    "lokr_lycoris": Case(LoKrConfig(r=1, init_weights="lycoris")),
    "lokr_lycoris_full": Case(LoKrConfig(r=8, init_weights="lycoris")),
    "lokr_dora": Case(LoKrConfig(r=1, use_dora=True)),
    "lokr_dora_conv": Case(LoKrConfig(r=1, init_weights="lycoris", use_dora=True), "conv"),
    "lokr_conv": Case(LoKrConfig(r=1), "conv"),
    "lokr_conv_tucker": Case(LoKrConfig(r=1, use_effective_conv2d=True), "conv_uneven"),
    "lokr_conv_groups": Case(LoKrConfig(r=1, init_weights="lycoris"), "conv_groups"),
    "lokr_pointwise": Case(LoKrConfig(r=8), "pointwise"),
    "lokr_sequence": Case(LoKrConfig(r=8), "sequence_uneven"),
    "lokr_volume": Case(LoKrConfig(r=1, decompose_factor=1, init_weights="lycoris"), "volume"),
}


TOYS = {"lokr": Toy(LoKrConfig(r=2, target_modules=["query"], init_weights=False), {"rank_dropout": 0.5})}

LARGE = {"lokr": LoKrConfig(r=2), "lokr, full": LoKrConfig(r=64)}

FULL = [
    LoKrConfig(
        r=4,
        alpha=7,
        rank_dropout=0.1,
        rank_dropout_scale=True,
        decompose_both=True,
        decompose_factor=4,
        init_weights="lycoris",
        rank_pattern={"a": 2},
    )
]

ROTATES = False


def dense(layer, name, weight, bias):
    held = {c: getattr(layer, c)[name].double() for c in layer.adapter_layer_names if name in getattr(layer, c)}
    w1 = held["lokr_w1"] if "lokr_w1" in held else held["lokr_w1_a"] @ held["lokr_w1_b"]
    kernel = weight.shape[2:]
    if "lokr_w2" in held:
        w2 = held["lokr_w2"]
    elif "lokr_t2" in held:
        # On an nn.Conv1d, PEFT's core has a last dimension of one.
        core = held["lokr_t2"].view(*held["lokr_t2"].shape[:2], *kernel)
        w2 = torch.einsum("ij...,ik,jn->kn...", core, held["lokr_w2_a"], held["lokr_w2_b"])
    else:
        w2 = (held["lokr_w2_a"] @ held["lokr_w2_b"]).reshape(held["lokr_w2_a"].shape[0], -1, *kernel)
    if "lokr_w2" in held and w2.dim() == 3:
        # PEFT's update of an nn.Conv1d, whatever its numbers are then beside.
        update = torch.stack([torch.kron(w1, part) for part in w2]).reshape(weight.shape)
    else:
        # Every entry of w1 is one block of the weight.
        update = torch.cat([torch.cat([entry * w2 for entry in row], dim=1) for row in w1], dim=0)
    weight = weight + layer.alpha[name] / layer.r[name] * update
    magnitude = held.get("lokr_magnitude_vector")
    if magnitude is not None:
        weight = dora.decomposed(weight, magnitude, of_inputs=layer.dora_inputs[name])
    return weight, bias
