"""DoRA with a magnitude for every input."""

from __future__ import annotations

from peftk.methods import lora, lora_conv
from peftk.testing.cases import dora
from support.method_forms import Form, single


def _adapters(t):
    return [lora.LowRank(t["a"], t["b"], 0.5, magnitude=t["m"], of_inputs=True)]


def _weight(weight, bias, t):
    update = 0.5 * t["b"].flatten(1) @ t["a"].flatten(1)
    return dora.decomposed(weight + update.view(weight.shape), t["m"], of_inputs=True), bias


FORMS = (
    Form(
        "linear",
        lambda s: {"a": (2, s[1]), "b": (s[0], 2), "m": (1, s[1])},
        lambda base, x, t: lora.linear(base, x, _adapters(t)),
        _weight,
        lambda weight, bias, t: lora.merged(weight, bias, *_adapters(t), weight, bias),
    ),
    Form(
        "conv",
        lambda s: {"a": (2, *s[1:]), "b": (s[0], 2, *single(s)), "m": (1, s[1])},
        lambda base, x, t: lora_conv.conv(base, x, _adapters(t)),
        _weight,
    ),
)
