"""Files of diffusers: `pytorch_lora_weights.safetensors`, with a pipeline's components in front of PEFT's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from adapterkit.checkpoint import Checkpoint, Format, ReadOptions, ReadReport, WriteOptions, WriteReport, single
from adapterkit.errors import MissingKeysError
from adapterkit.formats.dialect import Dialect
from adapterkit.formats.diffusers_config import KEY
from adapterkit.formats.diffusers_keys import parsed
from adapterkit.formats.diffusers_read import DIALECT, DiffusersReader, DiffusersReadOptions
from adapterkit.formats.diffusers_write import DiffusersWriteOptions, write_file
from adapterkit.formats.module_keys import style_of
from adapterkit.formats.peft_config import config_in
from adapterkit.formats.peft_keys import is_wrapped
from adapterkit.formats.source import Source
from adapterkit.points import Points

FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_SIGNS = frozenset({"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"})
_SIGN = "lora"
"""What every key has that says one of those, in whatever spelling."""


class DiffusersFormat(Format):
    """What `save_lora_weights`, `save_lora_adapter` and `save_attn_procs` of diffusers have written."""

    read_options = DiffusersReadOptions
    write_options = DiffusersWriteOptions

    def recognises(self, source: Source) -> bool:
        if source.is_folder:
            return _in_folder(source) is not None and config_in(source) is None
        keys, own = source.entries, KEY in source.metadata
        if style_of(keys, shared=not own) is not None:  # the first key tells, of a file that is another's
            return False
        return not any(is_wrapped(key) for key in keys) and _is_one(keys, own)

    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        name = _in_folder(source) if source.is_folder else None
        if source.is_folder and name is None:
            raise MissingKeysError(f"has no {' or '.join(FILES)}", source.where)
        assert isinstance(options, DiffusersReadOptions)
        file = source if name is None else source.file(name)
        return DiffusersReader(file, points, options.component).read()

    def place(self, folder: Path, title: str) -> Path:
        return folder / FILES[0]

    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
    ) -> WriteReport | None:
        assert isinstance(options, DiffusersWriteOptions)
        file = target / FILES[0] if target.is_dir() else target
        return write_file(single(checkpoints, target), points, options, file)


def _is_one(keys: Iterable[str], own: bool) -> bool:
    """Whether there is a key of LoRA, or, in a file with metadata of its own, of any type."""
    likely = [key for key in keys if own or _SIGN in key]
    if not likely:  # of a file of another format, and quick
        return False
    dialect = Dialect(DIALECT)
    found = (parsed(key, dialect) for key in likely)
    return any(one is not None and (own or one.name in _SIGNS) for one in found)


def _in_folder(folder: Source) -> str | None:
    return next((name for name in FILES if name in folder.files), None)
