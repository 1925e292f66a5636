"""BOFT with one factor, which is all that PEFT computes without its CUDA extension."""

from __future__ import annotations

from peftk.nn import BOFTConfig

CASES = {
    "boft": ("bert", BOFTConfig, {"target_modules": ["query", "value"]}),
    "boft bias": (
        "mlp",
        BOFTConfig,
        {"target_modules": ["first", "second"], "init_weights": False, "bias": "boft_only"},
    ),
    "boft number": (
        "mlp",
        BOFTConfig,
        {"boft_block_size": 0, "boft_block_num": 4, "target_modules": ["first"], "init_weights": False},
    ),
    "boft conv": (
        "cnn",
        BOFTConfig,
        {"boft_block_size": 3, "target_modules": ["first"], "init_weights": False, "bias": "all"},
    ),
    "boft pointwise": ("cnn", BOFTConfig, {"target_modules": ["second", "pointwise"], "init_weights": False}),
}
