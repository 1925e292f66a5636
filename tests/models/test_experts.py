"""Adapters on stacked experts: `target_parameters`, beside Hugging Face PEFT and in float64."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.experts import EXPERTS, IDS, KINDS, filled, loss_and_gradients, made, stacks_built
from torch import Tensor, nn

import peftk
from peftk.nn.lora.parameter import LoRAParameter
from peftk.testing.compare import assert_close, assert_same_bits


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest) -> nn.Module:
    return made(request.param)


def config_of(library, **options):
    options = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": EXPERTS} | options
    return library.LoraConfig(**options)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}}, {"target_modules": ["o_proj"]}]
)
def test_names_values_and_gradients_are_those_of_peft(base: nn.Module, options: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = filled(peft.get_peft_model(copy.deepcopy(base), config_of(peft, **options)))
    ours = filled(peftk.get_peft_model(base, config_of(peftk, **options)))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    expected, expected_grads = loss_and_gradients(theirs)
    found, found_grads = loss_and_gradients(ours)
    assert_close(found, expected, torch.float64)
    assert found_grads.keys() == expected_grads.keys()
    for name, grad in found_grads.items():
        assert_close(grad, expected_grads[name], torch.float64, what=name)


def test_no_update_of_a_stack_is_built(base: nn.Module) -> None:
    assert not stacks_built(filled(peftk.get_peft_model(base, config_of(peftk))))


def test_files_go_both_ways(base: nn.Module, tmp_path) -> None:
    clean, other = copy.deepcopy(base), copy.deepcopy(base)
    ours = filled(peftk.get_peft_model(base, config_of(peftk)))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(clean, tmp_path / "ours")
    expected = ours(input_ids=IDS).logits
    assert_close(theirs(input_ids=IDS).logits, expected, torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    again = peftk.PeftModel.from_pretrained(other, tmp_path / "theirs")
    assert_close(again(input_ids=IDS).logits, expected, torch.float64)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert_same_bits(value, two[key], what=key)


def naive(experts: nn.Module, x: Tensor, index: Tensor, weights: Tensor, updates: dict[str, Tensor]) -> Tensor:
    """One token after the other, one expert after the other, with dense updates in the weights."""
    found = []
    for token, chosen, factors in zip(x, index, weights, strict=True):
        total = torch.zeros_like(token)
        for expert, factor in zip(chosen.tolist(), factors, strict=True):
            gate_up, down = (
                getattr(experts, name)[expert] + updates.get(name, torch.zeros(len(experts.down_proj)))[expert]
                for name in ("gate_up_proj", "down_proj")
            )
            gate, up = (gate_up @ token).chunk(2)
            total = total + factor * (down @ (experts.act_fn(gate) * up))
        found.append(total)
    return torch.stack(found)


def adapted_experts(**options) -> tuple[LoRAParameter, nn.Module]:
    model = made("qwen3")
    experts = model.model.layers[0].mlp.experts
    filled(peftk.get_peft_model(model, config_of(peftk, **options)))
    return model.model.layers[0].mlp.experts, experts


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_the_second_product_are_those_of_the_first(parameters: list[str], dtype: torch.dtype) -> None:
    """Against single tokens: sorting must not hand the rows of one token's first product to another's second one."""
    layer, experts = adapted_experts(target_parameters=parameters)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    # Expert 3 has no token, 4 has one.
    index = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [4, 0], [2, 1], [0, 1], [1, 0], [2, 0]])
    weights = torch.rand(9, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    updates = {one.weight_name: one.get_delta_weight("default") for one in layer._chain()}
    truth = naive(experts, x, index, weights, updates)
    grad = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    wanted = [x, weights, *(p for p in layer.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(truth, wanted, grad)
    layer.to(dtype)
    inputs = x.detach().to(dtype).requires_grad_(), weights.detach().to(dtype).requires_grad_()
    y = layer(inputs[0], index, inputs[1])
    assert_close(y, truth, dtype)
    wanted = [*inputs, *(p for p in layer.parameters() if p.requires_grad)]
    for found, right in zip(torch.autograd.grad(y, wanted, grad.to(dtype)), expected, strict=True):
        assert_close(found, right, dtype)


def test_dropout_is_that_of_a_layer_for_each_product() -> None:
    """In training mode, with the masks that torch draws for the sorted rows."""
    layer, experts = adapted_experts(target_parameters=EXPERTS[1:], lora_dropout=0.5)
    x, index = torch.randn(6, 16, dtype=torch.float64), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [4, 0], [2, 1]])
    weights = torch.ones(6, 2, dtype=torch.float64)
    torch.manual_seed(5)
    y = layer.train()(x, index, weights)
    torch.manual_seed(5)
    mask = torch.nn.functional.dropout(torch.ones(12, 12, dtype=torch.float64), 0.5)
    delta = layer.get_delta_weight("default")
    truth = layer.base_layer(x, index, weights)
    order = torch.sort(index.reshape(-1), stable=True).indices
    for row, place in enumerate(order.tolist()):
        token, expert = place // 2, int(index.reshape(-1)[place])
        gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
        truth[token] += delta[expert] @ (experts.act_fn(gate) * up * mask[row])
    assert_close(y, truth, torch.float64)
    assert_close(
        layer.eval()(x, index, weights), naive(experts, x, index, weights, {"down_proj": delta}), torch.float64
    )


def test_merging_switching_and_disabling(base: nn.Module) -> None:
    clean = copy.deepcopy(base)(input_ids=IDS).logits
    before = {name: value.clone() for name, value in base.named_parameters()}
    model = filled(peftk.get_peft_model(base, config_of(peftk)))
    first = model(input_ids=IDS).logits
    with model.disable_adapter():
        assert_close(model(input_ids=IDS).logits, clean, torch.float64)
    model.add_adapter("other", config_of(peftk, r=2))
    assert_same_bits(model(input_ids=IDS).logits, first)
    model.set_adapter("other")
    assert_close(model(input_ids=IDS).logits, clean, torch.float64)
    model.set_adapter("default")
    model.merge_adapter(safe_merge=True)
    assert_close(model(input_ids=IDS).logits, first, torch.float64)
    with model.disable_adapter():
        assert_close(model(input_ids=IDS).logits, clean, torch.float64)
    model.unmerge_adapter()
    assert_same_bits(model(input_ids=IDS).logits, first)
    model.delete_adapter("other")
    plain = copy.deepcopy(model).unload()
    assert not any(isinstance(module, LoRAParameter) for module in plain.modules())
    for name, value in plain.named_parameters():
        assert_same_bits(value, before[name], what=name)
    merged = model.merge_and_unload()
    assert [name for name, _ in merged.named_parameters()] == list(before)
    assert_close(merged(input_ids=IDS).logits, first, torch.float64)


def test_merging_one_of_two_adapters_leaves_the_other_active(base: nn.Module) -> None:
    model = peftk.get_peft_model(base, config_of(peftk))
    model.add_adapter("other", config_of(peftk, r=2))
    filled(model)
    model.base_model.set_adapter(["default", "other"])
    both = model(input_ids=IDS).logits
    assert_close(copy.deepcopy(model).merge_and_unload()(input_ids=IDS).logits, both, torch.float64)


class Bilinear(nn.Module):
    """A module that nobody knows, with a stack, a matrix, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 4, dtype=torch.float64))
        self.matrix = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
        self.numbers = nn.Parameter(torch.arange(6).view(2, 3), requires_grad=False)
        self.vector = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,ti->to", self.stack, x) * (x @ self.matrix.mT)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4).double()
        self.inner = Bilinear()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


