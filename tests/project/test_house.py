"""The rules of the house that a program can check."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peftk
from peftk import ops
from peftk.runtime import registry

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "peftk"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")])
CSRC = sorted((ROOT / "csrc").rglob("*.[ch]*"))
FAMILIES = sorted(ops.__all__)

# From the bottom up; a module may import what stands in its own line or below. Backends are imported by name, when an
# operator first asks for one.
STOREYS = (
    ("_version", "_overview", "_C"),
    ("runtime",),
    ("kernels", "triton_kernels"),
    ("ops",),
    ("functional", "checkpoint"),
    ("methods",),
    ("nn",),
    ("models",),
    ("integrations",),
    ("testing", "__init__"),
    ("commands",),
    ("__main__",),
)
RANKS = {name: rank for rank, names in enumerate(STOREYS) for name in names}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top(path: Path) -> str:
    """Return the name below peftk of the module or package that a file belongs to."""
    first = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the names below peftk that a file imports, anywhere in it."""
    inside = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(a.name.split(".")[0] == "peftk" for a in node.names), f"{relative(path)}: absolute import"
        if not isinstance(node, ast.ImportFrom):
            continue
        if not node.level:
            assert (node.module or "").split(".")[0] != "peftk", f"{relative(path)}: absolute import of peftk"
            continue
        parts = [*inside[: len(inside) - node.level + 1], *(node.module or "").split(".")]
        names = [p for p in parts if p][:1] or [a.name for a in node.names]
        found |= {name if name in RANKS else "__init__" for name in names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_down(path):
    own = top(path)
    assert own in RANKS, f"{own}: give it a place in STOREYS"
    for name in imports(path) - {own}:
        assert RANKS[name] <= RANKS[own], f"{relative(path)} imports {name} from above"


def test_no_backend_is_a_library_for_another():
    """What several need stands in `kernels/shared`, which needs none of them."""
    for path in SOURCES:
        own = "triton" if top(path) == "triton_kernels" else path.parent.name
        if top(path) not in ("kernels", "triton_kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                used = set((node.module or "").split(".")) & {"torch", "native", "triton_kernels"}
                assert used <= {own}, f"{relative(path)} imports {used}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "testing" / "cases").glob("*.py")), ids=relative)
def test_cases_need_torch_only(path):
    """The doctor runs them where nothing else is installed."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    used = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    used |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    assert {name.partition(".")[0] for name in used} - {"torch"} <= sys.stdlib_module_names


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=relative)
def test_no_test_module_imports_another(path):
    """What several need stands in tests/support."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(part.startswith("test_") or part == "conftest" for name in names for part in name.split("."))


def test_checkpoints_know_no_model():
    used = set().union(*(imports(p) for p in (PACKAGE / "checkpoint").rglob("*.py")))
    assert not used & {"nn", "models", "ops", "functional"}


@pytest.mark.parametrize("path", [*SOURCES, *CSRC], ids=relative)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 450


TRITON = [p for p in SOURCES if top(p) == "triton_kernels"]
MAKES_A_TILE = {"load", "zeros", "full", "dot", "arange"}


def functions(path: Path, jitted: bool | None = None) -> list[ast.FunctionDef]:
    """Return the functions of a file; those compiled by Triton alone, or all others, if asked for."""
    found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    compiled = {f.name for f in found if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}
    return [f for f in found if jitted is None or (f.name in compiled) is jitted]


@pytest.mark.parametrize("path", TRITON, ids=relative)
def test_triton_functions_are_short(path):
    for function in functions(path):
        given = function.args
        assert function.end_lineno - function.body[0].lineno < 70, f"{function.name}: split it"
        assert len(given.posonlyargs + given.args + given.kwonlyargs) <= 24, f"{function.name}: too many arguments"


@pytest.mark.parametrize("path", TRITON, ids=relative)
def test_host_functions_of_triton_have_types(path):
    """mypy overlooks what has none in these files, for a kernel has none: Triton takes an annotation for an order."""
    for function in functions(path, jitted=False):
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        bare = [a.arg for a in arguments if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{function.name}: {', '.join(bare)} without a type"
        assert function.returns is not None, f"{function.name} without a type"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_what_mypy_is_told_to_ignore_says_why(path):
    for rest in re.findall(r"# type: ignore(.*)", path.read_text()):
        assert re.fullmatch(r"\[[a-z-]+\]  # \w.*", rest), f"{relative(path)}: expected [code]  # reason; got {rest!r}"


@pytest.mark.parametrize("path", TRITON, ids=relative)
def test_every_tile_of_a_kernel_states_its_shape(path):
    """``# [ROWS, COLUMNS]`` behind the first assignment of every name that holds a tile, or in the line above."""
    lines = path.read_text().splitlines()
    for function in functions(path, jitted=True):
        seen = set()
        assignments = [n for n in ast.walk(function) if isinstance(n, ast.Assign)]
        for node in sorted(assignments, key=lambda n: n.lineno):
            calls = {c.func.attr for c in ast.walk(node.value) if isinstance(c, ast.Call) and hasattr(c.func, "attr")}
            names = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            near = [lines[node.end_lineno - 1].partition("#")[2], lines[node.lineno - 2].strip().removeprefix("#")]
            if any(comment.strip().startswith("[") for comment in near):
                seen |= names
            elif calls & MAKES_A_TILE:
                assert names <= seen, f"{relative(path)}:{node.lineno}: {', '.join(names - seen)} has no shape"


@pytest.mark.parametrize("path", TRITON, ids=relative)
def test_tile_numbers_stand_in_functions_of_their_own(path):
    """A launch writes no number of a tile: a function does, whose docstring says where they come from."""
    for call in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)):
        if ast.unparse(call.func).endswith("launch"):
            literal = [k.arg for k in call.keywords if k.arg and isinstance(k.value, ast.Constant)]
            tile = [name for name in literal if name.startswith(("BLOCK", "num_"))]
            assert not tile, f"{relative(path)}:{call.lineno}: {', '.join(tile)}"
    for function in functions(path, jitted=False):
        if '"num_warps"' in ast.unparse(function).replace("'", '"'):
            assert ast.get_docstring(function), f"{function.name}: say where its numbers come from"


@pytest.mark.parametrize("path", CSRC, ids=relative)
def test_kernels_know_no_torch(path):
    text = path.read_text()
    assert "torch/extension.h" not in text and "<ATen/" not in text and "<c10/" not in text
    family_header = path.suffix == ".h" and path.stem in FAMILIES
    if path.parent.name in ("cpu", "cuda") or family_header:
        assert not re.search(r"#include\s*[<\"]torch/", text)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_name_is_the_file_name(family):
    package = ("peftk/kernels/torch/{}.py", "peftk/testing/cases/{}.py", "peftk/testing/calls/{}.py")
    for place in (*package, "tests/support/triton_calls/{}.py", "docs/{}.md"):
        assert (ROOT / place.format(family)).is_file(), place.format(family)
    if (PACKAGE / "kernels" / "native" / f"{family}.py").is_file():
        for place in ("csrc/{}.h", "csrc/{}.cpp", "csrc/cpu/{}.cpp"):
            assert (ROOT / place.format(family)).is_file(), place.format(family)


@pytest.mark.parametrize("name", peftk.functional.__all__)
def test_operator_is_whole(name):
    """Forward, and backward if there is one, with a torch kernel, a FLOP formula and one signature on every backend."""
    from torch.utils.flop_counter import flop_registry

    from peftk.testing.calls import operators

    for operator in operators(name):
        assert operator in registry.OPERATORS
        packet = getattr(importlib.import_module("torch").ops.peftk, operator)
        assert packet in flop_registry
        expected = [a.name for a in packet.default._schema.arguments]
        kernel = registry.OPERATORS[operator].kernel("torch")
        assert not isinstance(kernel, str), kernel
        *named, last = inspect.signature(kernel[0]).parameters.values()
        # What belongs together may stand behind a star, which passes it on or gives it a name of its own.
        rest = last.kind is inspect.Parameter.VAR_POSITIONAL
        names = [parameter.name for parameter in named] + ([] if rest else [last.name])
        assert names == (expected[: len(names)] if rest else expected)


def test_every_operator_has_a_public_function():
    assert {n.removesuffix("_backward") for n in registry.OPERATORS} == set(peftk.functional.__all__)


@pytest.mark.parametrize("name", peftk.functional.__all__)
def test_docstring_is_whole(name):
    function = getattr(peftk.functional, name)
    text = inspect.getdoc(function)
    for heading in ("Args:", "Returns:", "Raises:", "Saved for backward:", "Source:", "Example:"):
        assert f"\n{heading}" in text, f"{name}: {heading}"
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^\s+{parameter}: ", text, re.MULTILINE), f"{name}: {parameter}"


@pytest.mark.parametrize("name", [n for n in peftk.__all__ if callable(getattr(peftk, n))])
def test_public_name_is_documented(name):
    assert len((inspect.getdoc(getattr(peftk, name)) or "").split()) >= 5


def modules() -> list[str]:
    found = ["peftk", *(m.name for m in pkgutil.walk_packages(peftk.__path__, "peftk."))]
    skipped = ("peftk._C", "peftk.__main__", "peftk.commands")
    native = importlib.import_module("peftk.kernels.native").unavailable() is not None
    return [m for m in found if not m.startswith(skipped) and not (native and m.startswith("peftk.kernels.native."))]


@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, optionflags=flags).failed == 0


