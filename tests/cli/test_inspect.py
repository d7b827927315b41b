from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.cli.main import main
from adapterkit.testing import toys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    toys.register()
    adapters = ak.Adapters(toys.ToyModel())
    adapters.add("a", ak.LoRA(rank=4, ranks={"mlp.*": 2}, targets="attn.q mlp.down"))
    return adapters.save("a", tmp_path / "a.safetensors")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_json_says_everything(file: Path):
    result = call(file, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["type"] == "lora"
    assert found["format"] == "native"
    assert found["provided by"] == f"adapterkit {ak.__version__}"
    assert dict(found["config"]["ranks"]) == {"mlp.*": 2}
    assert found["bytes"] == file.stat().st_size
    assert found["points"] == 4
    assert found["parameters"] == 2 * (4 * (8 + 8)) + 2 * (2 * (16 + 8))
    assert found["dtypes"] == ["float32"]
    assert list(found["base"]) == ["toy"]
    assert [{key: value for key, value in row.items() if key != "norm"} for row in found["roles"]] == [
        {"component": "toy", "role": "attn.q", "points": 2, "shapes": "A 4x8, B 8x4", "parameters": 128},
        {"component": "toy", "role": "mlp.down", "points": 2, "shapes": "A 2x16, B 8x2", "parameters": 96},
    ]


def test_a_file_of_several_types(tmp_path: Path):
    toys.register()
    adapters = ak.Adapters(toys.ToyModel())
    for name, config in (("a", ak.LoRA(rank=2, targets="attn.q")), ("b", ak.Bottleneck(width=2))):
        adapters.add(name, config)
    one, other = (adapters.checkpoint(name) for name in ("a", "b"))
    adapters.install("both", one.replace(parts=[one.part, other.part], metadata={"trigger": "ink"}))
    path = adapters.save("both", tmp_path / "both")
    found = json.loads(call(path, "--json").stdout)
    assert (found["type"], found["metadata"]) == ("lora + bottleneck", {"trigger": "ink"})
    assert {name: config["targets"] for name, config in found["config"].items()} == {
        "lora": "attn.q",
        "bottleneck": "mlp",
    }
    assert {row["role"] for row in found["roles"]} == {"attn.q", "mlp"}
    assert found["written by"] == f"adapterkit {ak.__version__}"
    assert "lora + bottleneck" in call(path).stdout


def test_a_folder_and_a_pickle_are_asked_about_as_load_does(tmp_path: Path):
    result = call(tmp_path)
    assert result.exit_code == 1
    assert "is a folder" in result.stderr
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    assert "can run code" in call(tmp_path / "x.bin").stderr
    assert "of no format that is installed" in call(tmp_path / "x.bin", "--allow-pickle").stderr


def test_the_table_names_type_config_and_roles(file: Path):
    text = call(file).stdout
    assert "rank=4" in text
    assert re.search(r"^parameters +224$", text, re.MULTILINE)
    assert "A 2x16, B 8x2" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.safetensors"),
        (b"\x80\x02pickle", "x.safetensors"),
        (b"12345678{}", "x.safetensors"),
        (None, "x.safetensors"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    result = call(path)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_flipped_bit_is_found(file: Path):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = call(file)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\rerror: none\n-- b"


def forged(file: Path, **values: object) -> Path:
    """The same file, but for some fields of its header."""
    header = json.loads(load_file_metadata(file))
    tensors = load_file(file)
    save_file(tensors, file, {"adapterkit": json.dumps(header | values)})
    return file


def load_file_metadata(file: Path) -> str:
    with safe_open(file, "pt") as opened:
        return opened.metadata()["adapterkit"]


@pytest.mark.parametrize(
    "values",
    [
        {"metadata": {STEERING: STEERING}},
        {"distribution": STEERING, "version": STEERING},
        {"backends": {"toy": STEERING}, "base": {"toy": {"family": STEERING}}},
        {"config": {"targets": STEERING}},
        {"type": STEERING},
        {STEERING: 1},
        {"adapterkit": STEERING},
        {"adapterkit": STEERING, "file_version": 9},
    ],
)
def test_what_a_file_says_steers_no_terminal(file: Path, values: dict[str, object]):
    result = call(forged(file, **values))
    assert not {*"\x1b\x07\x9b\u202e\r"} & {*result.output}
    assert "\n-- b" not in result.output
    assert "owned" in result.output or result.exit_code == 0


def test_what_a_name_in_a_file_says_is_on_one_line(file: Path):
    adapters = ak.Adapters(toys.ToyModel())
    adapters.load(file, "a")
    adapters.save(["a"], file)
    header = json.loads(load_file_metadata(file))
    header["adapters"] = {STEERING: header["adapters"].pop("a")}
    tensors = {key.replace("a/", f"{STEERING}/", 1): value for key, value in load_file(file).items()}
    save_file(tensors, file, {"adapterkit": json.dumps(header)})
    result = call(file)
    assert not {*"\x1b\x07\x9b\u202e\r"} & {*result.output}
    assert "\n-- b" not in result.output


def test_an_error_offers_no_line_for_a_shell_that_the_file_has_written(file: Path):
    adapters = ak.Adapters(toys.ToyModel())
    for distribution in ("x; curl example.org | sh", "-r requirements.txt", "$(reboot)", "x y", "x\ny"):
        with pytest.raises(ak.UnknownAdapterTypeError, match="which is no name of a package") as caught:
            adapters.load(forged(file, type="strange", distribution=distribution), "new")
        assert "pip install" not in str(caught.value)
    with pytest.raises(ak.UnknownAdapterTypeError, match=r"-ia9; if you trust that package: pip install") as caught:
        adapters.load(forged(file, distribution="adapterkit-ia9", version="1; reboot"), "new")
    assert "reboot" not in str(caught.value)


def test_a_warning_of_a_load_steers_no_terminal(file: Path):
    adapters = ak.Adapters(toys.ToyModel())
    base = {"toy": {"family": STEERING, "roles": {}}}
    with pytest.warns(UserWarning, match="made for another base") as caught:
        report = adapters.load(forged(file, base=base), "new", strict=False)
    assert not {*"\x1b\x07\x9b\u202e\r"} & {*f"{report}{caught[0].message}"}


def test_a_whole_model_is_told_by_its_tensors(tmp_path: Path):
    save_file({"model.layers.0.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert "(1 tensors, as 'model.layers.0.weight')" in call(tmp_path / "model.safetensors").stderr


def test_weights_of_peft_without_their_config_say_that_alpha_is_guessed(tmp_path: Path):
    name = "base_model.model.layers.0.q_proj.lora_{}.weight"
    save_file({name.format("A"): torch.ones(2, 4), name.format("B"): torch.ones(4, 2)}, tmp_path / "a.safetensors")
    assert "has no adapter_config.json beside it" in call(tmp_path / "a.safetensors").stdout
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert "has no adapter_config.json" not in call(tmp_path / "a.safetensors").stdout


def test_what_its_tensors_do_not_tell_the_base_does(tmp_path: Path):
    key = "oft_unet_mid_block_attentions_0_proj_in.oft_blocks"
    save_file({key: torch.ones(2, 4, 4)}, tmp_path / "a.safetensors")
    assert "without its model (--base)" in call(tmp_path / "a.safetensors").stderr
