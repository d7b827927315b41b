"""Commands on adapter files: what they write does what their library functions say, and what is wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import adapterkit as ak
from adapterkit.cli.main import main

LORA = ak.LoRA(rank=4, alpha=6, targets="attn.q mlp.down")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=40, tie_word_embeddings=False, **sizes))
    folder = tmp_path_factory.mktemp("cli") / "base"
    model.save_pretrained(folder)
    return folder


def handle(base: Path) -> tuple[Any, ak.Adapters]:
    model = AutoModelForCausalLM.from_pretrained(base)
    return model, ak.Adapters(model)


def saved(base: Path, path: Path, config: ak.AdapterConfig = LORA, seed: int = 0, **options: Any) -> Path:
    _, adapters = handle(base)
    adapters.add("a", config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return adapters.save("a", path, **options)


def changes(base: Path, file: Path, weight: float = 1.0) -> dict[str, Tensor]:
    """What a file's adapter adds to each weight of the base."""
    model, adapters = handle(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters.load(file, "a")
    adapters.bake({"a": weight})
    return {
        name: tensor - before[name]
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], atol=tolerance) for n in one)


def test_convert_there_and_back(base: Path, tmp_path: Path):
    file = saved(base, tmp_path / "a.safetensors")
    done("convert", file, "--format", "peft", "--base", base, "-o", tmp_path / "peft")
    assert (tmp_path / "peft/adapter_config.json").is_file()
    assert close(changes(base, tmp_path / "peft"), changes(base, file))
    done("convert", tmp_path / "peft", "--format", "native", "--base", base, "-o", tmp_path / "b.safetensors")
    assert close(changes(base, tmp_path / "b.safetensors"), changes(base, file), 0.0)


def test_a_dtype(base: Path, tmp_path: Path):
    file = saved(base, tmp_path / "a.safetensors")
    done("convert", file, "--dtype", "float16", "-o", tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    done("resize", tmp_path / "half.safetensors", "--rank", 2, "-o", tmp_path / "small.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "small.safetensors").values()} == {torch.float16}


def test_what_a_format_cannot_say_is_written_as_the_nearest_where_that_is_asked_for(base: Path, tmp_path: Path):
    from adapterkit_lycoris.lokr import LoKr

    file = saved(base, tmp_path / "a.safetensors", LoKr(rank=2, factor=4, targets="attn.q"))
    arguments = ("convert", file, "--format", "kohya", "--base", base, "-o", tmp_path / "b.safetensors")
    text = done("resize", file, "--error", 0.5, "--base", base, "-o", tmp_path / "c.safetensors")
    assert "error 0." in text
    result = call(*arguments, "--rank", 4)
    assert result.exit_code == 2
    assert "ranks are for --approximate" in result.stderr
    text = done("convert", file, "--format", "peft", "--base", base, "--approximate", "--rank", 3, "-o", tmp_path / "d")
    assert "rank 3 at 2 points" in text
    assert json.loads((tmp_path / "d/adapter_config.json").read_text())["peft_type"] == "LORA"


def test_without_the_base_names_stay_those_of_the_file(base: Path, tmp_path: Path):
    folder = saved(base, tmp_path / "peft", format="peft")
    result = call("convert", folder, "--format", "kohya", "-o", tmp_path / "b.safetensors")
    assert result.exit_code == 1
    assert "--base MODEL" in result.stderr
    done("resize", folder, "--rank", 2, "-o", tmp_path / "small")
    text = done("diff", folder, tmp_path / "small")
    assert "differ at 4 of 4 points" in text
    names = [{*load_file(each / "adapter_model.safetensors")} for each in (folder, tmp_path / "small")]
    assert names[0] == names[1]
    whole, small = changes(base, folder), changes(base, tmp_path / "small")
    for name, change in whole.items():
        u, s, vh = torch.linalg.svd(change)
        torch.testing.assert_close(small[name], (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5, rtol=1e-4)


def test_resize_recommends_a_rank(base: Path, tmp_path: Path):
    file = saved(base, tmp_path / "a.safetensors")
    text = done("resize", file, "--error", 0.3)
    found = json.loads(done("resize", file, "--error", 0.3, "--json"))
    assert f"rank {found['rank']} is enough for an error of 0.3" in text
    done("resize", file, "--rank", found["rank"], "-o", tmp_path / "b.safetensors")
    report = json.loads(done("resize", file, "--error", 0.3, "-o", tmp_path / "c.safetensors", "--json"))
    assert {key: one["rank"] for key, one in found["points"].items()} == {
        key: one["rank"] for key, one in report["points"].items()
    }
    assert report["error"] <= 0.3
    result = call("resize", file, "-o", tmp_path / "d.safetensors")
    assert (result.exit_code, "say what to keep" in result.stderr) == (2, True)


def test_combine(base: Path, tmp_path: Path):
    one = saved(base, tmp_path / "a.safetensors")
    other = saved(base, tmp_path / "b", ak.LoRA(rank=2, targets="attn.q attn.v"), 1, format="peft")
    result = call("combine", one, other, "-o", tmp_path / "c.safetensors")
    assert result.exit_code == 2
    assert "add --base MODEL" in result.stderr
    output = tmp_path / "c.safetensors"
    done("combine", one, other, "-w", 0.5, "-w", -2, "--base", base, "-o", output)
    left, right = changes(base, one, 0.5), changes(base, other, -2.0)
    zero = torch.zeros(())
    expected = {name: left.get(name, zero) + right.get(name, zero) for name in {**left, **right}}
    assert close(dict(sorted(changes(base, output).items())), dict(sorted(expected.items())))
    blocks = ("--block", "attn.*=0", "--block", "2:attn.v=1")
    done("combine", one, other, "--base", base, *blocks, "-o", tmp_path / "d.safetensors")
    assert {name.split(".")[-2] for name in changes(base, tmp_path / "d.safetensors")} == {"down_proj", "v_proj"}
    text = done(
        "combine", one, other, "--method", "ties", "--base", base, "--rank", 4, "-o", tmp_path / "e.safetensors"
    )
    assert "error" in text


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("-w", "1", "-w", "2"), 2, "one -w for each of the 1 files"),
        (("--block", "attn.q"), 2, "expected SELECTOR=FACTOR"),
        (("--block", "3:attn.q=1"), 2, "there are 1 files"),
        (("--block", "attn.x=1"), 1, "'attn.x' matches none of its points"),
        (("--energy", "2"), 1, "energy must be more than 0"),
        (("--format", "natve"), 1, "natve"),
    ],
)
def test_what_is_wrong_is_one_line(base: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, told: str):
    file = saved(base, tmp_path / "a.safetensors")
    result = call("combine", file, *arguments, "-o", tmp_path / "b.safetensors")
    assert result.exit_code == code, result.output
    assert told in result.stderr
    assert not (tmp_path / "b.safetensors").exists()


