"""LoRALinear and OFTLinear on their own: formulas, merging, several adapters, dtypes, hooks, compilation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftk.nn import LoraConfig, LoRALinear, OFTConfig, OFTLinear
from peftk.nn.oft import nearest_divisor
from peftk.testing.compare import assert_close

LAYERS = {LoraConfig: LoRALinear, OFTConfig: OFTLinear}
# Every configuration here has a random, non-trivial adapter.
CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=5, init_lora_weights=False),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False),
    "lora_bias": LoraConfig(r=2, lora_bias=True, init_lora_weights=False),
    "lora_orthogonal": LoraConfig(r=4, init_lora_weights="orthogonal"),
    "oft": OFTConfig(oft_block_size=4, init_weights=False),
    "oft_blocks": OFTConfig(r=2, oft_block_size=0, init_weights=False, num_cayley_neumann_terms=3),
    "oft_exact": OFTConfig(oft_block_size=3, use_cayley_neumann=False, init_weights=False),
    "oft_shared": OFTConfig(oft_block_size=6, block_share=True, init_weights=False),
    "coft": OFTConfig(oft_block_size=4, coft=True, eps=0.5, init_weights=False),
}
IDENTITIES = {
    "lora": LoraConfig(r=3),
    "gaussian": LoraConfig(r=3, init_lora_weights="gaussian"),
    "lora_bias": LoraConfig(r=3, lora_bias=True),
    "oft": OFTConfig(oft_block_size=4),
    "oft_exact": OFTConfig(oft_block_size=4, use_cayley_neumann=False),
    "oft_shared": OFTConfig(oft_block_size=4, block_share=True),
    "coft": OFTConfig(oft_block_size=4, coft=True),
}
I, O = 12, 10  # noqa: E741


def make(config, *, dtype=torch.float32, bias=True, features=(I, O), seed=0, **kwargs):
    torch.manual_seed(seed)
    return LAYERS[type(config)](nn.Linear(*features, bias=bias, dtype=dtype), config, **kwargs)


def with_hook(layer):
    """Make the layer take the path that calls its base layer."""
    layer.base_layer.register_forward_hook(lambda *_: None)
    return layer


def reference(layer, x, names=("default",)):
    """The naive formula in float64, with dense matrices."""
    base = layer.base_layer
    x, weight = x.double(), base.weight.double()
    bias = 0 if base.bias is None else base.bias.double()
    if isinstance(layer, OFTLinear):
        for name in names:
            x = x @ dense_rotation(layer.oft_R[name])
        return x @ weight.T + bias
    y = x @ weight.T + bias
    for name in names:
        a, b = layer.lora_A[name], layer.lora_B[name]
        delta = (x @ a.weight.double().T) @ b.weight.double().T
        y = y + layer.scaling[name] * (delta + (0 if b.bias is None else b.bias.double()))
    return y


def dense_rotation(rotation):
    size = rotation.block_size
    rows, columns = torch.triu_indices(size, size, 1)
    eye = torch.eye(size, dtype=torch.float64)
    blocks = []
    for packed in rotation.weight.double():
        s = torch.zeros(size, size, dtype=torch.float64).index_put((rows, columns), packed)
        s = s - s.T
        terms = rotation.neumann_terms
        if terms is None:
            blocks.append((eye - s) @ torch.linalg.inv(eye + s))
        elif terms == 3:
            blocks.append(eye + 2 * s + 2 * s @ s + s @ s @ s)
        else:
            assert terms == 5
            blocks.append(eye + 2 * (s + s @ s + s @ s @ s) + s @ s @ s @ s)
    return torch.block_diag(*(blocks * rotation.block_count if rotation.block_share else blocks))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradients_follow_the_formula(name, bias, fused):
    layer = make(CONFIGS[name], bias=bias)
    if not fused:
        with_hook(layer)
    for shape in [(I,), (1, I), (0, I), (5, I), (2, 3, I)]:
        x = torch.randn(shape, requires_grad=True)
        layer.zero_grad()
        y = layer(x)
        assert y.dtype == x.dtype
        weights = torch.randn(y.shape)
        (y * weights).sum().backward()
        grads = [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
        x64 = x.detach().double().requires_grad_()
        trained = [p for p in layer.parameters() if p.requires_grad]
        y64 = reference(layer, x64)
        expected = torch.autograd.grad((y64 * weights).sum(), [x64, *trained])
        assert_close(y, y64, torch.float32)
        for grad, want in zip(grads, expected, strict=True):
            assert grad is not None
            assert_close(grad, want.double(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", IDENTITIES)
def test_a_fresh_adapter_changes_no_bit(name, fused, dtype):
    for bias in (True, False):
        layer = make(IDENTITIES[name], dtype=dtype, bias=bias)
        base = copy.deepcopy(layer.base_layer)
        if not fused:
            with_hook(layer)
        for shape in [(1, I), (7, I), (2, 3, I), (0, I)]:
            x = torch.randn(shape, dtype=dtype)
            assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_output_equals_the_unmerged_and_unmerging_is_exact(name):
    layer = make(CONFIGS[name])
    x = torch.randn(5, I)
    layer(x)  # COFT projects its parameters when it is first used
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    expected = reference(layer, x)
    layer.merge(safe_merge=True)
    assert layer.merged
    assert_close(layer(x), expected, torch.float32)
    assert_close(layer.base_layer(x), expected, torch.float32)
    assert list(layer.state_dict()) == list(before)
    layer.unmerge()
    assert not layer.merged
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["lora", "oft", "oft_exact"])
def test_a_merged_weight_is_the_float64_one_rounded_once(name, dtype):
    layer = make(CONFIGS[name], dtype=dtype)
    eye = torch.eye(I, dtype=torch.float64)
    exact = (reference(layer, eye) - layer.base_layer.bias.double()).T
    original = layer.base_layer.weight.clone()
    for keep_base in ("device", "cpu"):
        layer.merge(keep_base=keep_base)
        ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
        assert ((layer.base_layer.weight.double() - exact).abs() <= ulp).all()
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, original)
    with pytest.raises(ValueError, match="keep_base"):
        layer.merge(keep_base="disk")


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_several_adapters_act_together_and_merge_in_order(kind):
    layer = make(CONFIGS[kind])
    torch.manual_seed(1)
    layer.add_adapter("b", CONFIGS["rslora" if kind == "lora" else "oft_exact"])
    x = torch.randn(4, I)
    assert_close(layer(x), reference(layer, x), torch.float32)
    for names in (["default", "b"], ["b", "default"], ["b"]):
        layer.set_adapter(names)
        expected = reference(layer, x, names)
        assert_close(layer(x), expected, torch.float32)
        layer.merge()
        assert_close(layer(x), expected, torch.float32)
        layer.unmerge()
    # Merging one after another is merging both.
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["default", "b"]
    assert_close(layer(x), reference_of(layer, x, ["default", "b"]), torch.float32)
    with pytest.warns(UserWarning, match="unmerged"):
        layer.set_adapter("b")
    assert not layer.merged


def test_scales_are_those_of_the_papers():
    assert make(CONFIGS["lora"]).scaling["default"] == 5 / 3
    assert make(CONFIGS["rslora"]).scaling["default"] == 6 / 2


@pytest.mark.parametrize("name", ["lora", "oft"])
def test_merging_again_starts_from_the_weight_of_now(name):
    layer = make(CONFIGS[name])
    layer.merge()
    layer.unmerge()
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    x = torch.randn(3, I)
    expected = reference(layer, x)
    layer.merge()
    assert_close(layer(x), expected, torch.float32)


class Rounding(nn.Linear):
    """A linear layer that answers in another dtype."""

    def forward(self, x):
        return super().forward(x).bfloat16()


def test_the_output_has_the_dtype_of_the_base_layer():
    layer = LoRALinear(Rounding(I, O), CONFIGS["lora"])
    x = torch.randn(3, I)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, reference(layer, x), torch.bfloat16)


def reference_of(layer, x, names):
    twin = copy.deepcopy(layer)
    twin.unmerge()
    return reference(twin, x, names)


@pytest.mark.parametrize("name", CONFIGS)
def test_activation_disabling_and_deletion(name):
    config = CONFIGS[name]
    layer = make(config)
    layer.add_adapter("b", config)
    assert [n for n, p in layer.named_parameters() if p.requires_grad and ".b." in n] == []
    x = torch.randn(3, I)
    base = layer.base_layer(x)
    on = layer(x)
    assert not torch.equal(on, base)
    flags = [p.requires_grad for p in layer.parameters()]
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), on)
    assert [p.requires_grad for p in layer.parameters()] == flags
    layer.set_adapter("b")
    assert {n.split(".")[-2] for n, p in layer.named_parameters() if p.requires_grad} == {"b"}
    layer.set_adapter("b", inference_mode=True)
    assert not any(p.requires_grad for p in layer.parameters())
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer.delete_adapter("b")
    layer.unmerge()
    layer.delete_adapter("b")
    assert layer.adapter_names == ["default"]
    assert not any(".b." in n for n in layer.state_dict())
    assert torch.equal(layer(x), base)
    layer.set_adapter("default")
    assert torch.equal(layer(x), on)


@pytest.mark.parametrize("name", ["lora", "oft", "coft"])
def test_disabling_a_merged_layer_gives_the_base_output(name):
    layer = make(CONFIGS[name])
    x = torch.randn(3, I)
    base = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)


def test_safe_merge_refuses_before_it_changes_anything():
    for config in (CONFIGS["lora"], CONFIGS["oft"]):
        layer = make(config)
        with torch.no_grad():
            next(p for p in layer.parameters() if p.requires_grad).view(-1)[0] = float("nan")
        before = layer.base_layer.weight.clone()
        with pytest.raises(ValueError, match="safe_merge"):
            layer.merge(safe_merge=True)
        assert torch.equal(layer.base_layer.weight, before)
        assert not layer.merged


def test_a_bias_that_cannot_be_merged_is_refused():
    with pytest.warns(UserWarning, match="lora_bias"):
        layer = make(CONFIGS["lora_bias"], bias=False)
    with pytest.raises(ValueError, match="lora_bias"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lora", "oft", "oft_exact", "lora_bias"])
def test_half_precision_bases_get_float32_parameters(name, dtype):
    layer = make(CONFIGS[name], dtype=dtype)
    adapter = [p for n, p in layer.named_parameters() if "base_layer" not in n]
    assert {p.dtype for p in adapter} == {torch.float32}
    # As with PEFT, the initial values are those of the base dtype.
    assert all(torch.equal(p, p.to(dtype).float()) for p in adapter)
    x = torch.randn(4, I, dtype=dtype, requires_grad=True)
    for variant in (layer, with_hook(copy.deepcopy(layer))):
        y = variant(x)
        assert y.dtype == dtype
        assert_close(y, reference(layer, x.detach()), dtype)
        y.sum().backward()
        assert all(p.grad is not None for p in variant.parameters() if p.requires_grad)
    plain = make(CONFIGS[name], dtype=dtype, autocast_adapter_dtype=False)
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert plain(x).dtype == dtype


@pytest.mark.parametrize("name", ["lora", "oft"])
def test_autocast_computes_in_the_autocast_dtype(name):
    layer = make(CONFIGS[name])
    x = torch.randn(3, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, reference(layer, x), torch.bfloat16)


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_pickles_and_moves(name):
    layer = make(CONFIGS[name])
    x = torch.randn(3, I)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
        twin.merge()
        twin.unmerge()
    merged = copy.deepcopy(layer)
    merged.merge()
    original = layer.base_layer.weight
    for twin in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        twin.unmerge()
        assert torch.equal(twin.base_layer.weight, original)
    merged.double()
    merged.unmerge()
    assert torch.equal(merged.base_layer.weight, original.double())
    assert_close(merged(x.double()), reference(layer, x), torch.float32)


class Doubled(nn.Linear):
    """A linear layer whose forward is not the plain one."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_the_base_layer_is_called_when_its_call_matters():
    x = torch.randn(3, I)
    for config in (CONFIGS["lora"], CONFIGS["oft"]):
        calls = []
        layer = make(config)
        expected = layer(x)
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            handle = getattr(layer.base_layer, register)(lambda *args, calls=calls: calls.append(1))
            assert_close(layer(x), expected.double(), torch.float32)
            handle.remove()
        assert len(calls) == 2
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_, calls=calls: calls.append(m))
        assert_close(layer(x), expected.double(), torch.float32)
        handle.remove()
        assert layer.base_layer in calls
        layer.base_layer.forward = lambda x: x[..., :O] * 0
        assert not layer(x * 0).any()
        subclass = LAYERS[type(config)](Doubled(I, O), config)
        assert torch.equal(subclass(x * 0), 2 * subclass.base_layer.bias.expand(3, O))
        parametrised = make(config)
        nn.utils.parametrizations.weight_norm(parametrised.base_layer)
        assert_close(parametrised(x), reference(parametrised, x), torch.float32)
        with pytest.raises(ValueError, match="parametrization"):
            parametrised.merge()
        trained = make(config)
        trained.base_layer.weight.requires_grad_(True)
        trained(x).sum().backward()
        assert trained.base_layer.weight.grad is not None


