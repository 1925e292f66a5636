"""OFT's Cayley-Neumann series outside its radius: no rotation, which layers say and `safe_merge` refuses."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from support.layer_cases.oft import rotation
from torch import nn

import peftk
from peftk.methods.oft import orthogonality_error
from peftk.nn import BOFTConfig, OFTConfig, OFTConv2d, OFTLinear
from peftk.nn.oft_rotation import CHECKED_EVERY, SERIES_REFUSED, SERIES_WARNS, Rotation

SMALL, WARNED, REFUSED = 0.3, 0.8, 3.0
"""Spectral norms of the skew matrices: well inside the radius, near it, and far outside."""
KINDS = ["linear", "conv"]


def _model(kind="linear", **values):
    make = {"linear": lambda: nn.Linear(24, 24), "conv": lambda: nn.Conv2d(4, 4, (2, 3), padding=1)}[kind]
    config = OFTConfig(oft_block_size=8, target_modules=["0", "1"], **values)
    return peftk.get_peft_model(nn.Sequential(make(), make()), config)


def _example(kind):
    return torch.randn(2, 24) if kind == "linear" else torch.randn(2, 4, 5, 5)


@torch.no_grad()
def _set(model, norm):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, Rotation):
            packed = torch.randn_like(module.weight)
            rows, columns = torch.triu_indices(8, 8, 1)
            square = torch.zeros(len(packed), 8, 8)
            square[:, rows, columns] = packed
            module.weight.copy_(packed * (norm / torch.linalg.matrix_norm(square - square.mT, ord=2)[:, None]))
    return model


def _weights(model):
    return [layer.base_layer.weight.clone() for layer in model.get_base_model()]


def _told(action):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in seen if "orthogonal" in str(w.message)]


@pytest.mark.parametrize("kind", KINDS)
def test_merging_warns_once_with_the_error_and_what_to_do(kind):
    model = _set(_model(kind), REFUSED)
    (message,) = _told(model.merge_adapter)
    error = orthogonality_error(rotation(model.get_base_model()[0].oft_R["default"])[None])
    assert error > 1
    assert f"max |R R^T - I| is {error:.2g}" in message
    for part in ("module '0'", "5 terms", "use_cayley_neumann=False", "learning rate"):
        assert part in message
    model.unmerge_adapter()
    assert not _told(model.merge_adapter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_a_series_far_outside_its_radius(kind, way):
    model = _set(_model(kind), REFUSED)
    before = _weights(model)
    with pytest.raises(ValueError, match=r"merging \['default'\].* not orthogonal: max .* at most 1 is merged.*exact"):
        getattr(model, way)(safe_merge=True)
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(model), strict=True))
    assert not any(layer.merged for layer in model.get_base_model())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe", [False, True])
def test_near_the_radius_both_merges_warn(kind, safe):
    model = _set(_model(kind), WARNED)
    errors = [orthogonality_error(rotation(layer.oft_R["default"])[None]) for layer in model.get_base_model()]
    assert all(SERIES_WARNS < error <= SERIES_REFUSED for error in errors)
    assert len(_told(lambda: model.merge_adapter(safe_merge=safe))) == 1
    assert model.get_base_model()[0].merged


@pytest.mark.parametrize(
    ("norm", "values"),
    [
        (SMALL, {}),
        (REFUSED, {"use_cayley_neumann": False}),
        (REFUSED, {"num_cayley_neumann_terms": 1}),
        (REFUSED, {"coft": True, "eps": 1e-3}),
        (0.9, {"num_cayley_neumann_terms": 64}),
    ],
    ids=["inside", "exact", "one term", "coft", "many terms"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_a_rotation_is_not_told(kind, norm, values):
    model = _set(_model(kind, **values), norm)
    x = _example(kind)
    assert not _told(lambda: model(x))
    assert not _told(lambda: model.merge_adapter(safe_merge=True))


def test_boft_has_no_series():
    model = peftk.get_peft_model(nn.Sequential(nn.Linear(8, 8)), BOFTConfig(boft_block_size=4, target_modules=["0"]))
    with torch.no_grad():
        model.get_base_model()[0].boft_R["default"].normal_(0, 10)
    assert not _told(lambda: (model(torch.randn(2, 8)), model.merge_adapter(safe_merge=True)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_on_a_cpu_warns_once_for_the_adapter(kind, training):
    model = _set(_model(kind), REFUSED).train(training)
    x = _example(kind)
    assert len(_told(lambda: model(x))) == 1
    assert not _told(lambda: [model(x) for _ in range(5)])
    assert not _told(lambda: model.train(not training)(x))
    # A copy, which is another adapter, and another occasion.
    assert len(_told(lambda: copy.deepcopy(model).train(training)(x))) == 1
    assert len(_told(model.merge_adapter)) == 1


def test_passes_are_looked_at_ever_more_rarely(monkeypatch):
    looks, seen = [], [0]
    monkeypatch.setattr("peftk.nn.oft_rotation.orthogonality_error", lambda blocks: looks.append(seen[0]) or 0.0)
    layer = OFTLinear(nn.Linear(8, 8), OFTConfig(oft_block_size=4)).train()
    x = torch.randn(2, 8)
    for seen[0] in range(1, 3 * CHECKED_EVERY + 1):
        layer.oft_R["default"].blocks()
    assert looks == [*(2**n for n in range(12)), 3 * CHECKED_EVERY]
    looks.clear()
    layer.eval()
    layer(x)
    assert len(looks) == 1


def test_a_series_that_leaves_in_training_is_found():
    model = _set(_model(), SMALL).train()
    x = _example("linear")
    assert not _told(lambda: [model(x) for _ in range(5)])
    _set(model, REFUSED)
    assert len(_told(lambda: [model(x) for _ in range(5)])) == 1


def test_looking_disturbs_neither_transforms_nor_compilers_nor_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call, grad

    layer = _set(OFTLinear(nn.Linear(8, 8), OFTConfig(oft_block_size=8)), REFUSED).eval()
    x = torch.randn(2, 8)
    weights = {"oft_R.default.weight": torch.zeros(1, 28)}
    found = grad(lambda values: functional_call(layer, values, (x,)).square().sum())(weights)
    assert found["oft_R.default.weight"].shape == (1, 28)
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == x.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert copy.deepcopy(layer)(torch.empty(2, 8)).shape == (2, 8)
    torch._dynamo.reset()
    layer.train().eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(compiled(x), layer(x))


def test_layers_can_be_pickled():
    layer = OFTConv2d(nn.Conv2d(4, 4, 1), OFTConfig(oft_block_size=4))
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(again(x), layer(x))


def test_what_is_not_finite_is_as_far_as_can_be():
    assert orthogonality_error(torch.full((1, 2, 2), 1e30)) == math.inf
    assert orthogonality_error(torch.empty(0, 2, 2)) == 0
    assert orthogonality_error(torch.eye(3).expand(2, 3, 3)) == 0
    layer = OFTLinear(nn.Linear(8, 8), OFTConfig(oft_block_size=8))
    with torch.no_grad():
        layer.oft_R["default"].weight.fill_(math.nan)
    with pytest.raises(ValueError, match="non-finite"):
        layer.merge(safe_merge=True)
