"""Configurations: PEFT's fields, files both ways, and every bad value refused by name."""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft
import pytest
from support import layer_cases

from peftk.nn import (
    LAYERS,
    AdaLoraConfig,
    AdaptionPromptConfig,
    C3AConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    XLoraConfig,
)

OURS = [cls for cls in PeftConfig._by_type.values() if not hasattr(peft, cls.__name__)]
PAIRS = [(cls, getattr(peft, cls.__name__)) for cls in PeftConfig._by_type.values() if cls not in OURS]
INF, NAN = float("inf"), float("nan")


def default_of(field: dataclasses.Field) -> object:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_fields_and_defaults_are_those_of_peft(ours, theirs):
    mine = {f.name: default_of(f) for f in dataclasses.fields(ours)}
    reference = {f.name: default_of(f) for f in dataclasses.fields(theirs)}
    # A field that PEFT lacks stands behind PEFT's, and leaves the adapter alone unless it is set.
    more = [name for name in mine if name not in reference]
    # AdaLoRA's is True, for PEFT has no choice there.
    more_of = {C3AConfig: {"exclude_modules": None}, LoraConfig: {"dora_inputs": False}}
    more_of |= {AdaLoraConfig: {"dora_inputs": False, "orth_reg_in_loss": True}}
    more_of |= {kind: {"use_dora": False, "dora_inputs": False} for kind in (LoHaConfig, LoKrConfig)}
    assert {name: mine.pop(name) for name in more} == more_of.get(ours, {})
    assert list(mine) == list(reference)
    mine.pop("runtime_config", None), reference.pop("runtime_config", None)
    assert mine == reference


def given(config: PeftConfig) -> dict[str, object]:
    """Return the fields that are not as they are by default."""
    needed = NEEDED.get(type(config), {})
    fresh = type(config)(**needed)
    names = (f.name for f in dataclasses.fields(config) if f.init)
    return {n: getattr(config, n) for n in names if n in needed or getattr(config, n) != getattr(fresh, n)}


# Of methods without layers of the generic tests, and of all others.
FULL = [
    XLoraConfig(hidden_size=16, adapters={"a": "b"}, top_k_lora=1, task_type="CAUSAL_LM"),
    AdaptionPromptConfig(adapter_len=10, adapter_layers=30, task_type="CAUSAL_LM"),
    *layer_cases.FULL,
]


def test_every_method_with_layers_has_its_layer_cases():
    """Llama-Adapter and X-LoRA adapt whole modules and models, and have tests of their own."""
    found = {type(case.config) for case in layer_cases.CASES.values()}
    assert found == {type(toy.config) for toy in layer_cases.TOYS.values()}
    assert found == {type(config) for config in layer_cases.LARGE.values()}
    assert found == {*dict(PAIRS), *OURS} - {AdaptionPromptConfig, XLoraConfig}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_every_layer_has_its_cases(layer):
    """What `layer_cases/<method>.py` leaves out is not tried anywhere; here it is named."""
    kind = layer.config_class
    if kind is AdaptionPromptConfig:
        pytest.skip("Llama-Adapter adapts whole modules, and has tests of its own")
    assert kind._meaning, f"{kind.__name__}._meaning: no field changes what a trained tensor means?"
    cases = [case for case in layer_cases.CASES.values() if type(case.config) is kind]
    made = [type(layer_cases.make(case)) for case in cases]
    assert layer in made, f"{layer.__name__}: no case in tests/support/layer_cases"
    of = f"tests/support/layer_cases, {kind.__name__}"
    assert any(case.together for case in cases), f"{of}: no case says which one it may act `together` with"
    identities = [case for case in layer_cases.IDENTITIES.values() if type(case.config) is kind]
    assert identities, f"{of}: IDENTITIES has no fresh adapter that changes no bit"


def test_every_configuration_is_filled_in():
    assert {type(config) for config in FULL} == {*dict(PAIRS), *OURS}


@pytest.mark.parametrize("config", [c for c in FULL if type(c) in OURS], ids=lambda config: type(config).__name__)
def test_peft_refuses_what_it_does_not_have(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    with pytest.raises((KeyError, ValueError)):
        peft.PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("ours", [c for c in FULL if type(c) not in OURS], ids=lambda config: type(config).__name__)
def test_files_load_both_ways_with_the_same_content(ours, tmp_path):
    theirs = dict(PAIRS)[type(ours)](**given(ours))
    theirs.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {
        **written,
        **{k: sorted(v) for k, v in written.items() if k.endswith("_modules") and v and v != "all-linear"},
    } == (ours.to_dict())
    assert PeftConfig.from_pretrained(tmp_path) == ours
    (tmp_path / "adapter_config.json").write_text(json.dumps(ours.to_dict()))
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).to_dict() == theirs.to_dict()


