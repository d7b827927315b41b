"""What is cut out of a module's result, and what only looks like a sequence."""

from __future__ import annotations

import torch

from adapterkit.kernels.sequences import cut

LENGTH = 5


def test_every_sequence_is_cut_and_nothing_else() -> None:
    features = torch.randn(3, 4, LENGTH)  # as long in features as the sequence is in tokens
    tokens, attention = torch.randn(2, LENGTH, 4), torch.randn(2, 3, LENGTH, 7)
    heads, router = torch.randn(2, LENGTH, 3, 4), torch.randn(2 * LENGTH, 6)
    found = cut((features, tokens, attention, heads, router, None), slice(2, LENGTH), LENGTH)
    assert found[0] is features
    assert torch.equal(found[1], tokens[:, 2:])
    assert torch.equal(found[2], attention[:, :, 2:])
    assert found[3] is heads
    assert torch.equal(found[4], router.view(2, LENGTH, 6)[:, 2:].flatten(0, 1))
    assert found[5] is None


def test_each_row_keeps_its_own() -> None:
    tokens, kept = torch.randn(2, LENGTH, 4), torch.tensor([[0, 4], [1, 2]])
    found = cut(tokens, kept, LENGTH)
    assert torch.equal(found, torch.stack([tokens[0, [0, 4]], tokens[1, [1, 2]]]))


def test_the_batch_of_a_router_is_that_of_the_tokens_beside_it() -> None:
    tokens, router = torch.randn(2, LENGTH, 4), torch.randn(2 * LENGTH, 6)
    expected = router.view(2, LENGTH, 6)[:, 2:].flatten(0, 1)
    for result in ((tokens, router), (None, (router, tokens))):
        found = cut(result, slice(2, LENGTH), LENGTH)
        logits = found[1] if result[0] is tokens else found[1][0]
        assert torch.equal(logits, expected)


def test_only_what_has_a_row_for_every_token_is_a_router() -> None:
    tokens, more, alone = torch.randn(2, LENGTH, 4), torch.randn(2 * LENGTH + 1, 6), torch.randn(2 * LENGTH, 6)
    found = cut((tokens, more, alone[:, 0]), slice(2, LENGTH), LENGTH)
    assert found[1] is more
    assert found[2].shape == (2 * LENGTH,)
    assert cut(alone, slice(2, LENGTH), LENGTH) is alone
    assert cut((torch.randn(2, LENGTH + 1, 4), alone), slice(2, LENGTH), LENGTH)[1] is alone
