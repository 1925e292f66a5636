"""LoRA and DoRA."""

from __future__ import annotations

import torch

from peftk.nn import LoraConfig
from peftk.testing.cases import dora
from support.layer_cases import Case, Toy


def _random(**values):
    return LoraConfig(init_lora_weights=False, **values)


CASES = {
    "lora": Case(_random(r=3, lora_alpha=5), together="rslora"),
    "rslora": Case(_random(r=4, lora_alpha=6, use_rslora=True)),
    "lora_bias": Case(_random(r=2, lora_bias=True)),
    "lora_conv1d": Case(_random(r=3, fan_in_fan_out=True), base="conv1d"),
    "lora_orthogonal": Case(LoraConfig(r=4, init_lora_weights="orthogonal")),
    "lora_conv": Case(_random(r=3, lora_bias=True), base="conv", together="lora_conv_other"),
    "lora_conv_other": Case(_random(r=2), base="conv"),
    "lora_conv_uneven": Case(_random(r=3), base="conv_uneven"),
    "lora_conv_same": Case(_random(r=3), base="conv_same"),
    "lora_pointwise": Case(_random(r=3), base="pointwise"),
    "lora_sequence": Case(_random(r=3, lora_bias=True), base="sequence", together="lora_sequence_other"),
    "lora_sequence_other": Case(_random(r=2), base="sequence"),
    "lora_volume": Case(_random(r=3), base="volume"),
    "lora_embedding": Case(_random(r=3), base="embedding", together="rslora_embedding"),
    "rslora_embedding": Case(_random(r=2, use_rslora=True), base="embedding"),
    "dora": Case(_random(r=3, lora_alpha=5, use_dora=True)),
    "dora_conv1d": Case(_random(r=3, use_dora=True, fan_in_fan_out=True), base="conv1d"),
    "dora_conv": Case(_random(r=3, use_dora=True), base="conv"),
    "dora_conv_uneven": Case(_random(r=3, use_dora=True), base="conv_uneven"),
    "dora_sequence": Case(_random(r=2, use_dora=True), base="sequence"),
    "dora_volume": Case(_random(r=3, use_dora=True), base="volume_same"),
    "dora_embedding": Case(_random(r=3, use_dora=True), base="embedding"),
    "dora_inputs": Case(_random(r=3, lora_alpha=5, use_dora=True, dora_inputs=True)),
    "dora_inputs_conv1d": Case(_random(r=3, use_dora=True, dora_inputs=True, fan_in_fan_out=True), base="conv1d"),
    "dora_inputs_conv": Case(_random(r=3, use_dora=True, dora_inputs=True), base="conv"),
    "dora_inputs_uneven": Case(_random(r=3, use_dora=True, dora_inputs=True), base="conv_uneven"),
    "dora_inputs_sequence": Case(_random(r=2, use_dora=True, dora_inputs=True), base="sequence"),
    "dora_inputs_volume": Case(_random(r=3, use_dora=True, dora_inputs=True), base="volume_same"),
}

IDENTITIES = {
    "lora": Case(LoraConfig(r=3)),
    "gaussian": Case(LoraConfig(r=3, init_lora_weights="gaussian")),
    "lora_bias": Case(LoraConfig(r=3, lora_bias=True)),
    "lora_conv1d": Case(LoraConfig(r=3, fan_in_fan_out=True), base="conv1d"),
    "lora_conv": Case(LoraConfig(r=3, lora_bias=True), base="conv"),
    "lora_conv_uneven": Case(LoraConfig(r=3), base="conv_uneven"),
    "lora_conv_groups": Case(LoraConfig(r=4), base="conv_groups"),
    "lora_pointwise_strided": Case(LoraConfig(r=3), base="pointwise_strided"),
    "lora_sequence_groups": Case(LoraConfig(r=4), base="sequence_uneven"),
    "lora_volume": Case(LoraConfig(r=3), base="volume_same"),
    "lora_embedding": Case(LoraConfig(r=3), base="embedding"),
    "dora": Case(LoraConfig(r=3, use_dora=True)),
    "dora_conv1d": Case(LoraConfig(r=3, use_dora=True, fan_in_fan_out=True), base="conv1d"),
    "dora_conv": Case(LoraConfig(r=3, use_dora=True), base="conv"),
    "dora_volume": Case(LoraConfig(r=3, use_dora=True), base="volume"),
    "dora_embedding": Case(LoraConfig(r=3, use_dora=True), base="embedding"),
    "dora_inputs": Case(LoraConfig(r=3, use_dora=True, dora_inputs=True)),
    "dora_inputs_conv": Case(LoraConfig(r=3, use_dora=True, dora_inputs=True), base="conv"),
}


TOYS = {
    "lora": Toy(_random(r=2, target_modules=["query"]), {"lora_dropout": 0.5}),
    "dora": Toy(_random(r=2, target_modules=["query"], use_dora=True), {"lora_dropout": 0.5}),
}

LARGE = {
    "lora": LoraConfig(r=4),
    "lora, dropout": LoraConfig(r=4, lora_dropout=0.1),
    "dora": LoraConfig(r=4, use_dora=True),
}

FULL = [
    LoraConfig(),
    LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["b", "a"],
        task_type="SEQ_CLS",
        lora_dropout=0.1,
        bias="all",
        use_rslora=True,
        init_lora_weights="gaussian",
        rank_pattern={"a": 2},
        alpha_pattern={"b": 3},
        layers_to_transform=[0, 1],
        layers_pattern="h",
        modules_to_save=["head"],
        exclude_modules=["c"],
    ),
]

ROTATES = False


def dense(layer, name, weight, bias):
    scale = layer.scaling[name]
    if layer.kind == "Embedding":
        a = layer.lora_embedding_A[name].double()
        # The padding row is looked up as any other, but gets no gradient.
        padding = torch.arange(a.shape[1]) == layer.base_layer.padding_idx
        update = layer.lora_embedding_B[name].double() @ torch.where(padding, a.detach(), a)
        return _decomposed(layer, name, weight.T + scale * update).T, bias
    a, b = layer.lora_A[name], layer.lora_B[name]
    update = b.weight.double().flatten(1) @ a.weight.double().flatten(1)
    weight = _decomposed(layer, name, weight + scale * update.view(weight.shape))
    if b.bias is not None:
        bias = (0 if bias is None else bias) + scale * b.bias.double()
    return weight, bias


def _decomposed(layer, name, weight):
    """The weight with DoRA's magnitudes as the norms of its rows; no gradient goes through the norms of before."""
    if not layer.use_dora[name]:
        return weight
    magnitude = layer.lora_magnitude_vector[name].weight.double()
    return dora.decomposed(weight, magnitude, of_inputs=layer.dora_inputs[name])
