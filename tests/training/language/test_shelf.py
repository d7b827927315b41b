"""Tokens on disk: what is put there comes back, next to nothing is in memory, and what is damaged is made anew."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapterkit.errors import ConfigError, DataError
from adapterkit.training.checked import CheckedTask
from adapterkit.training.language import examples as examples_of
from adapterkit.training.language.conversations import Rendered
from adapterkit.training.language.corpus import read_source, rendered
from adapterkit.training.language.encoded import held_out
from adapterkit.training.language.shelf import Shelf
from adapterkit.training.language.token_cache import TokenCache
from adapterkit.training.language.tokens import Encoder
from adapterkit.training.loop import train
from adapterkit.training.order import Draw, derive_seed
from adapterkit.training.run import Run
from tests.training.language import tiny


def test_sequences_come_back_with_their_tags_and_leave_no_file(tmp_path: Path):
    shelf = Shelf.temporary(tmp_path / "not/there")
    rows = [[3, 1, 2], [], [2**31 - 1], list(range(1000))]
    for tag, row in enumerate(rows):
        shelf.append(row, tag - 2**62)
    shelf.finish()
    assert [one.tolist() for one in (shelf[place] for place in range(len(shelf)))] == rows
    assert (shelf.tags + 2**62).tolist() == [0, 1, 2, 3]
    assert shelf.total == 1004
    assert shelf.between(2, 6).tolist() == [2, 2**31 - 1, 0, 1]
    shelf[0][:] = 7  # a copy
    assert shelf[0].tolist() == rows[0]
    assert pickle.loads(pickle.dumps(shelf))[3].tolist() == rows[3]
    assert not list(tmp_path.iterdir())
    nothing = Shelf.temporary(tmp_path).finish()
    assert (len(nothing), nothing.total) == (0, 0)


def test_a_full_disk_is_told(tmp_path: Path):
    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    full: Any = Full()
    with pytest.raises(DataError, match=r"No space left on device.*options\.cache"):
        Shelf(full, full).append([1])


def test_a_disk_that_is_full_at_the_end_is_told(tmp_path: Path):
    """What waits to be written is written when the shelf is read, or closed."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for fault, told in ((None, r"cannot be kept.*options\.cache"), (DataError("a row is wrong"), "a row is wrong")):

        def make(shelf: Shelf, fault: DataError | None = fault) -> dict[str, Any]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
            shelf.append(range(1000))
            if fault is not None:
                raise fault
            return {}

        try:
            with pytest.raises(DataError, match=told):
                TokenCache(None, tmp_path / "run").get((), make)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, before)


def test_two_that_make_the_same_leave_each_other_theirs(tmp_path: Path):
    """As two runs do, or the processes of one: who is later takes nothing away that the other may be about to read."""
    caches = [TokenCache(tmp_path, tmp_path) for _ in range(2)]
    seen: list[int] = []

    def make(shelf: Shelf) -> dict[str, Any]:
        shelf.append([1, 2])
        return {"made": 1}

    def later(shelf: Shelf) -> dict[str, Any]:
        caches[0].get(("same",), make)
        seen.append(next((tmp_path / "tokens").glob("*[!.part]")).stat().st_ino)
        return make(shelf)

    shelf, record = caches[1].get(("same",), later)
    assert (shelf[0].tolist(), record) == ([1, 2], {"made": 1})
    [place] = (tmp_path / "tokens").iterdir()
    assert [place.stat().st_ino] == seen
    assert place.stat().st_mode == place.parent.stat().st_mode


def test_what_killed_runs_were_writing_is_removed_after_a_day(tmp_path: Path):
    cache = TokenCache(tmp_path, tmp_path)
    for name, age in (("dead.part", 90_000), ("alive.part", 80_000), ("other", 90_000)):
        (tmp_path / "tokens" / name).mkdir(parents=True)
        (tmp_path / "tokens" / name / "numbers").write_bytes(b"1234")
        for one in (tmp_path / "tokens" / name / "numbers", tmp_path / "tokens" / name):
            os.utime(one, (time.time() - age, time.time() - age))
    cache.get(("new",), lambda shelf: {})
    names = {one.name for one in (tmp_path / "tokens").iterdir()}
    assert len(names) == 3
    assert names > {"alive.part", "other"}


