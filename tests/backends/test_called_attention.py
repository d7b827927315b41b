"""The seam at torch's call: whatever a module gives it, a prefix is softmax over more keys."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapterkit.backend import SITE
from adapterkit.backends.called_attention import CalledAttentionSeam, attend, calls_attention
from adapterkit.engine.attach import adapted_class
from adapterkit.engine.attention import extend_all
from adapterkit.errors import IncompatibleTargetError

BATCH, HEADS, LENGTH, WIDTH, ADDED = 2, 4, 5, 3, 2
EXACT = {"rtol": 0, "atol": 1e-12}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Front(nn.Module):
    """An adapter that puts keys and values in front, and the extension that asks it."""

    abilities = type("Abilities", (), {"beside": frozenset()})

    def __init__(self, heads: int, weight: float = 0.4, width: int = WIDTH) -> None:
        super().__init__()
        self.kv_heads, self.weight = heads, weight
        self.keys, self.values = (nn.Parameter(randn(1, heads, ADDED, width, seed=s)) for s in (8, 9))

    def extend(self, keys: Tensor, values: Tensor, mask: Tensor | None, *, queries: int, causal: bool) -> Any:
        return extend_all(keys, values, mask, [(Put(self), self.weight)], queries=queries, causal=causal)  # type: ignore[list-item]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, *, scale: Any = None) -> Tensor:
        return output


class Put:
    abilities = Front.abilities

    def __init__(self, front: Front) -> None:
        self.front = front

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        parts = zip((self.front.keys, self.front.values), (keys, values), strict=True)
        return tuple(torch.cat([own.expand(len(given), -1, -1, -1), given], dim=2) for own, given in parts)


class Call(nn.Module):
    """Any attention: it hands on what it is given."""

    def __init__(self, times: int = 1, heads: int = HEADS) -> None:
        super().__init__()
        self.times, self.heads = times, heads

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        outputs = [F.scaled_dot_product_attention(*args, **kwargs) for _ in range(self.times)]
        return sum(outputs) if outputs else args[0]  # type: ignore[return-value]


def adapted(module: nn.Module, front: Front) -> Any:
    module.__dict__[SITE] = front
    module.__class__ = adapted_class(type(module))
    return module


def soft(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = query @ key.mT * scale
    return (scores if mask is None else scores + mask).softmax(-1) @ value


def reference(query: Tensor, key: Tensor, value: Tensor, front: Front, mask: Tensor | None, scale: float) -> Tensor:
    """Of [batch, heads, length, width], every head with keys of its own; the mask is additive."""
    groups = query.shape[1] // front.kv_heads
    keys, values = (
        torch.cat([own.expand(len(given), -1, -1, -1), given], 2).repeat_interleave(groups, 1)
        for own, given in zip((front.keys, front.values), (key, value), strict=True)
    )
    mask = torch.zeros(query.shape[2], key.shape[2], dtype=query.dtype) if mask is None else mask
    assert mask is not None
    logits = torch.full((*mask.shape[:-1], ADDED), front.weight, dtype=query.dtype).log()
    return soft(query, keys, values, torch.cat([logits, mask.expand(*mask.shape[:-1], key.shape[2])], -1), scale)


SEEN = randn(BATCH, 1, LENGTH, LENGTH, seed=5) > -0.5
SEEN[..., 0] = True
CAUSAL = torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)
MASKS: dict[str, tuple[dict[str, Any], Tensor | None]] = {
    "none": ({}, None),
    "boolean": ({"attn_mask": SEEN}, torch.zeros(SEEN.shape).double().masked_fill(~SEEN, float("-inf"))),
    "additive": ({"attn_mask": randn(BATCH, HEADS, LENGTH, LENGTH)}, randn(BATCH, HEADS, LENGTH, LENGTH)),
    "two dimensions": ({"attn_mask": CAUSAL}, CAUSAL),
    "of one key": ({"attn_mask": randn(LENGTH, 1)}, randn(LENGTH, 1)),
    "causal": ({"is_causal": True}, CAUSAL),
}


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("heads", [HEADS, 2], ids=["own keys", "grouped"])
@pytest.mark.parametrize(("given", "mask"), MASKS.values(), ids=MASKS)
def test_a_prefix_is_softmax_over_more_keys(
    given: dict[str, Any], mask: Tensor | None, heads: int, scale: float | None
) -> None:
    query, key, value = (
        randn(BATCH, HEADS, LENGTH, WIDTH),
        *(randn(BATCH, heads, LENGTH, WIDTH, seed=s) for s in (1, 2)),
    )
    front = Front(heads)
    options = {**given, "scale": scale, **({"enable_gqa": True} if heads != HEADS else {})}
    found = attend(adapted(Call(), front), query, key, value, **options)
    torch.testing.assert_close(found, reference(query, key, value, front, mask, scale or WIDTH**-0.5), **EXACT)


def test_other_tokens_keys_and_arguments_by_place() -> None:
    query, key, value = randn(BATCH, HEADS, LENGTH, WIDTH), *(randn(BATCH, HEADS, 7, WIDTH, seed=s) for s in (1, 2))
    front, mask = Front(HEADS), randn(1, 1, 1, 7)
    found = attend(adapted(Call(), front), query, key, value, mask, 0.0)
    torch.testing.assert_close(found, reference(query, key, value, front, mask, WIDTH**-0.5), **EXACT)


@pytest.mark.parametrize("masked", [None, "each", "all"])
def test_heads_that_are_folded_into_the_batch(masked: str | None) -> None:
    query, key, value = (randn(BATCH, HEADS, LENGTH, WIDTH, seed=s) for s in (1, 2, 3))
    front = Front(HEADS)
    mask = {None: None, "each": randn(BATCH, HEADS, LENGTH, LENGTH), "all": CAUSAL}[masked]
    given = mask.flatten(0, 1) if masked == "each" and mask is not None else mask
    found = attend(adapted(Call(), front), *(x.flatten(0, 1) for x in (query, key, value)), attn_mask=given)
    expected = reference(query, key, value, front, mask, WIDTH**-0.5)
    torch.testing.assert_close(found, expected.flatten(0, 1), **EXACT)


@pytest.mark.parametrize("masked", [None, "windows", "batch", "all"])
@pytest.mark.parametrize("windows", [(3,), (2, 3)], ids=["five dimensions", "six"])
def test_windows_between_heads_and_tokens(windows: tuple[int, ...], masked: str | None) -> None:
    query, key, value = (randn(BATCH, HEADS, *windows, LENGTH, WIDTH, seed=s) for s in (1, 2, 3))
    ones = (1,) * len(windows)
    masks = {
        "windows": randn(1, 1, *windows, LENGTH, LENGTH),
        "batch": randn(BATCH, HEADS, *ones, LENGTH, LENGTH),
        "all": CAUSAL,
    }
    front, mask = Front(HEADS), masks.get(masked or "")
    found = attend(adapted(Call(), front), query, key, value, attn_mask=mask)
    whole = None if mask is None else mask.expand(BATCH, HEADS, *windows, LENGTH, LENGTH)
    for index in torch.cartesian_prod(*map(torch.arange, windows)).view(-1, len(windows)).tolist():
        at = (slice(None), slice(None), *index)
        own = None if whole is None else whole[at]
        expected = reference(query[at], key[at], value[at], front, own, WIDTH**-0.5)
        torch.testing.assert_close(found[at], expected, **EXACT)


def test_dropout_is_the_calls_own() -> None:
    query, key, value = (randn(BATCH, HEADS, LENGTH, WIDTH, seed=s) for s in (1, 2, 3))
    module = adapted(Call(), Front(HEADS))
    assert torch.equal(attend(module, query, key, value, dropout_p=1.0), torch.zeros_like(query))


@pytest.mark.parametrize(("times", "told"), [(0, "did not call"), (2, "called more than")])
def test_other_than_one_call_is_an_error(times: int, told: str) -> None:
    query = randn(BATCH, HEADS, LENGTH, WIDTH)
    module = Call(times)
    expected = module(query, query, query)
    with pytest.raises(IncompatibleTargetError, match=f"Call {told} scaled_dot_product_attention once"):
        attend(adapted(module, Front(HEADS)), query, query, query)
    module.__class__ = Call
    assert torch.equal(module(query, query, query), expected)
    assert not torch.overrides._get_current_function_mode_stack()


class Around(nn.Module):
    """An attention of its own beside another module's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.inner(x, x, x), x, x)