@pytest.mark.parametrize("cls", [LoraConfig, OFTConfig])
def test_biases_of_the_base_are_trained_when_asked(cls):
    layer = make(cls(bias="all"))
    x = torch.randn(3, I)
    layer(x).sum().backward()
    assert_close(layer.base_layer.bias.grad, torch.full((O,), 3.0, dtype=torch.float64), torch.float32)
    assert not layer.base_layer.weight.requires_grad
    assert not make(cls()).base_layer.bias.requires_grad


def test_dropout_acts_in_training_only_and_replays():
    lora = make(LoraConfig(r=3, lora_dropout=0.5, init_lora_weights=False))
    oft = make(OFTConfig(oft_block_size=2, module_dropout=0.5, init_weights=False))
    shared = make(OFTConfig(oft_block_size=2, module_dropout=0.5, block_share=True, init_weights=False))
    x = torch.randn(8, I)
    for layer in (lora, oft, shared):
        assert layer.training
        torch.manual_seed(5)
        first, second = layer(x), layer(x)
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        assert torch.equal(layer(x), first)
        layer.eval()
        assert torch.equal(layer(x), layer(x))
        assert_close(layer(x), reference(layer, x), torch.float32)
        layer.train()
        layer.merge()
        expected = layer(x)
        layer.unmerge()
        layer.eval()
        assert_close(layer(x), expected.double(), torch.float32)


