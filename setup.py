"""Builds the extension module and maps the packages; all metadata is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def build_kind() -> str:
    """Read PEFTK_BUILD. CUDA sources do not exist yet, so `auto` means the CPU build."""
    kind = os.environ.get("PEFTK_BUILD", "auto")
    if kind not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"PEFTK_BUILD: expected auto, none, cpu or cuda; got {kind!r}")
    if kind == "cuda":
        sys.exit("PEFTK_BUILD: this version has no CUDA C++ kernels; expected auto, none or cpu; got 'cuda'")
    return "cpu" if kind == "auto" else kind


def extension() -> dict:
    if build_kind() == "none":
        return {}
    try:
        import pybind11
        import torch
        from packaging.version import Version
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        sys.exit(
            f"{error}. peftk compiles against the torch that is installed: install torch, ninja, pybind11, packaging "
            "and setuptools first and build with `pip install --no-build-isolation`, or set PEFTK_BUILD=none."
        )
    if Version(torch.__version__) < Version("2.11"):
        sys.exit(f"torch: expected version 2.11 or newer; got {torch.__version__}")
    version: dict = {}
    exec((ROOT / "peftk/_version.py").read_text(), version)
    flags = os.environ.get("PEFTK_CXX_FLAGS", "").split()
    module = CppExtension(
        "peftk._C",
        sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"))),
        include_dirs=[pybind11.get_include()],
        depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")),
        define_macros=[
            ("PEFTK_VERSION", version["__version__"]),
            ("PEFTK_TORCH_VERSION", torch.__version__.replace("+", ".")),
            # The stable ABI of torch 2.11: the binary works with every later release.
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),
        ],
        extra_compile_args=["-O3", "-std=c++20", "-Wall", "-Wno-psabi", "-fvisibility=hidden", *flags],
        extra_link_args=flags,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(
    # `triton_kernels` is an import name that others use: the folder becomes peftk.triton_kernels.
    packages=[*find_packages(include=["peftk", "peftk.*"]), "peftk.triton_kernels"],
    package_dir={"peftk.triton_kernels": "triton_kernels"},
    package_data={"peftk": ["py.typed", "tuned/*.json"]},
    **extension(),
)
