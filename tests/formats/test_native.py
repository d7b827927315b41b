"""The native format: what is kept, what the bytes are, and how reading and writing refuse."""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint, ReadOptions
from adapterkit.errors import (
    CheckpointError,
    CorruptFileError,
    DtypeMismatchError,
    InvalidHeaderError,
    MissingKeysError,
    NonFiniteError,
    UnexpectedKeysError,
    UnsupportedFileError,
)
from adapterkit.formats.native import NativeFormat
from adapterkit.formats.native_header import KEY_LIMIT
from adapterkit.formats.source import Source
from tests.formats import forge, reading
from tests.formats.reading import NONE, read, recognised


def checkpoint(**changes: Any) -> Checkpoint:
    generator = torch.Generator().manual_seed(7)
    one = {"A": torch.randn(2, 4, generator=generator), "B": torch.randn(4, 2, generator=generator)}
    two = {"net.0.weight": torch.randn(3, generator=generator).to(torch.bfloat16), "count": torch.tensor(5)}
    whole = Checkpoint.of(
        type="lora",
        config={"rank": 2, "alpha": 0.1, "ranks": {"mlp.*": 4}, "targets": "attn.*", "none": None, "list": [1, [2]]},
        tensors={"attn.q@toy.0": one, "mlp.up@toy.1": two, "empty@toy.2": {}},
        distribution="adapterkit",
        version="0.1.0",
        base={"toy": {"family": "tests:ToyModel", "points": 14, "shapes": "ab" * 16}},
        backends={"toy": "toy"},
        metadata={"note": 'ünïcode, "quotes" and \n lines'},
    )
    return whole.replace(**changes)


def write(path: Path, **changes: Any) -> Path:
    return reading.write(checkpoint(**changes), path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "a.safetensors")


def assert_equal(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for point, own in expected.tensors.items():
        assert found.tensors[point].keys() == own.keys()
        for name, tensor in own.items():
            assert found.tensors[point][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[point][name], tensor)
    assert found.replace(tensors={}) == expected.replace(tensors={})


def test_everything_comes_back_bit_for_bit(file: Path) -> None:
    assert_equal(read(file), checkpoint())


def test_whoever_loads_need_not_look_at_the_values_again(file: Path) -> None:
    assert NativeFormat().read(Source.of(file), NONE, ReadOptions())[1].finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 5), (2, 3, 1, 1)], ids=str)
def test_every_weight_dtype_and_shape_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    path = write(tmp_path / "x", tensors={"p@m": {"w": tensor}})
    found = read(path).tensors["p@m"]["w"]
    assert found.dtype == dtype
    assert found.shape == shape
    assert torch.equal(found, tensor)


def test_views_and_shared_memory_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    parts = {"whole": whole, "turned": whole.t(), "row": whole[1], "grad": whole.clone().requires_grad_()}
    found = read(write(tmp_path / "x", tensors={"p@m": parts})).tensors["p@m"]
    for name, tensor in parts.items():
        assert torch.equal(found[name], tensor)
        assert not found[name].requires_grad


def test_equal_adapters_give_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    whole = checkpoint()
    turned = {k: dict(reversed(list(v.items()))) for k, v in reversed(list(whole.tensors.items()))}
    files = {write(tmp_path / str(i)).read_bytes() for i in range(20)}
    files.add(write(tmp_path / "turned", tensors=turned).read_bytes())
    assert len(files) == 1


def test_the_order_inside_a_config_is_kept(tmp_path: Path) -> None:
    """It is the type's own business whether it matters."""
    config = {"ranks": {"mlp.*": 4, "attn.*": 2, "*": 1}, "alpha": 1}
    found = read(write(tmp_path / "x", config=config)).config
    assert list(found) == list(config)
    assert list(found["ranks"]) == list(config["ranks"])


def test_the_file_is_plain_safetensors_with_the_documented_layout(file: Path) -> None:
    found = safetensors.torch.load_file(file)
    assert set(found) == {"attn.q@toy.0/A", "attn.q@toy.0/B", "mlp.up@toy.1/net.0.weight", "mlp.up@toy.1/count"}
    header = forge.native_header(file.read_bytes())
    assert header["file_version"] == 1
    assert header["adapterkit"] == ak.__version__
    assert header["tensors"] == {**forge.index(found), "empty@toy.2": {}}
    assert (header["type"], header["distribution"], header["version"]) == ("lora", "adapterkit", "0.1.0")


def test_a_file_rewritten_by_other_software_is_read(file: Path) -> None:
    """Another order of tensors, spaces and a further entry of metadata change nothing."""
    data = file.read_bytes()
    found = safetensors.torch.load(data)
    text = json.dumps(forge.native_header(data), indent=2)
    file.write_bytes(safetensors.torch.save(dict(reversed(list(found.items()))), {"format": "pt", "adapterkit": text}))
    assert_equal(read(file), checkpoint())


some_or_all = pytest.mark.parametrize("share", [0.05, pytest.param(1.0, marks=pytest.mark.slow)])


