"""The scripts of examples/training: models of peftk in the loops that people use, each with what it shows."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from peftk.testing.compare import LIMITS

TRAINING = Path(__file__).resolve().parents[2] / "examples" / "training"
SCRIPTS = sorted(path.stem for path in TRAINING.glob("*.py"))
# Computed in another order: a few roundings of float32.
ROUNDING = 100 * torch.finfo(torch.float32).eps
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("loops"),  # Their imports take seconds: one worker pays for them.
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a script, by a name that processes which it starts find too."""
    monkeypatch.syspath_prepend(str(TRAINING))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield importlib.import_module
    # Scripts of other folders have the same names.
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def falls(losses: list[float]) -> bool:
    """Say whether the last losses are below the first ones."""
    assert all(map(math.isfinite, losses))
    return sum(losses[-3:]) < 0.99 * sum(losses[:3])


def test_pages_list_every_script() -> None:
    for page, folder in (
        (TRAINING.parent / "README.md", ""),
        (TRAINING.parents[1] / "docs/training.md", "../examples/"),
    ):
        found = set(re.findall(rf"\({re.escape(folder)}training/(\w+)\.py\)", page.read_text()))
        assert found == set(SCRIPTS), page
    tests = Path(__file__).read_text()
    for name in SCRIPTS:
        assert f'script("{name}")' in tests
        assert f"python examples/training/{name}.py" in (TRAINING / f"{name}.py").read_text()


def test_own_loop(script: Callable[[str], ModuleType]) -> None:
    found = script("own_loop").main([])
    assert falls(found["losses"])
    assert found["resumed"] == found["losses"][4:]
    assert found["files"].keys() == ADAPTER | {"optimizer.pt"}


def test_accelerate_loop(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found = script("accelerate_loop").main(["--cpu", "--output", str(tmp_path)])
    assert falls(found["losses"])
    assert found["resumed"] == found["second"]
    assert found["difference"] == 0
    assert found["sizes"]["adapter"] < 0.1 * found["sizes"]["state"]


def test_transformers_trainer(script: Callable[[str], ModuleType]) -> None:
    found = script("transformers_trainer").main([])
    assert falls(found["losses"])
    assert found["scores"][-1] == min(found["scores"])
    assert set(found["files"]) >= ADAPTER | {"optimizer.pt", "rank_allocator.pt"}
    assert "model.safetensors" not in found["files"]
    # Six layers of eight triplets, half of which were to go; some layers lose more of them than others.
    assert sum(found["ranks"].values()) == 24
    assert len(set(found["ranks"].values())) > 1
    assert found["difference"] == 0


def test_sentence_embeddings(script: Callable[[str], ModuleType]) -> None:
    pytest.importorskip("sentence_transformers")
    found = script("sentence_embeddings").main([])
    assert falls(found["losses"])
    assert found["differences"]["base"] > 0.1 * found["largest"]
    assert found["differences"]["loaded"] == 0
    assert found["differences"]["merged"] < ROUNDING * found["largest"]


def test_diffusers_unet(script: Callable[[str], ModuleType]) -> None:
    pytest.importorskip("diffusers")
    try:
        found = script("diffusers_unet").main([])
    except (ImportError, ValueError) as error:
        # transformers 5.24 and diffusers of its day refuse every version of PEFT that there is.
        if "version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(str(error))
    assert falls(found["losses"])
    trained = found["differences"].pop("trained, and the base")
    assert trained > 0.1 * found["largest"]
    assert found["differences"].pop("loaded by peftk") == 0
    assert len(found["differences"]) == 5
    assert max(found["differences"].values()) < ROUNDING * found["largest"]


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)
def test_sharded(script: Callable[[str], ModuleType]) -> None:
    found = script("sharded").main([])
    assert falls(found["losses"])
    assert found["losses"] == pytest.approx(found["alone"], rel=ROUNDING)
    assert found["difference"] < ROUNDING * found["largest"]
    assert found["held"] == found["total"] / 2
    assert found["files"].keys() == ADAPTER
    assert sum(found["files"].values()) < found["total"]


def test_quantised_base(script: Callable[[str], ModuleType]) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    found = script("quantised_base").main([])
    assert falls(found["losses"])
    assert found["kind"] == "Linear"
    assert found["differences"]["loaded"] == 0
    # Without gradients bitsandbytes multiplies in bfloat16 where the CPU can, and the merged model does not.
    rounding = LIMITS[torch.bfloat16] if functional.has_avx512bf16() else ROUNDING
    assert found["differences"]["merged"] < rounding * found["largest"]
