"""What the table of methods and layers tries: small layers of every kind with random adapters, and what they refuse.

The kinds of layers come from the layer classes, and small configurations from the classes of configurations.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftk import AdaptionPromptConfig, LoraConfig, XLoraConfig, get_peft_model
from peftk.nn import LAYERS, AdapterLayer, PeftConfig, layer_class_for
from peftk.nn.base.kinds import KINDS

FEATURES = 16
WORDS = 11


@dataclass(frozen=True)
class Subject:
    """One method on one kind of layer.

    Attributes:
        method: Its name.
        layer: The kind of layer.
        make: Returns a module with a random adapter, in a dtype.
        example: Returns an input for it, in a dtype.
        refuses: The names of `PROBES` that it refuses.
    """

    method: str
    layer: str
    make: Callable[[torch.dtype], nn.Module]
    example: Callable[[torch.dtype], Tensor]
    refuses: frozenset[str]


def _linear(dtype: torch.dtype = torch.float32, **geometry: Any) -> nn.Module:
    return nn.Linear(FEATURES, FEATURES, dtype=dtype)


def _gpt2_linear(dtype: torch.dtype = torch.float32, **geometry: Any) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(FEATURES, FEATURES).to(dtype)


def _convolution(
    kind: str, dtype: torch.dtype = torch.float32, size: int | tuple[int, ...] = 3, **geometry: Any
) -> nn.Module:
    return getattr(nn, kind)(FEATURES, FEATURES, size, dtype=dtype, **geometry)


def _embedding(dtype: torch.dtype = torch.float32, **geometry: Any) -> nn.Module:
    return nn.Embedding(WORDS, FEATURES, dtype=dtype)


CONVOLUTIONS = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3}
"""The kinds of convolutions, and their dimensions."""

BASES: dict[str, Callable[..., nn.Module]] = {
    "Linear": _linear,
    "Conv1D": _gpt2_linear,
    **{kind: functools.partial(_convolution, kind) for kind in CONVOLUTIONS},
    "Embedding": _embedding,
}
"""A kind of layer to a function that makes a small one."""


def _input(kind: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "Embedding":
        return torch.randint(WORDS, (2, 5), generator=generator)
    shape = (2, FEATURES, *[6] * CONVOLUTIONS[kind]) if kind in CONVOLUTIONS else (2, 9, FEATURES)
    return torch.randn(shape, generator=generator).to(dtype)


def _filled(module: nn.Module) -> nn.Module:
    """Give every trained parameter values that are not those of an untrained adapter."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.requires_grad:
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data = (parameter.data + noise).to(parameter.dtype)
    return module


def _adapted(config: Callable[[], PeftConfig], base: nn.Module) -> AdapterLayer:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = config()
        return _filled(layer_class_for(one, base)(base, one))


# -- what a layer may refuse ----------------------------------------------------------------------------------------


