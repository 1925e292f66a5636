"""``import peftk`` imports torch and nothing else, changes nothing, and works where parts are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftk.kernels import native as native_kernels

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = {
    "accelerate",
    "lycoris",
    "matplotlib",
    "numpy",
    "peft",
    "rich",
    "safetensors",
    "sentence_transformers",
    "tqdm",
    "transformers",
    "triton",
    "triton_kernels",
    "typer",
}

WATCH = """
import json, logging, os, sys, warnings
import torch
warnings.simplefilter("error")
asked, events = [], []
class Watcher:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while frame.f_globals["__name__"].startswith("importlib"):
            frame = frame.f_back
        asked.append([name.partition(".")[0], frame.f_globals["__name__"].partition(".")[0]])
sys.meta_path.insert(0, Watcher())
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.putenv", "os.unsetenv", "os.symlink", "os.link", "os.truncate",
          "shutil.move", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def hook(name, args):
    if name in WRITES or (name == "open" and isinstance(args[2], int) and args[2] & WRITING):
        events.append([name, repr(args)])
sys.addaudithook(hook)
state = lambda: [dict(os.environ), torch.get_rng_state().tolist(), str(torch.get_default_dtype()), os.getcwd(),
                 torch.get_num_threads(), len(logging.root.handlers), len(logging.getLogger("peftk").handlers),
                 torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), list(sys.path)]
before = state()
import peftk
print(json.dumps({"asked": asked, "events": events, "same": state() == before,
                  "cuda": torch.cuda.is_initialized(), "extension": "peftk._C" in sys.modules}))
"""


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    # Byte code would be a file written by Python, not by peftk.
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def check(code: str, cwd: Path, **environment: str) -> str:
    done = python(code, cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> dict:
    return json.loads(check(WATCH, tmp_path_factory.mktemp("import")))


def test_nothing_foreign_is_imported(watched):
    # What torch looks for when one of its own modules is imported is torch's choice: its counter of operations, where
    # peftk registers its formulas, looks for Triton, which looks for more.
    asked = {name for name, asker in watched["asked"] if asker not in ("torch", "triton")}
    assert "peftk" in asked, "the watcher saw nothing"
    assert not FOREIGN & asked


def test_nothing_is_changed_written_or_started(watched):
    assert watched["events"] == []
    assert watched["same"]
    assert not watched["cuda"]


def test_extension_is_loaded_at_the_first_call_only(watched):
    assert not watched["extension"]


@pytest.mark.parametrize("blocked", ["triton", "peftk._C"])
def test_works_without(blocked, tmp_path):
    out = check(
        f"import sys; sys.modules[{blocked!r}] = None\n"
        "import peftk, torch\n"
        "x, blocks = torch.randn(3, 8), torch.randn(2, 4, 4, requires_grad=True)\n"
        "y = peftk.functional.block_rotate(x, blocks)\n"
        "y.sum().backward()\n"
        "torch.testing.assert_close(y, x @ torch.block_diag(*blocks))\n"
        "print(blocks.grad is not None, peftk.explain('block_rotate', x, blocks).chosen)",
        tmp_path,
    )
    compiled = blocked != "peftk._C" and native_kernels.unavailable() is None
    assert out.split() == ["True", "native" if compiled else "torch"]


def test_a_named_backend_that_is_missing_raises_with_the_reason(tmp_path):
    out = check(
        "import sys; sys.modules['peftk._C'] = None\n"
        "import peftk, torch\n"
        "x, blocks = torch.randn(3, 8), torch.randn(2, 4, 4)\n"
        "print(peftk.explain('block_rotate', x, blocks))\n"
        "try:\n"
        "    with peftk.use_backend('native'): peftk.functional.block_rotate(x, blocks)\n"
        "except RuntimeError as error: print('RAISED', error)\n",
        tmp_path,
    )
    explained, _, raised = out.partition("RAISED ")
    assert "peftk._C, the compiled extension, cannot be imported" in explained
    assert "block_rotate: torch" in explained
    assert raised.startswith("backend: expected one that can run block_rotate; got 'native', which cannot: peftk._C")


def test_setting_names_the_backend(tmp_path):
    code = "import peftk, torch; print(peftk.explain('block_rotate', torch.ones(2, 4), torch.ones(1, 4, 4)).chosen)"
    assert check(code, tmp_path, PEFTK_BACKEND="torch").strip() == "torch"
    done = python(code, tmp_path, PEFTK_BACKEND="cpp")
    assert "ValueError: PEFTK_BACKEND: expected one of auto, native, torch, triton; got 'cpp'" in done.stderr


def test_checkout_folder_is_not_the_package_triton_kernels():
    done = python("import triton_kernels", ROOT)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "Import peftk.triton_kernels" in done.stderr


def test_triton_kernels_is_a_part_of_peftk(tmp_path):
    assert check("import peftk.triton_kernels as t; print(t.__name__)", tmp_path).strip() == "peftk.triton_kernels"
