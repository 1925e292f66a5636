"""AdaLoRA."""

from __future__ import annotations

from peftk.nn import AdaLoraConfig

SMALL = {"total_step": 9, "init_r": 3, "target_r": 2}

CASES = {
    "adalora": ("bert", AdaLoraConfig, {**SMALL, "bias": "lora_only"}),
    "adalora roberta": ("roberta_cls", AdaLoraConfig, {**SMALL, "task_type": "SEQ_CLS", "lora_alpha": 3}),
    "adalora random": (
        "mlp",
        AdaLoraConfig,
        {**SMALL, "target_modules": ["first", "second"], "init_lora_weights": False, "lora_alpha": 0},
    ),
    "adalora convolutions": ("cnn", AdaLoraConfig, {**SMALL, "target_modules": ["first", "second", "pointwise"]}),
    "adalora gpt2": ("gpt2", AdaLoraConfig, {**SMALL, "fan_in_fan_out": True}),
}
