"""Fine-tune the block of a diffusion UNet with LoHa, LoKr and OFT on the output: convolutions and attention together.

    python examples/unet_loha_lokr.py                     # a small block of its own, in seconds, offline
    python examples/unet_loha_lokr.py --model sd-legacy/stable-diffusion-v1-5 --steps 5

The block (residual convolutions with a time embedding, self-attention, cross-attention to a text, in plain PyTorch) is
asked for the noise in pictures of stripes, given their direction. With --model a UNet is read by diffusers, which has
to be installed, and sees random latents: put your own in their place.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention, silu
from tqdm import tqdm

import peftk

TARGETS = ["conv1", "conv2", "time_emb_proj", "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]


class Attention(nn.Module):
    """Attention with the layer names of diffusers."""

    def __init__(self, width: int, context: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from x (batch, places, width) to context (batch, words, size)."""
        flat = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in flat)
        return self.to_out[0](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class UNetBlock(nn.Module):
    """A residual block and a transformer block, between a convolution in and one out."""

    def __init__(self, channels: int = 32, context: int = 16) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, channels, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(8, channels) for _ in range(3))
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(channels, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.attn1, self.attn2 = Attention(channels, channels), Attention(channels, context)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.conv_out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Return the noise in `sample`, (batch, 1, height, width)."""
        x = self.conv_in(sample)
        rates = torch.exp(-torch.arange(x.shape[1] // 2) / 3.0)
        angles = timestep[:, None] * rates
        time = self.time_emb_proj(torch.cat([angles.sin(), angles.cos()], 1))
        hidden = self.conv1(silu(self.norm1(x))) + time[:, :, None, None]
        x = x + self.conv2(silu(self.norm2(hidden)))
        places = self.proj_in(self.norm3(x)).flatten(2).transpose(1, 2)
        places = places + self.attn1(places, places)
        places = places + self.attn2(places, encoder_hidden_states)
        return self.conv_out(x + self.proj_out(places.transpose(1, 2).unflatten(2, x.shape[2:])))


def stripes(count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the block's inputs, noisy pictures of stripes with their time and direction, and the noise in them."""
    across = torch.rand(count, 1, 1, 1) < 0.5
    wave = torch.sin(torch.arange(16.0) * 1.2 + 6.3 * torch.rand(count, 1, 1, 1)).expand(count, 1, 16, 16)
    clean = torch.where(across, wave, wave.transpose(2, 3))
    time, noise = torch.rand(count), torch.randn(count, 1, 16, 16)
    angle = (time * torch.pi / 2)[:, None, None, None]
    words = torch.where(across.flatten(1)[..., None], 1.0, -1.0).expand(count, 4, 16)
    inputs = {"sample": angle.cos() * clean + angle.sin() * noise, "timestep": time, "encoder_hidden_states": words}
    return inputs, noise


def load(source: str | None):
    """Return a model, and a function from a count to its inputs and what it is asked for."""
    if not source:
        return UNetBlock(), stripes
    from diffusers import UNet2DConditionModel

    folder = None if (Path(source) / "diffusion_pytorch_model.safetensors").is_file() else "unet"
    unet = UNet2DConditionModel.from_pretrained(source, subfolder=folder)

    def latents(count: int) -> tuple[dict[str, Tensor], Tensor]:
        noise = torch.randn(count, unet.config.in_channels, 32, 32)
        words = torch.randn(count, 8, unet.config.cross_attention_dim)
        return {"sample": noise, "timestep": torch.randint(1000, (count,)), "encoder_hidden_states": words}, noise

    return unet, latents


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the noise that a model finds."""
    found = model(**inputs)
    return found if isinstance(found, Tensor) else found.sample


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Train each adapter, save it, load it again, merge it, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a diffusers UNet (default: a small block in plain PyTorch)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--output", default="adapters/unet_loha_lokr")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    base, batch = load(options.model)
    configs = {
        "loha": peftk.LoHaConfig(r=4, alpha=4, target_modules=TARGETS, use_effective_conv2d=True),
        "lokr": peftk.LoKrConfig(r=4, alpha=4, target_modules=TARGETS, use_effective_conv2d=True),
        "output_oft": peftk.OutputOFTConfig(block_size=8, use_rescale=True, target_modules=TARGETS),
    }
    results = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        probe, _ = batch(2)
        with torch.no_grad():
            plain = run(base.eval(), probe)
            model = peftk.get_peft_model(copy.deepcopy(base), config)
            fresh = (run(model.eval(), probe) - plain).abs().max().item()
        model.print_trainable_parameters()
        print(f"a fresh adapter changes the outputs by {fresh:.1e}")
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.rate)
        model.train()
        losses = []
        for _ in tqdm(range(options.steps), desc=name):
            inputs, noise = batch(options.batch)
            loss = mse_loss(run(model, inputs), noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")

        model.eval()
        folder = str(Path(options.output) / name)
        model.save_pretrained(folder)
        loaded = peftk.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        with torch.no_grad():
            ours, theirs = run(model, probe), run(loaded, probe)
            flat = run(loaded.merge_and_unload(), probe)
        differences = {"loaded": (theirs - ours).abs().max().item(), "merged": (flat - ours).abs().max().item()}
        print(f"saved to {folder}; outputs differ, loaded: {differences['loaded']:.1e}, ", end="")
        print(f"merged: {differences['merged']:.1e}")
        results[name] = {"losses": losses, "fresh": fresh, "differences": differences}
        results[name]["largest"] = ours.abs().max().item()
    return results


if __name__ == "__main__":
    main()
