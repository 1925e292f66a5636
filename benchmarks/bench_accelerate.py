"""PEFT's layers and models under `peftk.accelerate`, beside the same as PEFT has them, and peftk's own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import peftk
from benchmarks.arms import Arm, Budget, compare
from benchmarks.methods import METHODS, Cell, available
from benchmarks.peers import Bench
from peftk.testing.compare import LIMITS

from . import truth

F32, BF16 = torch.float32, torch.bfloat16
TOKENS, HIDDEN, LAYERS = 512, 1024, 4
# A step takes a second and more.
FEW = Budget(seconds=30.0, least=15, most=30, slow=2.0, least_slow=5, longest=80.0)


@pytest.fixture(autouse=True)
def one_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every arm make BOFT's layers with one factor: PEFT has no more without its CUDA extension."""
    if "boft" in METHODS:
        monkeypatch.setattr(METHODS["boft"], "stages", 1)


def _cells() -> list[Any]:
    return [
        pytest.param(Cell(name, method.size_for(HIDDEN), HIDDEN, TOKENS, base, F32), id=f"{name}-{str(base)[6:]}")
        for base in (F32, BF16)
        for name, method in available().items()
    ]


def _info(cell: Cell, name: str, mode: str) -> dict[str, Any]:
    return {
        "suite": "accelerate",
        "cell": name,
        "method": cell.method,
        "mode": mode,
        "tokens": cell.tokens,
        "in_features": cell.features,
        "out_features": cell.features,
        "size": cell.size,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "parameters": str(cell.parameters).removeprefix("torch."),
    }


def _title(cell: Cell, what: str) -> str:
    return f"{METHODS[cell.method].title}, {what}, {'fp32' if cell.dtype is F32 else 'bf16 base'}"


@pytest.mark.parametrize("cell", _cells())
def test_layer(cell: Cell, benchmark, budget: Budget) -> None:
    pytest.importorskip("peft")
    bench = Bench(cell)
    benchmark.group = f"accelerate layer {cell}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arms = [bench.hugging_face(accelerate=True), bench.hugging_face(), bench.peftk()]
        compare(benchmark, arms, "hf", _info(cell, _title(cell, "layer"), "forward+backward"), budget)


def _llama(dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


class Step:
    """A training step of a model, without the optimizer.

    Args:
        name: The arm.
        model: The model.
        reference: The gradients that are expected; None for the arm that gives them.
        note: What a reader should know.
    """

    def __init__(self, name: str, model: nn.Module, reference: dict[str, torch.Tensor] | None, note: str) -> None:
        self.model, self.reference = model.train(), reference
        self.ids = (torch.arange(TOKENS) * 7 % 256)[None]
        self.trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
        limit = 10 * max(LIMITS[next(model.parameters()).dtype], LIMITS[F32])
        self.arm = Arm(name, self.step, self.check, limit, lambda: list(model.parameters()), note)

    def step(self) -> torch.Tensor:
        """Run forward and backward."""
        for p in self.trained.values():
            p.grad = None
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        return loss

    def check(self) -> dict[str, float]:
        """Return how far the loss is from that of the first arm, relative to it."""
        loss = self.step().detach()
        if self.reference is None:
            return {"loss": 0.0}
        return truth.errors({"loss": loss}, {"loss": self.reference["loss"]})


@pytest.mark.full_run
@pytest.mark.parametrize("cell", _cells())
def test_step(cell: Cell, benchmark, budget: Budget) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    method = METHODS[cell.method]
    benchmark.group = f"accelerate step {cell}"
    base = _llama(cell.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method.prepare_peft(peft)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        if cell.method == "c3a":
            # Of blocks that divide 1024 and 2816.
            targets = targets[:4]
        theirs = peft.get_peft_model(copy.deepcopy(base), method.make_config(peft, cell, target_modules=targets))
        fast = copy.deepcopy(theirs)
        peftk.accelerate(fast)
        own = peftk.get_peft_model(base, method.make_config(peftk, cell, target_modules=targets))
        expected = {"loss": Step("hf", theirs, None, "").step().detach().double()}
        arms = [
            Step("accelerated", fast, expected, f"PEFT {peft.__version__} under peftk.accelerate").arm,
            Step("hf", theirs, None, f"PEFT {peft.__version__}, eager").arm,
            Step("peftk", own, expected, "peftk's own layers").arm,
        ]
        compare(benchmark, arms, "hf", _info(cell, _title(cell, "step"), "step"), FEW if budget.least > 3 else budget)
