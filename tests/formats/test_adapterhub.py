"""AdapterHub's files: what they say is what the model computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit import errors
from tests.formats import foreign
from tests.formats.foreign import Fixture

HERE = foreign.HERE / "adapterhub"

# With sdpa the tool's prompts look at padding, and tokens behind them see it through them: the rows without are equal.
PADDED = {"adapterhub_bert_prompt", "adapterhub_bert_prompt_prefix", "adapterhub_roberta_prompt"}


@pytest.mark.slow
def test_direft_is_what_the_user_says_it_is() -> None:
    fixture = Fixture("adapterhub_bert_direft", foreign.ELSEWHERE)
    foreign.check(fixture, direft=True)
    report = ak.Adapters(fixture.model()).load(fixture.path / "files")
    assert "load it with direft=True" in "".join(report.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PADDED))
def test_prompts_without_padding(name: str) -> None:
    fixture = Fixture(name, foreign.ELSEWHERE)
    model = fixture.model()
    adapters = ak.Adapters(model)
    adapters.activate(fixture.load(adapters))
    behind_bos = fixture.about["name"].endswith("prompt_prefix")
    got = fixture.outputs(model)["model/last_hidden_state"][0, behind_bos:]
    expected = fixture.expected["model/last_hidden_state"][0, -len(got) :]
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to be changed: ReFT on BERT."""
    shutil.copytree(HERE / "adapterhub_bert_loreft" / "files", tmp_path / "it")
    return tmp_path / "it"


@pytest.fixture
def bert() -> Any:
    return Fixture("adapterhub_bert_loreft", HERE).model()


def change(folder: Path, **fields: Any) -> Path:
    """The folder with other fields in its config; None takes one out."""
    path = folder / "adapter_config.json"
    value = json.loads(path.read_text())
    value["config"] = {key: one for key, one in {**value["config"], **fields}.items() if one is not ...}
    path.write_text(json.dumps(value))
    return folder


def test_the_report_says_what_was_read(bert: Any, folder: Path) -> None:
    report = ak.Adapters(bert).load(folder)
    assert (report.type, report.read.format, report.read.tool) == ("reft", "adapterhub", "AdapterHub adapters")
    assert report.read.version == "adapters.1.3.0"
    assert "BertModel" in report.read.base
    assert set(report.read.matched) == set(load_file(str(folder / "adapter.safetensors")))
    assert not report.read.unmatched
    assert not report.read.left_over


def test_a_single_file_is_read_with_the_config_beside_it(bert: Any, folder: Path) -> None:
    adapters = ak.Adapters(bert)
    assert adapters.load(folder / "adapter.safetensors", "one").read.format == "adapterhub"
    (folder / "adapter_config.json").unlink()
    with pytest.raises(errors.CheckpointError):
        adapters.load(folder / "adapter.safetensors", "two")


def test_pickles_are_opened_by_permission_alone() -> None:
    fixture = Fixture("adapterhub_bert_unipelt", HERE)
    with pytest.raises(errors.UnsupportedFileError, match=r"pytorch_adapter\.bin.*allow_pickle=True"):
        ak.Adapters(fixture.model()).load(fixture.path / "files")


def test_a_safetensors_file_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """0x0280 bytes of header: the first two are those of a pickle of protocol 2."""
    from adapterkit.formats.source import Source

    for pad in range(700):
        save_file({"x": torch.ones(2)}, str(tmp_path / "it.safetensors"), metadata={"pad": "p" * pad})
        if (tmp_path / "it.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    assert list(Source.of(tmp_path / "it.safetensors", allow_pickle=True).entries) == ["x"]


def test_files_of_a_head_that_the_model_has() -> None:
    fixture = Fixture("adapterhub_bert_cls_compacter", HERE)
    report = ak.Adapters(fixture.model()).load(fixture.path / "files")
    assert report.type == "compacter"
    assert "the head is the model's own" in report.notes
    assert {"classifier.weight", "classifier.bias"} <= set(report.read.matched)


@pytest.fixture
def head(tmp_path: Path) -> tuple[Any, Path, dict[str, torch.Tensor]]:
    fixture = Fixture("adapterhub_bert_cls_compacter", HERE)
    shutil.copytree(fixture.path / "files", tmp_path / "it")
    tensors = {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3)}
    save_file(tensors, str(tmp_path / "it" / "model_head.safetensors"))
    return fixture.model(), tmp_path / "it", tensors


