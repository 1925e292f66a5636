"""LoRA."""

from __future__ import annotations

from layer_cases import Case
from peftk.nn import LoraConfig

CASES = {
    "lora": Case(LoraConfig(r=3, lora_alpha=5, init_lora_weights=False), together="rslora"),
    "rslora": Case(LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False)),
    "lora_bias": Case(LoraConfig(r=2, lora_bias=True, init_lora_weights=False)),
    "lora_conv1d": Case(LoraConfig(r=3, fan_in_fan_out=True, init_lora_weights=False), base="conv1d"),
    "lora_orthogonal": Case(LoraConfig(r=4, init_lora_weights="orthogonal")),
}

IDENTITIES = {
    "lora": Case(LoraConfig(r=3)),
    "gaussian": Case(LoraConfig(r=3, init_lora_weights="gaussian")),
    "lora_bias": Case(LoraConfig(r=3, lora_bias=True)),
    "lora_conv1d": Case(LoraConfig(r=3, fan_in_fan_out=True), base="conv1d"),
}


def dense(layer, name, weight, bias):
    a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    weight = weight + scale * b.weight.double() @ a.weight.double()
    if b.bias is not None:
        bias = (0 if bias is None else bias) + scale * b.bias.double()
    return weight, bias
