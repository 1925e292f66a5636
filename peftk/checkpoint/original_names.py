"""The names that a model's authors gave to modules which diffusers calls otherwise, or has as several.

Files of kohya's scripts and ComfyUI for SDXL, Flux, SD3 and Wan have them. Which model it is, the names of its modules
in diffusers tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["Place", "halves_swapped", "original_names", "split"]

_UNET = "down_blocks.0.resnets.0.conv1"
_FLUX = "single_transformer_blocks.0.proj_mlp"
_SD3 = "pos_embed.proj"
_WAN = "condition_embedder.time_proj"


class Place(NamedTuple):
    """Where a module of the authors is in a model.

    Attributes:
        paths: The modules that have its outputs, in their order.
        swapped: Whether the second half of the outputs comes first there: scales before shifts.
    """

    paths: tuple[str, ...]
    swapped: bool = False


# Names of the authors, with # for the number of a block, to those of diffusers. Several have the outputs of the one
# module, in this order.
_OF_FLUX = {
    "double_blocks.#.img_attn.qkv": "transformer_blocks.#.attn.to_q transformer_blocks.#.attn.to_k "
    "transformer_blocks.#.attn.to_v",
    "double_blocks.#.txt_attn.qkv": "transformer_blocks.#.attn.add_q_proj transformer_blocks.#.attn.add_k_proj "
    "transformer_blocks.#.attn.add_v_proj",
    "double_blocks.#.img_attn.proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.txt_attn.proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.net.0.proj",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.net.2",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.net.2",
    "double_blocks.#.img_mod.lin": "transformer_blocks.#.norm1.linear",
    "double_blocks.#.txt_mod.lin": "transformer_blocks.#.norm1_context.linear",
    "single_blocks.#.linear1": "single_transformer_blocks.#.attn.to_q single_transformer_blocks.#.attn.to_k "
    "single_transformer_blocks.#.attn.to_v single_transformer_blocks.#.proj_mlp",
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_OF_SD3 = {
    "joint_blocks.#.x_block.attn.qkv": "transformer_blocks.#.attn.to_q transformer_blocks.#.attn.to_k "
    "transformer_blocks.#.attn.to_v",
    "joint_blocks.#.context_block.attn.qkv": "transformer_blocks.#.attn.add_q_proj "
    "transformer_blocks.#.attn.add_k_proj transformer_blocks.#.attn.add_v_proj",
    "joint_blocks.#.x_block.attn.proj": "transformer_blocks.#.attn.to_out.0",
    "joint_blocks.#.context_block.attn.proj": "transformer_blocks.#.attn.to_add_out",
    "joint_blocks.#.x_block.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "joint_blocks.#.x_block.mlp.fc2": "transformer_blocks.#.ff.net.2",
    "joint_blocks.#.context_block.mlp.fc1": "transformer_blocks.#.ff_context.net.0.proj",
    "joint_blocks.#.context_block.mlp.fc2": "transformer_blocks.#.ff_context.net.2",
    "joint_blocks.#.x_block.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
    "joint_blocks.#.context_block.adaLN_modulation.1": "transformer_blocks.#.norm1_context.linear",
    "joint_blocks.#.x_block.attn2.qkv": "transformer_blocks.#.attn2.to_q transformer_blocks.#.attn2.to_k "
    "transformer_blocks.#.attn2.to_v",
    "joint_blocks.#.x_block.attn2.proj": "transformer_blocks.#.attn2.to_out.0",
    "context_embedder": "context_embedder",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_OF_WAN = {
    f"blocks.#.{theirs}_attn.{one}": f"blocks.#.{ours}.{other}"
    for theirs, ours in (("self", "attn1"), ("cross", "attn2"))
    for one, other in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
} | {
    "blocks.#.cross_attn.k_img": "blocks.#.attn2.add_k_proj",
    "blocks.#.cross_attn.v_img": "blocks.#.attn2.add_v_proj",
    "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
    "blocks.#.ffn.2": "blocks.#.ffn.net.2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
# diffusers' last norms, of AdaLayerNormContinuous, have the scale first, and the authors the shift.
_SWAPPED = re.compile(r"norm_out\.linear|(transformer_blocks\.\d+)\.norm1_context\.linear")
_OF_UNET = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_OF_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_names(paths: Iterable[str]) -> dict[str, Place]:
    """Return the authors' names of the modules of a model to where they are in diffusers, by its paths.

    A model of which nothing is known has none, and neither has a module that has the same name.

    Args:
        paths: The paths of all modules of the model.
    """
    known = set(paths)
    if _FLUX in known:
        return _by_table(_OF_FLUX, known)
    if _UNET in known:
        return _by_table(_OF_UNET, known) | _of_blocks(known)
    if _WAN in known:
        return _by_table(_OF_WAN, known)
    return _by_table(_OF_SD3, known) if _SD3 in known else {}


def _swapped(path: str, known: set[str]) -> bool:
    if (match := _SWAPPED.fullmatch(path)) is None:
        return False
    # Of the blocks of SD3 the last one alone has such a norm of its context: it has no output of that.
    return match.group(1) is None or f"{match.group(1)}.attn.to_add_out" not in known


def _by_table(table: Mapping[str, str], known: set[str]) -> dict[str, Place]:
    found = {}
    for name, paths in table.items():
        first = re.compile(re.escape(paths.split()[0]).replace(r"\#", r"(\d+)"))
        for path in known:
            if match := first.fullmatch(path):
                number = match.group(1) if first.groups else ""
                ours = tuple(paths.replace("#", number).split())
                original = name.replace("#", number)
                if known.issuperset(ours) and ours != (original,):
                    found[original] = Place(ours, _swapped(ours[0], known))
    return found


def _of_blocks(known: set[str]) -> dict[str, Place]:
    """Return the names of the blocks of a UNet of diffusion, which its authors have counted through."""
    pattern = re.compile(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
    parts = [(path, match) for path in known if (match := pattern.fullmatch(path))]
    layers = 1 + max(int(m[4]) for _, m in parts if m[1] == "down" and m[3] == "resnets")
    attending = {m[2] for _, m in parts if m[1] == "up" and m[3] == "attentions"}
    found: dict[str, Place] = {}
    for path, match in parts:
        where, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if kind == "resnets" and rest not in _OF_RESNETS:
            continue
        inner = _OF_RESNETS[rest] if kind == "resnets" else rest
        at = block * (layers + 1) + number
        if where == "mid":
            name = f"middle_block.{2 * number if kind == 'resnets' else 1}.{inner}"
        elif where == "down":
            place = {"resnets": f"{at + 1}.0", "attentions": f"{at + 1}.1"}.get(kind)
            name = f"input_blocks.{place}.{inner}" if place else f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
        elif kind == "upsamplers":
            name = f"output_blocks.{block * (layers + 1) + layers}.{2 if match[2] in attending else 1}.{inner}"
        else:
            name = f"output_blocks.{at}.{0 if kind == 'resnets' else 1}.{inner}"
        found[name] = Place((path,))
    return found


_BY_ROWS = {
    "LoRA": ("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight", "dora_scale"),
    "LoHa": ("hada_w1_a", "hada_w2_a", "dora_scale"),
    "whole weights": ("diff", "diff_b"),
}
"""The tensors that have a row for every output, by method."""


def split(method: str, parts: Mapping[str, Tensor], sizes: list[int], swapped: bool = False) -> list[dict[str, Tensor]]:
    """Return the tensors of a module as those of several, which share its outputs.

    They have the other factors in common, and every one the rank and the alpha of the whole.

    Args:
        method: The method.
        parts: The tensors by the ends of their names.
        sizes: How many outputs each of them has.
        swapped: Whether the second half of the outputs becomes the first.

    Raises:
        ValueError: The method has no such parts, or the outputs are not as many.
    """
    if len(sizes) == 1 and not swapped:
        return [dict(parts)]
    into = "has its outputs in another order here" if swapped else f"is {len(sizes)} modules here"
    rows = _BY_ROWS.get(method)
    if rows is None:
        raise ValueError(f"{into}, and {method} has no factor with a row for each output that could be split")
    if cores := [part for part in parts if part in ("hada_t1", "hada_t2", "lora_mid.weight")]:
        raise ValueError(f"{into}, and {cores[0]} cannot be split")
    found: list[dict[str, Tensor]] = [{} for _ in sizes]
    for part, tensor in parts.items():
        if part not in rows or (swapped and part == "dora_scale" and _of_inputs(tensor)):
            # Whoever writes them wants memory of its own for each.
            pieces = (tensor, *(tensor.clone() for _ in sizes[1:]))
        elif part == "dora_scale" and _of_inputs(tensor):
            raise ValueError(f"{into}, and magnitudes of inputs are those of all outputs together")
        elif tensor.shape[:1] != (sum(sizes),):
            together = f", the outputs of {len(sizes)} modules together" if len(sizes) > 1 else ""
            raise ValueError(f"{part}: expected {sum(sizes)} rows{together}, got shape {tuple(tensor.shape)}")
        else:
            pieces = (halves_swapped(tensor) if swapped else tensor).split(sizes)
        for one, piece in zip(found, pieces, strict=True):
            one[part] = piece
    return found


def halves_swapped(tensor: Tensor) -> Tensor:
    """Return a tensor with the second half of its rows first."""
    return tensor.roll(tensor.shape[0] // 2, 0)


def _of_inputs(magnitudes: Tensor) -> bool:
    return magnitudes.shape[:1] == (1,) and magnitudes.numel() > 1