class Asked(Call):
    """As attachment makes it: the seam runs in place of its forward."""

    inside: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return attend(self.inside, *args, **kwargs)


def test_an_adapted_attention_inside_another_is_extended_by_its_own_alone() -> None:
    inner, outer, x = Front(HEADS, 0.7), Front(HEADS, 0.3), randn(BATCH, HEADS, LENGTH, WIDTH)
    outer.keys.data, outer.values.data = randn(1, HEADS, ADDED, WIDTH, seed=18), randn(1, HEADS, ADDED, WIDTH, seed=19)
    asked = Asked()
    asked.inside = adapted(Call(), inner)
    found = attend(adapted(Around(asked), outer), x)
    mixed = reference(x, x, x, inner, None, WIDTH**-0.5)
    torch.testing.assert_close(found, reference(mixed, x, x, outer, None, WIDTH**-0.5), **EXACT)


def test_a_call_of_a_module_inside_is_the_modules_own() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Call()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x)

    front, x = Front(HEADS), randn(BATCH, HEADS, LENGTH, WIDTH)
    expected = reference(x, x, x, front, None, WIDTH**-0.5)
    torch.testing.assert_close(attend(adapted(Holder(), front), x), expected, **EXACT)


def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
    front = Front(HEADS)
    parts = [randn(BATCH, HEADS, LENGTH, WIDTH, seed=s).requires_grad_() for s in (1, 2, 3)]
    (run(front, *parts) * randn(BATCH, HEADS, LENGTH, WIDTH, seed=4)).sum().backward()
    return [x.grad for x in (*parts, front.keys, front.values)]  # type: ignore[misc]


