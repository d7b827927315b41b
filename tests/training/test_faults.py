"""Rows at fault are told all at once, each with its file and its row; of very many the first, and how many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from adapterkit.cli.main import main
from adapterkit.errors import DataError, RowError
from adapterkit.training.classification.tables import Columns, table_examples
from adapterkit.training.data_files import Notes, gather
from adapterkit.training.faults import Faults
from adapterkit.training.language.corpus import read_source
from adapterkit.training.loop import train
from tests.training.language import tiny
from tests.training.language.test_classification import bert

GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "no"}]}
STRANGE: dict[str, Any] = {"messages": [{"role": "wizard", "content": "why"}]}


def test_every_bad_row_of_every_file_is_told(tmp_path: Path):
    rows = [GOOD, {"messages": []}, STRANGE, {"messages": [GOOD["messages"][0]]}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text + '{"messages": \n' + json.dumps(GOOD) + "\n[1]\n")
    tiny.rows_to(tmp_path / "b.jsonl", STRANGE, GOOD)
    with pytest.raises(RowError) as caught:
        read_source(tmp_path, {})
    head, *lines = str(caught.value).split("\n  ")
    assert head == "6 rows cannot be used:"
    a = f"{tmp_path / 'a.jsonl'}: row"
    assert [line[: len(a) + 2] for line in lines[:5]] == [f"{a} {number}" for number in (2, 3, 4, 5, 7)]
    assert "must hold a list of messages, not []" in lines[0]
    assert "holds a message of the role 'wizard'; expected one of" in lines[1]
    assert "has no message of the role 'assistant'" in lines[2]
    assert "is no JSON" in lines[3]
    assert "must be an object with columns" in lines[4]
    assert lines[5].startswith(f"{tmp_path / 'b.jsonl'}: row 1 holds a message of the role 'wizard'")
    assert caught.value.files == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def test_of_very_many_the_first_are_told(tmp_path: Path):
    tiny.rows_to(tmp_path / "a.jsonl", GOOD, *[STRANGE] * 40)
    with pytest.raises(RowError) as caught:
        read_source(tmp_path / "a.jsonl", {})
    lines = str(caught.value).split("\n  ")
    assert (lines[0], len(lines), lines[-1]) == ("40 rows cannot be used:", 12, "and 30 more")


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "text,more\na,b\na\nb,c\na,b,c\n"), ("a.json", '[{"text": "a"}, 1, {"text": "b"}, 2]')]
)
def test_rows_of_tables_and_arrays(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(RowError, match=r"2 rows cannot be used:\n .*row 2 .*\n .*row 4 "):
        read_source(tmp_path, {})


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("causal-lm", {"messages": GOOD["messages"][1:]}),
        ("preference", {"prompt": [], "chosen": GOOD["messages"][1:], "rejected": GOOD["messages"][1:]}),
    ],
)
def test_every_row_that_a_template_refuses_is_told(tmp_path: Path, task: str, row: dict[str, Any]):
    good = GOOD if task == "causal-lm" else {"prompt": "why", "chosen": "no", "rejected": "yes"}
    answering = tiny.STRICT.replace(
        "<u>{{ m.content }}", "{% if m.role == 'user' %}<u>{% else %}<a>{% endif %}{{ m.content }}"
    )
    data = tiny.rows_to(tmp_path / "rows.jsonl", good, row, good, row)
    run = tiny.run_of(tiny.llama(tmp_path / "model", answering), data, tmp_path / "run", task=task)
    told = r"2 rows cannot be used:\n .*row 2 is not what the chat template takes.*\n .*row 4 is not"
    with pytest.raises(RowError, match=told):
        run.make_task().survey(None)


def test_tables_of_labels(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("file,label\na.png,cat\na.png,\n,cat\na.png,dog\n")
    with pytest.raises(RowError, match=r"3 rows cannot be used:") as caught:
        table_examples(tmp_path / "t.csv", Columns({}), {}, Notes(tmp_path))
    assert [line.partition(": ")[2][:5] for line in caught.value.lines] == ["row 2", "row 3", "row 4"]


def test_one_is_told_as_it_is_and_files_that_cannot_be_read_come_first():
    faults = Faults()
    faults.check()
    one = RowError(Path("a"), 3, "is odd")
    faults.add(one)
    with pytest.raises(RowError) as caught:
        faults.check()
    assert caught.value is one
    assert str(one) == "row 3 is odd:\n  a"

    def read(path: Path) -> None:
        raise one if path.name == "a" else DataError("cannot be read", [path])

    with pytest.raises(DataError, match=r"2 files: cannot be read:\n  b\n  a"):
        gather([Path("b"), Path("a")], read)


def test_rows_of_texts_that_cannot_be_read_are_told_beside_the_classes_of_the_others(tmp_path: Path):
    rows = [{"text": "the cat", "label": "cat"}, {"text": "the dog", "label": "dog"}] * 2
    data = tiny.rows_to(tmp_path / "rows.jsonl", *rows)
    run = tiny.run_of(bert(tmp_path / "model"), data, tmp_path / "run", "steps=1", task="text-classification")
    train(run, silent=True)
    new = tiny.rows_to(tmp_path / "new.jsonl", {"text": "the cat"}, {"text": 3}, 4, {"text": "the dog"})
    result = CliRunner().invoke(main, ["predict", str(tmp_path / "run"), str(new), "--csv"])
    assert result.exit_code == 1
    assert [line.split(",")[0] for line in result.stdout.splitlines()[1:]] == [f"{new}:1", f"{new}:4"]
    assert f"{new}:2: row 2 must have a text as 'text', not 3" in result.stderr
    assert f"{new}:3: row 3 must be an object" in result.stderr
