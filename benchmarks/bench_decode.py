"""Layers on few rows without gradients, as generating a token at a time runs them, beside their peers."""

from __future__ import annotations

import copy
import dataclasses
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

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16 = torch.float32, torch.bfloat16
ROWS = (1, 4, 16)
BUDGET = Budget(seconds=2.0, least=30, most=200, longest=10.0)


def _cells() -> list[Any]:
    return [
        pytest.param(
            Cell(name, method.size_for(features), features, rows, dtype, F32),
            id=f"{name}-{features}-{rows}-{str(dtype)[6:]}",
            marks=[] if features == 1024 and rows == 1 else [pytest.mark.full_run],
        )
        for rows in ROWS
        for features in (512, 1024)
        for dtype in (F32, BF16)
        for name, method in available().items()
    ]


def without_gradients(arm: Arm) -> Arm:
    """Return an arm that runs its forward pass alone and records nothing."""
    if arm.skip:
        return arm
    forward, check = arm.forward, arm.check
    assert forward is not None and check is not None

    def step() -> object:
        with torch.no_grad():
            return forward()

    # What the pass with gradients gives is held to float64; the output of this one is held to that.
    def errors() -> dict[str, float]:
        found = check()
        y, recorded = step(), forward()
        assert isinstance(y, torch.Tensor) and isinstance(recorded, torch.Tensor)
        apart = (y.double() - recorded.double()).norm() / recorded.double().norm()
        return {"output": found["output"] + apart.item()}

    return dataclasses.replace(arm, step=step, check=errors, owned=None, forward=None)


@pytest.fixture(autouse=True)
def one_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every arm make BOFT's layers with one factor: PEFT has no more without its CUDA extension."""
    if "boft" in METHODS:
        monkeypatch.setattr(METHODS["boft"], "stages", 1)


@pytest.mark.parametrize("cell", _cells())
def test_few_rows(cell: Cell, benchmark, budget: Budget) -> None:
    pytest.importorskip("peft")
    bench = Bench(cell, training=False)
    benchmark.group = f"decode {cell}"
    kind = "fp32" if cell.dtype is F32 else "bf16 base"
    info = {
        "suite": "decode",
        "cell": f"{METHODS[cell.method].title}, {cell.features}, {cell.tokens} rows, {kind}",
        "method": cell.method,
        "mode": "no gradients",
        "tokens": cell.tokens,
        "in_features": cell.features,
        "out_features": cell.features,
        "size": cell.size,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "parameters": "float32",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arms = [bench.peftk(), bench.frozen(), bench.hugging_face(), bench.hugging_face(accelerate=True)]
        compare(benchmark, [without_gradients(a) for a in arms], "frozen", info, BUDGET if budget.least > 3 else budget)


PROMPT, NEW = 16, 32
GENERATING = ("lora", "oft-neumann", "boft", "loha", "lokr")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _llama(hidden: int, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 4, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes)).to(dtype).eval()


def _generating(name: str, model: nn.Module, exact: torch.Tensor, note: str) -> Arm:
    """Return an arm that generates `NEW` tokens; the logits of the prompt's last token are held to float64."""
    ids = (torch.arange(PROMPT) * 7 % 1024)[None]
    mask = torch.ones_like(ids)

    def step() -> object:
        return model.generate(
            input_ids=ids, attention_mask=mask, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )

    def check() -> dict[str, float]:
        with torch.no_grad():
            return truth.errors({"logits": model(input_ids=ids).logits[:, -1]}, {"logits": exact})

    # Several layers one after the other, each with the error of one.
    limit = 10 * LIMITS[next(model.parameters()).dtype]
    return Arm(name, step, check, limit, note=note)


@pytest.mark.full_run
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("hidden", [512, 1024])
@pytest.mark.parametrize("method", [name for name in available() if name in GENERATING])
def test_generate(method: str, hidden: int, dtype: torch.dtype, benchmark, budget: Budget) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    how = METHODS[method]
    cell = Cell(method, how.size_for(hidden), hidden, 1, dtype, F32)
    benchmark.group = f"generate {cell}"
    base = _llama(hidden, dtype)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        how.prepare_peft(peft)
        config = how.make_config(peft, cell, target_modules=PROJECTIONS)
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        # A fresh adapter changes nothing, and what changes nothing is not computed.
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        fast = copy.deepcopy(theirs)
        peftk.accelerate(fast)
        own = peftk.get_peft_model(copy.deepcopy(base), how.make_config(peftk, cell, target_modules=PROJECTIONS)).eval()
        own.load_state_dict(theirs.state_dict())
        ids = (torch.arange(PROMPT) * 7 % 1024)[None]
        exact = copy.deepcopy(own).double()(input_ids=ids).logits[:, -1]
        plain = copy.deepcopy(base).double()(input_ids=ids).logits[:, -1]
        info = {
            "suite": "decode",
            "cell": f"{how.title}, generate, {hidden}, {'fp32' if dtype is F32 else 'bf16 base'}",
            "method": method,
            "mode": f"generate {NEW} tokens",
            "tokens": NEW,
            "in_features": hidden,
            "out_features": hidden,
            "size": cell.size,
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": "float32",
        }
        arms = [
            _generating("peftk", own, exact, "peftk's own layers"),
            _generating("frozen", base, plain, "the model without adapters"),
            _generating("hf", theirs, exact, f"PEFT {peft.__version__}"),
            _generating("accelerated", fast, exact, f"PEFT {peft.__version__} under peftk.accelerate"),
        ]
        compare(benchmark, arms, "frozen", info, BUDGET if budget.least > 3 else budget)
