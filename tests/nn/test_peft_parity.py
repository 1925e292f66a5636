"""The same adapters in peftk and in Hugging Face PEFT: names, values, outputs, gradients and files, both ways."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.parity_cases import CASES, CNN, MLP, SMALL, TOKENS, build, run, theirs_of, train
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peftk.models.peft_model import PeftModel, get_peft_model
from peftk.nn import LAYERS, LoraConfig, OFTConfig
from peftk.testing.compare import assert_close


@pytest.mark.parametrize(
    "kind", sorted({layer.config_class for layer in LAYERS if hasattr(peft, layer.config_class.__name__)}, key=str)
)
def test_every_method_is_compared(kind):
    """A method whose `parity_cases/<method>.py` is missing, or empty, is compared with nothing."""
    compared = [case for case, (_, config, _) in CASES.items() if config is kind]
    assert compared, f"{kind.__name__}: no case in tests/support/parity_cases"


@pytest.mark.parametrize("case", CASES)
def test_names_values_and_trainability_are_those_of_peft(case):
    _, ours, theirs = build(case)
    mine = [(n, tuple(p.shape), p.requires_grad) for n, p in ours.named_parameters()]
    assert mine == [(n, tuple(p.shape), p.requires_grad) for n, p in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if "magnitude" in name:
            # Norms: the sums are added in another order.
            assert_close(p, q.double(), torch.float32, what=name)
        else:
            assert torch.equal(p, q), name
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_files_agree_after_training(case, tmp_path):
    base, ours, theirs = build(case)
    grads, reference = train(case, ours), train(case, theirs)
    assert set(grads) == set(reference)
    for name, grad in grads.items():
        assert_close(grad, reference[name].double(), torch.float32, what=name)
    y, z = run(case, ours), run(case, theirs)
    assert_close(y, z.double(), torch.float32)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from_theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
        from_ours = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    for loaded, source in ((from_theirs, theirs), (from_ours, ours)):
        source.eval()
        assert_close(run(case, loaded), run(case, source).double(), torch.float32)
        for (name, p), (_, q) in zip(loaded.named_parameters(), source.named_parameters(), strict=True):
            assert torch.equal(p, q), name
    assert not any(p.requires_grad for p in from_theirs.parameters())
    assert not from_theirs.training
    if ours.active_peft_config.is_adaption_prompt:
        return
    merged = from_theirs.merge_and_unload()
    assert_close(run(case, merged), z.double(), torch.float32)


@pytest.mark.parametrize("config", [LoraConfig(r=2), OFTConfig(oft_block_size=4)], ids=["lora", "oft"])
def test_half_precision_parameters_are_those_of_peft(config):
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SMALL)).to(torch.bfloat16)
    made = []
    for build_model, cls in ((get_peft_model, type(config)), (peft.get_peft_model, theirs_of(type(config)))):
        torch.manual_seed(1)
        values = {"r": config.r} if cls.__name__ == "LoraConfig" else {"oft_block_size": 4}
        model = build_model(copy.deepcopy(base), cls(**values))
        made.append([(n, p.dtype, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()])
    for mine, theirs in zip(*made, strict=True):
        assert mine[:3] == theirs[:3]
        assert torch.equal(mine[3], theirs[3])


def test_several_adapters_are_saved_in_the_folders_of_peft(tmp_path):
    torch.manual_seed(0)
    base = MLP()
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    ours.add_adapter("other", LoraConfig(r=3, target_modules=["second"], init_lora_weights=False))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    theirs.load_adapter(str(tmp_path / "other"), "other")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    x = torch.randn(3, 12)
    for name in ("default", "other"):
        for model in (ours, theirs, again):
            model.set_adapter(name)
        assert_close(ours(x), theirs(x).double(), torch.float32)
        assert torch.equal(ours(x), again(x))
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_a_file_of_peft_with_the_output_embedding_loads(tmp_path):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMALL))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    nn.init.normal_(theirs.base_model.model.lm_head.lora_B["default"].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path))
    assert any("lm_head.base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(ours(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits.double(), torch.float32)


def test_printed_line_is_that_of_peft(capsys):
    _, ours, theirs = build("classification")
    ours.print_trainable_parameters()
    mine = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert mine == capsys.readouterr().out


def test_generation_goes_through_the_adapter():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMALL))
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        tokens = ours.eval().generate(input_ids=TOKENS, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert torch.equal(
            tokens[:, :-1], ours.generate(input_ids=TOKENS, max_new_tokens=1, do_sample=False, pad_token_id=0)
        )
    assert tokens.shape == (2, 8)


# Where PEFT 0.21 is wrong and peftk is not: each test shows both, so that it fails if PEFT is ever put right.


def pair_of_oft(**values):
    torch.manual_seed(0)
    base = MLP()
    values = {"oft_block_size": 4, "target_modules": ["first"], "init_weights": False} | values
    models = (
        get_peft_model(copy.deepcopy(base), OFTConfig(**values)),
        peft.get_peft_model(base, peft.OFTConfig(**values)),
    )
    models[0].load_state_dict(models[1].state_dict())
    return [model.eval() for model in models]


def test_d3_a_rotated_convolution_computes_what_it_merges_to():
    torch.manual_seed(0)
    base = CNN()
    x = torch.linspace(-1, 1, 90).reshape(1, 3, 5, 6)
    values = {"oft_block_size": 3, "target_modules": ["first"]}
    ours = get_peft_model(copy.deepcopy(base), OFTConfig(**values))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.OFTConfig(**values))
    assert torch.equal(ours(x), base(x))
    with pytest.raises(AssertionError):
        assert_close(theirs(x), base(x).double(), torch.float32)
    with torch.no_grad():
        nn.init.normal_(theirs.base_model.model.first.oft_R["default"].weight, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    y = ours(x)
    theirs.merge_adapter()
    assert_close(y, theirs(x).double(), torch.float32)
    ours.merge_adapter()
    assert_close(ours(x), y.double(), torch.float32)


def test_d4_peft_never_applies_module_dropout():
    x = torch.randn(4, 12)
    for model, applied in zip(pair_of_oft(module_dropout=0.5), (True, False), strict=True):
        resting = model(x)
        assert torch.equal(model.train()(x), resting) is not applied


def test_d5_the_two_cayley_forms_are_transposes_and_both_are_kept():
    small = {"init_weights": True}
    exact, series = pair_of_oft(use_cayley_neumann=False, **small), pair_of_oft(num_cayley_neumann_terms=30, **small)
    for models in (exact, series):
        for model in models:
            with torch.no_grad():
                model.get_base_model().first.oft_R["default"].weight.copy_(torch.linspace(-0.2, 0.2, 18).view(3, 6))
    x = torch.randn(4, 12)
    for models in (exact, series):
        assert_close(models[0](x), models[1](x).double(), torch.float32)
    rotations = [models[0].get_base_model().first.get_delta_weight("default") for models in (exact, series)]
    assert_close(rotations[0], rotations[1].T.double(), torch.float32)


def test_d6_several_rotations_merge_to_what_the_forward_computes():
    ours, theirs = pair_of_oft()
    x = torch.randn(4, 12)
    for model, cls in ((ours, OFTConfig), (theirs, peft.OFTConfig)):
        model.add_adapter("b", cls(oft_block_size=4, target_modules=["first"], init_weights=False))
        model.base_model.set_adapter(["default", "b"])
    ours.load_state_dict(theirs.state_dict())
    y, z = ours(x), theirs(x)
    assert_close(y, z.double(), torch.float32)
    ours.merge_adapter()
    theirs.merge_adapter()
    assert_close(ours(x), y.double(), torch.float32)
    with pytest.raises(AssertionError):
        assert_close(theirs(x), z.double(), torch.float32)


def test_d10_frozen_adapters_stay_frozen():
    for config in (LoraConfig(r=2, inference_mode=True), OFTConfig(oft_block_size=4, inference_mode=True)):
        model = get_peft_model(BertModel(BertConfig(**SMALL)).to(torch.bfloat16), config)
        with model.disable_adapter():
            pass
        assert not any(p.requires_grad for p in model.parameters())


def test_peft_adapters_are_bypassed_by_the_fused_encoder_layer_of_torch():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    values = {"r": 2, "target_modules": ["linear1"], "init_lora_weights": False}
    ours = get_peft_model(copy.deepcopy(encoder), LoraConfig(**values)).eval()
    theirs = peft.get_peft_model(copy.deepcopy(encoder), peft.LoraConfig(**values)).eval()
    with torch.no_grad():
        assert torch.equal(theirs(x), encoder(x))
        assert not torch.equal(ours(x), encoder(x))
