"""What kohya's scripts wrote, and what they computed from it; a few here, all of them where the fixtures are."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit as ak
from tests.formats.foreign import ELSEWHERE, HERE, named, read

OWN = HERE / "kohya"


def built(folder: Path, base: str) -> nn.Module:
    import diffusers
    import transformers

    path = folder / "bases" / base
    told = read(path / "base.json")
    cls = getattr({"diffusers": diffusers, "transformers": transformers}[told["library"]], told["class"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return cls.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def outputs(model: Any, spec: dict[str, Any], inputs: dict[str, Tensor], component: str) -> dict[str, Tensor]:
    given = {name: inputs[f"{component}/{name}"] for name in spec["inputs"]}
    if more := spec.get("added_cond_kwargs"):
        given["added_cond_kwargs"] = {name: inputs[f"{component}/{name}"] for name in more}
    out = model(**given)
    return {f"{component}/{name}": getattr(out, name) for name in spec["outputs"]}


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def check(name: str, folder: Path, *, partly: bool = False) -> ak.LoadReport:
    """Loads a file onto the models that it is for, and compares outputs, those again of what is written and read."""
    path = folder / name
    about, specs = read(path / "about.json"), read(path / "model.json")["components"]
    specs = {c: spec for c, spec in specs.items() if (folder / "bases" / spec["base"]).is_dir()}
    inputs, expected = (load_file(str(path / f"{kind}.safetensors")) for kind in ("inputs", "expected"))
    models = {component: built(folder, spec["base"]) for component, spec in specs.items()}
    own = {key: one for c, spec in specs.items() for key, one in outputs(models[c], spec, inputs, c).items()}
    adapters = ak.Adapters(SimpleNamespace(components=models))
    report = adapters.load(path / about["load"], "it", allow_pickle=True, strict=not partly)
    adapters.activate("it")
    for component, spec in specs.items():
        for key, got in outputs(models[component], spec, inputs, component).items():
            wanted = expected[f"out/{key}"]
            most = max(1e-5, 4 * apart(own[key], expected[f"base/{key}"]))  # another CPU sums in another order
            assert apart(got, wanted) <= most, key
    return report


def test_stable_diffusion_1() -> None:
    report = check("kohya_sd1_te_only", OWN)
    assert (report.read.format, report.read.tool) == ("kohya", "kohya's sd-scripts")
    assert report.read.base.startswith("sd_v1 (ss_base_model_version)")


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning")
def test_flux() -> None:
    report = check("kohya_flux_lora", OWN)
    assert report.metadata["ss_network_module"] == "networks.lora_flux"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning")
@pytest.mark.parametrize("name", named("kohya_"))
def test_all(name: str) -> None:
    check(name, ELSEWHERE)
