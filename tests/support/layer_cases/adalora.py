"""AdaLoRA."""

from __future__ import annotations

from peftk.nn import AdaLoraConfig
from support.layer_cases import Case, Toy

SCHEDULE = {"total_step": 9, "init_r": 3, "target_r": 2}

CASES = {
    "adalora": Case(AdaLoraConfig(**SCHEDULE, lora_alpha=5, init_lora_weights=False), together="adalora_zero_alpha"),
    "adalora_zero_alpha": Case(AdaLoraConfig(**SCHEDULE, lora_alpha=0, init_lora_weights=False)),
    "adalora_conv1d": Case(AdaLoraConfig(**SCHEDULE, init_lora_weights=False, fan_in_fan_out=True), base="conv1d"),
    "adalora_conv": Case(
        AdaLoraConfig(**SCHEDULE, lora_alpha=5, init_lora_weights=False), "conv_uneven", together="adalora_conv_other"
    ),
    "adalora_conv_other": Case(AdaLoraConfig(**SCHEDULE, lora_alpha=2, init_lora_weights=False), "conv_uneven"),
    "adalora_sequence": Case(AdaLoraConfig(**SCHEDULE, init_lora_weights=False), "sequence"),
}

IDENTITIES = {
    "adalora": Case(AdaLoraConfig(**SCHEDULE)),
    "adalora_conv1d": Case(AdaLoraConfig(**SCHEDULE, fan_in_fan_out=True), base="conv1d"),
    "adalora_conv": Case(AdaLoraConfig(**SCHEDULE), "conv"),
    "adalora_volume": Case(AdaLoraConfig(**SCHEDULE), "volume_same"),
}


TOYS = {
    "adalora": Toy(
        AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["query"], init_lora_weights=False),
        {"lora_dropout": 0.5},
    )
}

LARGE = {"adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=9)}

FULL = [
    AdaLoraConfig(init_r=3, target_r=2, total_step=9, tinit=2, tfinal=1, deltaT=3, bias="lora_only"),
]

ROTATES = False


def dense(layer, name, weight, bias):
    a, b, e = (getattr(layer, f"lora_{c}")[name].double() for c in "ABE")
    alpha = layer.lora_alpha[name] or layer.init_r[name]
    return weight + alpha / (layer.ranknum[name].double() + 1e-5) * (b @ (e * a)).view(weight.shape), bias
