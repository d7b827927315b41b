"""The acceptance list of bad inputs: each is a typed error that names file and key, soon, and changes nothing.

The numbers are those of the list. Files are opened as a user does, through `Adapters.load`, on a model that already
carries an adapter.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import resource
import socket
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.errors import (
    AdapterKitError,
    BaseMismatchError,
    CheckpointError,
    CorruptFileError,
    DtypeMismatchError,
    InvalidHeaderError,
    InvalidNameError,
    MissingKeysError,
    NonFiniteError,
    NotRegularFileError,
    ShapeMismatchError,
    UnexpectedKeysError,
    UnknownAdapterTypeError,
    UnsupportedFileError,
)
from adapterkit.formats import container
from tests import toys
from tests.formats import forge

A, B = "attn.q@toy.0/A", "attn.q@toy.0/B"
SECONDS, BYTES = 1.0, 64 << 20


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    toys.register()


def with_adapter(model: nn.Module, targets: str = "attn.{q,k,v,o} mlp.*") -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("good", ak.LoRA(rank=2, targets=targets))
    with torch.no_grad():
        for number, parameter in enumerate(adapters.parameters("good")):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return adapters


@pytest.fixture
def adapters() -> ak.Adapters:
    return with_adapter(toys.ToyModel())


@pytest.fixture
def file(tmp_path: Path, adapters: ak.Adapters) -> Path:
    """A good file, to be spoilt."""
    return adapters.save("good", tmp_path / "bad.safetensors")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a load could change, comparable with ==. Tensors as bytes."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        name: (
            type(module),
            module.training,
            sorted(set(module.__dict__) - set(hooks)),
            [len(getattr(module, hook)) for hook in hooks],
            [
                (key, id(t), t.requires_grad, t.dtype, t.detach().numpy().tobytes())
                for key, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            ],
        )
        for name, module in model.named_modules()
    }


@pytest.fixture
def model(adapters: ak.Adapters) -> nn.Module:
    return next(iter(adapters._mapped.components.values())).root


@pytest.fixture
def refused(adapters: ak.Adapters, model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Loads a file and checks everything that holds for each bad one; gives the error."""

    def check(path: Path, expected: type[AdapterKitError], name: str = "new", **options: Any) -> Any:
        before, active, randoms = snapshot(model), adapters.active, torch.get_rng_state()
        modules, memory, start = set(sys.modules), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        with pytest.raises(expected) as caught:
            adapters.load(path, name, **options)
        seconds = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10
        assert snapshot(model) == before
        assert (list(adapters), adapters.active) == (["good"], active)
        assert torch.equal(torch.get_rng_state(), randoms)
        assert seconds < SECONDS
        assert grown < BYTES
        assert not {m for m in set(sys.modules) - modules if not m.startswith(("adapterkit", "torch", "safetensors"))}
        if isinstance(caught.value, CheckpointError):
            assert caught.value.path == path
            assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1500
        return caught.value

    return check


# -- 1-12: the container ------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"], ids=["row1", "row3"])
def test_a_pickle_with_a_payload(tmp_path: Path, refused: Any, name: str, protocol: int) -> None:
    marker, path = tmp_path / "executed", tmp_path / name
    path.write_bytes(pickle.dumps({"A": Payload(marker), "x": "y" * 100}, protocol))
    error = refused(path, UnsupportedFileError, format="native")
    assert "pickle" in str(error)
    refused(path, UnsupportedFileError)
    assert not marker.exists()


def test_row2_a_benign_bin(tmp_path: Path, refused: Any) -> None:
    torch.save({"A": torch.ones(2)}, tmp_path / "adapter_model.bin")
    error = refused(tmp_path / "adapter_model.bin", UnsupportedFileError, format="native")
    assert "safetensors.torch.save_file" in str(error)
    refused(tmp_path / "adapter_model.bin", UnsupportedFileError)


def _raw(header: object, body: bytes = b"") -> bytes:
    return forge.raw(header if isinstance(header, bytes) else json.dumps(header).encode(), body)


