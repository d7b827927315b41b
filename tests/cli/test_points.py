from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from timm.models import save_for_hf
from transformers import GPT2Config, GPT2LMHeadModel, YosoConfig

import adapterkit as ak
from adapterkit.cli.main import main
from adapterkit.training.skeleton import skeleton
from tests.backends.vision_models import pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("points")
    (folder / "words").mkdir()
    pipeline(folder / "words").save_pretrained(folder / "base")
    for weights in (folder / "base").rglob("*.safetensors"):
        weights.unlink()  # they are not needed, so they may be absent
    return folder / "base"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["points", *map(str, arguments)])


def test_a_pipelines_points_are_those_of_the_loaded_pipeline(base: Path, tmp_path: Path):
    result = call(base, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (tmp_path / "words").mkdir()
    expected = ak.points(pipeline(tmp_path / "words"))
    assert sorted(record["id"] for record in found) == sorted(expected.ids)
    shapes = {point.id: list(point.shape) for point in expected}
    assert all(record["shape"] == shapes[record["id"]] for record in found)


def test_nothing_is_allocated(base: Path):
    parts = skeleton(str(base)).components
    assert set(parts) == {"unet", "vae", "text_encoder"}
    assert all(p.is_meta for part in parts.values() for p in part.parameters())


def test_an_adapter_is_counted_before_anything_is_changed(base: Path):
    result = call(base, "cross.{k,v}@component=unet", "--adapter", "lora", "--rank", "4", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {record["role"] for record in found} == {"cross.k", "cross.v"}
    assert all(record["parameters"] == 4 * sum(record["shape"]) for record in found)
    total = sum(record["parameters"] for record in found)
    tree = call(base, "cross.{k,v}@component=unet", "--adapter", "lora", "-o", "rank=4").stdout
    assert f"{len(found)} points  +{total:,} parameters" in tree


def test_the_tree_shows_a_line_for_each_role_or_each_point(base: Path):
    short, full = call(base, "attn.q@component=unet").stdout, call(base, "attn.q@component=unet", "--full").stdout
    ids = [record["id"] for record in json.loads(call(base, "attn.q@component=unet", "--json").stdout)]
    assert all(point in full for point in ids)
    assert len(short.splitlines()) < len(full.splitlines())
    assert "attn.q  weight  16x16  x1" in short


def test_timm_by_name_and_by_folder(tmp_path: Path):
    named = json.loads(call("timm:vit_tiny_patch16_224", "attn.q", "--json").stdout)
    assert len(named) == 12
    assert named[0]["shape"] == [192, 192]
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=4)
    save_for_hf(model, tmp_path / "model", model_args={"depth": 2})
    for weights in (tmp_path / "model").iterdir():
        if weights.name != "config.json":
            weights.unlink()
    found = json.loads(call(tmp_path / "model", "--json").stdout)
    assert [record["id"] for record in found] == ak.points(model).ids
    assert next(record for record in found if record["role"] == "head")["shape"] == [4, 192]


def test_a_transformers_folder(tmp_path: Path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=8))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    found = json.loads(call(tmp_path / "model", "--json").stdout)
    assert [record["id"] for record in found] == ak.points(model).ids


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("attn.qq",), 1, "'attn.qq' is unknown here"),
        (("attn.q", "--adapter", "lorra"), 1, "Did you mean 'lora'"),
        (("attn.q", "--adapter", "lora", "-o", "rnk=1"), 1, "unknown key 'adapter.rnk'. Did you mean 'rank'"),
        (("attn.q", "--adapter", "lora", "--rank", "0"), 1, "rank"),
        (("attn.q", "--rank", "2"), 2, "add --adapter TYPE"),
    ],
)
def test_errors_are_plain(base: Path, arguments: tuple[str, ...], code: int, message: str):
    result = call(base, *arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_models_that_are_not_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").mkdir()
    assert "cannot load the model" in call(tmp_path / "empty").stderr
    assert "vit_tinny" in call("timm:vit_tinny").stderr
    shutil.copytree(base, tmp_path / "broken")
    (tmp_path / "broken/unet/config.json").unlink()
    broken = call(tmp_path / "broken")
    assert broken.exit_code == 1
    assert "cannot load the model" in broken.stderr


def test_why_there_are_no_more_points_is_said(tmp_path: Path):
    config = YosoConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    config.architectures = ["YosoForMaskedLM"]
    config.save_pretrained(tmp_path)
    result = call(tmp_path)
    assert result.exit_code == 0, result.output
    assert (
        "note: language.yoso.encoder.layer.0.attention.self and 1 more: YosoSelfAttention has no softmax"
        in result.output
    )
    assert "note" not in call(tmp_path, "attn.q").output


def test_a_small_copy_proves_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("timm:vit_tiny_patch16_224", "--prove", "--json")
    assert result.exit_code == 0, result.output
    [(component, proof)] = json.loads(result.stdout).items()
    assert component == "vision"
    assert proof["counts"]["attention"]["proven"] == proof["counts"]["output"]["proven"] / 3 > 0
    assert {point["id"] for point in proof["points"] if point["result"] == "false"} == set()
    monkeypatch.setattr("adapterkit.testing.proofs.attentions.TIGHT", -1.0)
    result = call("timm:vit_tiny_patch16_224", "--prove")
    assert result.exit_code == 1, result.output
    assert "false: not softmax(q [P; k]) [P; v]" in result.stdout


def test_proving_is_of_a_whole_model() -> None:
    result = call("timm:vit_tiny_patch16_224", "attn.*", "--prove")
    assert result.exit_code == 2
    assert "--prove is of every point" in result.output
