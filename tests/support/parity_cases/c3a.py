"""C3A.

PEFT's gradient in the input is wrong for blocks of more than 2 (see tests/nn/test_c3a.py): larger blocks are compared
only where no adapted layer stands before another trained one.
"""

from __future__ import annotations

from peftk.nn import C3AConfig

CASES = {
    "c3a": ("bert", C3AConfig, {"block_size": 2}),
    "c3a gaussian": ("bert_cls", C3AConfig, {"block_size": 2, "init_weights": "gaussian", "task_type": "SEQ_CLS"}),
    "c3a kaiming": (
        "mlp",
        C3AConfig,
        {"block_size": 4, "init_weights": "kaiming_uniform", "target_modules": ["first"], "bias": "c3a_only"},
    ),
    "c3a zeros": ("mlp", C3AConfig, {"block_size": 1, "init_weights": True, "target_modules": ["first", "second"]}),
    "c3a pattern": (
        "bert",
        C3AConfig,
        {
            "block_size": 1,
            "block_size_pattern": {"query": 2, "1.attention.self.value": 16},
            "init_weights": False,
            "target_modules": ["query", "value"],
            "layers_to_transform": [1],
        },
    ),
}
