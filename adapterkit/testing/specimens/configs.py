"""A config of transformers made small: every kind of layer stays, widths, depth, experts and the vocabulary shrink."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from transformers import PreTrainedConfig

from adapterkit.testing.specimens.config_names import (
    AT_MOST,
    CODES,
    DEPTHS,
    HEAD_COUNTS,
    HEAD_WIDTHS,
    INDEX_LISTS,
    INNER_WIDTHS,
    MODEL_WIDTHS,
    ROTATED_IN_FOURS,
    SHARED_BLOCKS,
    VOCABULARIES,
    WHERE_NONE,
    WIDTHS,
)

VOCABULARY: Final = 128
_DIVISORS: Final = (16, 8, 4, 2)
_LEAST_HEAD: Final = 4
_MOST_INNER: Final = 96
_ID_ENDINGS: Final = ("_token_id", "_token_index", "_token_ids")


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Give a small copy of a config and of all configs in it.

    All widths are divided by one number, so that what had to agree still does; heads stay as many as they are. Layers
    are cut to the first of every kind, at least two; lists that say something per layer are cut in step.
    """
    small = copy.deepcopy(config)
    parts = list(_configs(small))
    wide = [part for part in parts if CODES not in vars(part)]
    divisor = next((d for d in _DIVISORS if all(_divides(part, d) for part in wide)), 1)
    ids = _new_ids(parts)
    for part in wide:
        _narrow(part, divisor)
    for part in parts:
        _cut_layers(part)
        _limit(part)
        _move_ids(part, ids)
        part.use_cache = False
        part._experts_implementation = "eager"  # of those that transformers has, the one in float64
    return small


def special_ids(config: PreTrainedConfig) -> frozenset[int]:
    """Give all token ids that the configs name: ordinary text has none of them."""
    return frozenset(value for part in _configs(config) for _, values in _ids(part) for value in values)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Give a config and those within it, each once."""
    seen: set[int] = set()
    waiting = [config]
    while waiting:
        part = waiting.pop()
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            waiting.extend(value for value in vars(part).values() if isinstance(value, PreTrainedConfig))


def _numbers(value: object) -> list[int]:
    """Give the integers of a value that is one or a flat sequence of them."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _mapped(value: Any, change: Any) -> Any:
    """Apply a function to an integer, or to those of a list or tuple, which stays one."""
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, change) for v in value)
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


# widths


def _divides(config: PreTrainedConfig, divisor: int) -> bool:
    """Tell whether all widths stay whole, and the heads even and not too small (rotary embeddings want pairs)."""
    values = vars(config)
    exact = [n for name in WIDTHS for n in _numbers(values.get(name)) if n > 0]
    if any(n % divisor for n in exact):
        return False
    factors, unit = _rotated(config), 4 if config.model_type in ROTATED_IN_FOURS else 2
    return all(_good_head(width, divisor, factors, unit) for width in _head_widths(config))


def _good_head(width: int, divisor: int, factors: list[float], unit: int) -> bool:
    """Tell whether a head may be divided: what of it are pairs, or other units, has to stay so."""
    small = width // divisor
    pairs = [(width, small), *((int(width * f), int(small * f)) for f in factors)]
    whole = all(new % unit == 0 and new > 0 for old, new in pairs if old % unit == 0)
    return small >= _LEAST_HEAD and whole and (width % 2 == 1 or width % divisor == 0)


def _rotated(config: PreTrainedConfig) -> list[float]:
    """Give which parts of a head are rotated, where a config says so."""
    parameters = vars(config).get("rope_parameters")
    sets = [parameters, *parameters.values()] if isinstance(parameters, Mapping) else []
    places = [vars(config), *(s for s in sets if isinstance(s, Mapping))]
    return [
        f for place in places if isinstance(f := place.get("partial_rotary_factor", place.get("rotary_pct")), float)
    ]


