"""Both types, and a prefix, as one adapter."""

from __future__ import annotations

from collections.abc import Iterator

import adapterkit_conditioning
import pytest
import torch
from adapterkit_conditioning.ip_adapter import IPAdapter
from adapterkit_conditioning.llama_adapter import LlamaAdapter
from torch import nn

import adapterkit as ak
from adapterkit.testing import AdapterConformance, toys

PARTS = (IPAdapter(targets="attn.kv"), LlamaAdapter(length=2), ak.Prefix(length=2))


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    manager = ak.get_plugin_manager()
    if manager.spec_of(IPAdapter) is not None:
        yield
        return
    manager.register(adapterkit_conditioning, name="conditioning_tests")
    yield
    manager.unregister(name="conditioning_tests")


class TestUnion(AdapterConformance):
    config = ak.Union(PARTS)


@pytest.mark.parametrize("gating", [False, True])
def test_a_union_is_its_parts_side_by_side(gating: bool) -> None:
    """With gates, each effect is half as strong at the start; a prefix' positions are scaled instead."""
    toys.register()
    model = toys.ToyModel().double().eval()
    adapters = ak.Adapters(model)
    parts = PARTS[:2] if gating else PARTS
    adapters.add("union", ak.Union(parts, gating=gating))
    for place, config in enumerate(parts):
        adapters.add(str(place), config)
        for key, module in adapters.modules(str(place)).items():
            for parameter in module.parameters():
                nn.init.normal_(parameter)
            adapters.modules("union")[key].get_submodule(f"members.{place}").load_state_dict(module.state_dict())
    image = torch.randn(3, 4, toys.WIDTH).double()
    with adapters.context(image=image):
        with adapters.activated("union"):
            found = model(toys.ids())
        with adapters.activated({str(place): 0.5 if gating else 1.0 for place in range(len(parts))}):
            assert torch.allclose(found, model(toys.ids()), rtol=1e-10, atol=1e-10)
    with pytest.raises(ak.errors.ContextError), adapters.activated("union"):
        model(toys.ids())
