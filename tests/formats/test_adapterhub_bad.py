"""Damaged, foreign and hostile files of AdapterHub's kind: a typed error, and the model as it was."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit as ak
from adapterkit import Bottleneck, LoRA, errors
from tests.formats import foreign
from tests.formats.foreign import Fixture

HERE = foreign.HERE / "adapterhub"
BERT = "adapterhub_bert_loreft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
_MOST = 64 * 2**20

TYPES = {
    "bottleneck": Bottleneck.pfeiffer(width=4),
    "compacter": ak.Compacter(n=2, reduction=4),
    "lora": LoRA("attn.{q,v}", rank=2),
    "prefix": ak.Prefix(length=2),
    "reft": ak.ReFT(rank=1, prefix=2),
    "inv": ak.Invertible("tokens"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound folder of each type."""
    home = tmp_path_factory.mktemp("sound")
    model = Fixture(BERT, HERE).model()
    for name, config in TYPES.items():
        adapters = ak.Adapters(model)
        adapters.add(name, config)
        adapters.save(name, home / name, format="adapterhub")
        adapters.detach()
    return home


@pytest.fixture(scope="module")
def model() -> Any:
    return Fixture(BERT, HERE).model()


@pytest.fixture
def spoil(folders: Path, tmp_path: Path, model: Any) -> Callable[..., errors.CheckpointError]:
    """Changes a folder, loads it, and gives the error that is raised; the model must be what it was."""

    def spoilt(type: str, change: Callable[[Path], object], error: type[Exception] = errors.CheckpointError) -> Any:
        path = tmp_path / type
        shutil.copytree(folders / type, path)
        change(path)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        adapters = ak.Adapters(model)
        tracemalloc.start()
        try:
            with pytest.raises(error) as caught:
                adapters.load(path, "it")
            assert tracemalloc.get_traced_memory()[1] < _MOST
        finally:
            tracemalloc.stop()
            adapters.detach()
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], value) for key, value in before.items())
        return caught.value

    return spoilt


def fields(**values: Any) -> Callable[[Path], None]:
    """Sets fields of the inner config; ... takes one out."""

    def change(path: Path) -> None:
        value = json.loads((path / CONFIG).read_text())
        value["config"] = {key: one for key, one in {**value["config"], **values}.items() if one is not ...}
        (path / CONFIG).write_text(json.dumps(value))

    return change


def top(**values: Any) -> Callable[[Path], None]:
    """Sets fields of the outer object."""

    def change(path: Path) -> None:
        value = json.loads((path / CONFIG).read_text()) | values
        (path / CONFIG).write_text(json.dumps({key: one for key, one in value.items() if one is not ...}))

    return change


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Changes the tensors, in place."""

    def changed(path: Path) -> None:
        found = load_file(str(path / WEIGHTS))
        change(found)
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, str(path / WEIGHTS))

    return changed


def one(found: dict[str, Tensor], part: str = "") -> str:
    return next(key for key in sorted(found) if part in key)


def put(part: str, make: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Another tensor in the place of one."""
    return tensors(lambda found: found.update({one(found, part): make(found[one(found, part)])}))