@pytest.mark.parametrize(
    "targets", [["inner.stack"], ["inner.stack", "matrix"], ["first.weight"], ["first.weight", "stack"]]
)
def test_any_module_has_its_updates_in_the_parameters(targets: list[str]) -> None:
    torch.manual_seed(0)
    base, x = Unknown(), torch.randn(7, 4, dtype=torch.float64)
    options = {"r": 2, "target_modules": [], "target_parameters": targets}
    theirs = filled(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)))
    ours = filled(peftk.get_peft_model(base, peftk.LoraConfig(**options)))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert_close(ours(x), theirs(x), torch.float64)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for (name, one), (_, two) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if one.requires_grad:
            assert_close(one.grad, two.grad, torch.float64, what=name)
    y = ours(x)
    assert_close(ours.merge_and_unload()(x), y, torch.float64)


def refused(error: type[Exception], message: str, model: nn.Module | None = None, **options) -> None:
    model = Unknown() if model is None else model
    before = [(name, id(module)) for name, module in model.named_modules()]
    options = {"r": 2, "target_modules": [], "target_parameters": ["inner.stack"]} | options
    with pytest.raises(error, match=message):
        peftk.get_peft_model(model, peftk.LoraConfig(**options))
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    refused(
        ValueError,
        r"target_parameters: not in the model: 'inner.stak' \(closest: inner.stack",
        target_parameters=["inner.stak"],
    )
    refused(
        TypeError, r"target_parameters: 'inner.numbers' is a tensor of torch.int64", target_parameters=["inner.numbers"]
    )
    refused(
        ValueError,
        r"target_parameters: 'inner.vector' has shape \(4,\); expected 2 or 3",
        target_parameters=["inner.vector"],
    )
    refused(ValueError, "use_dora: has no meaning for target_parameters", use_dora=True)
    refused(ValueError, "lora_bias: has no meaning for target_parameters", lora_bias=True)
    refused(
        ValueError, "lora_dropout: 'inner.stack' belongs to a Bilinear, whose inputs are not known", lora_dropout=0.1
    )
    refused(
        NotImplementedError,
        "init_lora_weights='pissa': not implemented for target_parameters",
        init_lora_weights="pissa",
    )
    refused(
        ValueError,
        "target_parameters: module 'first' is adapted as a whole by target_modules",
        target_modules=["first"],
        target_parameters=["first.weight"],
    )
    with pytest.raises(ValueError, match="target_parameters: has no meaning for AdaLoRA"):
        peftk.AdaLoraConfig(total_step=3, target_parameters=["inner.stack"])


