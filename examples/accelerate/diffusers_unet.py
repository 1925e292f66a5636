"""A diffusion UNet of diffusers with LoRA and LoKr: training, scales, switching and fusing, without and with peftk.

python examples/accelerate/diffusers_unet.py      # a tiny random UNet, in seconds, offline
"""

from __future__ import annotations

import peft
import torch
from diffusers import UNet2DConditionModel
from tiny import compare

import peftk


def unet() -> UNet2DConditionModel:
    """Return a tiny random UNet; the same one every time."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def train(accelerated: bool) -> list[float]:
    """Train two adapters in turn, use them together, and return all losses."""
    model = unet()
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=4, target_modules=attention), "style")
    model.add_adapter(peft.LoKrConfig(r=4, target_modules=[*attention, "conv1", "conv2"]), "subject")
    if accelerated:
        print(peftk.accelerate(model))
    generator = torch.Generator().manual_seed(2)
    image, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 7, 32)))
    target = torch.randn(image.shape, generator=generator)

    def loss(**options) -> torch.Tensor:
        noise = model(image, torch.tensor([10, 500]), text, **options).sample
        return torch.nn.functional.mse_loss(noise, target)

    losses = []
    for name in ("style", "subject"):
        model.set_adapter(name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
    model.eval()
    with torch.no_grad():
        model.set_adapters(["style", "subject"], [0.7, 0.3])
        losses.append(loss().item())
        losses.append(loss(cross_attention_kwargs={"scale": 0.5}).item())
        model.disable_adapters()
        losses.append(loss().item())
        model.enable_adapters()
        model.fuse_lora()
        losses.append(loss().item())
        model.unfuse_lora()
        losses.append(loss().item())
    return losses


def main(arguments: list[str] | None = None) -> dict:
    """Train twice and compare."""
    return compare(train, arguments, __doc__)


if __name__ == "__main__":
    main()
