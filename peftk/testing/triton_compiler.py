"""Compiles recorded launches of Triton kernels for GPUs that are not there, and reads what came out.

``_launch.recorded`` collects launches with their arguments; `specialize` turns one into what Triton would compile for
them, `compile_for` compiles that for a named target, and `Compiled` holds what the shipped binary shows: registers,
spills, shared memory, and how often each family of instructions occurs. NVIDIA binaries are read with the cuobjdump
and nvdisasm of Triton's own wheel, AMD's from the assembly text.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_kernels._launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes of shared memory that one program may have; Triton does not hold a compile to them."""

ALIGNMENT = 16

_CUDA = {
    "load_wide": r"\bLDG\.\S*(?:128|256)",
    "load": r"\bLDG\.",
    "store_wide": r"\bSTG\.\S*(?:128|256)",
    "store": r"\bSTG\.",
    "copy_wide": r"\bLDGSTS\S*\.128",
    "copy": r"\bLDGSTS",
    "tma_load": r"\bUTMALDG",
    "tma_store": r"\bUTMASTG",
    "mma": r"\bHMMA",
    "wgmma": r"\bHGMMA",
    "tcgen05": r"\bUTC\w*MMA",
    "local": r"\b(?:LDL|STL)\b",
    "atomic": r"\b(?:RED|ATOMG?)\.",
}
_HIP = {
    "load_wide": r"\b(?:global|buffer)_load_dwordx4",
    "load": r"\b(?:global|buffer|flat)_load_",
    "store_wide": r"\b(?:global|buffer)_store_dwordx4",
    "store": r"\b(?:global|buffer|flat)_store_",
    "mfma": r"\bv_mfma_\w+",
    "local": r"\bscratch_(?:load|store)_",
    "atomic": r"\b(?:global|buffer|flat)_atomic_",
}


@dataclass(frozen=True)
class Specialization:
    """What Triton compiles for a launch: equal ones are one binary.

    Attributes:
        kernel: the jitted function.
        signature: Triton's type of each parameter, "constexpr" for one whose value is compiled in.
        constexprs: those values.
        divisible: the parameters that Triton may assume to be multiples of 16.
        options: number of warps, of stages.
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        types = " ".join(t for _, t in self.signature if t.startswith(("*", "tensordesc")))
        values = " ".join(f"{k}={v}" for k, v in self.constexprs)
        odd = [k for k, t in self.signature if t != "constexpr" and t != "fp32" and k not in self.divisible]
        warps = dict(self.options)["num_warps"]
        return f"{self.kernel.__name__}({types}; {values}; {warps} warps; not divisible: {' '.join(odd) or 'none'})"

    def misaligned(self) -> Specialization:
        """Return the same with nothing known to be divisible, as for odd sizes and pointers."""
        return Specialization(self.kernel, self.signature, self.constexprs, (), self.options)


@dataclass(frozen=True)
class Compiled:
    """What the binary of one specialization shows.

    Attributes:
        specialization: what was compiled.
        target: a name from `TARGETS`.
        registers: of one thread.
        spilled: bytes of stack, or registers spilled: zero where everything stays in registers.
        shared: bytes of shared memory.
        counts: how often each family of instructions occurs: ``load``, ``store`` (to and from global memory),
            ``copy`` (asynchronous, into shared memory), each of any width and as ``_wide`` of 128 bits or more;
            ``tma_load``, ``tma_store``; matrix products as ``mma``, ``wgmma``, ``tcgen05`` or ``mfma``; ``local``
            (spilled registers) and ``atomic``.
        dots: (rows, columns, inner size, operand dtype) of every matrix product in the kernel's own code.
        tf32: whether a product rounds float32 operands.
    """

    specialization: Specialization
    target: str
    registers: int
    spilled: int
    shared: int
    counts: dict[str, int]
    dots: tuple[tuple[int, int, int, str], ...]
    tf32: bool


def specialize(launch: Launch) -> Specialization:
    """Return what Triton would compile for a launch."""
    signature, constexprs, divisible = {}, {}, []
    for parameter in launch.kernel.params:
        name = parameter.name
        value = launch.arguments.get(name, parameter.default)
        kind, aligned = _kind(value)
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one:
            kind = "constexpr"
        elif parameter.annotation_type and kind != "constexpr":
            kind = parameter.annotation_type
        signature[name] = kind
        if kind == "constexpr":
            constexprs[name] = value
        elif aligned and not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment:
            divisible.append(name)
    return Specialization(
        launch.kernel,
        tuple(signature.items()),
        tuple(constexprs.items()),
        tuple(divisible),
        tuple(launch.options.items()),
    )


def _kind(value: Any) -> tuple[str, bool]:
    """Return Triton's type of an argument and whether it is a multiple of 16."""
    if isinstance(value, Tensor):
        # A tensor on the device "meta" has no address; what torch allocates is aligned.
        start = value.storage_offset() * value.element_size() if value.is_meta else value.data_ptr()
        return f"*{canonicalize_dtype(value.dtype)}", start % ALIGNMENT == 0
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{canonicalize_dtype(value.base.dtype)}{list(value.block_shape)}>", False
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        width = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return width, value % ALIGNMENT == 0
    if isinstance(value, float):
        return "fp32", False
    return "constexpr", False


