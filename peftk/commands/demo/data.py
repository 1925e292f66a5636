"""The demo's task on text every machine has: which standard-library package does this piece of source come from?

An example is one function, method or class header of the running Python's own library, with its signature, docstring,
comments and the first lines of its body. Three things keep the task honest:

- **No give-away names.** Import lines are dropped, every package name of the task (`asyncio`, `xml`, ...) is replaced
  by `pkg` wherever it is a part of an identifier or a word, in whatever case, and a module name of these packages in
  front of a dot (`futures.Future`) becomes `pkg` too. This is done to all texts alike, whatever their class.
- **No leak.** A whole top-level class or function goes to one side of the split, and so do near-copies: texts whose
  word 4-grams have a Jaccard similarity above one half (sync and async twins, methods overridden with one docstring).
- **Balance.** Every class has the same number of examples, on both sides.

The result depends on the Python version and on nothing else: there is no random number in this file.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CLASSES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
TRAIN_PER_CLASS = 150
TEST_PER_CLASS = 40
PLACEHOLDER = "pkg"

_WINDOW = 240
_MAX_WINDOWS = 1
_MIN_WORDS = 15
_SHINGLE = 4
_SIMILAR = 0.5
_WORD = re.compile(r"[A-Za-z]+[0-9]*|[0-9]+")
# One part of an identifier: `xml_doc`, `XMLParser`, `parseXml` and `xml2` all contain the part "xml".
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


class DemoDataError(RuntimeError):
    """The running Python does not carry enough readable library source for the task."""


@dataclass(frozen=True)
class Example:
    """One labelled text: what the model sees, its class, where it comes from and its side of the split's unit."""

    text: str
    label: int
    source: str
    unit: str


@dataclass(frozen=True)
class Dataset:
    """A balanced classification task with a held-out part that shares no unit and no near-copy with `train`."""

    classes: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def build_dataset(
    train_per_class: int = TRAIN_PER_CLASS, test_per_class: int = TEST_PER_CLASS, stdlib: Path | None = None
) -> Dataset:
    """Read the library of the running Python and return the task.

    Raises:
        DemoDataError: a package's source is missing, or has fewer examples than asked for.
    """
    root = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    examples = _merge_near_copies(_unique(list(_read_examples(root))))
    train: list[Example] = []
    test: list[Example] = []
    for label, package in enumerate(CLASSES):
        of_class = [example for example in examples if example.label == label]
        held_out, rest = _split(of_class, test_per_class)
        if len(held_out) < test_per_class or len(rest) < train_per_class:
            raise DemoDataError(
                f"the demo needs {train_per_class} + {test_per_class} pieces of source of the package {package!r}, "
                f"found {len(rest)} + {len(held_out)} in {root / package}"
            )
        test += held_out
        train += sorted(rest, key=lambda example: _order(example.source))[:train_per_class]
    train.sort(key=lambda example: _order(example.source))
    test.sort(key=lambda example: _order(example.source))
    return Dataset(CLASSES, tuple(train), tuple(test))


def mask_names(text: str, modules: frozenset[str]) -> str:
    """Replace every package name of the task in `text`, and every name of `modules` before a dot, by `pkg`."""

    def mask_part(match: re.Match[str]) -> str:
        part = match.group().lower()
        return PLACEHOLDER if part in CLASSES or part.removesuffix("s") in CLASSES else match.group()

    text = re.sub(
        r"\b([A-Za-z_]\w*)(?=\.[A-Za-z_])",
        lambda match: PLACEHOLDER if match.group(1).lower() in modules else match.group(1),
        text,
    )
    return _PART.sub(mask_part, text)


