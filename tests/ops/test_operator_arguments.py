"""Every argument of every operator: what no operator can take is refused by name, and backends agree on the rest."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from support.operators import CASES
from torch import Tensor

import peftk
from peftk.testing.cases import Case
from peftk.testing.compare import assert_close, assert_same_bits, joined

F = peftk.functional
# The case of each operator with most tensors, none of them empty.
FULL: dict[str, Case] = {}
for _case in CASES:
    _tensors = [v for v in _case.inputs().values() if isinstance(v, Tensor)]
    if all(t.numel() for t in _tensors):
        _known = FULL.get(_case.operator)
        if _known is None or len(_tensors) > sum(isinstance(v, Tensor) for v in _known.inputs().values()):
            FULL[_case.operator] = _case
ANY = pytest.mark.parametrize("operator", FULL)
SCALED = pytest.mark.parametrize(
    "operator", [o for o in FULL if o != "scale_channels" and "scale" in inspect.signature(getattr(F, o)).parameters]
)


def inputs_of(operator: str, dtype: torch.dtype = torch.float32) -> dict:
    case = FULL[operator]
    return case.cast(case.inputs(), dtype)


def tensors_of(operator: str) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the name of each tensor that an operator takes, one that fits, and whether None does too."""
    inputs = inputs_of(operator)
    for name, parameter in inspect.signature(getattr(F, operator)).parameters.items():
        if "Tensor" in str(parameter.annotation) and name != "seed":
            value = inputs.get(name)
            optional = "None" in str(parameter.annotation) or parameter.default is not inspect.Parameter.empty
            yield name, value if isinstance(value, Tensor) else torch.tensor(1.0), optional


