"""Let `import torchvision` succeed beside a torch that its compiled operators do not fit.

The package index's torchvision is built for CUDA. Beside a CPU build of torch its binary does not load, the operators
`torchvision::nms` and `torchvision::qnms` do not exist, and `import torchvision` fails because it registers shape
functions for them: `RuntimeError: operator torchvision::nms does not exist`. timm and most of transformers fail with
it, although none of them needs these operators. Their schemas alone are enough for the import and for every transform;
calling one still ends in torchvision's own error.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def ensure_torchvision_ops() -> tuple[str, ...]:
    """Define the schemas of torchvision's operators where its binary cannot. To be called before it is imported.

    Idempotent. Does nothing, and imports nothing, where torchvision is absent or already imported.

    Returns:
        The names of the operators that had to be defined here.
    """
    if "torchvision" in sys.modules:
        return ()
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return ()
    # The binary goes first: an operator that it registers may not be defined by anyone else before it.
    _load_binary(Path(spec.origin).parent)
    return tuple(name for name, schema in _SCHEMAS.items() if _define_if_missing(name, schema))


def _load_binary(folder: Path) -> None:
    import torch

    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = folder / f"_C{suffix}"
        if library.is_file():
            try:
                torch.ops.load_library(str(library))
            except OSError:  # built for another torch: the case that this module exists for
                continue
            return


def _define_if_missing(name: str, schema: str) -> bool:
    import torch

    try:
        getattr(torch.ops.torchvision, name)
    except AttributeError:
        torch.library.define(f"torchvision::{name}", schema)
        return True
    return False
