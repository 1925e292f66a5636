"""A diffusion UNet of diffusers and LoRA with its own alpha: training, scales, fusing, and files that diffusers reads.

    python examples/training/diffusers_unet.py        # a tiny random UNet, in seconds, offline

The adapter is peftk's. It is saved twice: as Hugging Face PEFT does, and as diffusers does for its pipelines; what
diffusers loads from that is an adapter of PEFT.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import peftk


def tiny_unet() -> UNet2DConditionModel:
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


def main(arguments: list[str] | None = None) -> dict:
    """Train, use the adapter in every way, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    unet = tiny_unet()
    # A scale of alpha / r = 3, which every file must carry.
    config = peftk.LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    model = peftk.get_peft_model(unet, config)
    generator = torch.Generator().manual_seed(2)
    image, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 7, 32)))
    target = torch.randn(image.shape, generator=generator)

    def run(network: torch.nn.Module, **options) -> torch.Tensor:
        return network(image, torch.tensor([10, 500]), text, **options).sample

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.mse_loss(run(model), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    model.eval()
    found = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected, plain = run(model), run(tiny_unet().eval())

        def difference(output: torch.Tensor, other: torch.Tensor) -> float:
            return (output - other).abs().max().item()

        found["trained, and the base"] = difference(expected, plain)
        half = run(model, cross_attention_kwargs={"scale": 0.5})
        found["scale 0, and the base"] = difference(run(model, cross_attention_kwargs={"scale": 0.0}), plain)
        model.save_pretrained(f"{folder}/peft")
        loaded = peftk.PeftModel.from_pretrained(tiny_unet(), f"{folder}/peft")
        found["loaded by peftk"] = difference(run(loaded), expected)

        state = peftk.get_peft_model_state_dict(model)
        # The metadata say what alpha is: tensors do not.
        StableDiffusionPipeline.save_lora_weights(
            f"{folder}/diffusers",
            unet_lora_layers={key.removeprefix("base_model.model."): value for key, value in state.items()},
            unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
        theirs = tiny_unet().eval()
        theirs.load_lora_adapter(f"{folder}/diffusers", prefix="unet", use_safetensors=True)
        found["loaded by diffusers"] = difference(run(theirs), expected)
        found["loaded by diffusers, scale 0.5"] = difference(run(theirs, cross_attention_kwargs={"scale": 0.5}), half)

        unet.fuse_lora(lora_scale=0.5)
        found["fused, scale 0.5"] = difference(run(unet), half)
        unet.unfuse_lora()
        # diffusers leaves the scale of the fusing behind.
        found["unfused, scale 0.5"] = difference(run(unet), half)
    print(f"loss: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
    print("outputs differ:", *(f"  {name}: {value:.1e}" for name, value in found.items()), sep="\n")
    return {"losses": losses, "differences": found, "largest": expected.abs().max().item()}


if __name__ == "__main__":
    main()
