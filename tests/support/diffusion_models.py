"""Tiny models of the classes of diffusers that published adapters are for, and modules of theirs to adapt."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import nn

BLOCKS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1}
BLOCKS |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16), "norm_num_groups": 4}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj", "ff.net.0.proj"]
WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4}
WAN |= {"out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}

MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "SD 1.5": (
        lambda: diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=8, attention_head_dim=4, **BLOCKS),
        UNET,
    ),
    "SDXL": (
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            cross_attention_dim=8,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            **XL,
            **BLOCKS,
        ),
        UNET,
    ),
    "Flux": (
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        ["to_q", "add_k_proj", "to_out.0", "ff.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out", "norm.linear"],
    ),
    "SD3": (
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            out_channels=4,
        ),
        ["to_q", "add_v_proj", "to_add_out", "ff.net.2", "norm1.linear"],
    ),
    "Wan": (
        lambda: diffusers.WanTransformer3DModel(**WAN),
        ["attn1.to_q", "attn2.to_k", "to_out.0", "ffn.net.0.proj", "patch_embedding"],
    ),
    "Qwen-Image": (
        lambda: diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        ["to_q", "add_q_proj", "img_mod.1", "txt_mlp.net.2", "proj_out"],
    ),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()
