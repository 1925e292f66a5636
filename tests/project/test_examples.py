"""Every script of examples/ runs as it stands, on its tiny random model, and does what it says."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
# Adapted once on the fly and once in the weight, or computed in another order: a few roundings of float32.
ROUNDING = 100 * torch.finfo(torch.float32).eps


def script(name: str) -> ModuleType:
    """Import one example."""
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folder(name: str, path: Path) -> list[str]:
    """Save a model of one layer, of a kind that the script says it takes, and return the arguments that name it."""
    import transformers as t

    tokenizer = t.ByT5Tokenizer(mask_token="<extra_id_0>")
    torch.manual_seed(0)
    # Positions: a text of 64 tokens, and those that RoBERTa leaves out.
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    reads = {"vocab_size": len(tokenizer), "max_position_embeddings": 80}
    if name == "bert_masked_lm":
        model = t.BertForMaskedLM(t.BertConfig(**small, **reads))
    elif name == "t5_sequence_to_sequence":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        model = t.MT5ForConditionalGeneration(t.MT5Config(vocab_size=len(tokenizer), **sizes))
    elif name == "qwen3_moe_experts":
        sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
        model = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**small, **reads, **sizes))
    elif name in ("llama_oft", "llama_adaption_prompt", "llama_four_adapters"):
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_embd=32, n_head=2))
    elif name == "x_lora":
        model = t.LlamaForCausalLM(t.LlamaConfig(**small, **reads))
    elif name == "roberta_c3a":
        config = t.RobertaConfig(**small, **reads, pad_token_id=tokenizer.pad_token_id, num_labels=5)
        model = t.RobertaForSequenceClassification(config)
    else:
        config = t.Dinov2Config(image_size=28, patch_size=7, mlp_ratio=2, num_labels=5, **small)
        model = t.Dinov2ForImageClassification(config)
    model.save_pretrained(path)
    if name == "dinov2_boft":
        size = {"height": 28, "width": 28}
        t.BitImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(path)
        return ["--model", str(path), "--images", _pictures(path / "pictures")]
    tokenizer.save_pretrained(path)
    return ["--model", str(path), *(["--layers", "1"] if name == "llama_adaption_prompt" else [])]


def _pictures(path: Path) -> str:
    """Save pictures of noise, in one folder for each class."""
    image = pytest.importorskip("PIL.Image")
    for label in ("cat", "dog"):
        (path / label).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(256, (30, 34, 3), dtype=torch.uint8)
            image.frombytes("RGB", (34, 30), bytes(pixels.flatten().tolist())).save(path / label / f"{number}.png")
    return str(path)


def falls(losses: list[float]) -> bool:
    """Say whether the last losses are below the first ones."""
    return sum(losses[-3:]) / 3 < 0.98 * sum(losses[:3]) / 3


def test_readme_lists_every_script() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert sorted(re.findall(r"\]\((\w+)\.py\)", table)) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_tested_and_says_how_it_is_run(name: str) -> None:
    assert f'script("{name}")' in Path(__file__).read_text()
    assert f"    python examples/{name}.py" in script(name).__doc__


def test_bert_masked_lm(tmp_path: Path) -> None:
    """The loss falls, the file loads again, and names, shapes and what is trained are PEFT's."""
    peft = pytest.importorskip("peft")
    results = script("bert_masked_lm").main(["--steps", "25", "--output", str(tmp_path)])
    assert [found["config"].peft_type for found in results.values()] == ["LORA", "LORA", "ADALORA"]
    for found in results.values():
        assert falls(found["losses"])
        assert found["difference"] == 0
        theirs = peft.get_peft_model(copy.deepcopy(found["base"]), peft.PeftConfig.from_peft_type(**_fields(found)))
        names = [(name, tuple(p.shape), p.requires_grad) for name, p in found["model"].named_parameters()]
        assert names == [(name, tuple(p.shape), p.requires_grad) for name, p in theirs.named_parameters()]


def _fields(found: dict) -> dict:
    ours = found["config"].to_dict()
    return {name: value for name, value in ours.items() if name not in ("auto_mapping", "runtime_config")}


def test_t5_sequence_to_sequence(tmp_path: Path) -> None:
    found = script("t5_sequence_to_sequence").main(["--steps", "25", "--output", str(tmp_path)])
    assert falls(found["losses"])
    assert found["differences"]["loaded"] == 0
    assert found["differences"]["merged"] < ROUNDING * found["largest"]


def test_llama_oft(tmp_path: Path) -> None:
    found = script("llama_oft").main(["--steps", "25", "--output", str(tmp_path)])
    assert found["fresh"] == 0
    assert falls(found["losses"])
    assert found["differences"]["loaded"] == 0
    assert found["differences"]["merged"] < ROUNDING * found["largest"]


def test_qwen3_moe_experts(tmp_path: Path) -> None:
    found = script("qwen3_moe_experts").main(["--steps", "25", "--output", str(tmp_path)])
    assert falls(found["losses"])
    assert found["differences"]["loaded"] == 0
    assert found["differences"]["merged"] < ROUNDING * found["largest"]
    keys = load_file(tmp_path / "adapter_model.safetensors")
    for layer in range(2):
        for part in ("experts.lora_A", "experts.base_layer.lora_B", "self_attn"):
            assert any(f"layers.{layer}" in key and part in key for key in keys), part


