"""C3A, two kernels with blocks of other sizes."""

from __future__ import annotations

from peftk.methods import c3a
from peftk.testing.cases import circulant
from support.method_forms import Form


def _shapes(s):
    return {f"k{size}": (s[0] // size, s[1] // size, size) for size in (4, 2)}


def _weight(weight, bias, t):
    added = circulant.dense(t["k4"]) + circulant.dense(t["k2"])
    return weight + added.view(weight.shape) / weight.shape[1], bias


FORMS = (
    Form(
        "linear",
        _shapes,
        lambda base, x, t: c3a.linear(base, x, [t["k4"], t["k2"]]),
        _weight,
        lambda weight, bias, t: (c3a.merged(c3a.merged(weight, t["k4"]), t["k2"]), bias),
    ),
    Form("conv", _shapes, lambda base, x, t: c3a.conv2d(base, x, [t["k4"], t["k2"]]), _weight, bases=("pointwise",)),
)
