"""Whole training steps: models of several shapes, adapted by each library, and the arms that run them."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peftk
from peftk.testing.compare import LIMITS

from . import truth
from .arms import Arm
from .methods import METHODS, Cell

F32 = torch.float32
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Shape:
    """A model with its input.

    Args:
        name: What the report calls it.
        tokens: The rows of its linear layers in a step.
        hidden: Its width, to which the sizes of adapters are fitted.
        make: Returns the model.
        loss: Runs the model and returns the loss.
        targets: The last names of the layers that are adapted.
        square: Those that are square, or of sizes that the blocks of every method divide.
    """

    def __init__(
        self,
        name: str,
        tokens: int,
        hidden: int,
        make: Callable[[], nn.Module],
        loss: Callable[[nn.Module], Tensor],
        targets: tuple[str, ...],
        square: tuple[str, ...],
    ) -> None:
        self.name, self.tokens, self.hidden, self.make = name, tokens, hidden, make
        self.loss, self.targets, self.square = loss, targets, square

    def targets_of(self, method: str) -> list[str]:
        """Return the layers that a method is put on."""
        return list(self.square if method == "c3a" else self.targets)


def llama(hidden: int, intermediate: int, tokens: int) -> Shape:
    """Return a small LLaMA of four layers."""
    ids = (torch.arange(tokens) * 7 % 256)[None]

    def make() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": 16}
        options = {"num_hidden_layers": 4, "max_position_embeddings": tokens, "use_cache": False}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **options))

    def loss(model: nn.Module) -> Tensor:
        found: Tensor = model(input_ids=ids, labels=ids).loss
        return found

    return Shape(f"LLaMA {hidden}", tokens, hidden, make, loss, LINEAR, LINEAR[:4])


def vit() -> Shape:
    """Return a small ViT of four layers, on two pictures of 256 patches."""
    hidden = 512
    pictures = torch.sin(torch.arange(2 * 3 * 128 * 128, dtype=F32)).view(2, 3, 128, 128)

    def make() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 8}
        return ViTForImageClassification(
            ViTConfig(num_hidden_layers=4, image_size=128, patch_size=8, num_labels=10, **sizes)
        )

    def loss(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        found: Tensor = model(pixel_values=pictures.to(dtype), labels=torch.tensor([1, 2])).loss
        return found

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    return Shape("ViT 512", 514, hidden, make, loss, targets, targets)


def unet_block() -> Shape:
    """Return a block of Stable Diffusion's UNet, 320 channels on 16 x 16 places."""
    image = torch.sin(torch.arange(320 * 256, dtype=F32)).view(1, 320, 16, 16)
    generator = torch.Generator().manual_seed(1)
    time, text = torch.randn(1, 1280, generator=generator), torch.randn(1, 77, 768, generator=generator)

    def make() -> nn.Module:
        from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D

        sizes = {"in_channels": 320, "out_channels": 320, "temb_channels": 1280, "cross_attention_dim": 768}
        return CrossAttnDownBlock2D(**sizes, num_layers=2, num_attention_heads=8)

    def loss(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        # PEFT's and this package's models hand arguments on.
        x, e, t = (v.to(dtype) for v in (image, time, text))
        found: Tensor = model(hidden_states=x, temb=e, encoder_hidden_states=t)[0]
        return found.float().square().mean()

    targets = ("to_q", "to_k", "to_v", "to_out.0", "proj", "ff.net.2")
    return Shape("UNet block", 256, 320, make, loss, targets, targets[:4])


class Step:
    """A training step of a model, without the optimizer.

    Args:
        name: The arm.
        model: The model.
        loss: Runs it and returns the loss.
        reference: The loss that is expected; None for the arm that gives it.
        note: What a reader should know.
    """

    def __init__(
        self, name: str, model: nn.Module, loss: Callable[[nn.Module], Tensor], reference: Tensor | None, note: str
    ) -> None:
        self.model, self.loss, self.reference = model.train(), loss, reference
        self.trained = [p for p in model.parameters() if p.requires_grad]
        limit = 10 * max(LIMITS[next(model.parameters()).dtype], LIMITS[F32])
        self.arm = Arm(name, self.step, self.check, limit, lambda: list(model.parameters()), note)

    def step(self) -> Tensor:
        """Run forward and backward."""
        for p in self.trained:
            p.grad = None
        loss = self.loss(self.model)
        loss.backward()
        return loss

    def check(self) -> dict[str, float]:
        """Return how far the loss is from that of the first arm, relative to it."""
        loss = self.step().detach()
        return {"loss": 0.0} if self.reference is None else truth.errors({"loss": loss}, {"loss": self.reference})


def frozen(model: nn.Module) -> nn.Module:
    """Let gradients pass through a frozen model, from its loss to what its first layer has made."""
    model.requires_grad_(False)
    first = next(m for m in model.modules() if isinstance(m, (nn.Embedding, nn.Linear, nn.Conv2d)))
    first.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
    return model


def by_lycoris(model: nn.Module, method: str, targets: list[str], size: int) -> nn.Module | None:
    """Put a network of LyCORIS on a model, or return None where it has no such method; a fresh one changes nothing."""
    options: dict[str, dict[str, Any]] = {
        "lora": {"algo": "locon"},
        "dora": {"algo": "locon", "dora_wd": True},
        "loha": {"algo": "loha"},
        "lokr": {"algo": "lokr", "factor": size},
    }
    if method not in options:
        return None
    import lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    model.requires_grad_(False)
    names = [f"*{target}" for target in targets]
    lycoris.LycorisNetwork.apply_preset({"target_module": [], "target_name": names, "use_fnmatch": True})
    network = lycoris.create_lycoris(model, 1.0, 16, 32, **options[method])
    network.apply_to()
    # Its modules are found through the layers that they stand before.
    model.add_module("lycoris_network", network)
    return model


def arms(shape: Shape, cell: Cell, *, compiled: bool = False) -> list[Arm]:
    """Return a step of a model by every library; the first arm is this package's."""
    import peft

    method, targets = METHODS[cell.method], shape.targets_of(cell.method)
    torch.manual_seed(0)
    base = shape.make().to(cell.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method.prepare_peft(peft)
        theirs = peft.get_peft_model(copy.deepcopy(base), method.make_config(peft, cell, target_modules=targets))
        fast = copy.deepcopy(theirs)
        peftk.accelerate(fast)
        own = peftk.get_peft_model(copy.deepcopy(base), method.make_config(peftk, cell, target_modules=targets))
        network = by_lycoris(copy.deepcopy(base), cell.method, targets, cell.size)
    expected = Step("hf", theirs, shape.loss, None, "").step().detach().double()
    found = [
        Step("peftk", own, shape.loss, expected, "peftk's own layers").arm,
        Step("frozen", frozen(base), shape.loss, expected, "the model without adapters").arm,
        Step("accelerated", fast, shape.loss, expected, f"PEFT {peft.__version__} under peftk.accelerate").arm,
        Step("hf", theirs, shape.loss, expected, f"PEFT {peft.__version__}, eager").arm,
    ]
    if network is not None:
        found.append(Step("lycoris", network, shape.loss, expected, "LyCORIS, as create_lycoris makes it").arm)
    if compiled:
        torch._dynamo.reset()
        graph = torch.compile(copy.deepcopy(theirs))
        found.append(Step("compile", graph, shape.loss, expected, "PEFT's model, torch.compile (inductor)").arm)
    return found
