"""What files call the modules of CLIP's text encoders, whatever transformers does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapterkit.contract.naming import Naming, Piece
from adapterkit.contract.view import ComponentView

_TOP = "text_model"


class ClipTextNaming(Naming):
    """`text_model.` stands in front in every file; transformers 5 has taken it away from `CLIPTextModel`."""

    def modules(self, component: ComponentView) -> Mapping[str, Sequence[Piece]]:
        nested = _TOP in component.paths
        files = {path: path if nested or not path else f"{_TOP}.{path}" for path in component.paths}
        return {name: [Piece(path)] for path, name in files.items()} | (
            {path.removeprefix(f"{_TOP}."): [Piece(path)] for path in component.paths} if nested else {}
        )
