"""The same adapted layer from every library, with the same values, as arms of a comparison."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import peftk
from peftk.testing.compare import LIMITS

from . import truth
from .arms import Arm
from .truth import Values

SCALE = 2.0


@dataclass(frozen=True)
class Cell:
    """One layer, at one size, in one dtype.

    Attributes:
        method: "lora", "oft-exact" or "oft-neumann".
        size: the rank or the block size.
        features: in_features.
        tokens: rows of the input.
        dtype: dtype of the base layer and the activations.
        parameters: dtype of the adapter.
        out: out_features; 0 stands for as many as in_features.
    """

    method: str
    size: int
    features: int
    tokens: int
    dtype: torch.dtype
    parameters: torch.dtype
    out: int = 0

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.out or self.features

    @property
    def neumann(self) -> bool:
        """Whether the rotation comes from the series."""
        return self.method == "oft-neumann"

    def __str__(self) -> str:
        short = {torch.float32: "f32", torch.bfloat16: "bf16"}
        dtypes = "-".join(dict.fromkeys((short[self.dtype], f"{short[self.parameters]}adapter")))
        width = f"{self.features}x{self.out}" if self.out else str(self.features)
        return f"{self.method}-{'r' if self.method == 'lora' else 'b'}{self.size}-{width}-T{self.tokens}-{dtypes}"


class Bench:
    """The inputs, the frozen layer and the adapter's values of a cell, and the arms that use them."""

    def __init__(self, cell: Cell, seed: int = 0, device: str = "cpu") -> None:
        self.cell, self.device = cell, device
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, spread: float = 1.0, dtype: torch.dtype = cell.dtype) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * spread).to(dtype)

        n, out = cell.features, cell.out_features
        self.base = nn.utils.skip_init(nn.Linear, n, out, dtype=cell.dtype, device=device)
        self.base.weight = nn.Parameter(normal(out, n, spread=n**-0.5), requires_grad=False)
        self.base.bias = nn.Parameter(normal(out), requires_grad=False)
        self.x = normal(cell.tokens, n).requires_grad_()
        self.grad = normal(cell.tokens, out)
        if cell.method == "lora":
            self.values = {
                "a": normal(cell.size, n, spread=n**-0.5, dtype=cell.parameters),
                "b": normal(out, cell.size, spread=0.05, dtype=cell.parameters),
            }
        else:
            triangle = cell.size * (cell.size - 1) // 2
            self.values = {"packed": normal(n // cell.size, triangle, spread=0.02, dtype=cell.parameters)}

    def linear(self) -> nn.Linear:
        """Return a layer of its own that shares the frozen weight and bias."""
        layer = nn.utils.skip_init(nn.Linear, *self.base.weight.shape[::-1], dtype=self.cell.dtype, device=self.device)
        layer.weight, layer.bias = self.base.weight, self.base.bias
        return layer

    @functools.cached_property
    def truth(self) -> Values:
        """The layer's output and gradients in float64."""
        return truth.differentiate(self._formula(), {"x": self.x, **self.values}, self.grad)

    def _formula(self) -> Callable[..., Tensor]:
        weight, bias, cell = self.base.weight.double(), self.base.bias.double(), self.cell
        if cell.method == "lora":
            return lambda x, a, b: truth.lora(x, weight, bias, SCALE, a, b)
        return lambda x, packed: truth.oft(x, weight, bias, cell.size, cell.neumann, packed)

    def arm(
        self,
        name: str,
        forward: Callable[[Tensor], Tensor],
        parameters: Values,
        *,
        note: str = "",
        backend: str | None = None,
        exact: Callable[[], Values] | None = None,
    ) -> Arm:
        """Return the arm of a layer: forward and backward, gradients in x and in the parameters.

        Args:
            name: the arm's name.
            forward: the layer.
            parameters: its trainable parameters, under the names of the truth.
            note: what a reader should know.
            backend: peftk's backend to name.
            exact: returns the truth, where it is not that of the cell.
        """
        x, grad = self.x, self.grad
        leaves = [x, *parameters.values()]

        def step() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            y = forward(x)
            y.backward(grad)
            return y

        def named(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def on_backend() -> Tensor:
                with peftk.use_backend(backend):
                    return function()

            return on_backend if backend else function

        run = named(step)

        def check() -> dict[str, float]:
            y = run()
            found = {"output": y.detach(), **{f"d{key}": leaf.grad for key, leaf in parameters.items()}, "dx": x.grad}
            return truth.errors(found, exact() if exact else self.truth)

        limit = max(LIMITS[self.cell.dtype], LIMITS[self.cell.parameters])
        owned = lambda: [x, grad, self.base.weight, self.base.bias, *parameters.values()]  # noqa: E731
        return Arm(name, run, check, limit, owned, note, forward=named(lambda: forward(x)))

    def arms(self, leave_out: dict[str, str] | None = None) -> list[Arm]:
        """Return peftk's arm, the frozen layer's and those of the peers.

        Args:
            leave_out: arm to the reason why it is not run.
        """
        found = [self.peftk(), self.frozen()]
        for name, make in (
            ("hf", self.hugging_face),
            ("compile", self.compiled),
            ("lycoris", self.lycoris),
            ("peftk-torch", lambda: self.peftk("torch")),
        ):
            if leave_out and name in leave_out:
                found.append(Arm(name, skip=leave_out[name]))
                continue
            try:
                found.append(make())
            except ImportError as error:
                found.append(Arm(name, skip=f"cannot be imported: {error}"))
        return found

    def frozen(self) -> Arm:
        """The layer without an adapter: a product forward, and one backward for the gradient in x."""

        def exact() -> Values:
            weight, bias = self.base.weight.double(), self.base.bias.double()
            return truth.differentiate(lambda x: x @ weight.mT + bias, {"x": self.x}, self.grad)

        return self.arm("frozen", self.base, {}, note="the base layer alone; x requires grad", exact=exact)

    def peftk(self, backend: str | None = None) -> Arm:
        """Our layer, on the backend that the registry chooses or on a named one."""
        cell = self.cell
        if cell.method == "lora":
            config = peftk.LoraConfig(r=cell.size, lora_alpha=SCALE * cell.size)
            layer = peftk.nn.LoRALinear(self.linear(), config)
            parameters = {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
        else:
            config = peftk.OFTConfig(oft_block_size=cell.size, use_cayley_neumann=cell.neumann)
            layer = peftk.nn.OFTLinear(self.linear(), config)
            parameters = {"packed": layer.oft_R["default"].weight}
        parameters = self._take(layer, parameters)
        note = "the backends are named in the row" if backend is None else f"backend {backend!r} named"
        return self.arm(f"peftk-{backend}" if backend else "peftk", layer, parameters, note=note, backend=backend)

    def hugging_face(self) -> Arm:
        """PEFT in eager mode."""
        import peft

        cell = self.cell
        if cell.method == "lora":
            config = peft.LoraConfig(r=cell.size, lora_alpha=SCALE * cell.size, target_modules=["0"])
        else:
            config = peft.OFTConfig(
                r=0, oft_block_size=cell.size, use_cayley_neumann=cell.neumann, target_modules=["0"]
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = peft.get_peft_model(nn.Sequential(self.linear()), config).base_model.model[0]
        if cell.method == "lora":
            parameters = {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
        else:
            parameters = {"packed": layer.oft_R["default"].weight}
        return self.arm("hf", layer, self._take(layer, parameters), note=f"PEFT {peft.__version__}, eager")

    def _take(self, layer: nn.Module, parameters: Values) -> Values:
        """Give a layer the values of the cell, in the adapter's dtype."""
        # LyCORIS makes its layers on the CPU.
        layer.to(self.device)
        for name, parameter in parameters.items():
            parameter.data = self.values[name].clone()
            parameter.requires_grad_()
        layer.train()
        return parameters

    def compiled(self) -> Arm:
        """The same mathematics in plain PyTorch, compiled by inductor as one graph."""
        if reason := why_no_compiler(self.device):
            return Arm("compile", skip=reason)
        torch._dynamo.reset()
        cell, weight, bias = self.cell, self.base.weight, self.base.bias
        parameters = {name: nn.Parameter(value.clone()) for name, value in self.values.items()}
        if cell.method == "lora":

            def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
                return linear(x, weight, bias) + SCALE * linear(linear(x, a.to(x.dtype)), b.to(x.dtype))
        else:

            def forward(x: Tensor, packed: Tensor) -> Tensor:
                r = plain_cayley(packed.float(), cell.size, cell.neumann).to(x.dtype)
                rotated = torch.einsum("tnb,nbc->tnc", x.view(len(x), -1, cell.size), r)
                return linear(rotated.reshape(x.shape), weight, bias)

        graph = torch.compile(forward, fullgraph=True, dynamic=False)
        return self.arm(
            "compile", lambda x: graph(x, **parameters), parameters, note="plain PyTorch, torch.compile (inductor)"
        )

    def lycoris(self) -> Arm:
        """LyCORIS on activations ("bypass"), its quicker form; its OFT rotates the output."""
        from lycoris.modules.diag_oft import DiagOFTModule
        from lycoris.modules.locon import LoConModule

        cell = self.cell
        if cell.neumann:
            return Arm("lycoris", skip="LyCORIS has no Cayley-Neumann series")
        base = self.linear()
        if cell.method == "lora":
            layer = LoConModule("bench", base, 1.0, cell.size, SCALE * cell.size, bypass_mode=True)
            parameters = self._take(layer, {"a": layer.lora_down.weight, "b": layer.lora_up.weight})
            return self.arm("lycoris", layer, parameters, note="LyCORIS locon, bypass form")
        layer = DiagOFTModule("bench", base, 1.0, cell.size, bypass_mode=True)
        if layer.block_size != cell.size:
            return Arm("lycoris", skip=f"LyCORIS chooses blocks of {layer.block_size} here")
        parameters = {"oft_blocks": layer.oft_blocks}
        rows, columns = torch.triu_indices(cell.size, cell.size, 1, device=self.device)
        blocks = torch.zeros(layer.oft_blocks.shape, dtype=cell.parameters, device=self.device)
        blocks[:, rows, columns] = self.values["packed"]
        layer.to(self.device)
        layer.oft_blocks.data = blocks

        def exact() -> Values:
            weight, bias = self.base.weight.double(), self.base.bias.double()
            formula = lambda x, oft_blocks: truth.oft_of_output(x, weight, bias, oft_blocks)  # noqa: E731
            return truth.differentiate(formula, {"x": self.x, **parameters}, self.grad)

        note = "LyCORIS diag-oft, bypass form: rotates the OUTPUT, a different layer of about the same cost"
        return self.arm("lycoris", layer, parameters, note=note, exact=exact)


def plain_cayley(packed: Tensor, size: int, neumann: bool) -> Tensor:
    """The Cayley transform as one writes it in plain PyTorch."""
    rows, columns = torch.triu_indices(size, size, 1, device=packed.device)
    upper = packed.new_zeros(len(packed), size, size)
    upper[:, rows, columns] = packed
    s = upper - upper.mT
    eye = torch.eye(size, dtype=s.dtype, device=s.device)
    if not neumann:
        return torch.linalg.solve(eye + s, eye - s, left=False)
    s2 = s @ s
    return eye + 2 * s + 2 * s2 + 2 * s2 @ s + s2 @ s2


def why_no_compiler(device: str = "cpu") -> str | None:
    """Return None if inductor can compile for a device, else why it cannot."""
    if device != "cpu":
        from torch.utils._triton import has_triton

        return None if has_triton() else "inductor finds no Triton for this GPU"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        return f"inductor finds no C++ compiler: {str(error).splitlines()[0]}"
    return None
