"""OFT."""

from __future__ import annotations

from peftk.nn import OFTConfig

CASES = {
    "classification, all-linear": (
        "bert_cls",
        OFTConfig,
        {"task_type": "SEQ_CLS", "oft_block_size": 8, "target_modules": "all-linear"},
    ),
    "tokens": ("bert_tokens", OFTConfig, {"task_type": "TOKEN_CLS", "oft_block_size": 4}),
    "oft": ("bert", OFTConfig, {"oft_block_size": 4}),
    "oft by number": (
        "mlp",
        OFTConfig,
        {"r": 4, "oft_block_size": 0, "target_modules": ["first", "second"], "init_weights": False},
    ),
    "oft exact": ("mlp", OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False, "target_modules": ["first"]}),
    "oft terms": ("mlp", OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": 7, "target_modules": ["first"]}),
    "oft shared": ("mlp", OFTConfig, {"oft_block_size": 4, "block_share": True, "target_modules": ["first"]}),
    "coft": ("mlp", OFTConfig, {"oft_block_size": 4, "coft": True, "eps": 0.2, "target_modules": ["first"]}),
    "oft nearest": ("mlp", OFTConfig, {"oft_block_size": 5, "target_modules": ["first", "second"]}),
    "oft bias": ("mlp", OFTConfig, {"oft_block_size": 4, "bias": "oft_only", "target_modules": ["first", "second"]}),
    "oft embeddings": ("bert", OFTConfig, {"oft_block_size": 4, "target_modules": ["word_embeddings", "query"]}),
    # A kernel larger than 1 is where PEFT is wrong (D3).
    "oft pointwise": ("cnn", OFTConfig, {"oft_block_size": 4, "target_modules": ["pointwise"], "init_weights": False}),
}