def test_a_head_of_other_values_is_switched_with_the_adapter(head: tuple[Any, Path, dict[str, torch.Tensor]]) -> None:
    model, path, tensors = head
    adapters = ak.Adapters(model)
    report = adapters.load(path)
    assert report.type == "compacter + trainable"
    module = adapters.modules("it")["head@language"]
    assert torch.equal(module.weight, tensors["classifier.weight"])  # type: ignore[arg-type]
    (path / "adapter_config.json").unlink()  # a folder of a head alone
    assert adapters.load(path, "head").type == "trainable"


def test_a_head_that_the_model_has_not_is_reported(head: tuple[Any, Path, dict[str, torch.Tensor]], bert: Any) -> None:
    model, path, _ = head
    for shape, told in (((5, 16), "another shape"), ((3, 16), "")):
        save_file(
            {"classifier.weight": torch.randn(shape), "classifier.bias": torch.randn(shape[0])},
            str(path / "model_head.safetensors"),
        )
        if told:
            with pytest.raises(errors.UnexpectedKeysError, match=r"classifier\.(bias|weight)"):
                ak.Adapters(model).load(path)
            report = ak.Adapters(model).load(path, "loose", strict=False)
            assert told in "".join(report.notes)
            assert len(report.read.unmatched) == 2
    save_file({"heads.mine.1.weight": torch.randn(3, 16)}, str(path / "model_head.safetensors"))
    report = ak.Adapters(bert).load(path, strict=False)
    assert "AdapterHub's own classes" in "".join(report.notes)


def test_heads_where_the_transform_is_undone_are_reported(tmp_path: Path) -> None:
    """An invertible adapter acts at the head: a head of other values is not beside it."""
    model = Fixture("adapterhub_gpt2_lora", HERE).model()
    config = {"mh_adapter": False, "output_adapter": False, "reduction_factor": 2, "non_linearity": "relu",
              "inv_adapter": "nice", "inv_adapter_reduction_factor": 2}  # fmt: skip
    write(tmp_path, config, {}, model_type="gpt2", model_class="GPT2AdapterModel")
    tensors = {f"transformer.invertible_adapters.it.{net}.{i}.{what}": torch.randn(shape)
               for net in "FG" for i, what, shape in ((0, "weight", (4, 8)), (0, "bias", (4,)), (2, "weight", (8, 4)),
                                                      (2, "bias", (8,)))}  # fmt: skip
    save_file(tensors, str(tmp_path / "adapter.safetensors"))
    adapters = ak.Adapters(model)
    adapters.load(tmp_path, "it")
    assert set(adapters.modules("it")) == {"tokens@language", "head@language"}
    (tmp_path / "head_config.json").write_text(json.dumps({"model_class": "GPT2LMHeadModel"}))
    save_file({"lm_head.weight": torch.randn(60, 16)}, str(tmp_path / "model_head.safetensors"))
    with pytest.raises(errors.UnexpectedKeysError, match=r"lm_head\.weight"):
        adapters.load(tmp_path, "strict")
    write(tmp_path, config, tensors, model_type="gpt2", model_class="GPT2LMHeadModel")
    adapters.load(tmp_path, "static")  # the tool does not undo it there: the head is then beside it
    assert type(adapters.modules("static")["head@language"]).__name__ == "FullWeight"


def write(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], **others: Any) -> Path:
    """A folder of an adapter that is named it."""
    path.mkdir(exist_ok=True)
    whole = {"config": config, "name": "it", "model_type": "bert", "version": "adapters.1.3.0", **others}
    (path / "adapter_config.json").write_text(json.dumps(whole))
    save_file(tensors, str(path / "adapter.safetensors"))
    return path


