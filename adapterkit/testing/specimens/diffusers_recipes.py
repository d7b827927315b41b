"""Which class of diffusers wants what beside the rules of `diffusers_configs.py` and `diffusers_inputs.py`."""

from __future__ import annotations

from collections.abc import Mapping

from adapterkit.testing.specimens.diffusers_images import IMAGES
from adapterkit.testing.specimens.diffusers_moving import MOVING
from adapterkit.testing.specimens.diffusers_recipe import Recipe
from adapterkit.testing.specimens.diffusers_unets import UNETS

_RECIPES: Mapping[str, Recipe] = {**IMAGES, **MOVING, **UNETS}


def recipe_of(cls: type) -> Recipe:
    """What this class wants, or the nearest that it derives from."""
    return next((_RECIPES[base.__name__] for base in cls.__mro__ if base.__name__ in _RECIPES), Recipe())
