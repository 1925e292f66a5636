"""The same adapted layer from every library, with the same values, as arms of a comparison."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import peftk
from peftk.testing.compare import LIMITS

from . import truth
from .arms import Arm
from .methods import METHODS, Cell, Values


class Bench:
    """The inputs, the frozen layer and the adapter's values of a cell, and the arms that use them."""

    def __init__(self, cell: Cell, seed: int = 0, device: str = "cpu", training: bool = True) -> None:
        self.cell, self.device, self.training = cell, device, training
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, spread: float = 1.0, dtype: torch.dtype = cell.dtype) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * spread).to(dtype)

        n, out = cell.features, cell.out_features
        self.base = nn.utils.skip_init(nn.Linear, n, out, dtype=cell.dtype, device=device)
        self.base.weight = nn.Parameter(normal(out, n, spread=n**-0.5), requires_grad=False)
        self.base.bias = nn.Parameter(normal(out), requires_grad=False)
        self.x = normal(cell.tokens, n).requires_grad_()
        self.grad = normal(cell.tokens, out)
        self.method = METHODS[cell.method]
        self.values = self.method.values(cell, functools.partial(normal, dtype=cell.parameters))

    def linear(self) -> nn.Linear:
        """Return a layer of its own that shares the frozen weight and bias."""
        layer = nn.utils.skip_init(nn.Linear, *self.base.weight.shape[::-1], dtype=self.cell.dtype, device=self.device)
        layer.weight, layer.bias = self.base.weight, self.base.bias
        return layer

    @functools.cached_property
    def truth(self) -> Values:
        """The layer's output and gradients in float64."""
        return self.exactly(functools.partial(self.method.exact, self.cell), self.values)()

    def exactly(self, formula: Callable[..., Tensor], values: Values) -> Callable[[], Values]:
        """Return a function that computes output and gradients of a formula for this layer in float64, once.

        Args:
            formula: takes x, weight and bias, and `values` by name.
            values: the parameters.
        """

        @functools.cache
        def exact() -> Values:
            fixed = {"weight": self.base.weight.double(), "bias": self.base.bias.double()}
            return truth.differentiate(functools.partial(formula, **fixed), {"x": self.x, **values}, self.grad)

        return exact

    def arm(
        self,
        name: str,
        forward: Callable[[Tensor], Tensor],
        parameters: Values,
        *,
        note: str = "",
        remark: str = "",
        backend: str | None = None,
        exact: Callable[[], Values] | None = None,
    ) -> Arm:
        """Return the arm of a layer: forward and backward, gradients in x and in the parameters.

        Args:
            name: the arm's name.
            forward: the layer.
            parameters: its trainable parameters, under the names of the truth.
            note: what a reader should know.
            remark: how its function differs from that of the other arms.
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
        return Arm(name, run, check, limit, owned, note, remark, forward=named(lambda: forward(x)))

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
            except ValueError as error:
                found.append(Arm(name, skip=f"cannot be made: {error}"))
        return found

    def frozen(self) -> Arm:
        """The layer without an adapter: a product forward, and one backward for the gradient in x."""

        def exact() -> Values:
            weight, bias = self.base.weight.double(), self.base.bias.double()
            return truth.differentiate(lambda x: x @ weight.mT + bias, {"x": self.x}, self.grad)

        return self.arm("frozen", self.base, {}, note="the base layer alone; x requires grad", exact=exact)

    def peftk(self, backend: str | None = None) -> Arm:
        """Our layer, on the backend that the registry chooses or on a named one."""
        base, config = self.linear(), self.method.make_config(peftk, self.cell)
        layer = peftk.nn.layer_class_for(config, base)(base, config)
        parameters = self._take(layer, self.method.find(layer))
        note = "the backends are named in the row" if backend is None else f"backend {backend!r} named"
        return self.arm(f"peftk-{backend}" if backend else "peftk", layer, parameters, note=note, backend=backend)

    def hugging_face(self, accelerate: bool = False) -> Arm:
        """PEFT in eager mode, as it is or accelerated by this package."""
        import peft

        self.method.prepare_peft(peft)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = self.method.make_config(peft, self.cell, target_modules=["0"])
            model = peft.get_peft_model(nn.Sequential(self.linear()), config)
        if accelerate:
            peftk.accelerate(model, strict=True)
        layer = model.base_model.model[0]
        name, note = "accelerated" if accelerate else "hf", f"PEFT {peft.__version__}, eager"
        variant = self.method.peft_differs(self, layer)
        parameters = self._take(layer, self.method.find(layer))
        if variant is None or (accelerate and variant.gradients_alone):
            return self.arm(name, layer, parameters, note=note)
        return self.arm(name, layer, parameters, note=note, remark=variant.remark, exact=variant.exact)

    def _take(self, layer: nn.Module, parameters: Values) -> Values:
        """Give a layer the values of the cell, in the adapter's dtype."""
        # LyCORIS makes its layers on the CPU.
        layer.to(self.device)
        for name, parameter in parameters.items():
            # A layer with fewer of them, such as PEFT's BOFT, takes the first.
            parameter.data = self.values[name][: len(parameter)].clone()
            parameter.requires_grad_()
        layer.train(self.training)
        return parameters

    def compiled(self) -> Arm:
        """The same mathematics in plain PyTorch, compiled by inductor as one graph."""
        if reason := why_no_compiler(self.device):
            return Arm("compile", skip=reason)
        torch._dynamo.reset()
        parameters = {name: nn.Parameter(value.clone()) for name, value in self.values.items()}
        plain = functools.partial(self.method.plain, self.cell, weight=self.base.weight, bias=self.base.bias)
        graph = torch.compile(plain, fullgraph=True, dynamic=False)
        return self.arm(
            "compile", lambda x: graph(x, **parameters), parameters, note="plain PyTorch, torch.compile (inductor)"
        )

    def lycoris(self) -> Arm:
        """LyCORIS, on activations ("bypass", its quicker form) where it can."""
        if self.method.no_lycoris:
            return Arm("lycoris", skip=self.method.no_lycoris)
        layer, parameters, note, variant = self.method.lycoris(self, self.linear())
        if variant is None:
            return self.arm("lycoris", layer, self._take(layer, parameters), note=note)
        layer.to(self.device)
        for name, parameter in parameters.items():
            value = self.values.get(name)
            parameter.data = (parameter if value is None else value.reshape(parameter.shape)).data.to(
                self.device, self.cell.parameters
            )
            parameter.requires_grad_()
        layer.train(self.training)
        return self.arm("lycoris", layer, parameters, note=note, remark=variant.remark, exact=variant.exact)


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
