"""The training loops of examples/accelerate: the same losses with peftk as without, and layers that are accelerated."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

LOOPS = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
SCRIPTS = sorted(path.stem for path in LOOPS.glob("*.py") if path.stem != "tiny")
NEEDS = {
    "trl_sft": "trl",
    "trl_sft_4bit": "bitsandbytes",
    "trl_dpo": "trl",
    "sentence_embeddings": "sentence_transformers",
    "diffusers_unet": "diffusers",
}


@pytest.mark.slow
@pytest.mark.xdist_group("loops")  # Their imports take seconds: one worker pays for them.
@pytest.mark.parametrize("name", SCRIPTS)
def test_losses_are_those_without(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip(NEEDS.get(name, "transformers"))
    monkeypatch.syspath_prepend(str(LOOPS))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = importlib.import_module(name)
    try:
        plain, fast = script.main([])["losses"].values()
    except (TypeError, ValueError) as error:
        # transformers 5.24 refuses, in its own `add_adapter`, every version of PEFT that there is; PEFT 0.20 cannot
        # make OFT on 4 bits.
        if not re.search("version of PEFT you are using is not compatible|Linear4bit.__init__", str(error)):
            raise
        pytest.skip(str(error))
    finally:
        for stem in (*SCRIPTS, "tiny"):
            sys.modules.pop(stem, None)
    assert len(plain) >= 6 and plain[0] != plain[-1]
    # A rounding of float32 grows with every step of training.
    assert fast == pytest.approx(plain, rel=2e-5)
    done, layers = map(int, re.search(r"(\d+) of (\d+) accelerated", capsys.readouterr().out).groups())
    assert layers > 0
    # Of two adapters of a UNet one is not active at first.
    assert done == layers or name == "diffusers_unet"


def test_readme_lists_every_loop() -> None:
    table = (LOOPS.parent / "README.md").read_text()
    assert set(re.findall(r"\(accelerate/(\w+)\.py\)", table)) == set(SCRIPTS)
