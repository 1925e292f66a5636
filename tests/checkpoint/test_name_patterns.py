"""Expressions for names of modules: what they mean is what `re` says, and no expression takes long."""

from __future__ import annotations

import random
import re
import time

import pytest
from torch import nn

from peftk import C3AConfig, LoraConfig, get_peft_model
from peftk.checkpoint.patterns import PATTERN, Budget, Expression, Keys, _expression, check_expression, matcher

NAMES = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(100) for part in "qkvo"]


def expression(rng, depth):
    """Return a random expression, of every part that is supported."""
    kind = rng.randrange(12 if depth else 5)
    if kind < 4:
        return rng.choice(["a", "b", r"\.", "c", "1", "_", "."])
    if kind == 4:
        return rng.choice(
            [r"\d", r"\w", "[ab]", "[^a.]", "[a-c1]", r"\W", "^", "$", r"\b", r"\B", r"[\d_]", r"\A", r"\Z"]
        )
    if kind < 8:
        return expression(rng, depth - 1) + expression(rng, depth - 1)
    inner = expression(rng, depth - 1)
    if kind == 8:
        return f"(?:{inner}|{expression(rng, depth - 1)})"
    if kind == 9:
        return f"({inner})" + rng.choice(["*", "+", "?", "{2}", "{1,3}", "*?", "+?", "{0}", "{0,2}", "??"])
    if kind == 10:
        return rng.choice(["(?=", "(?!"]) + inner + ")"
    return rng.choice(["(?<=", "(?<!"]) + rng.choice(["a", "ab", r"\.", "^", r"\d"]) + ")"


def test_random_expressions_mean_what_re_says():
    rng = random.Random(0)
    matched = tried = 0
    while tried < 1500:
        text = rng.choice(["", "", "(?i)"]) + expression(rng, 4)
        ours = Expression(text, Budget())
        theirs = re.compile(text)
        tried += 1
        for _ in range(5):
            name = "".join(rng.choice("abAc1_.") for _ in range(rng.randrange(1, 10)))
            for how in ("fullmatch", "match"):
                expected = getattr(theirs, how)(name) is not None
                matched += expected
                assert getattr(ours, how)(name, Budget()) is expected, (how, text, name)
    assert 1000 < matched < 14_000


@pytest.mark.parametrize(
    "text",
    [
        r".*\.layers\.(1[0-9]|2\d)\..*(q|v)_proj",
        r"^(?!.*lm_head).*proj$",
        r"(?i)MODEL\.layers\.[0-9]+\.SELF_attn\.q_proj",
        r"model\.layers(?=\.).*\.(q_proj|k_proj)",
        r"(^|.*\.)q_proj",
        r"(?:\w+\.)*(?:q|k)_proj",
        r"(?x) .* \. (q|k)_proj  # of attention",
        r".*(?<!k)_proj",
        r"model\.layers\.(\d{1})\.self_attn\.q_proj|model\.layers\.10\..*",
        "|".join(re.escape(name) for name in NAMES[::3]),
        r".*?self.attn\.(?P<which>[qk])_proj\b",
        "[mk]odel.+",
    ],
)
def test_expressions_that_people_write(text):
    check_expression(text)
    expected = [name for name in NAMES if re.fullmatch(text, name)]
    assert expected and list(filter(matcher(text), NAMES)) == expected


HOSTILE = {
    "nested": r"(\w+\.?)+#",
    "equal alternatives": "(a|a|m)*b",
    "dots": r"(.*)*x",
    "many dots": ".*" * 300 + "x",
    "optional": "(?:m?o?){200}x",
    "many places": "(?:.?){900}x",
    "repeats of repeats": "((a{999}){999}){999}",
    "empty repeats": "(?:(?:(?:){65535}){65535}){65535}",
    "huge repeat": "a{4294967295}",
    "lookaheads": "(?=.*(?=.*(?=.*(?=.*x))))" * 20 + ".*",
    "lookbehinds": "(?<=.)" * 300 + "x",
    "brackets": "(" * 30_000 + ")" * 30_000,
    "alternatives": "(" + "|".join(f"model.layers.{i}.q" for i in range(2400)) + ")x",
    "long": "(a*)" * 12_000,
    "too long": "(a*)" * 200_000,
}


def quickest(work):
    """Return the seconds of the quickest of two tries, each without what the one before remembers."""
    took = []
    for _ in range(2):
        _expression.cache_clear()
        begin = time.process_time()
        work()
        took.append(time.process_time() - begin)
    return min(took)


