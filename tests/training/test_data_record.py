"""A run knows what its data was: a resumed run goes on with the same, or says what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from adapterkit.cli.main import main
from adapterkit.errors import CorruptFileError, DataChangedError
from adapterkit.training.data_files import content_key
from adapterkit.training.data_record import DataRecord, read_record, resumed, write_record
from adapterkit.training.loop import train
from adapterkit.training.task import Setting
from tests.training.toy_task import Sequences, ToyTask, toy_run

BEFORE = DataRecord(
    {"cat/1": "a", "cat/2": "b", "dog/1": "c", "dog/2": "d", "dog/3": "e"}, ["cat", "dog"], ["left out: 1 (x)"]
)


def after(change: Callable[[dict[str, str]], object], *classes: str) -> DataRecord:
    files = dict(BEFORE.files)
    change(files)
    return DataRecord(files, classes or BEFORE.classes).following(BEFORE)


def renamed(old: str, new: str) -> Callable[[dict[str, str]], None]:
    def change(files: dict[str, str]) -> None:
        for name in [name for name in files if name.startswith(old)]:
            files[new + name[len(old) :]] = files.pop(name)

    return change


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (after(lambda files: files.update({"cat/3": "f"})), ["files added: 1 (cat/3)"]),
        (after(lambda files: files.pop("dog/2")), ["files removed: 1 (dog/2)"]),
        (after(lambda files: files.update({"cat/1": "z"})), ["files edited: 1 (cat/1)"]),
        (after(renamed("cat/1", "cat/9")), ["files renamed: 1 (cat/1 -> cat/9)"]),
        (
            after(renamed("cat", "zebra"), "dog", "zebra"),
            ["classes renamed: 1 (cat -> zebra)", "files renamed: 2 (cat/1 -> zebra/1, cat/2 -> zebra/2)"],
        ),
        (after(renamed("cat/1", "dog/4")), ["files renamed: 1 (cat/1 -> dog/4)"]),
    ],
)
def test_what_differs_is_told_and_may_be_accepted(now: DataRecord, told: list[str]):
    with pytest.raises(DataChangedError, match="go on with it as it is: --accept-changed-data") as caught:
        resumed(BEFORE, now, accept=False)
    assert caught.value.changes == told
    kept = resumed(BEFORE, now, accept=True)
    assert kept.notes == [f"changed since the run began, {sentence}" for sentence in told]


def test_the_same_data_passes_whatever_was_left_out():
    now = DataRecord(dict(BEFORE.files), BEFORE.classes, ["left out: 2 (x, y)"])
    assert resumed(BEFORE, now, accept=False) is now


def test_numbers_of_classes_stay_when_names_and_folders_change():
    assert after(renamed("cat", "zebra"), "dog", "zebra").classes == ["zebra", "dog"]
    alone = after(lambda files: [files.pop(name) for name in ("cat/1", "cat/2")], "dog")
    assert alone.classes == ["cat", "dog"]
    with pytest.raises(DataChangedError, match=r"classes without a file: 1 \(cat\)"):
        resumed(BEFORE, alone, accept=False)
    assert resumed(BEFORE, alone, accept=True).classes == ["cat", "dog"]


def test_a_class_that_the_run_knows_nothing_of_cannot_be_accepted():
    now = after(lambda files: files.update({"ant/1": "x"}), "ant", "cat", "dog")
    assert now.classes == ["cat", "dog", "ant"]
    with pytest.raises(DataChangedError, match=r"classes added: 1 \(ant\).*--overwrite$"):
        resumed(BEFORE, now, accept=True)


def test_a_run_of_a_release_without_records_says_that_nothing_was_compared():
    assert "not compared" in resumed(None, BEFORE, accept=False).notes[-1]


def test_a_record_comes_back_and_a_damaged_one_is_named(tmp_path: Path):
    path = tmp_path / "data.json"
    assert read_record(path) is None
    path.write_text(write_record(BEFORE))
    assert read_record(path) == BEFORE
    for text in ("{", "[]", "{}", '{"version": 2}', '{"version": 1, "files": {"a": 1}, "classes": [], "notes": []}'):
        path.write_text(text)
        with pytest.raises(CorruptFileError, match=r"data\.json"):
            read_record(path)


class TestRuns:
    """Of a task from outside, which says what its data is."""

    @pytest.fixture(autouse=True)
    def surveyed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.folder = tmp_path / "tokens.bin", tmp_path / "run"
        self.file.write_bytes(b"one")
        self.asked: list[DataRecord | None] = []

        def survey(task: Any, before: DataRecord | None) -> DataRecord:
            self.asked.append(before)
            return DataRecord({self.file.name: content_key(self.file)}, notes=["one line is odd"])

        monkeypatch.setattr(ToyTask, "survey", survey)

    def test_the_folder_keeps_the_record_and_a_change_is_an_error(self):
        train(toy_run(self.folder, steps=2), silent=True)
        begun = read_record(self.folder / "data.json")
        assert begun == DataRecord({"tokens.bin": content_key(self.file)}, [], ["one line is odd"])
        train(toy_run(self.folder, steps=4), resume=True, silent=True)
        self.file.write_bytes(b"two")
        with pytest.raises(DataChangedError, match=r"files edited: 1 \(tokens\.bin\)"):
            train(toy_run(self.folder, steps=6), resume=True, silent=True)
        assert read_record(self.folder / "data.json") == begun
        result = train(toy_run(self.folder, steps=6), resume=True, accept_changed_data=True, silent=True)
        assert result.step == 6
        train(toy_run(self.folder, steps=8), resume=True, silent=True)  # what was accepted is the data from then on
        assert self.asked[0] is None
        assert self.asked[1] == begun

    def test_without_a_checkpoint_there_is_nothing_to_compare(self):
        train(toy_run(self.folder, steps=2, checkpoint_every=None), silent=True)
        self.file.write_bytes(b"two")
        train(toy_run(self.folder, steps=2, checkpoint_every=None), resume=True, silent=True)
        assert read_record(self.folder / "data.json").files == {"tokens.bin": content_key(self.file)}  # type: ignore[union-attr]

    def test_notes_of_the_survey_and_of_the_preparation_are_printed_once(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        def prepare(task: Any, setting: Setting) -> Sequences:
            setting.tell("positions are stretched")
            return Sequences()

        monkeypatch.setattr(ToyTask, "prepare", prepare)
        train(toy_run(self.folder, steps=2))
        lines = capsys.readouterr().err.splitlines()
        assert lines.count("data: one line is odd") == lines.count("positions are stretched") == 1


class TestCommand:
    @pytest.fixture
    def run_file(self, tmp_path: Path) -> Path:
        for name, colour in (("kite", "red"), ("moth", "blue")):
            for number in range(3):
                (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
                shade = Image.new("RGB", (16, 16), colour)
                shade.putpixel((0, 0), (number, 0, 0))
                shade.save(tmp_path / "data" / name / f"{number}.png")
        args = {"pretrained": False, "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        values = {
            "task": "image-classification",
            "model": "timm:vit_tiny_patch16_224",
            "data": str(tmp_path / "data"),
            "output": str(tmp_path / "run"),
            "adapter": {"type": "lora", "rank": 2},
            "steps": 1,
            "checkpoint_every": 1,
            "options": {"train_head": True, "validation_fraction": 0.3, "model_args": args},
        }
        (tmp_path / "run.yaml").write_text(json.dumps(values))
        return tmp_path / "run.yaml"

    def test_labels_stay_with_their_classes_when_a_folder_is_renamed(self, run_file: Path, tmp_path: Path):
        runner = CliRunner()
        assert runner.invoke(main, ["train", str(run_file)]).exit_code == 0
        (tmp_path / "data/kite").rename(tmp_path / "data/zkite")
        again = ["train", str(run_file), "steps=2", "--resume"]
        refused = runner.invoke(main, again)
        assert refused.exit_code == 1
        assert "classes renamed: 1 (kite -> zkite)" in refused.output
        accepted = runner.invoke(main, [*again, "--accept-changed-data"])
        assert accepted.exit_code == 0, accepted.output
        assert "zkite, moth" in accepted.output
        assert read_record(tmp_path / "run/data.json").classes == ["zkite", "moth"]  # type: ignore[union-attr]

    def test_the_flag_belongs_to_resume(self, run_file: Path):
        result = CliRunner().invoke(main, ["train", str(run_file), "--accept-changed-data"])
        assert result.exit_code == 2

    def test_a_dry_run_looks_at_the_data(self, run_file: Path, tmp_path: Path):
        (tmp_path / "data/kite/notes.md").write_text("x")
        result = CliRunner().invoke(main, ["train", str(run_file), "--dry-run"])
        assert "not a kind of image that is read: 1 (kite/notes.md)" in result.output
        (tmp_path / "data/kite/0.png").write_text("x")
        result = CliRunner().invoke(main, ["train", str(run_file), "--dry-run"])
        assert result.exit_code == 1
        assert "0.png" in result.output
        assert not (tmp_path / "run").exists()
