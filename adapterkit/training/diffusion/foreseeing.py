"""What pictures and captions become for a model of which there is an outline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterkit.training.data_files import listed
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.diffusion.sample_sizes import check_sizes
from adapterkit.training.pictures.plan import Plan
from adapterkit.training.pictures.survey import Picture
from adapterkit.training.samples.prompts import samples_of
from adapterkit.training.sizes import size_of


def foreseen(pictures: Sequence[Picture], recipe: Recipe) -> dict[str, str]:
    """Sizes, what is cut or enlarged, and tokens, by name.

    Args:
        pictures: What is learnt from.
        recipe: Of a pipeline that may be an outline.

    Raises:
        ConfigError: The options do not fit the model.
    """
    told = {}
    check_sizes(samples_of(recipe.options.prompts, [0]), recipe.multiple)
    size = size_of(recipe.options.resolution) or recipe.size()
    if size is not None:
        told["size"] = f"{size[1]} x {size[0]}"
        told |= Plan.of(pictures, recipe.options, size, recipe.multiple, recipe.longest).facts()
    return {**told, **_tokens(pictures, recipe)}


def too_long(pictures: Sequence[Picture], recipe: Recipe) -> tuple[int, list[str]]:
    """How many tokens are read, and which captions have more; of the tokenizer that reads least."""
    for tokenizer, limit in recipe.token_limits():
        counts = {picture.path.name: _most(tokenizer, picture) for picture in pictures}
        if long := [f"{name}, {count} tokens" for name, count in counts.items() if count > limit]:
            return limit, long
    return 0, []


def count_tokens(tokenizer: Any, caption: str) -> int:
    """Special tokens too."""
    return len(tokenizer(caption, verbose=False)["input_ids"])


def _most(tokenizer: Any, picture: Picture) -> int:
    """Of its longest caption."""
    return max(count_tokens(tokenizer, caption) for caption in picture.captions)


def _tokens(pictures: Sequence[Picture], recipe: Recipe) -> dict[str, str]:
    limit, long = too_long(pictures, recipe)
    if long:
        return {"captions cut": f"to {limit} tokens, {listed(long)}"}
    most = [f"{max(_most(t, one) for one in pictures)} of {limit}" for t, limit in recipe.token_limits()]
    return {"tokens of the longest caption": ", ".join(dict.fromkeys(most))} if most else {}
