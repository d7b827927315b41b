"""Rows of every kind of file, what is left out, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import DataError, MissingDependencyError
from adapterkit.training.language.corpus import read_source
from adapterkit.training.language.rows import read_rows, row_files

ROWS = [{"prompt": "one, two", "completion": 'th"ree'}, {"prompt": "a\nb", "completion": "ä; ö"}]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(path: Path) -> list[Any]:
    return [dict(row.values) for row in read_rows(row_files(path))]


def texts(path: Path) -> list[str]:
    return [one.text for one, _ in read_source(path, {})]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(json.dumps(row) for row in ROWS)),
        ("a.JSONL", "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("a.csv", 'prompt,completion\r\n"one, two","th""ree"\r\n"a\r\nb",ä; ö\r\n'),
        ("a.csv", 'prompt;completion\none, two;"th""ree"\n\n"a\nb";"ä; ö"\n'),
        ("a.tsv", 'prompt\tcompletion\none, two\t"th""ree"\n"a\nb"\tä; ö\n'),
    ],
)
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str, content: str):
    assert values(write(tmp_path / name, content)) == ROWS
    assert values(tmp_path) == ROWS


def test_parquet_is_read_or_said_to_need_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.parquet"
    if importlib.util.find_spec("pyarrow") is not None:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        assert values(path) == ROWS
        with pytest.raises(DataError, match="is no Parquet file"):
            values(write(path, "x"))
    write(path, b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'adapterkit\[data\]', or write it as \.jsonl"):
        values(path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"text": "the"}\n{"txt": ', "row 2 is no JSON"),
        ("a.jsonl", '{"text": "fine"}\n[1]', "row 2 must be an object with columns"),
        ("a.jsonl", '{"text": "fine"}\n' + "[" * 5000, "row 2 is no JSON"),
        ("a.jsonl", '{"text": "fine"}\n{"text": "\\ud83d"}', "row 2 holds half a character"),
        ("a.jsonl", '{"text": "fine"}\n{"text": 3}', "row 2 must have a text as 'text', not 3"),
        ("a.jsonl", '{"text": "fine"}\n{"txt": "cat"}', "row 2 has no 'text'"),
        ("a.json", "{", "row 1 is no JSON"),
        ("a.json", '{"a": 1}\n3', "row 2 must be an object"),
        ("a.json", "3", "must hold an array of objects"),
        ("a.json", '[{"text": "one"}, "two"]', "row 2 must be an object"),
        ("a.csv", "prompt,completion\none\n", "row 1 has 1 fields, and there are 2 columns"),
        ("a.csv", "text,text\na,b\n", "different names of columns"),
        ("a.csv", 'text\n"a', "is no table"),
        ("a.csv", "the cat", "no text in the data"),
        ("a.txt", ' [{"text": "one"}]', r"holds rows of JSON, not text; name it with the ending \.json"),
        ("a.md", '{"text": "one"}\n{"text": "two"}', r"name it with the ending \.jsonl"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("a.txt", " \n", "no text in the data"),
        ("a.jsonl", '{"body": "one"}', r"has the columns 1 \(body\), and none of what is read"),
    ],
)
def test_every_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, reason: str):
    other = "b" + Path(name).suffix
    for one in (name, other):
        write(tmp_path / one, content)
    with pytest.raises(DataError, match=reason) as caught:
        read_source(tmp_path, {})
    assert [path.name for path in caught.value.files] == [name, other]


@pytest.mark.parametrize("content", ["[see below] a text", "{\n  brackets\n}", "[1, 2]", "{} is a set"])
def test_text_that_begins_with_a_bracket_is_text(tmp_path: Path, content: str):
    assert texts(write(tmp_path / "a.txt", content)) == [content]


def test_encodings_line_ends_and_separators_inside_of_a_line(tmp_path: Path):
    write(tmp_path / "a.txt", "\ufeffone\r\ntwo\rthree")
    write(tmp_path / "b.JSONL", '\ufeff{"text": "a\u2028b"}\r\n{"text": "c\x85d"}\n')
    assert texts(tmp_path) == ["one\ntwo\nthree", "a\u2028b", "c\x85d"]


def test_what_is_left_out_is_told(tmp_path: Path):
    write(tmp_path / "a.txt", "one")
    for name in ("b.txt", "c.jsonl", "e.docx", ".a.txt", "__MACOSX/a.txt"):
        write(tmp_path / name, "")
    write(tmp_path / "d.jsonl", '{"text": " "}\n{"text": "two", "id": 3}')
    source = read_source(tmp_path, {})
    assert [one.text for one, _ in source] == ["one", "two"]
    assert list(source.notes) == [
        "left out, hidden: 2 (.a.txt, __MACOSX)",
        "left out, not a kind of text that is read: 1 (e.docx)",
        "left out, a file without a row: 1 (c.jsonl)",
        "left out, a file without a word: 1 (b.txt)",
        "left out, rows without a word to learn: 1 (d.jsonl)",
        "read as texts (text)",
        "read as texts (text; not read: 1 (id))",
    ]
    assert sorted(source.files) == ["a.txt", "b.txt", "c.jsonl", "d.jsonl"]


def test_endings_that_say_nothing_are_refused(tmp_path: Path):
    for name in ("data", "data.log"):
        with pytest.raises(DataError, match=r"no ending that says what it holds; name it with one of \.txt, \.md"):
            row_files(write(tmp_path / name, "one"))
    with pytest.raises(DataError, match="is a folder without a file that is read"):
        row_files(tmp_path)
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        row_files(tmp_path / "nothing")


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("Train/a.jsonl", "validation/a.jsonl")])
def test_what_is_to_be_measured_with_is_not_trained_on(tmp_path: Path, names: tuple[str, ...]):
    for name in names:
        write(tmp_path / name, '{"text": "one"}')
    with pytest.raises(DataError, match=r"[Tt]rain, .*name one of them as data, .* as options\.validation"):
        row_files(tmp_path)
    row_files(tmp_path / names[0])
