"""The picture task: a small ConvNet learns scikit-learn's digits upright, and then has to read them turned.

The network is trained here, in a second or two, on upright digits, and frozen. What is adapted are its convolutions:
one with a stride, one with a plain 3x3 kernel and one 1x1. The digits come with scikit-learn, so that the task is the
same on every machine and needs no network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from ...nn import LAYERS
from .recipes import Method
from .text import need
from .training import Batches, Task

TARGETS = ["stride", "wide", "point"]
BATCH = 64
PRETRAINING_STEPS = 400
_TRAIN = 1200


class ConvNet(nn.Module):
    """Four convolutions and a linear classifier for pictures of 8 x 8 grey values."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.stride = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(64, 64, 3, padding=1)
        self.point = nn.Conv2d(64, 32, 1)
        self.classifier = nn.Linear(32, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the logits, (examples, classes), of pictures (examples, 1, 8, 8)."""
        x = relu(self.first(pictures))
        x = relu(self.stride(x))
        x = relu(self.wide(x))
        return self.classifier(relu(self.point(x)).amax((2, 3)))


def applies(method: Method) -> bool:
    """Say whether a method has a layer for convolutions; X-LoRA has, but reads the hidden states of a transformer."""
    return not method.experts and any(
        layer.config_class.__name__ == method.config and "Conv2d" in layer.base_kinds for layer in LAYERS
    )


def _digits() -> tuple[Tensor, Tensor]:
    found = need("sklearn.datasets").load_digits()
    pictures = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    return pictures, torch.from_numpy(found.target).long()


def _pretrain(model: nn.Module, pictures: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (128,))
        cross_entropy(model(pictures[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def make_task(seed: int, pretraining_steps: int = PRETRAINING_STEPS) -> Task:
    """Train the ConvNet on upright digits and return the task of reading them turned by a quarter."""
    pictures, labels = _digits()
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    seen, unseen = order[:_TRAIN], order[_TRAIN:]
    model = ConvNet()
    _pretrain(model, pictures[seen], labels[seen], pretraining_steps)
    with torch.no_grad():
        right = (model.eval()(pictures[unseen]).argmax(1) == labels[unseen]).double().mean().item()
    model.requires_grad_(True)
    turned = pictures.rot90(1, (2, 3)).contiguous()
    data, held_out = (Batches({"pictures": turned[side]}, labels[side]) for side in (seen, unseen))
    question = f"a ConvNet that reads {right:.1%} of scikit-learn's digits upright: which digit, turned by a quarter?"
    return Task("ConvNet", question, 1, model, TARGETS, data, held_out, BATCH, tuple("0123456789"))
