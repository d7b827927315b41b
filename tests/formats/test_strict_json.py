"""JSON from strangers."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.formats import strict_json
from adapterkit.formats.strict_json import StrictJSONError

scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(values)
def test_what_is_written_is_read_and_standard(value: Any) -> None:
    text = strict_json.dumps(value)
    assert strict_json.loads(text) == value == json.loads(text)
    assert text.isascii()


@given(st.dictionaries(st.text(), scalars))
def test_the_order_of_keys_is_kept(value: dict[str, Any]) -> None:
    assert list(strict_json.loads(strict_json.dumps(value))) == list(value)


@given(st.binary() | st.text())
def test_anything_else_is_one_kind_of_error(text: bytes | str) -> None:
    with contextlib.suppress(StrictJSONError):
        strict_json.loads(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 1}', "'a' occurs twice"),
        ('{"x": {"b": 1, "c": 2, "b": 3}}', "'b' occurs twice"),
        ("NaN", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("1e999", "out of range"),
        ("-1e999", "out of range"),
        ("1" * 33, "33 digits"),
        ("-" + "9" * 32, "33 digits"),
        ("1" * 1_000_000, "1000000 digits"),
        ("[" * 33 + "]" * 33, "deeper than 32"),
        ("[" * 1_000_000, "deeper than 32"),
        ('{"a":' * 33 + "1" + "}" * 33, "deeper than 32"),
        (b"\xff", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ("{} {}", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_refusals_say_why(text: str | bytes, words: str) -> None:
    with pytest.raises(StrictJSONError, match=words) as caught:
        strict_json.loads(text)
    assert len(str(caught.value)) < 200


def test_the_permitted_depth_and_length() -> None:
    assert strict_json.loads("[" * 32 + "]" * 32)
    assert strict_json.loads("9" * 32) == 10**32 - 1
    assert strict_json.loads('{"a":' * 32 + "1" + "}" * 32)
    assert strict_json.loads(strict_json.dumps(10**32 - 1)) == 10**32 - 1


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), math.nan, [-math.inf], {1: 2, "1": 3}, {(1, 2): 3}, 10**40])
def test_what_is_no_json_is_not_written(value: object) -> None:
    with pytest.raises(StrictJSONError):
        strict_json.dumps(value)


def test_a_value_that_holds_itself() -> None:
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(StrictJSONError):
        strict_json.dumps(ring)
