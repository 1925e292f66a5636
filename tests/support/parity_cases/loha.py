"""LoHa."""

from __future__ import annotations

from peftk.nn import LoHaConfig

CASES = {
    "loha": ("bert", LoHaConfig, {"r": 2, "target_modules": ["query", "value"]}),
    "loha of high rank": ("mlp", LoHaConfig, {"r": 8, "alpha": 4, "target_modules": ["first", "second"]}),
    "loha random": ("mlp", LoHaConfig, {"r": 3, "target_modules": ["first"], "init_weights": False}),
    "loha patterns": (
        "mlp",
        LoHaConfig,
        {
            "r": 2,
            "target_modules": ["first", "second"],
            "rank_pattern": {"^first": 3},
            "alpha_pattern": {"second": 5},
            "modules_to_save": ["head.2"],
        },
    ),
    "loha sequences": ("sequences", LoHaConfig, {"r": 2, "target_modules": ["first", "second", "pointwise"]}),
    "loha on convolutions": ("cnn", LoHaConfig, {"r": 2, "target_modules": ["first", "second", "pointwise", "head"]}),
}
