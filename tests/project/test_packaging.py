"""Wheel and sdist: what is in them, and that they work in a clean environment, away from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from peftk import __version__

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".*cache",
    ".hypothesis",
    "build",
    "dist",
    "*.egg-info",
    "*.so",
    "__pycache__",
    "demo-out",
    "bench-out",
    "results",
)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

TRY = """
import sys
from pathlib import Path
import torch
import peftk
import peftk.triton_kernels
from peftk.testing.compare import assert_close
assert Path(peftk.__file__).is_relative_to(sys.prefix), peftk.__file__
x, blocks = torch.randn(70, 24), torch.randn(3, 8, 8)
truth = x.double() @ torch.block_diag(*blocks.double())
layer = peftk.nn.LoRALinear(torch.nn.Linear(24, 16), peftk.LoraConfig(r=2, init_lora_weights=False))
for backend in sys.argv[1:]:
    with peftk.use_backend(backend):
        rotated = peftk.functional.block_rotate(x, blocks)
        layer(rotated).sum().backward()
        assert_close(rotated, truth, torch.float32)
        print(backend, "ran")
print(peftk.__version__, Path(peftk.__file__).with_name("py.typed").is_file())
print(peftk.explain("block_rotate", x, blocks))
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PEFTK_BACKEND")}
    env |= {"MAX_JOBS": "2", **environment}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


def check(*command: object, cwd: Path, **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout as a fresh clone has it, so that building leaves nothing behind here."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("packaging") / "source", ignore=LEFT_OUT)


def build_wheel(source: Path, out: Path, **environment: str) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", out)
    check(*pip, source, cwd=out.parent, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a new environment that sees this one's other packages, and return its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    check(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    # Only now: pip must not see the peftk that is installed here. A path file brings in no editable installation.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    return python


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def assert_contents(source: Path, found: set[str], compiled: bool) -> None:
    tops = {name.split("/")[0] for name in found}
    assert tops == {"peftk", f"peftk-{__version__}.dist-info"}
    expected = {p.relative_to(source).as_posix() for p in (source / "peftk").rglob("*.py")}
    expected |= {f"peftk/{p.relative_to(source).as_posix()}" for p in (source / "triton_kernels").rglob("*.py")}
    # The tuned tables, and the fingerprints of other libraries.
    expected |= {p.relative_to(source).as_posix() for p in (source / "peftk").rglob("*.json")}
    extensions = {name for name in found if re.fullmatch(r"peftk/_C\.[\w.-]+\.so", name)}
    assert len(extensions) == compiled
    inside = {name for name in found if name.startswith("peftk/")} - extensions
    assert inside == expected | {"peftk/py.typed", "peftk/_C.pyi"}


def test_wheel(source, tmp_path):
    wheel = build_wheel(source, tmp_path / "dist")
    assert_contents(source, names(wheel), compiled=True)
    with zipfile.ZipFile(wheel) as archive:
        information = f"peftk-{__version__}.dist-info"
        assert archive.read(f"{information}/top_level.txt").decode().split() == ["peftk"]
        metadata = archive.read(f"{information}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Version: {__version__}\n" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names(wheel))
    python = install(wheel, tmp_path / "env")
    out = check(python, "-c", TRY, "torch", "native", cwd=tmp_path)
    assert out.startswith(f"torch ran\nnative ran\n{__version__} True\nblock_rotate: native")
    built = check(python, "-c", "import torch, peftk._C as c; print(c.build_info()['version'])", cwd=tmp_path)
    assert built.strip() == __version__
    assert check(python.with_name("peftk"), "--version", cwd=tmp_path).strip() == f"peftk {__version__}"
    assert "All good." in check(python, "-m", "peftk", "doctor", cwd=tmp_path)


def test_sdist(source, tmp_path):
    check(
        *(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path / "dist"),
        source,
        cwd=tmp_path,
    )
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        found = {name.partition("/")[2] for name in content.getnames()}
    tracked = [p for folder in ("csrc", "peftk", "triton_kernels") for p in (source / folder).rglob("*") if p.is_file()]
    for path in tracked:
        assert path.relative_to(source).as_posix() in found
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py", "constraints.txt"} <= found
    assert not any(name.endswith((".so", ".pyc")) for name in found)
    assert not any(name.startswith(("benchmarks/", ".venv/", "build/")) for name in found)
    # Not optimised: the wheel above is, and this one has only to compile from what the archive holds.
    wheel = build_wheel(archive, tmp_path / "wheel", PEFTK_CXX_FLAGS="-O0")
    assert_contents(source, names(wheel), compiled=True)
    python = install(wheel, tmp_path / "env")
    assert check(python, "-c", TRY, "torch", "native", cwd=tmp_path).startswith("torch ran\nnative ran\n")


def test_pure_python(source, tmp_path):
    wheel = build_wheel(source, tmp_path / "dist", PEFTK_BUILD="none")
    assert wheel.name == f"peftk-{__version__}-py3-none-any.whl"
    assert_contents(source, names(wheel), compiled=False)
    python = install(wheel, tmp_path / "env")
    out = check(python, "-c", TRY, "torch", cwd=tmp_path)
    assert "block_rotate: torch" in out
    assert re.search(r"native +no: peftk._C, the compiled extension, cannot be imported", out)
    done = run(python, "-c", TRY, "native", cwd=tmp_path)
    assert done.returncode == 1
    assert "got 'native', which cannot: peftk._C, the compiled extension" in done.stderr
    report = check(python, "-m", "peftk", "doctor", cwd=tmp_path)
    assert "not installed, so operators run on the torch backend" in " ".join(report.split())
    assert report.rstrip().endswith("All good.")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bogus", "PEFTK_BUILD: expected auto, none, cpu or cuda; got 'bogus'"),
        ("cuda", "PEFTK_BUILD: 'cuda' needs nvcc: expected it in CUDA_HOME/bin or on the PATH; found none"),
    ],
)
def test_settings_that_cannot_be_built(source, tmp_path, setting, message):
    # A machine without nvcc, whatever this one has.
    code = "import runpy, shutil; shutil.which = lambda *a, **k: None; runpy.run_path('setup.py', run_name='__main__')"
    nothing = {"CUDA_HOME": "", "CUDA_PATH": ""}
    done = run(sys.executable, "-c", code, "--version", cwd=source, PEFTK_BUILD=setting, **nothing)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(message)


@pytest.mark.parametrize("listed", ["Hopper", "9", "8.0;nine"])
def test_architectures_that_are_no_numbers(source, listed):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    setting = {"PEFTK_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": listed}
    done = run(sys.executable, "setup.py", "--version", cwd=source, **setting)
    assert done.returncode == 1
    assert "TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0, 9.0a or 10.0+PTX; got" in done.stderr


def test_building_without_torch_says_what_to_do(source, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    done = run(sys.executable, "setup.py", "--version", cwd=source, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "no torch here. peftk compiles against the torch that is installed" in done.stderr
    assert "--no-build-isolation" in done.stderr
