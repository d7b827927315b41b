from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapterkit as ak
from adapterkit.errors import ConfigError, StateError, TrainingError
from adapterkit.testing import toys
from adapterkit.training.data_record import DataRecord
from adapterkit.training.loop import train
from adapterkit.training.parts import inference
from adapterkit.training.progress import PlainProgress
from adapterkit.training.run_folder import RunFolder, read_metrics
from adapterkit.training.task import Setting
from tests.training.toy_task import EXAMPLES, Sequences, ToyTask, toy_run

EXACT = ("step", "loss", "lr", "grad_norm")


def losses(folder: Path) -> list[dict[str, Any]]:
    return [{key: r[key] for key in EXACT} for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    first, second = load_file(one / "adapter.safetensors"), load_file(other / "adapter.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, with dropout and accumulated gradients."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(toy_run(folder, gradient_accumulation=2, sample_every=3), silent=True)
    return folder


def test_a_run_leaves_everything_in_its_folder(whole: Path):
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    steps = ("000000", "000003", "000006", "000008")
    assert names == {
        "README.md",
        "adapter.safetensors",
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "summary.json",
        "metrics.png",
        *(f"samples/step_{step}_p{prompt}_s42.txt" for step in steps for prompt in (0, 1)),
        *(f"samples/weight_{weight}_p{prompt}_s42.txt" for weight in ("0.5", "0.75", "1.25") for prompt in (0, 1)),
        "samples/grid.md",
        "samples/strengths.md",
        *(
            f"checkpoints/step-{step:06d}/{name}"
            for step in (6, 8)
            for name in ("adapter.safetensors", "optimizer.safetensors", "state.json")
        ),
    }
    assert (whole / "samples/step_000003_p1_s42.txt").read_text() == "two 42 False"
    records = read_metrics(whole / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    assert [r["step"] for r in records if "entropy" in r] == [0, 3, 6, 8]
    assert all(r["seconds"] >= 0 for r in records if "loss" in r)


def test_without_an_example_nothing_is_trained_and_no_folder_is_made(tmp_path: Path):
    run = toy_run(tmp_path / "run")

    class Nothing(run.task):  # type: ignore[name-defined,misc]
        def prepare(self, setting: Any) -> list[Any]:
            return []

    with pytest.raises(ConfigError, match="data: toy holds no example to train on"):
        train(dataclasses.replace(run, task=Nothing), silent=True)
    assert not (tmp_path / "run").exists()


def test_training_lowers_the_loss_and_touches_only_the_adapter(tmp_path: Path):
    run = toy_run(tmp_path / "run", steps=60, scheduler="constant", batch_size=7, learning_rate=3e-2)
    models = []
    original = run.task.load_model

    class Watched(run.task):  # type: ignore[name-defined,misc]
        def load_model(self) -> Any:
            models.append(original(self))
            return models[-1]

    run = dataclasses.replace(run, task=Watched)
    result = train(run, silent=True)
    fresh, trained = toys.ToyModel(seed=3).state_dict(), models[0].state_dict()
    assert all(torch.equal(trained[key], value) for key, value in fresh.items())
    assert result.figures["entropy"] < 0.9 * result.figures["base entropy"]
    model = toys.ToyModel(seed=3).eval()
    adapters = ak.Adapters(model)
    adapters.load(tmp_path / "run/adapter.safetensors", "a")
    tokens = Sequences().tokens
    plain = model(tokens)
    adapters.activate("a")
    entropy = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert entropy.item() == result.figures["entropy"]
    assert torch.equal(plain, toys.ToyModel(seed=3).eval()(tokens))


@pytest.mark.parametrize(("number", "call"), [(signal.SIGTERM, 5), (signal.SIGINT, 8), (signal.SIGHUP, 5)])
def test_a_signal_finishes_the_step_and_the_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, whole: Path, number: signal.Signals, call: int
):
    folder = tmp_path / "run"
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    values: dict[str, Any] = {"gradient_accumulation": 2, "sample_every": 3}
    options = {"signal_at": call, "signal_number": int(number)}
    stopped = train(toy_run(folder, options=options, checkpoint_every=None, **values), silent=True)
    assert stopped.exit_code == 128 + number
    assert stopped.adapter is None
    assert stopped.step == math.ceil(call / 2)  # two calls of the loss make a step
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert (folder / f"checkpoints/step-{stopped.step:06d}/state.json").exists()
    # The signal is an option of the toy task, and a resumed run must have the same options.
    config = folder / "config.yaml"
    config.write_text(
        config.read_text()
        .replace(f"signal_at: {call}", "signal_at: null")
        .replace(f"signal_number: {int(number)}", "signal_number: 15")
    )
    result = train(toy_run(folder, **values), resume=True, silent=True)
    assert (result.exit_code, result.step) == (0, 8)
    assert_same_run(folder, whole)
    assert result.figures["base entropy"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_stops_at_once_and_says_what_is_kept(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
):
    options = {"signal_at": 5, "signal_number": int(number), "signals": 2}
    run = toy_run(tmp_path / "run", options=options)
    before = signal.getsignal(number)
    stopped = train(run)
    assert (stopped.exit_code, stopped.step, stopped.saved) == (128 + number, 4, 4)  # within step 5
    assert (stopped.adapter, signal.getsignal(number)) == (None, before)
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-000002", "step-000004"}
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        result = train(
            toy_run(tmp_path / "run", options={"signal_at": 3, "signal_number": int(signal.SIGHUP)}), silent=True
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.exit_code, result.step) == (0, 8)


def test_a_terminal_that_is_gone_stops_no_training():
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    progress = PlainProgress(1, Gone())
    progress.begin(3, 0)
    progress.step(1, 0.5, 0.1)
    progress.message("a line")


def test_a_full_disk_is_told_with_the_file_and_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "metrics.jsonl" and "a" in arguments:
            raise OSError(28, "No space left on device")
        return original(path, *arguments, **options)

    original = Path.open
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be written: No space left on device\. .* --resume"):
        train(toy_run(tmp_path / "run"), silent=True)


def test_a_full_disk_is_no_fault_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ToyTask, "generate", full)
    with pytest.raises(TrainingError, match=r"samples cannot be written: No space left on device\. .* --resume"):
        train(toy_run(tmp_path / "run"), silent=True)


def test_resume_from_a_damaged_newest_checkpoint_equals_an_uninterrupted_run(
    tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "run"
    values: dict[str, Any] = {"gradient_accumulation": 2, "sample_every": 3}
    shutil.copytree(whole, folder)
    (folder / "adapter.safetensors").unlink()
    newest = folder / "checkpoints/step-000008/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    result = train(toy_run(folder, **values), resume=True, silent=True)
    assert "step-000008" in caplog.text
    assert result.step == 8
    assert_same_run(folder, whole)


def test_resume_without_a_checkpoint_starts_from_the_start(tmp_path: Path, whole: Path):
    values: dict[str, Any] = {"gradient_accumulation": 2, "sample_every": 3}
    train(toy_run(tmp_path / "run", **values), resume=True, silent=True)
    assert_same_run(tmp_path / "run", whole)


def test_samples_and_log_lines_do_not_change_what_is_trained(tmp_path: Path, whole: Path):
    train(toy_run(tmp_path / "run", gradient_accumulation=2, sample_every=1, log_every=1, num_workers=1), silent=True)
    assert_same_run(tmp_path / "run", whole)


def test_another_seed_is_another_run(tmp_path: Path, whole: Path):
    train(toy_run(tmp_path / "run", gradient_accumulation=2, seed=1), silent=True)
    assert losses(tmp_path / "run") != losses(whole)


def test_accumulated_gradients_equal_those_of_one_large_batch(tmp_path: Path):
    adapter = {"type": "lora", "rank": 2, "targets": "attn.* mlp.*"}
    train(toy_run(tmp_path / "one", batch_size=6, adapter=adapter), silent=True)
    train(toy_run(tmp_path / "many", batch_size=2, gradient_accumulation=3, adapter=adapter), silent=True)
    for one, many in zip(losses(tmp_path / "one"), losses(tmp_path / "many"), strict=True):
        assert one["loss"] == pytest.approx(many["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(many["grad_norm"], rel=1e-2)


def test_the_first_step_is_adamw_on_the_clipped_gradient(tmp_path: Path):
    """AdamW's first step moves each entry by lr g / (|g| + eps), whatever g's size; the clipped norm scales g first."""
    adapter = {"type": "lora", "rank": 2, "targets": "mlp.up"}
    values: dict[str, Any] = {"steps": 1, "scheduler": "constant", "batch_size": EXAMPLES, "adapter": adapter}
    train(toy_run(tmp_path / "run", max_grad_norm=0.01, weight_decay=0.0, **values), silent=True)
    weights = load_file(tmp_path / "run/adapter.safetensors")
    moved = torch.cat([weights[key].flatten() for key in weights if key.endswith("/B")])
    assert moved.abs().max().item() == pytest.approx(1e-2, rel=1e-4)
    assert losses(tmp_path / "run")[0]["grad_norm"] > 0.01


@pytest.mark.parametrize(
    ("flag", "message"),
    [({}, "--resume"), ({"resume": True}, "no config.yaml"), ({"overwrite": True}, "no config.yaml")],
)
def test_a_folder_with_other_files_is_refused(tmp_path: Path, flag: dict[str, bool], message: str):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StateError, match=message):
        train(toy_run(tmp_path), silent=True, **flag)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwriting_replaces_a_run_and_nothing_else(tmp_path: Path):
    train(toy_run(tmp_path / "run"), silent=True)
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(StateError, match="--overwrite"):
        train(toy_run(tmp_path / "run"), silent=True)
    train(toy_run(tmp_path / "run", steps=2), overwrite=True, silent=True)
    assert (tmp_path / "run/notes.txt").exists()
    assert len(losses(tmp_path / "run")) == 2
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path: Path, flag: str):
    run = toy_run(tmp_path / "run")
    other = RunFolder(run)
    other.open(DataRecord(), overwrite=False)
    other.record({"step": 1, "loss": 0.5})
    with pytest.raises(StateError, match="run is in use: another process trains there"):
        train(run, **{flag: True}, silent=True)
    assert read_metrics(other.metrics) == [{"step": 1, "loss": 0.5}]
    other.close()
    assert train(run, **{flag: True}, silent=True).step == run.config.steps


def test_only_the_same_run_is_resumed(tmp_path: Path):
    train(toy_run(tmp_path / "run", steps=2, scheduler="constant"), silent=True)
    with pytest.raises(ConfigError) as caught:
        train(
            toy_run(tmp_path / "run", "adapter.rank=4", learning_rate=0.5, scheduler="constant"),
            resume=True,
            silent=True,
        )
    assert len(caught.value.problems) == 3
    assert "learning_rate is 0.5, but the run began with 0.01" in str(caught.value)
    longer = train(toy_run(tmp_path / "run", steps=4, scheduler="constant"), resume=True, silent=True)
    assert [r["step"] for r in losses(tmp_path / "run")] == [1, 2, 3, 4]
    assert longer.step == 4
    with pytest.raises(ConfigError, match="steps is 3, but 4 are done"):
        train(toy_run(tmp_path / "run", steps=3, scheduler="constant"), resume=True, silent=True)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"the loss of step 4 is nan. Lower learning_rate \(now 0.01\)"):
        train(toy_run(tmp_path / "run", options={"poison": 4}), silent=True)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "run/adapter.safetensors").exists()


@pytest.mark.parametrize("kind", ["prefix", "bottleneck"])
def test_other_adapter_types_need_no_word_here(tmp_path: Path, kind: str):
    result = train(toy_run(tmp_path / "run", adapter={"type": kind}, steps=30, scheduler="constant"), silent=True)
    assert result.figures["entropy"] < result.figures["base entropy"]


def test_bf16_computes_the_loss_in_bf16_and_keeps_the_adapter_in_float32(tmp_path: Path):
    train(toy_run(tmp_path / "half", mixed_precision="bf16"), silent=True)
    train(toy_run(tmp_path / "full"), silent=True)
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "half/adapter.safetensors").values())
    for half, full in zip(losses(tmp_path / "half"), losses(tmp_path / "full"), strict=True):
        assert half["loss"] != full["loss"]
        assert half["loss"] == pytest.approx(full["loss"], rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works here")
def test_fp16_without_a_gpu_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="fp16 needs a GPU, and this is a cpu; try bf16"):
        train(toy_run(tmp_path / "run", mixed_precision="fp16"), silent=True)


