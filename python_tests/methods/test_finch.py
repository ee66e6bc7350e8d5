# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from test_selection_methods import kept_indices, make_layer

from kvcompact_kernels.methods import get_method
from kvcompact_kernels.reference.key_scores import key_scores
from kvcompact_kernels.rope import Rope


def test_keeps_the_prompt_and_what_it_attends_to():
    layer = make_layer(60)
    method = get_method("finch", window=6, rerotate=False, sinks=1)
    index = kept_indices(layer, method.compact_layer(layer, 20))
    each = [
        key_scores(layer.queries[:, :, i : i + 1], layer.keys[:, :, : i + 1], scale=layer.scale) for i in range(54, 60)
    ]
    scores = sum(i * s[..., :54] for i, s in zip(range(54, 60), each))
    want = scores[..., 1:54].topk(13).indices.sort().values + 1
    assert torch.equal(index[..., 1:14], want)
    assert torch.equal(index[..., 14:], torch.arange(54, 60).expand(2, 2, 6)) and (index[..., 0] == 0).all()


def test_prompt_tokens_count_per_query_that_sees_them():
    layer = make_layer(30, queries=torch.zeros(2, 6, 30, 8))
    scores = get_method("finch", window=5).scores(layer)
    # attention is even, 1/n of n tokens for each query head, weighted by the n - 1 tokens before the query
    assert scores[0, 0, 28].item() == pytest.approx(3 * (28 / 29 + 29 / 30) / 2)
    assert scores[0, 0, 0].item() == pytest.approx(3 * sum((n - 1) / n for n in range(26, 31)) / 5)


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_gaps_between_positions_are_closed(scaling):
    rope = Rope(Rope.default(8).inv_freq, scaling)
    layer = make_layer(50, dtype=torch.float64, rope=rope, positions=torch.arange(7, 57))
    plain = get_method("finch", window=4, rerotate=False).compact_layer(layer, 16)
    index = kept_indices(layer, plain)
    moved = get_method("finch", window=4).compact_layer(layer, 16)
    assert torch.equal(moved.values, plain.values) and moved.beta is None
    for b in range(2):
        for h in range(2):
            free = rope.unrotate(layer.keys[b, h], layer.positions)[index[b, h]]
            want = rope.rotate(free, torch.arange(57 - 16, 57))
            torch.testing.assert_close(moved.keys[b, h], want, rtol=1e-10, atol=1e-10)
    # the tokens of the prompt stood together already
    torch.testing.assert_close(moved.keys[:, :, -4:], layer.keys[:, :, -4:], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(moved.keys[:, :, :4], plain.keys[:, :, :4])
