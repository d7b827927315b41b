"""What holds for every reader: content decides, what does not belong is told, and what the caller has stays his."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.errors import CheckpointError, MissingKeysError, UnexpectedKeysError
from adapterkit.formats import registry
from adapterkit.formats.source import Source
from tests.formats import foreign
from tests.formats.samples import READERS, Reader
from tests.formats.spoiling import snapshot

FILES = [name for name in READERS if name not in ("peft", "adapterhub")]
"""Those whose file says all, without a config beside it."""


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return READERS[request.param](tmp_path_factory.mktemp(request.param))


# -- recognition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "x.bin", "x.ckpt", "x.gguf", "adapter_config.json", "diffusion.pt.safetensors"])
def test_a_file_is_known_by_its_content(reader: Reader, tmp_path: Path, name: str) -> None:
    path = reader.sample.write(tmp_path / name)
    assert registry.find_format(Source.of(path)).spec.name == reader.name


@pytest.mark.parametrize("reader", FILES, indirect=True)
def test_what_lies_beside_a_file_does_not_matter(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    path = reader.sample.write(tmp_path / "it")
    assert registry.find_format(Source.of(path)).spec.name == reader.name


def _paths(given: object, folder: Path) -> list[Path]:
    if isinstance(given, str):
        return [folder / given]
    assert isinstance(given, dict)
    return [folder / path for path in (*given["parts"].values(), given.get("fusion")) if path]


FEW = foreign.few()


def _check_recognised(name: str, folder: Path) -> None:
    about = foreign.read(folder / name / "about.json")
    for path in _paths(about["load"], folder / name):
        registry.find_format(Source.of(path, allow_pickle=True))  # by one format, and no more


@pytest.mark.parametrize(("name", "folder"), FEW, ids=[name for name, _ in FEW])
def test_one_format_knows_some_files_of_other_tools(name: str, folder: Path) -> None:
    _check_recognised(name, folder)


@pytest.mark.slow
def test_one_format_knows_each_file_of_other_tools() -> None:
    if not (names := foreign.named()):
        pytest.skip(f"{foreign.ELSEWHERE} is not here: set ADAPTERKIT_FIXTURES to the folder of fixtures")
    for name in names:
        _check_recognised(name, foreign.ELSEWHERE)


# -- what does not belong to the model --------------------------------------------------------------------------------


def _root(model: object) -> nn.Module:
    return model if isinstance(model, nn.Module) else nn.ModuleDict(model.components)  # type: ignore[attr-defined]


def test_a_file_that_has_more_than_the_model(reader: Reader, tmp_path: Path) -> None:
    """Strictly an error; otherwise what belongs is loaded, and the rest is told, in words and in data."""
    path, model = reader.sample.write(tmp_path / "it"), reader.smaller()
    adapters, before = ak.Adapters(model), snapshot(_root(model))
    with pytest.raises(CheckpointError):
        adapters.load(path)
    assert snapshot(_root(model)) == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of another base
        report = adapters.load(path, strict=False)
    assert report.points
    assert set(report.points) <= {point.id for point in ak.points(model)}
    if reader.name == "native":  # all of its keys are known, and points tell what is left out
        assert any("left out" in note for note in report.notes)
        return
    left = report.to_dict()["read"]["unmatched"]
    assert left
    assert set(left) | set(report.read.matched) == set(reader.sample.tensors)
    assert f"left out {len(left)} keys that belong to no point here" in str(report)


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_that_fits_is_always_an_error(reader: Reader, tmp_path: Path, strict: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(CheckpointError):
        ak.Adapters(model).load(reader.sample.write(tmp_path / "it"), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_file_for_the_other_part_alone(tmp_path: Path, strict: bool) -> None:
    reader = READERS["kohya"](tmp_path)
    sample = reader.sample
    sample.tensors = {key: tensor for key, tensor in sample.tensors.items() if key.startswith("lora_te")}
    assert sample.tensors
    with pytest.raises(MissingKeysError, match="nothing in it fits the model"):
        ak.Adapters(reader.smaller()).load(sample.write(tmp_path / "it"), strict=strict)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_an_adapter_of_a_pipeline_on_one_of_its_models(tmp_path: Path, strict: bool, named: bool) -> None:
    """In our own file; the points are named by a selector, or, as another tool's file has them, one by one."""
    reader = READERS["kohya"](tmp_path)
    whole = ak.Adapters(reader.model)
    if named:
        whole.load(reader.sample.write(tmp_path / "it"), "both")
    else:
        whole.add("both", ak.LoRA(rank=1, targets="attn.q"))
    path = whole.save("both", tmp_path / "both")
    whole.detach()
    bare = ak.Adapters(reader.smaller())
    if strict:
        with pytest.raises(CheckpointError, match="text_encoder"):
            bare.load(path)
        return
    with pytest.warns(UserWarning, match=r"text_encoder|left out"):
        report = bare.load(path, strict=False)
    assert any("made for a component 'text_encoder'" in note for note in report.notes)
    assert {point.partition("@")[2].partition(".")[0] for point in report.points} == {"unet"}
    bare.save(report.name, tmp_path / "again")
    assert ak.Adapters(reader.smaller()).load(tmp_path / "again").points == report.points


# -- what the caller has ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [*FILES, "peft"], indirect=True)
def test_the_caller_s_tensors_stay_his(reader: Reader) -> None:
    """They are neither changed nor shared, whatever is done with the adapter."""
    sample = reader.sample.copy()
    given = dict(sample.tensors)
    before = {key: tensor.clone() for key, tensor in given.items()}
    adapters = ak.Adapters(reader.model)
    source = given if reader.name in ("peft", "lycoris") else Source.of(given, sample.metadata)
    adapters.load(source, "new")
    stores = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    assert not stores & {p.untyped_storage().data_ptr() for p in adapters.state_dict("new").values()}
    with torch.no_grad():
        for parameter in adapters.parameters("new"):
            parameter.add_(1.0)
    adapters.activate("new")
    adapters.merge()
    adapters.unmerge()
    adapters.detach()
    assert list(given) == list(sample.tensors)
    assert all(given[key] is sample.tensors[key] for key in given)
    assert all(torch.equal(given[key], tensor) for key, tensor in before.items())


def test_an_unknown_key_of_the_caller_is_an_error(reader: Reader) -> None:
    if reader.name not in FILES:
        return
    given = {**reader.sample.tensors, "oddity.weight": torch.ones(2)}
    with pytest.raises((UnexpectedKeysError, CheckpointError)):
        ak.Adapters(reader.model).load(Source.of(given, reader.sample.metadata), "new")


@pytest.mark.parametrize("format", ["peft", "native"])
def test_an_adapter_of_a_language_model_on_a_classifier(tmp_path: Path, format: str) -> None:
    """What is at the blocks belongs to both; what is at the head does not."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=20, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=False)
    adapters = ak.Adapters(LlamaForCausalLM(config))
    adapters.add("it", ak.LoRA(rank=2, targets="attn.q head"))
    path = adapters.save("it", tmp_path / "it", format=format)
    model = LlamaForSequenceClassification(config)
    there, before = ak.Adapters(model), snapshot(model)
    with pytest.raises(CheckpointError):
        there.load(path)
    assert snapshot(model) == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of another base
        report = there.load(path, strict=False)
    assert len(report.points) == 2
    assert all(point.startswith("attn.q@") for point in report.points)
    assert "head" in "".join([*report.read.unmatched, *report.notes])
    there.save(report.name, tmp_path / "again")
    assert ak.Adapters(model).load(tmp_path / "again", "again").points == report.points
