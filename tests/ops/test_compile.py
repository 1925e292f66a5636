"""Every operator compiles in one graph, for dynamic shapes too, and exports."""

from __future__ import annotations

import pytest
import torch
from support.operators import ANY_CASE, ONE_CASE, call, double, forward_backward
from torch import Tensor

import peftk
from peftk.testing.cases import Case
from peftk.testing.compare import assert_close


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@ANY_CASE
def test_compiles_in_one_graph(case: Case, backend: str) -> None:
    if backend == "inductor" and case.operator not in ("low_rank_linear", "block_rotate"):
        pytest.skip("inductor is tried on two operators: it sees the same opaque operator in all of them")
    torch._dynamo.reset()
    function = torch.compile(lambda **kw: call(case, kw), fullgraph=True, backend=backend)
    expected, expected_grads, _ = forward_backward(lambda **kw: call(case, kw), case, double(case))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for choice in ("torch", "auto"):
            # The backend is chosen inside the opaque operator: another one needs no recompilation.
            with peftk.use_backend(choice):
                y, grads, _ = forward_backward(function, case, double(case))
            assert_close(y, expected, torch.float64)
            for name in grads:
                assert_close(grads[name], expected_grads[name], torch.float64, what=f"d{name}")


@ONE_CASE
def test_compiles_for_dynamic_shapes(case: Case) -> None:
    if "x" not in case.inputs():
        pytest.skip("the shape of a parameter does not vary")
    torch._dynamo.reset()
    function = torch.compile(lambda **kw: call(case, kw), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        inputs = double(case)
        for name in ("x", "base"):
            if name in inputs:
                value = inputs[name].detach()
                inputs[name] = value.reshape(-1, value.shape[-1])[:1].expand(rows, -1).clone()
        if inputs.get("gate") is not None and inputs["gate"].dim() > 1:
            inputs["gate"] = inputs["gate"].detach().reshape(-1, inputs["gate"].shape[-1])[:1].expand(rows, -1).clone()
        if "offsets" in inputs:
            inputs["offsets"] = inputs["offsets"].clamp(max=rows)
        assert_close(function(**inputs), call(case, inputs), torch.float64)


@ANY_CASE
def test_exports(case: Case) -> None:
    inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in double(case).items()}

    class Module(torch.nn.Module):
        def forward(self, **kw: object) -> Tensor:
            return call(case, kw)

    exported = torch.export.export(Module(), (), inputs)
    assert any("peftk" in str(node.target) for node in exported.graph.nodes)
    assert_close(exported.module()(**inputs), call(case, inputs), torch.float64)
