"""What every test relies on. The first lines make torchvision importable, before anything can import it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Generator, Iterator

from adapterkit.torchvision_ops import ensure_torchvision_ops

ensure_torchvision_ops()

import pytest  # noqa: E402 - only after the lines above
import torch  # noqa: E402

from adapterkit.plugins.manager import PluginManager  # noqa: E402

# The tests' tensors are tiny: a second thread costs more than it does, several times more on a busy machine.
torch.set_num_threads(1)


# Of the kit's slowest check these stand for all types in `make test`; `make test-slow` has the rest.
COMPILED = {
    "TestLoRA": "weights, their spans, and weights that are read",
    "TestPrefix": "attention",
    "TestBottleneck": "outputs",
    "TestPrompt": "tokens",
}


# Families by types, by ways of computing: what the kit checks of a type, on every family's own models. Of each product
# every fourth stands for it, the rest are slow.
PRODUCTS = {
    "test_diffusers_attention",
    "test_diffusion_families_adapters",
    "test_experts",
    "test_language_adapters",
    "test_language_dense_adapters",
    "test_language_dense_prefix",
    "test_language_prefix",
    "test_seq2seq_adapters",
    "test_timm_attention",
    "test_vision_adapters",
    "test_vision_families_attention",
}
_SHARE = 4


# What is imported and collected stays to the end: to look for garbage in it took a third of the time of both.
@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:
        if item.path.stem in PRODUCTS:
            test = item.nodeid.partition("[")[0]
            if seen[test] % _SHARE:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1
        if item.name == "test_compiled" and _class_of(item) not in COMPILED:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def _class_of(item: pytest.Item) -> str:
    return getattr(getattr(item, "cls", None), "__name__", "")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a traceback for each accelerator that is absent
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def manager() -> PluginManager:
    """A manager that knows the built-ins and looks for nothing else."""
    manager = PluginManager()
    manager.load_builtin()
    return manager


@pytest.fixture
def _compiles_anew() -> Iterator[None]:
    """For tests that compile: what others have compiled is forgotten, before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
