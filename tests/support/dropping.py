"""Layers of every method with dropout of the method's own kind."""

from __future__ import annotations

import dataclasses

import torch

from peftk.nn import AdaLoraConfig, BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig
from support.layer_cases import CASES, Case, example, make

KINDS = {
    LoraConfig: ["lora_dropout"],
    AdaLoraConfig: ["lora_dropout"],
    OFTConfig: ["module_dropout"],
    BOFTConfig: ["boft_dropout"],
    LoHaConfig: ["rank_dropout", "module_dropout"],
    LoKrConfig: ["rank_dropout", "module_dropout"],
}
# Embeddings have no dropout, as in PEFT.
DROPPED = [
    (name, field)
    for name, case in CASES.items()
    if case.base != "embedding"
    for field in KINDS.get(type(case.config), [])
]


def dropping(name, **fields):
    case = CASES[name]
    return make(Case(dataclasses.replace(case.config, **fields), case.base))


def batch(name, times=1):
    x = example(CASES[name])
    return torch.cat([x.flip(-1) / (i + 1) for i in range(times)])
