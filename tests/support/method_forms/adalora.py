"""AdaLoRA."""

from __future__ import annotations

from peftk.methods import adalora, lora
from support.method_forms import Form


def _adapter(t):
    return adalora.low_rank(adalora.Triplets(t["a"], t["b"], t["e"], 2.0, 4))


FORMS = (
    Form(
        "linear",
        lambda s: {"a": (3, s[1]), "b": (s[0], 3), "e": (3, 1)},
        lambda base, x, t: adalora.linear(base, x, [_adapter(t)]),
        lambda weight, bias, t: (weight + 2 / (4 + 1e-5) * (t["b"] * t["e"].view(-1)) @ t["a"], bias),
        lambda weight, bias, t: lora.merged(weight, bias, _adapter(t), weight, bias),
    ),
)
