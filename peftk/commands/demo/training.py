"""The training behind the demos: one task, several models of it trained on the same batches, in turn."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...testing.memory import peak_bytes

OURS = "peftk"
PEFT = "Hugging Face PEFT"
FROZEN = "frozen model"
# The head is trained alone first, at the first rate, and goes on beside the adapter at the second.
HEAD_RATES = (1e-2, 1e-3)
# Enough that the head does not learn the examples by heart, and leave an adapter nothing to learn from.
HEAD_DECAY = 1.0
HEAD_STEPS = 1000
WARM_UP = 8
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Batches:
    """The model's arguments for every example (token ids and attention masks, or pictures), and the labels."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def take(self, chosen: Any) -> Batches:
        """Return the chosen examples: indices or a slice."""
        return Batches({name: part[chosen] for name, part in self.inputs.items()}, self.labels[chosen])


@dataclass(frozen=True)
class Task:
    """A pretrained model with a last layer `classifier`, the layers of it that are adapted, and what it has to learn.

    `number` is the place of the task in the settings of a method: 0 for the text encoder, 1 for the ConvNet.
    """

    name: str
    question: str
    number: int
    model: Any
    targets: list[str]
    data: Batches
    held_out: Batches
    batch: int
    classes: tuple[str, ...]


@dataclass
class Arm:
    """One of the trainings that are compared: its model, optimiser, losses and seconds of every step.

    `limit` is how many steps it takes at most, `budget` how many seconds; `allocate` is told the number of every step.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    limit: int
    budget: float = float("inf")
    allocate: Callable[[int], Any] | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def goes_on(self) -> bool:
        """Say whether the arm takes the next step."""
        over = len(self.seconds) >= 4 and sum(self.seconds) > self.budget
        return len(self.seconds) < self.limit and not over

    def timed(self) -> list[float]:
        """Return the seconds of every step but the first ones (caches, allocator)."""
        return self.seconds[min(WARM_UP, len(self.seconds) // 2) :]

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.timed())

    def ratio(self, floor: Arm) -> float:
        """Median of the ratios of a step's time to that of the floor's step of the same round."""
        common = min(len(self.seconds), len(floor.seconds))
        first = min(WARM_UP, common // 2)
        pairs = zip(self.seconds[first:common], floor.seconds[first:common], strict=True)
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


def frozen_copy(model: nn.Module, targets: list[str]) -> nn.Module:
    """Return a copy that trains the head only, while the gradient still runs down to the layers that adapters adapt.

    An adapter needs the gradient of its layer's output, and so of all activations above the first adapted layer.
    Asking for it there makes the frozen model's step the same two products a layer, which is the floor that adapters
    add to.
    """
    frozen = copy.deepcopy(model)
    frozen.requires_grad_(False)
    frozen.classifier.requires_grad_(True)

    def ask_for_gradient(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    for name, module in frozen.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.rpartition(".")[2] in targets:
            module.register_forward_hook(ask_for_gradient)
    return frozen


@torch.no_grad()
def features(model: nn.Module, data: Batches) -> Tensor:
    """Return what the classifier of a model sees of every example, (examples, hidden)."""
    head, model.classifier = model.classifier, nn.Identity()
    try:
        return logits(model, data)
    finally:
        model.classifier = head


def with_trained_head(task: Task) -> tuple[Task, float]:
    """Train only the head of a task's model, to convergence; return the task with it, and the share of right answers.

    An adapter then starts from the best that the frozen model can do, instead of carrying the gradients of a random
    head into it (Kumar et al. 2022, arXiv:2202.10054). All examples are one batch of the frozen model's features, so
    a thousand steps take a second or two.
    """
    model = copy.deepcopy(task.model)
    seen, head = features(model, task.data), model.classifier
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_RATES[0], weight_decay=HEAD_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, HEAD_STEPS)
    for _ in range(HEAD_STEPS):
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(head(seen), task.data.labels).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return dataclasses.replace(task, model=model), accuracy(logits(model, task.held_out), task.held_out)


def make_arm(name: str, model: nn.Module, rate: float, steps: int, limit: int | None = None) -> Arm:
    """Give a model AdamW, its head a rate of its own, with a short warm-up and a linear decay over `steps`."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if "classifier" in n.split(".")], "lr": HEAD_RATES[1]},
        {"params": [p for n, p in trained if "classifier" not in n.split(".")], "lr": rate},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.01)
    warm_up = min(WARM_UP, max(1, steps // 2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / warm_up) * (1 - s / steps))
    allocate: Any = None
    if getattr(model, "peft_type", None) == "ADALORA":
        allocate = model.get_submodule("base_model").update_and_allocate
    return Arm(name, model.train(), optimizer, schedule, steps if limit is None else limit, allocate=allocate)


def orders(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of one batch after another, for ever, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, count)
    while True:
        shuffled = torch.randperm(count, generator=generator)
        yield from (chunk for chunk in shuffled.split(batch) if len(chunk) == batch)


def backpropagate(arm: Arm, part: Batches) -> Tensor:
    """Run forward and backward on one batch and return the loss."""
    loss = cross_entropy(arm.model(**part.inputs), part.labels)
    loss.backward()
    return loss


def step(arm: Arm, part: Batches) -> None:
    """Train on one batch and note loss and time."""
    begin = time.perf_counter()
    arm.optimizer.zero_grad(set_to_none=True)
    loss = backpropagate(arm, part)
    arm.optimizer.step()
    arm.scheduler.step()
    if arm.allocate is not None:
        arm.allocate(len(arm.losses) + 1)
    arm.seconds.append(time.perf_counter() - begin)
    arm.losses.append(loss.item())


def train(
    arms: list[Arm], data: Batches, steps: int, batch: int, seed: int, track: Callable[[Iterable[Any]], Iterable[Any]]
) -> None:
    """Train all arms on the same batches, one step of each in turn, so that a busy moment hits them alike."""
    source = orders(len(data.labels), batch, seed)
    part = data.take(next(source))
    for arm in arms:
        owned = [*arm.model.parameters(), *arm.model.buffers()]
        arm.peak_bytes = peak_bytes(functools.partial(backpropagate, arm, part), owned)
        arm.optimizer.zero_grad(set_to_none=True)
    for number in track(range(steps)):
        part = data.take(next(source))
        turns = [arm for arm in arms if arm.goes_on()]
        for turn in range(len(turns)):
            step(turns[(number + turn) % len(turns)], part)


@torch.no_grad()
def logits(model: nn.Module, data: Batches) -> Tensor:
    """Return the logits of every example in evaluation mode."""
    training = model.training
    model.eval()
    count = len(data.labels)
    parts = [model(**data.take(slice(i, i + EVALUATION_BATCH)).inputs) for i in range(0, count, EVALUATION_BATCH)]
    model.train(training)
    return torch.cat(parts)


def accuracy(found: Tensor, data: Batches) -> float:
    """Return the share of right answers."""
    return (found.argmax(1) == data.labels).double().mean().item()


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest magnitude."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
