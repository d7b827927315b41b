"""Documentation: a small Llama that has read the standard library's goes on to scikit-learn's."""

from __future__ import annotations

import importlib.util
import json
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from adapterkit.training.result import Result
from examples import language_domains as domains
from examples.comparison.job import Job

_TRAINING, _HELD_OUT = 400_000, 60_000  # characters


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _up_to(texts: Sequence[str], characters: int) -> list[str]:
    """The first texts that have as many characters together."""
    chosen: list[str] = []
    for text in texts:
        chosen.append(text)
        characters -= len(text)
        if characters <= 0:
            break
    return chosen


class Documentation(Job):
    """The model and the texts of `examples/language_domains.py`, as files."""

    name = "documentation"
    title = "documentation: a Llama goes from the standard library's to scikit-learn's"
    figure = "perplexity"
    larger_is_better = False
    usual_steps = 50
    pretraining = 600

    def make(self) -> None:
        """The base with its tokenizer, and texts; files of the library are in one part alone."""
        python = domains.documentation(Path(sysconfig.get_path("stdlib")))
        sklearn = domains.documentation(_folder_of("sklearn"))
        tokenizer = domains.byte_pairs(python.train)
        base = domains.small_llama(tokenizer)
        blocks = domains.packed(tokenizer, python.train)
        domains.fit(base, base.parameters(), blocks, steps=self.pretraining, rate=4e-3)
        base.save_pretrained(self.folder / "base")
        ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), domains.END)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(self.folder / "base")
        half = len(sklearn.held_out) // 2
        self._write("train", _up_to(sklearn.train[::3], _TRAINING))
        self._write("validation", _up_to(sklearn.held_out[:half], _HELD_OUT))
        self._write("test", _up_to(sklearn.held_out[half:], _HELD_OUT))

    def _write(self, part: str, texts: Sequence[str]) -> None:
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (self.folder / f"{part}.jsonl").write_text(rows, encoding="utf-8")

    def values(self, split: str) -> Mapping[str, Any]:
        """See `Job.values`."""
        options = {"block_size": domains.LENGTH, "validation": str(self.folder / f"{split}.jsonl")}
        return {
            "task": "causal-lm",
            "model": str(self.folder / "base"),
            "data": str(self.folder / "train.jsonl"),
            "batch_size": 16,
            "options": options,
        }

    def measure(self, result: Result, split: str) -> Mapping[str, float]:
        """Of a token, given those before it in its block."""
        return {"perplexity": result.figures["perplexity"], "base": result.figures["base perplexity"]}
