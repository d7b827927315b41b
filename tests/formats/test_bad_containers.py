"""Bad inputs, rows 1 to 11 of the acceptance list: files that are no safetensors files, or damaged ones."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterkit.errors import (
    CheckpointError,
    CorruptFileError,
    UnexpectedKeysError,
    UnsupportedFileError,
)
from adapterkit.formats import container
from tests.formats import forge
from tests.formats.spoiling import Refusal


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"], ids=["row1", "row3"])
def test_a_pickle_with_a_payload(tmp_path: Path, refused: Refusal, name: str, protocol: int) -> None:
    marker, path = tmp_path / "executed", tmp_path / name
    path.write_bytes(pickle.dumps({"A": Payload(marker), "x": "y" * 100}, protocol))
    error = refused(path, UnsupportedFileError, format="native")
    assert "pickle" in str(error)
    refused(path, UnsupportedFileError)
    assert not marker.exists()


def test_row2_a_benign_bin(tmp_path: Path, refused: Refusal) -> None:
    torch.save({"A": torch.ones(2)}, tmp_path / "adapter_model.bin")
    error = refused(tmp_path / "adapter_model.bin", UnsupportedFileError, format="native")
    assert "safetensors.torch.save_file" in str(error)
    refused(tmp_path / "adapter_model.bin", UnsupportedFileError)


def _raw(header: object, body: bytes = b"") -> bytes:
    return forge.raw(header if isinstance(header, bytes) else json.dumps(header).encode(), body)


def _spoilt(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


_FULL = forge.entry(0, 4)
CONTAINERS: list[tuple[str, type[CheckpointError], str, Callable[[bytes], bytes]]] = [
    ("row4_empty", CorruptFileError, "cut short", lambda d: b""),
    ("row4_seven_bytes", CorruptFileError, "cut short", lambda d: d[:7]),
    ("row4_in_the_header", CorruptFileError, "cut short", lambda d: d[:100]),
    ("row4_half", CorruptFileError, "cut short", lambda d: d[: len(d) // 2]),
    ("row4_last_byte", CorruptFileError, "cut short", lambda d: d[:-1]),
    ("row5_trailing", CorruptFileError, "damaged", lambda d: d + b"x"),
    ("row5_trailing_much", CorruptFileError, "damaged", lambda d: d + bytes(10_000)),
    ("row6_one_bit", CorruptFileError, "checksum", _flip),
    ("row7_length_2^63", CorruptFileError, "header", lambda d: (1 << 63).to_bytes(8, "little") + d[8:]),
    ("row7_length_101MB", CorruptFileError, "header", lambda d: (101 * 10**6).to_bytes(8, "little") + d[8:]),
    ("row8_blank_17MiB", UnsupportedFileError, "limit", lambda d: _raw(b"{}" + b" " * (17 << 20))),
    ("row8_blank_15MiB", UnsupportedFileError, "native", lambda d: _raw(b"{}" + b" " * (15 << 20))),
    ("row9_500k_tensors", UnsupportedFileError, "limit", lambda d: _raw(_many(500_000))),
    ("row9_200k_tensors", UnsupportedFileError, "16,384 tensors", lambda d: _raw(_many(200_000))),
    ("row9_as_many_as_allowed", UnsupportedFileError, "native", lambda d: _raw(_many(container.TENSOR_LIMIT))),
    (
        "row10_twice",
        CorruptFileError,
        "twice",
        lambda d: _raw(b'{"a":%s,"a":%s}' % ((json.dumps(_FULL).encode(),) * 2), bytes(4)),
    ),
    ("row11_overlap", CorruptFileError, "'b'", lambda d: _raw({"a": _FULL, "b": _FULL}, bytes(4))),
    (
        "row11_overlap_half",
        CorruptFileError,
        "'b'",
        lambda d: _raw({"a": forge.entry(0, 8), "b": forge.entry(4, 12)}, bytes(12)),
    ),
    ("row11_hole", CorruptFileError, "'b'", lambda d: _raw({"a": _FULL, "b": forge.entry(8, 12)}, bytes(12))),
    ("row11_hole_first", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(4, 8)}, bytes(8))),
    ("row11_backwards", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(4, 0, [1])}, bytes(4))),
    ("row11_offset_2^64", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 1 << 64)}, bytes(4))),
    ("row11_negative", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(-4, 0, [1])}, bytes(4))),
    (
        "row11_shape_overflow",
        CorruptFileError,
        "'a'",
        lambda d: _raw({"a": forge.entry(0, 4, [1 << 62, 4, 1 << 62])}, bytes(4)),
    ),
    ("row11_shape_negative", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 4, [-1, -1])}, bytes(4))),
    ("row11_shape_is_text", CorruptFileError, "'a'", lambda d: _raw({"a": {**_FULL, "shape": "11"}}, bytes(4))),
    ("row11_shape_2^63", CorruptFileError, "its shape is", lambda d: _raw({"a": forge.entry(0, 0, [1 << 63, 0])})),
    ("row11_shape_bool", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 4, [True])}, bytes(4))),
    ("row11_shape_1000d", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 4, [1] * 1000)}, bytes(4))),
    ("row11_entry_is_list", CorruptFileError, "'a'", lambda d: _raw({"a": [0, 4]}, bytes(4))),
    ("row11_entry_with_more", CorruptFileError, "'a'", lambda d: _raw({"a": {**_FULL, "url": "x"}}, bytes(4))),
    ("row11_long_name", CorruptFileError, "n" * 200 + "...", lambda d: _raw({"n" * 201: [0, 4]}, bytes(4))),
    ("row11_dtype", UnsupportedFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 4, dtype="F31")}, bytes(4))),
    ("row11_dtype_is_list", UnsupportedFileError, "'a'", lambda d: _raw({"a": {**_FULL, "dtype": []}}, bytes(4))),
    ("metadata_of_numbers", CorruptFileError, "__metadata__", lambda d: _raw({"__metadata__": {"a": 1}})),
    ("metadata_is_list", CorruptFileError, "__metadata__", lambda d: _raw({"__metadata__": []})),
    ("header_is_list", CorruptFileError, "no safetensors", lambda d: _raw(b"[1, 2, 3]")),
    ("header_is_no_utf8", CorruptFileError, "not JSON", lambda d: _raw(b'{"\xff": 1}')),
    ("header_deep", CorruptFileError, "nested", lambda d: _raw(b'{"a":' + b"[" * 200_000)),
    ("header_of_nan", CorruptFileError, "NaN", lambda d: _raw(b'{"a": NaN}')),
    ("text", CorruptFileError, "no safetensors", lambda d: b"not a model at all, but a readme\n" * 10),
    (
        "lfs_pointer",
        UnsupportedFileError,
        "git lfs pull",
        lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ),
    ("gguf", UnsupportedFileError, "GGUF", lambda d: b"GGUF" + bytes(range(100))),
    ("no_metadata", UnsupportedFileError, "native", lambda d: _raw({"a": _FULL}, bytes(4))),
]


def _many(count: int) -> bytes:
    entries = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return b"{" + entries.encode() + b"}"


@pytest.mark.parametrize(("expected", "words", "change"), [c[1:] for c in CONTAINERS], ids=[c[0] for c in CONTAINERS])
def test_a_damaged_container(
    file: Path, refused: Refusal, expected: type[CheckpointError], words: str, change: Callable[[bytes], bytes]
) -> None:
    file.write_bytes(change(file.read_bytes()))
    assert words in str(refused(file, expected, format="native"))


def test_row7_a_real_header_of_101_mb_is_not_even_read(file: Path, refused: Refusal) -> None:
    with file.open("wb") as opened:
        opened.write((101 * 10**6).to_bytes(8, "little"))
        opened.truncate(102 * 10**6)
    assert "limit" in str(refused(file, UnsupportedFileError, format="native"))


def test_a_file_beyond_the_size_limit_is_not_even_read(file: Path, refused: Refusal) -> None:
    with file.open("wb") as opened:
        opened.truncate((4 << 30) + 1)
    assert "limit" in str(refused(file, UnsupportedFileError, format="native"))


def test_a_huge_body_is_not_read_before_its_header_is_checked(file: Path, refused: Refusal) -> None:
    with file.open("r+b") as opened:
        opened.truncate(3 << 30)
    refused(file, CorruptFileError)


@pytest.mark.parametrize(
    "key", ["a\0b/A", "../evil/A", "/abs/A", "x" * 10_000, "", "/", "A", "attn.q@toy.0/", "\ud800/A"]
)
def test_row12_strange_key_names(file: Path, refused: Refusal, key: str) -> None:
    def add(entries: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
        entries[key] = forge.entry(end, end + 4)

    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    add(entries)
    file.write_bytes(forge.raw(json.dumps(entries).encode(), data[end:] + bytes(4)))
    refused(file, (UnexpectedKeysError, CorruptFileError), format="native")


@pytest.mark.parametrize(
    ("expected", "words", "data"),
    [
        (UnsupportedFileError, "pickle", pickle.dumps({"a": list(range(100))})),
        (CorruptFileError, "cut short", b""),
        (CorruptFileError, "no safetensors", b"hello, this is text " * 9),
        (UnsupportedFileError, "format", _raw({"a": _FULL}, bytes(4))),
        (UnsupportedFileError, "is a JSON file", b'  {"a": 1} ' * 9),
        (CorruptFileError, "no safetensors", b"{" + bytes(7) + b"x" * 200),  # a length, that of 123 bytes
    ],
    ids=["pickle", "empty", "text", "foreign", "json", "length"],
)
def test_an_unrecognised_file_says_what_it_is(
    file: Path, refused: Refusal, expected: type[CheckpointError], words: str, data: bytes
) -> None:
    file.write_bytes(data)
    assert words in str(refused(file, expected))
