"""A PeftModel in transformers.Trainer: its columns, its losses, its checkpoints; and the class made for this."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from pathlib import Path

import pytest
import torch
from support.bert_trainer import Rows, arguments, bert, trained
from support.toy_model import Toy, X, lora, oft, toy, trainable
from torch import nn
from transformers import BertForQuestionAnswering, GPT2Config, GPT2LMHeadModel, Trainer
from transformers.utils.generic import find_labels

from peftk.models.peft_model import PeftModel, get_peft_model
from peftk.models.trainer import AdapterTrainerMixin
from peftk.testing.compare import assert_close

FILES = {"adapter_model.safetensors", "adapter_config.json"}


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """The trainer of the documentation."""


class Collator:
    """Puts rows together, and has a tokenizer that knows how to save itself."""

    def __init__(self):
        self.tokenizer = self

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")

    def __call__(self, rows):
        return torch.utils.data.default_collate(rows)


def test_the_tokenizer_of_a_collator_is_saved_too(tmp_path):
    model = get_peft_model(bert(), lora(task_type="SEQ_CLS"))
    trainer = AdapterTrainer(model, arguments(tmp_path), train_dataset=Rows(), data_collator=Collator())
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", [Trainer, AdapterTrainer])
@pytest.mark.parametrize(
    "config", [lora(task_type="SEQ_CLS", lora_dropout=0.1), oft(task_type="SEQ_CLS")], ids=["lora", "oft"]
)
def test_trains_and_evaluates(kind, config, tmp_path):
    model = get_peft_model(bert(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = kind(model, arguments(tmp_path, logging_steps=1), train_dataset=Rows(), eval_dataset=Rows())
    assert trainer.label_names == ["labels"]
    start = trainer.evaluate()["eval_loss"]
    result = trainer.train()
    assert result.global_step == 8
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert all(map(math.isfinite, losses))
    assert trainer.evaluate()["eval_loss"] < start
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(model)
    assert any("modules_to_save" in name for name in moved)


def test_the_mixin_keeps_adapters_and_resumes_bit_by_bit(tmp_path):
    config = lora(task_type="SEQ_CLS")
    whole = AdapterTrainer(
        get_peft_model(bert(), config), arguments(tmp_path, save_strategy="steps", save_steps=4), train_dataset=Rows()
    )
    whole.train()
    middle = tmp_path / "checkpoint-4"
    assert {p.name for p in middle.iterdir()} >= FILES | {"optimizer.pt", "training_args.bin"}
    assert not (middle / "model.safetensors").exists()
    model = get_peft_model(bert(), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(1)
    resumed = AdapterTrainer(model, arguments(tmp_path / "resumed"), train_dataset=Rows())
    resumed.train(resume_from_checkpoint=str(middle))
    expected = trained(whole.model)
    assert all(torch.equal(p, expected[name]) for name, p in trained(model).items())
    resumed.save_model(tmp_path / "final")
    assert {p.name for p in (tmp_path / "final").iterdir()} == FILES | {"training_args.bin", "README.md"}
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "final")
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_mixin_returns_to_the_best_adapter(tmp_path):
    model = get_peft_model(bert(), lora(task_type="SEQ_CLS"), "main")
    trainer = AdapterTrainer(
        model,
        # So fast that it gets worse.
        arguments(
            tmp_path,
            max_steps=6,
            learning_rate=10.0,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=2,
            eval_steps=2,
            load_best_model_at_end=True,
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(),
    )
    trainer.train()
    best = PeftModel.from_pretrained(bert(), f"{trainer.state.best_model_checkpoint}/main", "main", is_trainable=True)
    expected = trained(best)
    assert trained(model).keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in trained(model).items())


def test_the_mixin_leaves_other_models_alone(tmp_path):
    trainer = AdapterTrainer(bert(), arguments(tmp_path, max_steps=1), train_dataset=Rows())
    trainer.train()
    trainer.save_model(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_a_plain_trainer_saves_the_whole_model_and_the_model_its_adapter(tmp_path):
    model = get_peft_model(bert(), lora(task_type="SEQ_CLS"))
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=Rows())
    trainer.train()
    trainer.save_model(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "adapter", is_trainable=True)
    assert all(torch.equal(p, trained(model)[name]) for name, p in trained(loaded).items())


def test_tied_weights_and_smoothed_labels_of_a_language_model(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=40, n_positions=8))
    # Its layers are Conv1D, so one nn.Linear is put beside them.
    base.transformer.h[0].mlp = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(base, lora(target_modules=["mlp.0"]))
    rows = [{"input_ids": list(range(i, i + 6)), "labels": list(range(i, i + 6))} for i in range(8)]
    trainer = AdapterTrainer(
        model, arguments(tmp_path, max_steps=1, label_smoothing_factor=0.1, save_strategy="steps"), train_dataset=rows
    )
    trainer.train()
    assert {p.name for p in (tmp_path / "checkpoint-1").iterdir()} >= FILES
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"]).logits[:, :-1].double()
        smoothed = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
        )
        assert_close(trainer.compute_loss(model, batch), smoothed, torch.float32)


def test_the_signature_is_that_of_the_base_model():
    model = get_peft_model(bert(), lora())
    assert inspect.signature(model.forward) == inspect.signature(model.get_base_model().forward)
    assert find_labels(type(model)) == ["labels"]
    model = get_peft_model(bert(BertForQuestionAnswering), lora())
    assert find_labels(type(model)) == ["start_positions", "end_positions"]
    assert list(inspect.signature(PeftModel.forward).parameters) == ["self", "args", "kwargs"]


class Mine(PeftModel):
    """A subclass with an open forward."""

    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


class Closed(PeftModel):
    """A subclass that says itself what it takes."""

    def forward(self, x):
        return super().forward(x)


def test_the_class_is_made_once_for_each_base_and_survives_copies():
    model = get_peft_model(toy(), lora())
    assert type(model) is type(get_peft_model(toy(), oft()))
    assert type(model).__name__ == "PeftModel[Toy]"
    assert repr(model).startswith("PeftModel(\n  (base_model): LoraModel(")
    for kind, factor in ((PeftModel, 1), (Mine, 2), (Closed, 1)):
        mine = kind(toy(), lora())
        mine.load_state_dict(model.state_dict())
        assert list(inspect.signature(mine.forward).parameters) == ["x"]
        for twin in (mine, copy.copy(mine), copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert isinstance(twin, kind)
            assert type(twin) is type(mine)
            assert torch.equal(twin(X), factor * model(X))
    assert type(mine) is Closed
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.weight.zero_()
    assert not torch.equal(other(X), model(X))
    assert type(model.unload()) is Toy


def test_a_class_made_for_a_base_compiles_and_exports():
    model = get_peft_model(toy(), lora()).eval()
    expected = model(X)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(X), expected.double(), torch.float32)
    assert_close(compiled(x=X), expected.double(), torch.float32)
    with torch.no_grad():
        exported = torch.export.export(model, (X,)).module()
        assert_close(exported(X), expected.double(), torch.float32)


def test_trainers_of_trl_are_refused_by_name(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    reader = transformers.ByT5Tokenizer()
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    data = datasets.Dataset.from_dict({"text": ["one", "two"]})

    def trainer(model, **kwargs):
        sft = trl.SFTConfig(output_dir=str(tmp_path), **options)
        return trl.SFTTrainer(model, args=sft, train_dataset=data, processing_class=reader, **kwargs)

    def gpt():
        return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=len(reader), n_positions=16))

    config = lora(target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = get_peft_model(gpt(), config)
    with pytest.raises(TypeError, match=r"trainers of TRL .* got one of peftk; .* peftk\.accelerate\(model\)"):
        trainer(model)
    with pytest.raises(TypeError, match=r"peft_config.* must be a .peft\.PeftConfig. instance"):
        trainer(gpt(), peft_config=config)
    # Anybody else may replace it.
    model.forward = lambda *args, **kwargs: 1
    assert model(input_ids=torch.zeros(1, 1)) == 1
