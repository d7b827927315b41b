"""The acceptance list of bad inputs, for every reader: a typed error, quickly, in little memory, and nothing changed.

Rows are numbered as in the list; what the native format alone can tell is in `test_bad_containers.py`, `_contents.py`
and `_places.py`.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pickle
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.errors import (
    AdapterKitError,
    CheckpointError,
    CorruptFileError,
    DtypeMismatchError,
    InvalidHeaderError,
    MissingKeysError,
    NonFiniteError,
    NotRegularFileError,
    ShapeMismatchError,
    UnexpectedKeysError,
    UnsupportedFileError,
)
from adapterkit.tools.describe import describe
from adapterkit.tools.files import read
from tests.formats import forge
from tests.formats.samples import CONFIG, READERS, Reader, Sample
from tests.formats.spoiling import SECONDS, Refusal
from tests.formats.test_bad_containers import Payload

Expected = type[CheckpointError] | tuple[type[CheckpointError], ...]


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return READERS[request.param](tmp_path_factory.mktemp(request.param))


# Which readers have something at all: alphas among their tensors, a rank and alpha that are said, a config file.
with_alphas, with_ranks, with_configs = (
    pytest.mark.parametrize("reader", names, indirect=True)
    for names in (("kohya", "comfy", "lycoris"), ("diffusers", "peft", "adapterhub"), ("peft", "adapterhub"))
)


@pytest.fixture(scope="module")
def adapters(reader: Reader) -> Iterator[ak.Adapters]:
    """A handle on the reader's model, which carries an adapter already."""
    made = ak.Adapters(reader.model)
    made.add("good", ak.LoRA(rank=1, targets="attention"))
    yield made
    made.detach()


@pytest.fixture
def refused(reader: Reader, adapters: ak.Adapters) -> Iterator[Refusal]:
    yield Refusal(adapters, reader.root)
    if "new" in adapters:
        adapters.remove("new")


def test_the_files_are_good(reader: Reader, adapters: ak.Adapters, tmp_path: Path) -> None:
    """Otherwise nothing that follows says anything."""
    report = adapters.load(reader.sample.write(tmp_path / "it"), "new")
    assert report.read.format == reader.name
    assert set(report.read.matched) == set(reader.sample.tensors)
    adapters.remove("new")


# -- what is no safetensors file, or a damaged one --------------------------------------------------------------------


def _raw(header: object, body: bytes = b"") -> bytes:
    return forge.raw(header if isinstance(header, bytes) else json.dumps(header).encode(), body)


def _changed(data: bytes, change: Callable[[dict[str, Any], list[str]], None], more: bytes = b"") -> bytes:
    """The file with another header."""
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    change(entries, [key for key in entries if key != "__metadata__"])
    return _raw(entries, data[end:] + more)


def _twice(data: bytes) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    key = next(key for key in entries if key != "__metadata__")
    text = json.dumps(entries)
    return _raw(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(entries[key])}}}".encode(), data[end:])


def _overlap(entries: dict[str, Any], keys: list[str]) -> None:
    last = max(keys, key=lambda key: entries[key]["data_offsets"][0])
    first = min(keys, key=lambda key: entries[key]["data_offsets"][0])
    entries[last] = {**entries[first]}


def _hole(entries: dict[str, Any], keys: list[str]) -> None:
    last = max(keys, key=lambda key: entries[key]["data_offsets"][0])
    entries[last]["data_offsets"] = [place + 8 for place in entries[last]["data_offsets"]]


@functools.cache
def _many() -> bytes:
    return _raw({str(i): forge.entry(0, 0) for i in range(50_000)})


def _shape(shape: Any) -> Callable[[bytes], bytes]:
    return lambda data: _changed(data, lambda entries, keys: entries[keys[0]].update(shape=shape))


def _pickled(data: bytes) -> bytes:
    return pickle.dumps({"a": list(range(100))})


def _archive(kind: str) -> Callable[[bytes], bytes]:
    def made(data: bytes) -> bytes:
        buffer = io.BytesIO()
        if kind == "zip":
            with zipfile.ZipFile(buffer, "w") as packed:
                packed.writestr("../evil.safetensors", data)
        else:
            with tarfile.open(fileobj=buffer, mode="w:gz") as tarred:
                entry = tarfile.TarInfo("/abs.safetensors")
                entry.size = len(data)
                tarred.addfile(entry, io.BytesIO(data))
        return buffer.getvalue()

    return made


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
_HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Entry not found</body></html>\n" * 20