def test_a_file_of_the_same_bytes_and_another_ending_has_tokens_of_its_own(model: Path, tmp_path: Path):
    counts = []
    for ending in ("csv", "txt"):
        data = tmp_path / f"data.{ending}"
        data.write_text("text\n" + "".join(f"{said(3, number)}\n" for number in range(9)), encoding="utf-8")
        options = {"cache": str(tmp_path / "cache"), "packing": "rows", "validation_fraction": 0, "too_long": "cut"}
        task: Any = CheckedTask(tiny.run_of(model, data, tmp_path / "run", **options)).inner
        task.survey(None)
        counts.append(len(task.examples.training))
    assert counts == [9, 1]


def test_tokens_to_measure_with_are_found_again(model: Path, tmp_path: Path):
    """A tokenizer that has cut texts is the one that it was."""
    rows = [{"anchor": said(20, number), "positive": said(20, number + 50)} for number in range(6)]
    data, other = (tiny.rows_to(tmp_path / name, *some) for name, some in (("a.jsonl", rows), ("b.jsonl", rows[:2])))
    options = {"task": "text-embedding", "validation": str(other), "cache": str(tmp_path / "cache"), "block_size": 4}
    for _ in range(2):
        notes = CheckedTask(tiny.run_of(model, data, tmp_path / "run", **options)).survey(None).notes
    assert sum(note.startswith("tokens are there already") for note in notes) == 2
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 2


def test_what_is_held_out_is_what_sorting_all_rows_chooses():
    for rows, share in ((2, 0.01), (40, 0.3), (41, 0.99)):
        order = sorted(range(rows), key=lambda number: derive_seed(5, "held out", number))
        count = min(max(round(rows * share), 1), rows - 1)
        assert np.flatnonzero(held_out(rows, share, 5)).tolist() == sorted(order[:count])
    assert not held_out(1, 0.0, 5).any()


def said(length: int, seed: int) -> str:
    words = random.Random(seed)
    return " ".join(words.choice(["the", "cat", "dog", "sat", "ran", "far"]) for _ in range(length))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "model", tiny.BY_ROLE)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = ({"prompt": said(3, number), "completion": said(5 + number % 9, number)} for number in range(24))
    return tiny.rows_to(tmp_path / "data.jsonl", *rows)


def test_examples_are_what_the_encoder_makes_of_the_rows(model: Path, data: Path, tmp_path: Path):
    task: Any = CheckedTask(tiny.run_of(model, data, tmp_path / "run", validation_fraction=0, block_size=64)).inner
    task.survey(None)
    texts: list[Rendered] = [text for _, text in rendered(read_source(data, {}), task.template, "")]
    expected = list(Encoder(task.tokenizer)(texts))
    assert len(task.examples.training) == len(expected) == 24
    for place, one in enumerate(expected):
        line = task.examples.training.line(place)
        assert torch.equal(line.tokens, one.tokens.long())
        assert torch.equal(line.learnt[1:], one.learnt[1:])


def losses(run: Path) -> list[Any]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "lr" in record]