def refused(operator: str, name: str, value: object, got: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*; got .*{got}"):
        getattr(F, operator)(**{**inputs_of(operator), name: value})


@ANY
def test_a_required_tensor_is_not_none(operator: str) -> None:
    for name, _, optional in tensors_of(operator):
        if not optional:
            refused(operator, name, None, "NoneType")


@ANY
def test_nested_and_other_tensors_are_refused(operator: str) -> None:
    nested = torch.nested.nested_tensor
    for name, value, _ in tensors_of(operator):
        refused(operator, name, nested([torch.ones(2, 3), torch.ones(2, 3)]), "nested")
        refused(operator, name, nested([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged), "nested")
        refused(operator, name, (value if value.dim() else value[None]).to_sparse(), "sparse")
        if value.is_floating_point():
            refused(operator, name, value.int(), "int32")
        else:
            refused(operator, name, value.float(), "float32")
        refused(operator, name, value.cfloat(), "complex64")
        refused(operator, name, [1.0], "list")


@ANY
def test_tensors_on_another_device_are_refused(operator: str) -> None:
    tensors = list(tensors_of(operator))
    if len(tensors) == 1:
        return
    for name, value, _ in tensors:
        # The first of a call says where the others have to be.
        with pytest.raises(ValueError, match=r"^\w+: expected a tensor on (cpu|meta), .*; got one on (cpu|meta)"):
            getattr(F, operator)(**{**inputs_of(operator), name: value.to("meta")})


@SCALED
@pytest.mark.parametrize("scale", [10**400, -(10**400), 10**39, 1e39, -1e39, float("inf"), float("nan")])
def test_a_scale_beyond_the_dtype_is_refused(operator: str, scale: float) -> None:
    refused(operator, "scale", scale, "")
    case = FULL[operator]
    wide = {**case.inputs(), "scale": scale}
    if abs(scale) in (1e39, 10**39):
        with peftk.use_backend("torch"):
            assert case.function(**wide).isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"^scale: expected a finite number"):
            case.function(**wide)


@SCALED
def test_the_largest_scale_is_taken(operator: str) -> None:
    inputs = {
        k: torch.zeros_like(v) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs_of(operator).items()
    }
    for backend in ("torch", "native"):
        with peftk.use_backend(backend):
            for dtype in (torch.float32, torch.bfloat16):
                call = FULL[operator].cast({**inputs, "scale": torch.finfo(torch.float32).max}, dtype)
                assert not joined(getattr(F, operator)(**call)).any(), backend


@SCALED
def test_a_scale_may_come_from_the_cpu(operator: str) -> None:
    annotation = str(inspect.signature(getattr(F, operator)).parameters["scale"].annotation)
    if "Tensor" not in annotation and annotation != "Scale":
        return
    meta = {k: v.to("meta") if isinstance(v, Tensor) and k != "seed" else v for k, v in inputs_of(operator).items()}
    assert joined(getattr(F, operator)(**{**meta, "scale": torch.tensor(2.0)})).is_meta


@SCALED
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_zero_hides_nothing_on_any_backend(operator: str, poison: float, dtype: torch.dtype) -> None:
    inputs = {**inputs_of(operator, dtype), "scale": 0.0}
    products = {"x", "a", "b", "w1", "w2", "kernel", "w1_a", "w1_b", "w2_a", "w2_b"}
    for name in products & inputs.keys():
        spoilt = {**inputs, name: torch.full_like(inputs[name], poison)}
        for backend in ("torch", "native"):
            with peftk.use_backend(backend):
                assert joined(getattr(F, operator)(**spoilt)).isnan().all(), f"{name} on {backend}"


@SCALED
def test_a_scale_of_zero_has_gradients_of_zero(operator: str) -> None:
    case = FULL[operator]
    for backend in ("torch", "native"):
        inputs = {**inputs_of(operator), "scale": 0.0}
        names = [n for n in case.gradients if n in ("a", "b", "w1", "w2", "kernel", "w1_a", "w1_b", "w2_a", "w2_b")]
        wanted = [inputs[n].requires_grad_() for n in names]
        with peftk.use_backend(backend):
            y = getattr(F, operator)(**inputs)
            for found in torch.autograd.grad(y.sum(), wanted) if wanted else ():
                assert not found.any()


TINY = [1e-23, 1e-30, 1e-38, 1e19, 3e37]


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_whose_squares_no_float32_holds(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, *TINY, 0.0, 1.0])[:, None]
    weight = (torch.randn(len(sizes), 40, generator=generator) * sizes).to(dtype)
    a, b = torch.randn(3, 40, generator=generator), torch.randn(len(sizes), 3, generator=generator) * sizes
    expected = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    with peftk.use_backend(backend):
        norms = F.dora_norm(weight, a, b, 0.5)
        ordinary = F.dora_norm(weight[:1], a, b[:1], 0.5)
        zero = F.dora_norm(weight, a, 0 * b, 0.5)
        assert_same_bits(F.dora_norm(weight, 3 * a, 0 * b, 2.0), zero)
    for row, (found, right) in enumerate(zip(norms, expected, strict=True)):
        unit = 1.0 if right == 0 else float(right)
        assert_close(found.double() / unit, right / unit, torch.float32, what=f"row {row}")
    assert_close(ordinary, norms[:1].double(), torch.float32)


def test_norms_whose_squares_no_float64_holds() -> None:
    weight = torch.full((3, 4), 1.0, dtype=torch.float64) * torch.tensor(
        [[1e-200], [1.0], [1e200]], dtype=torch.float64
    )
    found = F.dora_norm(weight, torch.zeros(1, 4), torch.zeros(3, 1))
    assert_close(found / weight[:, 0], torch.full((3,), 2.0, dtype=torch.float64), torch.float64)


def test_norms_that_are_not_finite_stay_so() -> None:
    weight = torch.ones(3, 4)
    weight[0, 1], weight[1, 2] = torch.inf, torch.nan
    for backend in ("torch", "native"):
        with peftk.use_backend(backend):
            found = F.dora_norm(weight, torch.zeros(1, 4), torch.zeros(3, 1))
        assert found[0] == torch.inf and found[1].isnan() and found[2] == 2.0, backend
