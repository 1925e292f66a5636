"""LoRA."""

from __future__ import annotations

from peftk.nn import LoraConfig

CASES = {
    "default targets": ("bert", LoraConfig, {"r": 4}),
    "suffixes": ("mlp", LoraConfig, {"r": 2, "lora_alpha": 3, "target_modules": ["first", "head.2"]}),
    "pattern": ("bert", LoraConfig, {"target_modules": r".*layer\.1.*(query|key)", "use_rslora": True}),
    "all-linear": ("llama", LoraConfig, {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "layers": (
        "llama",
        LoraConfig,
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "exclude": ("bert", LoraConfig, {"target_modules": ["query", "value"], "exclude_modules": r".*\.0\..*value"}),
    "patterns": (
        "mlp",
        LoraConfig,
        {"target_modules": ["first", "second"], "rank_pattern": {"^first": 3}, "alpha_pattern": {"second": 5}},
    ),
    "bias all": ("mlp", LoraConfig, {"target_modules": ["first"], "bias": "all", "modules_to_save": ["head.2"]}),
    "bias lora_only": ("bert", LoraConfig, {"target_modules": ["query"], "bias": "lora_only"}),
    "lora_bias": ("mlp", LoraConfig, {"r": 2, "target_modules": ["first"], "lora_bias": True}),
    "gaussian": ("mlp", LoraConfig, {"r": 2, "target_modules": ["first"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("mlp", LoraConfig, {"r": 2, "target_modules": ["first"], "init_lora_weights": "orthogonal"}),
    "random": ("mlp", LoraConfig, {"r": 2, "target_modules": ["first"], "init_lora_weights": False}),
    "classification": ("bert_cls", LoraConfig, {"task_type": "SEQ_CLS"}),
    "nested head": ("roberta_cls", LoraConfig, {"task_type": "SEQ_CLS", "target_modules": ["query"]}),
    "gpt2": ("gpt2", LoraConfig, {"r": 2, "fan_in_fan_out": True}),
    "gpt2, all-linear": ("gpt2", LoraConfig, {"r": 2, "target_modules": "all-linear", "fan_in_fan_out": True}),
    "convolutions": (
        "cnn",
        LoraConfig,
        {"r": 2, "target_modules": ["first", "pointwise"], "lora_bias": True, "bias": "lora_only"},
    ),
    "strided convolution": ("cnn", LoraConfig, {"r": 2, "target_modules": ["second"]}),
    "sequences": ("sequences", LoraConfig, {"r": 2, "target_modules": ["first", "pointwise"], "lora_bias": True}),
    "volumes": ("volumes", LoraConfig, {"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False}),
    "dora sequences": ("sequences", LoraConfig, {"r": 2, "target_modules": ["first", "pointwise"], "use_dora": True}),
    "dora volumes": ("volumes", LoraConfig, {"r": 2, "target_modules": ["first", "second"], "use_dora": True}),
    "embeddings": ("bert", LoraConfig, {"r": 2, "target_modules": ["word_embeddings", "query"]}),
    "dora": ("mlp", LoraConfig, {"r": 2, "target_modules": ["first", "second"], "use_dora": True, "lora_alpha": 3}),
    "dora random": (
        "mlp",
        LoraConfig,
        {"r": 2, "target_modules": ["first", "second"], "use_dora": True, "init_lora_weights": False},
    ),
    "dora bias": ("bert", LoraConfig, {"r": 2, "use_dora": True, "bias": "lora_only"}),
    "dora gpt2": ("gpt2", LoraConfig, {"r": 2, "use_dora": True, "fan_in_fan_out": True}),
    "dora convolutions": (
        "cnn",
        LoraConfig,
        {"r": 2, "target_modules": ["first", "second", "pointwise"], "use_dora": True},
    ),
    "dora embeddings": ("bert", LoraConfig, {"r": 2, "target_modules": ["word_embeddings"], "use_dora": True}),
    "questions": ("bert_qa", LoraConfig, {"task_type": "QUESTION_ANS"}),
}