def test_adapters_of_one_model_are_on_the_same_parameters() -> None:
    model = peftk.get_peft_model(Unknown(), peftk.LoraConfig(target_modules=[], target_parameters=["inner.stack"]))
    with pytest.raises(
        ValueError, match=r"target_parameters: the adapters of this model are on \['stack'\] of 'inner'"
    ):
        model.add_adapter("b", peftk.LoraConfig(target_modules=[], target_parameters=["inner.matrix"]))


def test_samples_cannot_choose_among_adapters_of_parameters(base: nn.Module) -> None:
    model = peftk.get_peft_model(base, config_of(peftk)).eval()
    with pytest.raises(ValueError, match=r"adapter_names: the adapters of parameter .* cannot be mixed in a batch"):
        model(input_ids=IDS, adapter_names=["default", "default"])


def test_experts_that_are_spread_over_devices_are_refused() -> None:
    layer, experts = adapted_experts()
    experts._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="spread over devices"):
        layer(torch.randn(1, 16).double(), torch.tensor([[0, 1]]), torch.ones(1, 2).double())


def test_all_linear_names_the_stacks_that_it_leaves_out(base: nn.Module) -> None:
    names = r"\['experts.down_proj', 'experts.gate_up_proj'\]"
    count = sum(parameter.dim() == 3 for parameter in base.parameters())
    with pytest.warns(
        UserWarning, match=f'"all-linear" leaves out {count} stacked parameters.*target_parameters={names}'
    ) as told:
        peftk.get_peft_model(copy.deepcopy(base), peftk.LoraConfig(target_modules="all-linear"))
    assert sum("leaves out" in str(one.message) for one in told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftk.get_peft_model(base, config_of(peftk, target_modules="all-linear"))


def test_somebody_who_listens_to_the_experts_is_called() -> None:
    layer, experts = adapted_experts()
    inputs = torch.randn(3, 16).double(), torch.tensor([[0, 1], [2, 0], [1, 2]]), torch.ones(3, 2).double()
    expected, heard = layer(*inputs), []
    handle = experts.register_forward_hook(lambda *args: heard.append(args))
    assert_close(layer(*inputs), expected, torch.float64)
    handle.remove()
    assert len(heard) == 1


def test_checkpointing_and_autocast(base: nn.Module) -> None:
    model = filled(peftk.get_peft_model(base, config_of(peftk)))
    expected, grads = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found, again = loss_and_gradients(model)
    assert_close(found, expected, torch.float64)
    assert grads.keys() == again.keys()
    for name in grads:
        assert_close(again[name], grads[name], torch.float64, what=name)


def test_half_precision_under_autocast() -> None:
    layer, experts = adapted_experts()
    x, index = torch.randn(4, 16), torch.tensor([[0, 1], [2, 0], [1, 2], [4, 0]])
    weights = torch.rand(4, 2)
    updates = {one.weight_name: one.get_delta_weight("default") for one in layer._chain()}
    truth = naive(experts, x.double(), index, weights.double(), updates)
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, index, weights)
    assert y.dtype is torch.float32
    assert_close(y, truth, torch.bfloat16)


def test_what_other_features_do_not_take_is_refused_by_name(base: nn.Module, tmp_path) -> None:
    model = filled(peftk.get_peft_model(copy.deepcopy(base), config_of(peftk)))
    model.add_adapter("other", config_of(peftk))
    with pytest.raises(NotImplementedError, match="adapters: 'default' has target_parameters"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    state = peftk.get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="state_dict: its names do not say which parameters"):
        peftk.inject_adapter_in_model(config_of(peftk), copy.deepcopy(base), state_dict=state)
    model.save_pretrained(tmp_path)
    base.config.use_cache = False
    config = peftk.XLoraConfig(hidden_size=16, adapters={"0": str(tmp_path)})
    with pytest.raises(NotImplementedError, match=r"adapters: expert .*: X-LoRA has no LoRAParameter"):
        peftk.get_peft_model(base, config)


def test_injected_adapters_of_parameters(base: nn.Module) -> None:
    expected = filled(peftk.get_peft_model(copy.deepcopy(base), config_of(peftk)))
    state = {k.removeprefix("base_model.model."): v for k, v in peftk.get_peft_model_state_dict(expected).items()}
    model = peftk.inject_adapter_in_model(config_of(peftk), base)
    assert peftk.get_peft_model_state_dict(model).keys() == state.keys()
    peftk.set_peft_model_state_dict(model, state)
    assert_close(model(input_ids=IDS).logits, expected(input_ids=IDS).logits, torch.float64)
    before = {name: value.clone() for name, value in copy.deepcopy(expected).unload().state_dict().items()}
    for merged in (False, True):
        if merged:
            expected.merge_adapter()
        found = peftk.get_base_model_state_dict(expected)
        assert found.keys() == before.keys()
        for name, value in found.items():
            assert_same_bits(value, before[name], what=name)
