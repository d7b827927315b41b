"""The one tree of errors. Every message says what failed, with which value, what was expected, and how to mend it."""

from __future__ import annotations

import bisect
import contextlib
import difflib
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

_LONGEST = 200  # characters of a name that near matches are looked for
_COMPARED = 1000  # names on either side that are looked at
_LONGEST_PROBLEM = 1000
_ITSELF = "adapterkit"
_SHOWN_PROBLEMS = 10  # a file can hold thousands; all of them are in `problems`


def shown(value: object, most: int = 200) -> str:
    """A value as a message shows it: on one line, without control characters, and short, whatever it is."""
    if isinstance(value, str):
        return printable(repr(value if len(value) <= most else f"{value[:most]}..."))
    try:
        text = printable(" ".join(repr(value).split()))
    except (ValueError, TypeError, AttributeError, RuntimeError):  # such as of an integer that is too long to be read
        bits = f" of {value.bit_length():,} bits" if isinstance(value, int) else ""
        text = f"a value of type {type(value).__name__}{bits}"
    return text if len(text) <= most else f"{text[:most]}..."


def printable(text: str) -> str:
    """Text that a stranger may have written, with what would steer a terminal as escapes; lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def near_matches(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The names in `known` that `name` was probably meant to be, best first."""
    listed = sorted({one for one in known if len(one) <= 2 * _LONGEST})
    place = bisect.bisect(listed, name)  # of very many, as a file may have, those that begin alike
    listed = listed[max(0, place - _COMPARED) : place + _COMPARED]
    return difflib.get_close_matches(name[:_LONGEST], listed, n=limit, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that lists the near matches, or all known names where few exist, or nothing."""
    known = sorted(set(known))
    if close := near_matches(name, known):
        return f" Did you mean {' or '.join(repr(c) for c in close)}?"
    if known and len(known) <= 12:
        return f" Known: {', '.join(known)}."
    return ""


class AdapterKitError(Exception):
    """Base of everything that adapterkit raises on purpose. Printed, it steers no terminal, whatever a file says."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(AdapterKitError):
    """A configuration is wrong. Carries every problem found, not just the first.

    Args:
        problems: One sentence per problem, each naming its key and value.
        where: What was being configured (a class name, a file).
    """

    def __init__(self, problems: Sequence[str], where: str = "") -> None:
        self.problems = list(problems)
        self.where = where
        head = f"invalid {where[:_LONGEST_PROBLEM]}" if where else "invalid configuration"
        more = len(self.problems) - _SHOWN_PROBLEMS
        tail = f"; and {more} more" if more > 0 else ""
        shortened = [p if len(p) <= _LONGEST_PROBLEM else f"{p[:_LONGEST_PROBLEM]}..." for p in self.problems]
        super().__init__(f"{head}: " + "; ".join(shortened[:_SHOWN_PROBLEMS]) + tail)


class UnknownNameError(AdapterKitError):
    """A name that the user gave does not exist.

    Args:
        what: The sort of thing, such as "adapter" or "backend".
        name: The name as given.
        known: The names that exist.
        hint: A further sentence, such as the command that mends it.
    """

    def __init__(self, what: str, name: object, known: Iterable[str], hint: str = "") -> None:
        self.what, self.name, self.known = what, name, sorted(set(known))
        suffix = f" {hint}" if hint else ""
        near = did_you_mean(name if isinstance(name, str) else "", self.known)
        super().__init__(f"unknown {what} {shown(name)}.{near}{suffix}")


class InvalidNameError(AdapterKitError):
    """A new name is not usable: wrong characters, too long, reserved or taken."""


class SelectorError(AdapterKitError):
    """A selector cannot be parsed."""


class TargetNotFoundError(AdapterKitError):
    """A selector matches no injection point of the model."""


class IncompatibleTargetError(AdapterKitError):
    """The selected points exist, but this adapter type cannot act at them."""


class UnsupportedModelError(AdapterKitError):
    """No backend knows this model."""


class AmbiguousBackendError(AdapterKitError):
    """Two backends claim the same class; pass `backend=`."""


class MissingDependencyError(AdapterKitError):
    """An optional package is needed; the message holds the install command."""


class AttachError(AdapterKitError):
    """A module cannot be adapted in place (already wrapped, forward replaced, weight shared in an unsupported way)."""


class StateError(AdapterKitError):
    """The operation makes no sense in the handle's present state, such as removing a merged adapter."""


class ReplacedError(StateError):
    """A module was replaced after an adapter was attached to it, so that the adapter acts nowhere there."""


class LengthError(AdapterKitError):
    """A sequence needs more positions than the model has."""


class RoutingError(AdapterKitError):
    """Samples of a batch cannot be given adapters of their own here."""


class ContextError(AdapterKitError):
    """A side input that an adapter reads is not given around the forward, or has other rows than the batch."""


class NotMergeableError(AdapterKitError):
    """An adapter has no equivalent weight at some of its points."""


class CheckpointError(AdapterKitError):
    """A file cannot be used. Subclasses say why; `path` and `key` say where.

    Args:
        message: What is wrong and what was expected.
        path: The file.
        key: The tensor or header key at fault, if one is.
    """

    def __init__(self, message: str, path: object = None, key: str | None = None) -> None:
        self.path, self.key = path, key
        where = f"{str(path)[:_LONGEST_PROBLEM]}: " if path is not None else ""
        message = message if len(message) <= 2 * _LONGEST_PROBLEM else f"{message[: 2 * _LONGEST_PROBLEM]}..."
        what = f"{key!r}: " if key is not None else ""
        super().__init__(f"{where}{what}{message}")


class CorruptFileError(CheckpointError):
    """Not a well-formed file of its format, or its contents fail their checksum."""


class NotRegularFileError(CheckpointError):
    """A symlink, pipe, device or folder where a plain file was expected."""


class UnsupportedFileError(CheckpointError):
    """A file of a format or version that this release does not read."""


class AmbiguousFormatError(CheckpointError):
    """Several formats recognise the file; pass `format=`."""


class InvalidHeaderError(CheckpointError):
    """The file's own description (config, type, version) is malformed or out of bounds."""


class MissingKeysError(CheckpointError):
    """The file lacks tensors that its config requires."""


class UnexpectedKeysError(CheckpointError):
    """The file holds tensors that nothing would receive."""


class ShapeMismatchError(CheckpointError):
    """A tensor's shape is not the one that config and base require."""


class DtypeMismatchError(CheckpointError):
    """A tensor's dtype cannot hold adapter weights."""


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity."""


class BaseMismatchError(CheckpointError):
    """The adapter was made for another base model."""


class AdapterMismatchError(CheckpointError):
    """The adapter in the file is of another type, or of another config, than the one that its values are for."""


class BaseNeededError(CheckpointError):
    """What is asked about an adapter, the model that it is for alone can tell."""


class UnknownAdapterTypeError(CheckpointError):
    """The file's adapter type is not installed; names the distribution to install."""


class PluginError(AdapterKitError):
    """A plug-in is broken; `plugin` names it. To who reads the message, adapterkit itself is none."""

    def __init__(self, message: str, plugin: str = "") -> None:
        self.plugin = plugin
        super().__init__(f"plug-in {plugin!r}: {message}" if plugin not in ("", _ITSELF) else message)


class DataError(AdapterKitError):
    """The training data cannot be used. `files` are those at fault, `reason` says what is wrong with them."""

    def __init__(self, message: str, files: Sequence[Path] = ()) -> None:
        self.reason, self.files = message, list(files)
        shown = "".join(f"\n  {file}" for file in self.files[:_SHOWN_PROBLEMS])
        more = len(self.files) - _SHOWN_PROBLEMS
        tail = f"\n  and {more} more" if more > 0 else ""
        super().__init__(f"{message}{':' if self.files else ''}{shown}{tail}")


class RowError(DataError):
    """A row of a file cannot be used, or several: `count` of them, of the first `lines` says file and reason."""

    def __init__(self, file: Path, number: int, reason: str) -> None:
        super().__init__(f"row {number} {reason}", [file])
        self.count, self.lines = 1, [f"{file}: row {number} {reason}"]


class DataChangedError(DataError):
    """A run was to be resumed on other data than it began with. `changes` says what differs, a sentence each."""

    def __init__(self, message: str, changes: Sequence[str]) -> None:
        self.changes = list(changes)
        super().__init__(message)


class ModelNotFoundError(AdapterKitError):
    """There is no model at that place, or it cannot be read."""


class TrainingError(AdapterKitError):
    """Training cannot go on, such as when the loss is no longer a number."""


class BrokenFormatError(CheckpointError, PluginError):
    """A format fails in a way that its contract does not allow. `plugin` names its provider, `path` the file."""

    def __init__(self, message: str, path: object, plugin: str = "") -> None:
        CheckpointError.__init__(self, message, path)
        self.plugin = plugin


class PluginConflictError(PluginError):
    """Two distributions provide the same name."""


class PluginLoadError(PluginError):
    """A plug-in, or something that it points to, cannot be imported."""


class PluginIncompatibleError(PluginError):
    """A plug-in asks for another version of adapterkit."""


class UnregisteredTypeWarning(UserWarning):
    """An adapter of a type that no plug-in has registered was added: it works, and cannot be saved."""


class ProofError(AdapterKitError):
    """A model cannot be run by these calls, or does not give the same twice, so that nothing can be proven of it."""


class NoSpecimen(AdapterKitError):  # noqa: N818 - an answer, as StopIteration is
    """No shrunk copy of this model can be made or run; `reason` says why in one sentence."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@contextlib.contextmanager
def blaming(what: object, call: str, plugin: str) -> Generator[None, None, None]:
    """Names the plug-in whose code fails in the block in a way that no contract allows.

    Args:
        what: What the plug-in has registered.
        call: What of it runs in the block.
        plugin: The plug-in's name.

    Raises:
        PluginError: In the place of any error that is none of adapterkit's, or that names no plug-in.
    """
    try:
        yield
    except PluginError as error:
        if error.plugin:
            raise
        raise PluginError(f"{what}: {call}: {error}", plugin) from error
    except AdapterKitError:
        raise
    except Exception as error:  # third-party code may raise anything
        raise PluginError(f"{what}: {call} raised {type(error).__name__}: {error}", plugin) from error