def flips(path: Path, bits: range, share: float) -> Iterator[int]:
    """Flips one bit of the file at a time, for a share of the bits."""
    data = path.read_bytes()
    for bit in random.Random(3).sample(bits, int(len(bits) * share)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        yield bit


def header_bits(path: Path) -> int:
    data = path.read_bytes()
    return (8 + int.from_bytes(data[:8], "little")) * 8


@some_or_all
def test_every_flipped_bit_of_the_tensors_is_found_and_named(file: Path, share: float) -> None:
    for _ in flips(file, range(header_bits(file), file.stat().st_size * 8), share):
        with pytest.raises((CorruptFileError, NonFiniteError)) as caught:
            read(file)
        assert caught.value.path == file
        assert "@toy" in str(caught.value.key)


@some_or_all
def test_every_flipped_bit_of_the_header_is_found_or_leaves_the_tensors_alone(file: Path, share: float) -> None:
    whole, refused = checkpoint(), 0
    for _ in flips(file, range(header_bits(file)), share):
        try:
            found = read(file)
        except CheckpointError:
            refused += 1
            continue
        for point, own in found.tensors.items():
            assert all(torch.equal(t.flatten(), whole.tensors[point][n].flatten()) for n, t in own.items())
    assert refused > 0.5 * share * header_bits(file)


@some_or_all
def test_every_truncation_is_found(file: Path, share: float) -> None:
    data = file.read_bytes()
    for length in {0, 7, 8, len(data) - 1, *random.Random(3).sample(range(len(data)), int(len(data) * share))}:
        file.write_bytes(data[:length])
        with pytest.raises(CorruptFileError, match=file.name):
            read(file)


def test_a_header_whose_length_begins_like_a_pickle(tmp_path: Path) -> None:
    """A header of 0x0480 bytes makes a file that begins with 0x80 0x04."""
    path = write(tmp_path / "x", metadata={})
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip() + b" " * (0x0480 - len(data[8:end].rstrip()))
    path.write_bytes(forge.raw(header, data[end:]))
    assert path.read_bytes().startswith(b"\x80\x04")
    assert_equal(read(path), checkpoint(metadata={}))


def test_what_is_loaded_does_not_depend_on_the_file_any_more(file: Path) -> None:
    found = read(file)
    with file.open("r+b") as opened:
        opened.write(b"\xff" * 100)
        opened.truncate(200)
    assert_equal(found, checkpoint())


class TestIndex:
    def test_missing(self, file: Path) -> None:
        forge.tensors(file, lambda t: t.pop("attn.q@toy.0/B"), reindex=False)
        with pytest.raises(MissingKeysError, match="missing") as caught:
            read(file)
        assert caught.value.key == "attn.q@toy.0/B"

    def test_extra(self, file: Path) -> None:
        forge.tensors(file, lambda t: t.update({"attn.q@toy.0/C": torch.ones(1)}), reindex=False)
        with pytest.raises(UnexpectedKeysError, match=r"attn\.q@toy\.0/[AB]") as caught:
            read(file)
        assert caught.value.key == "attn.q@toy.0/C"

    def test_renamed_names_the_one_that_was_meant(self, file: Path) -> None:
        forge.tensors(file, lambda t: t.update({"attn.q@toy.0/lora_A": t.pop("attn.q@toy.0/A")}), reindex=False)
        with pytest.raises(UnexpectedKeysError, match=r"Did you mean 'attn\.q@toy\.0/A'") as caught:
            read(file)
        assert caught.value.key == "attn.q@toy.0/lora_A"

    def test_swapped_tensors(self, file: Path) -> None:
        def swap(found: forge.Tensors) -> None:
            a, b = "attn.q@toy.0/A", "attn.q@toy.0/B"
            found[a], found[b] = found[b].clone().reshape(2, 4), found[a].clone().reshape(4, 2)

        forge.tensors(file, swap, reindex=False)
        with pytest.raises(CorruptFileError, match="checksum"):
            read(file)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_bad_number_is_named_as_such_before_the_checksum(self, file: Path, bad: float) -> None:
        forge.tensors(file, lambda t: t["attn.q@toy.0/A"].view(-1)[3].fill_(bad), reindex=False)
        with pytest.raises(NonFiniteError, match="1 NaN or infinite values of 8") as caught:
            read(file)
        assert caught.value.key == "attn.q@toy.0/A"


class TestHeader:
    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("type", ""),
            ("type", None),
            ("type", ["lora"]),
            ("config", []),
            ("config", "{}"),
            ("config", {"x": "y" * (1 << 20)}),
            ("base", {"toy": "x"}),
            ("backends", {"toy": 1}),
            ("metadata", {"a": None}),
            ("tensors", []),
            ("tensors", {"attn.q@toy.0": []}),
            ("tensors", {"attn.q@toy.0": {"A": 1}}),
            ("distribution", 3),
            ("file_version", 0),
            ("file_version", True),
            ("file_version", "1"),
            ("file_version", None),
            ("surprise", 1),
        ],
    )
    def test_a_wrong_part_is_named(self, file: Path, part: str, value: object) -> None:
        forge.header(file, lambda h: h.update({part: value}))
        with pytest.raises(InvalidHeaderError) as caught:
            read(file)
        assert str(caught.value.key).startswith(part)
        assert caught.value.path == file
        assert len(str(caught.value)) < 600

    @pytest.mark.parametrize("part", ["type", "config", "tensors", "file_version", "base", "version"])
    def test_a_missing_part_is_named(self, file: Path, part: str) -> None:
        forge.header(file, lambda h: h.pop(part))
        with pytest.raises(InvalidHeaderError) as caught:
            read(file)
        assert caught.value.key == part

    @pytest.mark.parametrize("key", ["", "a/b", "a\0b", "../evil\n", "x" * 2000])
    def test_an_index_of_impossible_keys(self, file: Path, key: str) -> None:
        forge.header(file, lambda h: h["tensors"].update({key: {"A": "0" * 32}}))
        with pytest.raises(InvalidHeaderError, match="key"):
            read(file)

    @pytest.mark.parametrize("text", ["", "nonsense", "[]", "3", "null", "[" * 200_000, '{"type": 1, "type": 1}'])
    def test_a_header_that_is_no_object(self, file: Path, text: str) -> None:
        forge.header_text(file, lambda _: text)
        with pytest.raises(InvalidHeaderError) as caught:
            read(file)
        assert caught.value.key == "adapterkit"

    def test_a_later_version_is_told_from_a_broken_file(self, file: Path) -> None:
        forge.header(file, lambda h: (h.update(file_version=4, adapterkit="9.9", brand_new=1), h.pop("config")))
        assert recognised(file)
        with pytest.raises(UnsupportedFileError, match=r"file version 4, written by adapterkit 9\.9.*pip install -U"):
            read(file)
        forge.header(file, lambda h: h.update(adapterkit="9" * 60))
        with pytest.raises(UnsupportedFileError, match=r"written by adapterkit 9{40};"):
            read(file)


