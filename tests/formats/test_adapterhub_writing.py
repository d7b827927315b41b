"""What is written as AdapterHub's: the tool's own keys and configs, read back as the same, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterkit_ia3.ia3 import IA3
from safetensors.torch import load_file
from torch import Tensor

import adapterkit as ak
from adapterkit import Bottleneck, LoRA, Prefix, ReFT, Union, errors
from tests.formats import foreign
from tests.formats.foreign import Fixture

HERE = foreign.HERE / "adapterhub"
NEAR = 1e-5


def values_of(adapters: ak.Adapters, name: str) -> list[Tensor]:
    """All parameters of an adapter, once each."""
    found: dict[int, Tensor] = {}
    for module in adapters.modules(name).values():
        shared = getattr(module, "shared", None)
        for tensor in (*module.parameters(), *(shared.parameters() if shared is not None else ())):
            found[id(tensor)] = tensor
    return list(found.values())


def stirred(model: Any, config: ak.AdapterConfig) -> ak.Adapters:
    """The model with an adapter that does something everywhere."""
    adapters = ak.Adapters(model)
    adapters.add("it", config)
    torch.manual_seed(1)
    orthonormal = isinstance(config, ReFT) and config.form == "loreft"
    for tensor in values_of(adapters, "it"):
        if not orthonormal or tensor.ndim < 2:
            tensor.data += 0.3 * torch.randn_like(tensor)
    adapters.activate("it")
    return adapters


def same(fixture: Fixture, path: Path, expected: Mapping[str, Tensor], name: str = "it") -> None:
    """Whether what was written does to a fresh base what the adapter did."""
    model = fixture.model()
    adapters = ak.Adapters(model)
    adapters.load(path, name)
    adapters.activate(name)
    got = fixture.outputs(model)
    assert max(float((got[key] - expected[key]).abs().max() / expected[key].abs().max()) for key in got) < NEAR


def written(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return foreign.read(path / "adapter_config.json"), load_file(str(path / "adapter.safetensors"))


# -- the tool's own files ---------------------------------------------------------------------------------------------


# What is written in other words: values for the network that makes them, products, rows that are not orthonormal.
OTHERWISE = (
    "union",
    "prompt",
    "prefix",
    "mam",
    "unipelt",
    "vera",
    "reft",
    "direft",
    "leave",
    "odd",
    "lora_gate",
    "vit_plus",
)


def check_written(fixture: Fixture, folder: Path) -> None:
    model = fixture.model()
    adapters = ak.Adapters(model)
    what = fixture.load(adapters)
    adapters.activate(what)
    expected = fixture.outputs(model)
    given = fixture.about["load"]
    if not isinstance(given, str):
        names = [*given["parts"], *(["fusion"] if "fusion" in given else [])]
        adapters.save(names, folder / "all", format="adapterhub")
        again = ak.Adapters(model := fixture.model())
        again.load_all(folder / "all")
        again.activate("fusion" if "fusion" in names else ak.Stack(*names))
        got = fixture.outputs(model)
        assert all(torch.allclose(got[key], expected[key], atol=1e-5) for key in got)
        return
    adapters.save(what, folder / "tiny", format="adapterhub")
    same(fixture, folder / "tiny", expected)
    config, tensors = written(folder / "tiny")
    theirs = foreign.read(fixture.path / given / "adapter_config.json")
    assert {key: config[key] for key in config if key != "model_name"} | {"config": 0} == {
        key: theirs[key] for key in theirs if key != "model_name"
    } | {"config": 0}
    if not any(word in fixture.path.name for word in OTHERWISE):
        assert config["config"] == theirs["config"]
        path = fixture.path / given / "adapter.safetensors"
        source = (
            load_file(str(path))
            if path.exists()
            else torch.load(path.with_name("pytorch_adapter.bin"), weights_only=True)
        )
        assert set(tensors) == set(source)
        assert all(torch.allclose(tensors[key], source[key], atol=1e-6) for key in tensors)


@pytest.mark.parametrize("name", foreign.named("adapterhub", HERE))
def test_files_of_the_tool_are_written_again(name: str, tmp_path: Path) -> None:
    check_written(Fixture(name, HERE), tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*takes a prompt's")
@pytest.mark.parametrize("name", foreign.named("adapterhub") or ["adapterhub"])
def test_all_files_of_the_tool_are_written_again(name: str, tmp_path: Path) -> None:
    check_written(Fixture(name, foreign.ELSEWHERE), tmp_path)


# -- adapters that are made here --------------------------------------------------------------------------------------

BERT, GPT2, T5, VIT = (
    "adapterhub_bert_loreft",
    "adapterhub_gpt2_lora",
    "adapterhub_t5_prefix_flat",
    "adapterhub_vit_double",
)
CLASSES = "adapterhub_bert_cls_compacter"

MADE = {
    "seq": (BERT, Bottleneck.pfeiffer(width=5)),
    "options": (BERT, Bottleneck.pfeiffer(width=5, gating="sequence", norm_before=True, norm_after="network")),
    "learnt": (VIT, Bottleneck.houlsby(width=3, scaling="learned", norm_after="sum")),
    "parallel_norm": (BERT, Bottleneck(form="parallel_norm", width=4, targets="attn mlp")),
    "sum": (BERT, Bottleneck.pfeiffer(width=3, residual="sum")),
    "input": (GPT2, Bottleneck.pfeiffer(width=3, residual="input")),
    "behind": (VIT, Bottleneck.adapter_plus(width=4)),
    "behind_norm": (BERT, Bottleneck.adapter_plus(width=4)),
    "by_layer": (
        BERT,
        Union(
            (
                Bottleneck.pfeiffer(targets="mlp@layer=0", width=3),
                Bottleneck.houlsby(targets="attn@layer=1 mlp@layer=1"),
            )
        ),
    ),
    "by_place": (
        T5,
        Union((Bottleneck.pfeiffer(targets="attn", width=3), Bottleneck.parallel(targets="mlp cross", width=5))),
    ),
    "widths_by_place": (
        BERT,
        Union((Bottleneck.pfeiffer(targets="attn", width=3), Bottleneck.pfeiffer(targets="mlp", width=5))),
    ),
    "widths": (
        BERT,
        Union(
            (Bottleneck.pfeiffer(targets="mlp@layer=0", width=3), Bottleneck.pfeiffer(targets="mlp@layer=1", width=7))
        ),
    ),
    "compacter": (BERT, ak.Compacter(n=2, reduction=4)),
    "own_rules": (GPT2, ak.Compacter.plus_plus(n=2, reduction=4, rank=2, shared_rule=False)),
    "lora": (GPT2, LoRA("attn.{q,v} mlp.{up,down}", rank=4, alpha=6)),
    "ranks": (BERT, LoRA("attn.{q,v} mlp.up", rank=4, alpha=6, ranks={"attn.v": 2}, alphas={"mlp.up": 3})),
    "rslora": (T5, LoRA("attn.q", rank=4, alpha=6, scaling="rank_stabilized")),
    "single": (GPT2, LoRA("attn.q@layer=0 mlp.down@layer=1", rank=2)),
    "fused": (GPT2, LoRA("fused.attn", rank=2)),
    "pissa": (BERT, LoRA("attn.q", rank=2, init="pissa")),
    "gated": (GPT2, Union((LoRA("attn.{q,v}", rank=2, alpha=6),), gating="sequence")),
    "dora": (BERT, ak.DoRA("attn.{q,v}", rank=2, alpha=8, scale_bias=True)),
    "dora_plain": (BERT, ak.DoRA("attn.{q,v}", rank=2, alpha=8, scale_bias=True, plain_norm=True)),
    "dora_single": (BERT, ak.DoRA("attn.q@layer=0 mlp.down", rank=2, scale_bias=True)),
    "ia3": (GPT2, IA3("attn.k mlp.up", scale_input=None)),
    "prefix": (GPT2, Prefix(length=3, reparam=5)),
    "prefix_gated": (BERT, Prefix(length=2, gating="separate")),
    "prefix_late": (BERT, Prefix("attn.kv@layer=1", length=2)),
    "prefix_counted": (T5, Prefix(length=2, counted=True)),
    "loreft": (VIT, ReFT(rank=2, prefix=2, suffix=1, tied=False)),
    "noreft": (GPT2, ReFT("hidden@layer=1", form="noreft", rank=2, suffix=2, activation="relu")),
    "inverted": (BERT, ak.Invertible("tokens")),
    "inverted_beside": (GPT2, Union((ak.Invertible("tokens", activation="gelu"), Bottleneck.pfeiffer(width=3)))),
    "mam": (BERT, Union((Prefix(length=2), Bottleneck.parallel(width=3)))),
    "head": (CLASSES, ak.Trainable("head")),
    "head_beside": (CLASSES, Union((ak.Trainable("head"), LoRA("attn.q", rank=2)))),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_written_is_read_as_the_same(name: str, tmp_path: Path) -> None:
    base, config = MADE[name]
    fixture = Fixture(base, HERE)
    adapters = stirred(model := fixture.model(), config)
    expected = fixture.outputs(model)
    adapters.save("it", tmp_path / "it", format="adapterhub")
    same(fixture, tmp_path / "it", expected)


REFUSED = {
    "gates of tokens": (BERT, Bottleneck.pfeiffer(gating=True), "one a token"),
    "a norm in front": (GPT2, Bottleneck(form="parallel_norm"), "form='parallel'"),
    "an output projection": (BERT, LoRA("attn.o"), "does not act at 'attn.o'"),
    "a bias apart": (BERT, ak.DoRA("attn.q"), "scale_bias"),
    "scaled inputs": (BERT, IA3(), "scale_input=None"),
    "prefixes that are not counted": (T5, Prefix(length=2), "where they are relative"),
    "prefixes that are": (BERT, Prefix(length=2, counted=True), "where they are relative"),
    "prompts": (GPT2, ak.Prompt(), "for encoders alone"),
    "direft": (BERT, ReFT(form="direft", prefix=1), "DiReFT"),
    "all positions": (BERT, ReFT(), "set prefix or suffix"),
    "an inverse": (GPT2, ak.Invertible(), "before the head in Qwen alone"),
    "gates of LoRA": (BERT, Union((LoRA("attn.q", rank=2),), gating=True), "averaged over the sequence, on LoRA"),
    "another coupling": (BERT, ak.Invertible("tokens", coupling="affine"), "'tokens@language': .*'additive' alone"),
    "a bias of the head": (CLASSES, ak.Trainable("head", part="bias"), "'head@language': .*saves whole layers"),
    "two lengths": (
        BERT,
        Union((Prefix("attn.kv@layer=0", length=2), Prefix("attn.kv@layer=1", length=3))),
        "prefixes of one length",
    ),
    "two edits": (
        GPT2,
        Union((ReFT("hidden@layer=0", rank=1, prefix=1), ReFT("hidden@layer=1", rank=2, prefix=1))),
        "one kind of ReFT in an adapter",
    ),
    "two compacters": (
        BERT,
        Union((ak.Compacter("mlp@layer=0", n=2), ak.Compacter("mlp@layer=1", n=4))),
        "one kind of compacter",
    ),
    "DoRA of GPT-2": (GPT2, ak.DoRA("attn.q", rank=2, scale_bias=True), "attn.q@language.0.*layers of GPT-2's kind"),
    "two at a point": (
        BERT,
        Union((LoRA("attn.q", rank=3), IA3("attn.q", scale_input=None))),
        "one of LoRA's kind at a point",
    ),
    "two of a kind": (BERT, Union((LoRA("attn.q"), IA3("attn.k", scale_input=None))), "one of LoRA's kind"),
    "padding that counts": (BERT, Prefix(length=2, padded=True), "padding as positions: padded=False"),
    "padding before a prompt": (BERT, ak.Prompt(length=2, padded=True), "padding as positions: padded=False"),
    "some attentions of a layer": (
        T5,
        Union((Prefix("attn.kv", length=2, counted=True), Prefix("cross.kv@layer=0", length=2))),
        "every attention of a kind but for whole layers",
    ),
    "layers without relative positions": (
        T5,
        Prefix("attn.kv@stack=encoder", length=2, counted=True),
        "drops the relative positions",
    ),
    "parallel behind a norm": (BERT, Bottleneck.parallel(norm_after="sum"), "output, before any norm"),
    "the sum of a network": (BERT, Bottleneck.houlsby(residual="sum"), "cannot say residual='sum' with form='houlsby'"),
    "parallel to a block": (BERT, Bottleneck("hidden", form="parallel"), "form='houlsby' and residual='sublayer'"),
    "two behind a block": (
        BERT,
        Union((Bottleneck("hidden", form="houlsby", width=2), Bottleneck.houlsby(targets="mlp", width=2))),
        "one bottleneck at 'mlp' of a block",
    ),
    "two bottlenecks": (
        BERT,
        Union((Bottleneck.pfeiffer(width=2), ak.Compacter("mlp", n=2, reduction=4))),
        "one bottleneck at a point",
    ),
    "an odd inverse": (BERT, ak.Invertible("tokens", reduction=1.5), "no invertible adapter of width 5 for 8 features"),
    "norms of columns": (BERT, ak.DoRA("attn.q", rank=2, over="outputs"), "DoRA over the inputs of each output"),
    "norms of two scales": (
        BERT,
        ak.DoRA("attn.{q,v}", rank=2, alpha=8, alphas={"attn.v": 3}, scale_bias=True, plain_norm=True),
        "one scale for all of DoRA",
    ),
    "a change of a head": (CLASSES, ak.Trainable("head", rows=(0,)), "whole layers of the model's own head"),
    "norms": (CLASSES, ak.Trainable("norm"), "the model's head"),
    "a tied head": (GPT2, ak.Trainable("head"), "tied"),
    "another type": (BERT, ak.AdaLoRA("attn.q"), "no method for adalora"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_tool_cannot_say_is_refused(name: str, tmp_path: Path) -> None:
    base, config, told = REFUSED[name]
    adapters = stirred(Fixture(base, HERE).model(), config)
    with pytest.raises(errors.UnsupportedFileError, match=told) as caught:
        adapters.save("it", tmp_path / "it", format="adapterhub")
    assert "native holds any adapter" in str(caught.value)
    assert not (tmp_path / "it").exists()


def test_models_that_the_tool_does_not_know(tmp_path: Path) -> None:
    adapters = stirred(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRA("all", rank=2))
    with pytest.raises(errors.UnsupportedFileError, match="these types of models"):
        adapters.save("it", tmp_path / "it", format="adapterhub")


@pytest.mark.parametrize(
    ("config", "told"),
    [(ak.Prompt(length=3, reparam="mlp"), "takes a prompt's"), (LoRA("attn.q", rank_dropout=0.1), "one dropout")],
)
def test_what_is_other_in_the_tool_is_told(config: ak.AdapterConfig, told: str, tmp_path: Path) -> None:
    fixture = Fixture(BERT, HERE)
    adapters = stirred(model := fixture.model(), config)
    expected = fixture.outputs(model)
    with pytest.warns(UserWarning, match=told):
        adapters.save("it", tmp_path / "it", format="adapterhub")
    same(fixture, tmp_path / "it", expected)


# -- what stands in the files -----------------------------------------------------------------------------------------


def test_a_config_says_where_and_how_wide(tmp_path: Path) -> None:
    base, config = MADE["widths"]
    stirred(Fixture(base, HERE).model(), config).save("it", tmp_path / "my.name", format="adapterhub")
    said, tensors = written(tmp_path / "my.name")
    assert (said["name"], said["model_type"], said["version"]) == ("my_name", "bert", "adapters.1.3.0")
    assert said["config"]["reduction_factor"] == {"0": 16 / 3.5, "1": 16 / 7.5}
    assert (said["config"]["output_adapter"], said["config"]["mh_adapter"]) == (True, False)
    assert tensors["encoder.layer.0.output.adapters.my_name.adapter_down.0.weight"].shape == (3, 16)


def test_several_configs_pass_the_tools_check(tmp_path: Path) -> None:
    """It compares flags, unless one of two configs leaves layers out."""
    base, config = MADE["by_layer"]
    stirred(Fixture(base, HERE).model(), config).save("it", tmp_path / "it", format="adapterhub")
    configs = written(tmp_path / "it")[0]["config"]["configs"]
    assert [one["leave_out"] for one in configs] == [[1], [0]]


def test_ranks_become_the_largest(tmp_path: Path) -> None:
    base, config = MADE["ranks"]
    stirred(Fixture(base, HERE).model(), config).save("it", tmp_path / "it", format="adapterhub")
    said, tensors = written(tmp_path / "it")
    assert (said["config"]["r"], said["config"]["attn_matrices"]) == (4, ["q", "v"])
    assert not tensors["encoder.layer.0.attention.self.value.loras.it.lora_A"][2:].any()


def test_orthonormal_rows_are_written_as_torch_parametrizes_them(tmp_path: Path) -> None:
    base, config = MADE["loreft"]
    stirred(Fixture(base, HERE).model(), config).save("it", tmp_path / "it", format="adapterhub")
    said, tensors = written(tmp_path / "it")
    assert said["config"]["orthogonality"] is True
    assert any("parametrizations.weight.original" in key for key in tensors)


def test_a_fusion_and_its_parts(tmp_path: Path) -> None:
    fixture = Fixture(BERT, HERE)
    model = fixture.model()
    adapters = stirred(model, Bottleneck.houlsby(targets="mlp", width=3))
    adapters.add("other", Bottleneck.pfeiffer(width=5, init="bert"))
    adapters.add("mixed", ak.Fuse(("it", "other"), temperature=2.0))
    adapters.activate("mixed")
    expected = fixture.outputs(model)
    adapters.save(["it", "other", "mixed"], tmp_path / "all", format="adapterhub")
    assert (tmp_path / "all" / "it,other" / "adapter_fusion_config.json").exists()
    setup = foreign.read(tmp_path / "all" / "adapter_setup.json")
    assert setup["adapter_setup"]["type"] == "Fuse"
    again = ak.Adapters(model := fixture.model())
    again.load_all(tmp_path / "all")
    again.activate("fusion")
    got = fixture.outputs(model)
    assert all(torch.allclose(got[key], expected[key], atol=1e-5) for key in got)
    adapters.add("swapped", ak.Fuse(("other", "it")))
    with pytest.raises(errors.UnsupportedFileError, match="query='part'"):
        adapters.save(["it", "other", "swapped"], tmp_path / "no", format="adapterhub")


@pytest.mark.parametrize("options", [{"dropout": 0.25, "regularisation": 0.0}, {"value": False, "query": "output"}])
def test_what_a_fusion_is_trained_with(options: dict[str, Any], tmp_path: Path) -> None:
    adapters = stirred(model := Fixture(BERT, HERE).model(), Bottleneck.houlsby(targets="mlp", width=3))
    adapters.add("other", Bottleneck.pfeiffer(width=5))
    adapters.add("mixed", ak.Fuse(("it", "other"), **options))
    adapters.save(["it", "other", "mixed"], tmp_path, format="adapterhub")
    [path] = tmp_path.glob("*/adapter_fusion_config.json")
    said = json.loads(path.read_text())["config"]
    assert said["dropout_prob"] == options.get("dropout")
    assert said["regularization"] is ("dropout" not in options)
    assert (said["value"], said["query_before_ln"]) == (options.get("value", True), "query" in options)
    adapters.detach()
    (again := ak.Adapters(model)).load_all(tmp_path)
    config: Any = again.config("fusion")
    assert (config.dropout, config.value) == (options.get("dropout", 0), options.get("value", True))
    assert config.query == options.get("query", "part")
    assert (config.regularisation > 0) is ("dropout" not in options)


def test_dtypes(tmp_path: Path) -> None:
    adapters = stirred(Fixture(BERT, HERE).model(), Bottleneck.pfeiffer(width=5))
    adapters.save("it", tmp_path / "it", format="adapterhub", dtype=torch.float16)
    assert {tensor.dtype for tensor in written(tmp_path / "it")[1].values()} == {torch.float16}


def test_an_old_folder_keeps_nothing_of_another_adapter(tmp_path: Path) -> None:
    """What the tool would rather read: a pickle, and a head."""
    shutil.copytree(HERE / CLASSES / "files", tmp_path / "it")
    adapters = stirred(Fixture(CLASSES, HERE).model(), Bottleneck.pfeiffer(width=5))
    adapters.save("it", tmp_path / "it", format="adapterhub")
    again = ak.Adapters(Fixture(CLASSES, HERE).model())
    again.load(tmp_path / "it", "it")
    assert json.loads((tmp_path / "it" / "adapter_config.json").read_text())["config"]["phm_layer"] is False
