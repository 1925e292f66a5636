"""Forward and backward of the layers in a CUDA graph, replayed with other values."""

from __future__ import annotations

import pytest
import torch
from gpu_calls import METHODS, layer, trainable

import peftk
from peftk.testing.compare import assert_same_bits

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_capture_and_replay(method: str, dtype: torch.dtype, backend: str, device: str) -> None:
    module = layer(METHODS[method], dtype, device)
    parameters = trainable(module)
    x = torch.randn(65, 512, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(65, 384, device=device, dtype=dtype)
    leaves = {"x": x, **parameters}

    def step() -> torch.Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        y = module(x)
        y.backward(grad)
        return y

    with peftk.use_backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                try:
                    step()
                except RuntimeError as error:
                    if "backend: expected one that can run" in str(error):
                        pytest.skip(str(error).splitlines()[0])
                    raise
        torch.cuda.current_stream().wait_stream(side)
        for leaf in leaves.values():
            leaf.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
            y.backward(grad)
        captured = {name: leaf.grad for name, leaf in leaves.items()}
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
                grad.copy_(torch.randn_like(grad))
                for parameter in parameters.values():
                    parameter.mul_(0.9)
            graph.replay()
            replayed = {"output": y.detach().clone(), **{name: g.clone() for name, g in captured.items()}}
            expected = {"output": step().detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
            for name, value in expected.items():
                assert value.abs().sum() > 0
                assert_same_bits(replayed[name], value, what=f"{name}, replay {seed}")


def test_dropout_is_refused_while_a_graph_is_captured(device: str) -> None:
    module = layer(peftk.LoraConfig(r=16, lora_dropout=0.5), torch.float32, device)
    x = torch.randn(65, 512, device=device)
    module(x)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        module(x)


def test_the_first_use_of_a_transform_is_refused_while_a_graph_is_captured(device: str) -> None:
    x = torch.randn(4, 22, device=device, dtype=torch.bfloat16)
    kernel = torch.randn(1, 1, 22, device=device)
    x @ x.mT
    torch.cuda.synchronize()
    with (
        peftk.use_backend("torch"),
        pytest.raises(RuntimeError, match="before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        peftk.functional.circular_conv(x, kernel)
