"""Configs of what sees and hears made small: fewer patches, and what has to agree with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from transformers import PretrainedConfig

from adapterkit.testing.specimens.config_names import CODES

_PATCHES: Final = 4
_LEAST_PATCH: Final = 8
"""Of models without stages, in which patches grow."""
_QUERIES: Final = 4
_GROUPS: Final = 32
_HEAD: Final = 8
_STAGED: Final = 64
_WINDOW: Final = 2
"""Pixels of pictures whose patches are merged from stage to stage, and what fits into the last one."""
_TOWERS: Final = {
    "image": ("vision_config", "sam_config", "vlm_config", "vq_config", "encoder"),
    "audio": ("audio_config", "audio_encoder_config", "encoder_config", "speech_config", "encoder"),
}
_SENSED: Final = ("image", "video", "audio")
_TIMM: Final[Mapping[str, Mapping[str, Any]]] = {
    "fastvit_mci3": {"layers": (1, 1, 1, 1, 1)},
    "mobilenetv5_300m_enc": {"channel_multiplier": 0.25},
}
"""timm's model -> what makes it smaller; its last width stays."""


def configs_in(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config and those within it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from configs_in(value)


def tower_config(config: PretrainedConfig, sense: str) -> PretrainedConfig:
    """The config, within a model's, that says how big is what one of its senses takes."""
    inner = (getattr(config, name, None) for name in _TOWERS.get(sense, ()))
    found = next((one for one in inner if isinstance(one, PretrainedConfig)), None)
    return config if found is None else tower_config(found, sense)


def with_small_pictures(config: PretrainedConfig, original: PretrainedConfig) -> PretrainedConfig:
    """Change a config, made small from another: pictures of few patches, and tokens that stand for them."""
    for part, first in zip(configs_in(config), configs_in(original), strict=True):
        values: Any = vars(part)
        architecture = values.get("architecture")
        if architecture is not None:
            if "hidden_size" in vars(first):
                part.hidden_size = first.hidden_size
            part.model_args = dict(_TIMM.get(architecture, {}))
        _cut_pictures(part, values)
        _cut_heads(part, values)
        _cut_stages(part, values)
    for part in configs_in(config):
        _name_sections(part)
        for name in [name for name in _AGREEING if vars(part).get(name) is not None]:
            setattr(part, name, _AGREEING[name](part, config))
    _agree_with_text(config)
    for part in configs_in(config):
        _cut_codes(part)
    _give_tokens(config)
    return config


def _cut_pictures(part: PretrainedConfig, values: Mapping[str, Any]) -> None:
    patch, image = values.get("patch_size"), values.get("image_size")
    side = patch[0] if isinstance(patch, list | tuple) and len(patch) == 2 else patch
    if isinstance(image, int | list | tuple) and image:
        staged = not isinstance(side, int) or side < _LEAST_PATCH
        small = _STAGED if not isinstance(side, int) or side < _LEAST_PATCH else _PATCHES * side
        if isinstance(values.get("down_ops"), list | tuple):  # LeViT's stages halve the patches: more than one is left
            small *= 2
        if staged and isinstance(values.get("window_size"), int):
            part.window_size = _WINDOW
        part.image_size = type(image)([small, small]) if isinstance(image, list | tuple) else small


def _cut_stages(part: PretrainedConfig, values: Mapping[str, Any]) -> None:
    """Leave three layers of a stage, as CvT takes a number for each stage from a list of a stage's; narrow heads."""
    width, heads = values.get("embed_dim"), values.get("num_heads")
    if isinstance(width, int) and isinstance(heads, list | tuple) and width > _HEAD * heads[0]:
        part.embed_dim = _HEAD * heads[0]
        part.hidden_size = values["hidden_size"] * part.embed_dim // width
    if isinstance(values.get("depth"), list | tuple):
        part.depth = type(values["depth"])(min(n, 3) for n in values["depth"])


def _cut_codes(part: PretrainedConfig) -> None:
    """Narrow the convolutions of what makes codes of pictures, to the least that its norms can group."""
    values: Any = vars(part)
    if CODES in values:
        part.base_channels = min(values["base_channels"], _GROUPS)
        if "hidden_size" in values:
            part.hidden_size = part.base_channels * values[CODES][-1]


def _cut_heads(part: PretrainedConfig, values: Mapping[str, Any]) -> None:
    """Where pictures come in patches, make heads fewer until they are of fours: rotations of two axes want that."""
    width = values.get("embed_dim", values.get("hidden_size"))
    name = next((n for n in ("num_heads", "num_attention_heads") if isinstance(values.get(n), int)), None)
    if name is None or not isinstance(width, int) or "patch_size" not in values:
        return
    heads, groups = values[name], values.get("num_key_value_heads", values[name])
    step = groups if groups < heads else 1
    fit = (n for n in range(heads, 0, -1) if width % n == 0 and width // n % 4 == 0 and n % step == 0)
    setattr(part, name, next(fit, heads))
    if groups == heads and "num_key_value_heads" in values:
        part.num_key_value_heads = values[name]


def _name_sections(part: Any) -> None:
    """Divide what is rotated of a head among time, height and width: the default is in the model's code."""
    parameters = vars(part).get("rope_parameters")
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return
    head = getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
    rotated = int(head * parameters.get("partial_rotary_factor", 1.0)) // 2
    third = 3 * rotated // 8
    parameters["mrope_section"] = [third, third, rotated - 2 * third]


def _agree_with_text(config: Any) -> None:
    """Where a tower's config says how wide the text is, make it so: not every default does."""
    tower, text = tower_config(config, "image"), getattr(config, "text_config", None)
    names = (
        ("out_hidden_size",)
        if "out_hidden_size" in vars(tower)
        else ("hidden_size",)
        if "embed_dim" in vars(tower)
        else ()
    )
    for name in names:
        if text is not None and isinstance(vars(tower).get(name), int):
            setattr(tower, name, text.hidden_size)


def _layers(part: Any, root: Any) -> Any:
    """Layers whose output is used, where there are as many."""
    chosen, depth = part.vision_feature_layer, getattr(tower_config(root, "image"), "num_hidden_layers", None)
    if depth is None:
        return chosen
    if isinstance(chosen, int):
        return chosen if -depth <= chosen <= depth else -1
    return type(chosen)(n if -depth <= n < depth else -1 for n in chosen)


def _pinpoints(part: Any, _: Any) -> list[list[int]]:
    side = tower_config(part, "image").image_size
    return [[side, 2 * side], [2 * side, side]]


_AGREEING: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "image_grid_pinpoints": _pinpoints,
    "projector_patch_to_query_dict": lambda part, root: {_PATCHES**2: _QUERIES},
    "max_value_projector_patch_to_query_dict": lambda part, root: _QUERIES,
    "mm_tokens_per_image": lambda part, root: _QUERIES,
    "vision_feature_layer": _layers,
    "latent_query_num": lambda part, root: 2,
    "num_position_embeddings": lambda part, root: _PATCHES**2,
    "num_patches": lambda part, root: _PATCHES**2,
    "intermediate_layers_indices": lambda part, root: [0, part.num_hidden_layers - 1],
    "vision_output_dim": lambda part, root: part.hidden_size * 3,
}
"""Attribute of a config that says what follows from the size of pictures or the number of layers -> its value.

From that config and the whole model's."""


def _give_tokens(config: PretrainedConfig) -> None:
    """Say which tokens stand for what is sensed, where the defaults leave it open."""
    spare = 100
    if config.model_type == "shieldgemma2":  # reads them with a default of its own
        config.yes_token_index, config.no_token_index = 10, 11
    for sense in _SENSED:
        for name in (f"{sense}_token_id", f"{sense}_token_index"):
            if name in vars(config) and vars(config)[name] is None:
                setattr(config, name, spare)
        spare += 1
