"""One model with one adapter, of Hugging Face PEFT and of this package."""

from __future__ import annotations

import copy
import dataclasses

import peft
import torch
from torch import nn

import peftk
from peftk.nn import PeftConfig
from support.toy_model import toy


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    return model.eval()


def both(config: PeftConfig, name: str = "default") -> list[nn.Module]:
    """Return the same model with the same adapter, of PEFT and of this package."""
    pairs = (peft, theirs_of(config)), (peftk, copy.deepcopy(config))
    made = [lib.get_peft_model(toy(), given, name) for lib, given in pairs]
    trained(made[0])
    made[1].load_state_dict(made[0].state_dict(), strict=False)
    return [model.eval() for model in made]


def theirs_of(config: PeftConfig) -> peft.PeftConfig:
    cls = getattr(peft, type(config).__name__)
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in config.to_dict().items() if k in known and k not in ("peft_type", "runtime_config")})