def _spoilt(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


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
    ("row9_tensors", UnsupportedFileError, "200,000 tensors", lambda d: _raw(_many(200_001))),
    ("row10_twice", CorruptFileError, "twice", lambda d: _raw(b'{"a":%s,"a":%s}' % ((json.dumps(_FULL).encode(),) * 2), bytes(4))),
    ("row11_overlap", CorruptFileError, "'b'", lambda d: _raw({"a": _FULL, "b": _FULL}, bytes(4))),
    ("row11_overlap_half", CorruptFileError, "'b'", lambda d: _raw({"a": forge.entry(0, 8), "b": forge.entry(4, 12)}, bytes(12))),
    ("row11_hole", CorruptFileError, "'b'", lambda d: _raw({"a": _FULL, "b": forge.entry(8, 12)}, bytes(12))),
    ("row11_hole_first", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(4, 8)}, bytes(8))),
    ("row11_backwards", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(4, 0, [1])}, bytes(4))),
    ("row11_offset_2^64", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 1 << 64)}, bytes(4))),
    ("row11_negative", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(-4, 0, [1])}, bytes(4))),
    ("row11_shape_overflow", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 4, [1 << 62, 4, 1 << 62])}, bytes(4))),
    ("row11_shape_negative", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 4, [-1, -1])}, bytes(4))),
    ("row11_shape_bool", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 4, [True])}, bytes(4))),
    ("row11_shape_1000d", CorruptFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 4, [1] * 1000)}, bytes(4))),
    ("row11_entry_is_list", CorruptFileError, "'a'", lambda d: _raw({"a": [0, 4]}, bytes(4))),
    ("row11_entry_with_more", CorruptFileError, "'a'", lambda d: _raw({"a": {**_FULL, "url": "x"}}, bytes(4))),
    ("row11_dtype", UnsupportedFileError, "'a'", lambda d: _raw({"a": forge.entry(0, 4, dtype="F31")}, bytes(4))),
    ("row11_dtype_is_list", UnsupportedFileError, "'a'", lambda d: _raw({"a": {**_FULL, "dtype": []}}, bytes(4))),
    ("metadata_of_numbers", CorruptFileError, "__metadata__", lambda d: _raw({"__metadata__": {"a": 1}})),
    ("metadata_is_list", CorruptFileError, "__metadata__", lambda d: _raw({"__metadata__": []})),
    ("header_is_list", CorruptFileError, "no safetensors", lambda d: _raw(b"[1, 2, 3]")),
    ("header_is_no_utf8", CorruptFileError, "not JSON", lambda d: _raw(b'{"\xff": 1}')),
    ("header_deep", CorruptFileError, "nested", lambda d: _raw(b'{"a":' + b"[" * 200_000)),
    ("header_of_nan", CorruptFileError, "NaN", lambda d: _raw(b'{"a": NaN}')),
    ("text", CorruptFileError, "no safetensors", lambda d: b"not a model at all, but a readme\n" * 10),
    ("lfs_pointer", UnsupportedFileError, "git lfs pull", lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    ("gguf", UnsupportedFileError, "GGUF", lambda d: b"GGUF" + bytes(range(100))),
    ("no_metadata", UnsupportedFileError, "native", lambda d: _raw({"a": _FULL}, bytes(4))),
]


def _many(count: int) -> bytes:
    entries = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return b"{" + entries.encode() + b"}"


@pytest.mark.parametrize(("expected", "words", "change"), [c[1:] for c in CONTAINERS], ids=[c[0] for c in CONTAINERS])
def test_a_damaged_container(
    file: Path, refused: Any, expected: type[CheckpointError], words: str, change: Callable[[bytes], bytes]
) -> None:
    file.write_bytes(change(file.read_bytes()))
    assert words in str(refused(file, expected, format="native"))


def test_row7_a_real_header_of_101_mb_is_not_even_read(file: Path, refused: Any) -> None:
    with file.open("wb") as opened:
        opened.write((101 * 10**6).to_bytes(8, "little"))
        opened.truncate(102 * 10**6)
    assert "limit" in str(refused(file, UnsupportedFileError, format="native"))


def test_a_file_beyond_the_size_limit_is_not_even_read(file: Path, refused: Any) -> None:
    with file.open("wb") as opened:
        opened.truncate((4 << 30) + 1)
    assert "limit" in str(refused(file, UnsupportedFileError, format="native"))


def test_a_huge_body_is_not_read_before_its_header_is_checked(file: Path, refused: Any) -> None:
    with file.open("r+b") as opened:
        opened.truncate(3 << 30)
    refused(file, CorruptFileError)


