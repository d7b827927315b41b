"""Find the plug-ins that are installed, one by one, so that none can keep the others from being found.

The standard library's `entry_points()` and pluggy's loader both stop at the first broken distribution.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from adapterkit import __version__
from adapterkit.errors import PluginIncompatibleError, PluginLoadError
from adapterkit.hookspecs import GROUP

ALLOW_LIST = "ADAPTERKIT_LOAD_PLUGINS"


@dataclass(frozen=True)
class Candidate:
    """A plug-in that may be loaded: its entry-point name, its distribution, and how to import it."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]
    requires: tuple[str, ...] = ()


def candidates() -> Iterator[Candidate]:
    """Every entry point of the group, sorted by distribution and name. What cannot be read fails when loaded."""
    found: dict[tuple[str, str], Candidate] = {}
    for dist in metadata.distributions():
        for candidate in _of(dist):
            # A distribution that is on the path twice counts once: the first is the one that Python imports.
            found.setdefault((normalise(candidate.distribution), candidate.name), candidate)
    yield from (found[key] for key in sorted(found))
    present = {distribution for distribution, _ in found}
    yield from (_absent(name) for name in sorted((allowed() or frozenset()) - present))


def _of(dist: metadata.Distribution) -> list[Candidate]:
    try:
        entries = [entry for entry in dist.entry_points if entry.group == GROUP]
        if not entries:
            return []
        name, version, requires = dist.metadata["Name"], dist.metadata["Version"], tuple(dist.requires or ())
        if not name or not version:
            raise ValueError("METADATA lacks the name or the version")
        return [Candidate(entry.name, name, version, entry.load, requires) for entry in entries]
    except Exception as error:  # noqa: BLE001 - third-party metadata can be broken in any way
        return _unreadable(dist, error)


def _unreadable(dist: metadata.Distribution, error: Exception) -> list[Candidate]:
    """A candidate that fails when loaded, if the broken metadata mentions our group; else it is not our concern."""
    folder = Path(str(getattr(dist, "_path", "unknown")))  # the standard library offers no public way to it
    name = folder.name.partition("-")[0]
    try:
        ours = f"[{GROUP}]" in (dist.read_text("entry_points.txt") or "")
    except UnicodeDecodeError:
        ours = normalise(name).startswith(f"{GROUP}-")
    if not ours:
        return []
    reason = f"its metadata in {folder} cannot be read ({type(error).__name__}: {error}). Reinstall it"
    return [Candidate(name, name, "", _raiser(reason, name))]


def _absent(distribution: str) -> Candidate:
    reason = f"{ALLOW_LIST} names it, but no such distribution has adapterkit plug-ins. Run: pip install {distribution}"
    return Candidate(distribution, distribution, "", _raiser(reason, distribution))


def _raiser(reason: str, name: str) -> Callable[[], object]:
    def load() -> object:
        raise PluginLoadError(reason, name)

    return load


def normalise(distribution: str) -> str:
    """The one spelling of a distribution's name (PEP 503)."""
    return "-".join(part for part in distribution.lower().replace("_", "-").replace(".", "-").split("-") if part)


def allowed() -> frozenset[str] | None:
    """The distributions that ADAPTERKIT_LOAD_PLUGINS allows; None where it is not set and all are."""
    value = os.environ.get(ALLOW_LIST)
    return None if value is None else frozenset(normalise(name.strip()) for name in value.split(",") if name.strip())


def is_allowed(candidate: Candidate) -> bool:
    """Whether ADAPTERKIT_LOAD_PLUGINS lets this plug-in be imported."""
    names = allowed()
    return names is None or normalise(candidate.distribution) in names


def check_compatible(candidate: Candidate) -> None:
    """Compare what the distribution requires of adapterkit with the adapterkit that runs.

    Raises:
        PluginIncompatibleError: Naming the requirement and both versions.
    """
    from packaging.requirements import Requirement  # not needed, and not paid for, where there are no plug-ins

    for text in candidate.requires:
        requirement = Requirement(text)
        if normalise(requirement.name) != GROUP:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and not requirement.specifier.contains(__version__, prereleases=True):
            raise PluginIncompatibleError(
                f"{candidate.distribution} {candidate.version} requires adapterkit{requirement.specifier}, "
                f"but this is adapterkit {__version__}. Run: pip install --upgrade {candidate.distribution}",
                candidate.name,
            )
