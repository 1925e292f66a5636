"""The training behind the demo: one classifier, trained with peftk, with Hugging Face PEFT and frozen, in turn."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...testing.memory import peak_bytes

FROZEN = "frozen model"
# Steps of the frozen model: enough for a median.
FLOOR_STEPS = 32
HEAD_RATE = 1e-2
WARM_UP = 8
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Batches:
    """Token ids, attention masks and labels of one side of the split: (examples, tokens), the same, (examples,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


class Classifier(nn.Module):
    """A text encoder, the mean of its last hidden states, and a linear classifier."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits, (examples, classes)."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.classifier((hidden * weights).sum(1) / weights.sum(1))


@dataclass
class Arm:
    """One of the trainings that are compared: its model, optimiser, losses and seconds of every step."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def timed(self) -> list[float]:
        """Return the seconds of every step but the first ones (caches, allocator)."""
        return self.seconds[min(WARM_UP, len(self.seconds) // 2) :]

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.timed())

    def ratio(self, floor: Arm) -> float:
        """Median of the ratios of a step's time to that of the floor's step of the same round."""
        first = len(floor.seconds) - len(floor.timed())
        pairs = zip(self.seconds[first:], floor.seconds[first:], strict=False)
        return statistics.median(ours / theirs for ours, theirs in pairs)


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch off the encoder's own dropout, so that all arms see the same numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def linear_names(encoder: nn.Module) -> list[str]:
    """Return the last name of every linear layer of an encoder, its unused pooler left out."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in encoder.named_modules()
            if isinstance(module, nn.Linear) and "pooler" not in name
        }
    )


def frozen_copy(model: Classifier, targets: list[str]) -> Classifier:
    """Return a copy that trains the head only, while the gradient still runs down to the layers that adapters adapt.

    An adapter needs the gradient of its layer's output, and so of all activations above the first adapted layer.
    Asking for it there makes the frozen model's step the same two products a layer, which is the floor that adapters
    add to.
    """
    frozen = copy.deepcopy(model)
    frozen.encoder.requires_grad_(False)

    def ask_for_gradient(module: nn.Module, args: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    for name, module in frozen.encoder.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            module.register_forward_hook(ask_for_gradient)
    return frozen


@torch.no_grad()
def features(model: Classifier, data: Batches) -> Tensor:
    """Return what the classifier of a model sees of every example, (examples, hidden)."""
    head, model.classifier = model.classifier, nn.Identity()
    try:
        return logits(model, data)
    finally:
        model.classifier = head


def converged_head(model: Classifier, data: Batches, steps: int = 1000) -> nn.Linear:
    """Train only the head, to convergence, on the features of the frozen encoder: what no adapter has to beat.

    The whole of the examples is one batch, so a thousand steps take a second or two.
    """
    seen = features(model, data)
    head = copy.deepcopy(model.classifier)
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(head(seen), data.labels).backward()
        optimizer.step()
        schedule.step()
    return head


def make_arm(name: str, model: nn.Module, rate: float, steps: int) -> Arm:
    """Give a model AdamW, its head a rate of its own, with a short warm-up and a linear decay."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if "classifier" in n], "lr": HEAD_RATE},
        {"params": [p for n, p in trained if "classifier" not in n], "lr": rate},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.01)
    warm_up = min(WARM_UP, max(1, steps // 2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / warm_up) * (1 - s / steps))
    return Arm(name, model.train(), optimizer, schedule)


def orders(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of one batch after another, for ever, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, count)
    while True:
        shuffled = torch.randperm(count, generator=generator)
        yield from (chunk for chunk in shuffled.split(batch) if len(chunk) == batch)


def backpropagate(arm: Arm, data: Batches, chosen: Tensor) -> Tensor:
    """Run forward and backward on one batch and return the loss."""
    loss = cross_entropy(arm.model(data.ids[chosen], data.mask[chosen]), data.labels[chosen])
    loss.backward()
    return loss


def step(arm: Arm, data: Batches, chosen: Tensor) -> None:
    """Train on one batch and note loss and time."""
    begin = time.perf_counter()
    arm.optimizer.zero_grad(set_to_none=True)
    loss = backpropagate(arm, data, chosen)
    arm.optimizer.step()
    arm.scheduler.step()
    arm.seconds.append(time.perf_counter() - begin)
    arm.losses.append(loss.item())


def train(
    arms: list[Arm], data: Batches, steps: int, batch: int, seed: int, track: Callable[[Iterable], Iterable]
) -> None:
    """Train all arms on the same batches, one step of each in turn, so that a busy moment hits them alike.

    The frozen arm stops after FLOOR_STEPS: it is there for the time of a step only.
    """
    source = orders(len(data.labels), batch, seed)
    chosen = next(source)
    for arm in arms:
        owned = [*arm.model.parameters(), *arm.model.buffers()]
        arm.peak_bytes = peak_bytes(lambda arm=arm: backpropagate(arm, data, chosen), owned)
        arm.optimizer.zero_grad(set_to_none=True)
    for number in track(range(steps)):
        chosen = next(source)
        turns = [arm for arm in arms if number < FLOOR_STEPS or arm.name != FROZEN]
        for turn in range(len(turns)):
            step(turns[(number + turn) % len(turns)], data, chosen)


def first(data: Batches, count: int) -> Batches:
    """Return the first examples."""
    return Batches(data.ids[:count], data.mask[:count], data.labels[:count])


@torch.no_grad()
def logits(model: nn.Module, data: Batches) -> Tensor:
    """Return the logits of every example in evaluation mode."""
    training = model.training
    model.eval()
    parts = [
        model(data.ids[i : i + EVALUATION_BATCH], data.mask[i : i + EVALUATION_BATCH])
        for i in range(0, len(data.labels), EVALUATION_BATCH)
    ]
    model.train(training)
    return torch.cat(parts)


def accuracy(found: Tensor, data: Batches) -> float:
    """Return the share of right answers."""
    return (found.argmax(1) == data.labels).double().mean().item()


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest magnitude."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def tokenise(tokenizer: Any, texts: list[str], labels: list[int], length: int) -> Batches:
    """Turn texts into tensors of one length."""
    encoded = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    return Batches(encoded["input_ids"], encoded["attention_mask"], torch.tensor(labels))