def _read_examples(root: Path) -> Iterator[Example]:
    files = {package: sorted((root / package).rglob("*.py")) for package in CLASSES}
    # Some Python releases keep the tests of a package inside it, others do not: the task must not depend on that.
    files = {package: [path for path in paths if "test" not in path.parts] for package, paths in files.items()}
    for package, paths in files.items():
        if not paths:
            raise DemoDataError(
                f"no source of the package {package!r} in {root}: the demo reads the standard library of the running "
                f"Python, which is not complete here"
            )
    modules = frozenset(path.stem.lower() for paths in files.values() for path in paths if path.stem != "__init__")
    for label, package in enumerate(CLASSES):
        for path in files[package]:
            code = path.read_text(encoding="utf-8")
            lines = code.splitlines()
            where = path.relative_to(root).as_posix()
            for top in ast.parse(code, filename=str(path)).body:
                for name, first, last in _pieces(top):
                    text = _clean("\n".join(lines[first - 1 : last]), modules)
                    for index, part in enumerate(textwrap.wrap(text, _WINDOW)[:_MAX_WINDOWS]):
                        if len(_WORD.findall(part)) >= _MIN_WORDS:
                            yield Example(part, label, f"{where}:{name}#{index}", f"{where}:{name}")


def _pieces(top: ast.stmt) -> Iterator[tuple[str, int, int]]:
    """Yield (qualified name, first line, last line) of a top-level function, or of a class's header and methods."""
    function = (ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(top, function):
        yield top.name, top.lineno, top.end_lineno or top.lineno
    elif isinstance(top, ast.ClassDef):
        methods = [node for node in top.body if isinstance(node, function)]
        end = min((node.lineno - 1 - len(node.decorator_list) for node in methods), default=top.end_lineno)
        yield f"{top.name}.__class__", top.lineno, end or top.lineno
        for node in methods:
            yield f"{top.name}.{node.name}@{node.lineno}", node.lineno, node.end_lineno or node.lineno


def _clean(source: str, modules: frozenset[str]) -> str:
    kept = [line for line in source.splitlines() if not re.match(r"\s*(import|from)\s+[\w.]+", line)]
    text = mask_names(textwrap.dedent("\n".join(kept)), modules)
    return re.sub(r"\s+", " ", text).strip()


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in _WORD.findall(text))


def _unique(examples: list[Example]) -> list[Example]:
    """Drop every text that occurs twice, and all copies of one that occurs under two labels."""
    by_text: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        by_text.setdefault(_words(example.text), []).append(example)
    return [copies[0] for copies in by_text.values() if len({example.label for example in copies}) == 1]


def _merge_near_copies(examples: list[Example]) -> list[Example]:
    """Give examples that are near-copies of each other one common unit, so that the split cannot part them."""
    shingles = []
    for example in examples:
        words = _words(example.text)
        shingles.append({words[i : i + _SHINGLE] for i in range(max(1, len(words) - _SHINGLE + 1))})
    parent: dict[str, str] = {example.unit: example.unit for example in examples}

    def find(unit: str) -> str:
        while parent[unit] != unit:
            unit = parent[unit]
        return unit

    holders: dict[tuple[str, ...], list[int]] = {}
    for index, own in enumerate(shingles):
        shared: dict[int, int] = {}
        for shingle in own:
            for other in holders.setdefault(shingle, []):
                shared[other] = shared.get(other, 0) + 1
            holders[shingle].append(index)
        for other, count in shared.items():
            if count > _SIMILAR * (len(own) + len(shingles[other]) - count):
                parent[find(examples[index].unit)] = find(examples[other].unit)
    return [Example(example.text, example.label, example.source, find(example.unit)) for example in examples]


def _split(examples: list[Example], held_out: int) -> tuple[list[Example], list[Example]]:
    """Move whole units, in an order fixed by their names, to the held-out side until it has `held_out` examples."""
    units: dict[str, list[Example]] = {}
    for example in examples:
        units.setdefault(example.unit, []).append(example)
    test: list[Example] = []
    train: list[Example] = []
    # A unit of more than a quarter of the held-out side would make the test about one class of the library.
    for unit in sorted(units, key=_order):
        fits = len(units[unit]) <= min(held_out - len(test), max(1, held_out // 4))
        (test if fits else train).extend(units[unit])
    return test, train


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
