"""plugins/POINTS.md says what the code does."""

from __future__ import annotations

import pytest

from adapterkit.points import Span, WeightLayout, WeightPoint
from tests import family_table


def test_the_table_is_up_to_date() -> None:
    written = family_table.PATH.read_text(encoding="utf-8").splitlines()
    made = family_table.table().splitlines()
    changed = [line for line in made if line not in written]
    assert not changed, "run: python -m tests.family_table"
    assert written == made


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        (["attn.q", "attn.k", "mlp"], "`attn.{q,k}`, `mlp`"),
        (["head", "head.pooler"], "`head`, `head.pooler`"),
        (["head", "head.a", "head.b"], "`head`, `head.{a,b}`"),
        ([], "–"),
    ],
)
def test_roles_share_braces(roles: list[str], text: str) -> None:
    layout = WeightLayout("linear")
    points = [WeightPoint(role, "x", "", 2, 2, layout) for role in roles]
    assert family_table._roles(points) == text


def test_shared_and_read_weights_are_marked() -> None:
    layout = WeightLayout("linear", access="read")
    points = [
        WeightPoint("attn.q", "x", "", 2, 2, layout, Span(0, 2)),
        WeightPoint("attn.o", "y", "", 2, 2, layout),
        WeightPoint("attn.v", "z", "", 2, 2, WeightLayout("linear")),
    ]
    assert family_table._roles(points, marked=True) == "`attn.q` (spans, read), `attn.v`, `attn.o` (read)"
