"""Files of PEFT: what it saves is read with its outputs, and written again bit by bit, and PEFT reads that."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.tools import files as tools
from adapterkit.torchvision_ops import ensure_torchvision_ops

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
IGNORED = (
    "ignore:Specified to not save",
    "ignore:fan_in_fan_out",
    "ignore:Sparse inv",
    "ignore:The symmetric",
    "ignore:.is_gradient",
)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("Beft", {"target_modules": ["first", "last"]}),
    ("C3A", {"block_size": 4, "block_size_pattern": {"first": 2}, "target_modules": ["first", "second"]}),
    ("HRA", {"r": 4, "target_modules": ["first", "conv"]}),
    ("HRA", {"r": 3, "apply_GS": True, "target_modules": ["first", "second"]}),
    ("Miss", {"r": 5, "target_modules": ["first", "second"]}),
    ("Miss", {"r": 4, "init_weights": "mini", "mini_r": 2, "target_modules": ["first", "second"]}),
    ("Miss", {"r": 4, "init_weights": "bat", "target_modules": ["first", "second"]}),
    ("RandLora", {"r": 5, "target_modules": ["first", "last"], "projection_prng_key": 3}),
    ("RandLora", {"r": 4, "target_modules": ["first", "last"], "save_projection": False, "very_sparse": True}),
    ("Road", {"group_size": 4, "target_modules": ["first", "second"]}),
    ("Road", {"group_size": 2, "variant": "road_4", "target_modules": ["first"]}),
    ("Shira", {"r": 2, "target_modules": ["first", "second"]}),
    ("VBLoRA", {"r": 3, "num_vectors": 9, "vector_length": 2, "topk": 3, "target_modules": ["first", "last"]}),
    (
        "VBLoRA",
        {
            "r": 2,
            "num_vectors": 300,
            "vector_length": 4,
            "save_only_topk_weights": True,
            "target_modules": ["first", "second"],
        },
    ),
    ("WaveFT", {"n_frequency": 20, "n_frequency_pattern": {"last": 9}, "target_modules": ["first", "last"]}),
    ("WaveFT", {"n_frequency": 30, "wavelet_family": "sym4", "random_loc_seed": 5, "target_modules": ["second"]}),
    ("WaveFT", {"n_frequency": 30, "use_idwt": False, "proportional_parameters": True, "target_modules": ["first"]}),
]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)
        self.conv, self.last = nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu()).relu().unflatten(-1, (3, 2, 2))
        return self.last(self.conv(hidden).flatten(-3))


def close(ours: Tensor, theirs: Tensor) -> bool:
    return (ours - theirs).abs().max().item() <= 1e-5 * theirs.abs().max().item()


def saved_by_peft(folder: Path, name: str, options: dict[str, Any], base: nn.Module, x: Tensor) -> Tensor:
    """Saves an adapter of PEFT that has moved, and gives its output."""
    ensure_torchvision_ops()
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(base), getattr(peft, f"{name}Config")(**options)).eval()
    for key, parameter in model.named_parameters():
        if "default" in key:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, Tensor) else found.last_hidden_state


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_files_go_there_and_back(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    base = Toy().eval()
    expected = saved_by_peft(tmp_path / "theirs", name, options, base, X)
    model = copy.deepcopy(base)
    adapters = ak.Adapters(model)
    adapters.load(tmp_path / "theirs", "a")
    adapters.activate("a")
    model.requires_grad_(False)
    assert not close(base(X), expected)
    assert close(model(X), expected)
    with adapters.merged():
        assert close(model(X), expected)
    adapters.save("a", tmp_path / "ours", format="peft")
    first, second = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        assert close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()(X), expected)
    adapters.save("a", tmp_path / "a.safetensors")
    other = ak.Adapters(copy.deepcopy(base))
    other.load(tmp_path / "a.safetensors", "b")
    assert all(torch.equal(*pair) for pair in zip(adapters.parameters("a"), other.parameters("b"), strict=True))


FUSED: list[tuple[str, dict[str, Any]]] = [
    ("RandLora", {"r": 3}),
    ("RandLora", {"r": 3, "save_projection": False, "sparse": True}),
    ("VBLoRA", {"r": 2, "num_vectors": 8, "vector_length": 4}),
    ("WaveFT", {"n_frequency": 20, "wavelet_family": "db3"}),
]


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize(("name", "options"), FUSED)
def test_fused_transposed_layers(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """PEFT's numbers for all of GPT-2's `c_attn`, whose rows are three points."""
    ensure_torchvision_ops()
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    base = GPT2Model(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0)
    ).eval()
    ids = torch.arange(8)[None]
    targets = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}

    expected = saved_by_peft(tmp_path / "theirs", name, {**options, **targets}, base, ids)
    adapters = ak.Adapters(base)
    adapters.load(tmp_path / "theirs", "a")
    adapters.activate("a")
    base.requires_grad_(False)
    assert close(base(ids).last_hidden_state, expected)
    adapters.save("a", tmp_path / "ours", format="peft")
    first, second = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_bone_is_read_as_miss(tmp_path: Path) -> None:
    """The name that MiSS had in earlier versions of PEFT."""
    base = Toy().eval()
    expected = saved_by_peft(tmp_path, "Miss", {"r": 4, "target_modules": ["first"]}, base, X)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key.replace("miss", "bone"): t for key, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "BONE"}))
    adapters = ak.Adapters(base)
    adapters.load(tmp_path, "a")
    adapters.activate("a")
    assert close(base(X), expected)


def rewritten(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    own = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**own, **config}))
    save_file({**load_file(folder / "adapter_model.safetensors"), **tensors}, folder / "adapter_model.safetensors")


KEY = "base_model.model.first."


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize(
    ("name", "options", "config", "tensors", "told"),
    [
        ("HRA", {"r": 2}, {}, {"hra_u": torch.ones(11, 2)}, "hra_u"),
        ("C3A", {"block_size": 4}, {}, {"c3a_kernel": torch.ones(4, 3, 5)}, "c3a_kernel"),
        ("Miss", {"r": 4}, {}, {"miss_block": torch.ones(4, 15)}, "miss_block"),
        ("Miss", {"r": 4}, {}, {"miss_block": torch.ones(13, 16)}, "13"),
        ("Road", {"group_size": 4}, {"group_size": 3}, {}, "groups of 3"),
        ("Road", {"group_size": 4}, {"group_size": "many"}, {}, "group_size"),
        ("Shira", {"r": 1}, {}, {"shira_indices": torch.full((2, 28), 16, dtype=torch.int32)}, "outside"),
        ("Shira", {"r": 1}, {}, {"shira_weight": torch.ones(27)}, "shira_weight"),
        ("WaveFT", {"n_frequency": 9}, {"wavelet_family": "coif5"}, {}, "coif5"),
        ("WaveFT", {"n_frequency": 9}, {}, {"waveft_spectrum": torch.ones(200)}, "waveft_spectrum"),
        ("VBLoRA", {"vector_length": 4}, {"topk": 1000}, {}, "k must"),
        ("RandLora", {"r": 4}, {}, {"randlora_lambda": torch.ones(4, 2)}, "randlora_lambda"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], config: dict[str, Any], tensors: dict[str, Tensor], told: str
) -> None:
    base = Toy().eval()
    saved_by_peft(tmp_path, name, {**options, "target_modules": ["first"]}, base, X)
    rewritten(tmp_path, config, {f"{KEY}{key}": tensor for key, tensor in tensors.items()})
    adapters = ak.Adapters(base)
    with pytest.raises(errors.AdapterKitError, match=told):
        adapters.load(tmp_path, "a")
    assert not len(adapters)


def test_what_peft_has_no_words_for_is_refused(tmp_path: Path) -> None:
    from adapterkit_peft_types.hra import HRA
    from adapterkit_peft_types.road import RoAd

    model = nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 1))
    for name, config in (("dilated", HRA(targets="path:0")), ("conv", RoAd(targets="path:1"))):
        adapters = ak.Adapters(model)
        adapters.add("a", config)
        with pytest.raises(errors.CheckpointError, match="native"):
            adapters.save("a", tmp_path / name, format="peft")
        assert not (tmp_path / name).exists()
        adapters.detach()


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize("name", ["HRA", "RandLora", "Shira"])
def test_without_a_model_it_is_told_that_one_is_needed(tmp_path: Path, name: str) -> None:
    """The tensors of these types do not tell the shapes of the layers that they are for."""
    saved_by_peft(tmp_path, name, {"r": 2, "target_modules": ["first"]}, Toy().eval(), X)
    with pytest.raises(errors.UnsupportedFileError, match=rf"{name.upper()}.*which model"):
        tools.read(tmp_path)


def test_without_a_model_a_file_that_tells_its_shapes_is_read(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, "C3A", {"block_size": 4, "target_modules": ["first"]}, Toy().eval(), X)
    [part] = tools.read(tmp_path).checkpoint.parts
    assert (part.type, part.config) == ("c3a", {"block": 4})


def test_bases_of_more_layers_than_the_model_has_are_cut(tmp_path: Path) -> None:
    """The bases of a file are as wide as its widest layer, which another model may lack."""
    options = {"r": 3, "target_modules": ["second", "last"]}
    torch.manual_seed(2)
    saved_by_peft(tmp_path, "RandLora", options, Toy().eval(), X)
    narrow, whole = Toy().eval(), Toy().eval()
    narrow.second = nn.Identity()
    every = ak.Adapters(whole)
    every.load(tmp_path, "a")
    some = ak.Adapters(narrow)
    some.load(tmp_path, "a", strict=False)
    [(key, module)] = some.modules("a").items()
    assert torch.equal(module.delta_weight(), every.modules("a")[key].delta_weight())  # type: ignore[operator]