def test_llama_four_adapters(tmp_path: Path) -> None:
    found = script("llama_four_adapters").main(["--steps", "25", "--output", str(tmp_path)])
    assert len(found["losses"]) == 4
    assert all(falls(losses) for losses in found["losses"].values())
    # Two factors of seven layers in each of two blocks, for four adapters.
    assert found["gradients"] == 4 * 2 * 7 * 2
    assert found["apart"] < ROUNDING
    for user in found["losses"]:
        assert load_file(tmp_path / user / "adapter_model.safetensors")


def test_llama_adaption_prompt(tmp_path: Path) -> None:
    found = script("llama_adaption_prompt").main(["--steps", "25", "--output", str(tmp_path)])
    assert found["fresh"] == found["disabled"] == found["difference"] == 0
    assert falls(found["losses"])
    # The gates have opened, in both layers.
    assert len(found["gates"]) == 2
    assert all(found["gates"].values())


def test_x_lora(tmp_path: Path) -> None:
    """The classifier learns on its own which expert is for which kind of text."""
    found = script("x_lora").main(["--output", str(tmp_path)])
    assert sum(found["losses"][-5:]) < sum(found["losses"][:5])
    assert found["difference"] == 0
    assert found["weights"]["code"]["code"] > found["weights"]["prose"]["code"] + 0.02
    trained = [name for name, p in found["model"].named_parameters() if p.requires_grad]
    assert trained and all("internal_xlora_classifier" in name for name in trained)


def test_dinov2_boft(tmp_path: Path) -> None:
    found = script("dinov2_boft").main(["--steps", "40", "--output", str(tmp_path)])
    assert falls(found["losses"])
    assert found["differences"]["loaded"] == 0
    assert found["differences"]["merged"] < ROUNDING * found["largest"]
    trained = {name for name, p in found["model"].named_parameters() if p.requires_grad}
    for layer in found["model"].peft_config["default"].target_modules:
        for part in ("boft_R.default", "boft_s.default", "base_layer.bias"):
            assert any(f"{layer}.{part}" in name for name in trained), (layer, part)
    assert any("classifier.modules_to_save.default" in name for name in trained)


def test_roberta_c3a(tmp_path: Path) -> None:
    found = script("roberta_c3a").main(["--steps", "25", "--output", str(tmp_path)])
    assert falls(found["losses"])
    assert found["differences"]["loaded"] == 0
    assert found["differences"]["merged"] < ROUNDING * found["largest"]
    sizes = {name: p.shape[-1] for name, p in found["model"].named_parameters() if "c3a_kernel" in name}
    assert {size for name, size in sizes.items() if "dense" in name} == {16}
    assert {size for name, size in sizes.items() if "dense" not in name} == {32}


def test_unet_loha_lokr(tmp_path: Path) -> None:
    results = script("unet_loha_lokr").main(["--steps", "25", "--output", str(tmp_path)])
    assert list(results) == ["loha", "lokr", "output_oft"]
    for name, found in results.items():
        assert found["fresh"] == 0
        assert falls(found["losses"])
        # LoKr's products run in another order when nothing is trained, and a loaded adapter is not.
        assert found["differences"]["loaded"] <= (ROUNDING * found["largest"] if name == "lokr" else 0)
        assert found["differences"]["merged"] < ROUNDING * found["largest"]


def test_a_unet_of_diffusers_is_adapted(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = diffusers.UNet2DConditionModel(**sizes, **blocks, cross_attention_dim=8, attention_head_dim=4)
    unet.save_pretrained(tmp_path / "unet")
    arguments = ["--model", str(tmp_path / "unet"), "--steps", "3", "--batch", "2"]
    results = script("unet_loha_lokr").main([*arguments, "--output", str(tmp_path / "adapters")])
    for name, found in results.items():
        keys = load_file(tmp_path / "adapters" / name / "adapter_model.safetensors")
        # Attention and convolutions, of both sides and of the middle.
        for part in (
            "down_blocks.0.attentions",
            "down_blocks.1.resnets.0.conv1",
            "mid_block",
            "up_blocks.1.attentions",
        ):
            assert any(part in key for key in keys), (name, part)
        assert found["fresh"] == 0
        assert found["differences"]["merged"] < ROUNDING * found["largest"]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "unet_loha_lokr"])
def test_a_model_from_a_folder_is_adapted(name: str, tmp_path: Path) -> None:
    """`--model` takes a folder of a transformers model; the script's own has two layers, the one in the folder one."""
    module = script(name)
    arguments = _folder(name, tmp_path / "model")
    module.main([*arguments, "--steps", "3", "--output", str(tmp_path / "adapters")])
    keys = [key for path in (tmp_path / "adapters").rglob("*.safetensors") for key in load_file(path)]
    layers = [re.search(r"\.(?:layers?|h|block)\.(\d+)\.", key) for key in keys if "xlora_classifier" not in key]
    assert {found.group(1) for found in layers if found} == {"0"}
