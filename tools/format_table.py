"""The table of methods, layers and dialects in docs/formats.md: ``python -m tools.format_table [--check]``.

Every entry is a run. "written": an adapter that was trained here is turned into the dialect, and the program that the
column names gives its outputs with it. "read": a file that this program has written is loaded here, with its outputs.
ComfyUI and kohya's scripts are in no package index; their files are those that the tests describe, read back here.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftk
from peftk.checkpoint.container import CheckpointError
from peftk.models.adapter_source import read_source
from peftk.models.convert import convert
from peftk.models.convert_plan import plan_for
from peftk.testing.compare import assert_close

from .support_table import run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "formats.md"
BEGIN, END = "<!-- format table: begin -->", "<!-- format table: end -->"

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 16), (3, 12)),
    "1 x 1 convolution": (lambda: nn.Conv2d(12, 16, 1), (2, 12, 4, 4)),
    "convolution, 2-D": (lambda: nn.Conv2d(12, 16, 3, padding=1), (2, 12, 4, 4)),
    "convolution, 1-D": (lambda: nn.Conv1d(12, 16, 3), (2, 12, 6)),
    "convolution, 3-D": (lambda: nn.Conv3d(4, 8, (1, 2, 3)), (1, 4, 2, 3, 4)),
    "depthwise convolution": (lambda: nn.Conv2d(12, 12, 3, groups=12), (2, 12, 4, 4)),
    "embedding": (lambda: nn.Embedding(12, 16), (3, 5)),
}
METHODS: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda library: library.LoraConfig(r=12, lora_alpha=3, target_modules=["layer"]),
    "DoRA": lambda library: library.LoraConfig(r=12, lora_alpha=3, use_dora=True, target_modules=["layer"]),
    "DoRA of inputs": lambda library: library.LoraConfig(
        r=12, lora_alpha=3, use_dora=True, dora_inputs=True, target_modules=["layer"]
    ),
    "LoHa": lambda library: library.LoHaConfig(r=2, alpha=3, target_modules=["layer"]),
    "LoKr": lambda library: library.LoKrConfig(r=1, alpha=3, target_modules=["layer"]),
    "whole weights, as LoKr": lambda library: library.LoKrConfig(
        r=999, alpha=999, decompose_factor=1, target_modules=["layer"]
    ),
    "OFT on the output": lambda library: library.OutputOFTConfig(
        block_size=2, use_rescale=True, constraint=0.05, target_modules=["layer"]
    ),
    "BOFT on the output": lambda library: library.OutputOFTConfig(
        block_size=2, butterfly_factors=2, target_modules=["layer"]
    ),
}
LYCORIS: dict[str, dict[str, Any]] = {
    "LoRA": {"algo": "locon", "linear_dim": 2, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 3},
    "DoRA": {"algo": "locon", "linear_dim": 2, "conv_dim": 2, "dora_wd": True, "wd_on_output": True},
    "DoRA of inputs": {"algo": "locon", "linear_dim": 2, "conv_dim": 2, "dora_wd": True, "wd_on_output": False},
    "LoHa": {"algo": "loha", "linear_dim": 2, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 3},
    "LoKr": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "conv_dim": 1, "conv_alpha": 3},
    "whole weights, as LoKr": {"algo": "full"},
    "OFT on the output": {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 4, "rescaled": True, "constraint": 0.05},
    "BOFT on the output": {"algo": "boft", "linear_dim": 4, "conv_dim": 4},
}


class No(Exception):
    """A program does not have, or refuses, what is asked of it."""


class Subject:
    """One layer in a model, as every library sees it."""

    def __init__(self, layer: str) -> None:
        self.make, shape = LAYERS[layer]
        torch.manual_seed(3)
        self.x = torch.randint(12, shape) if layer == "embedding" else torch.randn(shape)

    def model(self) -> nn.Module:
        """Return a fresh model, the same every time."""
        from diffusers.loaders import PeftAdapterMixin
        from diffusers.models.modeling_utils import ModelMixin

        make = self.make

        class Net(ModelMixin, PeftAdapterMixin):
            def __init__(self) -> None:
                super().__init__()
                self.layer = make()

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x)

        torch.manual_seed(0)
        return Net().eval()

    def output(self, model: nn.Module) -> Tensor:
        """Run a model."""
        with torch.no_grad():
            return model.eval()(self.x)


def _train(parameters: Any) -> None:
    torch.manual_seed(1)
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5)


# -- what each program writes and reads -------------------------------------------------------------------------------


def _of_peft(subject: Subject, method: str, out: Path) -> Tensor:
    import peft

    try:
        if not hasattr(peft, type(METHODS[method](peftk)).__name__):
            raise No("it has no such method")
        model = peft.get_peft_model(subject.model(), METHODS[method](peft))
        _train(model.parameters())
        expected = subject.output(model)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise No(str(error)) from None
    model.save_pretrained(out)
    return expected


def _by_peft(subject: Subject, path: Path) -> Tensor:
    import peft

    return subject.output(peft.PeftModel.from_pretrained(subject.model(), path))


def _lycoris(model: Any) -> Any:
    """Return LyCORIS, whose settings belong to its class, with those for a model."""
    import lycoris

    kind = type(model.layer).__name__
    lycoris.LycorisNetwork.apply_preset({"target_module": [kind], "target_name": [], "lora_prefix": "lycoris"})
    return lycoris


def _of_lycoris(subject: Subject, method: str, out: Path) -> Tensor:
    model = subject.model()
    lycoris = _lycoris(model)
    try:
        network = lycoris.create_lycoris(model, 1.0, **LYCORIS[method])
        if not network.loras:
            raise No("it has no such layer")
        network.apply_to()
        # Trained biases, which come with whole weights, are refused here.
        _train(parameter for parameter in network.parameters() if parameter.dim() != 1)
        expected = subject.output(model)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise No(str(error)) from None
    network.save_weights(str(out), torch.float32, {})
    return expected


def _by_lycoris(subject: Subject, path: Path) -> Tensor:
    model = subject.model()
    network, _ = _lycoris(model).create_lycoris_from_weights(1.0, str(path), model)
    if not network.loras:
        raise No("it has no such layer")
    network.apply_to()
    return subject.output(model)


def _of_diffusers(subject: Subject, method: str, out: Path) -> Tensor:
    import peft

    if method not in ("LoRA", "DoRA"):
        raise No("it writes LoRA alone")
    model: Any = subject.model()
    try:
        model.add_adapter(METHODS[method](peft))
        _train(model.parameters())
        expected = subject.output(model)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise No(str(error)) from None
    model.save_lora_adapter(out.parent, weight_name=out.name)
    return expected


def _by_diffusers(subject: Subject, path: Path) -> Tensor:
    model: Any = subject.model()
    model.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="unet")
    return subject.output(model)


def _by_peftk(subject: Subject, path: Path) -> Tensor:
    return subject.output(peftk.PeftModel.from_pretrained(subject.model(), path))


class Program:
    """A dialect and the program that stands for it."""

    def __init__(self, title: str, dialect: str, write: Any, read: Any) -> None:
        self.title, self.dialect, self.write, self.read = title, dialect, write, read


PROGRAMS = (
    Program("PEFT", "peft", _of_peft, _by_peft),
    Program("LyCORIS", "lycoris", _of_lycoris, _by_lycoris),
    Program("diffusers", "diffusers", _of_diffusers, _by_diffusers),
    Program("kohya (read here)", "kohya", None, _by_peftk),
    Program("ComfyUI (read here)", "comfyui", None, _by_peftk),
)


def written(method: str, layer: str, program: Program, folder: Path) -> bool:
    """Say whether the program gives the outputs of an adapter that was trained here and turned into its dialect.

    Raises:
        AssertionError: It reads the file, and gives other outputs.
    """
    subject = Subject(layer)
    try:
        model = peftk.get_peft_model(subject.model(), METHODS[method](peftk))
    except (NotImplementedError, TypeError, ValueError):
        # peftk has no such layer, or refuses it.
        return False
    _train(model.parameters())
    expected = subject.output(model)
    model.save_pretrained(folder / "peftk")
    # PEFT's own dialect is what is saved.
    out = folder / "peftk"
    if program.dialect != "peft":
        out = folder / "out.safetensors"
        try:
            source = read_source(folder / "peftk")
            convert(source, plan_for(source, program.dialect), out)
        except CheckpointError:
            return False
    try:
        found = program.read(subject, out)
    except (No, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        # How these programs refuse a file; one that was accepted and is no more changes the page, which a test holds.
        return False
    assert_close(found, expected.double(), torch.float32)
    assert not torch.allclose(expected, subject.output(subject.model()))
    return True


def read(method: str, layer: str, program: Program, folder: Path) -> bool:
    """Say whether a file of the program gives its outputs here.

    Raises:
        AssertionError: It is loaded, and gives other outputs.
    """
    if program.write is None:
        return False
    subject = Subject(layer)
    path = folder / ("theirs" if program.dialect == "peft" else "theirs.safetensors")
    try:
        expected = program.write(subject, method, path)
    except No:
        return False
    try:
        found = _by_peftk(subject, path)
    except (NotImplementedError, ValueError):
        # A refusal; what is loaded must have the outputs.
        return False
    assert_close(found, expected.double(), torch.float32)
    assert not torch.allclose(expected, subject.output(subject.model()))
    return True


def entry(method: str, layer: str, program: Program) -> str:
    """Run one entry of the table."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = [
            "written" if written(method, layer, program, Path(one)) else "",
            "read" if read(method, layer, program, Path(other)) else "",
        ]
    return ", ".join(filter(None, words)) or "-"


def table() -> str:
    """Return the table in Markdown."""
    lines = [f"| method | layer | {' | '.join(p.title for p in PROGRAMS)} |", "|---|---|" + "---|" * len(PROGRAMS)]
    for method in METHODS:
        for layer in LAYERS:
            entries = [entry(method, layer, program) for program in PROGRAMS]
            lines.append(f"| {method} | {layer} | {' | '.join(entries)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the table, or with --check say whether it is up to date."""
    return run("tools.format_table", __doc__, PAGE, table, BEGIN, END, arguments)


if __name__ == "__main__":
    sys.exit(main())
