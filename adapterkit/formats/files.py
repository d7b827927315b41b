"""Files in and out: only plain files are read, and a file is replaced as a whole or not at all.

`write_atomically` writes a temporary file beside the target, forces it to the disk and renames it over the target, so
that a reader, a crash or a full disk meets either the old file or the new one. Its writer holds a lock on the
temporary file, which ends with the process: the next save removes what a killed one left behind. `write_folder` does
the same with a folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from adapterkit.errors import CheckpointError, NotRegularFileError, UnsupportedFileError, did_you_mean

try:
    import fcntl
except ImportError:  # Windows: no locks, so nothing stale is ever removed there
    fcntl = None  # type: ignore[assignment]

SIZE_LIMIT = 4 << 30
"""Bytes; larger files are refused before anything is read."""

_BUFFER = 1 << 18  # adapters are hundreds of small tensors, and a call of the system takes longer than a copy

# Absent on Windows. NONBLOCK keeps the opening of a pipe from waiting for its other end.
_FOLLOW = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_READ = _FOLLOW | getattr(os, "O_NOFOLLOW", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextlib.contextmanager
def open_plain(path: Path, limit: int = SIZE_LIMIT, *, follow: bool = False) -> Iterator[tuple[BinaryIO, int]]:
    """The opened file and its size in bytes.

    A symbolic link is followed only inside its own folder, or from a download cache's `snapshots` to the `blobs`
    folder of the same repository: a folder of adapters cannot hand out files from elsewhere. `follow` is for what the
    user has named himself.

    Raises:
        NotRegularFileError: A folder, pipe, device, socket, or a link that leads elsewhere.
        UnsupportedFileError: Larger than `limit`.
        CheckpointError: Missing or unreadable.
    """
    try:
        descriptor = os.open(path, _FOLLOW) if follow else os.open(_link_target(path), _READ)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name; a ring of links before Python 3.13
        raise unreadable(path, error) from error
    try:
        size = _check_plain(path, os.fstat(descriptor), limit)
        with open(descriptor, "rb", buffering=_BUFFER, closefd=False) as file:
            yield file, size
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error}", path) from error
    finally:
        os.close(descriptor)


def write_atomically(path: Path, *data: bytes | memoryview) -> None:
    """Replaces the file by these bytes, one after another, or leaves it untouched.

    Owner and mode stay those of the file that is replaced; of a new one the mode is 0666 without the umask's bits. A
    link is replaced.

    Raises:
        NotRegularFileError: The path is a folder, pipe or device.
        CheckpointError: The folder does not exist, or the operating system refuses (disk full, no permission).
    """
    write_stream(path, data)


def write_stream(path: Path, data: Iterable[bytes | memoryview]) -> None:
    """`write_atomically` for pieces that are made one by one; what making one raises leaves the file untouched."""
    _check_target(path)
    try:
        _remove_stale(path)
        _write(path, path, data)
        _sync_folder(path.parent)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def _write(path: Path, old: Path, data: Iterable[bytes | memoryview]) -> None:
    """Makes the file, for those who might read the old one."""
    with _temporary(path) as (temporary, descriptor):
        _take_rights(descriptor, old)
        for piece in data:
            _write_all(descriptor, piece)
        os.fsync(descriptor)
        temporary.replace(path)


def _take_rights(descriptor: int, old: Path) -> None:
    """Owner and mode of a file or folder, if there is one, for what will replace it."""
    try:
        status = old.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode) or not hasattr(os, "fchmod"):
        return
    with contextlib.suppress(PermissionError):  # only its owner can give a file away
        os.fchown(descriptor, status.st_uid, status.st_gid)
    own = 0o700 if stat.S_ISDIR(status.st_mode) else 0  # files are still to be put there
    os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & 0o777 | own)


def write_folder(path: Path, contents: Mapping[str, Sequence[bytes | memoryview]]) -> None:
    """Replaces the folder's files of these names, all or none; its other plain files stay as they are.

    Owners and modes stay those of the folder and files that are replaced.

    The new folder is made beside the old one and put in its place: in one step where the system can exchange two names
    (Linux), otherwise in two, between which a crash leaves no folder there, and both beside it.

    Args:
        path: The folder; made where there is none.
        contents: Name of a file in it -> its bytes, one piece after another.

    Raises:
        NotRegularFileError: The path is no folder, or holds what is no plain file: it is no adapter's alone.
        CheckpointError: The folder above does not exist, or the operating system refuses.
    """
    _check_folder(path, contents)
    try:
        _remove_stale(path)
        with _temporary(path, folder=True) as (temporary, descriptor):
            _take_rights(descriptor, path)
            for name, data in contents.items():
                _write(temporary / name, path / name, data)
            _carry_others(path, temporary, contents)
            _sync_folder(temporary)
            _put_in_place(temporary, path)
        _sync_folder(path.parent)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def make_folder(path: Path) -> None:
    """Makes a folder for folders; one that is there stays as it is.

    Raises:
        CheckpointError: The folder above does not exist, or the operating system refuses.
    """
    try:
        path.mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot be written: {_reason(error)}", path)


def _check_folder(path: Path, names: Iterable[str]) -> None:
    if wrong := [name for name in names if not name or Path(name).name != name or name.startswith(".")]:
        raise CheckpointError(f"a file cannot be called {wrong[0]!r}", path)
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise NotRegularFileError("is no folder, and the format writes one; give another name", path)
        if not path.parent.is_dir():
            raise CheckpointError(f"the folder {path.parent} does not exist; make it with mkdir -p", path)
        held = [(entry.name, entry.lstat().st_mode) for entry in path.iterdir()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    if strange := [(name, _kind(mode)) for name, mode in held if not stat.S_ISREG(mode)]:
        raise NotRegularFileError(f"holds {strange[0][0]!r}, {strange[0][1]}; give a folder of its own", path)


def _carry_others(path: Path, temporary: Path, written: Container[str]) -> None:
    """The target's other files: links to the same bytes, where the file system has them."""
    for other in path.iterdir() if path.exists() else ():
        if other.name in written:
            continue
        try:
            (temporary / other.name).hardlink_to(other)
        except OSError:
            shutil.copy2(other, temporary / other.name)


