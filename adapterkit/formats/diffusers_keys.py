"""Keys of diffusers' files, of every generation: which model is meant, which module, and what of an adapter it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adapterkit.contract.view import ComponentView
from adapterkit.errors import CheckpointError
from adapterkit.formats.dialect import Dialect
from adapterkit.formats.module_keys import Found
from adapterkit.formats.prefixes import ANY, DENOISER, TEXT, TEXT_1, TEXT_2, TEXT_3, Prefix

STYLE = "diffusers"
PARTS = {
    "unet": DENOISER,
    "transformer": DENOISER,
    "prior": DENOISER,
    "text_encoder": TEXT_1,
    "text_encoder_2": TEXT_2,
    "text_encoder_3": TEXT_3,
    "text_encoder_4": TEXT,
}
"""What stands in front of keys -> the model that is meant, where the one at hand has no component of that name."""
_TEXTS = PARTS.keys() - {"unet", "transformer", "prior"}
_SECOND = "transformer_2"
_ALPHA = "alpha"
_FACTORS = {"down": "lora_A", "up": "lora_B"}
_OLD = re.compile(r"(.+?)(\.lora|\.lora_linear_layer|_lora)\.(down|up)\.(weight|bias)")
_OLD_ALPHA = re.compile(
    r"(.+?)(\.lora|\.lora_linear_layer|_lora)?(?:\.down|\.up|\.lora_A|\.lora_B)?(?:\.weight)?\.alpha"
)
_WITH_ADAPTER = re.compile(r"(.+\.lora_(?:A|B|magnitude_vector))\.(?!weight$|bias$)\w+(\.weight|\.bias)?")
_LONGEST = 1000
"""Characters of a key that is looked at: names of modules are shorter."""
_USUAL = (".lora_A.weight", ".lora_B.weight")
_OF_TEXTS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What the oldest files call projections of text encoders."""
_OUT, _OUT_LAYER = "to_out", "to_out.0"
_MAGNITUDE = "lora_magnitude_vector"


class DiffusersPrefix(Prefix):
    """The name of a pipeline's component, or nothing. Names behind it are the library's."""

    @property
    def original(self) -> bool:
        return False


@dataclass(frozen=True)
class Key:
    """What a key says.

    Attributes:
        module: The module as the file calls it now, its part in front of it.
        name: The tensor's name in the dialect `peft`, or `alpha`.
        old: Whether it is spelled as before diffusers took PEFT's names.
    """

    module: str
    name: str
    old: bool = False


def parsed(key: str, dialect: Dialect) -> Key | None:
    """What a key says; None where it is none of an adapter."""
    if len(key) > _LONGEST:
        return None
    for end in _USUAL:
        if key.endswith(end) and ".processor." not in key:
            return Key(key.removesuffix(end), end[1:])
    key = key.replace(".processor.", ".")
    if (found := _OLD.fullmatch(key)) is not None:
        module, spelling, way, what = found.groups()
        return Key(_of_projection(module) if spelling == "_lora" else module, f"{_FACTORS[way]}.{what}", old=True)
    if (found := _OLD_ALPHA.fullmatch(key)) is not None:
        return Key(_of_projection(found[1]) if found[2] == "_lora" else found[1], _ALPHA)
    if (found := _WITH_ADAPTER.fullmatch(key)) is not None:
        key = found[1] + (found[2] or "")
    split = dialect.split(key)
    return Key(*split) if split is not None and split[0] else None


def _of_projection(module: str) -> str:
    """The layer of what processors of attention called `to_q_lora`."""
    attention, _, projection = module.rpartition(".")
    if module.partition(".")[0] in _TEXTS:
        return f"{attention}.{_OF_TEXTS.get(projection, projection)}"
    return f"{attention}.{_OUT_LAYER}" if projection == _OUT else module


@dataclass
class Keys:
    """A file's keys.

    Attributes:
        modules: Those of adapters, by module.
        alphas: Prefix and name of a module -> the key that has its alpha.
        left_over: Those of nothing that is known.
        mixed: Prefixes whose modules are spelled in several ways.
    """

    modules: list[Found] = field(default_factory=list)
    alphas: dict[tuple[str, str], str] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)


def grouped(
    keys: Iterable[str],
    dialect: Dialect,
    components: Mapping[str, ComponentView],
    where: object = None,
    component: str = "",
) -> Keys:
    """A file's keys by module.

    Args:
        keys: The file's.
        dialect: Who knows which names.
        components: Those of the model at hand.
        where: What errors name.
        component: See `DiffusersReadOptions`.

    Raises:
        CheckpointError: Two keys say the same.
    """
    found: dict[tuple[str, str], Found] = {}
    spellings: dict[str, set[bool]] = {}
    result = Keys()
    names = _names(components, component)
    for key in keys:
        one = parsed(key, dialect)
        if one is None:
            result.left_over.append(key)
            continue
        prefix = _prefix(one.module, names)
        place = prefix.text, one.module.removeprefix(prefix.text)
        if one.name == _ALPHA:
            own = {_ALPHA: result.alphas[place]} if place in result.alphas else {}
            result.alphas[place] = key
        else:
            own = found.setdefault(place, Found(prefix, place[1])).keys
            spellings.setdefault(prefix.text, set()).add(one.old)
        if one.name in own:
            raise CheckpointError(f"says the same as {own[one.name]!r}", where, key)
        if one.name != _ALPHA:
            own[one.name] = key
    result.modules = list(_with_magnitudes(found).values())
    result.mixed = [prefix for prefix, ways in spellings.items() if len(ways) > 1]
    return result


def _names(components: Mapping[str, ComponentView], chosen: str) -> dict[str, str]:
    """What can stand in front of keys -> which model it is; see `pipeline_parts.candidates`."""
    inside = {path for one in components.values() for path in one.paths if "." not in path}
    own = {name: name for name in components if name not in _TEXTS and not (chosen and name in PARTS)}
    known = {_SECOND: _SECOND, **PARTS, **own}
    return {name: part for name, part in known.items() if name not in inside}


def _prefix(module: str, names: Mapping[str, str]) -> DiffusersPrefix:
    word, _, rest = module.partition(".")
    if not rest or word not in names:
        return DiffusersPrefix("", ANY, STYLE, flat=False)
    return DiffusersPrefix(f"{word}.", names[word], STYLE, flat=False)


def _with_magnitudes(found: dict[tuple[str, str], Found]) -> dict[tuple[str, str], Found]:
    """Files of DoRA have had the magnitude of `to_out.0` under `to_out`."""
    for (prefix, name), one in list(found.items()):
        layer = found.get((prefix, f"{name.removesuffix(_OUT)}{_OUT_LAYER}"))
        if one.keys.keys() == {_MAGNITUDE} and name.endswith(f".{_OUT}") and layer is not None:
            layer.keys.setdefault(_MAGNITUDE, one.keys[_MAGNITUDE])
            del found[prefix, name]
    return found
