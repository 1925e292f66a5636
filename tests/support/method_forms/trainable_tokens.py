"""Rows that are trained in place of those of an embedding or a linear layer, of two adapters."""

from __future__ import annotations

import torch

from peftk.methods import trainable_tokens
from peftk.methods.trainable_tokens import Tokens
from support.method_forms import Form

INDICES = (torch.tensor([6, 1]), torch.tensor([0]))


def _tokens(t):
    return [Tokens(indices, rows) for indices, rows in zip(INDICES, (t["a"], t["b"]), strict=True)]


def _weight(weight, bias, t):
    # (out, in); those of an embedding have its rows as columns.
    for indices, rows in zip(INDICES, (t["a"], t["b"]), strict=True):
        for index, row in zip(indices, rows, strict=True):
            weight = torch.cat([weight[:index], row[None], weight[index + 1 :]])
    return weight, bias


def _merged(weight, bias, t):
    for adapter in _tokens(t):
        weight = trainable_tokens.merged(weight, adapter)
    return weight, bias


FORMS = (
    Form(
        "linear",
        lambda s: {"a": (2, s[1]), "b": (1, s[1])},
        lambda base, x, t: trainable_tokens.linear(base, x, _tokens(t)),
        _weight,
        _merged,
        bases=("fused", "no bias", "called", "opaque"),
    ),
    Form(
        "embedding",
        lambda s: {"a": (2, s[0]), "b": (1, s[0])},
        lambda base, x, t: trainable_tokens.embedding(base, x, _tokens(t)),
        lambda weight, bias, t: (_weight(weight.mT, bias, t)[0].mT, bias),
    ),
)
