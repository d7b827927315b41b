"""`adapterkit sample`: generate with trained adapters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.messages import plain_warnings, say

if TYPE_CHECKING:
    from adapterkit.training.samples.sample import Sample
    from adapterkit.training.task import Task

_SEED = click.IntRange(0, 2**63, max_open=True)
_FIRST_SEED = 42


@click.command(
    "sample", epilog="Example: adapterkit sample runs/ink --prompt 'a cat in ink' --weight 0.5 --weight 1 -o cat.png"
)
@click.argument("given", metavar="RUN_OR_FILE... [KEY=VALUE]...", nargs=-1, required=True)
@click.option("--model", help="The base; runs and files of adapterkit know their own.")
@click.option("--task", "task_name", help="What to generate with; runs and files know their own. [default: diffusion]")
@click.option("--prompt", "prompts", multiple=True, help="May be repeated. By default what the run has drawn.")
@click.option("--prompts", "file", type=click.Path(), help="A file of prompts: .txt, .jsonl or .yaml.")
@click.option("--negative", help="What pictures should not show.")
@click.option("--seed", "seeds", multiple=True, type=_SEED, help=f"May be repeated.  [default: {_FIRST_SEED}]")
@click.option("--weight", "weights", type=float, multiple=True, help="How strongly it acts; 0 is the base. Repeatable.")
@click.option("--together", is_flag=True, help="Let all adapters act at once, each with its own --weight.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file; several are numbered.")
def command(
    given: tuple[str, ...],
    model: str | None,
    task_name: str | None,
    prompts: tuple[str, ...],
    file: str | None,
    negative: str | None,
    seeds: tuple[int, ...],
    weights: tuple[float, ...],
    together: bool,
    output: Path | None,
) -> None:
    """Generate with adapters from runs, from their checkpoints (RUN@STEP, RUN@best) or from files.

    The first says which base, and how samples are drawn. KEY=VALUE as for train.
    """
    click.get_current_context().with_resource(plain_warnings())
    if prompts and file:
        raise click.UsageError("--prompt and --prompts exclude each other")
    from adapterkit.training.samples.generating import Generator, columns_of
    from adapterkit.training.samples.places import place_of, run_of

    texts, overrides = _split(given)
    places = [place_of(text) for text in texts]
    for place in places:
        if place.note:
            say(place.note, err=True)
    run = run_of(places[0], overrides, model, task_name)
    if places[0].run is None and model is None:
        say(f"{places[0].file} says that its base is {run.config.model}; --model MODEL names another", err=True)
    columns = columns_of(places, weights, together=together)
    path = _ending_right(output, run.task.suffixes)
    own = _told(prompts, file, negative, seeds)
    generator = Generator(run, places)
    generator.draw(columns, own or _of_the_run(generator.task, seeds), path, _show)


def _split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Places, and overrides: what has an equals sign and is no file."""
    places = [one for one in given if "=" not in one or Path(one).exists()]
    if not places:
        raise click.UsageError("name a run folder, RUN@STEP, or a file of an adapter")
    return places, [one for one in given if one not in places]


def _told(prompts: Sequence[str], file: str | None, negative: str | None, seeds: Sequence[int]) -> list[Sample]:
    """The samples that the command line asks for."""
    from pydantic import TypeAdapter, ValidationError

    from adapterkit.errors import ConfigError
    from adapterkit.training.samples.generating import with_seeds
    from adapterkit.training.samples.prompts import Prompts, samples_of

    try:
        read = TypeAdapter(Prompts).validate_python(file if file is not None else [*prompts])
    except ValidationError as error:
        raise ConfigError([_sentence(one) for one in error.errors()], "prompts") from error
    if negative is not None:
        read = [one.model_copy(update={"negative": negative}) for one in read]
    return with_seeds(samples_of(read, [_FIRST_SEED]), seeds)


def _sentence(item: Mapping[str, Any]) -> str:
    where = ".".join(map(str, item["loc"]))
    return f"{where}: ".removeprefix(": ") + str(item["msg"]).removeprefix("Value error, ")


def _of_the_run(task: Task, seeds: Sequence[int]) -> list[Sample]:
    from adapterkit.training.samples.generating import with_seeds

    found = with_seeds(task.samples(), seeds)
    if not found:
        raise click.UsageError("there is no prompt: add --prompt TEXT or --prompts FILE")
    return found


def _show(path: Path) -> None:
    """A file, and what it says where it is text."""
    from adapterkit.training.samples.sheets import is_picture

    say(str(path))
    if not is_picture(path):
        say(path.read_text(encoding="utf-8", errors="replace").strip())


def _ending_right(output: Path | None, suffixes: Sequence[str]) -> Path:
    """Where to write: a name without an ending gets the first one; without a name, one that nothing has yet.

    Raises:
        UsageError: The task cannot write such files.
    """
    if output is None:
        return _free(Path(f"sample{suffixes[0]}"))
    path = output if output.suffix else output.with_name(output.name + suffixes[0])
    if path.suffix.lower() not in suffixes:
        raise click.UsageError(f"-o {path}: the name must end in {' or '.join(suffixes)}")
    return path


def _free(path: Path) -> Path:
    """The path, or the first numbered one after which no file is named."""
    every = itertools.chain([path], (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2)))
    return next(one for one in every if not any(one.parent.glob(f"{one.stem}[_.]*")))
