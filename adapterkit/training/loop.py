"""The training loop: any task, any adapter type, on accelerate.

Gradients of the adapter are averaged over the processes explicitly: they are small, and the model needs no wrapper, so
every part of a pipeline trains alike. Each step seeds every random generator from the run's seed and its own number;
so the state of a run is its step, its adapter and its optimizer, and a resumed run goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate.state import AcceleratorState

from adapterkit.errors import StateError
from adapterkit.training.interrupt import Interrupt
from adapterkit.training.processes import ignored_of_launcher, make_accelerator
from adapterkit.training.result import Result
from adapterkit.training.resuming import read_run
from adapterkit.training.run import Run
from adapterkit.training.run_folder import RunFolder
from adapterkit.training.snapshots import Snapshot
from adapterkit.training.trainer import Trainer


def train(
    run: Run,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changed_data: bool = False,
    silent: bool = False,
) -> Result:
    """Trains an adapter as a run says, and leaves everything in its folder.

    A signal (Ctrl-C, SIGTERM, SIGHUP) ends it with a result that has an `exit_code`.

    Args:
        run: From `load_run`.
        resume: Go on from the newest checkpoint that is whole; from the start where there is none.
        overwrite: Replace a run that the folder holds.
        accept_changed_data: Resume although the data is no longer what the run began with.
        silent: Print no progress.

    Raises:
        StateError: The folder is in use and neither flag is given.
        DataError: The data cannot be used, or (DataChangedError) is not that of the run to be resumed.
        ConfigError: The run does not fit the model, the machine, or the run to be resumed.
        TrainingError: The loss is not finite.
    """
    folder = RunFolder(run)
    folder.check(resume=resume, overwrite=overwrite)
    snapshot = folder.snapshots.newest() if resume else None
    if snapshot is not None and (done := _finished(run, folder, snapshot.step)):
        return done
    nothing = [f"there is no checkpoint in {folder.path} to resume: beginning at the first step"]
    notes = nothing if resume and snapshot is None else []
    return _run(
        run,
        folder,
        snapshot,
        notes,
        overwrite=overwrite,
        accept_changed_data=accept_changed_data,
        silent=silent,
    )


def finish(folder: Path, *, step: int | None = None, accept_changed_data: bool = False, silent: bool = False) -> Result:
    """Ends a run where it is: writes the adapter of a checkpoint, figures and samples. It can still be resumed.

    Args:
        folder: The run folder.
        step: Of the checkpoint; the newest by default.
        accept_changed_data: As for `train`.
        silent: Print no progress.

    Raises:
        StateError: There is no run, or no such checkpoint.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise StateError(f"{folder} holds no run (no {path.name})")
    run = read_run(path).at(folder)
    place = RunFolder(run)
    steps = place.snapshots.steps()
    if not steps or (step is not None and step not in steps):
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none yet"
        raise StateError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}; {there}")
    snapshot = place.snapshots.newest() if step is None else place.snapshots.read(step)
    if step is not None:  # rather than the best
        run = replace(run, config=run.config.model_copy(update={"best": None, "early_stop": None}))
    return _run(run, place, snapshot, accept_changed_data=accept_changed_data, silent=silent, only_finish=True)


def _finished(run: Run, folder: RunFolder, step: int) -> Result | None:
    """What a run came to that has nothing left to do."""
    summary = folder.read_summary()
    wanted = run.config.steps if run.config.epochs is None else step
    before = folder.run_before()
    if before is None or summary is None or summary["step"] != step or wanted != step or summary.get("early"):
        return None
    if before.config.epochs != run.config.epochs or not folder.adapter.is_file():
        return None
    losses = folder.recent_losses(20)
    return Result(
        folder=folder.path,
        adapter=folder.adapter,
        step=step,
        loss=sum(losses) / len(losses) if losses else math.nan,
        figures=summary.get("figures", {}),
        saved=step,
        finished_before=True,
    )


def _run(
    run: Run,
    folder: RunFolder,
    snapshot: Snapshot | None,
    notes: Sequence[str] = (),
    *,
    overwrite: bool = False,
    accept_changed_data: bool = False,
    silent: bool = False,
    only_finish: bool = False,
) -> Result:
    try:
        accelerator = make_accelerator(run)
        with Interrupt(silent=silent or not accelerator.is_main_process) as interrupt:
            trainer = Trainer(run, folder, accelerator, interrupt, snapshot, overwrite=overwrite, silent=silent)
            ignored = ignored_of_launcher(run.config, accelerator.num_processes)
            try:
                return trainer.train(
                    [*notes, *ignored], accept_changed_data=accept_changed_data, only_finish=only_finish
                )
            except KeyboardInterrupt:
                if interrupt.signal is None:
                    raise
                return trainer.result()
    finally:
        folder.close()
        AcceleratorState._reset_state()  # accelerate keeps its settings for the process; the next run has its own
