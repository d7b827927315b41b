"""Architectures of which numbers once denied something: nothing that is said of them is false."""

from __future__ import annotations

import pytest

from tests.architectures import rows

ONCE_FALSE = (("masked", "electra"),)  # a prompt as wide as its blocks, which is not as wide as the embeddings


@pytest.mark.parametrize(("line", "name"), ONCE_FALSE)
def test_what_was_false_is_mended(line: str, name: str) -> None:
    row = rows.made(line, name)
    assert not row.unproven, row.unproven
    assert not row.wrong, row.wrong
    assert set(row.claims.values()) == {"proven"}