@pytest.mark.parametrize("key", ["a\0b/A", "../evil/A", "/abs/A", "x" * 10_000, "", "/", "A", "attn.q@toy.0/", "\ud800/A"])
def test_row12_strange_key_names(file: Path, refused: Any, key: str) -> None:
    def add(entries: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
        entries[key] = forge.entry(end, end + 4)

    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    add(entries)
    file.write_bytes(forge.raw(json.dumps(entries).encode(), data[end:] + bytes(4)))
    refused(file, (UnexpectedKeysError, CorruptFileError), format="native")


# -- 13-25: tensors, with an index that fits them -----------------------------------------------------------------------


def _replace(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[forge.Tensors], None]:
    def change(found: forge.Tensors) -> None:
        for name, function in changes.items():
            key = f"attn.q@toy.0/{name}"
            found[key] = function(found[key])

    return change


def _filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[1] = value
        return tensor

    return change


def _rename(found: forge.Tensors) -> None:
    for key in list(found):
        found[key.replace("attn.", "attention.")] = found.pop(key)


def _drop(keys: Callable[[list[str]], list[str]]) -> Callable[[forge.Tensors], None]:
    def change(found: forge.Tensors) -> None:
        for key in keys(list(found)):
            found.pop(key)

    return change


TENSORS: list[tuple[str, type[CheckpointError], str | None, Callable[[forge.Tensors], None]]] = [
    ("row13_half_the_points", MissingKeysError, None, _drop(lambda k: [n for n in k if "toy.0" in n])),
    ("row13_all_Bs", MissingKeysError, "/B", _drop(lambda k: [n for n in k if n.endswith("/B")])),
    ("row14_renamed_points", UnexpectedKeysError, "attention.", _rename),
    ("row14_renamed_parameters", AdapterKitError, A[:-1], lambda t: t.update({"attn.q@toy.0/lora_A": t.pop(A)})),
    ("row15_extra_parameter", UnexpectedKeysError, "attn.q@toy.0/C", lambda t: t.update({"attn.q@toy.0/C": torch.ones(2)})),
    ("row15_extra_point", UnexpectedKeysError, "attn.q@toy.9", lambda t: t.update({"attn.q@toy.9/A": torch.ones(2)})),
    ("row16_empty", MissingKeysError, None, lambda t: t.clear()),
    ("row17_rank_of_all", ShapeMismatchError, "/", lambda t: t.update({k: _rank_3(k, v) for k, v in t.items()})),
    ("row18_mixed_ranks", ShapeMismatchError, A, _replace(A=lambda t: torch.ones(3, 8))),
    ("row19_transposed", ShapeMismatchError, A, _replace(A=lambda t: t.t().contiguous())),
    ("row19_one_dimension", ShapeMismatchError, B, _replace(B=lambda t: t.flatten())),
    ("row20_nan", NonFiniteError, A, _replace(A=_filled(math.nan))),
    ("row21_inf", NonFiniteError, B, _replace(B=_filled(math.inf))),
    ("row21_minus_inf", NonFiniteError, B, _replace(B=_filled(-math.inf))),
    *(
        (f"row25_{dtype}", DtypeMismatchError, A, _replace(A=lambda t, d=dtype: torch.ones(t.shape).to(d)))
        for dtype in (torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64)
    ),
]


def _rank_3(key: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones(3, tensor.shape[1]) if key.endswith("A") else torch.ones(tensor.shape[0], 3)


@pytest.mark.parametrize(("expected", "key", "change"), [t[1:] for t in TENSORS], ids=[t[0] for t in TENSORS])
def test_tensors_that_do_not_fit(
    file: Path,
    refused: Any,
    expected: type[CheckpointError],
    key: str | None,
    change: Callable[[forge.Tensors], None],
) -> None:
    forge.tensors(file, change)
    error = refused(file, expected)
    assert key is None or key in str(error.key)
    assert error.key


def test_row24_float64_weights_are_cast_with_a_warning(file: Path, adapters: ak.Adapters) -> None:
    forge.tensors(file, lambda t: t.update({key: tensor.double() for key, tensor in t.items()}))
    with pytest.warns(UserWarning, match="float64 tensors were cast to float32"):
        report = adapters.load(file, "new")
    assert any("float64" in note for note in report.notes)
    for key, tensor in adapters.state_dict("new").items():
        assert torch.equal(tensor, adapters.state_dict("good")[key])


# -- 22-31, 36-38: the header -------------------------------------------------------------------------------------------


def _config(**changes: object) -> Callable[[str], str]:
    def change(text: str) -> str:
        parts = json.loads(text)
        parts["config"].update(changes)
        return json.dumps(parts)

    return change


def _part(**changes: object) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **changes})