# -- configs ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, list[dict[str, Any]]] = {
    "lora": [
        *({"r": value} for value in (-4, 4.5, "4", True, None, 10**9, 0, [2], float("nan"), float("inf"))),
        *({"alpha": value} for value in ("8", float("nan"), float("inf"), [])),
        *({"attn_matrices": value} for value in ("q", [1], {"q": 1}, ["x"], [])),
        *({"leave_out": value} for value in (1, ["0"], [-1], [True], "all")),
        *({"composition_mode": value} for value in ("multiply", 1, ["add"])),
        {"use_dora": "yes"},
        {"vera_d": "0.1"},
        {"selfattn_lora": False},
        {"dropout": "0"},
        {"dropout": 7.0},
        {"new_option": 1},
    ],
    "bottleneck": [
        *({"reduction_factor": value} for value in (0, -1, "16", True, 1e-9, {}, {"0": "4"}, {"0": 4}, [4], None, ...)),
        *({"reduction_factor": value} for value in (float("nan"), float("inf"), 1e308)),
        *({"non_linearity": value} for value in ("softplus9", 4, ["relu"], ...)),
        *({"scaling": value} for value in ("huge", [1.0], True, float("nan"), 1e30)),
        {"mh_adapter": 1},
        {"output_adapter": ...},
        {"inv_adapter": "glow"},
        {"inv_adapter": "other"},
        {"residual_before_ln": "pre_add"},
        {"phm_layer": True},
        {"original_ln_after": False},
        {"architecture": "other"},
        {"architecture": ["bottleneck"]},
        {"dropout": 1.5},
    ],
    "compacter": [{"phm_dim": value} for value in (0, 3, "2", 10**9, 2.0)] + [{"phm_rank": 0}, {"phm_layer": False}],
    "prefix": [
        *({"prefix_length": value} for value in (0, -1, 3, "2", 10**12, True)),
        {"flat": False},
        {"use_gating": True},
        {"cross_prefix": "yes"},
    ],
    "reft": [
        *({"r": value} for value in (0, 2, "1", 10**9)),
        *({"layers": value} for value in ("some", 3, ["0"], [-1], {})),
        {"prefix_positions": 0},
        {"prefix_positions": -2},
        {"output_reft": False},
        {"orthogonality": "no"},
    ],
    "inv": [{"inv_adapter_reduction_factor": value} for value in ("2", 0, -1, [], float("nan"))],
}


TOLD = {
    "lora-{'r': -4}": "'config.r': is -4: expected a whole number from 0",
    "lora-{'r': 1000000000}": "shape (2, 16), expected (1000000000, any)",
    "lora-{'alpha': '8'}": "'config.alpha': is '8': expected a number",
    "lora-{'attn_matrices': [1]}": "'config.attn_matrices': is [1]: expected a list",
    "lora-{'composition_mode': 'multiply'}": "must be one of add, scale, not 'multiply'",
    "lora-{'vera_d': '0.1'}": "'config.vera_d': is '0.1': expected a number, or null",
    "lora-{'dropout': 7.0}": "'config': invalid LoRA: dropout must be at least 0 and less than 1, not 7.0",
    "lora-{'new_option': 1}": "'config.new_option': is unknown: it may change what is computed",
    "bottleneck-{'reduction_factor': 0}": "expected a number above 0, or an object of layer -> number",
    "bottleneck-{'reduction_factor': {'0': 4}}": "'config.reduction_factor': has no layer 1, and no default",
    "bottleneck-{'reduction_factor': Ellipsis}": "'config.reduction_factor': is missing",
    "bottleneck-{'scaling': True}": "'config.scaling': is True: expected a number, 'learned' or 'channel'",
    "bottleneck-{'mh_adapter': 1}": "'config.mh_adapter': is 1: expected true or false",
    "bottleneck-{'inv_adapter': 'glow'}": "inv_adapter='glow' cannot be read: the tool's own code for it fails",
    "bottleneck-{'residual_before_ln': 'pre_add'}": "is 'pre_add': expected true, false or 'post_add'",
    "bottleneck-{'architecture': 'other'}": "'architecture': 'other' is no method that is known (bottleneck, ",
    "compacter-{'phm_dim': 3}": "adapter_down.0.W_left': shape (2, 8, 1), expected (3, any, 1)",
    "compacter-{'phm_rank': 0}": "shape (2, 8, 1), expected (2, any, 0)",
    "prefix-{'prefix_length': 3}": "128 keys and values, and 3 positions at 2 attentions of 16 features have 192",
    "prefix-{'flat': False}": "self_prefix.wte.weight': is missing; there is self_prefix.control_trans",
    "reft-{'layers': 'some'}": "'config.layers': is 'some': expected 'all' or a list of layers",
    "reft-{'prefix_positions': 0}": "'config.prefix_positions': with suffix_positions=0 edits nothing",
    "reft-{'output_reft': False}": "output_reft=False edits nothing",
    "inv-{'inv_adapter_reduction_factor': 0}": "invalid Invertible: reduction must be from 1/64 to 65536, not 0.0",
}
"""What of an error is for people who mend the file: the field, its value, what it may be."""