def test_kept_tokens_serve_other_runs_are_checked_and_change_nothing(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made, cache, put = [], str(tmp_path / "cache"), examples_of.put

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return put(*arguments)

    def run_of(name: str, *overrides: str, **options: Any) -> Run:
        return tiny.run_of(model, data, tmp_path / name, "steps=6", "checkpoint_every=3", *overrides, **options)

    def told(**options: Any) -> list[str]:
        """What is said of tokens that are kept, or were."""
        notes = CheckedTask(run_of("other", cache=cache, **options)).survey(None).notes
        return [note for note in notes if cache in note]

    monkeypatch.setattr(examples_of, "put", counted)
    train(run_of("alone"), silent=True)
    train(run_of("first", "steps=3", cache=cache), silent=True)
    assert len(made) == 2
    train(run_of("first", "num_workers=1", cache=cache), resume=True, silent=True)
    assert len(made) == 2
    assert losses(tmp_path / "first") == losses(tmp_path / "alone")
    [place] = (tmp_path / "cache/tokens").iterdir()
    assert told() == [f"tokens are there already, in {place}"]
    content = (place / "numbers").read_bytes()
    (place / "numbers").write_bytes(bytes([content[0] ^ 2, *content[1:]]))
    assert told() == [f"tokens in {place} are damaged, and are made anew"]
    assert len(made) == 3
    assert (place / "numbers").read_bytes() == content
    (place / "record.json").unlink()
    assert told() == [f"tokens in {place} are damaged, and are made anew"]
    assert told() == [f"tokens are there already, in {place}"]
    assert len(made) == 4
    assert not told(learn="everything")
    assert not told(chat_template="turns")
    tiny.rows_to(data, *({"prompt": "the", "completion": said(5, number)} for number in range(24)))
    assert not told()
    assert len(made) == 7
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 4


def test_a_cache_among_the_data_is_refused(model: Path, data: Path, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    other = tiny.rows_to(tmp_path / "other.jsonl", {"prompt": "the", "completion": "cat"})
    folder = data.rename(tmp_path / "folder/data.jsonl").parent
    for measured in ({}, {"validation": str(folder)}):
        run = tiny.run_of(
            model, other if measured else folder, tmp_path / "run", cache=str(folder / "cache"), **measured
        )
        with pytest.raises(ConfigError, match=r"options\.cache: .*folder/cache lies in the data folder"):
            CheckedTask(run).survey(None)
        assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("preference", ("prompt", "chosen", "rejected")),
        ("text-embedding", ("anchor", "positive", "negative")),
        ("text-classification", ("text", "label")),
    ],
)
def test_other_tasks_keep_theirs(model: Path, tmp_path: Path, name: str, columns: tuple[str, ...]):
    rows = ({column: said(4, 3 * number + place) for place, column in enumerate(columns)} for number in range(12))
    data = tiny.rows_to(tmp_path / "data.jsonl", *({**row, "label": number % 2} for number, row in enumerate(rows)))
    found = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        run = tiny.run_of(model, data, tmp_path / "run", task=name, validation_fraction=0.25, cache=cache)
        task: Any = CheckedTask(run).inner
        task.survey(None)
        both = (task.preferences.training, task.preferences.held_out) if name == "preference" else task.split
        found.append([[one[Draw(number, 0)] for number in range(len(one))] for one in both])
    assert sum(len(one) for one in found[0]) == 12
    assert repr(found[1]) == repr(found[2]) == repr(found[0])
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 1


PROGRAM = """
from adapterkit.torchvision_ops import ensure_torchvision_ops; ensure_torchvision_ops()
import sys, threading, time
from pathlib import Path
from adapterkit.training.checked import CheckedTask
from tests.training.language import tiny
folder = Path(sys.argv[1])
options = {"packing": sys.argv[3], "validation_fraction": 0}
run = tiny.run_of(folder / "model", folder / sys.argv[2], folder / "run", **options)
task = CheckedTask(run)
task.inner.tokenizer
peak, done = [0], threading.Event()
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous())
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
task.survey(None)
data = task.inner.examples.training
for number in range(0, len(data), 7):
    data.line(number)
done.set(); thread.join()
print(len(data), peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("packing", "ending"), [("rows", "jsonl"), ("documents", "jsonl"), ("joined", "jsonl"), ("rows", "txt")]
)
def test_memory_does_not_grow_with_the_data(model: Path, tmp_path: Path, packing: str, ending: str):
    """Of 3 and of 48 MB of rows, or of one text, which take twice as much where they are kept."""
    words = [letter * 30 for letter in "abcdefgh"]
    texts = [" ".join(random.Random(n).choices(words, k=40)) for n in range(100)]
    lines = [(json.dumps({"text": text}) if ending == "jsonl" else text) + "\n" for text in texts]
    peaks = []
    for count in (2_500, 40_000):
        with (tmp_path / f"{count}.{ending}").open("w") as file:
            file.writelines(lines[number % len(lines)] for number in range(count))
        arguments = [sys.executable, "-c", PROGRAM, str(tmp_path), f"{count}.{ending}", packing]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=Path.cwd())
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[1]) / 1024)
    assert (tmp_path / f"40000.{ending}").stat().st_size > 45e6
    assert peaks[1] - peaks[0] < 25, peaks
