"""`peftk.accelerate` on PEFT's adapters of experts: its values and gradients, and no update of a stack's size."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.experts import EXPERTS, IDS, filled, loss_and_gradients, made, stacks_built
from torch import nn

import peftk
from peftk.testing.compare import assert_close


def adapted(kind: str, parameters: list[str]) -> nn.Module:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=parameters)
    return filled(peft.get_peft_model(made(kind), config))


@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1]])
def test_values_and_gradients_are_those_of_peft(kind: str, parameters: list[str]) -> None:
    plain = adapted(kind, parameters)
    fast = copy.deepcopy(plain)
    report = peftk.accelerate(fast)
    rows = [row for row in report if row.kind == "lora.ParamWrapper"]
    assert len(rows) == 2 * len(parameters)
    assert all(row.operator == "grouped_low_rank_linear" for row in rows), str(report)
    expected, expected_grads = loss_and_gradients(plain)
    assert stacks_built(plain)
    assert not stacks_built(fast)
    found, grads = loss_and_gradients(fast)
    assert_close(found, expected, torch.float64)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], torch.float64, what=name)
    report.restore()
    assert stacks_built(fast)


def test_what_is_not_taken_runs_in_peft() -> None:
    plain = adapted("qwen3", EXPERTS)
    fast = copy.deepcopy(plain)
    report = peftk.accelerate(fast)
    for change in ("disable", "merge", "hook"):
        for model in (plain, fast):
            inner = model.base_model.model.model.layers[0].mlp.experts
            if change == "disable":
                model.base_model.disable_adapter_layers()
            elif change == "merge":
                model.base_model.enable_adapter_layers()
                model.merge_adapter()
            else:
                model.unmerge_adapter()
                inner.get_base_layer().register_forward_hook(lambda module, args, output: output * 2)
        assert_close(fast(input_ids=IDS).logits, plain(input_ids=IDS).logits, torch.float64, what=change)
    report.restore()


def test_parameters_of_other_modules_are_left_to_peft() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=["0.weight"]))
    (row,) = peftk.accelerate(model)
    assert not row.accelerated
    assert "only the experts of transformers" in str(row.reason)
