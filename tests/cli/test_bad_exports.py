"""A run whose files for others are not what was trained ends with 1; the adapter is there, and the run is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from adapterkit.cli.main import main
from adapterkit.training.export import baked, checks
from tests.training.language import tiny


def trained(folder: Path, **more: Any) -> tuple[Path, str, int]:
    rows = tiny.rows_to(folder / "rows.jsonl", *[{"prompt": "why ", "completion": "no"}] * 4)
    run = tiny.run_of(tiny.llama(folder / "model"), rows, folder / "run", "steps=1")
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**run.resolved(), **more}))
    result = CliRunner().invoke(main, ["train", str(file)])
    assert (folder / "run/adapter.safetensors").is_file()
    assert "adapter.safetensors (" in result.stdout
    again = CliRunner().invoke(main, ["train", str(file), "--resume"])
    assert (again.exit_code, "nothing is left to do" in again.stderr) == (0, True)
    return folder / "run", result.stderr, result.exit_code


def test_an_exported_file_that_is_read_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "TOLERANCE", -1.0)
    run, told, code = trained(tmp_path, export=["peft"])
    assert code == 1
    assert f"error: the adapter is written, {run / 'adapter.safetensors'}; what is to be made of it is not:" in told
    assert f"  export peft: {run / 'export/peft'} (adapterkit" in told
    assert "DIFFERS" in told


def test_a_baked_model_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(baked, "_TOLERANCE", {torch.float32: -1.0})
    run, told, code = trained(tmp_path, bake=True)
    assert code == 1
    assert "  bake: NOT WRITTEN: the model that is read back computes something else" in told
    assert not (run / "model").exists()


def test_what_is_read_as_it_was_trained_ends_with_nothing(tmp_path: Path):
    run, told, code = trained(tmp_path, export=["peft"], bake=True)
    assert (code, "error" in told, (run / "model").is_dir()) == (0, False, True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_baked_model_of_few_bits_may_be_as_far_as_they_round(tmp_path: Path, dtype: str):
    run, told, code = trained(tmp_path, bake=True, dtype=dtype, learning_rate=0.1)
    assert (code, (run / "model").is_dir()) == (0, True)
    assert "read back by its own library: " in told