class _Quantised(nn.Linear):
    """A linear layer whose weight is stored in 8 bits, as libraries that quantise models have it."""

    def __init__(self, in_features: int = FEATURES, out_features: int = FEATURES) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.ones(out_features, in_features, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight in the dtype of x."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def _geometry(**geometry: Any) -> Callable[[Callable[[], PeftConfig], str, dict], None]:
    def probe(config: Callable[[], PeftConfig], kind: str, usual: dict[str, Any]) -> None:
        if kind in CONVOLUTIONS:
            _adapted(config, BASES[kind](**{**usual, **geometry}))(_input(kind, torch.float32))

    return probe


def _uneven(config: Callable[[], PeftConfig], kind: str, usual: dict[str, Any]) -> None:
    _geometry(size=(1, 3, 2)[: CONVOLUTIONS.get(kind)])(config, kind, usual)


def _merge(config: Callable[[], PeftConfig], kind: str, usual: dict[str, Any]) -> None:
    _adapted(config, BASES[kind](**usual)).merge()


def _merge_groups(config: Callable[[], PeftConfig], kind: str, usual: dict[str, Any]) -> None:
    if kind not in CONVOLUTIONS:
        return
    try:
        layer = _adapted(config, BASES[kind](**usual, groups=2))
    except ValueError:
        # Groups are refused as such.
        return
    layer.merge()


def _several(config: Callable[[], PeftConfig], kind: str, usual: dict[str, Any]) -> None:
    layer = _adapted(config, BASES[kind](**usual))
    layer.add_adapter("other", config())
    layer.set_adapter(["default", "other"])
    layer(_input(kind, torch.float32))


def _quantised(config: Callable[[], PeftConfig], kind: str, usual: dict[str, Any]) -> None:
    if kind == "Linear":
        _adapted(config, _Quantised())(_input(kind, torch.float32))


def _mixed(config: Callable[[], PeftConfig], kind: str, usual: dict[str, Any]) -> None:
    both = config(), config()
    for one in both:
        one.target_modules = ["0"]
    # A schedule belongs to one trained adapter.
    both[1].inference_mode = True
    model = get_peft_model(nn.Sequential(BASES[kind](**usual)), both[0])
    model.add_adapter("other", both[1])
    model.eval()(_input(kind, torch.float32), adapter_names=["default", "other"])


PROBES: dict[str, Callable[[Callable[[], PeftConfig], str, dict], None]] = {
    "groups": _geometry(groups=2),
    "dilation": _geometry(dilation=2),
    "strides": _geometry(stride=2),
    "padding modes": _geometry(padding=1, padding_mode="reflect"),
    "kernels that are not square": _uneven,
    "merging": _merge,
    "merging with groups": _merge_groups,
    "several active adapters": _several,
    "an nn.Linear quantised by a class of your own": _quantised,
    "batches that mix adapters": _mixed,
}
"""What a layer may refuse by name, and how it is tried."""


def _refused(calls: dict[str, Callable[[], object]]) -> frozenset[str]:
    """Return the names of the calls that are refused; one that fails otherwise is an error."""
    found = set()
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except (TypeError, ValueError, NotImplementedError):
            found.add(name)
    return frozenset(found)


def _refused_by_layer(config: Callable[[], PeftConfig], kind: str, usual: dict[str, Any]) -> frozenset[str]:
    one_by_one = usual.get("size") == 1
    meaningless = ("dilation", "kernels that are not square") if one_by_one else ()
    return _refused(
        {
            name: functools.partial(probe, config, kind, usual)
            for name, probe in PROBES.items()
            if name not in meaningless
        }
    )


# -- the subjects ---------------------------------------------------------------------------------------------------


def _attention(name: str, fields: dict[str, Any]) -> Iterator[Subject]:
    """Yield the attention modules that have adaption prompts, each in a model of one layer."""
    import transformers

    from peftk.nn.adaption_prompt.config import ATTENTIONS

    sizes: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": FEATURES, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": FEATURES}
    gpt2 = {"vocab_size": WORDS, "n_embd": FEATURES, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}

    def model_of(kind: str) -> nn.Module:
        torch.manual_seed(0)
        settings = transformers.AutoConfig.for_model(kind, **(gpt2 if kind == "gpt2" else sizes))
        return transformers.AutoModel.from_config(settings)

    def adapted(model: nn.Module) -> nn.Module:
        return get_peft_model(model, AdaptionPromptConfig(**fields))

    def several() -> None:
        model = adapted(model_of("llama"))
        model.add_adapter("other", AdaptionPromptConfig(**fields))
        model.set_adapter(["default", "other"])

    def quantised() -> None:
        model = model_of("llama")
        attention = model.layers[0].self_attn
        for part in ATTENTIONS["llama"].parts:
            old = getattr(attention, part)
            setattr(attention, part, _Quantised(old.in_features, old.out_features))
        adapted(model)(tokens)

    tokens = _input("Embedding", torch.float32)
    refuses = _refused(
        {
            "merging": lambda: adapted(model_of("llama")).merge_adapter(),
            "several active adapters": several,
            "an nn.Linear quantised by a class of your own": quantised,
            "batches that mix adapters": lambda: adapted(model_of("llama"))(tokens, adapter_names=["default"] * 2),
        }
    )
    for kind in ATTENTIONS:

        def make(dtype: torch.dtype, kind: str = kind) -> nn.Module:
            return _LastState(_filled(adapted(model_of(kind).to(dtype)))).eval()

        yield Subject(name, f"{kind} attention", make, lambda dtype: tokens, refuses)


