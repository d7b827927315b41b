"""Writing files as a whole or not at all: modes, folders, full disks, other writers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterkit.errors import CheckpointError, NotRegularFileError, UnsupportedFileError
from adapterkit.formats import files
from adapterkit.formats.files import open_plain, write_atomically, write_folder


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_the_mode_is_what_the_umask_leaves(tmp_path: Path, umask: Callable[[int], int], mask: int) -> None:
    umask(mask)
    write_atomically(tmp_path / "x", b"new")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
def test_a_file_that_is_replaced_keeps_its_mode_and_owner(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(mode)
    if os.getuid() == 0:
        os.chown(path, 65534, 65534)
    before = path.stat()
    write_atomically(path, b"new")
    after = path.stat()
    assert path.read_bytes() == b"new"
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_link_that_is_replaced_says_nothing_of_the_mode(tmp_path: Path, umask: Callable[[int], int]) -> None:
    umask(0o022)
    (tmp_path / "private").touch(0o600)
    (tmp_path / "x").symlink_to(tmp_path / "private")
    write_atomically(tmp_path / "x", b"new")
    assert stat.S_IMODE((tmp_path / "x").lstat().st_mode) == 0o644


def test_a_folder_that_is_replaced_keeps_its_modes(tmp_path: Path, umask: Callable[[int], int]) -> None:
    umask(0o022)
    folder = tmp_path / "adapter"
    write_folder(folder, {"config": [b"1"], "weights": [b"2"], "notes": [b"3"]})
    folder.chmod(0o700)
    (folder / "weights").chmod(0o600)
    (folder / "notes").chmod(0o640)
    write_folder(folder, {"config": [b"4"], "weights": [b"5"], "more": [b"6"]})
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes == {"adapter": 0o700, "config": 0o644, "weights": 0o600, "notes": 0o640, "more": 0o644}
    assert (folder / "weights").read_bytes() == b"5"


def test_the_file_is_replaced_not_written_into(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"newer")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"precious")
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert target.read_bytes() == b"precious"
    assert not link.is_symlink()
    assert link.read_bytes() == b"new"


def test_a_name_of_the_greatest_length(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        write_atomically(tmp_path / name, b"x")
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_atomically(tmp_path / ("x" * 256), b"x")
    assert len(list(tmp_path.iterdir())) == 2


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    for path, expected, words in (
        (tmp_path, NotRegularFileError, "is a folder"),
        (tmp_path / "pipe", NotRegularFileError, "is a pipe"),
        (Path("/dev/null"), NotRegularFileError, "is a device"),
        (tmp_path / "a" / "b", CheckpointError, "mkdir -p"),
        (tmp_path / "file" / "b", CheckpointError, "folder"),
        (tmp_path / "a\0b", CheckpointError, "null"),
    ):
        with pytest.raises(expected, match=words) as caught:
            write_atomically(path, b"x")
        assert caught.value.path == path
    assert sorted(tmp_path.iterdir()) == before
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A folder that may be looked into but not written to."""
    tmp_path.chmod(0o555)
    for parent in tmp_path.parents:  # pytest's own only their owner may enter
        if not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(0o755)
    return tmp_path


@pytest.mark.usefixtures("closed", "nobody")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
        write_atomically(tmp_path / "x", b"x")
    assert list(tmp_path.iterdir()) == []


def in_a_child(action: Callable[[], None]) -> int:
    """Runs it in a process of its own; the exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("limit", [0, 1, 4096, 99_999])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, limit: int, existing: bool) -> None:
    path = tmp_path / "x"
    if existing:
        path.write_bytes(b"old")

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointError, match="cannot be written: File too large") as caught:
            write_atomically(path, bytes(100_000))
        assert caught.value.path == path

    assert in_a_child(save) == 0
    assert [p.name for p in tmp_path.iterdir()] == (["x"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_an_error_of_any_call_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(*args: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "replace" else os, call, fail)
        with pytest.raises(CheckpointError, match=os.strerror(code)):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Some network file systems cannot; any other error is one."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if code == errno.EINVAL else pytest.raises(CheckpointError):
        write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    data = bytes(range(256)) * 10
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, rest: write(descriptor, rest[:100]))
        write_atomically(tmp_path / "x", data)
    assert (tmp_path / "x").read_bytes() == data


def test_the_data_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        assert self.read_bytes() == b"data"
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    write_atomically(tmp_path / "x", b"data")
    assert events == ["file", "rename", "folder"]


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    stale = tmp_path / f".x.{'0' * 16}.tmp"
    living = tmp_path / f".x.{'1' * 16}.tmp"
    others = [tmp_path / name for name in (f".y.{'0' * 16}.tmp", ".x.notes.tmp", ".x.tmp", f"x.{'0' * 16}.tmp")]
    for path in (stale, living, *others):
        path.touch()
    with living.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_atomically(tmp_path / "x", b"new")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "x", living, *others])


def test_a_temporary_file_that_is_taken_for_a_stale_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = files._lock, []

    def steal(descriptor: int, wait: bool = True) -> bool:
        if not taken:
            taken.extend(tmp_path.glob(".x.*"))
            taken[0].unlink()
        return lock(descriptor, wait)

    monkeypatch.setattr(files, "_lock", steal)
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert len(taken) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_knows_no_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_atomically(tmp_path / "x", b"new")
    assert not (tmp_path / "x").exists()


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    """Every reader meets one writer's whole file."""
    path, problems = tmp_path / "x", []
    versions = [bytes([i]) * 50_000 for i in range(4)]

    def save(data: bytes) -> None:
        try:
            for _ in range(10):
                write_atomically(path, data)
                with open_plain(path) as (file, size):
                    if file.read() not in versions or size != 50_000:
                        problems.append("torn")
        except (CheckpointError, OSError) as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=save, args=(data,)) for data in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert list(tmp_path.iterdir()) == [path]


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    for _ in range(5):
        write_atomically(tmp_path / "x", b"x" * 10)
        with pytest.raises(NotRegularFileError), open_plain(tmp_path):
            pass
        with pytest.raises(UnsupportedFileError, match="limit of 9"), open_plain(tmp_path / "x", limit=9):
            pass
        with pytest.raises(NotRegularFileError):
            write_atomically(tmp_path, b"x")
        with pytest.raises(KeyError), open_plain(tmp_path / "x"):
            raise KeyError
    assert opened() == before


def test_an_error_while_reading_is_typed(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(CheckpointError, match="cannot be read"), open_plain(tmp_path / "x"):
        raise OSError(errno.EIO, "Input/output error")
