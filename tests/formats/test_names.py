"""What files call the modules of models, against tables that sd-scripts and ComfyUI have made, at true size."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adapterkit.contract.view import ComponentView
from adapterkit.formats.comfy import ComfyFormat
from adapterkit.formats.foreign_names import ForeignNames, flattened
from adapterkit.formats.kohya import _PREFIXES, KohyaFormat
from adapterkit.formats.module_files import ModuleFileFormat
from adapterkit.formats.modules import Modules
from adapterkit.formats.pipeline_parts import candidates, part_of
from adapterkit.formats.prefixes import prefix_of
from adapterkit.handle.view import seen
from adapterkit.mapping.model import map_model
from tests.formats import true_size

TABLES = Path(os.environ.get("ADAPTERKIT_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures")) / "names"


@functools.cache
def components(name: str) -> Mapping[str, ComponentView]:
    model = seen(map_model(true_size.pipeline(name))).model
    assert model is not None
    return model.components


def table(name: str) -> Any:
    if not TABLES.is_dir():
        pytest.skip(f"there is no {TABLES}; ADAPTERKIT_FIXTURES names the folder of the fixtures")
    return json.loads((TABLES / f"{name}.json").read_text())


class Reader:
    """What keys mean for a model."""

    def __init__(self, name: str) -> None:
        self.parts = components(name)
        self.names = {name: ForeignNames(one) for name, one in self.parts.items()}

    def means(self, key: str) -> list[tuple[str, str]]:
        """The component and the path of every module that a key means."""
        prefix = prefix_of(key)
        assert prefix is not None, key
        for component in candidates(prefix.part, self.parts):
            name = key.removeprefix(prefix.text)
            pieces = self.names[component].find(name, flat=prefix.flat, original=prefix.original)
            if pieces is not None:
                return [(component, piece.path) for piece in pieces]
        return []


COUNTS = {"sd15": (72, 192, 86), "sdxl": (264, 722, 66), "flux": (240, 304, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_every_name_that_sd_scripts_makes_means_a_module_and_is_written(name: str) -> None:
    names = table(f"kohya_{name}")["names"]
    assert tuple(map(len, names.values())) == COUNTS[name]
    reader = Reader(name)
    meant = [reader.means(key) for own in names.values() for key in own]
    assert all(meant)
    flat = [one for pieces in meant for one in pieces]
    assert len(set(flat)) == len(flat)
    te = "lora_te_" if name == "sd15" else "lora_te1_"
    written = {
        f"{_PREFIXES[part_of(one, reader.parts)]}{flattened(path)}".replace("lora_te1_", te)
        for one in reader.parts.values()
        for path, _ in reader.names[one.name].written("kohya")
    }
    assert {key for own in names.values() for key in own} <= written


RULES = {
    "orig_kohya": ("lora_unet_", 0),
    "orig_dotted": ("diffusion_model.", 0),
    "diffusers_kohya": ("lora_unet_", 1),
    "lycoris": ("lycoris_", 1),
    "transformer": ("transformer.", 1),
    "base_model": ("base_model.model.", 1),
    "lora_transformer": ("lora_transformer_", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_every_name_that_comfyui_accepts_means_its_module(name: str) -> None:
    tables, reader = table(f"comfyui_{name}"), Reader(name)
    paths = {path for one in reader.parts.values() for path in one.paths}
    checked = 0
    for original, own, part, rules, *_ in tables["modules"]:
        known = [path for path in ([own] if isinstance(own, str) else own or []) if path in paths]
        for rule in tables["rule_sets"][rules]:
            if rule not in RULES or (own is not None and not known):
                continue
            prefix, side = RULES[rule]
            path = (original, (known or [None])[0])[side]
            key = f"{prefix}{path if prefix.endswith('.') else flattened(path)}"
            meant = [one for _, one in reader.means(key)]
            assert meant, (key, own)
            if known and part is None:
                assert meant == known, key
            checked += 1
    assert checked > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_every_name_of_text_encoders_that_comfyui_accepts_means_a_module(name: str) -> None:
    reader = Reader(name)
    for row in table(f"comfyui_{name}")["text"]:
        layers = row["layers"] if isinstance(row["layers"], list) else range(2)
        for key, layer in itertools.product(row["keys"], layers):
            assert reader.means(key.replace("#", str(layer))), key


@pytest.mark.slow
@pytest.mark.parametrize("format", [KohyaFormat(), ComfyFormat()], ids=["kohya", "comfy"])
@pytest.mark.parametrize("name", COUNTS)
def test_comfyui_accepts_every_name_that_is_written(name: str, format: ModuleFileFormat) -> None:
    tables = table(f"comfyui_{name}")
    layers = [str(layer) for layer in range(40)]
    accepted = {key.replace("#", i) for row in tables["text"] for key in row["keys"] for i in layers}
    for original, own, _, rules, *_ in tables["modules"]:
        kinds, ours = tables["rule_sets"][rules], [own] if isinstance(own, str) else own or []
        accepted |= {f"diffusion_model.{original}"} if "orig_dotted" in kinds else set()
        accepted |= {f"lora_unet_{flattened(original)}"} if "orig_kohya" in kinds else set()
        accepted |= {f"lora_unet_{flattened(path)}" for path in ours if "diffusers_kohya" in kinds}
    points = seen(map_model(true_size.pipeline(name)))
    modules, called = Modules(points), format.names(points)
    assert points.model is not None
    written = {
        called(one, part_of(one, points.model.components))(foreign)
        for one in points.model.components.values()
        for foreign, pieces in ForeignNames(one).written(format.naming_style)
        if (places := modules.placed(one.name, pieces)) and len(places[0].shape) > 1
    }
    assert len(written) > 300
    lacking = {key for key in written - accepted if not key.endswith(("embedding", "embed_tokens"))}
    assert lacking == set()
