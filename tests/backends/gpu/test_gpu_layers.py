"""Layers on the GPU: fresh adapters change nothing, little is saved, and training goes as on plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from gpu_calls import FRESH, METHODS, layer, trainable

import peftk
from peftk.testing.compare import assert_close, assert_same_bits
from peftk.testing.memory import saved_bytes

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("tokens", [1, 2, 33, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", FRESH)
def test_fresh_adapter_changes_no_bit(method: str, dtype: torch.dtype, tokens: int, device: str) -> None:
    module = layer(FRESH[method], dtype, device)
    x = torch.randn(tokens, 512, device=device, dtype=dtype)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    expected = torch.nn.functional.linear(x, module.base_layer.weight, module.base_layer.bias)
    assert_same_bits(module(x).detach(), expected.detach())
    for name, parameter in module.named_parameters():
        assert_same_bits(parameter, before[name], what=f"{name} after the call")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_saved_bytes_stay_in_the_budget(method: str, dtype: torch.dtype, device: str) -> None:
    """Beyond x and the parameters: T x r and rounded factors for LoRA, the blocks for OFT."""
    module = layer(METHODS[method], dtype, device)
    tokens, features, out = 1024, 512, 384
    x = torch.randn(tokens, features, device=device, dtype=dtype, requires_grad=True)
    saved = saved_bytes(lambda: module(x), (x, *module.parameters()))
    if method == "lora":
        budget = x.element_size() * 16 * (tokens + (features + out if dtype is not torch.float32 else 0))
    else:
        budget = 4 * features * 32
    assert saved <= budget


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("method", METHODS)
def test_training_in_bf16_goes_as_on_torch(method: str, backend: str, device: str) -> None:
    def train(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        module = layer(METHODS[method], torch.bfloat16, device)
        generator = torch.Generator(device).manual_seed(3)
        x = torch.randn(256, 512, device=device, generator=generator).bfloat16()
        goal = torch.randn(256, 384, device=device, generator=generator).bfloat16()
        optimizer = torch.optim.SGD(trainable(module).values(), lr=0.5)
        losses = []
        with peftk.use_backend(name):
            for _ in range(10):
                loss = torch.nn.functional.mse_loss(module(x).float(), goal.float())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses, trainable(module)

    expected_losses, expected = train("torch")
    try:
        losses, found = train(backend)
    except RuntimeError as error:
        if "backend: expected one that can run" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise
    assert expected_losses[-1] < expected_losses[0], "it trains"
    assert_close(torch.tensor(losses), torch.tensor(expected_losses).double(), torch.bfloat16, what="losses")
    for name, parameter in found.items():
        assert_close(parameter, expected[name].double(), torch.bfloat16, what=name)