def test_what_is_told_is_of_wrong_fields() -> None:
    assert TOLD.keys() <= {f"{kind}-{value}" for kind, every in WRONG.items() for value in every}


@pytest.mark.parametrize(
    ("type", "values"),
    [pytest.param(kind, value, id=f"{kind}-{value}") for kind, every in WRONG.items() for value in every],
)
def test_wrong_fields(type: str, values: dict[str, Any], spoil: Any) -> None:
    said = str(spoil(type, fields(**values)))
    assert TOLD.get(f"{type}-{values}", "") in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"text"',
        '{"config": {}, "config": {}}',
        "\xff",
        "[" * 10**5,
        '{"config": null}',
        "{}",
    ],
)
def test_configs_that_are_none(text: str, spoil: Any) -> None:
    spoil("lora", lambda path: (path / CONFIG).write_bytes(text.encode("latin-1")))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"config": NaN}', "is not JSON: NaN"),
        ('{"config": {}, "config": {}}', "is not JSON: the key 'config' occurs twice"),
        ('{"config": 1e999}', "is not JSON: the number 1e999 is out of range"),
        ('{"config": ' + "1" * 40 + "}", "is not JSON: an integer of 40 digits"),
        ("[" * 10**5, "is nested deeper than 32"),
    ],
)
def test_text_that_is_no_config_is_told_in_one_sentence(text: str, told: str, spoil: Any) -> None:
    assert f"{CONFIG}: {told}" in str(spoil("lora", lambda path: (path / CONFIG).write_text(text)))


@pytest.mark.parametrize(
    "values",
    [
        {"config": "pfeiffer9"},
        {"config": []},
        {"config": {"architecture": "union", "configs": []}},
        {"config": {"architecture": "union", "configs": "lora"}},
        {"config": {"architecture": "union", "configs": [1]}},
        {"config": {"architecture": "union", "configs": [{"architecture": "lora"}] * 100}},
        {"model_type": "nonesuch"},
        {"model_type": 4},
        {"model_type": "gpt2"},
        {"name": 3},
        {"name": "another"},
        {"name": ...},
        {"version": 1.0},
        {"model_class": []},
        {"peft_type": "LORA"},
    ],
    ids=str,
)
def test_wrong_outer_fields(values: dict[str, Any], spoil: Any) -> None:
    spoil("lora", top(**values))


def test_a_huge_config(spoil: Any) -> None:
    spoil("lora", top(padding="x" * 2**27))


# -- tensors ----------------------------------------------------------------------------------------------------------

PARTS = {
    "bottleneck": "adapter_up.weight",
    "lora": "lora_B",
    "prefix": "control_trans",
    "reft": "learned_source.weight",
}
PARTS |= {"compacter": "W_left", "inv": "F.0.weight"}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(
    "make",
    [
        lambda t: t[..., :-1],
        lambda t: torch.cat([t, t]),
        lambda t: t[None],
        lambda t: t.new_zeros(0),
        lambda t: t.new_zeros(()),
        lambda t: t.flatten()[:1],
        lambda t: t * float("nan"),
        lambda t: t + float("inf"),
        lambda t: (t * 100).to(torch.int8),
        lambda t: t.bool(),
        lambda t: t.to(torch.complex64),
    ],
    ids=["narrow", "twice", "deep", "empty", "scalar", "single", "nan", "inf", "int8", "bool", "complex"],
)
def test_wrong_tensors(type: str, make: Callable[[Tensor], Tensor], spoil: Any) -> None:
    def everywhere(found: dict[str, Tensor]) -> None:  # of what stands in a file twice, both
        name = one(found, PARTS[type])
        short = name.split(".pool.")[-1].rpartition("prefix_tunings")[2] or name
        for key in [key for key in found if key == name or (type == "prefix" and key.endswith(short))]:
            found[key] = make(found[key])

    spoil(type, tensors(everywhere))


