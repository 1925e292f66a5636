"""Files that hold adapters of text encoders: several of one class, and names that transformers has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftk
from peftk.checkpoint.container import CheckpointError
from peftk.models.adapter_source import model_weights, read_source
from peftk.models.convert import convert
from peftk.models.convert_plan import plan_for
from peftk.testing.compare import assert_close

QUERY = "encoder.layers.0.self_attn.q_proj"
INPUTS = torch.tensor([[1, 4, 7, 2]])


def clip(hidden: int, *, layers: int = 1, projected: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def lora(name: str, hidden: int, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_down.weight": torch.randn(2, hidden, generator=generator),
        f"{name}.lora_up.weight": torch.randn(hidden, 2, generator=generator),
        f"{name}.alpha": torch.tensor(3.0),
    }


def of_pipeline() -> dict[str, Tensor]:
    """As kohya's scripts write an adapter of SDXL and both its text encoders; and one of T5, as of Flux and SD3."""
    query = "text_model_" + QUERY.replace(".", "_")
    return {
        **lora(f"lora_te1_{query}", 16),
        **lora(f"lora_te2_{query}", 24),
        **lora(f"lora_te2_{query}".replace("layers_0", "layers_1"), 24),
        **lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 16),
        **lora("lora_unet_mid_block_attentions_0_proj_in", 8),
    }


def query_of(model: nn.Module) -> nn.Module:
    return next(module for path, module in model.named_modules() if path.endswith((QUERY, "SelfAttention.q")))


@pytest.mark.parametrize(
    ("model", "prefix"),
    [(clip(16), "lora_te1_"), (clip(24, layers=2, projected=True), "lora_te2_"), (t5(), "lora_te3_")],
)
def test_the_encoder_that_fits_is_meant(model: Any, prefix: str, tmp_path: Path) -> None:
    tensors = of_pipeline()
    save_file(tensors, tmp_path / "file.safetensors")
    before = query_of(model).weight.detach().clone()
    others = ["lora_te1_", "lora_te2_", "lora_te3_", "lora_unet_"]
    others.remove(prefix)
    left_out = " and ".join(f"{1 + (one == 'lora_te2_')} that begin with '{one}'" for one in others)
    with pytest.warns(UserWarning, match=left_out):
        adapted = peftk.PeftModel.from_pretrained(model, tmp_path / "file.safetensors")
    key = next(key for key in tensors if key.startswith(prefix)).partition(".")[0]
    expected = before + 1.5 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    assert_close(query_of(adapted.merge_and_unload()).weight, expected.double(), torch.float32)


def test_encoders_of_one_size_have_to_be_told_apart(tmp_path: Path) -> None:
    query = "text_model_" + QUERY.replace(".", "_")
    save_file(lora(f"lora_te1_{query}", 16) | lora(f"lora_te2_{query}", 16, seed=1), tmp_path / "file.safetensors")
    model = clip(16)
    with pytest.raises(
        CheckpointError, match=r"'lora_te1_' and 'lora_te2_': modules of several models in this .* --component"
    ):
        peftk.PeftModel.from_pretrained(model, tmp_path / "file.safetensors")
    # The way out that it names.
    model.save_pretrained(tmp_path / "base")
    source = read_source(tmp_path / "file.safetensors")
    plan = plan_for(source, "peft", component="text_encoder_2", weights=model_weights(tmp_path / "base"))
    assert [apart for _, apart in convert(source, plan, tmp_path / "second")] == [0.0]
    second = peftk.PeftModel.from_pretrained(model, tmp_path / "second")
    factor = second.state_dict()[f"base_model.model.{QUERY}.lora_A.default.weight"]
    assert torch.equal(factor, lora("x", 16, seed=1)["x.lora_down.weight"])
    # None fits: nothing is left out.
    with pytest.raises(CheckpointError, match="has two adapters in the file"):
        peftk.PeftModel.from_pretrained(clip(32), tmp_path / "file.safetensors")


@pytest.mark.parametrize("prefix", ["lora_te_", "text_encoder."])
def test_names_with_and_without_the_part_that_transformers_dropped(prefix: str, tmp_path: Path) -> None:
    """Its CLIPTextModel has had `text_model.` before the names of its modules, and files still do."""
    outputs = []
    for first in ("text_model.", ""):
        name = f"{first}{QUERY}" if prefix.endswith(".") else f"{first}{QUERY}".replace(".", "_")
        save_file(lora(prefix + name, 16), tmp_path / "file.safetensors")
        for model in (clip(16), clip(16, projected=True)):
            adapted = peftk.PeftModel.from_pretrained(model, tmp_path / "file.safetensors")
            outputs.append(adapted(INPUTS).last_hidden_state)
            assert not torch.equal(outputs[-1], adapted.unload()(INPUTS).last_hidden_state)
    assert all(torch.equal(output, outputs[0]) for output in outputs[2::2])
    assert all(torch.equal(output, outputs[1]) for output in outputs[3::2])


def test_diffusers_gives_an_encoder_what_was_written_for_it(tmp_path: Path) -> None:
    from diffusers.loaders.lora_base import _load_lora_into_text_encoder

    ours, theirs = clip(16), clip(16)
    config = peftk.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    adapted = peftk.get_peft_model(ours, config)
    adapted.save_pretrained(tmp_path / "peft")
    source = read_source(tmp_path / "peft")
    convert(source, plan_for(source, "diffusers", component="text_encoder"), tmp_path / "out.safetensors")
    state = load_file(tmp_path / "out.safetensors")
    alphas = {"text_encoder.r": 2, "text_encoder.lora_alpha": 3}
    alphas |= {"text_encoder.target_modules": [QUERY, QUERY.replace("self_attn.q_proj", "mlp.fc1")]}
    _load_lora_into_text_encoder(
        state, None, theirs, prefix="text_encoder", text_encoder_name="text_encoder", metadata=alphas
    )
    found, expected = (model(INPUTS).last_hidden_state for model in (theirs, adapted))
    assert_close(found, expected.double(), torch.float32)