def test_gradients_are_those_of_the_equation_and_of_a_checkpoint() -> None:
    def once(front: Front, *parts: Tensor) -> Tensor:
        return attend(adapted(Call(), front), *parts)

    def again(front: Front, *parts: Tensor) -> Tensor:
        return checkpoint(attend, adapted(Call(), front), *parts, use_reentrant=False)  # type: ignore[return-value]

    def written(front: Front, *parts: Tensor) -> Tensor:
        return reference(*parts, front, None, WIDTH**-0.5)  # type: ignore[arg-type]

    for found in (gradients(once), gradients(again)):
        for own, expected in zip(found, gradients(written), strict=True):
            torch.testing.assert_close(own, expected, **EXACT)


@pytest.mark.parametrize("shape", [(BATCH, HEADS), (BATCH * HEADS,), (BATCH, HEADS, 3)], ids=["four", "three", "five"])
def test_it_compiles_without_a_break(shape: tuple[int, ...]) -> None:
    x, module = randn(*shape, LENGTH, WIDTH), adapted(Call(), Front(HEADS))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: attend(module, x, x, x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), attend(module, x, x, x), **EXACT)


def test_threads_do_not_see_each_others_calls() -> None:
    x, fronts = randn(BATCH, HEADS, LENGTH, WIDTH), [Front(HEADS, weight) for weight in (0.2, 0.4, 0.6, 0.8)]
    expected = [reference(x, x, x, front, None, WIDTH**-0.5) for front in fronts]
    failed: list[int] = []
    gate = threading.Barrier(len(fronts))

    def work(index: int) -> None:
        module = adapted(Call(), fronts[index])
        gate.wait()
        for _ in range(50):
            if not torch.allclose(attend(module, x, x, x), expected[index], **EXACT):
                failed.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(fronts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def _mix(query: Tensor, options: dict[str, Any]) -> Tensor:
    return F.scaled_dot_product_attention(query, query, query, **options)


class ByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self._mixed(x)

    def _mixed(self, x: Tensor) -> Tensor:
        return (lambda: _mix(x, {}))()


class BySuper(ByFunction):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Processor:
    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return _mix(x, {})


class ByProcessor(nn.Module):
    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


CALLING = [Call(), ByFunction(), BySuper(), ByProcessor(Processor()), Attention(8, num_heads=2)]


@pytest.mark.parametrize("module", CALLING, ids=lambda module: type(module).__name__)
def test_what_calls_is_told_from_its_code(module: nn.Module) -> None:
    assert calls_attention(module)
    assert calls_attention(adapted(module, Front(HEADS)))
    assert CalledAttentionSeam().refusal(module) is None


@pytest.mark.parametrize("module", [nn.MultiheadAttention(8, 2), nn.Linear(2, 2), ByProcessor(lambda module, x: x)])
def test_what_does_not_call_is_refused_by_name(module: nn.Module) -> None:
    refusal = CalledAttentionSeam().refusal(module)
    assert refusal is not None
    assert type(module).__name__ in refusal
