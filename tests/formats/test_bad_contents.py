"""Bad inputs, rows 12 to 28 and 36 to 38: whole files whose tensors or header do not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import adapterkit as ak
from adapterkit.errors import (
    AdapterKitError,
    BaseMismatchError,
    CheckpointError,
    DtypeMismatchError,
    InvalidHeaderError,
    MissingKeysError,
    NonFiniteError,
    ShapeMismatchError,
    UnexpectedKeysError,
    UnknownAdapterTypeError,
    UnsupportedFileError,
)
from tests.formats import forge
from tests.formats.spoiling import Refusal

A, B = "attn.q@toy.0/A", "attn.q@toy.0/B"


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
    (
        "row15_extra_parameter",
        UnexpectedKeysError,
        "attn.q@toy.0/C",
        lambda t: t.update({"attn.q@toy.0/C": torch.ones(2)}),
    ),
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
    refused: Refusal,
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
        (
            f"row26_rank_{value}",
            InvalidHeaderError,
            f"rank must be an int from 1 to 65536, not {value!r}",
            _config(rank=value),
        )
        for value in (0, -4)
    ),
    *(
        (f"row26_rank_{value!r}", InvalidHeaderError, "rank must be", _config(rank=value))
        for value in (4.5, "4", True, None)
    ),
    ("row27_rank_4e8", InvalidHeaderError, "400000000", _config(rank=400_000_000)),
    ("row27_rank_2e6", InvalidHeaderError, "2000000", _config(rank=2_000_000)),
    ("row27_rank_65536", ShapeMismatchError, "65536", _config(rank=65536)),
    ("row28_ranks", InvalidHeaderError, "10000000", _config(ranks={"*": 10_000_000})),
    ("row28_ranks_allowed", ShapeMismatchError, "65536", _config(ranks={"*": 65536})),
    ("row28_many_ranks", InvalidHeaderError, "longer", _config(ranks={f"nothing{i}": 2 for i in range(5000)})),
    ("row29_regex", AdapterKitError, "", _config(targets=r"((\w+\.?)+)+!")),
    ("row29_glob", AdapterKitError, "", _config(targets="*a" * 40 + "!")),
    ("row29_braces", AdapterKitError, "", _config(targets="{a,b}" * 40)),
    ("row29_long", AdapterKitError, "longer", _config(targets="attn.q " * 20_000 + "x")),
    ("row29_long_allowed", AdapterKitError, "", _config(targets="attn.q " * 9_000 + "x")),
    ("row30_nothing", BaseMismatchError, "attn", _config(targets="atn.q")),
    ("row31_wrong_kind", BaseMismatchError, "attention", _config(targets="attn.kv")),
    (
        "row36_auto_map",
        InvalidHeaderError,
        "auto_map",
        _config(auto_map={"base_model_class": "os", "parent_library": "os"}),
    ),
    ("row36_parent_library", InvalidHeaderError, "parent_library", _config(parent_library="os")),
    ("row36_trust", InvalidHeaderError, "trust_remote_code", _config(trust_remote_code=True)),
    ("row36_in_the_header", InvalidHeaderError, "auto_map", _part(auto_map={})),
    (
        "row37_type",
        UnknownAdapterTypeError,
        "pip install adapterkit-ia9",
        _part(type="ia9", distribution="adapterkit-ia9"),
    ),
    ("row37_type_misspelt", UnknownAdapterTypeError, "Did you mean", _part(type="lroa")),
    ("row37_type_is_a_path", UnknownAdapterTypeError, "os:system", _part(type="os:system")),
    ("row37_config_key", InvalidHeaderError, "ranc", _config(ranc=4)),
    (
        "row37_no_type",
        InvalidHeaderError,
        "'type'",
        lambda t: json.dumps({k: v for k, v in json.loads(t).items() if k != "type"}),
    ),
    ("row38_no_json", InvalidHeaderError, "not JSON", lambda t: "rank: 4"),
    ("row38_list", InvalidHeaderError, "object", lambda t: "[1]"),
    ("row38_config_list", InvalidHeaderError, "'config'", _part(config=[1])),
    ("row38_config_null", InvalidHeaderError, "'config'", _part(config=None)),
    ("row38_twice", InvalidHeaderError, "twice", lambda t: t.replace('"rank":2', '"rank":2,"rank":3')),
    ("row38_deep", InvalidHeaderError, "nested", lambda t: t.replace('"alpha":null', '"alpha":' + "[" * 200_000)),
    ("row38_deep_closed", InvalidHeaderError, "nested", lambda t: t.replace("null", "[" * 40 + "]" * 40, 1)),
    ("row38_nan", InvalidHeaderError, "NaN", lambda t: t.replace('"dropout":0.0', '"dropout":NaN')),
    ("row38_digits", InvalidHeaderError, "digits", lambda t: t.replace('"rank":2', '"rank":' + "9" * 100_000)),
    ("later_version", UnsupportedFileError, "pip install -U adapterkit", _part(file_version=4)),
]


@pytest.mark.parametrize(("expected", "words", "change"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_a_bad_header(
    file: Path, refused: Refusal, expected: type[AdapterKitError], words: str, change: Callable[[str], str]
) -> None:
    before = file.read_bytes()
    forge.header_text(file, change)
    assert file.read_bytes() != before
    error = refused(file, expected)
    assert words in str(error)
    assert isinstance(error, CheckpointError)


def test_row28_as_many_ranks_as_a_config_can_hold(file: Path, refused: Refusal) -> None:
    forge.header_text(file, _config(ranks={f"n{i}": 2 for i in range(5000)}))
    refused(file, CheckpointError)
