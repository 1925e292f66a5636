"""Tiny mixtures of experts of transformers, in float64, and what tests of adapters on them share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
COMMON = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
KINDS = {
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, intermediate_size=32, moe_intermediate_size=12, num_experts=5)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=12, num_local_experts=4)),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**COMMON, intermediate_size=12, num_local_experts=4, pad_token_id=0)
    ),
    # The first layer is dense, and every token has a shared expert.
    "deepseek": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{name: size for name, size in COMMON.items() if name != "head_dim"} | {"num_key_value_heads": 2},
            intermediate_size=32,
            moe_intermediate_size=12,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        )
    ),
}
IDS = torch.tensor([[3, 7, 1, 9, 30, 2], [11, 4, 8, 5, 6, 10]])


def made(kind: str) -> nn.Module:
    """Return a model with random weights."""
    torch.manual_seed(0)
    model = KINDS[kind]().double()
    # The only one of transformers' own that runs in float64.
    model.config._experts_implementation = "eager"
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def filled(model: nn.Module) -> nn.Module:
    """Give the adapters random values; equal ones wherever the names are equal."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return model


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the token ids, and the gradients by the names of the parameters."""
    loss = model(input_ids=IDS, labels=IDS).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result._base is None:
            inputs = {a.data_ptr() for a in args if isinstance(a, Tensor)}
            if result.data_ptr() not in inputs:
                self.shapes.add(tuple(result.shape))
        return result


def stacks_built(model: nn.Module) -> bool:
    """Whether a forward and backward pass makes a tensor of the shape of a stack."""
    stacks = {tuple(p.shape) for p in model.parameters() if p.dim() == 3}
    with _Largest() as mode:
        loss_and_gradients(model)
    return bool(mode.shapes & (stacks | {(e, i, o) for e, o, i in stacks}))
