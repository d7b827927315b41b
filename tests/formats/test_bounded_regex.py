"""Patterns from strangers: they match what Python's `re` does, and never run away."""

from __future__ import annotations

import re
import time

import pytest

from adapterkit.errors import InvalidHeaderError
from adapterkit.formats.bounded_regex import BoundedRegex, PatternError
from adapterkit.formats.peft_patterns import Patterns

TEXTS = [
    "",
    "a",
    "ab",
    "aab",
    "layers.0.q_proj",
    "model.layers.11.self_attn.v_proj",
    "q",
    "x.q",
    "a]b",
    "aXb",
    "a.b",
    "q\n",
]
PATTERNS = [
    r"a*b", r"a+b?", r".*layers\.[01]\.(q|v)_proj", r"(?:a|ab)(?P<x>b|)", r"[^a]*", r"[]a]+b", r"\d+|a", r"^a.b$",
    r"a{2}b", r"a{0,2}b", r"a{1,}b", r"((a?)?)?b", r"a{0}b", r"(ab){1,2}",
    r"(a|b)*", r"(x\.)?q", r".*\.layers\.(\d|1[01])\.self_attn\..*", r"[a-c\]]+", r"a.*?b", r"\w+\W\w",
    r"x{", r"(((a*)+)?){2,3}b", r"", r"()", r"(a*)*b", r"$", r"a\.b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_matches_what_re_does(pattern: str) -> None:
    mine = BoundedRegex(pattern)
    for text in TEXTS:
        assert mine.fullmatch(text) == bool(re.fullmatch(pattern, text)), (pattern, text)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+", r"(.*a){20}b", r".*.*.*.*.*.*x", r"((a*)*)*b"])
def test_what_would_run_away_is_quick(pattern: str) -> None:
    start = time.perf_counter()
    assert not BoundedRegex(pattern).fullmatch("a" * 4000 + "!")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a",
        r"a)",
        r"*a",
        r"a**",
        r"[a",
        r"(?=a)",
        r"(?<!a)b",
        r"(a)\1",
        r"a{100}",
        r"\Z",
        "(" * 400,
        r"a{3,1}",
        "((a{60}){60}){60}",
    ],
)
def test_what_is_not_run_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        BoundedRegex(pattern)


def test_patterns_of_peft_are_ends_of_paths() -> None:
    patterns = Patterns({"q_proj": 1, "^model.q": 2, r".*\.(k|v)": 3, "layers.0.o": 4}, "x", "rank_pattern")
    found = {
        path: patterns.at(path) for path in ("a.q_proj", "aq_proj", "model.q", "x.model.q", "b.k", "k", "layersX0.o")
    }
    assert found == {
        "a.q_proj": 1,
        "aq_proj": None,
        "model.q": 2,
        "x.model.q": None,
        "b.k": 3,
        "k": None,
        "layersX0.o": 4,
    }
    with pytest.raises(InvalidHeaderError, match="rank_pattern"):
        Patterns({r"(?=x)": 1}, "x", "rank_pattern")
    with pytest.raises(InvalidHeaderError, match="steps"):
        Patterns({f"(a|b){{60}}{i}": 1 for i in range(100)}, "x", "rank_pattern")
