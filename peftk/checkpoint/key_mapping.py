"""Keys of a file that are renames of the expected ones: applying a `key_mapping`, and finding the one that fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher

from .container import shown

PREFIX = "base_model.model."
MAX_RULES = 8
# Finding a rename is a service of an error message: beyond this, it is not worth the time.
MAX_KEYS = 20_000

Rename = Callable[[str], str]


def check_key_mapping(mapping: object) -> None:
    """Raise unless `mapping` is None or a dict from regular expressions to replacements.

    Raises:
        TypeError: It is something else.
        ValueError: A key is no regular expression, or a replacement does not fit its expression.
    """
    if mapping is None:
        return
    if not isinstance(mapping, Mapping):
        raise TypeError(f"key_mapping: expected a dict from patterns to replacements, got {mapping!r}")
    for pattern, replacement in mapping.items():
        if not isinstance(pattern, str) or not isinstance(replacement, str):
            raise TypeError(f"key_mapping: expected strings, got {pattern!r}: {replacement!r}")
        try:
            # The replacement is parsed only where the expression matches, so something is made that it matches.
            re.sub(f"(?:{pattern})|", replacement, "")
        except (re.error, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"key_mapping: expected a regular expression and its replacement, got {pattern!r}: {replacement!r} "
                f"({error})"
            ) from None


def renamer(mapping: Mapping[str, str]) -> Rename:
    """Return what `mapping` does to a key, by PEFT's rule: the first expression that is found in it is replaced.

    Expressions see the key without `base_model.model.`. A key without that prefix, which PEFT refuses, gets it.
    """
    rules = [(re.compile(pattern), replacement) for pattern, replacement in mapping.items()]

    def rename(key: str) -> str:
        prefix = next((p for p in (PREFIX, "base_model.") if key.startswith(p)), "")
        name = key[len(prefix) :]
        for pattern, replacement in rules:
            changed, count = pattern.subn(replacement, name)
            if count:
                name = changed
                break
        else:
            return key
        return (prefix or PREFIX) + name

    return rename


def describe_rename(present: Iterable[str], expected: Iterable[str]) -> str | None:
    """Say, in one sentence, by which renames the keys of a file differ from the expected ones, or return None.

    Args:
        present: The keys of the file.
        expected: The keys that the model wants.
    """
    present, wanted = list(present), set(expected)
    mapping = find_mapping(present, wanted)
    if mapping is None:
        return None
    unknown = [key for key in present if key not in wanted]
    rename = renamer(mapping)
    which = f"all {len(present)} keys" if len(unknown) == len(present) else f"{len(unknown)} of {len(present)} keys"
    what = _in_words(mapping) or f"{len(mapping)} renames"
    return (
        f"{which} of the file differ from the model's names by {what}, as {shown(unknown[0])} from "
        f"{shown(rename(unknown[0]))}; if they are the same modules, pass key_mapping={mapping!r} to from_pretrained "
        "or load_adapter"
    )


def _in_words(mapping: Mapping[str, str]) -> str | None:
    if len(mapping) != 1:
        return None
    ((pattern, replacement),) = mapping.items()
    old, new = (text.replace("\\", "") for text in (pattern.removeprefix("^"), replacement))
    if not pattern.startswith("^"):
        return f"one rename, {old.strip('.')!r} to {new.strip('.')!r}"
    if not old and not new:
        return f"the prefix {PREFIX!r}, which they lack"
    if not new:
        return f"the prefix {old!r}, which the model's names lack"
    if not old:
        return f"the prefix {new!r}, which they lack"
    return f"the prefix {old!r} where the model's names have {new!r}"


def find_mapping(
    present: Iterable[str], expected: Iterable[str], *, all_expected: bool = True
) -> dict[str, str] | None:
    """Return a `key_mapping` that makes expected keys of those that are present, or None.

    With `all_expected` it makes exactly those; without, as many as there are present.
    """
    present, wanted = list(present), set(expected)
    if (all_expected and len(present) != len(wanted)) or not 0 < len(present) <= MAX_KEYS:
        return None
    held = set(present)
    unknown, missing = [key for key in present if key not in wanted], sorted(wanted - held)
    if not unknown or len(unknown) == 1 < len(present):
        # One strange key among others is a damaged or misspelt one.
        return None
    partners = {strict: _by_shape(missing, strict) for strict in (True, False)}
    rules: dict[str, str] = {}
    left, open_keys = unknown, set(missing)
    while left and len(rules) < MAX_RULES:
        rule = None
        for strict, by_shape in partners.items():
            near = [key for key in by_shape.get(_shape(left[0], strict), []) if key in open_keys]
            rule = rule or _best_rule(left[0], near, left, open_keys)
        if rule is None:
            return None
        rules[rule[0]] = rule[1]
        rename = renamer(rules)
        left = [key for key in unknown if rename(key) not in wanted]
        open_keys -= {rename(key) for key in unknown}
    made = {renamer(rules)(key) for key in present}
    return rules if made <= wanted and len(made) == len(present) else None


def rename_names(names: Iterable[str], mapping: Mapping[str, str]) -> set[str]:
    """Return names of modules, whole or endings, after what `mapping` does to the keys of modules of such names."""
    rename = renamer(mapping)

    def renamed(name: str) -> str:
        for before in (PREFIX, f"{PREFIX}_."):
            key = rename(f"{before}{name}._")
            if key != f"{before}{name}._" and key.startswith(before) and key.endswith("._"):
                return key[len(before) : -2]
        return name

    return set(map(renamed, names))


def describe_renamed_modules(paths: Iterable[str], names: Iterable[str]) -> str | None:
    """Say by which renames the modules of a file differ from those of a model, or return None.

    Args:
        paths: The modules of which the file holds adapters.
        names: The layers of the model.
    """
    paths = sorted({f"{PREFIX}{path}._" for path in paths})
    mapping = find_mapping(paths, [f"{PREFIX}{name}._" for name in names], all_expected=False)
    if mapping is None:
        return None
    what = _in_words(mapping) or f"{len(mapping)} renames"
    return (
        f"the names of the modules in the file differ from those of the model by {what}; if they are the same modules, "
        f"pass key_mapping={mapping!r} to from_pretrained or load_adapter"
    )


def _shape(key: str, strict: bool) -> tuple[str, ...]:
    """Return what a rename leaves of a key: its numbers and its end, with `strict` one more part of it."""
    parts = key.split(".")
    return (*(part for part in parts if part.isdigit()), *parts[-2 if strict else -1 :])


def _by_shape(keys: Iterable[str], strict: bool) -> dict[tuple[str, ...], list[str]]:
    result: dict[tuple[str, ...], list[str]] = {}
    for key in keys:
        result.setdefault(_shape(key, strict), []).append(key)
    return result


def _best_rule(key: str, partners: list[str], left: list[str], wanted: set[str]) -> tuple[str, str] | None:
    """Return the rule, of those that turn `key` into one of `partners`, that helps most of the keys that are left.

    Of several partners for which that is the same number, as q_proj and v_proj, the one with the nearest name counts;
    if two are equally near, nothing says which is meant.
    """
    sample = left[:: max(1, len(left) // 50)]
    found: dict[str, tuple[tuple[int, float], tuple[str, str]]] = {}
    for partner in partners[:30]:
        alike = SequenceMatcher(None, key, partner, autojunk=False).ratio()
        for rule in _rules(key, partner):
            rename = renamer(dict([rule]))
            helped = sum(rename(other) in wanted for other in sample) if rename(key) == partner else 0
            if helped and (partner not in found or helped > found[partner][0][0]):
                found[partner] = (helped, alike), rule
    ranked = sorted(found.values(), reverse=True)
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
        return None
    return ranked[0][1]


def _rules(old: str, new: str) -> Iterable[tuple[str, str]]:
    """Yield rules that turn one key into another: parts of the middle, with ever more of what is before them."""
    a, b = (key.removeprefix(PREFIX).removeprefix("base_model.").split(".") for key in (old, new))
    shortest = min(len(a), len(b))
    tail = next((n for n in range(shortest) if a[-1 - n] != b[-1 - n]), shortest)
    head = next((n for n in range(shortest - tail) if a[n] != b[n]), shortest - tail)
    for start in range(head, -1, -1):
        first, second = a[start : len(a) - tail], b[start : len(b) - tail]
        if start == 0:
            yield "^" + "".join(re.escape(part) + r"\." for part in first), "".join(f"{part}." for part in second)
        elif first and second:
            yield r"\." + r"\.".join(map(re.escape, first)) + r"\.", f".{'.'.join(second)}."


__all__ = [
    "check_key_mapping",
    "describe_rename",
    "describe_renamed_modules",
    "find_mapping",
    "rename_names",
    "renamer",
]