def lora(rank: int = 2, layers: int = 2, **tails: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors of LoRA at the queries and values of BERT."""
    shapes = tails or {"lora_A": (rank, 16), "lora_B": (16, rank)}
    return {
        f"bert.encoder.layer.{i}.attention.self.{role}.loras.it.{name.replace('__', '.')}": torch.randn(shape)
        for i in range(layers)
        for role in ("query", "value")
        for name, shape in shapes.items()
    }


LORA = {"architecture": "lora", "r": 2, "alpha": 6, "attn_matrices": ["q", "v"]}


def modules(model: Any, path: Path, **options: Any) -> dict[str, Any]:
    adapters = ak.Adapters(model)
    try:
        adapters.load(path, "it", **options)
        return dict(adapters.modules("it"))
    finally:
        adapters.detach()


@pytest.mark.parametrize(("version", "scale"), [("adapters.1.0.1", 1.0), ("adapters.1.1.0", 3.0), ("3.2.1", 3.0)])
def test_releases_that_trained_lora_without_its_scale(bert: Any, tmp_path: Path, version: str, scale: float) -> None:
    found = modules(bert, write(tmp_path / "it", LORA, lora(), version=version))
    assert {module.scale for module in found.values()} == {scale}


def test_mtl_lora_is_the_weighted_sum_of_its_projections(bert: Any, tmp_path: Path) -> None:
    config = {**LORA, "architecture": "mtl_lora", "n_up_projection": 3, "weights_sharpness": 0.5}
    tensors = lora(lora_A=(2, 16), lora_B=(3, 16, 2), task_specific__values=(2,), weights=(3,))
    found = modules(bert, write(tmp_path / "it", config, tensors))
    own = {key.rpartition(".it.")[2]: t for key, t in tensors.items() if ".1.attention.self.value." in key}
    w = (own["weights"] / 0.5).exp()
    x = torch.randn(4, 16)
    up = own["lora_B"].unsqueeze(1)
    expected = x @ own["lora_A"].mT @ torch.diag(own["task_specific.values"]) @ up.mT
    expected = (w[:, None, None, None] * expected).sum(0)[0] / w.sum() * 3
    assert torch.allclose(found["attn.v@language.1"].delta(x), expected, rtol=1e-4, atol=1e-4)


def test_dvora_is_dora_of_dense_matrices(bert: Any, tmp_path: Path) -> None:
    config = {**LORA, "vera_d": 0.1, "vera_b": 0.0, "use_dora": True}
    tensors = lora(vera_D=(2, 2), vera_B=(16, 16), m__weight=(16, 1))
    tensors |= {
        "bert.shared_parameters.it.lora_A": torch.randn(2, 16),
        "bert.shared_parameters.it.lora_B": torch.randn(16, 2),
    }
    found = modules(bert, write(tmp_path / "it", config, tensors))["attn.q@language.0"]
    own = {
        key.rpartition(".it.")[2]: t
        for key, t in tensors.items()
        if ".0.attention.self.query." in key or "shared" in key
    }
    product = own["vera_B"] @ own["lora_B"] @ own["vera_D"] @ own["lora_A"]
    weight, bias = bert.encoder.layer[0].attention.self.query.weight, bert.encoder.layer[0].attention.self.query.bias
    ratio = own["m.weight"] / (weight + product).norm(dim=1, keepdim=True)
    merged = found.merged(weight, bias)
    assert torch.allclose(merged[0], ratio * (weight + 3 * product), rtol=1e-4, atol=1e-3)
    assert torch.allclose(merged[1], ratio[:, 0] * bias, rtol=1e-4)


def test_what_a_bare_model_has_lost_is_beyond_repair(bert: Any, tmp_path: Path) -> None:
    config = {**LORA, "vera_d": 0.1, "vera_b": 0.0}
    with pytest.raises(errors.MissingKeysError, match=r"save the adapter again from a model that has one"):
        modules(bert, write(tmp_path / "vera", config, lora(vera_D=(2, 2), vera_B=(16, 16))))
    fixture = Fixture("adapterhub_bert_cls_compacter", HERE)
    shutil.copytree(fixture.path / "files", tmp_path / "compacter")
    path = tmp_path / "compacter" / "adapter.safetensors"
    save_file({key: t for key, t in load_file(str(path)).items() if "shared" not in key}, str(path))
    with pytest.raises(errors.MissingKeysError, match=r"beyond repair"):
        modules(fixture.model(), path.parent)


def phm(**tails: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"encoder.layer.{i}.output.adapters.it.{name}": torch.randn(shape) for i in range(2)
            for name, shape in tails.items()}  # fmt: skip


PHM = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 2, "non_linearity": "relu", "phm_layer": True,
       "phm_dim": 2, "original_ln_before": True}  # fmt: skip


@pytest.mark.parametrize("case", ["factorised rule", "dense weights", "shared weights", "no bias"])
def test_every_way_to_write_kronecker_products(bert: Any, tmp_path: Path, case: str) -> None:
    """Each is read as factors and a rule that make the same matrices."""
    factors = {"W_left": (2, 8, 1), "W_right": (2, 1, 4)}, {"W_left": (2, 4, 1), "W_right": (2, 1, 8)}
    config, tails, shared = dict(PHM), {}, {"phm_rule": torch.randn(2, 2, 2)}
    for place, own, out in (("adapter_down.0", factors[0], 8), ("adapter_up", factors[1], 16)):
        tails |= {f"{place}.{name}": shape for name, shape in own.items()} | {f"{place}.b": (out,)}
    if case == "factorised rule":
        config |= {"factorized_phm_rule": True}
        shared = {"phm_rule_left": torch.randn(2, 2, 1), "phm_rule_right": torch.randn(2, 1, 2)}
    elif case == "dense weights":
        config |= {"factorized_phm_W": False}
        tails = {name: shape for name, shape in tails.items() if "W_" not in name}
        tails |= {"adapter_down.0.W": (2, 8, 4), "adapter_up.W": (2, 4, 8)}
    elif case == "shared weights":
        config |= {"shared_W_phm": True}
        tails = {name: shape for name, shape in tails.items() if "W_" not in name}
        shared |= {"W_down_left": torch.randn(2, 8, 1), "W_down_right": torch.randn(2, 1, 4),
                   "W_up_left": torch.randn(2, 4, 1), "W_up_right": torch.randn(2, 1, 8)}  # fmt: skip
    else:
        config |= {"phm_bias": False}
        tails = {name: shape for name, shape in tails.items() if not name.endswith(".b")}
    tensors = phm(**tails) | {f"bert.shared_parameters.it.{name}": t for name, t in shared.items()}
    found = modules(bert, write(tmp_path / "it", config, tensors))["mlp@language.1"]
    x = torch.randn(3, 16)
    rule = shared["phm_rule"] if "phm_rule" in shared else shared["phm_rule_left"] @ shared["phm_rule_right"]
    own = {key.rpartition(".it.")[2]: t for key, t in tensors.items() if ".layer.1." in key}
    if case == "dense weights":
        w = own["adapter_down.0.W"]
    elif case == "shared weights":
        w = shared["W_down_left"] @ shared["W_down_right"]
    else:
        w = own["adapter_down.0.W_left"] @ own["adapter_down.0.W_right"]
    expected = x @ sum(torch.kron(rule[i], w[i]) for i in range(2)) + own.get("adapter_down.0.b", torch.zeros(8))
    assert torch.allclose(found.reduce(x), expected, rtol=1e-4, atol=1e-4)
    assert found.expand(found.reduce(x)).shape == (3, 16)


def test_a_fused_layer_multiplies_what_it_does_not_adapt(tmp_path: Path) -> None:
    """With another alpha than 1, the tool's (IA)3 scales the queries of GPT-2 by it, which nobody asked for."""
    model = Fixture("adapterhub_gpt2_lora", HERE).model()
    config = {"architecture": "lora", "composition_mode": "scale", "r": 1, "alpha": 2, "attn_matrices": ["k", "v"]}
    tensors = {f"transformer.h.{i}.attn.c_attn.loras.it.lora_B": torch.randn(32, 1) for i in range(2)}
    found = modules(model, write(tmp_path / "it", config, tensors, model_type="gpt2"))
    assert torch.equal(found["attn.q@language.0"].scale, torch.full((16,), 2.0))
    assert torch.equal(
        found["attn.v@language.0"].scale, 2 * tensors["transformer.h.0.attn.c_attn.loras.it.lora_B"][16:, 0]
    )


def test_old_files_say_their_configs_by_name_and_their_places_by_other_words(bert: Any, tmp_path: Path) -> None:
    names = {"adapter_down.0.weight": (1, 16), "adapter_down.0.bias": (1,), "adapter_up.weight": (16, 1),
             "adapter_up.bias": (16,)}  # fmt: skip
    tensors = {f"bert.encoder.layer.{i}.output.layer_text_task_adapters.it.{name}": torch.randn(shape)
               for i in range(2) for name, shape in names.items()}  # fmt: skip
    path = write(tmp_path / "it", {}, tensors, version=None, type="text_task")
    value = json.loads((path / "adapter_config.json").read_text())
    own = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "leave_out": None}
    own |= {"non_linearity": "gelu", "original_ln_before": True, "new_attention_norm": False}
    for config in ("pfeiffer", own):
        del value["version"]
        (path / "adapter_config.json").write_text(json.dumps({**value, "config": config}))
        value["version"] = None
        module = modules(bert, path)["mlp@language.1"]
        assert module.config.form == "pfeiffer"
        assert module.config.activation == ("relu" if config == "pfeiffer" else "gelu_new")


