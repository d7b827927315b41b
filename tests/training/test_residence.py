"""Parts of a pipeline on the device while they are needed, and on the CPU while they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.training.diffusion.residence import Residence
from adapterkit.training.order import Draw
from adapterkit.training.task import Setting
from tests.training import tiny_pipelines
from tests.training.test_recipes import data, make_run  # noqa: F401 - data is a fixture

DEVICE = torch.device("cpu", 0)  # another one than the CPU at home, by its name


class Part(nn.Module):
    """Notes where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.place = "loaded"

    def to(self, device: Any) -> Part:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.place = "device" if device == DEVICE else "home"
        return self


class Pipe:
    def __init__(self) -> None:
        self.components: dict[str, Any] = {name: Part() for name in ("unet", "vae", "text_encoder")}
        self.components["scheduler"] = object()

    def places(self) -> list[str]:
        return [part.place for part in self.components.values() if isinstance(part, Part)]


def test_guests_come_when_they_are_needed_and_leave():
    pipe = Pipe()
    residence = Residence(pipe, DEVICE, ("vae", "text_encoder", "scheduler", "absent"))
    assert pipe.places() == ["device", "loaded", "loaded"]
    with residence.needing(("vae",)):
        assert pipe.places() == ["device", "device", "loaded"]
        with residence.needing():
            assert pipe.places() == ["device"] * 3
        assert pipe.places() == ["device", "device", "home"]
    with pytest.raises(RuntimeError), residence.needing():
        raise RuntimeError
    assert pipe.places() == ["device", "home", "home"]
    residence.stay(("text_encoder",))
    with residence.needing():
        assert pipe.places() == ["device"] * 3
    assert pipe.places() == ["device", "home", "device"]


def test_on_the_cpu_nothing_moves():
    pipe = Pipe()
    with Residence(pipe, torch.device("cpu"), ("vae",)).needing():
        pass
    assert pipe.places() == ["home"] * 3


@pytest.mark.parametrize("case", ["fixed", "endless captions", "trained encoders"])
def test_a_task_calls_for_what_it_needs(data: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    shuffled, live = case == "endless captions", case == "trained encoders"
    run = make_run(tiny_pipelines.saved("sd3", tmp_path), data, tmp_path / "run", shuffle_tags=shuffled)
    task: Any = run.make_task()
    task.survey(None)
    pipe = task.load_model()
    task.place(pipe, DEVICE)
    encoders = {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert task.residence.away == {"vae", *encoders}
    away: dict[str, set[str]] = {}

    def watch(owner: Any, name: str) -> None:
        called = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            away.setdefault(name, set()).update(task.residence.away)
            return called(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    for name in ("encode_pictures", "encode_text", "draw", "predict"):
        watch(task.recipe, name)
    targets = "attention" if live else "attention@component=transformer"
    examples = task.prepare(Setting(pipe, DEVICE, ak.points(pipe, adapter=ak.LoRA(targets=targets))))
    with torch.no_grad():
        task.loss(task.collate([examples[Draw(number, 1)] for number in range(2)]))
    task.generate(task.samples()[0], tmp_path / "a.png")
    waiting = {"vae", *encoders} if case == "fixed" else {"vae"}
    assert away == {
        "encode_pictures": encoders if case == "fixed" else set(),
        "encode_text": {"vae"},
        "predict": waiting,
        "draw": set(),
    }
    assert task.residence.away == waiting
