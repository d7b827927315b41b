"""A model's tensors, read one by one from its safetensors files: of a model of any size, no more is in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from adapterkit.errors import CheckpointError, ModelNotFoundError
from adapterkit.formats import container, strict_json
from adapterkit.formats.container import Entry, Header
from adapterkit.formats.files import open_plain
from adapterkit.formats.strict_json import StrictJSONError

_LIMIT = 1 << 50  # a model may have any size
_INDEX_LIMIT = 1 << 28
_INDEX = ".safetensors.index.json"


class Tensors(Protocol):
    """Tensors by name."""

    @property
    def names(self) -> Sequence[str]:
        """Of all of them."""
        raise NotImplementedError

    def __contains__(self, name: object, /) -> bool: ...

    def entry(self, name: str) -> Entry:
        """Dtype and shape of one."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """One of them."""
        raise NotImplementedError


class TensorMap:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @property
    def names(self) -> Sequence[str]:
        """Of all of them."""
        return [*self._tensors]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def entry(self, name: str) -> Entry:
        """Dtype and shape of one."""
        return Entry(self._tensors[name].dtype, tuple(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        """One of them: the caller's own."""
        return self._tensors[name].detach()


class TensorFiles:
    """Tensors by name, in one file or several.

    Args:
        paths: The files.

    Raises:
        CheckpointError: One is no safetensors file, or two have a tensor of one name.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.headers: Mapping[Path, Header] = {path: container.read_header(path, _LIMIT) for path in paths}
        self._places: dict[str, Path] = {}
        for path, header in self.headers.items():
            for name in header.entries:
                if name in self._places:
                    raise CheckpointError(f"is in {self._places[name].name} too", path, name)
                self._places[name] = path

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors."""
        return [*self._places]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def path(self, name: str) -> Path:
        """The file that has a tensor."""
        return self._places[name]

    def entry(self, name: str) -> Entry:
        """Dtype and shape of a tensor."""
        return self.headers[self._places[name]].entries[name]

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        path = self._places[name]
        return container.read_tensors(path, self.headers[path], [name], _LIMIT)[name]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights in a folder.

    Raises:
        ModelNotFoundError: There are none, or several sets of them.
    """
    index = sorted(folder.glob(f"*{_INDEX}"))
    plain = [path for path in sorted(folder.glob("*.safetensors")) if "." not in path.stem]
    if len(index) == 1 or (index and not plain):
        return _of_index(min(index, key=lambda path: len(path.name)))
    single = [path for path in plain if "-of-" not in path.stem]
    if len(single) == 1:
        return single
    if not plain:
        raise ModelNotFoundError(
            f"{folder} holds no weights in safetensors files; save them so: model.save_pretrained(folder)"
        )
    names = ", ".join(path.name for path in plain[:5])
    raise ModelNotFoundError(
        f"{folder} holds several files of weights ({names}), and nothing says which are the model's"
    )


def _of_index(index: Path) -> list[Path]:
    with open_plain(index, _INDEX_LIMIT) as (file, _):
        text = file.read()
    names: set[str] = set()
    with contextlib.suppress(StrictJSONError, AttributeError, TypeError):
        names = {*strict_json.loads(text)["weight_map"].values()}
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelNotFoundError(f"{index} does not say which files hold the model's weights")
    return [index.parent / name for name in sorted(names)]
