"""`python -m tests.architectures.table` writes plugins/FAMILIES.md from the rows that sweeps have kept.

`--line LINE` makes the rows of a line first that are not kept. An architecture without a row is said to have none.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.architectures import catalogue, commits, rows, sweep

PATH = Path(__file__).parents[2] / "plugins" / "FAMILIES.md"

TITLES: Mapping[str, str] = {
    "causal": "transformers, causal LMs",
    "masked": "transformers, masked LMs",
    "seq2seq": "transformers, sequence to sequence",
    "image_classification": "transformers, image classification",
    "image_text": "transformers, image and text to text",
    "audio": "transformers, audio encoders",
    "timm": "timm, one model of each module",
    "diffusers": "diffusers, transformers, UNets, ControlNets",
}
"""Line -> what it is called."""

_MARKS = {"proven": "proven", "false": "**false**", "not reached": "not run", "listed": "listed", "none": "–"}
_LONGEST = 110

_HEAD = """\
# Families

Every architecture of the installed libraries ({versions}), built from its own defaults, and what its map offers:
whether the preset `attention` selects something, whether keys and values can be extended (prefixes), and whether
sublayers' outputs are points. What counts is what the numbers prove: a small random copy is run, and what is said is
checked at every point (`adapterkit.testing.prove`, `adapterkit points MODEL --prove`).

`listed` is offered, and there is no proof; `not run` is offered, and no call of the copy runs it; `–` is not offered.
`in limits` counts as proven: where a module does not call torch's attention once, no equation can be put in its place,
and prefixes of no weight, of all of it, and in between are tried. What was proven at a commit since which maps or
proofs have changed is old, and says at which.
Generated: `python -m tests.architectures.table`, from what `python -m tests.architectures.sweep` has found. What
single families offer in detail is in [POINTS.md](POINTS.md). Shares are of those that were swept and have an attention.

"""


def table(found: Mapping[str, Sequence[rows.Row]]) -> str:
    """The whole page.

    Args:
        found: Line -> its rows.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "timm", "diffusers", "torch"))
    parts = [_HEAD.format(versions=versions), _summary(found)]
    for line, some in found.items():
        lines = [f"## {TITLES[line]}", "", *_header("architecture", "class", *rows.CLAIMS, "proof")]
        parts.append("\n".join([*lines, *(_row(_cells(one)) for one in some)]) + "\n")
    return "\n".join(parts)


def _summary(found: Mapping[str, Sequence[rows.Row]]) -> str:
    lines = _header(
        "line",
        "architectures",
        "swept",
        "old",
        "with attention",
        "preset `attention`",
        "prefixes",
        "of these in limits",
        "sublayer outputs",
    )
    for line, some in found.items():
        having = [one for one in some if one.attention]
        swept = sum(bool(one.claims or one.broken) for one in some)
        attention, prefixes, outputs = (f"{share(having, claim):.0f} %" if having else "–" for claim in rows.CLAIMS)
        old, limited = (str(sum(map(told, some))) for told in (_is_old, lambda one: one.by_limits))
        numbers = [str(len(some)), str(swept), old, str(len(having))]
        lines.append(_row([TITLES[line], *numbers, attention, prefixes, limited, outputs]))
    return "\n".join(lines) + "\n"


def share(some: Sequence[rows.Row], claim: str) -> float:
    """Per cent of these of which a claim is proven."""
    return 100 * sum(one.claims.get(claim) == "proven" for one in some) / max(len(some), 1)


def _is_old(row: rows.Row) -> bool:
    return bool(row.claims) and commits.is_old(row.commit)


def _cells(row: rows.Row) -> list[str]:
    attention, prefixes, outputs = (_MARKS[row.claims.get(claim, "none")] for claim in rows.CLAIMS)
    at = f" (old: at {row.commit or 'an unknown commit'})" if _is_old(row) else ""
    return [
        row.name,
        row.model or "–",
        attention,
        "in limits" if row.by_limits else prefixes,
        outputs,
        _proof(row) + at,
    ]


def _proof(row: rows.Row) -> str:
    if row.broken:
        return f"the library cannot build it: {_short(row.broken)}"
    if row.crashed:
        return f"no map: {_short(row.crashed)}"
    if row.unproven:
        return f"listed only: {_short(row.unproven)}"
    totals: Counter[str] = sum((Counter(one) for one in row.counts.values()), Counter())
    told = [f"{totals[result]} {result}" for result in ("proven", "false", "not reached") if totals[result]]
    return f"numeric: {', '.join(told) or 'no points'}"


def _short(text: str) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _header(*cells: str) -> list[str]:
    return [_row(cells), _row(["---"] * len(cells))]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def written() -> dict[str, list[str]]:
    """Line -> the architectures of which the page tells."""
    found: dict[str, list[str]] = {}
    titles = {f"## {title}": line for line, title in TITLES.items()}
    names: list[str] = []
    for text in PATH.read_text(encoding="utf-8").splitlines():
        if text in titles:
            names = found.setdefault(titles[text], [])
        elif text.startswith("| ") and found:
            names.append(text.split(" | ")[0].removeprefix("| "))
    return {line: names[2:] for line, names in found.items()}


def main(arguments: Sequence[str]) -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--line", choices=catalogue.LINES, action="append", default=[])
    given: Any = parser.parse_args(arguments)
    for line in given.line:
        sweep.main(["--line", line])
    found = {line: [_kept(line, name) for name in catalogue.names(line)] for line in catalogue.LINES}
    PATH.write_text(table(found), encoding="utf-8")
    print(_summary(found))
    return 0


def _kept(line: str, name: str) -> rows.Row:
    return rows.kept(line, name) or rows.Row(line, name, unproven="no sweep has made this row yet")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
