"""The model card of a run, `README.md` in its folder: what was trained, what samples look like, how it is used.

The header is that of a hub's model cards: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import adapterkit
from adapterkit.training import yaml_values
from adapterkit.training.config import RunConfig
from adapterkit.training.export.files import Exported, title_of
from adapterkit.training.export.record import public_name
from adapterkit.training.samples.sheets import Rows, is_picture


def card(
    config: RunConfig, trigger: str, samples: Rows, exported: Sequence[Exported], figures: Mapping[str, Any]
) -> str:
    """The text of the card.

    Args:
        config: The run.
        trigger: The words that call what was learnt.
        samples: Before and after; files lie in the run folder.
        exported: The files for other tools.
        figures: What was measured.
    """
    folder = Path(config.output)
    sections = [
        _header(config, trigger, samples, folder),
        f"# {title_of(config)}\n",
        *([f"{config.card.description}\n"] if config.card.description else []),
        *([f"Trigger: `{trigger}`\n"] if trigger else []),
        *_samples(samples, folder),
        *_files(exported, folder),
        *_usage(config, trigger, samples, exported),
        *_training(config, figures),
    ]
    return "\n".join(sections)


def _header(config: RunConfig, trigger: str, samples: Rows, folder: Path) -> str:
    told = config.card
    pictures = [
        {"text": label, "output": {"url": files[-1].relative_to(folder).as_posix()}}
        for label, files in samples
        if is_picture(files[-1])
    ]
    tags = [tag for part in told.tags.split(",") if (tag := part.strip())]
    values = {
        "base_model": public_name(config.model),
        "tags": ["adapterkit", str(config.adapter["type"]), *tags],
        "license": told.license,
        "instance_prompt": trigger,
        "widget": pictures,
    }
    return f"---\n{yaml_values.dump({key: value for key, value in values.items() if value})}---\n"


def _samples(samples: Rows, folder: Path) -> Iterator[str]:
    if not samples:
        return
    yield "## Samples\n"
    if all(is_picture(file) for _, files in samples for file in files):
        yield "| prompt | base | with the adapter |\n|---|---|---|"
        for label, files in samples:
            pictures = " | ".join(f"![]({file.relative_to(folder).as_posix()})" for file in files)
            yield f"| {_cell(label)} | {pictures} |"
        yield ""
        for name in ("grid.png", "strengths.png"):
            if (sheet := samples[0][1][0].with_name(name)).is_file():
                yield f"![{name}]({sheet.relative_to(folder).as_posix()})\n"
        return
    for label, files in samples:
        text = files[-1].read_text(encoding="utf-8", errors="replace").strip()
        yield f"**{_cell(label)}**\n\n<pre>{html.escape(text)}</pre>\n"


def _files(exported: Sequence[Exported], folder: Path) -> Iterator[str]:
    yield "## Files\n"
    yield "| file | format | read back |\n|---|---|---|\n| `adapter.safetensors` | native | |"
    for one in exported:
        if not one.problem:
            checks = _cell("; ".join([*map(str, one.checks), *one.notes]))
            yield f"| `{one.path.relative_to(folder).as_posix()}` | {one.format} | {checks} |"
    yield ""


def _usage(config: RunConfig, trigger: str, samples: Rows, exported: Sequence[Exported]) -> Iterator[str]:
    lines = [one.usage for one in exported if one.usage]
    if samples or lines:
        yield "## Use\n"
    if samples:
        words = ["--model", public_name(config.model), "--prompt", f"{trigger} ...".lstrip()]
        yield f"```sh\n{shlex.join(['adapterkit', 'sample', 'adapter.safetensors', *words])}\n```\n"
    if lines:
        yield "In a program, any one of these:\n"
        yield "\n".join(["```python", *lines, "```\n"])


def _training(config: RunConfig, figures: Mapping[str, Any]) -> Iterator[str]:
    rows: dict[str, Any] = {
        "task": config.task,
        "base": public_name(config.model),
        "adapter": f"`{json.dumps(config.adapter)}`",
        "steps": config.steps,
        "batch": config.batch_size * config.gradient_accumulation,
        "learning rate": config.learning_rate,
        "seed": config.seed,
        **{key: f"{value:.4g}" for key, value in figures.items() if isinstance(value, float)},
        "trained with": f"adapterkit {adapterkit.__version__}",
    }
    yield "## Training\n"
    yield "| | |\n|---|---|"
    for key, value in rows.items():
        yield f"| {key} | {_cell(str(value))} |"
    yield "\n`config.yaml` trains it again.\n"


def _cell(text: str) -> str:
    """Text that neither ends a cell of a table nor is markup."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")