def test_public_functions_have_examples_that_run():
    for name in peftk.functional.__all__:
        function = getattr(peftk.functional, name)
        examples = doctest.DocTestFinder(recurse=False).find(function, globs={})[0].examples
        assert any(not e.options.get(doctest.SKIP) for e in examples), name


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_settings_are_read_in_one_file(path):
    if relative(path) == "peftk/runtime/settings.py":
        return
    text = path.read_text()
    assert not re.search(r"\bos\.(environ|getenv|putenv)\b|from os import", text)


def test_settings_are_documented():
    table = (ROOT / "docs" / "backends.md").read_text()
    read = set()
    for path in [*SOURCES, ROOT / "setup.py"]:
        read |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text()))
    assert "PEFTK_BACKEND" in read
    for name in read:
        assert f"`{name}`" in table, name


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_messages_neither_stutter_nor_quote_twice(path):
    def text(node: ast.JoinedStr) -> str:
        return "".join(
            str(v.value) if isinstance(v, ast.Constant) else "{repr}" if v.conversion == ord("r") else "{}"
            for v in node.values
        )

    for call in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Raise)):
        for node in ast.walk(call):
            said = text(node) if isinstance(node, ast.JoinedStr) else getattr(node, "value", None)
            if isinstance(said, str):
                assert not re.search(r"\b([a-z_]{2,})\b:? \1\b", said), said
                assert not re.search(r"['\"]\{repr\}['\"]", said), said
                assert "{sorted(map(repr" not in ast.unparse(node), said


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_library_neither_prints_nor_promises(path):
    text = path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    # The command line, print_trainable_parameters and the callback of trainers are there to print.
    if top(path) in ("commands", "__main__") or path.name in ("peft_model.py", "hf_trainer.py"):
        return
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls)


def test_no_machine_is_named():
    """No file says where it was made, or from which host packages came."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of what is committed")
    hosts = ("py" + "pi.org", "python" + "hosted", "/ro" + "ot/", "/wo" + "rk/", "/opt/" + "wheels")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".png", ".safetensors") or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        for host in hosts:
            assert host not in text, f"{name} names {host}"
