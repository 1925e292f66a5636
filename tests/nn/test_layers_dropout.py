"""Dropout of every method's own kind on every layer: drawn from the seed, replayed, and not kept for backward."""

from __future__ import annotations

import pytest
import torch
from support.dropping import DROPPED, batch, dropping
from support.layer_cases import CASES, example, reference
from torch.utils.checkpoint import checkpoint

from peftk.ops import _seed
from peftk.testing.compare import assert_close, assert_same_bits
from peftk.testing.memory import saved_bytes


@pytest.mark.parametrize(("name", "field"), DROPPED)
def test_dropout_follows_the_seed_in_training_alone(name, field):
    layer, x = dropping(name, **{field: 0.5}), batch(name)
    outputs = []
    for seed in range(5):
        torch.manual_seed(seed)
        outputs.append(layer(x))
        torch.manual_seed(seed)
        assert_same_bits(layer(x), outputs[-1])
    assert any(not torch.equal(outputs[0], y) for y in outputs)
    for shape in CASES[name].shapes():
        y = layer(example(CASES[name], shape).requires_grad_())
        y.sum().backward()
        assert y.shape == layer.base_layer(example(CASES[name], shape)).shape
    layer.eval()
    assert_close(layer(x), reference(layer, x), torch.float32)


@pytest.mark.parametrize(("name", "field"), DROPPED)
def test_checkpointing_replays_dropout(name, field):
    layer, x = dropping(name, **{field: 0.5}), batch(name).requires_grad_()
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    results = []
    for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        results.append(torch.autograd.grad(run().square().sum(), trained))
    for left, right in zip(*results, strict=True):
        assert_same_bits(left, right)


@pytest.mark.parametrize(("name", "field"), DROPPED)
def test_gradients_are_those_of_the_mask_of_the_forward_pass(name, field):
    """The gradient in a direction is the slope of the output there, with the same elements dropped."""
    layer, x = dropping(name, **{field: 0.5}).double(), batch(name).double().requires_grad_()
    layer(x)  # COFT projects its parameters when it is first used
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in trained]

    def run():
        torch.manual_seed(3)
        return layer(x).square().sum()

    grads = torch.autograd.grad(run(), trained)
    # Not DoRA's norms nor COFT's ball, which the gradient takes for constants: of those, x alone.
    constant = getattr(CASES[name].config, "use_dora", False) or getattr(CASES[name].config, "coft", False)
    moved = list(zip(trained, steps, grads, strict=True))[: 1 if constant else None]
    found = sum((g * step).sum() for _, step, g in moved)
    values = []
    with torch.no_grad():
        for size in (1e-5, -2e-5):
            for p, step, _ in moved:
                p += size * step
            values.append(run())
    slope = (values[0] - values[1]) / 2e-5
    assert abs(found - slope) <= 1e-4 * abs(slope) + 1e-6


@pytest.mark.parametrize(("name", "field"), DROPPED)
def test_neither_a_mask_nor_what_it_leaves_is_kept(name, field):
    x = batch(name, 16).requires_grad_()
    kept = []
    for p in (0.0, 0.5):
        layer = dropping(name, **{field: p})
        kept.append(saved_bytes(lambda layer=layer: layer(x), [x, *layer.parameters()]))
    # A mask of single bytes would be larger.
    parameters = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert kept[1] - kept[0] < x.numel() // 2 + 4 * parameters


@pytest.mark.parametrize("name, field", DROPPED, ids=str)
def test_no_dropout_is_drawn_into_a_cuda_graph(name, field, monkeypatch):
    # The device is asked in one place, which is what can be replaced without a GPU.
    def refuse(device):
        raise RuntimeError("a graph is captured")

    layer = dropping(name, **{field: 0.5})
    monkeypatch.setattr(_seed, "refuse_capture", refuse)
    with pytest.raises(RuntimeError, match="a graph is captured"):
        layer(batch(name))
    layer.eval()(batch(name))


def test_a_captured_graph_would_keep_the_seed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="dropout: expected a probability of 0 while a CUDA graph is captured"):
        _seed.draw_seed(torch.device("cuda", 0))
    assert _seed.draw_seed(torch.device("cpu")).dtype is torch.int64
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _seed.draw_seed(torch.device("cuda", 0)).device.type == "cpu"