CONTAINERS: dict[str, tuple[Expected, Callable[[bytes], bytes]]] = {
    "row3_pickle": (UnsupportedFileError, _pickled),
    "row4_empty": (CorruptFileError, lambda d: b""),
    "row4_seven_bytes": (CorruptFileError, lambda d: d[:7]),
    "row4_in_the_header": (CorruptFileError, lambda d: d[:100]),
    "row4_half": (CorruptFileError, lambda d: d[: len(d) // 2]),
    "row4_last_byte": (CorruptFileError, lambda d: d[:-1]),
    "row5_trailing": (CorruptFileError, lambda d: d + b"x"),
    "row7_length_2^63": (CorruptFileError, lambda d: (1 << 63).to_bytes(8, "little") + d[8:]),
    "row7_length_101MB": (CorruptFileError, lambda d: (101 * 10**6).to_bytes(8, "little") + d[8:]),
    "row8_blank_17MiB": (UnsupportedFileError, lambda d: _raw(b"{}" + b" " * (17 << 20))),
    "row9_50k_tensors": (UnsupportedFileError, lambda d: _many()),
    "row10_twice": (CorruptFileError, _twice),
    "row11_overlap": (CorruptFileError, lambda d: _changed(d, _overlap)),
    "row11_hole": (CorruptFileError, lambda d: _changed(d, _hole)),
    "row11_overflow": (CorruptFileError, _shape([1 << 62, 4, 1 << 62])),
    "row11_negative": (CorruptFileError, _shape([-1, -8])),
    "row11_text": (CorruptFileError, _shape("11")),
    "row27_rank_of_10^9": (CorruptFileError, _shape([10**9, 8])),
    "row38_header_deep": (CorruptFileError, lambda d: _raw(b'{"a":' + b"[" * 200_000)),
    "row38_header_nan": (CorruptFileError, lambda d: _raw(b'{"a": NaN}')),
    "row38_header_list": (CorruptFileError, lambda d: _raw(b"[1, 2, 3]")),
    "row42_zip": (UnsupportedFileError, _archive("zip")),
    "row42_tar": (UnsupportedFileError, _archive("tar")),
    "html": (UnsupportedFileError, lambda d: _HTML),
    "lfs_pointer": (UnsupportedFileError, lambda d: _LFS),
    "gguf": (UnsupportedFileError, lambda d: b"GGUF" + bytes(range(100))),
}


@pytest.mark.parametrize("row", CONTAINERS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
def test_a_damaged_container(reader: Reader, refused: Refusal, tmp_path: Path, row: str, named: bool) -> None:
    expected, change = CONTAINERS[row]
    path = reader.sample.write(tmp_path / "it.safetensors")
    file = reader.sample.file(path)
    file.write_bytes(change(file.read_bytes()))
    # What is no such file at all is told as such: of which format it would be, nothing says.
    refused(path, expected if named or reader.sample.config else CheckpointError, format=reader.name if named else None)


@pytest.mark.parametrize("allowed", [False, True], ids=["refused", "allowed"])
def test_row1_a_pickle_with_a_payload(reader: Reader, refused: Refusal, tmp_path: Path, allowed: bool) -> None:
    path, marker = reader.sample.write(tmp_path / "it.safetensors"), tmp_path / "executed"
    reader.sample.file(path).write_bytes(pickle.dumps({"A": Payload(marker), "x": "y" * 100}, 2))
    refused(path, CheckpointError, format=reader.name, allow_pickle=allowed)
    assert not marker.exists()


def test_row2_a_benign_pickle_without_permission(reader: Reader, refused: Refusal, tmp_path: Path) -> None:
    path = reader.sample.write(tmp_path / "it.safetensors")
    torch.save(reader.sample.tensors, reader.sample.file(path))
    error = refused(path, UnsupportedFileError, format=reader.name)
    assert "allow_pickle=True" in str(error)


# -- whole files whose tensors or config do not fit -------------------------------------------------------------------


def _each(keys: Callable[[Sample], list[str]], change: Callable[[Tensor], Tensor]) -> Callable[[Sample], object]:
    return lambda s: s.tensors.update({key: change(s.tensors[key]) for key in keys(s)})


def _first(change: Callable[[Tensor], Tensor], which: str = "down") -> Callable[[Sample], object]:
    return _each(lambda s: getattr(s, which)[:1], change)


def _drop(keys: Callable[[Sample], list[str]]) -> Callable[[Sample], object]:
    return lambda s: [s.tensors.pop(key) for key in keys(s)]


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[1] = value
        return tensor

    return change


def _add(key: str | Callable[[Sample], str]) -> Callable[[Sample], object]:
    return lambda s: s.tensors.update({key if isinstance(key, str) else key(s): torch.ones(2, 2)})


def _rename(sample: Sample) -> None:
    sample.tensors = {key[::-1]: tensor for key, tensor in sample.tensors.items()}


def _rename_modules(sample: Sample) -> None:
    old, new = ("/", "@nowhere/") if "/" in sample.down[0] else ("attn", "nttn")
    sample.tensors = {key.replace(old, new): tensor for key, tensor in sample.tensors.items() if old in key}


def _wide(key_of: str) -> Callable[[Sample], object]:
    """Twice as many inputs: of a wider model."""
    return _each(lambda s: s.down, lambda t: torch.cat([t, t], 1))


def _behind(sample: Sample) -> str:
    return sample.down[0].replace("0", "97", 1) if "0" in sample.down[0] else sample.down[0] + "97"


_SHAPES = (ShapeMismatchError, InvalidHeaderError)

TENSORS: dict[str, tuple[Expected, Callable[[Sample], object]]] = {
    "row12_nul": (CheckpointError, _add(lambda s: s.down[0].replace(s.ends[0], f"\0{s.ends[0]}"))),
    "row12_path": (CheckpointError, _add("../../evil.weight")),
    "row12_absolute": (CheckpointError, _add("/etc/passwd")),
    "row12_long": (CheckpointError, _add(lambda s: s.down[0].replace(s.ends[0], "x" * 10_000 + s.ends[0]))),
    "row12_empty": (CheckpointError, _add("")),
    "row12_underscores": (CheckpointError, _add(lambda s: s.down[0].replace(s.ends[0], f"__class__.{s.ends[0]}"))),
    "row13_all_up": (CheckpointError, _drop(lambda s: s.up)),
    "row13_one_up": (CheckpointError, _drop(lambda s: s.up[:1])),
    "row13_one_down": (CheckpointError, _drop(lambda s: s.down[:1])),
    "row14_renamed": (CheckpointError, _rename),
    "row14_renamed_modules": (CheckpointError, _rename_modules),
    "row15_extra_tensor": (
        (UnexpectedKeysError, UnsupportedFileError),
        _add(lambda s: s.down[0].replace(s.ends[0], f"oddity{s.ends[0]}")),
    ),
    "row15_extra_module": (CheckpointError, lambda s: s.tensors.update({_behind(s): s.tensors[s.down[0]].clone()})),
    "row16_no_tensors": (CheckpointError, lambda s: s.tensors.clear()),
    "row18_mixed_ranks": (_SHAPES, _first(lambda t: torch.cat([t, t[:1]]))),
    "row19_transposed": (_SHAPES, _first(lambda t: t.mT.contiguous())),
    "row19_flat": (CheckpointError, _first(lambda t: t.flatten())),
    "row19_scalar": (CheckpointError, _first(lambda t: t.flatten()[0])),
    "row19_deep": (CheckpointError, _first(lambda t: t[None, None, None])),
    "row19_up_deep": (CheckpointError, _first(lambda t: t[..., None].expand(*t.shape, 3), "up")),
    "row20_nan": (NonFiniteError, _first(_with(math.nan))),
    "row20_nan_in_up": (NonFiniteError, _first(_with(math.nan), "up")),
    "row21_inf": (NonFiniteError, _first(_with(math.inf))),
    "row21_minus_inf": (NonFiniteError, _first(_with(-math.inf), "up")),
    "row25_int8": (DtypeMismatchError, _first(lambda t: torch.ones(t.shape, dtype=torch.int8))),
    "row25_uint8": (DtypeMismatchError, _first(lambda t: torch.ones(t.shape, dtype=torch.uint8), "up")),
    "row25_bool": (DtypeMismatchError, _first(lambda t: torch.ones(t.shape, dtype=torch.bool))),
    "row25_int64": (DtypeMismatchError, _first(lambda t: torch.ones(t.shape, dtype=torch.int64), "up")),
    "row25_complex": (CheckpointError, _first(lambda t: t.to(torch.complex64))),
    "row26_rank_0": (CheckpointError, lambda s: (_first(lambda t: t[:0])(s), _first(lambda t: t[:, :0], "up")(s))),
    "row32_wider_base": (CheckpointError, _wide("down")),
    "row32_taller_base": (CheckpointError, _each(lambda s: s.up, lambda t: torch.cat([t, t]))),
}


@pytest.mark.parametrize("row", TENSORS)
def test_tensors_that_do_not_fit(reader: Reader, refused: Refusal, tmp_path: Path, row: str) -> None:
    expected, change = TENSORS[row]
    sample = reader.sample.copy()
    change(sample)
    refused(sample.write(tmp_path / "it"), expected)


ALPHAS: dict[str, Tensor] = {
    "row22_nan": torch.tensor(math.nan),
    "row22_inf": torch.tensor(math.inf),
    "row23_1e30": torch.tensor(1e30),
    "several": torch.ones(3),
    "none": torch.ones(0),
    "complex": torch.tensor(1j),
}


@with_alphas
@pytest.mark.parametrize("row", ALPHAS)
def test_alphas_that_are_none(reader: Reader, refused: Refusal, tmp_path: Path, row: str) -> None:
    sample = reader.sample.copy()
    sample.tensors[sample.alphas[0]] = ALPHAS[row]
    refused(sample.write(tmp_path / "it"), CheckpointError)


@with_alphas
def test_a_missing_alpha_is_a_scale_of_1(reader: Reader, adapters: ak.Adapters, tmp_path: Path) -> None:
    sample = reader.sample.copy()
    _drop(lambda s: s.alphas)(sample)
    effects = adapters.load(sample.write(tmp_path / "it"), "new").effects
    adapters.remove("new")
    assert effects is not None
    assert list(effects.scales) == [1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_row24_other_floats_are_read_or_refused(
    reader: Reader, adapters: ak.Adapters, refused: Refusal, tmp_path: Path, dtype: torch.dtype
) -> None:
    """What is read can be computed with; float64 is told."""
    sample = reader.sample.copy()
    sample.tensors = {key: t if t.ndim == 0 else t.to(dtype) for key, t in sample.tensors.items()}
    path = sample.write(tmp_path / "it")
    if dtype != torch.float64 and reader.name == "native":
        refused(path, DtypeMismatchError)
        return
    with pytest.warns(UserWarning, match="cast to float32"):
        report = adapters.load(path, "new")
    assert any("float32" in note for note in report.notes)
    dtypes = {parameter.dtype for parameter in adapters.parameters("new")}
    adapters.remove("new")
    assert dtypes == {torch.float32}


# -- configs ----------------------------------------------------------------------------------------------------------

RANKS: dict[str, Any] = {
    "row17_other": 3,
    "row26_0": 0,
    "row26_-4": -4,
    "row26_4.5": 4.5,
    "row26_text": "4",
    "row26_true": True,
    "row26_list": [2],
    "row27_4e8": 400_000_000,
    "row27_10^9": 10**9,
    "row27_2e6": 2_000_000,
    "row27_digits": 10**300,
}


@with_ranks
@pytest.mark.parametrize("row", RANKS)
def test_ranks_that_are_none(reader: Reader, refused: Refusal, tmp_path: Path, row: str) -> None:
    sample = reader.sample.copy()
    sample.set(sample.rank, RANKS[row])
    refused(sample.write(tmp_path / "it"), CheckpointError)


@with_ranks
@pytest.mark.parametrize("alpha", [math.nan, math.inf, 1e30, "1", [1], True, {}], ids=str)
def test_rows22_and_23_alphas_in_a_config(reader: Reader, refused: Refusal, tmp_path: Path, alpha: Any) -> None:
    sample = reader.sample.copy()
    sample.set(sample.alpha, alpha)
    refused(sample.write(tmp_path / "it"), CheckpointError)


CONFIGS: dict[str, bytes] = {
    "row38_no_json": b"rank: 4",
    "row38_list": b"[1, 2]",
    "row38_text": b'"lora"',
    "row38_null": b"null",
    "row38_empty": b"",
    "row38_deep": b'{"peft_type": ' + b"[" * 200_000,
    "row38_nul": bytes(100),
    "row38_no_utf8": b'{"peft_type": "\xff"}',
    "row38_huge": b'{"peft_type": "LORA", "x": "' + b"x" * (17 << 20) + b'"}',
    "row37_no_type": b"{}",
    "row37_unknown_type": b'{"peft_type": "ODDITY", "r": 2, "lora_alpha": 2}',
    "row37_type_is_a_path": b'{"peft_type": "os:system", "r": 2}',
    "row37_type_is_a_list": b'{"peft_type": ["LORA"], "r": 2}',
    "html": _HTML,
    "lfs_pointer": _LFS,
}


@with_configs
@pytest.mark.parametrize("row", CONFIGS)
def test_configs_that_are_none(reader: Reader, refused: Refusal, tmp_path: Path, row: str) -> None:
    path = reader.sample.write(tmp_path / "it")
    (path / CONFIG).write_bytes(CONFIGS[row])
    if reader.name == "peft" and row in ("row37_no_type", "row38_list", "row38_text", "row38_null"):
        refused(path, CheckpointError)  # a folder whose config is none of PEFT's is of no format
    refused(path, CheckpointError, format=reader.name)


@with_configs
def test_row38_a_config_that_says_a_thing_twice(reader: Reader, refused: Refusal, tmp_path: Path) -> None:
    path = reader.sample.write(tmp_path / "it")
    text = (path / CONFIG).read_text()
    (path / CONFIG).write_text(f"{text[:-1]}, {json.dumps(next(iter(json.loads(text))))}: 1}}")
    assert "twice" in str(refused(path, InvalidHeaderError))


@with_configs
def test_a_folder_without_a_config(reader: Reader, refused: Refusal, tmp_path: Path) -> None:
    path = reader.sample.write(tmp_path / "it")
    (path / CONFIG).unlink()
    refused(path, CheckpointError)
    refused(path, CheckpointError, format=reader.name)


@with_configs
def test_a_folder_without_weights(reader: Reader, refused: Refusal, tmp_path: Path) -> None:
    path = reader.sample.write(tmp_path / "it")
    reader.sample.file(path).unlink()
    refused(path, CheckpointError)


# -- what is no plain file --------------------------------------------------------------------------------------------


def _fifo(file: Path, outside: Path) -> None:
    os.mkfifo(file)


def _folder(file: Path, outside: Path) -> None:
    file.mkdir()


def _link(file: Path, outside: Path) -> None:
    file.symlink_to(outside)


def _device(file: Path, outside: Path) -> None:
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_fifo, _folder, _link, _device])
def test_row40_not_a_plain_file(
    reader: Reader, refused: Refusal, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    path = reader.sample.write(inside / "it")
    file = reader.sample.file(path)
    outside = file.rename(tmp_path / "outside")
    make(file, outside)
    refused(path, (NotRegularFileError, UnsupportedFileError, MissingKeysError), format=reader.name)


@with_configs
@pytest.mark.parametrize("make", [_fifo, _folder, _link, _device])
def test_row40_a_config_that_is_no_plain_file(
    reader: Reader, refused: Refusal, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    path = reader.sample.write(tmp_path / "it")
    make(path / CONFIG, (path / CONFIG).rename(tmp_path / "outside"))
    refused(path, CheckpointError)


def test_row41_a_file_that_changes_after_it_was_loaded(reader: Reader, adapters: ak.Adapters, tmp_path: Path) -> None:
    path = reader.sample.write(tmp_path / "it")
    adapters.load(path, "new")
    before = {key: tensor.clone() for key, tensor in adapters.state_dict("new").items()}
    with reader.sample.file(path).open("r+b") as opened:
        opened.write(b"\xff" * 300)
        opened.truncate(400)
    after = adapters.state_dict("new")
    adapters.remove("new")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


# -- without a model, as `adapterkit inspect` reads -------------------------------------------------------------------


def _read_and_described(path: Path) -> None:
    """Reads a file without a model, and looks at all of it; whatever is wrong with it is a typed error, soon."""
    start = time.process_time()
    try:
        loaded = read(path, strict=False)
        for checkpoint in loaded.adapters.values():
            describe(checkpoint, None, loaded.where)
    except AdapterKitError:
        pass
    assert time.process_time() - start < SECONDS


def test_without_a_model_bad_files_end_in_typed_errors(reader: Reader, tmp_path: Path) -> None:
    path = reader.sample.write(tmp_path / "it")
    file, good = reader.sample.file(path), reader.sample.bytes()
    for _, change in CONTAINERS.values():
        file.write_bytes(change(good))
        with pytest.raises(AdapterKitError):
            read(path)
    for number, (_, change_tensors) in enumerate(TENSORS.values()):
        sample = reader.sample.copy()
        change_tensors(sample)
        _read_and_described(sample.write(tmp_path / f"it{number}"))


@with_ranks
def test_without_a_model_bad_ranks_end_in_typed_errors(reader: Reader, tmp_path: Path) -> None:
    for row, rank in RANKS.items():
        sample = reader.sample.copy()
        sample.set(sample.rank, rank)
        _read_and_described(sample.write(tmp_path / row.replace("^", "")))
