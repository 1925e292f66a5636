"""Regular expressions for names of modules, which may come from a file: matched in bounded time, whatever they say.

`re` tries one way through an expression after the other, and there may be exponentially many. Here all ways are
followed at once, letter by letter: the state after a letter is the set of places in the expression where a match may
be. Sets that were met before are not worked out again: ordinary expressions cost one look-up for each letter.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MAX_STEPS = 800_000
"""The work that the expressions of one field may take, about as much as a second."""
MAX_LENGTH = 50_000
MAX_PLACES = 30_000
_PLACE, _EXPRESSION = 5, 300  # The steps that making these is counted for.

# The parser of `re`, so that expressions mean what they mean there.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_FLAGS = re.IGNORECASE | re.DOTALL | re.VERBOSE | re.UNICODE
_LITERALS = re.compile(r"(?:[\w-]|\\\.|\|)+")
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[.-])+\$?")
PATTERN = r"(.*\.)?({})$"
"""What a key of `rank_pattern`, `alpha_pattern` and their like is put into: a module's name, or its end, in PEFT."""
WAY_OUT = "write the names of the modules, or their endings, as a list"

_NONE: frozenset[int] = frozenset()

Test = Callable[[str], bool]


class Budget:
    """The steps that are left; see `MAX_STEPS`."""

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def spend(self, steps: int) -> None:
        """Count steps, or raise ValueError if there are none left."""
        self.left -= steps
        if self.left < 0:
            raise ValueError(f"regular expressions that take too long to try on the names of modules; {WAY_OUT}")


