"""JSON from strangers: no duplicate keys, no NaN or Infinity, bounded depth and numbers."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 32
MAX_DIGITS = 32
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)


class StrictJSONError(ValueError):
    """The text is not JSON as adapterkit reads and writes it. Callers add the file and the key."""


def loads(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        StrictJSONError: Not UTF-8, not JSON, a repeated key, a number that is not finite or far too long, or nested
            deeper than `MAX_DEPTH`.
    """
    try:
        raw = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
        # A header has thousands of integers. Only where there may be a long one each is looked at.
        parse_int = _int if b"0" * MAX_DIGITS in raw.translate(_DIGITS) else int
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=parse_int,
        )
    except StrictJSONError:
        raise
    except ValueError as error:
        raise StrictJSONError(f"not JSON: {error}") from None
    except RecursionError:
        raise StrictJSONError(f"nested deeper than {MAX_DEPTH}") from None
    _check_depth(value, MAX_DEPTH)
    return value


def dumps(value: Any) -> str:
    """The compact JSON text of a value, which `loads` reads. Keys keep their order, for a config's may matter.

    Raises:
        StrictJSONError: Something in it is no JSON value.
    """
    try:
        text = json.dumps(value, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise StrictJSONError(f"not a JSON value: {error}") from None
    except RecursionError:
        raise StrictJSONError(f"nested deeper than {MAX_DEPTH}") from None
    loads(text)  # NaN, keys 1 and "1", a long integer: what cannot be read back is not written
    return text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise StrictJSONError(f"not JSON: the key {twice[:80]!r} occurs twice")
    return result


def _constant(name: str) -> NoReturn:
    raise StrictJSONError(f"not JSON: {name}")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise StrictJSONError(f"not JSON: the number {text[:40]} is out of range")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise StrictJSONError(f"not JSON: an integer of {len(text)} digits; the limit is {MAX_DIGITS}")
    return int(text)


_NESTS = frozenset((dict, list))


def _check_depth(value: Any, most: int) -> None:
    level = [value] if type(value) in _NESTS else []
    for _ in range(most):
        if not level:
            return
        inside = [outer.values() if type(outer) is dict else outer for outer in level]
        level = [item for items in inside for item in items if type(item) in _NESTS]
    if level:
        raise StrictJSONError(f"nested deeper than {MAX_DEPTH}")
