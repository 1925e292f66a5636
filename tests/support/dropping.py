"""Layers of every method with dropout of the method's own kind."""

from __future__ import annotations

import dataclasses

import torch

from support.layer_cases import CASES, Case, example, make

# The dropout of a method: the fields of its configuration that are called so and are probabilities.
KINDS = {
    kind: [f.name for f in dataclasses.fields(kind) if f.name.endswith("dropout") and isinstance(f.default, float)]
    for kind in dict.fromkeys(type(case.config) for case in CASES.values())
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
