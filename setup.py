"""Builds the extension module and maps the packages; all metadata is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ARCHITECTURES = ("8.0", "9.0a", "10.0")


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin/nvcc").is_file():
            return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build_kind(torch_cuda: str | None, nvcc: str | None) -> str:
    """Read PEFTK_BUILD: cpu or cuda. Whether a GPU is there is never asked: machines that build often have none."""
    kind = os.environ.get("PEFTK_BUILD", "auto")
    if kind == "auto":
        return "cuda" if torch_cuda and nvcc else "cpu"
    if kind == "cuda" and nvcc is None:
        sys.exit("PEFTK_BUILD: 'cuda' needs nvcc: expected it in CUDA_HOME/bin or on the PATH; found none")
    return kind


def architectures(nvcc: str) -> list[str]:
    """Read TORCH_CUDA_ARCH_LIST, or take what is common among what this nvcc knows; the last one brings its PTX."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        listed = [a for a in ARCHITECTURES if "compute_" + re.sub(r"\D", "", a) in known]
        return [*listed[:-1], listed[-1] + "+PTX"]
    for one in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", one):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0, 9.0a or 10.0+PTX; got {one!r}")
    return listed


def code_flags(listed: list[str]) -> list[str]:
    flags = []
    for one in listed:
        name = one.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if one.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def cuda_libraries(nvcc: str) -> list[str]:
    """Ask nvcc where its libraries are; the program of that name may be a link or a script anywhere."""
    said = subprocess.run([nvcc, "--dryrun", "any.cu"], capture_output=True, text=True).stderr
    line = next((line for line in said.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    return [folder for folder in re.findall(r'"-L([^"]+)"', line) if not folder.endswith("stubs")]


def compile_cuda(nvcc: str, listed: list[str], folder: Path) -> list[str]:
    """Compile every .cu file with the same command on every machine: they include nothing of torch's."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sources("csrc/cuda/*.cu"):
        objects.append(str(folder / f"{Path(source).stem}.cu.o"))
        command = [nvcc, "-c", source, "-o", objects[-1], "-std=c++20", "-O3", "-lineinfo", *code_flags(listed)]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", os.environ.get("MAX_JOBS", "0")]
        if host := os.environ.get("CXX"):
            command += ["-ccbin", host]
        print(" ".join(command), flush=True)
        if code := subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(f"{source}: nvcc failed with exit status {code}")
    return objects


def extension() -> dict:
    kind = os.environ.get("PEFTK_BUILD", "auto")
    if kind not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"PEFTK_BUILD: expected auto, none, cpu or cuda; got {kind!r}")
    if kind == "none":
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
    macros = [
        ("PEFTK_VERSION", version["__version__"]),
        ("PEFTK_TORCH_VERSION", torch.__version__.replace("+", ".")),
        # The stable ABI of torch 2.11: the binary works with every later release.
        ("TORCH_TARGET_VERSION", "0x020b000000000000"),
    ]
    nvcc, folders, libraries, link_flags = find_nvcc(), [], [], []
    if cuda := build_kind(torch.version.cuda, nvcc) == "cuda":
        listed = architectures(nvcc)
        macros.append(("PEFTK_CUDA", " ".join(listed)))
        folders = cuda_libraries(nvcc)
        # The static runtime: nothing to find at import, and it shares the driver's context and streams with torch's.
        libraries = ["cudart_static", "dl", "rt", "pthread"]
        link_flags = ["-Wl,--exclude-libs,libcudart_static.a"]
        if torch.version.cuda:
            macros.append(("PEFTK_TORCH_CUDA", None))
            libraries.append("torch_cuda")

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            if cuda:
                module.extra_objects = compile_cuda(nvcc, listed, Path(self.build_temp).absolute() / "cuda")
            super().build_extensions()

    module = CppExtension(
        "peftk._C",
        [*sources("csrc/*.cpp"), *sources("csrc/cpu/*.cpp")],
        include_dirs=[pybind11.get_include()],
        library_dirs=folders,
        libraries=libraries,
        depends=[*sources("csrc/**/*.h"), *sources("csrc/cuda/*.cu")],
        define_macros=macros,
        # Python's own flags ask for debug information, which is most of the file.
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-Wall", "-Wno-psabi", "-fvisibility=hidden", *flags],
        extra_link_args=[*link_flags, *flags],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(
    # `triton_kernels` is an import name that others use: the folder becomes peftk.triton_kernels.
    packages=[*find_packages(include=["peftk", "peftk.*"]), "peftk.triton_kernels"],
    package_dir={"peftk.triton_kernels": "triton_kernels"},
    package_data={"peftk": ["py.typed", "*.pyi", "runtime/tuned/*.json", "integrations/*/*.json"]},
    **extension(),
)