def distinct(launches: Iterable[Launch]) -> list[Specialization]:
    """Return what Triton would compile for several launches, each once."""
    return list(dict.fromkeys(map(specialize, launches)))


def compile_for(specialization: Specialization, target: str, cache: Path) -> Compiled:
    """Compile for a target and read the binary.

    Args:
        specialization: what to compile.
        target: a name from `TARGETS`.
        cache: Triton's cache folder for this compile.

    Raises:
        RuntimeError: if a tool that reads the binary fails.
        Exception: whatever Triton raises where the kernel does not compile.
    """
    names = [name for name, _ in specialization.signature]
    properties = [["tt.divisibility", ALIGNMENT]]
    source = ASTSource(
        fn=specialization.kernel,
        signature=dict(specialization.signature),
        constexprs=dict(specialization.constexprs),
        attrs={(names.index(name),): properties for name in specialization.divisible},
    )
    # The default of fused multiply-adds differs between Triton's versions.
    options = {**dict(specialization.options), "enable_fp_fusion": True}
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(cache)
        compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_hip if target.startswith("gfx") else _read_cuda
    registers, spilled, counts = read(compiled.asm)
    return Compiled(
        specialization,
        target,
        registers,
        spilled,
        compiled.metadata.shared,
        counts,
        _dots(compiled.asm["ttir"]),
        "tf32" in compiled.asm.get("ptx", "") or "xf32" in compiled.asm.get("amdgcn", ""),
    )


def _dots(ttir: str) -> tuple[tuple[int, int, int, str], ...]:
    shape = r"tensor<(\d+)x(\d+)x(\w+)>"
    found = re.findall(rf"tt\.dot .*? : {shape} \* {shape} -> ", ttir)
    return tuple((int(m), int(n), int(k), dtype) for m, k, dtype, _, n, _ in found)


def _count(text: str, families: dict[str, str]) -> dict[str, int]:
    return {name: len(re.findall(pattern, text)) for name, pattern in families.items()}


@functools.cache
def _tool(name: str) -> str:
    return getattr(triton.knobs.nvidia, name).path


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: expected it to read the binary; got {result.stderr.strip()}")
    return result.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in what the tool says"
    return int(found[1])


def _read_cuda(asm: dict[str, Any]) -> tuple[int, int, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        usage = _run(_tool("cuobjdump"), "-res-usage", str(path))
        counts = _count(_run(_tool("nvdisasm"), "-c", str(path)), _CUDA)
    registers, stack = (_number(rf"\b{key}:(\d+)", usage) for key in ("REG", "STACK"))
    # A spill needs stack; a stack without LDL or STL is only the frame of a call.
    return registers, stack if counts["local"] else 0, counts


def _read_hip(asm: dict[str, Any]) -> tuple[int, int, dict[str, int]]:
    text = asm["amdgcn"]

    def value(name: str) -> int:
        return _number(rf"\.{name}:\s+(\d+)", text)

    # Scalar registers spill into lanes of vector registers, which costs no memory access.
    spills = value("vgpr_spill_count") + value("private_segment_fixed_size")
    return value("vgpr_count"), spills, _count(text, _HIP)
