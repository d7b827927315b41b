"""Whatever a verb is given, it does it or says no with an error of ours, which is short and steers no terminal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint
from adapterkit.testing import toys


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    return value


class Strange:
    def __fspath__(self) -> str:
        raise ZeroDivisionError


ODD: dict[str, Any] = {
    "None": None,
    "an int": 3,
    "an int too long to be shown": 10**5000,
    "NaN": float("nan"),
    "True": True,
    "bytes": b"a",
    "nothing": "",
    "NUL": "a\0b",
    "a control sequence": "\x1b]0;owned\x07",
    "half a character": "\udcff",
    "long text": "x" * 5000,
    "a list": ["a", 3],
    "one twice": ["a", "a"],
    "a mapping": {"a": 3},
    "a set": {"a"},
    "nested deeply": deep(),
    "a module": torch.nn.Linear(1, 1),
    "no path": Strange(),
}


def route(adapters: ak.Adapters, routes: Any) -> None:
    with adapters.routed(routes):
        pass


def said(odd: Any) -> Any:
    """Where None stands for a default, something else."""
    return 3 if odd is None else odd


VERBS: dict[str, Callable[[ak.Adapters, Any, Path], Any]] = {
    "load": lambda adapters, odd, _: adapters.load(odd, "new"),
    "load_all": lambda adapters, odd, _: adapters.load_all(odd),
    "load, name": lambda adapters, odd, file: adapters.load(file, said(odd)),
    "load, format": lambda adapters, odd, file: adapters.load(file, "new", format=said(odd)),
    "save": lambda adapters, odd, _: adapters.save("a", odd),
    "save, names": lambda adapters, odd, file: adapters.save(odd, file),
    "save, format": lambda adapters, odd, file: adapters.save("a", file, format=odd),
    "save, metadata": lambda adapters, odd, file: adapters.save("a", file, metadata=said(odd)),
    "save, dtype": lambda adapters, odd, file: adapters.save("a", file, dtype=said(odd)),
    "add, name": lambda adapters, odd, _: adapters.add(odd, ak.LoRA()),
    "add, config": lambda adapters, odd, _: adapters.add("new", odd),
    "add, settings": lambda adapters, odd, _: adapters.add("new", ak.LoRA(), settings=said(odd)),
    "add, seed": lambda adapters, odd, _: adapters.add("new", ak.LoRA(), seed=said([odd])),
    "add, dtype": lambda adapters, odd, _: adapters.add("new", ak.LoRA(), dtype=said(odd)),
    "install": lambda adapters, odd, _: adapters.install("new", odd),
    "activate": lambda adapters, odd, _: adapters.activate(said(odd)),
    "activate, weight": lambda adapters, odd, _: adapters.activate({"a": said(None if odd == 3 else odd)}),
    "activate, part": lambda adapters, odd, _: adapters.activate(ak.Stack("a", odd)),
    "activate, span": lambda adapters, odd, _: adapters.activate(ak.Split({"a": odd})),
    "routed": lambda adapters, odd, _: route(adapters, odd),
    "train": lambda adapters, odd, _: adapters.train(odd),
    "config": lambda adapters, odd, _: adapters.config(odd),
    "remove": lambda adapters, odd, _: adapters.remove(odd),
    "points, adapter": lambda _, odd, __: ak.points(toys.ToyModel(), adapter=said(odd)),
    "points, selector": lambda _, odd, __: ak.points(toys.ToyModel(), said(odd)),
    "Adapters": lambda _, odd, __: ak.Adapters(None if isinstance(odd, torch.nn.Module) else odd),
    "Adapters, backend": lambda _, odd, __: ak.Adapters(toys.ToyModel(), backend=said(odd)),
    "Adapters, roles": lambda _, odd, __: ak.Adapters(toys.ToyModel(), roles=said(odd)),
}


@pytest.fixture
def adapters() -> ak.Adapters:
    toys.register()
    made = ak.Adapters(toys.ToyModel())
    made.add("a", ak.LoRA(rank=2))
    return made


@pytest.mark.parametrize("verb", VERBS)
def test_no_argument_is_a_bare_error(verb: str, adapters: ak.Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # some are names of files
    file = adapters.save("a", tmp_path / "a.safetensors")
    before = {key: value.clone() for key, value in adapters.state_dict("a").items()}
    errors: dict[str, str] = {}
    for name, odd in ODD.items():
        try:
            VERBS[verb](adapters, odd, file)
        except ak.AdapterKitError as error:
            errors[name] = str(error)
    assert len(errors) > len(ODD) / 2
    assert not {name: text for name, text in errors.items() if not text.isprintable() or len(text) > 2500}
    assert list(adapters) == ["a"]
    after = adapters.state_dict("a")
    assert all(torch.equal(after[key], before[key]) for key in before)


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


PLACES: dict[str, Callable[[Path], Path]] = {
    "a folder that is empty": lambda folder: folder,
    "absent": lambda folder: folder / "none",
    "below a file": lambda folder: Path(__file__) / "none",
    "a pipe": lambda folder: pipe(folder / "pipe"),
    "a dead link": lambda folder: link(folder / "link", folder / "none"),
    "a ring of links": lambda folder: link(folder / "ring", folder / "ring"),
    "too long a name": lambda folder: folder / ("x" * 300),
    "a device": lambda folder: Path("/dev/null"),
    "NUL": lambda folder: folder / "a\0b",
}


@pytest.mark.parametrize("place", PLACES)
def test_places_that_hold_no_adapter(place: str, adapters: ak.Adapters, tmp_path: Path):
    path = PLACES[place](tmp_path)
    for verb in (lambda: adapters.load(path, "new"), lambda: adapters.load_all(path)):
        with pytest.raises(ak.CheckpointError):
            verb()


def test_a_place_that_may_not_be_looked_at(adapters: ak.Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", refused)
    with pytest.raises(ak.CheckpointError, match=r"there: cannot be read: Permission denied$"):
        adapters.load(tmp_path / "there", "new")


def test_a_name_stands_once_in_a_file(adapters: ak.Adapters, tmp_path: Path):
    with pytest.raises(ak.ConfigError, match="'a' is named twice"):
        adapters.save(["a", "a"], tmp_path / "file")
    with contextlib.suppress(ak.ConfigError):
        adapters.save(("a" for _ in range(2)), tmp_path / "file")  # type: ignore[arg-type]
    assert not (tmp_path / "file").exists()


def test_a_weight_function_that_fails_is_named(adapters: ak.Adapters):
    with pytest.raises(ak.ConfigError, match=r"weight function of 'a' raised ZeroDivisionError at attn\.q@toy"):
        adapters.activate({"a": lambda point, step: 1 / 0})
    with pytest.raises(ak.ConfigError, match=r"raised TypeError"):
        adapters.activate({"a": lambda: 1.0})  # type: ignore[dict-item]


def test_what_is_installed_is_a_checkpoint(adapters: ak.Adapters):
    with pytest.raises(ak.ConfigError, match="expected a Checkpoint, not 'file'; load"):
        adapters.install("new", "file")  # type: ignore[arg-type]
    held = adapters.checkpoint("a")
    assert isinstance(held, Checkpoint)
    assert adapters.install("new", held).name == "new"
