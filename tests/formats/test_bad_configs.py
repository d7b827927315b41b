"""Configs of other tools that want too much: patterns, sizes, names, paths, code. See `test_bad_everywhere.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adapterkit as ak
from adapterkit.errors import CheckpointError, InvalidNameError
from adapterkit.handle.reports import LoadReport
from tests.formats.samples import READERS, Reader
from tests.formats.spoiling import Refusal, snapshot

EVIL = r"((\w+\.?)+)+!"
"""Takes a backtracking engine longer than anybody waits."""

of_peft = pytest.mark.parametrize("reader", ["peft", "diffusers"], indirect=True)
with_configs = pytest.mark.parametrize("reader", ["peft", "adapterhub"], indirect=True)


@pytest.fixture(scope="module")
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return READERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def adapters(reader: Reader) -> Iterator[ak.Adapters]:
    made = ak.Adapters(reader.model)
    made.add("good", ak.LoRA(rank=1, targets="attention"))
    yield made
    made.detach()


@pytest.fixture
def either(reader: Reader, adapters: ak.Adapters) -> Iterator[Any]:
    """Loads a file, or sees that it is refused as a bad one has to be: within the same time and memory."""

    def load(path: Path) -> LoadReport | CheckpointError:
        before = snapshot(reader.root)
        try:
            return adapters.load(path, "new")
        except CheckpointError as error:
            assert snapshot(reader.root) == before
            return error

    yield load
    if "new" in adapters:
        adapters.remove("new")


@pytest.fixture
def refused(reader: Reader, adapters: ak.Adapters) -> Refusal:
    return Refusal(adapters, reader.root)


def _said(reader: Reader, **fields: Any) -> Any:
    """The sample with more in its config: of a file of diffusers, of its UNet's."""
    sample = reader.sample.copy()
    if sample.said:
        said = json.loads(sample.metadata[sample.said])
        said |= {f"unet.{name}": value for name, value in fields.items()}
        sample.metadata[sample.said] = json.dumps(said)
    else:
        assert sample.config is not None
        sample.config |= fields
    return sample


BOMBS: dict[str, Any] = {
    "row28_rank_of_10^7": {".*": 10_000_000},
    "row28_rank_of_10^9": {"q": 10**9},
    "row28_rank_of_65536": {".*": 65536},
    "row28_negative": {".*": -1},
    "row28_text": {".*": "4"},
    "row28_list": [[".*", 4]],
    "row29_redos": {EVIL: 2},
    "row29_bad": {"(": 3, "[": 3},
    "row29_long": {"a" * 1_000_000: 3},
    "row29_nested": {"(" * 5000 + ")" * 5000: 3},
    "row29_repeated": {"(a{1000}){1000}": 3},
    "row29_look_behind": {"(?<=x)q": 3},
    "row29_back_reference": {r"(a)\1{100000}": 3},
}


@of_peft
@pytest.mark.timeout(20)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("row", BOMBS)
def test_patterns_that_are_bombs(either: Any, reader: Reader, tmp_path: Path, row: str, field: str) -> None:
    found = either(_said(reader, **{field: BOMBS[row]}).write(tmp_path / "it"))
    if row.startswith("row28") and field == "rank_pattern":
        assert isinstance(found, CheckpointError)


@of_peft
@pytest.mark.timeout(20)
def test_row28_very_many_patterns(either: Any, reader: Reader, tmp_path: Path) -> None:
    either(_said(reader, rank_pattern={f"x{i}.*y": 2 for i in range(20_000)}).write(tmp_path / "it"))


TARGETS: dict[str, Any] = {
    "row29_redos": EVIL,
    "row29_list": [EVIL, "q"],
    "row29_bad": "(",
    "row29_long": "q|" * 500_000,
    "row30_nothing": "nothing",
    "row31_all": ".*",
    "number": 3,
    "mapping": {"a": 1},
    "nested": [["q"]],
    "null": None,
}


@of_peft
@pytest.mark.timeout(20)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save", "target_parameters"])
@pytest.mark.parametrize("row", TARGETS)
def test_targets_are_no_programs(either: Any, reader: Reader, tmp_path: Path, row: str, field: str) -> None:
    """Which modules are meant, the tensors say."""
    either(_said(reader, **{field: TARGETS[row]}).write(tmp_path / "it"))


@pytest.mark.parametrize("reader", ["kohya", "comfy", "diffusers", "peft"], indirect=True)
def test_row31_tensors_for_a_module_of_another_kind(refused: Refusal, reader: Reader, tmp_path: Path) -> None:
    sample = reader.sample.copy()
    old, new = {
        "kohya": ("attn1_to_q", "norm1"),
        "comfy": ("attn1.to_q", "norm1"),
        "diffusers": ("attn1.to_q", "norm1"),
        "peft": ("blocks.0.attn.proj", "blocks.0.norm"),
    }[reader.name]
    sample.tensors = {key.replace(old, new): tensor for key, tensor in sample.tensors.items()}
    assert sample.tensors.keys() != reader.sample.tensors.keys()
    refused(sample.write(tmp_path / "it"), CheckpointError)