def test_oft_dropout_replaces_blocks_by_the_identity():
    layer = make(OFTConfig(oft_block_size=2, module_dropout=0.5, init_weights=False))
    rotation = layer.oft_R["default"]
    full = rotation.eval().blocks()
    rotation.train()
    kept = torch.zeros(6)
    for _ in range(40):
        blocks = rotation.blocks()
        identity = (blocks == torch.eye(2)).flatten(1).all(1)
        whole = (blocks == full).flatten(1).all(1)
        assert (identity ^ whole).all()
        kept += whole
    assert (kept > 0).all()
    assert (kept < 40).all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_dropout=0.4, init_lora_weights=False),
        OFTConfig(oft_block_size=2, module_dropout=0.4, init_weights=False),
        OFTConfig(oft_block_size=2, coft=True, eps=0.1, init_weights=False),
    ],
    ids=["lora", "oft", "coft"],
)
def test_checkpointing_replays_the_same_pass(config, reentrant):
    layer = make(config)
    x = torch.randn(8, I, requires_grad=True)
    results = []
    for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        run().square().sum().backward()
        results.append([x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_layer_used_twice_in_one_pass_trains():
    for config in (CONFIGS["lora"], CONFIGS["oft"], CONFIGS["coft"]):
        layer = make(config, features=(I, I))
        layer(layer(torch.randn(2, I))).sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("eps", [1e-3, 0.3, 1e3])
def test_coft_keeps_every_block_in_its_ball(eps):
    layer = make(OFTConfig(oft_block_size=4, coft=True, eps=eps, init_weights=False))
    rotation = layer.oft_R["default"]
    start = rotation.weight.detach().clone()
    layer.eval()(torch.randn(2, I))
    norms = rotation.weight.double().norm(dim=1) * 2**0.5
    limit = eps / len(norms) ** 0.5
    outside = start.double().norm(dim=1) * 2**0.5 > limit
    assert_close(norms[outside], torch.full_like(norms[outside], limit), torch.float32)
    assert torch.equal(rotation.weight[~outside], start[~outside])
    projected = rotation.weight.detach().clone()
    layer(torch.randn(2, I))
    assert torch.equal(rotation.weight, projected)


@pytest.mark.parametrize("name", [*CONFIGS, "dropout"])
def test_compiles_without_a_graph_break(name):
    config = CONFIGS.get(name) or LoraConfig(r=3, lora_dropout=0.3, init_lora_weights=False)
    layer = make(config)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, I, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    if name != "dropout":
        assert_close(y, reference(layer, x.detach()), torch.float32)


def test_every_trainable_tensor_moves_after_one_step():
    for name, config in {**CONFIGS, "oft_fresh": OFTConfig(oft_block_size=4)}.items():
        layer = make(config)
        trained = [p for p in layer.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        layer(torch.randn(6, I)).square().sum().backward()
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, trained, strict=True)), name


def test_float64_gradients():
    for config in (CONFIGS["lora"], CONFIGS["oft"], CONFIGS["oft_exact"], CONFIGS["lora_bias"]):
        layer = make(config, dtype=torch.float64)
        trained = {n: p.detach().requires_grad_() for n, p in layer.named_parameters() if p.requires_grad}

        def run(x, *values, layer=layer, names=tuple(trained)):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        x = torch.randn(2, I, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(run, (x, *trained.values()))


@pytest.mark.parametrize(
    ("number", "wanted", "expected"), [(60, 32, 30), (12, 5, 4), (12, 100, 12), (9, 6, 3), (9, 7, 9), (8, 6, 4)]
)
def test_a_size_that_does_not_divide_becomes_the_nearest_divisor(number, wanted, expected):
    assert nearest_divisor(number, wanted) == expected
    with pytest.warns(UserWarning, match=f"{wanted} does not divide.*{expected} is used"):
        layer = make(OFTConfig(oft_block_size=wanted), features=(number, 4))
    assert layer.oft_block_size["default"] == expected
    if expected < number:
        with pytest.warns(UserWarning, match=f"r: {wanted} does not divide.*{expected} is used"):
            layer = make(OFTConfig(r=wanted, oft_block_size=0), features=(number, 4))
        assert layer.r["default"] == expected


def test_blocks_of_size_one_are_refused():
    with pytest.raises(ValueError, match="size 1"), pytest.warns(UserWarning, match="does not divide"):
        make(OFTConfig(oft_block_size=32), features=(127, 4))


class Quantised(nn.Linear):
    """A linear layer with packed integers."""

    def __init__(self):
        super().__init__(4, 4)
        del self.weight
        self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    "base", [nn.Conv2d(4, 4, 1), nn.Embedding(4, 4), nn.LayerNorm(4), Quantised(), nn.LazyLinear(4), nn.Identity()]
)
def test_unsupported_layers_are_refused(base):
    for config in (LoraConfig(r=1), OFTConfig(oft_block_size=2)):
        with pytest.raises(TypeError, match=rf"'a\.b'.*{type(base).__name__}.*support"):
            LAYERS[type(config)](base, config, module_name="a.b")


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "..", "a\\b"])
def test_bad_adapter_names_are_refused(name):
    with pytest.raises(ValueError, match="adapter_name"):
        make(LoraConfig(), adapter_name=name)


def test_bad_calls_are_refused_by_name():
    layer = make(LoraConfig(r=2))
    with pytest.raises(TypeError, match="OFTConfig"):
        OFTLinear(nn.Linear(4, 4), LoraConfig())
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("default", LoraConfig())
    with pytest.raises(TypeError, match="adapter_names"):
        layer.merge(adapter_names="default")
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        layer(torch.randn(3, I + 1))
    with pytest.warns(UserWarning, match="nothing is merged"):
        layer.unmerge()
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        make(LoraConfig(fan_in_fan_out=True))
