"""What files for the UIs say about themselves, and what becomes of what they cannot say."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.errors import CheckpointError, ConfigError, NonFiniteError
from adapterkit.formats.container import read_header
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import InjectionPoint, Kind
from adapterkit.specs import AdapterSpec
from tests.formats.pipelines import PIPELINES, differences, randomise, run, unet, xl


def header(path: Path) -> Any:
    return read_header(path)


@pytest.fixture
def adapters() -> ak.Adapters:
    found = ak.Adapters(unet())
    found.add("a", ak.LoRA("attn.q cross.k", rank=2, alpha=1.0, alphas={"cross.k": 3.0}))
    randomise(found)
    return found


def test_the_card_tells_what_the_uis_ask(adapters: ak.Adapters, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG picture")
    told = {"title": "Chalk", "author": "me", "trigger": "neonchalk", "license": "MIT", "thumbnail": picture}
    file = adapters.save("a", tmp_path / "a.safetensors", format="kohya", metadata={"ss_steps": "7"}, **told)
    found = header(file).metadata
    expected = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_args": "{}",
        "ss_output_name": "Chalk",
        "ss_steps": "7",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "Chalk",
        "modelspec.author": "me",
        "modelspec.license": "MIT",
        "modelspec.trigger_phrase": "neonchalk",
        "modelspec.resolution": "512x512",
        "modelspec.implementation_version": f"adapterkit/{ak.__version__}",
        "modelspec.thumbnail": f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}",
    }
    assert {key: found.get(key) for key in expected} == expected
    data = file.read_bytes()[len(header(file).text) :]
    assert found["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert found["modelspec.hash_sha256"] == f"0x{found['sshs_model_hash']}"
    assert found["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]  # the file ends before the window


def test_what_the_adapter_brings_along_stays(adapters: ak.Adapters, tmp_path: Path) -> None:
    brought = {"modelspec.title": "Chalk", "modelspec.date": "2024-01-01", "modelspec.architecture": "mine/lora"}
    file = adapters.save("a", tmp_path / "a.safetensors", format="kohya", metadata={**brought, "ss_epoch": "3"})
    adapters.load(file, "back")
    again = header(adapters.save("back", tmp_path / "b.safetensors", format="kohya")).metadata
    assert {key: again[key] for key in (*brought, "ss_epoch")} == {**brought, "ss_epoch": "3"}
    assert header(adapters.save("back", file, format="kohya", title="New")).metadata["modelspec.title"] == "New"


def test_the_legacy_hash_is_of_64_kb_behind_the_first_mb(tmp_path: Path) -> None:
    from adapterkit.formats.cards import _hashes
    from adapterkit.formats.container import body, write

    tensors = {name: torch.randn(300, 1000, generator=torch.Generator().manual_seed(1)) for name in ("a", "b")}
    write(tmp_path / "it", tensors, {"ss_v2": "False"})
    window = (tmp_path / "it").read_bytes()[0x100000:0x110000]
    found = _hashes(body(tmp_path, tensors), {"ss_v2": "False"})
    assert found["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]


def test_there_is_one_alpha_and_the_effect_is_the_same(adapters: ak.Adapters, tmp_path: Path) -> None:
    before = [module.factors() for module in adapters.modules("a").values()]  # type: ignore[operator]
    for options, alpha in (({}, {1.0}), ({"alpha": 2.0}, {2.0})):
        file = adapters.save("a", tmp_path / "a.safetensors", format="kohya", **options)
        adapters.load(file, "back")
        after = [module.factors() for module in adapters.modules("back").values()]  # type: ignore[operator]
        assert {f.scale * f.rank for f in after} == alpha
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one.scale * one.B @ one.A, other.scale * other.B @ other.A)
        adapters.remove("back")


def test_the_dtype_is_of_all_and_alpha_is_one_that_it_has(adapters: ak.Adapters, tmp_path: Path) -> None:
    file = adapters.save("a", tmp_path / "a.safetensors", format="kohya", dtype=torch.bfloat16, alpha=1.3)
    dtypes = {key.rpartition(".")[2]: entry.dtype for key, entry in header(file).entries.items()}
    assert set(dtypes.values()) == {torch.bfloat16}
    adapters.load(file, "back")
    for one, other in zip(adapters.modules("a").values(), adapters.modules("back").values(), strict=True):
        f, g = one.factors(), other.factors()  # type: ignore[operator]
        assert g.scale * g.rank == 1.296875
        torch.testing.assert_close(f.scale * f.B @ f.A, g.scale * g.B.float() @ g.A.float(), rtol=0.02, atol=2e-3)
    with torch.no_grad():
        next(adapters.parameters()).fill_(1e30)
    with pytest.raises(NonFiniteError, match=r"beyond torch\.float16"):
        adapters.save("a", tmp_path / "b.safetensors", format="kohya", dtype=torch.float16)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha": float("nan")}, "alpha must be a positive number"),
        ({"alpha": True}, "alpha must be a positive number, not True"),
        ({"rank": True}, "rank must be a positive integer"),
        ({"rank": 0}, "rank must be a positive integer, not 0"),
        ({"rank": 2.0}, "rank must be a positive integer"),
        ({"title": 3}, "title must be text"),
        ({"thumbnail": 3}, "thumbnail must be a path or a data URL"),
        ({"thumbnail": "it.txt"}, "thumbnail must be a picture"),
        ({"triger": "x"}, "Did you mean 'trigger'"),
    ],
)
def test_options_that_make_no_sense(adapters: ak.Adapters, tmp_path: Path, options: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        adapters.save("a", tmp_path / "a.safetensors", format="kohya", **options)
    assert not (tmp_path / "a.safetensors").exists()


TOLD = {
    "sd_v2": (512, "stable-diffusion-v2-512", "diffusers"),
    "sdxl_base_v1-0": (1024, "stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"),
}
"""By ModelSpec's table of architectures, and kohya's scripts."""


def test_the_base_is_told_by_the_models_class(tmp_path: Path) -> None:
    for model, version in ((unet(cross_attention_dim=1024), "sd_v2"), (xl(), "sdxl_base_v1-0")):
        adapters = ak.Adapters(model)
        adapters.add("a", ak.LoRA("attn.q", rank=1))
        found = header(adapters.save("a", tmp_path / "a.safetensors", format="kohya")).metadata
        assert (found["ss_base_model_version"], found["ss_v2"]) == (version, str(version == "sd_v2"))
        size, architecture, implementation = TOLD[version]
        assert found["modelspec.resolution"] == f"{size}x{size}"
        assert found["modelspec.architecture"] == f"{architecture}/lora"
        assert found["modelspec.implementation"] == implementation
        found = header(adapters.save("a", tmp_path / "a.safetensors", format="kohya", base="sd_v2_v")).metadata
        assert found["modelspec.architecture"] == "sd_v2_v/lora"


class Turning(AdapterModule):
    """Rows that are mixed: no sum, and of full rank."""

    def __init__(self, point: InjectionPoint) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(point.shape[0], point.shape[0]))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + torch.tensordot(self.mix, weight, 1), bias


@dataclass(frozen=True)
class Turn(AdapterConfig):
    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})

    def build(self, point: InjectionPoint) -> Turning:
        return Turning(point)


class Plugin:
    @staticmethod
    @ak.hookimpl
    def adapterkit_register_adapters() -> list[AdapterSpec]:
        return [AdapterSpec("turn", f"{__name__}:Turn", kinds={"weight"})]


@pytest.fixture
def turn() -> Iterator[Turn]:
    get_plugin_manager().register(Plugin(), name="turn")
    yield Turn("attn.q cross.k")
    get_plugin_manager().unregister(name="turn")


def test_what_cannot_be_said_is_refused_or_approximated(turn: Turn, tmp_path: Path) -> None:
    model = unet()
    adapters = ak.Adapters(model)
    adapters.add("a", turn)
    randomise(adapters)
    with pytest.raises(CheckpointError, match=r"cannot say 'turn'.*native holds any.*approximate=True"):
        adapters.save("a", tmp_path / "a.safetensors", format="kohya")
    with pytest.warns(UserWarning, match=r"is an approximation: of the effect, at most 0\.\d+ is left out"):
        file = adapters.save("a", tmp_path / "a.safetensors", format="kohya", approximate=True, rank=3)
    assert header(file).metadata["ss_network_dim"] == "3"
    file = adapters.save("a", tmp_path / "whole.safetensors", format="kohya", approximate=True)
    adapters.load(file, "back")
    pipe = SimpleNamespace(unet=model, components={})
    found: list[dict[str, Tensor]] = []
    for name in ("a", "back"):
        adapters.activate(name)
        found.append(run(pipe))
    assert differences(*found)["unet"] < 1e-5


def test_what_acts_on_no_weight_is_refused_whatever_is_asked(tmp_path: Path) -> None:
    adapters = ak.Adapters(PIPELINES["sd1"]())
    adapters.add("a", ak.Bottleneck(width=2, targets="attn"))
    with pytest.raises(CheckpointError, match=r"belong to no module .*native holds any"):
        adapters.save("a", tmp_path / "a.safetensors", format="kohya", approximate=True)


@pytest.mark.parametrize("format", ["kohya", "comfy"])
def test_embeddings_are_refused(format: str, tmp_path: Path) -> None:
    adapters = ak.Adapters(PIPELINES["sd1"]().text_encoder)
    adapters.add("a", ak.LoRA("embed.tokens", rank=1))
    with pytest.raises(CheckpointError, match=r"token_embedding.*no reader of files of this kind takes .*native"):
        adapters.save("a", tmp_path / "a.safetensors", format=format, approximate=True)
