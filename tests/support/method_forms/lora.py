"""LoRA, two adapters on linear layers: one with a bias, one with a gate."""

from __future__ import annotations

from peftk.methods import lora, lora_conv, lora_embedding
from support.method_forms import Form, single


def _one(t):
    return [lora.LowRank(t["a"], t["b"], 0.5, bias=t.get("bias"))]


def _two(t):
    return [*_one(t), lora.LowRank(t["c"], t["d"], 2.0, t["gate"])]


def _weight(weight, bias, t):
    weight = weight + (0.5 * t["b"].flatten(1) @ t["a"].flatten(1)).view(weight.shape)
    if "c" in t:
        weight = weight + 2 * (t["d"] * t["gate"]) @ t["c"]
    if "bias" in t:
        bias = t["bias"] if bias is None else bias + t["bias"]
    return weight, bias


def _merged(weight, bias, t):
    own = weight, bias
    for adapter in _two(t):
        weight, bias = lora.merged(weight, bias, adapter, *own)
    return weight, bias


FORMS = (
    Form(
        "linear",
        lambda s: {"a": (2, s[1]), "b": (s[0], 2), "bias": (s[0],), "c": (3, s[1]), "d": (s[0], 3), "gate": (3,)},
        lambda base, x, t: lora.linear(base, x, _two(t)),
        _weight,
        _merged,
    ),
    Form(
        "conv",
        lambda s: {"a": (2, *s[1:]), "b": (s[0], 2, *single(s)), "bias": (s[0],)},
        lambda base, x, t: lora_conv.conv(base, x, _one(t)),
        _weight,
    ),
    Form(
        "embedding",
        lambda s: {"a": (2, s[1]), "b": (s[0], 2)},
        lambda base, x, t: lora_embedding.embedding(base, x, _one(t)),
        _weight,
    ),
)
