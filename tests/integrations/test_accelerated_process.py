"""`peftk.accelerate("peft")`: every layer of the process, those made later too, until it is undone."""

from __future__ import annotations

import pytest
import torch
from support.peft_layers import LINEAR, METHODS, adapted, error, inputs, step

import peftk
from peftk.integrations import exchange
from peftk.integrations.hf_peft import library

LIMIT = 1e-5


def test_the_process_and_layers_made_later() -> None:
    before = {cls: dict(cls.__dict__) for _, cls in library.classes()}
    report = peftk.accelerate("peft")
    try:
        assert report.accelerated == len(report) >= 12
        again = peftk.accelerate("peft")
        for method in METHODS:
            model = adapted(method, 1)
            assert all(type(m) is exchange.original_class(m) for m in model.modules())
            args = inputs()
            got = step(model, args)
            # Per model on top of it, and undone: the process stays accelerated.
            peftk.accelerate(model).restore()
            report.restore()
            expected = step(model, args)
            assert error(got[0], expected[0]) < LIMIT and got[2] == expected[2]
            report = peftk.accelerate("peft")
    finally:
        assert report.restore() == len(report)
    assert again.restore() == 0
    assert {cls: dict(cls.__dict__) for cls in before} == before


def test_the_process_runs_this_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftk.integrations.hf_peft import loha

    ran = []
    run = loha.Linear.run
    monkeypatch.setattr(loha.Linear, "run", lambda self, *args: ran.append(1) or run(self, *args))
    report = peftk.accelerate("peft")
    try:
        model = adapted("loha", 0, target_modules=LINEAR)
        model(*inputs())
    finally:
        report.restore()
    assert ran == [1, 1]
    model(*inputs())
    assert ran == [1, 1]


def test_what_was_kept_of_the_process_goes_peft_s_way_afterwards() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, args = adapted("loha", 0, target_modules=LINEAR, rank_dropout=0.0, module_dropout=0.0).eval(), inputs()
    expected = model(*args)
    report = peftk.accelerate("peft")
    # It keeps the method that it finds.
    accelerate.hooks.add_hook_to_module(model.base_model.model.first, accelerate.hooks.ModelHook())
    got = model(*args)
    report.restore()
    assert error(got, expected) < LIMIT and not torch.equal(got, expected)
    assert torch.equal(model(*args), expected)
