"""Prompts as run files give them: a list, or a file with one a line, as JSONL or as YAML, each with its own settings.

    prompts: prompts.txt
    prompts: [a cat in ink, {prompt: a dog in ink, seed: [1, 2], size: [768, 512], guidance: 4, weight: 0.7}]

A line of a text file may have the flags of kohya's scripts: `a cat --n blurry --w 512 --h 768 --d 1 --s 28 --l 7.5`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, PlainSerializer, PrivateAttr

from adapterkit.errors import DataError, shown
from adapterkit.training import yaml_values
from adapterkit.training.config import Section, Seed, WholeSentenceError, check_section
from adapterkit.training.samples.sample import Sample
from adapterkit.training.sizes import Resolution, size_of
from adapterkit.training.text_files import read_text

_FLAG = re.compile(r"\s--(\w+)\s+")
_FLAGS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("guidance", float),
    "am": ("weight", float),
}
"""The scripts' flag -> our key, and how its value is read."""


class Prompt(Section):
    """One prompt and what is told of its samples; what is not told, the task's options say.

    Attributes:
        prompt: The text.
        seed: One, or several: a sample each.
        negative: What pictures should not show.
        size: Of pictures: a side, or [height, width], in pixels.
        steps: Denoising steps.
        guidance: How strongly the prompt is followed.
        weight: How strongly the adapter acts.
    """

    prompt: str
    seed: Seed | list[Seed] | None = None
    negative: str | None = None
    size: Resolution = None
    steps: int | None = Field(None, gt=0)
    guidance: float | None = Field(None, ge=0)
    weight: float | None = None
    _where: str = PrivateAttr("")

    @property
    def where(self) -> str:
        """Of a file, which of it; for errors."""
        return self._where

    @classmethod
    def of_file(cls, given: object, where: str) -> Prompt:
        """What a file says there.

        Raises:
            WholeSentenceError: It is no prompt.
        """
        told = {"prompt": given} if isinstance(given, str) else given
        problems: list[str] = []
        if not isinstance(told, Mapping):
            raise WholeSentenceError(f"{where} must be a text, or keys such as prompt and seed, not {shown(given)}")
        found = check_section(cls, told, problems)
        if not isinstance(found, Prompt):
            raise WholeSentenceError(f"{where}: {'; '.join(problems)}")
        found._where = where
        return found


def samples_of(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
    """A sample for each prompt and each of its seeds.

    Args:
        prompts: As a run file gives them.
        seeds: Of prompts that say none.
    """
    found: list[Sample] = []
    for number, one in enumerate(prompts):
        place: dict[str, Any] = {"number": number, "where": one.where}
        own = seeds if one.seed is None else one.seed if isinstance(one.seed, list) else [one.seed]
        told = {"negative": one.negative, "steps": one.steps, "guidance": one.guidance, "weight": one.weight}
        found += [Sample(one.prompt, seed, size=size_of(one.size), **place, **told) for seed in own]  # type: ignore[arg-type]
    return found


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file.

    Raises:
        WholeSentenceError: It cannot be read, or one is wrong; with its line, or its number in a list.
    """
    readers: Mapping[str, Callable[[str], dict[str, Any]]] = {
        ".txt": _lines,
        ".jsonl": _json_lines,
        ".yaml": _document,
        ".yml": _document,
        ".json": _document,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise WholeSentenceError(f"{path} must end in {', '.join(readers)}, or prompts must be a list")
    try:
        found = reader(read_text(path))
    except DataError as error:
        raise WholeSentenceError(" ".join(str(error).split())) from error
    except (ValueError, yaml.YAMLError) as error:
        raise WholeSentenceError(f"{path}: {' '.join(str(error).split())}") from error
    if not found:
        raise WholeSentenceError(f"{path} holds no prompt")
    return [Prompt.of_file(one, f"{path}, {where}") for where, one in found.items()]


def _lines(text: str) -> dict[str, Any]:
    """One prompt a line; empty lines and those that begin with `#` say nothing."""
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    said = {number: line for number, line in numbered if line and not line.startswith("#")}
    return {f"line {number}": _flagged(line, number) for number, line in said.items()}


def _flagged(line: str, number: int) -> Any:
    prompt, *rest = _FLAG.split(line)
    found: dict[str, Any] = {}
    for flag, value in zip(rest[::2], rest[1::2], strict=True):
        if flag not in _FLAGS:
            known = ", ".join(f"--{name} ({key})" for name, (key, _) in _FLAGS.items())
            raise ValueError(f"line {number}: unknown flag --{flag}; there are {known}")
        key, read = _FLAGS[flag]
        try:
            found[key] = read(value.strip())
        except ValueError as error:
            raise ValueError(f"line {number}: --{flag} must be a number, not {shown(value)}") from error
    if ("width" in found) != ("height" in found):
        raise ValueError(f"line {number}: --w and --h belong together")
    if "width" in found:
        found["size"] = [found.pop("height"), found.pop("width")]
    return {"prompt": prompt, **found} if found else prompt


def _json_lines(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found[f"line {number}"] = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error
    return found


def _document(text: str) -> dict[str, Any]:
    found = yaml_values.parse(text)
    if not isinstance(found, list):
        raise ValueError(f"must hold a list of prompts, not {type(found).__name__}")
    return {f"prompt {number}": one for number, one in enumerate(found, 1)}


def _given(value: Any) -> Any:
    """A list of mappings, of whatever a run file says."""
    listed = read_prompts(Path(value)) if isinstance(value, str) else value
    return [{"prompt": one} if isinstance(one, str) else one for one in listed] if isinstance(listed, list) else listed


def _plain(prompts: list[Prompt]) -> list[Any]:
    """The list as it would be written: texts where there is nothing more to tell."""
    found: list[Any] = []
    for one in prompts:
        told = one.model_dump(mode="json", exclude_none=True)
        found.append(told if len(told) > 1 else one.prompt)
    return found


Prompts = Annotated[list[Prompt], BeforeValidator(_given), PlainSerializer(_plain)]
"""A list of prompts, or the file that holds them."""
