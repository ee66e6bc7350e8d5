# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from test_selection_methods import kept_indices, make_layer

from kvcompact_kernels.methods import get_method
from kvcompact_kernels.reference.selection import expected_attention_scores
from kvcompact_kernels.rope import Rope


def test_closed_form_is_the_mean_over_drawn_queries():
    torch.manual_seed(0)
    keys, values = torch.randn(1, 1, 9, 4).double(), torch.randn(1, 1, 9, 4).double()
    mean, root = torch.randn(1, 2, 4).double(), 0.5 * torch.randn(1, 2, 4, 4).double()
    covariance = root @ root.transpose(-1, -2)
    got = expected_attention_scores(mean, covariance, keys, values, 0.5, 0.1)
    draws = mean[:, :, None] + torch.randn(1, 2, 400_000, 4).double() @ root.transpose(-1, -2)
    weight = (0.5 * draws @ keys.transpose(-1, -2)).exp().mean(2)
    attention = (weight / weight.sum(-1, keepdim=True)).mean(1, keepdim=True)
    torch.testing.assert_close(got, (attention + 0.1) * values.norm(dim=-1), rtol=0.03, atol=0)


@pytest.mark.parametrize("scaling", [1.0, 1.2])
def test_queries_are_averaged_over_the_positions_to_come(scaling):
    rope = Rope(Rope.default(8).inv_freq, scaling)
    layer = make_layer(40, dtype=torch.float64, rope=rope)
    method = get_method(
        "expected_attention", future=5, skip=2, sinks=0, epsilon=0.0, use_values=False, use_covariance=False
    )
    free = rope.unrotate(layer.queries, layer.positions)[:, :, 2:].mean(2)
    # the mean query, rotated to each of the next five positions
    moved = sum(rope.rotate(free[:, :, None], torch.tensor([p]))[:, :, 0] for p in range(40, 45)) / 5
    logits = layer.scale * torch.einsum("bhgd,bhtd->bhgt", moved.view(2, 2, 3, 8), layer.keys)
    want = logits.softmax(-1).mean(2) * math.sqrt(8)  # the norm of a vector of ones
    torch.testing.assert_close(method.scores(layer), want, rtol=1e-6, atol=0)


def test_covariance_is_rotated_with_the_mean():
    layer = make_layer(40, dtype=torch.float64)
    method = get_method("expected_attention", future=1, skip=0, sinks=0, epsilon=0.0, use_values=False)
    # one future position: the statistics are those of the context's queries, all rotated there
    free = layer.rope.unrotate(layer.queries, layer.positions)
    there = layer.rope.rotate(free.reshape(2, 6, 40, 1, 8), torch.tensor([40])).reshape(2, 6, 40, 8)
    mean = there.mean(2)
    centred = there - mean[:, :, None]
    covariance = torch.einsum("bhnd,bhne->bhde", centred, centred) / 40
    want = expected_attention_scores(mean, covariance, layer.keys, torch.ones_like(layer.values), layer.scale, 0.0)
    torch.testing.assert_close(method.scores(layer), want, rtol=1e-6, atol=0)
    assert not torch.allclose(
        want, get_method("expected_attention", future=200, skip=0, sinks=0, epsilon=0.0, use_values=False).scores(layer)
    )


def test_sinks_do_not_count_against_a_head():
    # one query head of a group looks at a sink alone: its view of the other tokens still counts as much as the other head's
    layer = make_layer(40, heads=2, kv_heads=1, dtype=torch.float64)
    with_sinks = get_method("expected_attention", epsilon=0.0, use_values=False).scores(layer)
    keys = layer.keys.clone()
    keys[:, :, 1] += 40 * layer.queries[:, :1].mean(2)
    louder = make_layer(40, heads=2, kv_heads=1, keys=keys, values=layer.values, queries=layer.queries)
    torch.testing.assert_close(
        get_method("expected_attention", epsilon=0.0, use_values=False).scores(louder), with_sinks
    )
    assert (with_sinks[..., :4] == 0).all() and with_sinks[..., 4:].sum(-1).allclose(torch.tensor(8.0**0.5).double())


def test_keeps_the_highest_scores_and_large_values_count():
    layer = make_layer(53)
    method = get_method("expected_attention", sinks=3)
    index = kept_indices(layer, method.compact_layer(layer, 15))
    want = method.scores(layer)[..., 3:].topk(12).indices.sort().values + 3
    assert torch.equal(index[..., 3:], want) and (index[..., :3] == torch.arange(3)).all()
    values = layer.values.clone()
    values[:, :, 30] *= 1e12
    louder = make_layer(53, keys=layer.keys, queries=layer.queries, values=values)
    assert (kept_indices(louder, method.compact_layer(louder, 4))[..., 3] == 30).all()
