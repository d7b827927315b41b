"""`adapterkit predict`: the classes of inputs, by a trained adapter."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.messages import plain_warnings, say
from adapterkit.cli.tables import json_option, show

if TYPE_CHECKING:
    from adapterkit.training.task import Prediction


@click.command("predict", epilog="Example: adapterkit predict runs/classes ./new-images --top 3 --csv -o classes.csv")
@click.argument("adapter", metavar="RUN_OR_FILE")
@click.argument("inputs", metavar="FILE_OR_FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", help="The base; runs and files of adapterkit know their own.")
@click.option("--task", "task_name", help="What to predict with; runs and files know their own.")
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="How many classes are told.")
@click.option("--weight", type=float, default=1.0, show_default=True, help="How strongly it acts; 0 is the base.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read images; by default the run's num_workers.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write CSV, or JSON with --json, to this file.")
def command(
    adapter: str,
    inputs: tuple[Path, ...],
    model: str | None,
    task_name: str | None,
    top: int,
    weight: float,
    workers: int | None,
    as_json: bool,
    as_csv: bool,
    output: Path | None,
) -> None:
    """Say of every image, or row of texts, its class and the probability, with an adapter of a run, RUN@STEP or a file.

    An image that cannot be read is told, and the exit code is then 1.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    from adapterkit.training.predicting import Predictor
    from adapterkit.training.samples.places import place_of, run_of

    click.get_current_context().with_resource(plain_warnings())
    place = place_of(adapter)
    if place.note:
        say(place.note, err=True)
    overrides = [] if workers is None else [f"num_workers={workers}"]
    predictor = Predictor(run_of(place, overrides, model, task_name), place, weight)
    failed: list[Prediction] = []
    with contextlib.closing(predictor(inputs)) as found:
        rows = list(_rows(found, predictor.classes, top, failed))
    for one in failed:
        say(f"{one.name}: {one.problem}", err=True)
    _write(rows, min(top, len(predictor.classes)), output, as_json=as_json, as_csv=as_csv)
    if failed:
        sys.exit(1)


def _rows(
    found: Iterator[Prediction], classes: Sequence[str], top: int, failed: list[Prediction]
) -> Iterator[dict[str, Any]]:
    for one in found:
        if one.problem:
            failed.append(one)
            continue
        order = sorted(range(len(classes)), key=lambda number: -one.probabilities[number])[:top]
        yield {
            "file": one.name,
            "class": "|".join(classes[number] for number in one.said),
            "probability": round(max((one.probabilities[number] for number in one.said), default=0.0), 6),
            "classes": {classes[number]: round(one.probabilities[number], 6) for number in order},
        }


def _write(rows: list[dict[str, Any]], top: int, output: Path | None, *, as_json: bool, as_csv: bool) -> None:
    if output is not None or as_csv:
        text = json.dumps(rows, indent=2) + "\n" if as_json else _csv(rows, top)
        if output is None:
            click.echo(text, nl=False)
            return
        from adapterkit.formats.files import write_atomically

        write_atomically(output, text.encode())
        say(f"{output}  {len(rows)} images")
        return
    shown = [{**row, "likeliest": [f"{name} {share:.3f}" for name, share in row["classes"].items()]} for row in rows]
    columns = ("file", "class", "probability", *(("likeliest",) if top > 1 else ()))
    show(rows if as_json else shown, columns, as_json=as_json)


def _csv(rows: Sequence[dict[str, Any]], top: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    more = [f"{name} {number}" for number in range(1, top + 1) for name in ("class", "probability")] if top > 1 else []
    writer.writerow(["file", "class", "probability", *more])
    for row in rows:
        each = [cell for pair in row["classes"].items() for cell in pair] if top > 1 else []
        writer.writerow([row["file"], row["class"], row["probability"], *each])
    return text.getvalue()