def test_a_setup_is_all_of_its_adapters(bert: Any, folder: Path, tmp_path: Path) -> None:
    setup = tmp_path / "setup"
    setup.mkdir()
    for name in ("a", "b"):
        shutil.copytree(folder, setup / name)
        single = [{"type": "single", "children": [one]} for one in ("a", "b")]
    (setup / "adapter_setup.json").write_text(json.dumps({"adapter_setup": {"type": "Stack", "children": single}}))
    adapters = ak.Adapters(bert)
    with pytest.raises(errors.UnsupportedFileError, match=r"several adapters \(a, b\); Adapters.load_all"):
        adapters.load(setup)
    reports = adapters.load_all(setup)
    assert list(reports) == ["a", "b"]
    assert "the setup is Stack(a, b)" in reports["a"].notes[0]
    adapters.detach()


@pytest.mark.parametrize(
    "setup",
    [None, {}, {"type": "Stack", "children": []}, {"type": "single", "children": [3]}, {"type": 3, "children": [1]},
     {"type": "Stack", "children": [{"type": "single", "children": ["../it"]}]}],
)  # fmt: skip
def test_setups_that_are_none(bert: Any, tmp_path: Path, setup: Any) -> None:
    (tmp_path / "adapter_setup.json").write_text(json.dumps({"adapter_setup": setup}))
    with pytest.raises(errors.CheckpointError):
        ak.Adapters(bert).load_all(tmp_path)