@pytest.mark.parametrize("case", HOSTILE)
def test_no_expression_takes_long(case):
    def match():
        try:
            assert not any(map(matcher(HOSTILE[case]), NAMES))
        except ValueError as error:
            assert "names of the modules" in str(error) or "no regular expression" in str(error)
            assert len(str(error)) < 300

    assert quickest(match) < 3.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r"(a)\1", "trying back and forth"),
        ("(a)?(?(1)b|c)", "trying back and forth"),
        ("(?m)a", "expected i, s or x"),
        ("(?a)a", "expected i, s or x"),
        ("(", "no regular expression"),
        ("a{2,1}", "no regular expression"),
        ("(?<=a*)b", "no regular expression"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        check_expression(text)
    with pytest.raises(ValueError, match=f"target_modules: expected a regular expression, got .*{said}"):
        LoraConfig(target_modules=text)


def by_re(template, keys, name):
    return next((key for key in keys if re.match(template.format(key), name)), None)


@pytest.mark.parametrize("template", [LoraConfig._pattern, C3AConfig._pattern])
def test_keys_are_found_as_by_trying_one_after_the_other(template):
    rng = random.Random(1)
    found = 0
    for _ in range(300):
        keys = []
        while len(keys) < rng.randrange(1, 12):
            key = ".".join(rng.choice(["a", "b", "ab", "1", "a_b"]) for _ in range(rng.randrange(1, 4)))
            key = rng.choice(["", "", "", "^"]) + key + rng.choice(["", "", "", "$"])
            if rng.random() < 0.3:
                key = rng.choice([expression(rng, 2), key.replace("a", "[ab]", 1), f"({key}|b)"])
            keys.append(key)
        ours = Keys(template, keys)
        for _ in range(20):
            name = ".".join(rng.choice(["a", "b", "ab", "1", "a_b", "aab"]) for _ in range(rng.randrange(1, 4)))
            expected = by_re(template, keys, name)
            found += expected is not None
            assert ours.first(name) == expected, (keys, name)
            assert ours.matching(name) == {k for k in keys if re.match(template.format(k), name)}
    assert found > 500


@pytest.mark.parametrize("template", [LoraConfig._pattern, C3AConfig._pattern])
@pytest.mark.parametrize(
    "keys",
    [
        [f"m{i}" for i in range(50_000)],
        NAMES * 100,
        [rf"m{i}\d+" for i in range(50_000)],
        [f".*{i}.*" for i in range(2000)],
        ["".join("." if i >> bit & 1 else "a" for bit in range(16)) for i in range(50_000)],
        ["." * i for i in range(1, 1300)],
        ["a" * 900_000],
        [r"(\w+\.?)+#", "(a|a)*b"],
    ],
    ids=["plain", "names", "expressions", "dots around", "dots anywhere", "dots only", "long", "hostile"],
)
def test_no_keys_take_long(template, keys):
    def match():
        try:
            found = Keys(template, keys)
            for name in NAMES:
                found.first(name)
        except ValueError as error:
            assert "take too long" in str(error)

    assert quickest(match) < 3.0


def test_a_key_that_is_no_expression_is_named():
    for key in ("(", "a)|(b", "a{2,1}"):
        with pytest.raises(ValueError, match=rf"rank_pattern: key {re.escape(repr(key))}: no regular expression"):
            LoraConfig(rank_pattern={"q": 2, key: 3})


def test_lists_of_layers_are_names():
    model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(3))})
    config = LoraConfig(target_modules=["fc"], layers_to_transform=[1], layers_pattern="blocks|h")
    adapted = get_peft_model(model, config)
    assert [path for path, _ in adapted.base_model._layers()] == ["h.1.fc"]
    for pattern in ("(.*)*", "a+", "x{2}", r"(h)", ["h"] * 101):
        with pytest.raises(ValueError, match="layers_pattern: expected"):
            LoraConfig(target_modules=["fc"], layers_to_transform=[1], layers_pattern=pattern)


@pytest.mark.parametrize("template", [PATTERN, r".*\.({})$"])
def test_keys_with_escaped_dots_mean_what_they_mean_to_re(template: str) -> None:
    """As converted files have them, one for a module; they cost no more than plain names."""
    parts = ["a", "b", "a.b", "a-b", "axb", "c.a.b", "a.b.c", "a.bxc", "caxb", "a.b.a.b"]
    keys = ["^a\\.b", "a\\.b", "a.b", "a\\-b", "^a.b\\.c", "a\\.b.c$", "^c\\.a.b$", "a\\.b\\.a\\.b"]
    for key in keys:
        found = Keys(template, [key])
        assert not found._others
        for name in parts:
            assert (found.first(name) is not None) is bool(re.match(template.format(key), name)), (key, name)
    many = Keys(template, [f"^{re.escape(f'blocks.{number}.to-q')}" for number in range(5000)])
    for number in range(0, 5000, 7):
        expected = f"^{re.escape(f'blocks.{number}.to-q')}" if template == PATTERN else None
        assert many.first(f"blocks.{number}.to-q") == expected