NAMED: dict[str, Any] = {
    "base_model_name_or_path": "/etc/never_opened",
    "revision": "never_opened",
    "auto_mapping": {"base_model_class": "system", "parent_library": "antigravity"},
    "parent_library": "antigravity",
    "megatron_config": {"x": 1},
    "megatron_core": "antigravity",
    "trust_remote_code": True,
    "model_name": "https://example.invalid/never_opened",
    "model_class": "antigravity.Model",
    "auto_map": {"AutoModel": "antigravity.Model"},
    "_attn_implementation_internal": "never_opened/kernel",
}


@with_configs
@pytest.mark.parametrize("field", NAMED)
def test_rows35_and_36_nothing_that_is_named_is_opened_or_imported(
    either: Any, reader: Reader, tmp_path: Path, field: str
) -> None:
    path = _said(reader, **{field: NAMED[field]}).write(tmp_path / "it")
    events: list[tuple[str, str]] = []
    watching = [True]
    sys.addaudithook(lambda name, args: events.append((name, repr(args))) if watching[0] else None)
    either(path)
    watching[0] = False
    assert not [one for one in events if one[0].startswith(("socket", "subprocess", "os.exec", "os.system"))]
    assert not [one for one in events if "never_opened" in one[1] or "antigravity" in one[1]]


@pytest.mark.parametrize("reader", ["adapterhub"], indirect=True)
@pytest.mark.parametrize("name", ["../evil", "/abs", "a/b", "a.b", "", "x" * 300, "a\0b", 3, None, ["a"]], ids=repr)
def test_row39_the_name_in_a_config(either: Any, reader: Reader, tmp_path: Path, name: Any) -> None:
    sample = _said(reader, name=name)
    if isinstance(name, str):
        sample.tensors = {key.replace(".tiny.", f".{name}."): tensor for key, tensor in sample.tensors.items()}
    either(sample.write(tmp_path / "it"))
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("reader", ["adapterhub"], indirect=True)
@pytest.mark.parametrize("folder", ["../outside", "/etc", "..", ".", "a/b", "\0", "x" * 300])
def test_row39_folders_that_a_setup_names(reader: Reader, adapters: ak.Adapters, tmp_path: Path, folder: str) -> None:
    """What lies outside is not read, whatever it is."""
    reader.sample.write(tmp_path / "outside")
    inside = tmp_path / "inside"
    inside.mkdir()
    setup = {"adapter_setup": {"type": "Stack", "children": [{"type": "single", "children": [folder]}]}}
    (inside / "adapter_setup.json").write_text(json.dumps(setup))
    with pytest.raises((CheckpointError, InvalidNameError)):
        adapters.load_all(inside)
    assert list(adapters) == ["good"]


@pytest.mark.parametrize("reader", ["peft"], indirect=True)
@pytest.mark.parametrize("name", ["../evil", "a b", "CON", "-rf", "x" * 65])
def test_row39_names_of_adapters_in_a_folder(reader: Reader, adapters: ak.Adapters, tmp_path: Path, name: str) -> None:
    if "/" not in name:
        folder = tmp_path / "all"
        folder.mkdir()
        reader.sample.write(folder / name)
        with pytest.raises((CheckpointError, InvalidNameError)):
            adapters.load_all(folder)
    given = {key.replace(".weight", f".{name}.weight"): tensor for key, tensor in reader.sample.tensors.items()}
    with pytest.raises((CheckpointError, InvalidNameError)):
        adapters.load_all(given)
    assert list(adapters) == ["good"]


@pytest.mark.parametrize("reader", ["diffusers"], indirect=True)
@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", "{", '{"unet.r": 2, "unet.r": 3}', "[" * 100_000, '{"unet.r": NaN}', "\0"], ids=repr
)
def test_row38_metadata_that_is_no_config(refused: Refusal, reader: Reader, tmp_path: Path, text: str) -> None:
    sample = reader.sample.copy()
    sample.metadata[sample.said] = text
    refused(sample.write(tmp_path / "it"), CheckpointError)


@with_configs
def test_row34_layers_that_the_base_has_not(reader: Reader, tmp_path: Path) -> None:
    model = reader.smaller()
    with pytest.raises(CheckpointError):
        ak.Adapters(model).load(reader.sample.write(tmp_path / "it"))


@with_configs
def test_an_unknown_field_of_a_config_is_told_or_refused(either: Any, reader: Reader, tmp_path: Path) -> None:
    """It may be one that a later release of the tool computes with."""
    sample = reader.sample.copy()
    sample.set((*sample.rank[:-1], "use_oddity"), True)
    found = either(sample.write(tmp_path / "it"))
    told = found.notes if isinstance(found, LoadReport) else [str(found)]
    assert any("use_oddity" in one for one in told)