@pytest.mark.parametrize("type", TYPES)
def test_missing_tensors(type: str, spoil: Any) -> None:
    def drop(found: dict[str, Tensor]) -> None:
        name = one(found, PARTS[type])
        for key in [key for key in found if key == name or (type == "prefix" and "control_trans" in key)]:
            del found[key]

    error = spoil(type, tensors(drop))
    assert isinstance(error, errors.MissingKeysError | errors.CheckpointError)


def test_a_whole_layer_is_missing(spoil: Any) -> None:
    spoil("bottleneck", tensors(lambda found: [found.pop(key) for key in list(found) if ".layer.1." in key]))


def test_more_layers_than_the_model_has(spoil: Any) -> None:
    def more(found: dict[str, Tensor]) -> None:
        found |= {
            key.replace(".layer.1.", ".layer.7."): found[key].clone() for key in list(found) if ".layer.1." in key
        }

    spoil("lora", tensors(more))


def test_strange_keys(spoil: Any) -> None:
    spoil("lora", tensors(lambda found: found.update({"base_model.model.x.lora_A.weight": torch.ones(2, 16)})))


def test_a_model_of_another_width(folders: Path) -> None:
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
    adapters = ak.Adapters(transformers.BertModel(transformers.BertConfig(hidden_size=24, **sizes)))
    for name in TYPES:
        with pytest.raises(errors.CheckpointError):
            adapters.load(folders / name)


@pytest.mark.parametrize("share", [0, 4, 100, 0.5, -1])
def test_files_that_end_early(share: float, spoil: Any) -> None:
    def cut(path: Path) -> None:
        data = (path / WEIGHTS).read_bytes()
        end = int(len(data) * share) if isinstance(share, float) else share
        (path / WEIGHTS).write_bytes(data[:end])

    spoil("lora", cut)


@pytest.mark.parametrize(
    "header",
    [b"{}", b"[]", b'{"a": 3}', b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'],
)
def test_headers_that_lie(header: bytes, spoil: Any) -> None:
    spoil("lora", lambda path: (path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header))


def test_no_tensors_at_all(spoil: Any) -> None:
    spoil("lora", lambda path: (path / WEIGHTS).unlink(), errors.MissingKeysError)


def test_a_config_of_peft(spoil: Any) -> None:
    spoil("lora", lambda path: (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})))


