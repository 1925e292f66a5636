"""Files of other programs damaged or edited at random: loaded and converted as what they were, or refused by name.

Such files carry no digests, so that not every edit can be seen. Those that load are reported as unverified.
"""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.foreign_files import X, net
from support.mutations import damage, edit_header, edit_tensors, same, state

import peftk
from peftk.models.adapter_source import read_source
from peftk.models.convert import convert
from peftk.models.convert_plan import plan_for
from peftk.testing.compare import assert_close

WEIGHTS = {name: module.weight.shape for name, module in net().named_modules() if hasattr(module, "weight")}


def _lora(prefix: str, seed: int, flat: bool, down: str, up: str, alpha: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, shapes in {"first": ((2, 12), (16, 2)), "block.conv_in": ((2, 4, 3, 3), (8, 2, 1, 1))}.items():
        name = prefix + (path.replace(".", "_") if flat else path)
        found[f"{name}.{down}"] = torch.randn(shapes[0], generator=generator)
        found[f"{name}.{up}"] = torch.randn(shapes[1], generator=generator)
        if alpha:
            found[f"{name}.alpha"] = torch.tensor(3.0)
    return found


def _lycoris(seed: int, method: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "loha": {"hada_w1_a": (16, 2), "hada_w1_b": (2, 12), "hada_w2_a": (16, 2), "hada_w2_b": (2, 12)},
        "lokr": {"lokr_w1": (4, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)},
        "full": {"diff": (16, 12)},
    }[method]
    found = {f"lycoris_first.{part}": torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    return found | ({} if method == "full" else {"lycoris_first.alpha": torch.tensor(2.0)})


SOURCES: dict[str, Any] = {
    "kohya": lambda seed: _lora("lora_unet_", seed, True, "lora_down.weight", "lora_up.weight", True),
    "diffusers": lambda seed: _lora("unet.", seed, False, "lora_A.weight", "lora_B.weight", False),
    "comfyui": lambda seed: _lora("diffusion_model.", seed, False, "lora_A.weight", "lora_B.weight", True),
    "loha": lambda seed: _lycoris(seed, "loha"),
    "lokr": lambda seed: _lycoris(seed, "lokr"),
    "full": lambda seed: _lycoris(seed, "full"),
    "converted": lambda seed: _lora("lora_unet_", seed, True, "lora_down.weight", "lora_up.weight", True),
}


def write(source: str, seed: int, path: Path) -> None:
    save_file(SOURCES[source](seed), path, {"ss_network_module": "networks.lora"})
    if source == "converted":
        read = read_source(path)
        convert(read, plan_for(read, "diffusers", weights=WEIGHTS), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def mutate(rng: random.Random, path: Path, other: Path) -> None:
    match rng.randrange(8):
        case 0 | 1:
            path.write_bytes(damage(rng, path.read_bytes()))
        case 2 | 3 | 4:
            path.write_bytes(edit_header(rng, path.read_bytes()))
        case 5 | 6:
            edit_tensors(rng, path)
        case 7:
            shutil.copy(other, path)


def loaded(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peftk.PeftModel.from_pretrained(net(), path)


def try_mutations(folder: Path, source: str, count: int, seed: int, log: list[str]) -> int:
    """Load and convert `count` mutated files; return how many loaded."""
    expected = {}
    for name, number in (("good", 1), ("other", 2)):
        write(source, number, folder / name)
        expected[(folder / name).read_bytes()] = loaded(folder / name)(X)
    rng = random.Random(f"{source} {seed}")
    fresh = net()
    before = state(fresh)
    path, out = folder / "mutated.safetensors", folder / "out"
    found = 0
    for case in range(count):
        shutil.copy(folder / "good", path)
        mutate(rng, path, folder / "other")
        kept = path.read_bytes()
        log.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = peftk.PeftModel.from_pretrained(fresh, path)
        except (ValueError, TypeError, NotImplementedError) as error:
            assert str(path) in str(error), f"case {case}: {type(error).__name__}: {error}"
            assert same(before, state(fresh)), f"case {case}: {error}"
            model = None
        else:
            found += 1
            unverified = any("unverified" in message and str(path) in message for message in log)
            known = [expected[kept]] if kept in expected else expected.values()
            assert unverified or any(torch.equal(model(X), y) for y in known), f"case {case}: silently another one"
            fresh = net()
        try:
            read = read_source(path)
            convert(read, plan_for(read, "lycoris"), out)
        except (ValueError, TypeError, NotImplementedError) as error:
            assert str(path) in str(error), f"case {case}: {type(error).__name__}: {error}"
            assert not out.exists()
            continue
        if model is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = peftk.PeftModel.from_pretrained(net(), out)
            assert_close(again(X), model(X).double(), torch.float32, what=f"case {case}")
        out.unlink()
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_a_thousand_mutations(source: str, tmp_path: Path, log: list[str]) -> None:
    assert 0 < try_mutations(tmp_path, source, 170, 0, log) < 150


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("source", SOURCES)
def test_ten_thousand_mutations(source: str, seed: int, tmp_path: Path, log: list[str]) -> None:
    assert 0 < try_mutations(tmp_path, source, 420, seed, log) < 380
