"""`adapterkit sample`: generate with a trained adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from adapterkit.training.run import Run

_SEED = click.IntRange(0, 2**63, max_open=True)


@click.command(
    "sample", epilog="Example: adapterkit sample runs/ink --prompt 'a cat in ink' --seed 1 --seed 2 -o cat.png"
)
@click.argument("adapter", metavar="RUN_OR_FILE", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--model", help="The base; a run folder knows its own.")
@click.option("--task", "task_name", help="What to generate with; a run folder knows its own. [default: diffusion]")
@click.option("--prompt", "prompts", multiple=True, required=True, help="May be repeated.")
@click.option("--seed", "seeds", multiple=True, type=_SEED, default=(42,), show_default=True, help="May be repeated.")
@click.option(
    "--weight", type=float, default=1.0, show_default=True, help="How strongly the adapter acts; 0 is the base."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file; several are numbered.")
def command(
    adapter: Path,
    overrides: tuple[str, ...],
    model: str | None,
    task_name: str | None,
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
    weight: float,
    output: Path | None,
) -> None:
    """Generate with an adapter from a run folder, or from a FILE and --model. KEY=VALUE as for train."""
    from adapterkit.cli.messages import plain_warnings, say

    click.get_current_context().with_resource(plain_warnings())
    run, file = _run_of(adapter, overrides, model, task_name)
    for path in _generate(run, file, prompts, seeds, weight, output):
        say(str(path))


def _run_of(place: Path, overrides: tuple[str, ...], model: str | None, task_name: str | None) -> tuple[Run, Path]:
    """The run to generate with, and the adapter's file."""
    from adapterkit.errors import StateError
    from adapterkit.training.run import load_run

    given: dict[str, Any] = {key: value for key, value in (("model", model), ("task", task_name)) if value is not None}
    if place.is_dir():
        file = place / "adapter.safetensors"
        if not file.is_file():
            raise StateError(f"{place} holds no finished run (no {file.name}). Train it, or name a file of an adapter")
        return load_run(place / "config.yaml", overrides, **given), file
    if model is None:
        raise click.UsageError(f"{place} is not a run folder, so the base must be named: add --model MODEL")
    return load_run(None, overrides, **{**_filler(place), **given}), place


def _filler(file: Path) -> dict[str, Any]:
    """The keys that a run must have and generating does not need."""
    from adapterkit.tools.files import read

    part = read(file, strict=False).checkpoint.parts[0]
    section = {"type": part.type, **part.config}
    return {"task": "diffusion", "data": "none", "output": "none", "adapter": section}


def _generate(
    run: Run, file: Path, prompts: tuple[str, ...], seeds: tuple[int, ...], weight: float, output: Path | None
) -> list[Path]:
    import torch

    from adapterkit.handle.adapters import Adapters
    from adapterkit.training.checked import CheckedTask
    from adapterkit.training.parts import inference
    from adapterkit.training.state import load_modules

    task = CheckedTask(run)
    output = _ending_right(output, task.suffixes)
    model = task.load_model()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    task.prepare_generation(model, device)
    adapters, name = Adapters(model), run.config.adapter_name
    adapters.load(file, name)
    adapters.activate({name: weight})
    load_modules(task.extra_modules(), file.parent)
    jobs = [(p, prompt, seed) for p, prompt in enumerate(prompts) for seed in seeds]
    written = []
    for number, prompt, seed in jobs:
        path = output if len(jobs) == 1 else output.with_stem(f"{output.stem}_p{number}_s{seed}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with inference(model):
            task.generate(prompt, seed, path)
        written.append(path)
    return written


def _ending_right(output: Path | None, suffixes: Sequence[str]) -> Path:
    """Where to write; a name without an ending gets the first one.

    Raises:
        UsageError: The task cannot write such files.
    """
    path = output if output is not None else Path("sample")
    if not path.suffix:
        path = path.with_name(path.name + suffixes[0])
    if path.suffix.lower() not in suffixes:
        raise click.UsageError(f"-o {path}: the name must end in {' or '.join(suffixes)}")
    return path
