"""Folders out: as a whole or not at all, beside what else is in them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterkit.errors import CheckpointError, NotRegularFileError
from adapterkit.formats import files
from adapterkit.formats.files import write_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed"])
def _exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's exchange of two names, and where there is none."""
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


@pytest.mark.usefixtures("_exchange")
def test_a_folder_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    write_folder(path, {"config.json": [b"{", b"}"], "weights": [b"old"]})
    assert contents(path) == {"config.json": b"{}", "weights": b"old"}
    (path / "README.md").write_bytes(b"mine")
    before = path.stat().st_ino
    write_folder(path, {"config.json": [b"[]"], "weights": [b"new"]})
    assert contents(path) == {"config.json": b"[]", "weights": b"new", "README.md": b"mine"}
    assert path.stat().st_ino != before
    assert list(tmp_path.iterdir()) == [path]


def test_the_system_exchanges_names_here(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "a").touch()
    system = getattr(ctypes.CDLL(None), "renameat2", None)
    if system is None or system(-100, os.fsencode(one), -100, os.fsencode(other), 2) != 0:
        pytest.skip("this system or file system has no exchange of names")
    assert files._exchange(one, other)
    assert list(one.iterdir()) == [one / "a"]
    assert not files._exchange(one, tmp_path / "absent")


@pytest.mark.usefixtures("_exchange")
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "mkdir"])
def test_an_error_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "adapter"
    write_folder(path, {"a": [b"old"], "b": [b"old"]})

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path if call in ("replace", "mkdir") else os, call, fail)
        with pytest.raises(CheckpointError, match="No space left"):
            write_folder(path, {"a": [b"new"], "b": [b"new"]})
    assert contents(path) == {"a": b"old", "b": b"old"}
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_folder_that_cannot_be_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "adapter", {"a": [b"old"]})

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", fail)
        write_folder(tmp_path / "adapter", {"a": [b"new"]})
    assert contents(tmp_path / "adapter") == {"a": b"new"}


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / f".adapter.{'0' * 16}.tmp"
    stale.mkdir()
    (stale / "half").touch()
    write_folder(tmp_path / "adapter", {"a": [b"x"]})
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def _file(path: Path) -> None:
    path.touch()


def _link(path: Path) -> None:
    path.symlink_to(path.parent)


def _with_a_folder(path: Path) -> None:
    (path / "inner").mkdir(parents=True)


def _with_a_link(path: Path) -> None:
    path.mkdir()
    (path / "out").symlink_to("/etc/passwd")


@pytest.mark.parametrize("make", [_file, _link, _with_a_folder, _with_a_link])
def test_what_is_no_adapters_own_folder_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "adapter"
    make(path)
    with pytest.raises(NotRegularFileError):
        write_folder(path, {"a": [b"x"]})
    assert list(tmp_path.iterdir()) == [path]
    assert not (path / "a").exists()


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".", ".hidden"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be called"):
        write_folder(tmp_path / "adapter", {name: [b"x"]})
    assert not list(tmp_path.iterdir())


def test_a_folder_above_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mkdir -p"):
        write_folder(tmp_path / "no" / "adapter", {"a": [b"x"]})
