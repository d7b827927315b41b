"""`python -m tests.architectures.sweep --line causal [NAME...]`: maps and proves architectures, one after the other.

Rows that were made before are shown as they are; `--again` makes them anew, `--changed` those that are not proven.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any

import adapterkit as ak
from adapterkit.testing.specimens import specimen
from tests.architectures import catalogue, commits, rows

BARS = {
    "causal": (97, 85, 85),
    "masked": (97, 85, 85),
    "seq2seq": (97, 85, 85),
    "image_classification": (97, 70, 85),
    "image_text": (97, 85, 85),
    "audio": (97, 85, 85),
    "timm": (85, 60, 85),
    "diffusers": (97, 85, 85),
}
"""Per cent of the architectures with attention for which each of `rows.CLAIMS` is to be proven."""


_HUNG = 20
"""So many times its limit may a row take by the clock: other processes may have the processors meanwhile."""


def row(line: str, name: str, limit: float, *, again: bool = False) -> rows.Row:
    """A row, made in a process of its own, which ends with its memory, or after `limit` seconds of a processor."""
    found = None if again else rows.kept(line, name)
    if found is not None:
        return found
    rows.Row(line, name).path.unlink(missing_ok=True)  # so that what is left after an end too early is this one's
    process = multiprocessing.get_context("fork").Process(target=_make, args=(line, name, limit))
    process.start()
    process.join(_HUNG * limit)
    if process.is_alive():
        process.kill()
        process.join()
        return _unfinished(line, name, f"no proof within {_HUNG * limit:.0f} s, whoever else was at work")
    if process.exitcode == -signal.SIGXCPU:
        return _unfinished(line, name, f"no proof within {limit:.0f} s of a processor")
    if process.exitcode:
        return _unfinished(line, name, f"the process ended with {process.exitcode}")
    found = rows.kept(line, name)
    assert found is not None
    return found


def _import(line: str) -> None:
    """Loads what every row needs, once, before processes are made; the commit too, before somebody changes a file."""
    commits.now()
    with contextlib.suppress(Exception):  # it is told of when it is its turn
        model = catalogue.skeleton(line, catalogue.names(line)[0])
        ak.points(model)
        specimen(model)


def _make(line: str, name: str, limit: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), resource.RLIM_INFINITY))  # this process's alone
    rows.made(line, name).write()


def _unfinished(line: str, name: str, why: str) -> rows.Row:
    """The row as far as it has come, with the reason why no further."""
    found = rows.kept(line, name)
    if found is None:
        found = rows.Row(line, name, claims=dict.fromkeys(rows.CLAIMS, "none"), attention=True, commit=commits.now())
    found.unproven = why
    found.write()
    return found


def summary(line: str, found: Sequence[rows.Row]) -> str:
    """The line of the table: per cent of what has an attention, with what is missing to the bars."""
    having = [one for one in found if one.attention]
    cells: list[str] = []
    for claim, bar in zip(rows.CLAIMS, BARS[line], strict=True):
        counts: dict[str, int] = {}
        for one in having:
            said = one.claims.get(claim, "none")
            counts[said] = counts.get(said, 0) + 1
        share = 100 * counts.get("proven", 0) / max(len(having), 1)
        cells.append(
            f"{claim} {share:.0f} % of {bar} ({', '.join(f'{n} {said}' for said, n in sorted(counts.items()))})"
        )
    broken = sum(bool(one.broken) for one in found)
    crashed = sum(bool(one.crashed) for one in found)
    return f"{line}: {len(found)} ({broken} broken, {crashed} crashed), {len(having)} with attention; " + "; ".join(
        cells
    )


def main(arguments: Sequence[str]) -> int:
    """Prints a row after the other, and the summary of all that is kept of the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--line", choices=catalogue.LINES, action="append")
    parser.add_argument("--again", action="store_true", help="make rows anew")
    parser.add_argument("--changed", action="store_true", help="make rows anew that are not proven in everything")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds of a processor for each")
    given: Any = parser.parse_args(arguments)
    for line in given.line or catalogue.LINES:
        _import(line)
        for name in given.names or catalogue.names(line):
            before = rows.kept(line, name)
            again = given.again or (given.changed and (before is None or set(before.claims.values()) != {"proven"}))
            print("\n".join(rows.lines_of(row(line, name, given.limit, again=again))), flush=True)
        every = [one for name in catalogue.names(line) if (one := rows.kept(line, name)) is not None]
        print(summary(line, every), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
