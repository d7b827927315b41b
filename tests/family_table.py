"""`python -m tests.family_table` writes plugins/POINTS.md: what each family offers, and where each adapter type acts.

Everything is read off tiny models of each family, so the table says what the code does.
"""

from __future__ import annotations

from adapterkit.torchvision_ops import ensure_torchvision_ops

ensure_torchvision_ops()

import sys  # noqa: E402 - only after the lines above
from collections.abc import Callable, Iterable, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from torch import nn  # noqa: E402

import adapterkit as ak  # noqa: E402
from adapterkit.points import InjectionPoint, Points, TokensLayout  # noqa: E402
from tests.backends import (  # noqa: E402
    dense_models,
    diffusion_models,
    generic_models,
    language_models,
    multimodal_models,
    test_clip,
    transformers_models,
    vision_families,
    vision_models,
    vit_variants,
)

PATH = Path(__file__).parents[1] / "plugins" / "POINTS.md"
_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
"""Parts of roles that are told in this order; all others follow by name."""

PROVIDERS = ("adapterkit", "adapterkit-ia3")
"""The distributions whose adapter types have a column: what else is installed must not change the table."""

_NEED_OTHERS = ("union", "fuse")
"""Types that act where others do."""

Make = Callable[[], nn.Module]

_HEAD = """\
# Points

What families offer of which the code says more than their structure does, and at how many points of a tiny model of two
layers each adapter type can act. `–` means that it cannot act there at all. Every architecture is in
[FAMILIES.md](FAMILIES.md). Generated: `python -m tests.family_table`.

- **weights**: roles of projections, convolutions and embeddings; `(read)` are those that the model reads instead of
  calling, `(spans)` those that share a module with others.
- **outputs**: sublayers whose output an adapter can change. **attention**: where keys and values can be extended.
- **tokens**: whether the embedded sequence can be changed, and whether it may become longer.
- **experts**: roles that there are once for every expert.
"""


def families() -> dict[str, dict[str, Make]]:
    """Tiny models by section and name, from the builders of the families' own tests."""

    def skeletons(names: Iterable[str], make: Callable[[str], nn.Module]) -> dict[str, Make]:
        return {name: lambda name=name: make(name) for name in names}

    def language(name: str) -> nn.Module:
        return language_models.skeleton(name, language_models.EVERY[name])

    text = {
        **skeletons(language_models.CONFIGS, language),
        **skeletons(dense_models.VARIANTS, dense_models.skeleton),
        **skeletons(transformers_models.CONFIGS, transformers_models.skeleton),
    }
    vision = {"vit": vit_variants.vit, "timm vit": vision_models.timm_vit, **vision_families.FAMILIES}
    diffusion = {
        "unet (SD 1.5)": vision_models.unet,
        "unet (SDXL)": vision_models.unet_xl,
        **diffusion_models.FAMILIES,
        "clip text encoder": test_clip.build,
    }
    return {
        "Language": text,
        "Vision": vision,
        "Vision and language": dict(multimodal_models.MAKE),
        "Diffusion": diffusion,
        "No family": {"torch's own layers, and names": generic_models.Mixed},
    }


def table() -> str:
    """The whole page."""
    sections = [_HEAD]
    types = _types()
    for section, makes in families().items():
        columns = ["family", "weights", "outputs", "attention", "tokens", "experts", *types]
        lines = [f"## {section}", "", _row(columns), _row(["---"] * 6 + ["---:"] * len(types))]
        with torch.random.fork_rng(devices=[]):
            rows = {name: _cells(ak.points(make()), types) for name, make in makes.items()}
        lines += [_row([name, *cells]) for name, cells in rows.items()]
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _types() -> dict[str, ak.AdapterConfig]:
    specs = ak.get_plugin_manager().adapters()
    known = {name: spec for name, spec in specs.items() if spec.origin and spec.origin.distribution in PROVIDERS}
    return {name: spec.load()() for name, spec in sorted(known.items()) if name not in _NEED_OTHERS}


def _cells(points: Points, types: Mapping[str, ak.AdapterConfig]) -> list[str]:
    weights = [point for point in points if point.kind == "weight"]
    tokens = [point.layout for point in points if isinstance(point.layout, TokensLayout)]
    longer = any(layout.extendable for layout in tokens)
    usable = [sum(config.accepts(point) is None for point in points) for config in types.values()]
    return [
        _roles([point for point in weights if "expert" not in point.tags], marked=True),
        _roles(point for point in points if point.kind == "output"),
        _roles(point for point in points if point.kind == "attention"),
        ("change, extend" if longer else "change") if tokens else "–",
        _roles(point for point in weights if "expert" in point.tags),
        *(str(count) if count else "–" for count in usable),
    ]


def _roles(points: Iterable[InjectionPoint], *, marked: bool = False) -> str:
    """`attn.{q,k,v} (spans), attn.o`: roles with one first word and one way of access share braces."""
    groups: dict[tuple[str, str], list[str]] = {}
    for role, mark in sorted({(point.role, _mark(point) if marked else "") for point in points}, key=_place):
        first, _, rest = role.partition(".")
        groups.setdefault((first, mark), []).append(rest)
    return ", ".join(f"{_braced(first, rest)}{mark}" for (first, mark), rest in groups.items()) or "–"


def _place(role_and_mark: tuple[str, str]) -> tuple[str, int, str, str]:
    (first, _, rest), mark = role_and_mark[0].partition("."), role_and_mark[1]
    return first, _ORDER.index(rest) if rest in _ORDER else len(_ORDER), rest, mark


def _braced(first: str, rest: list[str]) -> str:
    words = ([first] if "" in rest else []) + [f"{first}.{word}" for word in rest if word][:1]
    named = [word for word in rest if word]
    if len(named) > 1:
        words[-1] = f"{first}.{{{','.join(named)}}}"
    return ", ".join(f"`{word}`" for word in words)


def _mark(point: InjectionPoint) -> str:
    read = getattr(point.layout, "access", "call") == "read"
    marks = (["spans"] if point.span or point.in_span else []) + (["read"] if read else [])
    return f" ({', '.join(marks)})" if marks else ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PATH.write_text(table(), encoding="utf-8")
    sys.stdout.write(f"wrote {PATH.relative_to(Path.cwd()) if PATH.is_relative_to(Path.cwd()) else PATH}\n")