HEADERS: list[tuple[str, type[AdapterKitError], str, Callable[[str], str]]] = [
    ("row17_rank", ShapeMismatchError, "(2, 8)", _config(rank=4)),
    ("row22_alpha_nan", InvalidHeaderError, "NaN", _config(alpha=math.nan)),
    ("row22_alpha_inf", InvalidHeaderError, "Infinity", _config(alpha=math.inf)),
    ("row22_alpha_1e999", InvalidHeaderError, "1e999", lambda t: t.replace('"alpha":null', '"alpha":1e999')),
    ("row23_alpha", InvalidHeaderError, "alpha", _config(alpha=1e30)),
    *(
        (f"row26_rank_{value}", InvalidHeaderError, f"rank must be an int from 1 to 65536, not {value!r}", _config(rank=value))
        for value in (0, -4)
    ),
    *((f"row26_rank_{value!r}", InvalidHeaderError, "rank must be", _config(rank=value)) for value in (4.5, "4", True, None)),
    ("row27_rank_4e8", InvalidHeaderError, "400000000", _config(rank=400_000_000)),
    ("row27_rank_2e6", InvalidHeaderError, "2000000", _config(rank=2_000_000)),
    ("row27_rank_65536", ShapeMismatchError, "65536", _config(rank=65536)),
    ("row28_ranks", InvalidHeaderError, "10000000", _config(ranks={"*": 10_000_000})),
    ("row28_ranks_allowed", ShapeMismatchError, "65536", _config(ranks={"*": 65536})),
    ("row28_many_ranks", AdapterKitError, "ranks", _config(ranks={f"nothing{i}": 2 for i in range(5000)})),
    ("row29_regex", AdapterKitError, "", _config(targets=r"((\w+\.?)+)+!")),
    ("row29_glob", AdapterKitError, "", _config(targets="*a" * 40 + "!")),
    ("row29_braces", AdapterKitError, "", _config(targets="{a,b}" * 40)),
    ("row29_long", AdapterKitError, "", _config(targets="attn.q " * 20_000 + "x")),
    ("row30_nothing", BaseMismatchError, "attn", _config(targets="atn.q")),
    ("row31_wrong_kind", BaseMismatchError, "attention", _config(targets="attn.kv")),
    ("row36_auto_map", InvalidHeaderError, "auto_map", _config(auto_map={"base_model_class": "os", "parent_library": "os"})),
    ("row36_parent_library", InvalidHeaderError, "parent_library", _config(parent_library="os")),
    ("row36_trust", InvalidHeaderError, "trust_remote_code", _config(trust_remote_code=True)),
    ("row36_in_the_header", InvalidHeaderError, "auto_map", _part(auto_map={})),
    ("row37_type", UnknownAdapterTypeError, "pip install adapterkit-ia9", _part(type="ia9", distribution="adapterkit-ia9")),
    ("row37_type_is_a_path", UnknownAdapterTypeError, "os:system", _part(type="os:system")),
    ("row37_config_key", InvalidHeaderError, "ranc", _config(ranc=4)),
    ("row37_no_type", InvalidHeaderError, "'type'", lambda t: json.dumps({k: v for k, v in json.loads(t).items() if k != "type"})),
    ("row38_no_json", InvalidHeaderError, "not JSON", lambda t: "rank: 4"),
    ("row38_list", InvalidHeaderError, "object", lambda t: "[1]"),
    ("row38_config_list", InvalidHeaderError, "'config'", _part(config=[1])),
    ("row38_config_null", InvalidHeaderError, "'config'", _part(config=None)),
    ("row38_twice", InvalidHeaderError, "twice", lambda t: t.replace('"rank":2', '"rank":2,"rank":3')),
    ("row38_deep", InvalidHeaderError, "nested", lambda t: t.replace('"alpha":null', '"alpha":' + "[" * 200_000)),
    ("row38_deep_closed", InvalidHeaderError, "nested", lambda t: t.replace("null", "[" * 40 + "]" * 40, 1)),
    ("row38_nan", InvalidHeaderError, "NaN", lambda t: t.replace('"dropout":0.0', '"dropout":NaN')),
    ("row38_digits", InvalidHeaderError, "digits", lambda t: t.replace('"rank":2', '"rank":' + "9" * 100_000)),
    ("later_version", UnsupportedFileError, "pip install -U adapterkit", _part(file_version=2)),
]