def test_a_model_without_its_weights_is_read_too(folder: Path) -> None:
    """`inspect` has no model: ids are then of the file."""
    from adapterkit.formats import registry
    from adapterkit.formats.source import Source
    from adapterkit.points import Points

    for name in foreign.named("adapterhub", HERE):
        source = Source.of(HERE / name / "files", allow_pickle=True)
        found, report = registry.find_format(source).read(source, Points([]), ak_options())
        assert found[""].parts
        assert not report.left_over


def ak_options() -> Any:
    from adapterkit.formats.adapterhub import AdapterHubReadOptions

    return AdapterHubReadOptions(strict=False)


def test_embedded_sequences_that_the_tool_transforms_elsewhere(tmp_path: Path) -> None:
    """In BART it is behind a norm."""
    import transformers

    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20}
    model = transformers.BartModel(transformers.BartConfig(d_model=16, **sizes, **layers))
    adapters = ak.Adapters(model)
    adapters.add("it", ak.Invertible("tokens@component=language"))
    with pytest.raises(errors.UnsupportedFileError, match="native holds any"):
        adapters.save("it", tmp_path / "it", format="adapterhub")
    given = {"architecture": None, "mh_adapter": False, "output_adapter": False, "reduction_factor": 16}
    given |= {"non_linearity": "relu", "inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
    (tmp_path / "inv").mkdir()
    value = {"config": given, "model_type": "bart", "name": "it", "version": "adapters.1.3.0"}
    (tmp_path / "inv" / "adapter_config.json").write_text(json.dumps(value))
    nets = {f"{net}.{i}": (4, 8) if i == 0 else (8, 4) for net in "FG" for i in (0, 2)}
    keys = {f"encoder.invertible_adapters.it.{key}.weight": torch.ones(shape) for key, shape in nets.items()}
    keys |= {f"encoder.invertible_adapters.it.{key}.bias": torch.ones(shape[0]) for key, shape in nets.items()}
    save_file(keys, str(tmp_path / "inv" / "adapter.safetensors"))
    with pytest.raises(errors.BaseMismatchError, match="no such point as the tool has"):
        adapters.load(tmp_path / "inv", "inv")


def test_a_bias_of_zeros_above_the_head(head: tuple[Any, Path, dict[str, torch.Tensor]]) -> None:
    """BART's buffer stands in the file of its head."""
    model, path, tensors = head
    save_file({**tensors, "final_logits_bias": torch.zeros(1, 3)}, str(path / "model_head.safetensors"))
    report = ak.Adapters(model).load(path)
    assert "final_logits_bias" in report.read.matched
