"""What files say about themselves to the UIs: `ss_*` of kohya's scripts, `modelspec.*`, and hashes."""

from __future__ import annotations

import base64
import collections
import datetime
import hashlib
import json
import math
import mimetypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import adapterkit
from adapterkit.checkpoint import WriteOptions
from adapterkit.contract.naming import KnownBase
from adapterkit.errors import ConfigError, shown
from adapterkit.formats.container import Body
from adapterkit.formats.files import open_plain
from adapterkit.formats.origins import OWN

_THUMBNAIL_LIMIT = 4 << 20
_FOR_PEOPLE = ("title", "author", "description", "license", "tags", "usage_hint")
_OF_BASES = ("architecture", "resolution", "implementation")
_DOWN, _ALPHA = "lora_down.weight", "alpha"
_MATRIX = 2


@dataclass(frozen=True)
class CardOptions(WriteOptions):
    """What a file for the UIs can be told beside the adapter.

    Attributes:
        title, author, description, license, tags, usage_hint: For people; the title is the file's name by default.
        trigger: The words that call what was learnt.
        thumbnail: A picture: its path, or a data URL.
        base: `ss_base_model_version`, where it is not what the model's class says: `sd_v2_v`.
        alpha: The one that every module of LoRA has; by default that of most. Whatever it is, the effect is the same.
        rank: Of what is approximated; 64 by default.
    """

    title: str = ""
    author: str = ""
    description: str = ""
    license: str = ""
    tags: str = ""
    usage_hint: str = ""
    trigger: str = ""
    thumbnail: str | os.PathLike[str] = ""
    base: str = ""
    alpha: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError(problems, "options of save()")

    def _problems(self) -> Iterator[str]:
        for name in (*_FOR_PEOPLE, "trigger", "base"):
            if not isinstance(value := getattr(self, name), str):
                yield f"{name} must be text, not {shown(value)}"
        if not isinstance(picture := self.thumbnail, (str, os.PathLike)):
            yield f"thumbnail must be a path or a data URL, not {shown(picture)}"
        alpha: Any = self.alpha
        if alpha is not None and not (_is_number(alpha) and math.isfinite(alpha) and alpha > 0):
            yield f"alpha must be a positive number, not {shown(alpha)}"
        rank: Any = self.rank
        if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0):
            yield f"rank must be a positive integer, not {shown(rank)}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Card:
    """What is known of a file that is about to be written.

    Attributes:
        known: What the adapter brings along.
        base: The base, if files have a name for it.
        options: What the user says.
        title: Where nobody says another.
    """

    known: Mapping[str, str]
    base: KnownBase | None
    options: CardOptions
    title: str

    def metadata(self, modules: Mapping[str, Mapping[str, Tensor]], body: Body) -> dict[str, str]:
        """The file's metadata.

        Args:
            modules: What is written, by module.
            body: The same as bytes.
        """
        found = {**self.known, **self._scripts(modules)}
        found |= _hashes(body, {key: value for key, value in found.items() if key.startswith("ss_")})
        return found | self._modelspec(found)

    def _scripts(self, modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
        known = self.options.base or self.known.get("ss_base_model_version") or (self.base and self.base.version)
        found = {
            "ss_v2": str((known or "").startswith("sd_v2")),
            "ss_base_model_version": known or "unknown",
            "ss_output_name": self.options.title or self.known.get("ss_output_name") or self.title,
        }
        return found | _network(modules)

    def _modelspec(self, found: Mapping[str, str]) -> dict[str, str]:
        base = self.base
        same = not self.options.base or (base is not None and self.options.base == base.version)
        must = {
            "sai_model_spec": "1.0.1",
            "architecture": f"{base.architecture if base and same else found['ss_base_model_version']}/lora",
            "implementation": base.implementation if base else "diffusers",
            "title": found["ss_output_name"],
            "resolution": f"{base.width}x{base.height}" if base else "1024x1024",
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "implementation_version": f"{OWN}{adapterkit.__version__}",
            "hash_sha256": f"0x{found['sshs_model_hash']}",
        }
        known = {key.removeprefix("modelspec."): v for key, v in found.items() if key.startswith("modelspec.")}
        kept = {key: known[key] for key in _OF_BASES if key in known and same}
        kept |= {key: known[key] for key in ("title", "date") if key in known}
        told = {name: getattr(self.options, name) for name in _FOR_PEOPLE}
        told |= {
            "title": self.options.title,
            "trigger_phrase": self.options.trigger,
            "thumbnail": _picture(self.options.thumbnail),
        }
        every = {**known, **must, **kept, **{name: text for name, text in told.items() if text}}
        return {f"modelspec.{name}": text for name, text in every.items()}


def _network(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Module, dimension, alpha and arguments, as the scripts would have been told them."""
    downs = {name: own[_DOWN] for name, own in modules.items() if _DOWN in own}
    alphas = {float(own[_ALPHA]) for own in modules.values() if _ALPHA in own}
    others = len(downs) < len(modules) or any(
        own.keys() - {_DOWN, "lora_up.weight", _ALPHA} for own in modules.values()
    )
    linear = [len(down) for down in downs.values() if down.ndim == _MATRIX or down[0, 0].numel() == 1]
    conv = [len(down) for down in downs.values() if down.ndim > _MATRIX and down[0, 0].numel() > 1]
    alpha = _one([*alphas])
    return {
        "ss_network_module": _module(modules) if others else "networks.lora",
        "ss_network_dim": _one(linear or conv),
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": _one(conv), "conv_alpha": alpha} if conv and not others else {}),
    }


def _module(modules: Mapping[str, Mapping[str, Tensor]]) -> str:
    return "networks.oft" if all(name.startswith("oft_unet_") for name in modules) else "lycoris.kohya"


def _one(values: Sequence[float]) -> str:
    """The one value, as text; or what the scripts write where there are several."""
    counted = collections.Counter(values)
    return str(next(iter(counted))) if len(counted) == 1 else "Dynamic" if counted else "None"


def _hashes(body: Body, metadata: Mapping[str, str]) -> dict[str, str]:
    """As the UIs compute them: over the tensors alone, and over 64 kB of a file that has no more metadata than this."""
    header = body.header(metadata)
    whole, window = hashlib.sha256(), hashlib.sha256()
    start, stop, at = 0x100000, 0x110000, len(header)
    window.update(header[start:stop])
    for piece in body.pieces:
        whole.update(piece)
        if at < stop:
            window.update(piece[max(start - at, 0) : stop - at])
        at += len(piece)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:8]}


def _picture(given: str | os.PathLike[str]) -> str:
    """A picture as a data URL.

    Raises:
        ConfigError: There is none at this path, or it is too large for a header.
    """
    text = os.fspath(given)
    if not text or text.startswith("data:"):
        return text
    kind = mimetypes.guess_type(text)[0] or ""
    if not kind.startswith("image/"):
        raise ConfigError([f"thumbnail must be a picture (.png, .jpg, .webp), not {shown(text)}"], "save()")
    with open_plain(Path(text)) as (file, size):
        if size > _THUMBNAIL_LIMIT:
            raise ConfigError([f"thumbnail has {size:,} bytes; the limit is {_THUMBNAIL_LIMIT:,}"], "save()")
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"