class Bomb:
    """A pickle that makes a folder where it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("allow", [False, True])
def test_hostile_pickles(allow: bool, folders: Path, tmp_path: Path, model: Any) -> None:
    shutil.copytree(folders / "lora", tmp_path / "it")
    (tmp_path / "it" / WEIGHTS).unlink()
    (tmp_path / "it" / "pytorch_adapter.bin").write_bytes(pickle.dumps({"a": Bomb(tmp_path / "bomb")}))
    with pytest.raises(errors.CheckpointError):
        ak.Adapters(model).load(tmp_path / "it", "it", allow_pickle=allow)
    assert not (tmp_path / "bomb").exists()


def test_pickles_that_hold_no_tensors(folders: Path, tmp_path: Path, model: Any) -> None:
    for i, value in enumerate(([1, 2], {"a": 3}, {3: torch.ones(1)}, torch.ones(2), None)):
        shutil.copytree(folders / "lora", path := tmp_path / str(i))
        (path / WEIGHTS).unlink()
        torch.save(value, path / "pytorch_adapter.bin")
        with pytest.raises(errors.CheckpointError):
            ak.Adapters(model).load(path, "it", allow_pickle=True)


# -- setups and fusions -----------------------------------------------------------------------------------------------


@pytest.fixture
def setup(tmp_path: Path) -> Path:
    adapters = ak.Adapters(Fixture(BERT, HERE).model())
    adapters.add("one", Bottleneck.pfeiffer(width=3))
    adapters.add("two", Bottleneck.pfeiffer(width=3))
    adapters.add("both", ak.Fuse(("one", "two")))
    adapters.save(["one", "two", "both"], tmp_path / "all", format="adapterhub")
    return tmp_path / "all"


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"type": "single", "children": []},
        {"type": "single", "children": [3]},
        {"type": "single", "children": ["../../etc"]},
        {"type": "single", "children": ["/etc"]},
        {"type": "single", "children": ["none"]},
        {"type": "Stack", "children": "one"},
        {"type": "Stack", "children": [{"type": "single", "children": [f"a{i}"]} for i in range(999)]},
        {"type": 3, "children": [{"type": "single", "children": ["one"]}]},
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_setups(value: Any, setup: Path, model: Any) -> None:
    (setup / "adapter_setup.json").write_text(json.dumps({"adapter_setup": value}))
    with pytest.raises(errors.CheckpointError):
        ak.Adapters(model).load_all(setup)


def test_setups_without_an_end(setup: Path, model: Any) -> None:
    block: dict[str, Any] = {"type": "single", "children": ["one"]}
    for _ in range(400):
        block = {"type": "Stack", "children": [block]}
    (setup / "adapter_setup.json").write_text(json.dumps({"adapter_setup": block}))
    with pytest.raises(errors.CheckpointError):
        ak.Adapters(model).load_all(setup)


@pytest.mark.parametrize(
    "values",
    [
        {"config": {"key": "yes"}},
        {"config": 4},
        {"config": {"key": False, "query": False, "value": False}},
        {"config": {"what": 1}},
        {"adapter_names": 3},
        {"adapter_names": []},
        {"adapter_names": [1]},
        {"adapter_names": ["one", "one"]},
        {"model_type": "none"},
    ],
    ids=str,
)
def test_wrong_fusions(values: dict[str, Any], setup: Path, model: Any) -> None:
    path = setup / "one,two" / "adapter_fusion_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(errors.AdapterKitError):
        ak.Adapters(model).load_all(setup)


def test_a_fusion_that_adds_to_its_values_is_told(setup: Path, model: Any) -> None:
    path = setup / "one,two" / "adapter_fusion_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"config": {**said["config"], "residual_before": True}}))
    with pytest.raises(errors.UnsupportedFileError, match=r"'config\.residual_before'.*no type here adds the residual"):
        ak.Adapters(model).load_all(setup)


def test_a_method_that_is_left_out_everywhere_is_no_part(folders: Path, tmp_path: Path, model: Any) -> None:
    shutil.copytree(folders / "bottleneck", path := tmp_path / "it")
    own = json.loads((path / CONFIG).read_text())["config"]
    thin = json.loads((folders / "lora" / CONFIG).read_text())["config"] | {"leave_out": [0, 1]}
    top(config={"architecture": "union", "configs": [own, thin]})(path)
    adapters = ak.Adapters(model)
    try:
        adapters.load(path, "it")
        assert isinstance(adapters.config("it"), Bottleneck)
    finally:
        adapters.detach()


def test_a_method_without_a_tensor_beside_another_is_missing(folders: Path, spoil: Any) -> None:
    """It was left out without a word."""
    own, thin = (json.loads((folders / name / CONFIG).read_text())["config"] for name in ("bottleneck", "lora"))
    union = top(config={"architecture": "union", "configs": [own, thin]})
    error = spoil("bottleneck", union, errors.MissingKeysError)
    assert "no tensors for 4 of 4 points: attn.q@language.0" in str(error)


def test_what_a_config_does_not_say_is_what_the_tool_takes(folders: Path, tmp_path: Path, model: Any) -> None:
    shutil.copytree(folders / "reft", path := tmp_path / "it")
    fields(prefix_positions=..., suffix_positions=..., r=...)(path)
    adapters = ak.Adapters(model)
    try:
        adapters.add("of-four", ak.Compacter(n=4, reduction=4))
        adapters.save("of-four", tmp_path / "four", format="adapterhub")
        fields(phm_dim=..., phm_rank=..., shared_phm_rule=...)(tmp_path / "four")
        adapters.load(path, "it")
        adapters.load(tmp_path / "four", "again")
        config: Any = adapters.config("it")
        assert (config.prefix, config.suffix or 0, config.rank) == (3, 0, 1)
        config = adapters.config("again")
        assert (config.n, config.rank, config.shared_rule) == (4, 1, True)
    finally:
        adapters.detach()