def _put_in_place(new: Path, path: Path) -> None:
    """Afterwards `new` is the old folder, or nothing."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        aside = new.with_name(f"{_start(path)}{secrets.token_hex(8)}.tmp")
        path.rename(aside)
        new.rename(path)
        aside.rename(new)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the system has exchanged the two names in one step."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _link_target(path: Path) -> Path:
    if not path.is_symlink():
        return path
    target, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
    cached = target.parent.name == "blobs" and target.parent.parent / "snapshots" in folder.parents
    if folder not in target.parents and not cached:
        raise NotRegularFileError(f"is a symbolic link out of its folder, to {target}; give that path itself", path)
    return target


def _check_plain(path: Path, status: os.stat_result, limit: int) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise NotRegularFileError(f"is {_kind(status.st_mode)}; expected a plain file", path)
    if status.st_size > limit:
        raise UnsupportedFileError(f"{status.st_size:,} bytes are more than the limit of {limit:,}", path)
    return status.st_size


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """What to say of a file or folder that the system does not give."""
    if path.parts[:1] in {("http:",), ("https:",)}:
        return CheckpointError("is an address; download it, and give the file", path)
    if isinstance(error, FileNotFoundError):
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
        return CheckpointError(f"there is no such file.{did_you_mean(path.name, names)}", path)
    if isinstance(error, OSError) and error.errno in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
        return NotRegularFileError(f"is not a plain file ({error.strerror})", path)
    return CheckpointError(f"cannot be read: {_reason(error)}", path)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
    return kinds.get(stat.S_IFMT(mode), "a special file")


def _check_target(path: Path) -> None:
    try:
        if path.is_dir():
            raise NotRegularFileError("is a folder; give the name of a file in it", path)
        if not path.parent.is_dir():
            raise CheckpointError(f"the folder {path.parent} does not exist; make it with mkdir -p", path)
        if path.exists() and not path.is_file():
            raise NotRegularFileError(f"is {_kind(path.stat().st_mode)}; expected a plain file, or none", path)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def _start(path: Path) -> str:
    """How the names of this target's temporary files begin; cut because a name has 255 bytes at most."""
    return f".{path.name[:48]}."


@contextlib.contextmanager
def _temporary(path: Path, *, folder: bool = False) -> Iterator[tuple[Path, int]]:
    """A new, locked file or folder beside the target; what is there under its name at the end is removed."""
    temporary, descriptor = _create(path, folder)
    while not os.fstat(descriptor).st_nlink:  # another save took it for a stale one before it was locked
        os.close(descriptor)
        temporary, descriptor = _create(path, folder)
    try:
        yield temporary, descriptor
    finally:
        _discard(temporary)
        os.close(descriptor)


def _create(path: Path, folder: bool) -> tuple[Path, int]:
    temporary = path.parent / f"{_start(path)}{secrets.token_hex(8)}.tmp"
    if folder:
        temporary.mkdir()
    descriptor = os.open(temporary, _READ if folder else _CREATE, 0o666)
    _lock(descriptor)
    return temporary, descriptor


def _discard(temporary: Path) -> None:
    """Removes a file or folder, if it is there."""
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def _lock(descriptor: int, wait: bool = True) -> bool:
    """Whether the lock was had; it is held until the descriptor closes, at the latest with the process."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _remove_stale(path: Path) -> None:
    """Removes this target's temporary files and folders that no living process holds."""
    name = re.compile(re.escape(_start(path)) + r"[0-9a-f]{16}\.tmp")
    with os.scandir(path.parent) as entries:
        stale = [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]
    for temporary in stale:
        with contextlib.suppress(OSError):
            descriptor = os.open(temporary, _READ)
            try:
                if _lock(descriptor, wait=False):
                    _discard(temporary)
            finally:
                os.close(descriptor)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself last."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)
