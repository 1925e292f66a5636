"""A model with layers of every kind, and files with adapters for it as LyCORIS writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Layers of every kind, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.block = nn.ModuleDict({"conv_in": nn.Conv2d(4, 8, 3, padding=1), "point": nn.Conv2d(8, 4, 1)})
        self.sequence = nn.Conv1d(4, 6, 3, padding=1)
        self.volume = nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).view(-1, 4, 2, 2)
        y = self.block["point"](torch.tanh(self.block["conv_in"](y)))
        y = torch.tanh(self.sequence(y.flatten(2)))
        return self.volume(torch.tanh(y).view(-1, 2, 1, 3, 4))


X = torch.linspace(-1, 1, 60).view(5, 12)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def trained(network: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in network.parameters():
        # A bias that is trained, as whole weights have it, is refused.
        if parameter.dim() != 1:
            parameter.data.normal_(0, 0.5)


def by_lycoris(path: Path, layers: tuple[str, ...], prefix: str = "lycoris", **options: Any) -> Tensor:
    """Save a file of LyCORIS, and return the output of its model."""
    lycoris = pytest.importorskip("lycoris")
    settings = {"TARGET_REPLACE_MODULE": list(layers), "TARGET_REPLACE_NAME": [], "LORA_PREFIX": prefix}
    with pytest.MonkeyPatch.context() as patch:
        # They belong to the class, and so to whoever runs next in this process.
        for name, value in settings.items():
            patch.setattr(lycoris.LycorisNetwork, name, value)
        return _made_by_lycoris(lycoris, path, options)


def _made_by_lycoris(lycoris: Any, path: Path, options: dict[str, Any]) -> Tensor:
    model = net()
    if "rs_lora" in options:
        # `create_lycoris` does not hand it on.
        sizes = {"lora_dim": options["linear_dim"], "conv_lora_dim": options["conv_dim"]}
        alphas = {"alpha": options["linear_alpha"], "conv_alpha": options["linear_alpha"]}
        network = lycoris.LycorisNetwork(model, 1.0, **sizes, **alphas, network_module="locon", rs_lora=True)
    else:
        network = lycoris.create_lycoris(model, 1.0, **options)
    network.apply_to()
    trained(network)
    y = model(X)
    network.save_weights(str(path), torch.float32, {})
    return y.detach()


LAYERS = {
    "linear": ("Linear",),
    "conv": ("Conv2d",),
    "sequence": ("Conv1d",),
    "volume": ("Conv3d",),
    "several": ("Linear", "Conv2d"),
}
FORMS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon", "linear_dim": 3, "linear_alpha": 2, "conv_dim": 2, "conv_alpha": 5},
    "locon, scalar": {"algo": "locon", "linear_dim": 3, "linear_alpha": 2, "conv_dim": 2, "use_scalar": True},
    "locon, dora": {"algo": "locon", "linear_dim": 3, "conv_dim": 2, "dora_wd": True, "wd_on_output": True},
    "locon, dora inputs": {"algo": "locon", "linear_dim": 3, "conv_dim": 2, "dora_wd": True, "wd_on_output": False},
    "locon, rslora": {"algo": "locon", "linear_dim": 4, "linear_alpha": 2, "conv_dim": 4, "rs_lora": True},
    "loha": {"algo": "loha", "linear_dim": 2, "linear_alpha": 1, "conv_dim": 3, "conv_alpha": 2},
    "loha, tucker": {"algo": "loha", "linear_dim": 2, "conv_dim": 2, "conv_alpha": 3, "use_tucker": True},
    "loha, dora": {"algo": "loha", "linear_dim": 2, "conv_dim": 2, "dora_wd": True, "wd_on_output": True},
    "loha, dora inputs": {"algo": "loha", "linear_dim": 2, "conv_dim": 2, "dora_wd": True, "wd_on_output": False},
    "lokr": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "conv_dim": 1, "conv_alpha": 2},
    "lokr, whole": {"algo": "lokr", "linear_dim": 1000, "linear_alpha": 7, "conv_dim": 1000, "conv_alpha": 7},
    "lokr, factor": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "factor": 2},
    "lokr, both": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "factor": 4, "decompose_both": True},
    "lokr, tucker": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "use_tucker": True, "factor": 2},
    "lokr, dora": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "dora_wd": True, "wd_on_output": True},
    "lokr, dora inputs": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "dora_wd": True, "wd_on_output": False},
    "full": {"algo": "full"},
    "diag-oft": {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 2, "rescaled": True},
    "diag-oft, bounded": {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 2, "rescaled": True, "constraint": 0.05},
    "boft": {"algo": "boft", "linear_dim": 2, "conv_dim": 2},
    "boft, rescaled": {"algo": "boft", "linear_dim": 4, "conv_dim": 2, "rescaled": True, "constraint": 0.1},
}
ROTATIONS = tuple(name for name in FORMS if "oft" in name)
# A butterfly wants a power of two of blocks.
COMBINATIONS = [
    (form, layers)
    for form in FORMS
    for layers in LAYERS
    if not (form.startswith("boft") and layers in ("sequence", "volume"))
]
