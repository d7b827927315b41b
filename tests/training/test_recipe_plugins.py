"""Which recipe a pipeline has: the most derived class counts, a plug-in may bring one, and what is lacking is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import adapterkit as ak
from adapterkit.errors import ConfigError, PluginError, UnsupportedModelError
from adapterkit.specs import RecipeSpec
from adapterkit.training.diffusion.loading import recipe_of
from adapterkit.training.diffusion.recipes.unet import StableDiffusion
from adapterkit.training.loop import train
from tests.backends.vision_models import pipeline
from tests.training.test_diffusion import data, make_run  # noqa: F401 - data is a fixture

CALLS: list[str] = []


class Own(StableDiffusion):
    """A recipe of somebody else's."""

    def predict(self, *arguments: Any) -> torch.Tensor:
        CALLS.append("predict")
        return super().predict(*arguments)


def plugin(*specs: RecipeSpec) -> Any:
    hook = ak.hookimpl(lambda: [*specs], specname="adapterkit_register_recipes")
    return type("Plugin", (), {"adapterkit_register_recipes": staticmethod(hook)})()


@pytest.fixture
def registered() -> Iterator[None]:
    own = RecipeSpec("own", f"{__name__}:Own", pipelines=("diffusers:LatentConsistencyModelPipeline",))
    made = plugin(own)
    ak.get_plugin_manager().register(made, name="recipes-here")
    yield
    ak.get_plugin_manager().unregister(made)


def test_a_plug_in_brings_a_recipe(registered: None, data: Path, tmp_path: Path):  # noqa: F811
    (tmp_path / "words").mkdir()
    torch.manual_seed(0)
    parts = pipeline(tmp_path / "words").components
    parts["scheduler"] = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
    lacking = {"safety_checker": None, "requires_safety_checker": False}
    diffusers.LatentConsistencyModelPipeline(**{**parts, **lacking}).save_pretrained(tmp_path / "model")
    CALLS.clear()
    train(make_run(tmp_path / "model", data, tmp_path / "run", "samples=false"), silent=True)
    assert len(CALLS) == 4


def test_the_most_derived_class_counts_and_one_may_claim_it(registered: None):
    class Sub(diffusers.StableDiffusionXLPipeline):
        __module__ = "elsewhere"

    assert recipe_of(Sub).name == "stable_diffusion_xl"
    other = plugin(RecipeSpec("other", "x:y", pipelines=("diffusers:LatentConsistencyModelPipeline",)))
    ak.get_plugin_manager().register(other, name="recipes-there")
    try:
        with pytest.raises(PluginError, match=r"claimed by recipe 'own' .* and recipe 'other'"):
            recipe_of(diffusers.LatentConsistencyModelPipeline)
    finally:
        ak.get_plugin_manager().unregister(other)


def test_a_pipeline_that_nobody_knows_is_named_with_those_that_are():
    with pytest.raises(UnsupportedModelError, match=r"how a AudioLDM2Pipeline is trained; .* StableDiffusionPipeline,"):
        recipe_of(diffusers.AudioLDM2Pipeline)


def test_a_spec_says_pipelines_as_package_and_class():
    with pytest.raises(ConfigError, match="pipelines holds 'FluxPipeline', which is not of the form 'package:Class'"):
        RecipeSpec("flux", "a:B", pipelines=("FluxPipeline",))
