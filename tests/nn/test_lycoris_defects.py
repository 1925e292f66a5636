"""Where LyCORIS 4.1.3 is wrong and peftk is not: each test shows both, so that it fails once LyCORIS is put right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peftk.nn import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, layer_class_for
from peftk.testing.compare import assert_close

pytest.importorskip("lycoris")

BASES = {
    "linear": (lambda: nn.Linear(16, 8), (3, 16)),
    "conv": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 4, 5)),
    "groups": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2), (2, 8, 4, 5)),
}


def theirs(kind, base, alpha=4.0, **options):
    """The adapted layer of LyCORIS, of rank or size 4 (LoKr: rank 1), with random parameters."""
    import lycoris.modules as modules

    cls = {
        "loha": modules.LohaModule,
        "lokr": modules.LokrModule,
        "locon": modules.LoConModule,
        "diag-oft": modules.DiagOFTModule,
        "boft": modules.ButterflyOFTModule,
    }[kind]
    torch.manual_seed(1)
    module = cls("witness", base, 1.0, 1 if kind == "lokr" else 4, alpha, **options)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "dora_scale" not in name and "scalar" not in name:
                p.copy_(0.2 * torch.randn_like(p))
            elif "dora_scale" in name:
                p.mul_(2)
    return module


def before_and_after_merging(kind, base, x, alpha=4.0, **options):
    layer = copy.deepcopy(base)
    module = theirs(kind, layer, alpha, **options)
    if options.get("use_scalar"):
        module.scalar.data.fill_(0.1)
    merged, twin = copy.deepcopy((layer, module))
    module.apply_to()
    twin.merge_to()
    return layer(x), merged(x)


CONFIGS = {
    "loha": LoHaConfig(r=4, alpha=1, init_weights=False),
    "lokr": LoKrConfig(r=1, alpha=4, init_weights=False),
    "locon": LoraConfig(r=4, use_dora=True, init_lora_weights=False),
    "diag-oft": OFTConfig(oft_block_size=4, init_weights=False),
    "boft": BOFTConfig(boft_block_size=4, init_weights=False),
}


@pytest.mark.parametrize(
    ("kind", "where", "alpha", "options"),
    [
        ("loha", "linear", 1.0, {}),
        ("loha", "conv", 1.0, {}),
        ("lokr", "linear", 0.5, {"factor": 2}),
        ("lokr", "conv", 0.5, {"factor": 2}),
        ("loha", "linear", 4.0, {"use_scalar": True}),
        ("lokr", "linear", 4.0, {"use_scalar": True, "factor": 2}),
        ("diag-oft", "linear", 4.0, {"bypass_mode": True}),
        ("diag-oft", "conv", 4.0, {"bypass_mode": True}),
        ("boft", "linear", 4.0, {"bypass_mode": True}),
        ("locon", "linear", 4.0, {"bypass_mode": True, "weight_decompose": True}),
        ("lokr", "groups", 4.0, {"bypass_mode": True, "factor": 2, "full_matrix": True}),
        ("boft", "groups", 4.0, {"bypass_mode": True}),
    ],
)
def test_merged_is_not_what_was_trained(kind, where, alpha, options):
    torch.manual_seed(0)
    make, shape = BASES[where]
    base, x = make(), torch.randn(shape)
    before, after = before_and_after_merging(kind, base, x, alpha, **options)
    with pytest.raises(AssertionError):
        assert_close(before, after.double(), torch.float32)
    config = CONFIGS[kind]
    if (kind, where) == ("boft", "groups"):
        with pytest.raises(ValueError, match="groups=2"):
            layer_class_for(config, base)(base, config)
        return
    layer = layer_class_for(config, base)(base, config)
    y = layer(x)
    layer.merge()
    assert_close(layer(x), y.double(), torch.float32)


def test_float64_and_empty_batches():
    base = nn.Linear(16, 8).double()
    theirs("diag-oft", base).double().apply_to()
    with pytest.raises(RuntimeError, match="expected scalar type Double but found Float"):
        base(torch.randn(3, 16, dtype=torch.float64))
    base = nn.Linear(16, 8)
    theirs("lokr", base, bypass_mode=True, factor=2).apply_to()
    with pytest.raises(RuntimeError):
        base(torch.randn(0, 16))
    layer = layer_class_for(CONFIGS["lokr"], nn.Linear(16, 8))(nn.Linear(16, 8), CONFIGS["lokr"])
    assert layer(torch.randn(0, 16)).shape == (0, 8)
    layer = layer_class_for(CONFIGS["diag-oft"], nn.Linear(16, 8))(nn.Linear(16, 8).double(), CONFIGS["diag-oft"])
    assert torch.autograd.gradcheck(layer, torch.randn(3, 16, dtype=torch.float64, requires_grad=True))
