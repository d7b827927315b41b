"""torchvision beside a torch that it was not built for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from adapterkit.torchvision_ops import ensure_torchvision_ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)


def test_without_the_fix_the_import_fails_here() -> None:
    result = run("import torchvision")
    if result.returncode == 0:
        pytest.skip("this environment's torchvision fits its torch")
    assert "RuntimeError: operator torchvision::nms does not exist" in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_with_the_fix_timm_imports_and_transforms() -> None:
    """In this process, where `conftest.py` has called the fix before anything else."""
    assert ensure_torchvision_ops() == ()
    from PIL import Image
    from timm.data.transforms_factory import create_transform

    make: Any = create_transform
    image = make(8, mean=(0, 0, 0), std=(1, 1, 1))(Image.new("RGB", (8, 8), (255, 0, 51)))
    assert [round(x, 6) for x in image[:, 4, 4].tolist()] == [1.0, 0.0, 0.2]
    assert ensure_torchvision_ops() == ()


def test_an_operator_that_exists_is_left_alone() -> None:
    result = run(
        """
import torch
torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.library.impl("torchvision::nms", "cpu", lambda dets, scores, threshold: scores + 41)
from adapterkit.torchvision_ops import ensure_torchvision_ops
assert "nms" not in ensure_torchvision_ops()
assert torch.ops.torchvision.nms(torch.zeros(1, 4), torch.ones(1), 0.5).item() == 42
"""
    )
    if "Only a single TORCH_LIBRARY" in result.stderr or "registered multiple" in result.stderr:
        pytest.skip("this environment's own binary defines the operator")
    assert result.returncode == 0, result.stderr


def test_nothing_is_imported_where_torchvision_is_absent() -> None:
    result = run(
        """
import sys
import importlib.util
importlib.util.find_spec = lambda name, package=None: None
from adapterkit.torchvision_ops import ensure_torchvision_ops
assert ensure_torchvision_ops() == ()
assert "torch" not in sys.modules
"""
    )
    assert result.returncode == 0, result.stderr
