"""LoKr."""

from __future__ import annotations

from peftk.nn import LoKrConfig

LINEAR, CONV = ["first", "second"], ["first", "second", "pointwise"]

CASES = {
    "lokr": ("bert", LoKrConfig, {"r": 1, "target_modules": ["query", "value"]}),
    "lokr full": ("mlp", LoKrConfig, {"r": 8, "alpha": 4, "decompose_factor": 4, "target_modules": LINEAR}),
    "lokr both": (
        "mlp",
        LoKrConfig,
        {"r": 1, "decompose_both": True, "target_modules": LINEAR, "init_weights": False},
    ),
    "lokr lycoris": ("mlp", LoKrConfig, {"r": 1, "target_modules": LINEAR, "init_weights": "lycoris"}),
    "lokr patterns": (
        "mlp",
        LoKrConfig,
        {"r": 1, "target_modules": LINEAR, "rank_pattern": {"first": 2}, "alpha_pattern": {"second": 3}},
    ),
    "lokr uneven factors": ("mlp", LoKrConfig, {"r": 1, "decompose_factor": 6, "target_modules": LINEAR}),
    "lokr conv": ("cnn", LoKrConfig, {"r": 1, "target_modules": CONV}),
    "lokr conv full": ("cnn", LoKrConfig, {"r": 8, "target_modules": CONV, "init_weights": "lycoris"}),
    "lokr sequences": ("sequences", LoKrConfig, {"r": 1, "target_modules": CONV, "decompose_factor": 1}),
    "lokr sequences full": ("sequences", LoKrConfig, {"r": 8, "target_modules": CONV, "init_weights": False}),
    "lokr sequences tucker": (
        "sequences",
        LoKrConfig,
        {"r": 1, "target_modules": CONV, "use_effective_conv2d": True, "decompose_factor": 1},
    ),
    "lokr conv tucker": (
        "cnn",
        LoKrConfig,
        {"r": 1, "use_effective_conv2d": True, "decompose_both": True, "target_modules": CONV, "init_weights": False},
    ),
}
