"""AdaLoRA."""

from __future__ import annotations

from peftk.nn import AdaLoraConfig
from support.layer_cases import Case

SCHEDULE = {"total_step": 9, "init_r": 3, "target_r": 2}

CASES = {
    "adalora": Case(AdaLoraConfig(**SCHEDULE, lora_alpha=5, init_lora_weights=False), together="adalora_zero_alpha"),
    "adalora_zero_alpha": Case(AdaLoraConfig(**SCHEDULE, lora_alpha=0, init_lora_weights=False)),
    "adalora_conv1d": Case(AdaLoraConfig(**SCHEDULE, init_lora_weights=False, fan_in_fan_out=True), base="conv1d"),
}

IDENTITIES = {
    "adalora": Case(AdaLoraConfig(**SCHEDULE)),
    "adalora_conv1d": Case(AdaLoraConfig(**SCHEDULE, fan_in_fan_out=True), base="conv1d"),
}


def dense(layer, name, weight, bias):
    a, b, e = (getattr(layer, f"lora_{c}")[name].double() for c in "ABE")
    alpha = layer.lora_alpha[name] or layer.init_r[name]
    return weight + alpha / (layer.ranknum[name].double() + 1e-5) * b @ (e * a), bias
