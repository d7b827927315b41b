"""`adapterkit bake`: a model with an adapter in its weights, of files or of a run."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from adapterkit.cli.adapter_files import file_type, lenient_option, opened, pickle_option
from adapterkit.cli.messages import plain_warnings, say


@click.command("bake", epilog="Example: adapterkit bake ./base style.safetensors ./base-with-style --weight 0.8")
@click.argument("model", metavar="MODEL_OR_RUN")
@click.argument("places", metavar="[ADAPTER] OUT", nargs=-1, required=True, type=file_type)
@click.option("--weight", type=float, default=1.0, show_default=True, help="How strongly the adapter acts.")
@lenient_option
@pickle_option
def command(model: str, places: tuple[Path, ...], weight: float, lenient: bool, allow_pickle: bool) -> None:
    """Write MODEL anew to OUT, in its own layout, with the adapter in its weights; tensor by tensor.

    Of a RUN (or RUN@STEP) the model as its own library loads it, read back and compared: a language model with its
    tokenizer and the chat template of the run, a classifier with its new head, a model of embeddings with its pooling.
    """
    click.get_current_context().with_resource(plain_warnings())
    if len(places) == 1:
        if lenient or allow_pickle:
            raise click.UsageError("--lenient and --allow-pickle belong to MODEL ADAPTER OUT; a run's file is its own")
        _bake_run(model, places[0], weight)
        return
    if len(places) != 2:
        raise click.UsageError("name MODEL ADAPTER OUT, or RUN OUT")
    file, output = places
    from adapterkit.errors import ModelNotFoundError
    from adapterkit.tools.bake import bake
    from adapterkit.tools.base import open_base

    if not Path(model).exists():
        raise ModelNotFoundError(f"{model} is no folder or file here; its files are what is written anew")
    base = open_base(model)
    loaded = opened(file, base.points, allow_pickle=allow_pickle, strict=not lenient)
    done = bake(base, Path(model), loaded.checkpoint, output, weight=weight)
    say(f"{output}  {done.tensors} tensors in {', '.join(done.files)}")
    if done.left_out:
        say(f"not taken along, since they hold the weights as they were: {', '.join(done.left_out)}", err=True)


def _bake_run(text: str, output: Path, weight: float) -> None:
    from adapterkit.errors import StateError
    from adapterkit.training.loaded import Loaded
    from adapterkit.training.samples.places import place_of, record_of, run_of
    from adapterkit.training.task import Task

    place = place_of(text)
    if place.run is None:
        raise StateError(f"{text} is no run; name the model, the adapter and where to write: MODEL ADAPTER OUT")
    if place.note:
        say(place.note, err=True)
    run, record = run_of(place, (), None, None), record_of(place)
    classless = run.task.recall is not Task.recall and (record is None or not record.classes)
    if classless or run.task.write_model is Task.write_model:
        again = shlex.join(["adapterkit", "bake", run.config.model, str(place.file), str(output)])
        why = "names no classes" if classless else f"is of the task {run.config.task}, which writes no models"
        raise StateError(f"{text} {why}; the model of such a run is written by: {again}")
    apart = Loaded(run, place, weight).bake(output)
    say(f"{output}  read back by its own library: {apart:.1g} apart")