def test_extract_and_bake_are_inverse(base: Path, tmp_path: Path):
    file = saved(base, tmp_path / "a.safetensors")
    text = done("bake", base, file, tmp_path / "tuned", "--weight", 0.5)
    assert "4 tensors in model.safetensors" in text
    model, adapters = handle(base)
    adapters.load(file, "a")
    adapters.bake({"a": 0.5})
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for (name, one), (_, two) in zip(model.state_dict().items(), baked.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    text = done("extract", tmp_path / "tuned", base, "--rank", 4, "-o", tmp_path / "b.safetensors")
    assert "rank 4 at 4 points" in text
    assert close(changes(base, tmp_path / "b.safetensors"), changes(base, file, 0.5))
    result = call("bake", base, file, tmp_path / "tuned")
    assert (result.exit_code, "exists already" in result.stderr) == (1, True)
    result = call("bake", tmp_path / "nowhere", file, tmp_path / "x")
    assert (result.exit_code, "no folder or file here" in result.stderr) == (1, True)


def test_diff(base: Path, tmp_path: Path):
    one = saved(base, tmp_path / "a.safetensors", metadata={"trigger": "ink"})
    other = saved(base, tmp_path / "b.safetensors", seed=1)
    assert "equal, bit for bit, at 4 points" in done("diff", one, one)
    text = done("diff", one, other)
    assert "metadata trigger: 'ink' and None" in text
    found = json.loads(done("diff", one, other, "--json"))
    assert not found["equal"]
    assert found["relative"] > 0.5
    assert {point["key"].partition("@")[0] for point in found["points"]} == {"attn.q", "mlp.down"}


def test_inspect_with_the_base_and_a_picture(base: Path, tmp_path: Path):
    file = saved(base, tmp_path / "a", format="peft")
    found = json.loads(done("inspect", file, "--json", "--full"))
    assert found["ranks"] == {"4": 4}
    assert found["scales"] == {"1.5": 4}
    norm = torch.stack([change.square().sum() for change in changes(base, file).values()]).sum().sqrt()
    assert found["norm"] == pytest.approx(float(norm), rel=1e-4)
    assert "kohya" in found["with --base perhaps as"]
    for point in found["each point"]:
        assert point["norm"] == pytest.approx(sum(v**2 for v in point["singular values"]) ** 0.5, rel=1e-5)
    named = json.loads(done("inspect", file, "--base", base, "--json"))
    assert {row["role"] for row in named["roles"]} == {"attn.q", "mlp.down"}
    assert {row["block"] for row in named["blocks"]} == {"0", "1"}
    assert {"native", "peft"} <= {*named["can be written as"]}
    assert sum(row["norm"] ** 2 for row in named["blocks"]) == pytest.approx(named["norm"] ** 2)
    pytest.importorskip("matplotlib")
    done("inspect", file, "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    result = call("inspect", file, "--plot", tmp_path / "no/a.png")
    assert result.exit_code == 1
    assert "no does not exist" in result.stderr


def test_the_tags_that_training_saw_most_are_trigger_words(base: Path, tmp_path: Path):
    tags = {"10_ink": {"ink": 30, "a cat": 2}, "5_more": {"ink": 1, "a cat": 40}}
    told = {"ss_tag_frequency": json.dumps(tags), "long": "x" * 10}
    file = saved(base, tmp_path / "a.safetensors", metadata=told)
    assert json.loads(done("inspect", file, "--json"))["trigger words"] == ["a cat", "ink"]
    assert (
        json.loads(
            done("inspect", saved(base, tmp_path / "b.safetensors", metadata={"ss_tag_frequency": "["}), "--json")
        )["trigger words"]
        == []
    )


@pytest.mark.parametrize("command", [("convert", "--format", "native"), ("resize", "--rank", "2"), ("combine",)])
def test_what_does_not_belong_is_left_out_where_that_is_asked_for_and_told(
    base: Path, tmp_path: Path, command: tuple[str, ...]
):
    whole = saved(base, tmp_path / "a", format="peft")
    path = whole / "adapter_model.safetensors"
    tensors = load_file(path)
    for part in ("A", "B"):
        key = next(key for key in tensors if f"q_proj.lora_{part}" in key)
        tensors[key.replace("q_proj", "strange")] = tensors[key].clone()
    save_file(tensors, path)
    arguments = (*command, whole, "--base", base, "-o", tmp_path / "new.safetensors")
    refused = call(*arguments)
    assert refused.exit_code == 1
    assert "(--lenient) loads the rest" in refused.stderr
    assert not (tmp_path / "new.safetensors").exists()
    result = call(*arguments, "--lenient")
    assert result.exit_code == 0, result.output
    assert "left out 2 keys that belong to no point here: base_model.model.model.layers.0" in result.stderr


@pytest.mark.parametrize("arguments", [("resize", "--rank", "2"), ("combine", "--density", "0.5", "-o", "x")])
def test_an_option_that_would_do_nothing_is_an_error(base: Path, tmp_path: Path, arguments: tuple[str, ...]):
    assert call(arguments[0], saved(base, tmp_path / "a"), *arguments[1:]).exit_code == 2


@pytest.mark.parametrize("command", [("extract", "no", "no"), ("resize", "no", "--rank", "2"), ("combine", "no")])
def test_a_place_that_is_not_there_is_told_before_anything_is_read(tmp_path: Path, command: tuple[str, ...]):
    result = call(*command, "-o", tmp_path / "none" / "x.safetensors")
    assert result.exit_code == 1
    assert result.stderr.endswith(f"the folder {tmp_path / 'none'} does not exist; make it with mkdir -p\n")


def test_inspect_tells_what_has_no_place_in_the_base(base: Path, tmp_path: Path):
    whole = saved(base, tmp_path / "a", format="peft")
    tensors = load_file(whole / "adapter_model.safetensors")
    more = {key.replace("layers.0", "layers.7"): tensor.clone() for key, tensor in tensors.items() if "layers.0" in key}
    save_file({**tensors, **more}, whole / "adapter_model.safetensors")
    assert f"keys of no point {len(more)}: base_model" in " ".join(done("inspect", whole, "--base", base).split())
    assert json.loads(done("inspect", whole, "--base", base, "--json"))["keys of no point"] == sorted(more)
