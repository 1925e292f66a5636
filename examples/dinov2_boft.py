"""Fine-tune DINOv2 for image classification with BOFT: butterfly rotations of all linear layers, and a new classifier.

    python examples/dinov2_boft.py                                     # a tiny random model, in seconds, offline
    python examples/dinov2_boft.py --model facebook/dinov2-base --images folder --steps 500 --rate 1e-3

The built-in task: circles, squares and crosses, drawn at random. A folder of images has one folder for each class.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoImageProcessor, Dinov2Config, Dinov2ForImageClassification

import peftk

# Newer releases of transformers have other names for the layers of the attention.
TARGETS = ["query", "value", "key", "output.dense", "mlp.fc1", "mlp.fc2"]
RENAMED = ["q_proj", "v_proj", "k_proj", "o_proj", "mlp.fc1", "mlp.fc2"]


def load(source: str | None, classes: int):
    """Return a model: the user's with a new classifier, or a tiny random one for pictures of 28 x 28."""
    if source:
        return Dinov2ForImageClassification.from_pretrained(source, num_labels=classes, ignore_mismatched_sizes=True)
    config = Dinov2Config(
        image_size=28,
        patch_size=7,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        num_labels=classes,
    )
    return Dinov2ForImageClassification(config)


def shapes(count: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Draw circles, squares and crosses: pictures (count, 3, 28, 28), labels, names of the classes."""
    labels = torch.arange(count) % 3
    centre, size = torch.randint(9, 19, (2, count, 1, 1)).float(), torch.randint(5, 8, (count, 1, 1)).float()
    rows, columns = torch.arange(28.0)[:, None], torch.arange(28.0)[None, :]
    down, across = (rows - centre[0]).abs(), (columns - centre[1]).abs()
    circle = (down**2 + across**2).sqrt() <= size
    square = torch.maximum(down, across) <= size
    cross = square & (torch.minimum(down, across) <= 1)
    drawn = torch.stack([circle, square, cross])[labels, torch.arange(count)].float()
    return drawn[:, None].repeat(1, 3, 1, 1) - 0.5, labels, ["circle", "square", "cross"]


def pictures(folder: str, source: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Read a folder with one folder of pictures for each class."""
    from PIL import Image

    processor = AutoImageProcessor.from_pretrained(source)
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(names) for path in sorted((Path(folder) / name).iterdir())]
    read = [processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"] for path, _ in tqdm(files)]
    return torch.cat(read), torch.tensor([label for _, label in files]), names


def main(arguments: list[str] | None = None) -> dict:
    """Train the adapter, save it, load it again, merge it, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a DINOv2 model (default: a tiny random one)")
    parser.add_argument("--images", help="folder with one folder of pictures a class (needs --model)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--output", default="adapters/dinov2_boft")
    options = parser.parse_args(arguments)
    if bool(options.model) != bool(options.images):
        parser.error("--model and --images go together")

    torch.manual_seed(0)
    x, labels, classes = pictures(options.images, options.model) if options.images else shapes(384)
    base = load(options.model, len(classes))
    renamed = any(name.endswith("q_proj") for name, _ in base.named_modules())
    config = peftk.BOFTConfig(
        boft_block_size=4,
        boft_n_butterfly_factor=2,
        boft_dropout=0.1,
        bias="boft_only",
        target_modules=RENAMED if renamed else TARGETS,
        modules_to_save=["classifier"],
    )
    model = peftk.get_peft_model(copy.deepcopy(base), config)
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.rate)
    model.train()
    losses = []
    for _ in tqdm(range(options.steps), desc="BOFT"):
        chosen = torch.randint(len(labels), (options.batch,))
        loss = model(pixel_values=x[chosen], labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")

    model.eval()
    model.save_pretrained(options.output)
    loaded = peftk.PeftModel.from_pretrained(copy.deepcopy(base), options.output)
    with torch.no_grad():
        ours, theirs = (m(pixel_values=x[:64]).logits for m in (model, loaded))
        flat = loaded.merge_and_unload()(pixel_values=x[:64]).logits
    right = (ours.argmax(1) == labels[:64]).double().mean().item()
    differences = {"loaded": (theirs - ours).abs().max().item(), "merged": (flat - ours).abs().max().item()}
    print(f"{right:.0%} right; saved to {options.output}; outputs differ, ", end="")
    print(f"loaded: {differences['loaded']:.1e}, merged: {differences['merged']:.1e}")
    return {"losses": losses, "differences": differences, "largest": ours.abs().max().item(), "model": model}


if __name__ == "__main__":
    main()