@pytest.mark.cuda
def test_fp16_resumes_with_the_scale_of_its_losses(tmp_path: Path):
    values: dict[str, Any] = {"mixed_precision": "fp16", "scheduler": "constant"}
    train(toy_run(tmp_path / "whole", **values), silent=True)
    train(toy_run(tmp_path / "parts", steps=3, **values), silent=True)
    state = json.loads((tmp_path / "parts/checkpoints/step-000003/state.json").read_text())
    assert state["values"]["scaler"]["scale"] > 0
    train(toy_run(tmp_path / "parts", **values), resume=True, silent=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_model_that_cannot_checkpoint_its_activations_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        train(toy_run(tmp_path / "run", gradient_checkpointing=True), silent=True)
    assert not (tmp_path / "run").exists()


def test_the_loop_is_told_where_the_adapter_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    original = ToyTask.prepare

    def watch(self: ToyTask, setting: Setting) -> Any:
        seen.append((setting.components, {point.role for point in setting.points}))
        return original(self, setting)

    monkeypatch.setattr(ToyTask, "prepare", watch)
    train(toy_run(tmp_path / "run", "adapter.targets=mlp.up attn.q", steps=1), silent=True)
    assert seen == [(frozenset({"toy"}), {"mlp.up", "attn.q"})]


def test_inference_puts_each_modules_mode_back():
    model = toys.ToyModel().train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before


def test_plain_progress_has_a_line_every_few_steps_and_one_at_the_end():
    stream = io.StringIO()
    progress = PlainProgress(2, stream)
    progress.begin(5, 0)
    for step in range(1, 6):
        progress.step(step, 0.5, 1e-3)
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert all("loss 0.5000" in line and "lr 1.00e-03" in line and "ETA 0:00" in line for line in lines)


def test_a_metrics_file_that_a_crash_cut_short_is_read_up_to_there(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize("second", [b"[1]", b'{"loss": 1}', b'{"step": "2"}', b'"x"', b"\xff\xfe"])
def test_a_damaged_metrics_file_is_read_up_to_the_damage(tmp_path: Path, second: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + second + b'\n{"step": 3}\n')
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\x01", "x"])
def test_a_damaged_configuration_is_not_resumed(tmp_path: Path, text: str):
    run = toy_run(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        train(run, resume=True, silent=True)
