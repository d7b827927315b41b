from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from adapterkit.errors import DataError
from adapterkit.training.data_files import Notes
from adapterkit.training.pictures.folder import BESIDE, Found, Reading


def picture(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def touch(*paths: Path, content: bytes = b"x") -> None:
    for path in paths:
        path.write_bytes(content)


def found(folder: Path, **how: object) -> tuple[list[Found], list[str]]:
    notes = Notes(folder)
    return Reading(**how).find(folder, notes), notes.sentences()  # type: ignore[arg-type]


def captions(folder: Path, **how: object) -> dict[str, str]:
    return {item.path.name: item.caption for item in found(folder, **how)[0]}


def test_captions_come_from_the_text_file_of_the_same_name(tmp_path: Path):
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.JPG")
    picture(tmp_path / "sub/c.webp")
    write(tmp_path / "a.txt", "  ein\n Bär \n")
    write(tmp_path / "b.caption", "a bear")
    write(tmp_path / "sub/c.txt", "")
    write(tmp_path / "notes.md", "no image")
    items, told = found(tmp_path)
    assert [(c.path.name, c.caption) for c in items] == [("a.JPG", "ein Bär"), ("b.png", "a bear"), ("c.webp", "")]
    assert [c.source and c.source.name for c in items] == ["a.txt", "b.caption", "c.txt"]
    assert sorted(told) == [
        "empty caption: 1 (sub/c.txt)",
        "left out, not a kind of image that is read: 1 (notes.md)",
        "of several lines, taken as one caption (options.caption_lines: true draws one of them): 1 (a.txt)",
    ]


def test_images_without_captions_are_all_named_unless_there_is_a_fallback(tmp_path: Path):
    files = [picture(tmp_path / f"{number:02}.png") for number in range(14)]
    write(tmp_path / "03.txt", "three")
    write(tmp_path / "3.txt", "three")
    with pytest.raises(DataError, match=r"13 of 14 images .* lack a caption; write NAME.txt") as caught:
        found(tmp_path)
    assert caught.value.files == files[:3] + files[4:]
    assert "Captions without an image: 1 (3.txt)" in str(caught.value)
    assert list(captions(tmp_path, caption="any").values()) == ["any"] * 3 + ["three"] + ["any"] * 10
    assert captions(tmp_path, caption="")["00.png"] == ""


def test_folders_that_are_absent_or_empty(tmp_path: Path):
    with pytest.raises(DataError, match="is not a folder"):
        found(tmp_path / "none")
    write(tmp_path / "a.txt", "a")
    with pytest.raises(DataError, match="holds no image"):
        found(tmp_path)


def test_captions_that_are_empty_odd_or_alone_are_told(tmp_path: Path):
    for name in ("a", "b", "c", "d"):
        picture(tmp_path / f"{name}.png")
    touch(tmp_path / "a.txt", content="\ufeffa bear\r\nin snow".encode())
    touch(tmp_path / "b.TXT", content="ein Bär".encode("utf-16"))
    touch(tmp_path / "b.caption", tmp_path / "typo.txt")
    touch(tmp_path / "c.txt", content=b" \n")
    touch(tmp_path / "d.txt", content="Bär".encode("utf-32"))
    notes = Notes(tmp_path)
    assert [image.caption for image in Reading().find(tmp_path, notes)] == [
        "a bear in snow",
        "ein Bär",
        "",
        "Bär",
    ]
    assert notes.sentences() == [
        "left out, a caption without an image: 1 (typo.txt)",
        "left out, a second caption of the same image: 1 (b.caption)",
        "of several lines, taken as one caption (options.caption_lines: true draws one of them): 1 (a.txt)",
        "empty caption: 1 (c.txt)",
    ]


def test_lines_of_a_file_and_lists_in_a_table_are_several_captions(tmp_path: Path):
    for name in ("a", "b", "c", "d"):
        picture(tmp_path / f"{name}.png")
    write(tmp_path / "a.txt", " a bear\n\nred,  fur\r\na bear\n")
    write(tmp_path / "b.txt", "\n")
    rows = [{"file_name": "c.png", "text": ["one", " two ", ""]}, {"file_name": "d.png", "text": []}]
    write(tmp_path / "metadata.jsonl", "\n".join(json.dumps(row) for row in rows))
    items, told = found(tmp_path, lines=True, caption="any")
    assert [item.captions for item in items] == [("a bear", "red, fur"), ("",), ("one", "two"), ("any",)]
    assert told == ["empty caption: 1 (b.txt)"]
    assert [item.caption for item in found(tmp_path, caption="any")[0]] == ["a bear red, fur a bear", "", "one", "any"]


def test_captions_of_other_names_are_told_where_some_are_lacking(tmp_path: Path):
    picture(tmp_path / "a.png")
    touch(tmp_path / "A1.txt")
    with pytest.raises(
        DataError, match=r"(?s)1 of 1 images .* lack .*Captions without an image: 1 \(A1\.txt\)\. .*a\.png"
    ):
        found(tmp_path)


@pytest.mark.parametrize("content", ["a bear".encode("utf-16-le"), b"\0\0", "Bär".encode("latin-1")])
def test_every_caption_of_an_unknown_encoding_is_named(tmp_path: Path, content: bytes):
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
        touch(tmp_path / f"{name}.txt", content=content)
    with pytest.raises(DataError, match=r"2 files: .*save it as UTF-8") as caught:
        found(tmp_path)
    assert [path.name for path in caught.value.files] == ["a.txt", "b.txt"]


def test_a_table_of_hugging_face_in_lines_or_with_commas(tmp_path: Path):
    for folder in ("lines", "commas", "lines/deep"):
        for name in ("a.png", "b.png"):
            picture(tmp_path / folder / name)
    rows = [{"file_name": name, "text": f"a {name[0]},\n seen"} for name in ("a.png", "deep/a.png", "deep/b.png")]
    rows += [{"file_name": name, "text": "x"} for name in ("gone.png", "../../gone.png")]
    write(tmp_path / "lines/metadata.jsonl", "\n".join(json.dumps(row) for row in rows))
    write(tmp_path / "lines/deep/metadata.csv", "file_name,prompt,score\nb.png,nearer,3\n")
    write(tmp_path / "lines/b.txt", "own")
    items, told = found(tmp_path / "lines")
    expected = {"a.png": "a a, seen", "b.png": "own", "deep/a.png": "a d, seen", "deep/b.png": "nearer"}
    assert {item.path.relative_to(tmp_path / "lines").as_posix(): item.caption for item in items} == expected
    assert told == [
        "named in a table, but not there: 2 (gone.png, ../../gone.png)",
        "left out, a second caption of the same image: 1 (deep/b.png)",
    ]
    write(tmp_path / "commas/metadata.csv", '\ufefffile_name,caption,style\na.png,"one, two",\nb.png,,ink\n')
    assert captions(tmp_path / "commas") == {"a.png": "one, two", "b.png": ""}
    assert captions(tmp_path / "commas", column="style") == {"a.png": "", "b.png": "ink"}
    (tmp_path / "commas/metadata.csv").unlink()
    write(tmp_path / "commas/metadata.tsv", "file_name\ttext\na.png\ta, b\n")
    write(tmp_path / "commas/metadata.json", '[{"file_name": "b.png", "text": "c"}]')
    assert captions(tmp_path / "commas") == {"a.png": "a, b", "b.png": "c"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file,text\na.png,x\n", "has no column 'file_name', which names the pictures, but file, text"),
        ("metadata.csv", "file_name,text\na.png,x, y\n", "row 1 has 3 fields, and there are 2 columns"),
        ("metadata.csv", 'file_name,text\na.png,"x', "is no table (unexpected end of data)"),
        ("metadata.csv", "file_name,text\n,x\n", "row 1 has no file_name"),
        ("metadata.jsonl", '{"file_name": "a.png"', "row 1 is no JSON"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": 3}',
            "row 1 must have a text, or a list of texts, as 'text'",
        ),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["x", null]}', "as 'text', not ['x', None]"),
        ("metadata.jsonl", '\n["a.png"]', "row 2 must be an object with columns"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\\ud800"}', "half a character"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, name: str, text: str, message: str):
    picture(tmp_path / "a.png")
    table = write(tmp_path / name, text)
    with pytest.raises(DataError) as caught:
        found(tmp_path, caption="x")
    assert message in str(caught.value)
    assert caught.value.files == [table]


def test_a_table_without_captions_is_told_unless_a_column_was_asked_for(tmp_path: Path):
    picture(tmp_path / "a.png")
    table = write(tmp_path / "metadata.csv", "file_name,score\na.png,3\n")
    items, told = found(tmp_path, caption="x")
    assert (items[0].caption, items[0].source) == ("x", None)
    assert told == [
        "left out, a table without captions (text, caption, prompt, or options.caption_column): 1 (metadata.csv)"
    ]
    with pytest.raises(DataError, match="has no column 'texts'") as caught:
        found(tmp_path, column="texts")
    assert caught.value.files == [table]


def test_repeats_and_captions_in_the_manner_of_kohyas_scripts(tmp_path: Path):
    for name in ("10_sks dog/a.png", "10_sks dog/deep/b.png", "2_cat/3_kitten/c.png", "plain/d.png", "2024_may/e.png"):
        picture(tmp_path / name)
    write(tmp_path / "plain/d.txt", "d")
    write(tmp_path / "2024_may/e.txt", "e")
    write(tmp_path / "10_sks dog/a.txt", "a dog")
    items, told = found(tmp_path)
    assert {item.path.name: (item.repeats, item.caption) for item in items} == {
        "a.png": (10, "a dog"),
        "b.png": (10, "sks dog"),
        "c.png": (3, "kitten"),
        "d.png": (1, "d"),
        "e.png": (1, "e"),
    }
    assert sorted(told) == [
        "shown 10 times each, as the folder's name says: 1 (10_sks dog)",
        "shown 3 times each, as the folder's name says: 1 (2_cat/3_kitten)",
    ]
    assert found(tmp_path / "10_sks dog")[0][0].repeats == 10
    items, told = found(tmp_path, named_repeats=False, caption="x")
    assert {item.repeats for item in items} == {1}
    assert told == []


def test_parts_of_a_set_of_data_are_not_trained_on_together(tmp_path: Path):
    for name in ("train", "validation"):
        picture(tmp_path / name / "a.png")
    with pytest.raises(DataError, match=r"holds train, validation: parts of one set .*name one of them: .*/train"):
        found(tmp_path, caption="x")
    assert len(found(tmp_path / "train", caption="x")[0]) == 1
    picture(tmp_path / "b.png")
    assert len(found(tmp_path, caption="x")[0]) == 3


def test_masks_are_no_pictures_and_are_used_when_asked_for(tmp_path: Path):
    for name in ("a.jpg", "a.mask.png", "b.png", "b-masklabel.png", "c.png", "d.mask.png"):
        picture(tmp_path / name)
    items, told = found(tmp_path, caption="x")
    assert [(item.path.name, item.mask) for item in items] == [
        (name, None) for name in ("a.jpg", "b.png", "c.png", "d.mask.png")
    ]
    assert told == ["left out, a mask (options.masks: files would use it): 2 (a.mask.png, b-masklabel.png)"]
    items, told = found(tmp_path, caption="x", masks=BESIDE)
    masks = [item.mask and item.mask.name for item in items]
    assert (masks, told) == (["a.mask.png", "b-masklabel.png", None, None], [])


def test_masks_in_a_folder_of_their_own(tmp_path: Path):
    for name in ("a.jpg", "sub/a.png", "b.png", "masks/a.png", "masks/sub/a.png"):
        picture(tmp_path / name)
    items, told = found(tmp_path, caption="x", masks=tmp_path / "masks")
    masks = {item.path.relative_to(tmp_path).as_posix(): item.mask for item in items}
    assert masks == {
        "a.jpg": tmp_path / "masks/a.png",
        "b.png": None,
        "sub/a.png": tmp_path / "masks/sub/a.png",
    }
    assert told == []
    with pytest.raises(DataError, match="is not a folder"):
        found(tmp_path, caption="x", masks=tmp_path / "absent")


def test_what_is_apart_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    picture(tmp_path / "data/a.png")
    picture(tmp_path / "data/cache/b.png")
    write(tmp_path / "data/cache/ab/c.entry", "x")
    monkeypatch.chdir(tmp_path)
    for apart in (tmp_path / "data/cache", Path("data/cache")):
        for folder in (tmp_path / "data", Path("data")):
            items, told = found(folder, caption="x", apart=apart)
            assert [item.path.name for item in items] == ["a.png"]
            assert told == []