class Expression:
    """A regular expression as an automaton (Glushkov's: one place for every letter of the expression).

    Args:
        text: The expression, in the syntax of `re`. References to groups, atomic groups and possessive repeats, which
            need more than an automaton, are refused.
        budget: What making it is counted on.

    Raises:
        ValueError: It is no expression, has such parts, or is too large.
    """

    def __init__(self, text: str, budget: Budget) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"a regular expression of {len(text)} letters; expected at most {MAX_LENGTH}; {WAY_OUT}")
        self._budget = budget
        budget.spend(_EXPRESSION + len(text))
        try:
            tree = _parser.parse(text)
            self._build(tree, tree.state.flags)
        except (re.error, OverflowError) as error:
            raise ValueError(f"no regular expression ({error})") from None
        except RecursionError:
            raise ValueError(f"a regular expression that is nested too deeply; {WAY_OUT}") from None

    def _build(self, tree: Any, flags: int) -> None:
        if flags & ~_FLAGS:
            raise ValueError(
                f"a regular expression with the flags {re.RegexFlag(flags & ~_FLAGS)!r}; expected i, s or x"
            )
        # Place 0 is the start. A place takes a letter, or stands between two letters where something holds.
        self._letters: dict[int, Test] = {}
        self._between: dict[int, Callable[[str, int, Budget], bool]] = {}
        self._follow: list[list[int]] = [[]]
        nullable, first, last = self._sequence(tree, flags)
        self._link([0], first)
        self._final = frozenset([*last, 0] if nullable else last)
        self._states: dict[tuple[frozenset[int], frozenset[int], str], frozenset[int]] = {}
        self._accepting: dict[str, frozenset[int]] = {}
        self._places_ahead: dict[frozenset[int], frozenset[int]] = {}

    # -- making -------------------------------------------------------------------------------------------------

    def _link(self, before: list[int], after: list[int]) -> None:
        self._budget.spend(len(before) * len(after))
        for place in before:
            self._follow[place] += after

    def _place(self, letters: Test | None = None, between: Any = None) -> tuple[bool, list[int], list[int]]:
        self._budget.spend(_PLACE)
        place = len(self._follow)
        if place > MAX_PLACES:
            raise ValueError(f"a regular expression of more than {MAX_PLACES} places; {WAY_OUT}")
        self._follow.append([])
        if letters is not None:
            self._letters[place] = letters
        else:
            self._between[place] = between
        return False, [place], [place]

    def _sequence(self, nodes: Iterable[Any], flags: int) -> tuple[bool, list[int], list[int]]:
        """Add nodes that follow each other; say whether nothing matches them, and which places are first and last."""
        result: tuple[bool, list[int], list[int]] = (True, [], [])
        for node in nodes:
            result = self._join(result, self._node(node, flags))
        return result

    def _join(
        self, before: tuple[bool, list[int], list[int]], after: tuple[bool, list[int], list[int]]
    ) -> tuple[bool, list[int], list[int]]:
        self._link(before[2], after[1])
        self._budget.spend(len(before[1]) + len(after[2]))
        return (
            before[0] and after[0],
            before[1] + after[1] if before[0] else before[1],
            after[2] + before[2] if after[0] else after[2],
        )

    def _node(self, node: Any, flags: int) -> tuple[bool, list[int], list[int]]:
        kind, value = str(node[0]), node[1]
        if kind == "LITERAL":
            return self._place(_literal(value, bool(flags & re.IGNORECASE)))
        if kind in ("NOT_LITERAL", "ANY", "IN", "FAILURE"):
            return self._place(_letters(kind, value, flags))
        if kind == "AT":
            return self._place(between=functools.partial(_at, str(value)))
        if kind == "SUBPATTERN":
            _, add, remove, inner = value
            return self._sequence(inner, (flags | add) & ~remove)
        if kind == "BRANCH":
            parts = [self._sequence(inner, flags) for inner in value[1]]
            first = [place for part in parts for place in part[1]]
            return any(part[0] for part in parts), first, [place for part in parts for place in part[2]]
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = value
            return self._repeat(low, high, inner, flags)
        if kind in ("ASSERT", "ASSERT_NOT"):
            direction, inner = value
            return self._place(between=self._look(direction, inner, kind == "ASSERT", flags))
        raise ValueError(
            f"a regular expression with a part that needs trying back and forth ({kind.lower()}); {WAY_OUT}"
        )

    def _repeat(self, low: Any, high: Any, inner: Any, flags: int) -> tuple[bool, list[int], list[int]]:
        result: tuple[bool, list[int], list[int]] = (True, [], [])
        endless = high is _parser.MAXREPEAT
        low, high = int(low), int(low) + 1 if endless and not int(low) else int(low) if endless else int(high)
        for count in range(high):
            part = self._sequence(inner, flags)
            if not part[1]:
                return result
            if endless and count == high - 1:
                self._link(part[2], part[1])
            result = self._join(result, (part[0] or count >= low, part[1], part[2]))
        return result

    def _look(self, direction: int, inner: Any, wanted: bool, flags: int) -> Callable[[str, int, Budget], bool]:
        other = object.__new__(Expression)
        other._budget = self._budget
        other._build(inner, flags)
        width, most = inner.getwidth()
        if direction < 0 and width != most:
            raise ValueError("no regular expression (look-behind requires fixed-width pattern)")

        def holds(text: str, at: int, budget: Budget) -> bool:
            # Looking from every letter of a name, from every letter that is reached so, adds up.
            budget.spend(1 + (len(text) - at) // 2)
            if direction > 0:
                return other._run(text, at, len(text), budget, whole=False) is wanted
            return (at >= width and other._run(text, at - width, at, budget, whole=True)) is wanted

        return holds

    # -- matching -----------------------------------------------------------------------------------------------

    def fullmatch(self, text: str, budget: Budget) -> bool:
        """Whether the whole text matches."""
        return self._run(text, 0, len(text), budget, whole=True)

    def match(self, text: str, budget: Budget) -> bool:
        """Whether a beginning of the text matches."""
        return self._run(text, 0, len(text), budget, whole=False)

    def _run(self, text: str, start: int, end: int, budget: Budget, *, whole: bool) -> bool:
        state = frozenset((0,))
        for at in range(start, end + 1):
            ahead = self._ahead(state, budget) if self._between else _NONE
            holding = frozenset(p for p in ahead if self._between[p](text, at, budget)) if ahead else _NONE
            letter = text[at] if at < end else ""
            key = (state, holding, letter)
            if not whole or not letter:
                reached = self._through(state, holding, budget) if holding else state
                if reached & self._final:
                    return True
                if not letter:
                    return False
            following = self._states.get(key)
            if following is None:
                following = self._states[key] = self._after(state, holding, letter, budget)
            if not following:
                return False
            state = following
        return False

    def _ahead(self, state: frozenset[int], budget: Budget) -> frozenset[int]:
        """Return the places between letters that a match in this state may come to before the next letter."""
        found = self._places_ahead.get(state)
        if found is None:
            everything = frozenset(self._between)
            found = self._through(state, everything, budget) & everything
            self._places_ahead[state] = found
        return found

    def _through(self, state: frozenset[int], holding: frozenset[int], budget: Budget) -> frozenset[int]:
        """Return a state with the places between letters that can be reached from it."""
        reached, new = set(state), list(state)
        while new:
            place = new.pop()
            budget.spend(1 + len(self._follow[place]))
            found = [p for p in self._follow[place] if p in holding and p not in reached]
            reached.update(found)
            new += found
        return frozenset(reached)

    def _after(self, state: frozenset[int], holding: frozenset[int], letter: str, budget: Budget) -> frozenset[int]:
        accepting = self._accepting.get(letter)
        if accepting is None:
            budget.spend(len(self._letters))
            accepting = frozenset(place for place, test in self._letters.items() if test(letter))
            self._accepting[letter] = accepting
        if holding:
            state = self._through(state, holding, budget)
        budget.spend(sum(len(self._follow[place]) for place in state))
        return frozenset(p for place in state for p in self._follow[place] if p in accepting)


@functools.lru_cache(maxsize=1024)
def _literal(code: int, ignore_case: bool) -> Test:
    letter = chr(code)
    return frozenset((letter, letter.lower(), letter.upper())).__contains__ if ignore_case else letter.__eq__


def _letters(kind: str, value: Any, flags: int) -> Test:
    """Return the test of a letter that a node makes."""
    if kind == "FAILURE":
        return lambda _: False
    if kind == "ANY":
        return (lambda _: True) if flags & re.DOTALL else (lambda letter: letter != "\n")
    if kind == "NOT_LITERAL":
        items, negate = [("LITERAL", value)], True
    else:
        items = [(str(code), argument) for code, argument in value]
        negate = items[0][0] == "NEGATE"
    single = {chr(argument) for code, argument in items if code == "LITERAL"}
    ranges = [argument for code, argument in items if code == "RANGE"]
    kinds = [_CATEGORIES[str(argument)] for code, argument in items if code == "CATEGORY"]

    def inside(letter: str) -> bool:
        return (
            letter in single
            or any(low <= ord(letter) <= high for low, high in ranges)
            or any(test(letter) for test in kinds)
        )

    if flags & re.IGNORECASE:
        return lambda letter: (
            any(inside(x) for x in {letter, letter.lower()[:1], letter.upper()[:1]} if x) is not negate
        )
    return lambda letter: inside(letter) is not negate


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


_CATEGORIES: dict[str, Test] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda letter: not letter.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda letter: not letter.isspace(),
    "CATEGORY_WORD": _is_word,
    "CATEGORY_NOT_WORD": lambda letter: not _is_word(letter),
}


