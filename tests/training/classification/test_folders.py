"""Which pictures are trained on and measured with, and of which classes they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adapterkit.errors import DataError
from adapterkit.training.classification.examples import Found, class_names
from adapterkit.training.classification.folders import find
from adapterkit.training.classification.tables import Columns
from adapterkit.training.data_files import Notes


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)


def found_in(data: Path, validation: Path | None = None, **columns: Any) -> tuple[Found, list[str]]:
    notes = Notes(data if data.is_dir() else data.parent)
    return find(data, validation, Columns(columns.pop("names", {}), **columns), notes), notes.sentences()


def labels(examples: Any) -> dict[str, tuple[str, ...]]:
    return {one.path.stem: one.names for one in examples}


def test_train_and_val_are_a_split_and_no_classes(tmp_path: Path):
    pictures(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "Test/dog/4.png", "extra/5.png")
    found, notes = found_in(tmp_path)
    assert class_names(found) == ["cat", "dog"]
    assert labels(found.training) == {"1": ("cat",), "2": ("dog",)}
    assert labels(found.validation) == {"3": ("cat",)}
    assert labels(found.test) == {"4": ("dog",)}
    assert notes == ["left out, no part of the split: 1 (extra)"]
    assert not found.empty
    (tmp_path / "val/dog").mkdir()
    assert found_in(tmp_path)[1][1] == "classes without an image to measure with: 1 (val/dog)"


def test_a_test_part_alone_is_measured_with(tmp_path: Path):
    pictures(tmp_path, "training/a/1.png", "training/b/2.png", "testing/a/3.png")
    found, _ = found_in(tmp_path)
    assert labels(found.validation) == {"3": ("a",)}
    assert not found.test


def test_a_class_may_be_called_train(tmp_path: Path):
    pictures(tmp_path, "train/1.png", "bus/2.png")
    found, _ = found_in(tmp_path)
    assert class_names(found) == ["bus", "train"]
    assert found.validation is None


def test_parts_that_are_no_split(tmp_path: Path):
    pictures(tmp_path / "none", "val/a/1.png", "test/a/1.png")
    with pytest.raises(DataError, match=r"holds test, val, not classes, and nothing to train on"):
        found_in(tmp_path / "none")
    pictures(tmp_path / "twice", "train/a/1.png", "val/a/1.png", "valid/a/1.png")
    with pytest.raises(DataError, match=r"several folders for one purpose: train, val, valid"):
        found_in(tmp_path / "twice")
    pictures(tmp_path / "new", "train/a/1.png", "train/b/1.png", "val/c/1.png", "val/a/1.png")
    with pytest.raises(DataError, match=r"measured with and not trained on: 1 \(c\)"):
        class_names(found_in(tmp_path / "new")[0])


def test_another_folder_to_measure_with(tmp_path: Path):
    pictures(tmp_path, "data/train/a/1.png", "data/train/b/2.png", "data/val/a/3.png", "own/b/4.png", "own/a/5.png")
    found, notes = found_in(tmp_path / "data", tmp_path / "own")
    assert labels(found.validation) == {"4": ("b",), "5": ("a",)}
    assert notes == ["left out, for options.validation is measured with: 1 (val)"]


class TestTables:
    @pytest.fixture(autouse=True)
    def files(self, tmp_path: Path) -> None:
        pictures(tmp_path, "images/1.png", "images/2.jpg", "images/3.png")

    def test_files_and_labels(self, tmp_path: Path):
        table = tmp_path / "labels.csv"
        table.write_text("file,label,source\nimages/1.png,10,x\nimages/2.jpg,9,y\nimages/3.png,10,z\n")
        for data in (table, tmp_path):
            found, notes = found_in(data)
            assert labels(found.training) == {"1": ("10",), "2": ("9",), "3": ("10",)}
            assert class_names(found) == ["9", "10"]
            assert found.tables == [table]
            assert notes == ["columns that are not read: 1 (source); in: 1 (labels.csv)"]

    def test_names_without_endings_in_another_folder_and_other_columns(self, tmp_path: Path):
        (tmp_path / "t.csv").write_text("picture;kind\n1;cat\n2;dog\n")
        names = {"file": "picture", "label": "kind"}
        found, _ = found_in(tmp_path / "t.csv", names=names, folder=tmp_path / "images")
        assert labels(found.training) == {"1": ("cat",), "2": ("dog",)}
        with pytest.raises(DataError, match=r"no column of files by a usual name .* but picture, kind; name it with"):
            found_in(tmp_path / "t.csv")
        with pytest.raises(DataError, match=r"has no column 'x' \(options\.columns\.label\), but picture, kind"):
            found_in(tmp_path / "t.csv", names={**names, "label": "x"})

    def test_a_column_of_parts(self, tmp_path: Path):
        (tmp_path / "t.csv").write_text(
            "file,label,split\nimages/1.png,a,train\nimages/2.jpg,b,train\nimages/3.png,a,val\n"
        )
        found, _ = found_in(tmp_path / "t.csv")
        assert (labels(found.training), labels(found.validation)) == ({"1": ("a",), "2": ("b",)}, {"3": ("a",)})
        (tmp_path / "t.csv").write_text("file,label,split\nimages/1.png,a,fold1\n")
        with pytest.raises(DataError, match=r"row 1 must have one of train, .* as 'split', not 'fold1'"):
            found_in(tmp_path / "t.csv")

    @pytest.mark.parametrize(
        "text",
        [
            "file,labels\nimages/1.png,cat|dog\nimages/2.jpg,dog\nimages/3.png,\n",
            "file,labels\nimages/1.png,cat\nimages/1.png,dog\nimages/2.jpg,dog\nimages/3.png,\n",
            "file,cat,dog\nimages/1.png,1,1\nimages/2.jpg,0,1\nimages/3.png,0,0\n",
        ],
        ids=["cells", "rows", "columns of 0 and 1"],
    )
    def test_several_classes_of_a_picture(self, tmp_path: Path, text: str):
        (tmp_path / "t.csv").write_text(text)
        found, _ = found_in(tmp_path / "t.csv", several=True)
        assert labels(found.training) == {"1": ("cat", "dog"), "2": ("dog",), "3": ()}

    def test_lists_of_labels(self, tmp_path: Path):
        rows = [{"file_name": "images/1.png", "labels": ["cat", "dog"]}, {"file_name": "images/2.jpg", "labels": []}]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found, _ = found_in(tmp_path / "t.jsonl", several=True)
        assert labels(found.training) == {"1": ("cat", "dog"), "2": ()}
        with pytest.raises(DataError, match=r"several labels as 'labels': .*set options\.multi_label=true"):
            found_in(tmp_path / "t.jsonl")

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("images/1.png,a\nimages/1.png,b", r"row 2 says that 1\.png is of 'b', and one before of 'a'.*multi_label"),
            ("images/1.png,a\nimages/9.png,b", r"names files that are not there.*see options\.images.*\n.*9\.png"),
            ("images/1.png,", r"row 1 has no label as 'label'"),
            (",a", r"row 1 must name a file as 'file', not ''"),
        ],
    )
    def test_rows_that_cannot_be_used(self, tmp_path: Path, rows: str, message: str):
        (tmp_path / "t.csv").write_text(f"file,label\n{rows}\n")
        with pytest.raises(DataError, match=f"(?s){message}"):
            found_in(tmp_path / "t.csv")