def test_unknown_keys_are_dropped_with_one_warning():
    values = LoraConfig().to_dict() | {"from_the_future": 1, "another": 2}
    with pytest.warns(UserWarning, match=r"\['another', 'from_the_future'\]") as caught:
        assert PeftConfig.from_dict(values) == LoraConfig()
    assert len(caught) == 1


@pytest.mark.parametrize("kind", [None, "BOGUS", 3, ["LORA"]])
def test_unknown_method_is_refused(kind):
    with pytest.raises(ValueError, match="peft_type"):
        PeftConfig.from_dict({"peft_type": kind})


def test_a_file_cannot_name_the_wrong_class():
    with pytest.raises(ValueError, match="peft_type"):
        OFTConfig.from_dict(LoraConfig().to_dict())
    with pytest.raises(ValueError, match="peft_type"):
        OFTConfig(peft_type="LORA")


def test_old_oft_files():
    values = OFTConfig().to_dict()
    with pytest.raises(ValueError, match="oft_block_size"):
        PeftConfig.from_dict({k: v for k, v in values.items() if k != "oft_block_size"})
    with pytest.warns(UserWarning, match=r"0\.17"):
        PeftConfig.from_dict(values | {"peft_version": "0.17.1"})
    with pytest.raises(ValueError, match="peft_version"):
        PeftConfig.from_dict(values | {"peft_version": "newest"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftConfig.from_dict(values | {"peft_version": "0.19.0@abcdef"})


NUMBER = [True, NAN, INF, -1, 0, 1e300, "8", None, [8]]
BAD = [
    *((LoraConfig, "lora_alpha", v) for v in NUMBER),
    *((LoraConfig, "r", v) for v in [0, -1, True, 1.5, 2**70, "8", None]),
    *((LoraConfig, "lora_dropout", v) for v in [1.0, -0.1, NAN, True, "0"]),
    *((LoraConfig, "bias", v) for v in ["oft_only", "", None, True, 1]),
    *((LoraConfig, "use_rslora", v) for v in [1, "yes", None]),
    *((LoraConfig, "use_dora", v) for v in [1, "yes", None]),
    # True needs use_dora.
    *((cls, "dora_inputs", v) for cls in (LoraConfig, LoHaConfig, LoKrConfig) for v in [1, "yes", None, True]),
    *((LoraConfig, "ensure_weight_tying", v) for v in [1, "yes", None]),
    *((LoraConfig, "init_lora_weights", v) for v in [1, None, 0.5]),
    *((LoraConfig, "target_modules", v) for v in [[], [1], [""], 3, "(", ""]),
    *((LoraConfig, "modules_to_save", v) for v in ["head", [1], 3]),
    *((LoraConfig, "layers_to_transform", v) for v in [-1, True, [0.5], "0"]),
    *((LoraConfig, "rank_pattern", v) for v in [[("a", 1)], {"a": 0}, {"(": 1}, {1: 1}, {"a": True}]),
    *((LoraConfig, "alpha_pattern", v) for v in [{"a": NAN}, {"a": 1e300}, "a"]),
    *((LoraConfig, "task_type", v) for v in ["NO_SUCH_TASK", 1]),
    *((LoraConfig, "inference_mode", v) for v in [1, None]),
    *((LoraConfig, "auto_mapping", v) for v in ["os", 1]),
    *((LoraConfig, "layers_pattern", v) for v in ["h"]),
    *((LoraConfig, "target_parameters", v) for v in ["weight", 3, [""], {"weight": 1}]),
    *(
        (LoraConfig, "trainable_token_indices", v)
        for v in [[], [-1], [True], [1, 1], "1", 3, {"a": []}, {"a": 1}, {1: [1]}]
    ),
    *((LoKrConfig, "r", v) for v in [0, -1, True, 1.5, None]),
    *((LoKrConfig, "alpha", v) for v in [0, -1, NAN, True]),
    *((LoKrConfig, "decompose_factor", v) for v in [0, -2, True, 1.5, 2**70]),
    *((LoKrConfig, "init_weights", v) for v in [None, 1, "peft"]),
    *((LoKrConfig, name, v) for name in ("rank_dropout", "module_dropout") for v in [1, -0.5, NAN, "0"]),
    *((LoKrConfig, name, 1) for name in ("decompose_both", "use_effective_conv2d", "rank_dropout_scale")),
    *((LoKrConfig, "rank_pattern", v) for v in [["a"], {"a": 0}, {"(": 1}]),
    *((LoHaConfig, "r", v) for v in [0, -1, True, 1.5, None, 2**70]),
    *((LoHaConfig, "alpha", v) for v in [0, -1, NAN, INF, True]),
    *((LoHaConfig, name, v) for name in ("rank_dropout", "module_dropout") for v in [1, -0.5, NAN, True]),
    *((LoHaConfig, name, v) for name in ("use_effective_conv2d", "init_weights") for v in [1, None, "lycoris"]),
    *((LoHaConfig, "rank_pattern", v) for v in [3, {"(": 2}, {"a": 0}, {3: 2}]),
    *((OFTConfig, "oft_block_size", v) for v in [0, -1, True, 1.5, 2**70]),
    *((OFTConfig, "r", v) for v in [8, -1, True]),
    *((OFTConfig, "num_cayley_neumann_terms", v) for v in [0, 65, 2**70, 2.0, True]),
    *((OFTConfig, "eps", v) for v in [0, -1, NAN, INF, True]),
    *((OFTConfig, "module_dropout", v) for v in [1, -0.5, NAN]),
    *((OFTConfig, "bias", v) for v in ["lora_only", None]),
    *((OFTConfig, "coft", v) for v in [1, None]),
]


@pytest.mark.parametrize(("cls", "name", "value"), BAD)
def test_bad_values_are_refused_by_name(cls, name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        cls(**{name: value})


NEEDED = {AdaLoraConfig: {"total_step": 9}, XLoraConfig: {"hidden_size": 16, "adapters": {}}}
NONSENSE = [object(), b"x", 2**70, -1.5, NAN, "(", {1: 2}, [None], {"a": object()}]


@pytest.mark.parametrize(("cls", "name"), [(cls, f.name) for cls, _ in PAIRS for f in dataclasses.fields(cls)])
def test_nonsense_is_refused_by_name_in_every_field(cls, name):
    """Texts and tables that are only kept may hold what they like."""
    kept = {"auto_mapping": dict, "peft_version": str, "base_model_name_or_path": str, "revision": str}
    kept |= {"target_modules": str} if cls is AdaptionPromptConfig else {}
    # Its sign is that of the scale: a negative one means init_r.
    kept |= {"lora_alpha": float} if cls is AdaLoraConfig else {}
    kept |= {"scaling_pass_value": float, "global_scaling_weight": float}
    for value in NONSENSE:
        if isinstance(value, kept.get(name, ())) and value == value:
            continue
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=name):
            cls(**(NEEDED.get(cls, {}) | {name: value}))


NOT_YET = {
    "init_lora_weights": "corda",
    "layer_replication": [(0, 2)],
    "megatron_config": {"a": 1},
    "megatron_core": "os",
    "use_qalora": True,
    "qalora_group_size": 8,
    "alora_invocation_tokens": [1],
    "arrow_config": {"a": 1},
    "eva_config": {"rho": 2},
    "corda_config": {"a": 1},
    "lora_ga_config": {"a": 1},
    "loftq_config": {"loftq_bits": 4},
    "velora_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "use_bdlora": {"a": 1},
    "kasa_config": {"a": 1},
}


@pytest.mark.parametrize(("name", "value"), NOT_YET.items())
def test_fields_that_are_not_implemented_say_so(name, value):
    with pytest.raises(NotImplementedError, match=name):
        LoraConfig(**{name: value})


@pytest.mark.parametrize("name", ["monteclora_config", "kasa_config", "arrow_config", "use_bdlora", "velora_config"])
def test_an_empty_dict_asks_for_the_feature(name):
    """PEFT then takes the defaults of the feature, so that ignoring it would train something else."""
    with pytest.raises(NotImplementedError, match=name):
        LoraConfig(**{name: {}})
    assert LoraConfig(loftq_config={}).loftq_config == {}


def test_every_field_is_checked_or_refused():
    used = {name for cls, name, _ in BAD if cls is LoraConfig} | set(NOT_YET)
    plain = {"peft_type", "peft_version", "base_model_name_or_path", "revision", "fan_in_fan_out", "lora_bias"}
    plain |= {"exclude_modules", "runtime_config"}
    assert used | plain == {f.name for f in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("kind", PeftConfig._by_type.values(), ids=lambda kind: kind.__name__)
def test_every_configuration_has_examples_of_what_it_configures(kind):
    forms = kind._forms
    assert forms or kind is XLoraConfig
    for form in forms:
        assert isinstance(kind(**form.fields), kind), form.name
    assert len({form.name for form in forms}) == len(forms)
