"""Files of kohya's scripts and of the UIs: `lora_unet_<module, dots as _>.lora_down.weight` and the like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from adapterkit.checkpoint import Checkpoint, Format, ReadOptions, ReadReport, WriteOptions, WriteReport, single
from adapterkit.codec import Context, Place
from adapterkit.formats import container
from adapterkit.formats.dialect import Dialect, ForeignModule, written_modules
from adapterkit.formats.modules import Module, Modules, made_up
from adapterkit.formats.parts import Collected, said_of
from adapterkit.formats.source import Source
from adapterkit.points import Points

DIALECT = "lycoris"
_PREFIXES = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}


class KohyaFormat(Format):
    """One safetensors file; each module's tensors lie under its path, with `_` in the place of dots."""

    def recognises(self, source: Source) -> bool:
        names = Dialect(DIALECT).names
        return any(_split(key, names) for key in source.entries)

    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        dialect, context, found = Dialect(DIALECT), Context(source.where), Collected(source.where)
        tensors = source.tensors()
        modules, left_over = _grouped(tensors, dialect)
        here = _by_name(points)
        foreign: list[ForeignModule] = []
        for name, keys in modules.items():
            places: Sequence[Place] | None = here.get(name)
            if not len(points):
                shape = dialect.shape({own: tensors[key] for own, key in keys.items()}, context)
                places = None if shape is None else [made_up("model", name, shape)]
            foreign.append(ForeignModule(name, keys, places))
        reading = dialect.read(foreign, tensors, context, found)
        checkpoint = Checkpoint(found.parts(context.shared), metadata=dict(source.metadata))
        report = ReadReport(
            reading.matched, reading.unmatched, [*left_over, *reading.left_over], list(context.notes), fresh=True
        )
        return ({"": checkpoint} if found else {}), report

    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
    ) -> WriteReport | None:
        checkpoint = single(checkpoints, target)
        dialect, context = Dialect(DIALECT), Context(target, options=options)
        modules = [(f"{prefixes[0]}{_flat(one.path)}", one.places) for one, prefixes in _prefixed(points)]
        tensors = {
            f"{name}.{own}": options.cast(tensor)
            for name, touched in written_modules(said_of(checkpoint), modules)
            for own, tensor in dialect.write(name, touched, context).items()
        }
        container.write(target, tensors, dict(checkpoint.metadata))
        return WriteReport(list(context.notes))


def _split(key: str, names: frozenset[str]) -> tuple[str, str] | None:
    module, _, name = key.partition(".")
    known = name in names and any(module.startswith(p) for prefixes in _PREFIXES.values() for p in prefixes)
    return (module, name) if known else None


def _grouped(keys: Mapping[str, object], dialect: Dialect) -> tuple[dict[str, dict[str, str]], list[str]]:
    found: dict[str, dict[str, str]] = {}
    left_over: list[str] = []
    for key in keys:
        split = _split(key, dialect.names)
        if split is None:
            left_over.append(key)
        else:
            found.setdefault(split[0], {})[split[1]] = key
    return found, left_over


def _prefixed(points: Points) -> Iterator[tuple[Module, Sequence[str]]]:
    for module in Modules(points):
        if module.component in _PREFIXES:
            yield module, _PREFIXES[module.component]


def _by_name(points: Points) -> dict[str, list[Place]]:
    return {f"{prefix}{_flat(one.path)}": one.places for one, prefixes in _prefixed(points) for prefix in prefixes}


def _flat(path: str) -> str:
    return path.replace(".", "_")