class _LastState(nn.Module):
    """A model that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the last hidden state."""
        return self.model(tokens).last_hidden_state


def _of_kind(name: str, config: Callable[[], PeftConfig], kind: str) -> Subject | None:
    usual: dict[str, Any] = {}
    layer = KINDS[kind]
    try:
        _adapted(config, BASES[kind]())
    except (TypeError, ValueError, NotImplementedError):
        if kind not in CONVOLUTIONS:
            return None
        usual, layer = {"size": 1}, f"1x1 {layer}"
        _adapted(config, BASES[kind](**usual))

    def make(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(3)
        return _adapted(config, BASES[kind](dtype=dtype, **usual))

    return Subject(name, layer, make, lambda dtype: _input(kind, dtype), _refused_by_layer(config, kind, usual))


class _Weighted(nn.Module):
    """A layer with two experts, weighted for every token."""

    def __init__(self, layer: AdapterLayer, weights: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer with the weights."""
        with self.layer.gates.using(self.weights):
            return self.layer(x)


def _experts() -> Iterator[Subject]:
    """Yield the layers that can hold the experts of X-LoRA."""
    from peftk.nn.xlora.layer import GATED, Gates

    settings = XLoraConfig(hidden_size=FEATURES, adapters={"0": "", "1": ""})

    def mixture(kind: str, base: nn.Module, dtype: torch.dtype = torch.float32) -> _Weighted:
        torch.manual_seed(3)
        config = LoraConfig(r=4, init_lora_weights=False)
        layer = GATED[layer_class_for(config, base)](base, config, "0")
        layer.add_adapter("1", config)
        layer.set_adapter(["0", "1"])
        layer.gates = Gates(settings, ["0", "1"])
        x = _input(kind, dtype)
        tokens = (x.shape[0], 1) if kind in CONVOLUTIONS else x.shape[:2]
        return _Weighted(_filled(layer), torch.rand(*tokens, 1, 2).to(dtype))

    def together(kind: str) -> None:
        model = mixture(kind, BASES[kind]())
        model(_input(kind, torch.float32))

    def mixed(kind: str) -> None:
        config = LoraConfig(r=4, target_modules=["0"])
        with tempfile.TemporaryDirectory() as folder:
            get_peft_model(nn.Sequential(BASES[kind]()), config).save_pretrained(folder)
            one = XLoraConfig(hidden_size=FEATURES, adapters={"one": folder})
            model = get_peft_model(nn.Sequential(BASES[kind]()), one)
        model(_input(kind, torch.float32), adapter_names=["0", "0"])

    for kind in KINDS:
        if not any(kind in layer.base_kinds for layer in GATED.values()):
            continue

        def make(dtype: torch.dtype, kind: str = kind) -> nn.Module:
            return mixture(kind, BASES[kind](dtype=dtype), dtype)

        def example(dtype: torch.dtype, kind: str = kind) -> Tensor:
            return _input(kind, dtype)

        refuses = _refused(
            {
                "merging": lambda kind=kind: mixture(kind, BASES[kind]()).layer.merge(),
                "several active adapters": functools.partial(together, kind),
                "an nn.Linear quantised by a class of your own": lambda kind=kind: mixture(kind, _Quantised()),
                "batches that mix adapters": functools.partial(mixed, kind),
            }
        )
        yield Subject("X-LoRA", KINDS[kind], make, example, refuses)


def subjects() -> Iterator[Subject]:
    """Yield every method on every kind of layer that it wraps.

    Raises:
        AttributeError: The configuration of a layer class has no `_forms`.
    """
    for config_class in dict.fromkeys(layer.config_class for layer in LAYERS):
        classes = [layer for layer in LAYERS if layer.config_class is config_class]
        kinds = [kind for kind in KINDS if any(kind in layer.base_kinds for layer in classes)]
        for form in config_class._forms:
            if not kinds:
                yield from _attention(form.name, form.fields)
            for kind in form.kinds or kinds:
                found = _of_kind(form.name, lambda c=config_class, f=form.fields: c(**f), kind)
                if found is not None:
                    yield found
    yield from _experts()
