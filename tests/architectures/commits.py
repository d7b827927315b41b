"""The commit at which a row was made, and whether what rows tell of has changed since."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_TOLD_OF = ("adapterkit/mapping", "adapterkit/backends", "adapterkit/engine", "adapterkit/testing")
"""What decides what a row says: maps, what acts at their points, specimens and proofs."""

_SHORT = 10
_CHANGED = "+"


@functools.cache
def now() -> str:
    """The commit that is checked out; with `+` where files that rows tell of differ from it; "" outside git."""
    commit = _git("rev-parse", f"--short={_SHORT}", "HEAD")
    if commit is None:
        return ""
    return commit + (_CHANGED if _git("status", "--porcelain", "--", *_TOLD_OF) else "")


@functools.cache
def is_old(commit: str) -> bool:
    """Whether a row of this commit may say something else now; of an unknown one it may."""
    if not commit or commit.endswith(_CHANGED):
        return True
    changed = _git("diff", "--name-only", commit, "--", *_TOLD_OF)
    return changed is None or bool(changed)


def _git(*arguments: str) -> str | None:
    """What git prints; None where it fails, or is not there."""
    try:
        run = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
