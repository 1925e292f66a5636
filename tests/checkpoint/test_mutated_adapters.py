"""Saved adapters damaged or edited at random, tensors and configuration: loaded as what they were, or refused by name.

Of files without digests, as other libraries write them, not every edit can be seen. Those that load are reported as
unverified; all others are refused.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import warnings

import peft
import pytest
import torch
from support.checkpoint_files import CONFIG, WEIGHTS
from support.mutations import damage, edit_header, edit_tensors, same, state
from torch import nn

import peftk
from peftk.nn import AdapterLayer

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
PATTERNS = {"rank_pattern": {"blocks.0.fc": 3}, "alpha_pattern": {r"blocks\.1\.fc": 5}}
CONFIGS = {
    "lora": peftk.LoraConfig(
        r=2, target_modules=["fc"], modules_to_save=["head"], bias="lora_only", init_lora_weights=False, **PATTERNS
    ),
    "adalora": peftk.AdaLoraConfig(
        init_r=3, target_r=2, total_step=10, target_modules=r"blocks\.\d\.fc", init_lora_weights=False
    ),
    "oft": peftk.OFTConfig(oft_block_size=4, target_modules=["0.fc", "head"], init_weights=False),
    "lokr": peftk.LoKrConfig(r=2, target_modules=["fc"], init_weights=False),
    "theirs": peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False, **PATTERNS),
}
VALUES = [
    *(None, True, False, 0, 1, 2, 3, -1, 16, 65_536, 10**38, 0.5, 1e300, "", "x", "all", "fc", "all-linear"),
    *(r".*\.fc", r"(\w+)+#", "(", [], ["fc"], ["0.fc"], ["nothing"], [1], {}, {"fc": 4}, {"fc": "4"}, {"(": 1}, [[[]]]),
    *("LORA", "OFT", "CAUSAL_LM", "\ud800", "a\0b", "../..", {"a": {"b": [None]}}),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["fc"](x).tanh()
        return self.head(x)


def edit_config(rng, file):
    values = json.loads(file.read_text())
    field = rng.choice(list(values))
    match rng.randrange(5):
        case 0 | 1:
            values[field] = rng.choice(VALUES)
        case 2:
            del values[field]
        case 3:
            values[rng.choice(["", "new", field.upper()])] = rng.choice(VALUES)
        case 4:
            other = rng.choice(list(values))
            values[field], values[other] = values[other], values[field]
    file.write_text(json.dumps(values))


def mutate(rng, folder, other):
    """Change one thing in the folder of an adapter; `other` is that of another one."""
    weights, config = folder / WEIGHTS, folder / CONFIG
    match rng.randrange(8):
        case 0:
            weights.write_bytes(damage(rng, weights.read_bytes()))
        case 1:
            weights.write_bytes(edit_header(rng, weights.read_bytes()))
        case 2:
            edit_tensors(rng, weights)
        case 3:
            config.write_bytes(damage(rng, config.read_bytes()))
        case 4 | 5 | 6:
            edit_config(rng, config)
        case 7:
            name = rng.choice([WEIGHTS, CONFIG])
            shutil.copy(other / name, folder / name) if rng.random() < 0.8 else (folder / name).unlink()


def try_mutations(tmp_path, source, count, seed, log):
    """Load `count` mutated files, half of them over an adapter in memory; return how many loaded."""
    library = peft if source == "theirs" else peftk
    expected = {}
    for name, number in (("good", 1), ("other", 2)):
        base = Net()
        torch.manual_seed(number)
        library.get_peft_model(base, copy.deepcopy(CONFIGS[source])).save_pretrained(tmp_path / name)
        expected[name] = peftk.PeftModel.from_pretrained(Net(), tmp_path / name)(X)
    assert not torch.equal(*expected.values())
    rng = random.Random(f"{source} {seed}")
    over, fresh = peftk.PeftModel.from_pretrained(Net(), tmp_path / "other"), Net()
    before_over, before_fresh = state(over), state(fresh)
    folder = tmp_path / "mutated"
    loaded = 0
    for case in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        mutate(rng, folder, tmp_path / "other")
        log.clear()
        onto_old = case % 2 == 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if onto_old:
                    over.load_adapter(folder, "default")
                    model = over
                else:
                    model = peftk.PeftModel.from_pretrained(fresh, folder)
        except (ValueError, TypeError, NotImplementedError) as error:
            assert str(folder) in str(error), f"case {case}: {type(error).__name__}: {error}"
            assert same(before_over, state(over)) and same(before_fresh, state(fresh)), f"case {case}: {error}"
            continue
        loaded += 1
        unverified = any("unverified" in message and str(folder) in message for message in log)
        # The whole tensor file of another save under the same configuration is that other adapter.
        weights = (folder / WEIGHTS).read_bytes()
        meant = "other" if weights == (tmp_path / "other" / WEIGHTS).read_bytes() else "good"
        assert unverified or torch.equal(model(X), expected[meant]), f"case {case}: silently something else"
        assert unverified or source != "theirs", f"case {case}: loaded without a word"
        over, fresh = peftk.PeftModel.from_pretrained(Net(), tmp_path / "other"), Net()
        assert not any(isinstance(module, AdapterLayer) for module in fresh.modules())
    return loaded


@pytest.mark.parametrize("source", CONFIGS)
def test_two_hundred_mutations(tmp_path, source, log):
    assert 0 < try_mutations(tmp_path, source, 200, 0, log) < 150


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("source", CONFIGS)
def test_ten_thousand_mutations(tmp_path, source, seed, log):
    assert 0 < try_mutations(tmp_path, source, 500, seed, log) < 400