class TestWrite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, b"x", object(), {1: "a", "1": "b"}, 10**40])
    def test_a_config_that_is_no_json(self, tmp_path: Path, value: object) -> None:
        with pytest.raises(InvalidHeaderError):
            write(tmp_path / "x", config={"value": value})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("changes", [{"metadata": {"a": 1}}, {"type": ""}, {"backends": {"toy": None}}])
    def test_what_could_not_be_read_back_is_not_written(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidHeaderError):
            write(tmp_path / "x", **changes)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("point", ["", "a/b", "a\0b", "x" * 2000])
    def test_an_impossible_point(self, tmp_path: Path, point: str) -> None:
        with pytest.raises(InvalidHeaderError, match="key"):
            write(tmp_path / "x", tensors={point: {"A": torch.ones(1)}})

    def test_the_longest_point(self, tmp_path: Path) -> None:
        longest = "x" * (KEY_LIMIT - len("/A"))
        path = write(tmp_path / "x", tensors={longest: {"A": torch.ones(1)}})
        assert list(read(path).tensors) == [longest]
        with pytest.raises(InvalidHeaderError, match="key"):
            write(tmp_path / "x", tensors={longest + "x": {"A": torch.ones(1)}})

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16], ids=str)
    def test_a_dtype_that_holds_no_weights(self, tmp_path: Path, dtype: torch.dtype) -> None:
        with pytest.raises(DtypeMismatchError) as caught:
            write(tmp_path / "x", tensors={"p@m": {"A": torch.zeros(2).to(dtype)}})
        assert caught.value.key == "p@m/A"

    def test_nan_is_saved_with_a_warning_and_refused_when_read(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            path = write(tmp_path / "x", tensors={"p@m": {"A": torch.tensor([1.0, math.nan])}})
        assert "'p@m/A' holds NaN" in caplog.text
        assert torch.isnan(safetensors.torch.load_file(path)["p@m/A"][1])
        with pytest.raises(NonFiniteError):
            read(path)

    def test_the_checkpoint_is_left_as_it_was(self, tmp_path: Path) -> None:
        whole = checkpoint()
        reading.write(whole, tmp_path / "x")
        assert_equal(whole, checkpoint())


class TestRecognises:
    def test_by_content_whatever_the_name(self, file: Path) -> None:
        for name in ("x", "x.bin", "x.json"):
            file = file.rename(file.with_name(name))
            assert recognised(file)

    def test_nothing_else_and_never_an_error(self, tmp_path: Path) -> None:
        plain = tmp_path / "plain.safetensors"
        safetensors.torch.save_file({"a": torch.ones(1)}, plain, {"format": "pt", "note": "adapterkit"})
        pickled = tmp_path / "x.bin"
        torch.save({"adapterkit": torch.ones(1)}, pickled)
        (tmp_path / "empty").touch()
        (tmp_path / "deep").write_bytes(forge.raw(b'{"__metadata__":' + b"[" * 100_000))
        os.mkfifo(tmp_path / "pipe")
        strangers = [
            *tmp_path.iterdir(),
            tmp_path,
            tmp_path / "none",
            Path("a\0b"),
            Path("/dev/null"),
            Path("x" * 5000),
        ]
        assert [path for path in strangers if recognised(path)] == []