def _at(kind: str, text: str, at: int, budget: Budget) -> bool:
    """Whether a place between letters, such as the beginning, is at an index of the text."""
    if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return at == 0
    if kind == "AT_END":
        return at == len(text) or (at == len(text) - 1 and text[at] == "\n")
    if kind == "AT_END_STRING":
        return at == len(text)
    before, after = (0 <= i < len(text) and _is_word(text[i]) for i in (at - 1, at))
    return (before is not after) is (kind == "AT_BOUNDARY")


@functools.lru_cache(maxsize=256)
def _expression(text: str) -> Expression:
    return Expression(text, Budget())


def check_expression(text: str) -> None:
    """Raise ValueError, with a sentence without subject, unless `text` is an expression that can be matched."""
    if not _LITERALS.fullmatch(text):
        _expression(text)


def matcher(text: str) -> Test:
    """Return the test whether a regular expression matches a whole name; all its calls share one budget."""
    if _LITERALS.fullmatch(text):
        names = frozenset(text.replace("\\", "").split("|"))
        return names.__contains__
    expression, budget = _expression(text), Budget()
    return lambda name: expression.fullmatch(name, budget)


class Keys:
    """The keys of a field like `rank_pattern`, each of them an expression for the end of a name.

    Args:
        template: How the key stands in the whole expression, of which a beginning of the name is matched.
        keys: The keys in their order.

    Raises:
        ValueError: One is no expression, or there are too many that are not plain names; the message names the key.
    """

    def __init__(self, template: str, keys: Iterable[str]) -> None:
        self._budget = Budget()
        self._whole_too = template.startswith("(.*")
        self._keys = tuple(keys)
        # Plain names by their length and the places of the dots that are not escaped: any letter to an expression.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        self._anchored: set[int] = set()
        self._others: list[tuple[int, Expression]] = []
        for index, key in enumerate(self._keys):
            if _PLAIN.fullmatch(key):
                if key[0] == "^":
                    self._anchored.add(index)
                letters = re.findall(r"\\?.", key.strip("^$"))
                name = "".join(letter[-1] for letter in letters)
                dots = tuple(i for i, letter in enumerate(letters) if letter == ".")
                self._plain.setdefault(len(name), {}).setdefault(dots, {}).setdefault(name, []).append(index)
                continue
            try:
                # By itself too: in the template, brackets could close those of the template.
                Expression(key, self._budget)
                self._others.append((index, Expression(template.format(key), self._budget)))
            except ValueError as error:
                raise ValueError(f"{key[:80]!r}: {error}") from None

    def first(self, name: str) -> str | None:
        """Return the first key that matches a name, or None."""
        index = min(self._matching(name), default=None)
        return None if index is None else self._keys[index]

    def matching(self, name: str) -> set[str]:
        """Return all keys that match a name."""
        return {self._keys[index] for index in self._matching(name)}

    def _matching(self, name: str) -> Iterator[int]:
        starts = [0] if self._whole_too else []
        starts += [i + 1 for i, letter in enumerate(name) if letter == "."]
        for start in starts:
            ending = name[start:]
            for dots, group in self._plain.get(len(ending), {}).items():
                self._budget.spend(2 + len(dots))
                letters = list(ending)
                for i in dots:
                    letters[i] = "."
                for index in group.get("".join(letters), ()):
                    if index not in self._anchored or (start == 0 and self._whole_too):
                        yield index
        for index, expression in self._others:
            self._budget.spend(1)
            if expression.match(name, self._budget):
                yield index


@functools.lru_cache(maxsize=32)
def keys_of(template: str, keys: tuple[str, ...]) -> Keys:
    """Return `Keys`, made once for the same keys."""
    return Keys(template, keys)


__all__ = ["PATTERN", "Keys", "check_expression", "keys_of", "matcher"]
