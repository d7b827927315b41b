"""From a file of diffusers to an adapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapterkit.checkpoint import Checkpoint, ReadOptions, ReadReport
from adapterkit.contract.codec import Context
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit.formats.dialect import Dialect, ForeignModule
from adapterkit.formats.diffusers_config import KEY, Metadata
from adapterkit.formats.diffusers_keys import grouped
from adapterkit.formats.module_keys import Found
from adapterkit.formats.origins import base_of
from adapterkit.formats.parts import Collected
from adapterkit.formats.placing import Placing
from adapterkit.formats.source import Source
from adapterkit.points import Points

DIALECT = "peft"
_NOT_KEPT = (KEY, "format")
_SCALES = ("lora_alpha", "alpha")


@dataclass(frozen=True)
class DiffusersReadOptions(ReadOptions):
    """How to read.

    Attributes:
        component: Of a pipeline with several transformers or UNets, the one that the file is for: what diffusers calls
            `load_into_transformer_2`.
    """

    component: str = ""


class DiffusersReader:
    """Reads one file.

    Args:
        source: It.
        points: The model's.
        component: See `DiffusersReadOptions`.

    Raises:
        CheckpointError: Its keys or its metadata are not what they should be.
    """

    def __init__(self, source: Source, points: Points, component: str = "") -> None:
        self._source, self._points, self._component = source, points, component
        self._dialect = Dialect(DIALECT)
        self._context = Context(source.where)
        components = {} if points.model is None else points.model.components
        self._keys = grouped(source.entries, self._dialect, components, source.where, component)
        self._metadata = Metadata(source.metadata.get(KEY), source.where)

    def read(self) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        """See `Format.read`."""
        keys, into = self._keys, Collected(self._source.where)
        placing = Placing(self._points, self._dialect, self._context, self._source.entries, self._component)
        placed = list(placing.all(keys.modules))
        tensors = self._source.tensors(
            {*keys.alphas.values(), *(key for one, places in placed if places for key in one.keys.values())}
        )
        matched, unmatched, left_over = list[str](), list[str](), [*keys.left_over]
        alphas = dict(keys.alphas)
        for one, places in placed:
            alpha = alphas.pop((one.prefix.text, one.name), None)
            context = dataclasses.replace(self._context, config=self._config(one, alpha, tensors))
            module = ForeignModule(f"{one.prefix.text}{one.name}", one.keys, places)
            reading = self._dialect.read([module], tensors, context, into)
            if alpha is not None:
                (matched if reading.matched else unmatched).append(alpha)
            matched += reading.matched
            unmatched += reading.unmatched
            left_over += reading.left_over
        self._tell(into)
        report = ReadReport(
            matched,
            unmatched,
            [*left_over, *alphas.values()],
            list(self._context.notes),
            "diffusers" if self._metadata else "",
            self._metadata.version,
            base_of(self._source.metadata, self._source.entries.items()),
            fresh=True,
        )
        metadata = {key: text for key, text in self._source.metadata.items() if key not in _NOT_KEPT}
        return ({"": Checkpoint(into.parts(self._context.shared), metadata=metadata)} if into else {}), report

    def _config(self, one: Found, alpha: str | None, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """What is said for a module: by the metadata, and by an alpha of its own."""
        config = self._metadata.config(one.prefix.text).at(one.name)
        if alpha is None:
            return config
        value = _number(tensors[alpha], self._source.where, alpha)
        if (said := config.get("lora_alpha")) is not None and said != value:
            raise CheckpointError(f"is {value:g}, and {KEY} has {said:g}", self._source.where, alpha)
        return {**config, **dict.fromkeys(_SCALES, value)}

    def _tell(self, into: Collected) -> None:
        for prefix in self._keys.mixed:
            told = f"keys of {prefix or 'it'} are spelled in several ways, of which diffusers reads those of the first"
            self._context.note(f"{told}; all of them are read here")
        if into and not self._metadata and not self._keys.alphas:
            self._context.note("says no alpha, which is then the rank, as diffusers has it")


def _number(tensor: Tensor, where: object, key: str) -> float:
    if tensor.numel() != 1:
        raise ShapeMismatchError(f"has shape {tuple(tensor.shape)}; expected one number", where, key)
    value = float(tensor)
    if not math.isfinite(value):
        raise CheckpointError(f"is {value}; expected a number", where, key)
    return value
