"""A pipeline and the recipe that its class has."""

from __future__ import annotations

import importlib
from typing import Any

from adapterkit.errors import ModelNotFoundError, PluginError, UnsupportedModelError, shown
from adapterkit.plugins.manager import class_of, get_plugin_manager
from adapterkit.plugins.matching import class_keys
from adapterkit.specs import RecipeSpec
from adapterkit.training.diffusion.options import Options
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.loading import NO_CODE, dtype_of, reading
from adapterkit.training.skeleton import Skeleton, skeleton


def outline_pipeline(name: str) -> Skeleton:
    """What `load_pipeline` would load, on the meta device.

    Raises:
        ModelNotFoundError, UnsupportedModelError: As there.
    """
    with reading(name, "diffusion", "diffusers", "transformers"):
        recipe, _ = _recipe_and_index(name)
        shape: Any = skeleton(name)
    return Skeleton({part: model for part, model in shape.components.items() if part not in recipe.unused})


def load_pipeline(name: str, dtype: str, options: Options) -> tuple[Any, Recipe]:
    """A pipeline without the parts that training does not need, and how it is trained.

    Raises:
        ModelNotFoundError: There is no pipeline at that place.
        UnsupportedModelError: It is one of another kind.
    """
    with reading(name, "diffusion", "diffusers", "transformers"):
        diffusers: Any = importlib.import_module("diffusers")
        recipe, index = _recipe_and_index(name)
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            name, dtype=dtype_of(dtype), **NO_CODE, **_absent(recipe, index)
        )
    return pipe, recipe(pipe, options)


def outlined_recipe(name: str, outline: Skeleton, options: Options) -> Recipe:
    """How a pipeline would be trained, from its outline: of its parts only tokenizers and the scheduler are read.

    Raises:
        ModelNotFoundError, UnsupportedModelError: As `load_pipeline`.
    """
    with reading(name, "diffusion", "diffusers", "transformers"):
        diffusers: Any = importlib.import_module("diffusers")
        recipe, index = _recipe_and_index(name)
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            name, **NO_CODE, **_absent(recipe, index), **outline.components
        )
    return recipe(pipe, options)


def denoiser_of(name: str) -> str:
    """The component of a pipeline that takes noise away; errors as for `load_pipeline`."""
    with reading(name, "diffusion", "diffusers", "transformers"):
        return _recipe_and_index(name)[0].denoiser


def _absent(recipe: type[Recipe], index: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline is loaded without."""
    absent: dict[str, Any] = {part: None for part in recipe.unused if isinstance(index.get(part), list)}
    return {**absent, "requires_safety_checker": False} if "requires_safety_checker" in index else absent


def _recipe_and_index(name: str) -> tuple[Any, dict[str, Any]]:
    """The class of the recipe for the pipeline of a folder or hub id, and what its `model_index.json` says."""
    diffusers: Any = importlib.import_module("diffusers")
    index = diffusers.DiffusionPipeline.load_config(name)
    recipe = class_of(recipe_of(_class_of(name, index)), Recipe)
    if lacking := [part for part in recipe.needed() if not isinstance(index.get(part), list)]:
        raise UnsupportedModelError(f"{name} is a {index['_class_name']} without {', '.join(lacking)}; {_trained()}")
    return recipe, index


def recipe_of(pipeline: type) -> RecipeSpec:
    """The recipe for the most derived class of a pipeline.

    Raises:
        UnsupportedModelError: There is none.
        PluginError: Several claim the same class.
    """
    for key in class_keys(pipeline):
        claims = [spec for spec in get_plugin_manager().recipes().values() if key in spec.pipelines]
        if len(claims) > 1:
            raise PluginError(f"{key} is claimed by {' and '.join(map(str, claims))}; uninstall one of them")
        if claims:
            return claims[0]
    raise UnsupportedModelError(f"no recipe says how a {pipeline.__name__} is trained; {_trained()}")


def _class_of(name: str, index: dict[str, Any]) -> type:
    told = index.get("_class_name")
    found = getattr(importlib.import_module("diffusers"), told, None) if isinstance(told, str) else None
    if isinstance(found, type):
        return found
    raise ModelNotFoundError(f"cannot load the model {shown(name)}: diffusers has no pipeline {shown(told)}")


def _trained() -> str:
    specs = get_plugin_manager().recipes().values()
    names = [key.partition(":")[2] for spec in specs for key in spec.pipelines]
    return f"the task 'diffusion' trains {', '.join(names)}"