@pytest.mark.parametrize(("expected", "words", "change"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_a_bad_header(
    file: Path, refused: Any, expected: type[AdapterKitError], words: str, change: Callable[[str], str]
) -> None:
    before = file.read_bytes()
    forge.header_text(file, change)
    assert file.read_bytes() != before
    error = refused(file, expected)
    assert words in str(error)
    assert isinstance(error, CheckpointError)


# -- 32-35: the base ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_row32_a_base_of_other_shapes(tmp_path: Path, refused: Any, strict: bool) -> None:
    path = with_adapter(toys.ToyModel(width=16)).save("good", tmp_path / "wide")
    if strict:
        error = refused(path, BaseMismatchError)
        assert error.key == "base"
    else:
        with pytest.warns(UserWarning, match="another base") if False else _nothing():
            refused(path, ShapeMismatchError, strict=False)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_row33_another_family_of_the_same_shapes(file: Path, refused: Any) -> None:
    forge.header(file, lambda h: h["base"]["toy"].update(family="elsewhere:OtherModel"))
    assert "elsewhere:OtherModel" in str(refused(file, BaseMismatchError))


@pytest.mark.parametrize("layers", [1, 3])
def test_row34_fewer_or_more_layers(tmp_path: Path, refused: Any, layers: int) -> None:
    path = with_adapter(toys.ToyModel(layers=layers)).save("good", tmp_path / "other")
    refused(path, BaseMismatchError)


def test_a_component_that_the_model_lacks(file: Path, refused: Any) -> None:
    forge.header(file, lambda h: h["base"].update(unet={"family": "diffusers:UNet2DConditionModel"}))
    assert "unet" in str(refused(file, BaseMismatchError))


def test_row35_paths_and_repositories_are_text(file: Path, adapters: ak.Adapters, tmp_path: Path) -> None:
    """Nothing named in a file is opened, fetched or imported."""
    named = tmp_path / "never_opened"
    extra = {"base_model": str(named), "repository": "https://example.invalid/x", "revision": "main", "module": "antigravity"}
    forge.header(file, lambda h: (h["metadata"].update(extra), h["base"]["toy"].update(extra)))
    events: list[tuple[str, str]] = []
    watching = [True]
    sys.addaudithook(lambda name, args: events.append((name, repr(args))) if watching[0] else None)
    adapters.load(file, "new")
    watching[0] = False
    assert not [e for e in events if e[0].startswith(("socket", "subprocess", "os.exec", "os.system"))]
    assert not [e for e in events if "never_opened" in e[1] or "antigravity" in e[1]]


# -- 39: names ----------------------------------------------------------------------------------------------------------

NAMES = ["../evil", "..", "/abs", "a/b", "a\\b", "a.b", "", "x" * 65, "x" * 300, "a\0b", "CON", "con", "lpt1", "-rf", "_a"]
NAMES += ["a b", "a\n", "é", "good", None, 3, b"a", ["a"]]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_row39_names(file: Path, adapters: ak.Adapters, model: nn.Module, tmp_path: Path, name: Any) -> None:
    before, files = snapshot(model), sorted(tmp_path.iterdir())
    attempts: list[Callable[[], object]] = [
        lambda: adapters.add(name, ak.LoRA(rank=1)),
        lambda: adapters.install(name, adapters.checkpoint("good")),
    ]
    if name is not None:  # load() takes the file's name then
        attempts.append(lambda: adapters.load(file, name))
    for attempt in attempts:
        with pytest.raises(InvalidNameError):
            attempt()
    assert snapshot(model) == before
    assert sorted(tmp_path.iterdir()) == files
    assert list(adapters) == ["good"]


@pytest.mark.parametrize("name", ["a.b.safetensors", "-rf.safetensors", "CON.safetensors"])
def test_row39_a_file_whose_name_is_no_adapter_name(file: Path, adapters: ak.Adapters, name: str) -> None:
    with pytest.raises(InvalidNameError):
        adapters.load(file.rename(file.with_name(name)))
    assert list(adapters) == ["good"]


# -- 40-42: what is no plain file ---------------------------------------------------------------------------------------


def _pipe(path: Path, good: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path, good: Path) -> None:
    path.mkdir()


def _link_out(path: Path, good: Path) -> None:
    path.symlink_to(good)


def _link_to_device(path: Path, good: Path) -> None:
    path.symlink_to("/dev/zero")


def _ring(path: Path, good: Path) -> None:
    path.symlink_to(path)


def _socket(path: Path, good: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("format", ["native", None])
@pytest.mark.parametrize("make", [_pipe, _folder, _link_out, _link_to_device, _ring, _socket])
def test_row40_not_a_plain_file(
    file: Path, refused: Any, make: Callable[[Path, Path], None], format: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = file.parent / "in"
    inside.mkdir()
    path = inside / "x.safetensors"
    make(path, file)
    expected = (NotRegularFileError, CheckpointError) if make is _ring else NotRegularFileError
    refused(path, expected, format=format)


def test_row40_links_that_are_allowed(file: Path, adapters: ak.Adapters) -> None:
    """Inside the folder, and as a download cache has them."""
    beside = file.parent / "beside"
    beside.symlink_to(file.name)
    cache = file.parent / "models--x--y"
    snapshot_folder = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot_folder.mkdir(parents=True)
    (cache / "blobs" / "ff00").write_bytes(file.read_bytes())
    cached = snapshot_folder / "x.safetensors"
    cached.symlink_to("../../blobs/ff00")
    for number, path in enumerate((beside, cached)):
        assert adapters.load(path, f"new{number}").points


def test_row40_missing_files(tmp_path: Path, refused: Any, file: Path) -> None:
    refused(tmp_path / "none" / "x", CheckpointError, format="native")
    error = refused(tmp_path / "bat.safetensors", CheckpointError, format="native")
    assert "bad.safetensors" in str(error)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nothing")
    refused(dangling, CheckpointError, format="native")
    refused(Path("a\0b"), CheckpointError, format="native")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(file: Path, refused: Any) -> None:
    file.chmod(0)
    assert "Permission" in str(refused(file, CheckpointError, format="native"))


def test_row41_a_file_that_changes_after_it_was_loaded(file: Path, adapters: ak.Adapters) -> None:
    adapters.load(file, "new")
    with file.open("r+b") as opened:
        opened.write(b"\xff" * 300)
        opened.truncate(400)
    for key, tensor in adapters.state_dict("new").items():
        assert torch.equal(tensor, adapters.state_dict("good")[key])


def test_row42_archives(file: Path, refused: Any) -> None:
    packed, tarred = file.with_name("x.zip"), file.with_name("x.tar.gz")
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(file, "../evil.safetensors")
    with tarfile.open(tarred, "w:gz") as archive:
        archive.add(file, "/abs.safetensors")
    assert "zip" in str(refused(packed, UnsupportedFileError, format="native"))
    assert "gzip" in str(refused(tarred, UnsupportedFileError, format="native"))


# -- without naming the format, the error is as good --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "words", "data"),
    [
        (UnsupportedFileError, "pickle", pickle.dumps({"a": list(range(100))})),
        (CorruptFileError, "cut short", b""),
        (CorruptFileError, "no safetensors", b"hello, this is text " * 9),
        (UnsupportedFileError, "format", _raw({"a": _FULL}, bytes(4))),
    ],
    ids=["pickle", "empty", "text", "foreign"],
)
def test_an_unrecognised_file_says_what_it_is(
    file: Path, refused: Any, expected: type[CheckpointError], words: str, data: bytes
) -> None:
    file.write_bytes(data)
    assert words in str(refused(file, expected))


def test_the_largest_permitted_table_is_quick(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(forge.raw(_many(container.TENSOR_LIMIT)))
    start = time.perf_counter()
    assert len(container.read(path).tensors) == container.TENSOR_LIMIT
    assert time.perf_counter() - start < 20


def test_the_rows_are_all_here() -> None:
    """Every row of the list that exists at this stage has a test; the others are about training or archives."""
    text = Path(__file__).read_text()
    rows = {int(number) for number in re.findall(r"row(\d+)", text)}
    assert set(range(1, 43)) - rows == set()
