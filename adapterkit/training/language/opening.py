"""A language model with an adapter on it, ready to write."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.errors import ConfigError
from adapterkit.handle.adapters import Adapters
from adapterkit.training.language.base import LanguageTask
from adapterkit.training.language.generation import Writer
from adapterkit.training.loading import device_here, folder_config
from adapterkit.training.run import Run, load_run
from adapterkit.training.samples.places import place_of, run_of

NAME = "adapter"


@dataclass(frozen=True)
class Opened:
    """What `open_language` gives.

    Attributes:
        writer: Goes on from texts and conversations.
        adapters: On the model; empty where the base is alone.
        run: Says how it was trained.
        note: A sentence for the user.
    """

    writer: Writer
    adapters: Adapters
    run: Run
    note: str = ""

    def weigh(self, weight: float) -> None:
        """How strongly the adapter acts; 0 is the base.

        Raises:
            ConfigError: There is no adapter.
        """
        if NAME in self.adapters:
            self.adapters.activate({NAME: weight})
        elif weight != 1:
            raise ConfigError([f"weight: there is no adapter that could act with {weight:g}"], "generate")


def open_language(adapter: str | None, model: str | None, template: str | None) -> Opened:
    """Loads a base and the adapter for it.

    Args:
        adapter: A run folder, a checkpoint of one (`RUN@STEP`), or a file; None for the base alone, as is the folder of
            a model, such as a baked one.
        model: The base, where neither says it.
        template: See `options.chat_template`; None as the run has it.

    Raises:
        ConfigError: Nothing says which base, or it is no language model.
    """
    if adapter is not None and model is None and isinstance(folder_config(adapter).get("model_type"), str):
        adapter, model = None, adapter
    place = None if adapter is None else place_of(adapter)
    if place is None:
        if model is None:
            raise ConfigError(["name an adapter, or the base with --model"], "generate")
        run = _base_alone(model)
    else:
        run = run_of(place, (), model, None)
        if not issubclass(run.task, LanguageTask) and place.run is None:
            run = run_of(place, (), model, "causal-lm")  # a file that does not say what it is of
    if not issubclass(run.task, LanguageTask):
        raise ConfigError(
            [f"the task {run.config.task} does not write text; see adapterkit predict, and sample"], "generate"
        )
    if template is not None:
        run = _with_template(run, template)
    return _opened(run, None if place is None else str(place.file), "" if place is None else place.note)


def _opened(run: Run, file: str | None, note: str) -> Opened:
    task = run.make_task()
    assert isinstance(task, LanguageTask)
    device = device_here()
    model = task.load_model().to(device)
    task.prepare_generation(model, device)
    adapters = Adapters(model)
    if file is not None:
        adapters.load(file, NAME)
        adapters.activate(NAME)
    return Opened(task.writer(), adapters, run, note)


def _base_alone(model: str) -> Run:
    values = {"task": "causal-lm", "model": model, "data": "none", "output": "none", "adapter": {"type": "lora"}}
    return load_run(None, [], **values)


def _with_template(run: Run, template: str) -> Run:
    options = {**run.options.model_dump(), "chat_template": template}
    return load_run(None, [], **{**run.resolved(), "options": options})