def _head_widths(config: PreTrainedConfig) -> list[int]:
    values = vars(config)
    said = [n for name in HEAD_WIDTHS for n in _numbers(values.get(name)) if n > 0]
    hidden = [n for name in MODEL_WIDTHS for n in _numbers(values.get(name))]
    heads = [n for name in HEAD_COUNTS for n in _numbers(values.get(name)) if n > 0]
    if len(hidden) > 1 and len(hidden) == len(heads):
        return said or [width // count for width, count in zip(hidden, heads, strict=True)]
    return said or [width // count for width in hidden for count in heads if width % count == 0]


def _narrow(config: PreTrainedConfig, divisor: int) -> None:
    for name, value in list(vars(config).items()):
        if name in WIDTHS or name in HEAD_WIDTHS:
            setattr(config, name, _mapped(value, lambda n: n // divisor if n > 0 else n))
        elif name in INNER_WIDTHS:
            setattr(config, name, _mapped(value, lambda n: min(_MOST_INNER, max(8, -(-n // divisor))) if n > 0 else n))
    parameters = vars(config).get("rope_parameters")
    for place in (vars(config), *(parameters.values() if isinstance(parameters, Mapping) else ()), parameters):
        if isinstance(place, dict) and isinstance(place.get("mrope_section"), list | tuple):
            place["mrope_section"] = [n // divisor for n in place["mrope_section"]]


# depth


def _cut_layers(config: PreTrainedConfig) -> None:
    """Leave the first layer of each kind, twice over where later ones share keys and values, and at least two."""
    values = vars(config)
    depths = [name for name in DEPTHS if isinstance(values.get(name), int)]
    count = max((values[name] for name in depths), default=0)
    lists = {
        n: v for n, v in values.items() if isinstance(v, list | tuple) and len(v) == count > 2 and n not in INDEX_LISTS
    }
    indices = {n: v for n, v in values.items() if n in INDEX_LISTS and isinstance(v, list | tuple)}
    kinds = [*(list(map(repr, v)) for v in lists.values()), *([i in v for i in range(count)] for v in indices.values())]
    pattern = values.get("block_types")  # of kinds that take turns
    least = max(2, len(pattern) if isinstance(pattern, list | tuple) else 0)
    kept = _kept(count, kinds, each=2 if config.model_type in SHARED_BLOCKS else 1, least=least)
    shared = values.get("num_kv_shared_layers")
    if isinstance(shared, int) and shared > 0:
        config.num_kv_shared_layers = len(kept)
        kept = kept * 2
    for name, value in lists.items():
        setattr(config, name, type(value)(value[i] for i in kept))
    for name, value in indices.items():
        setattr(config, name, type(value)(new for new, old in enumerate(kept) if old in value))
    for name in depths:
        setattr(config, name, min(values[name], len(kept)))


def _kept(count: int, lists: Sequence[Sequence[object]], each: int, least: int) -> list[int]:
    """Give the layers that stay: the first ones of each kind, in order, and others until there are enough."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for layer in range(count):
        kinds.setdefault(tuple(values[layer] for values in lists), []).append(layer)
    kept = {layer for layers in kinds.values() for layer in layers[:each]}
    for layer in range(count):
        if len(kept) < least:
            kept.add(layer)
    return sorted(kept)


def _limit(config: PreTrainedConfig) -> None:
    for name, value in list(vars(config).items()):
        if value is None and name in WHERE_NONE:
            setattr(config, name, WHERE_NONE[name])
        elif name in AT_MOST:
            setattr(config, name, _mapped(value, lambda n, most=AT_MOST[name]: min(n, most)))
        elif name in VOCABULARIES:
            setattr(config, name, _mapped(value, lambda n: min(n, VOCABULARY)))


# special tokens


def _ids(config: PreTrainedConfig) -> Iterator[tuple[str, list[int]]]:
    for name, value in vars(config).items():
        if name.endswith(_ID_ENDINGS):
            yield name, [n for n in _numbers(value) if n >= 0]


def _new_ids(configs: list[PreTrainedConfig]) -> dict[int, int]:
    """Give ids beyond the vocabulary new ones at its end, distinct ones distinct, the same in every config."""
    beyond = sorted({n for config in configs for _, values in _ids(config) for n in values if n >= VOCABULARY})
    return {old: VOCABULARY - 1 - place for place, old in enumerate(beyond)}


def _move_ids(config: PreTrainedConfig, ids: Mapping[int, int]) -> None:
    for name in [name for name, _ in _ids(config)]:
        setattr(config, name, _mapped(getattr(config, name), lambda n: ids.get(n, n)))
