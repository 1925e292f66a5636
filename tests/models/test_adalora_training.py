"""AdaLoRA in transformers.Trainer and over interruptions: pruned as in a loop of one's own, to the last bit."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from support.bert_trainer import Rows, arguments, bert, trained
from transformers import Trainer

from peftk import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peftk.integrations.hf_trainer import AllocateCallback
from peftk.models.trainer import AdapterTrainerMixin

STEPS = 12
CONFIG = AdaLoraConfig(
    task_type="SEQ_CLS", init_r=4, target_r=2, tinit=1, tfinal=4, deltaT=2, total_step=STEPS, target_modules=["query"]
)


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """The trainer of the documentation."""


def adapted(config=CONFIG):
    return get_peft_model(bert(), copy.deepcopy(config))


def options(folder, **changes):
    values = {"max_steps": STEPS, "seed": 3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    return arguments(folder, **(values | changes))


def by_hand(folder):
    """Train as the Trainer does, and prune by hand."""

    class Loop(Trainer):
        def create_optimizer(self, *args):
            made = super().create_optimizer(*args)
            made.register_step_post_hook(lambda *_: self.model.update_and_allocate(self.state.global_step))
            return made

    trainer = Loop(adapted(), options(folder), train_dataset=Rows())
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("kind", ["mixin", "callback", "both"])
def test_a_trainer_prunes_as_a_loop_does(kind, tmp_path):
    expected = by_hand(tmp_path)
    pattern = expected.peft_config["default"].rank_pattern
    assert pattern is not None and not all(all(kept) for kept in pattern.values())
    given = [] if kind == "mixin" else [AllocateCallback()]
    trainer = (Trainer if kind == "callback" else AdapterTrainer)(
        adapted(), options(tmp_path), train_dataset=Rows(), callbacks=given
    )
    trainer.train()
    assert trainer.model.peft_config["default"].rank_pattern == pattern
    want = trained(expected)
    assert all(torch.equal(p, want[name]) for name, p in trained(trainer.model).items())


# Before, between and after the steps that prune; 8 is the last of these.
@pytest.mark.parametrize("step", [2, 5, 8, 10])
def test_training_goes_on_as_if_it_had_not_been_interrupted(step, tmp_path):
    whole = AdapterTrainer(adapted(), options(tmp_path, save_strategy="steps", save_steps=step), train_dataset=Rows())
    whole.train()
    resumed = AdapterTrainer(adapted(), options(tmp_path / "resumed"), train_dataset=Rows())
    with torch.no_grad():
        for parameter in trained(resumed.model).values():
            parameter.fill_(1)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    want = trained(whole.model)
    assert all(torch.equal(p, want[name]) for name, p in trained(resumed.model).items())
    patterns = [trainer.model.peft_config["default"].rank_pattern for trainer in (whole, resumed)]
    assert patterns[0] == patterns[1]


def test_a_pruned_file_loads_over_all_triplets(tmp_path):
    model = by_hand(tmp_path)
    model.eval().save_pretrained(tmp_path / "pruned")
    ids = torch.arange(6)[None]
    expected = model(input_ids=ids).logits
    other = adapted()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_E" in name:
                parameter.fill_(1)
    shapes = {name: p.shape for name, p in other.named_parameters()}
    other.load_adapter(tmp_path / "pruned", "default", is_trainable=True)
    assert {name: p.shape for name, p in other.named_parameters()} == shapes
    assert torch.equal(other.eval()(input_ids=ids).logits, expected)
    # It is as small as before when it is saved again.
    other.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(bert(), tmp_path / "again")
    small = PeftModel.from_pretrained(bert(), tmp_path / "pruned")
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert torch.equal(again(input_ids=ids).logits, small(input_ids=ids).logits)


def test_the_state_of_another_adapter_is_refused(tmp_path):
    model = by_hand(tmp_path)
    allocator = model.base_model.rankallocator
    state, before = allocator.state_dict(), trained(model)
    other = adapted(AdaLoraConfig(**{**CONFIG.to_dict(), "init_r": 3, "auto_mapping": None}))
    for wrong in (other.base_model.rankallocator.state_dict(), {}, {**state, "averages": {"lora_A": [(1, 2)]}}):
        with pytest.raises(ValueError, match=r"state: expected what state_dict\(\) has returned for adapter 'default'"):
            allocator.load_state_dict(wrong)
        assert all(torch.equal(p, before[name]) for name, p in trained(model).items())


def test_training_that_ends_before_the_schedule_is_told(tmp_path):
    trainer = AdapterTrainer(adapted(), options(tmp_path, max_steps=STEPS - 2), train_dataset=Rows())
    with pytest.warns(UserWarning, match=f"total_step: .* over {STEPS} steps, and training ends after {STEPS - 2}"):
        trainer.train()
    trainer = AdapterTrainer(adapted(), options(tmp_path), train_dataset=Rows())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="total_step")
        trainer.train()


def test_a_step_that_is_skipped_counts_for_nothing():
    """Where a gradient scaler finds infinities, they must not get into the averages."""
    model, state = adapted(), SimpleNamespace(global_step=2)
    model(input_ids=torch.arange(6)[None], labels=torch.tensor([1])).loss.backward()
    callback, allocator = AllocateCallback(), model.base_model.rankallocator
    callback.on_optimizer_step(None, state, None, model=model, optimizer=SimpleNamespace(step_was_skipped=True))
    assert not allocator.state_dict()["averages"]
    callback.on_optimizer_step(None, state, None, model=model, optimizer=SimpleNamespace(step_was_skipped=False))
    assert allocator.state_dict()["averages"]
    # Other models are left alone.
    callback.on_optimizer_step(None, state, None, model=bert())
    callback.on_train_begin(None, state, None, model=get_peft_model(bert(), LoraConfig(target_modules=["query"])))
