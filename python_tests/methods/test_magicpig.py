# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from test_selection_methods import make_layer

from kvcompact_kernels.methods import get_method
from kvcompact_kernels.reference.selection import collision_probability, inclusion_probability, systematic_sample


def test_collision_probability_is_that_of_random_hyperplanes():
    torch.manual_seed(0)
    bits, tables, draws = 3, 6, 20_000
    for cosine in (-0.5, 0.2, 0.8, 0.97):
        pair = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]])
        signs = torch.randn(draws, tables, bits, 2) @ pair.T > 0
        shared = (signs[..., 0] == signs[..., 1]).all(-1).sum(-1)
        want = (shared >= 2).double().mean().item()
        got = collision_probability(torch.tensor(cosine), bits, tables).item()
        assert abs(got - want) < 4 * (0.25 / draws) ** 0.5
    assert collision_probability(torch.tensor([1.0, -1.0]), 10, 150).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_inclusion_probabilities_sum_to_the_slots():
    scores = torch.rand(2, 3, 40) ** 8
    got = inclusion_probability(scores, 13, first=2, last=3)
    assert (got > 0).all() and (got <= 1).all()
    assert (got[..., :2] == 1).all() and (got[..., -3:] == 1).all()
    torch.testing.assert_close(got.sum(-1), torch.full((2, 3), 13.0, dtype=torch.float64))
    # proportional to the scores wherever it is not certain
    row, s = got[0, 0], scores[0, 0].double()
    open_ones = (row < 1).nonzero()[:, 0]
    quotient = row[open_ones] / s[open_ones].clamp_min(1e-3)
    big = s[open_ones] > 1e-2
    torch.testing.assert_close(quotient[big], quotient[big][:1].expand(int(big.sum())), rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="not negative"):
        inclusion_probability(-scores, 5)
    with pytest.raises(ValueError, match="slots must be in"):
        inclusion_probability(scores, 4, first=2, last=3)


def test_tokens_are_drawn_with_their_probability():
    probability = inclusion_probability(torch.rand(1, 2, 30), 7)
    counts = torch.zeros(1, 2, 30)
    for seed in range(2000):
        index = systematic_sample(probability, seed)
        assert index.shape == (1, 2, 7) and (index.diff(dim=-1) > 0).all()
        counts.scatter_add_(2, index, torch.ones(1, 2, 7))
    assert ((counts / 2000 - probability).abs() < 5 * (0.25 / 2000) ** 0.5).all()
    with pytest.raises(ValueError, match="whole number"):
        systematic_sample(torch.tensor([[0.3, 0.4]]), 0)


def test_sums_over_slots_are_those_of_the_cache_on_average():
    layer = make_layer(40, batch=1, dtype=torch.float64)
    query = torch.randn(8, dtype=torch.float64)
    whole = (0.5 * layer.keys @ query).exp().sum(-1)
    total = torch.zeros_like(whole)
    for seed in range(1500):
        block = get_method("magicpig", seed=seed, bits=2, tables=4, sinks=2).compact_layer(layer, 16)
        total += (0.5 * block.keys @ query + block.beta).exp().sum(-1)
    torch.testing.assert_close(total / 1500, whole, rtol=0.06, atol=0)


def test_certain_tokens_have_no_bias_and_keys_like_the_queries_are_preferred():
    keys = torch.randn(1, 1, 80, 16)
    queries = torch.randn(1, 2, 80, 16)
    queries[:, :, -8:] = keys[:, :, 20:21] - keys.mean(2, keepdim=True)
    layer = make_layer(
        80, batch=1, heads=2, kv_heads=1, dim=16, keys=keys, queries=queries, values=torch.randn(1, 1, 80, 16)
    )
    method = get_method("magicpig", window=8, recent_share=0.2)
    probability = method.probabilities(layer, 20)
    assert probability[0, 0, 20] == 1 and probability[0, 0, 4:-4].median() < 0.5
    block = method.compact_layer(layer, 20)
    assert (block.beta[..., :4] == 0).all() and (block.beta[..., -4:] == 0).all() and (block.beta >= 0).all()
    assert (block.keys[0, 0] == keys[0, 0, 20]).all(-1).any()


@pytest.mark.parametrize("options", [{"bits": 0}, {"tables": 1}, {"window": 0}, {"recent_share": 2.0}, {"seed": -1}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        get_method("magicpig", **options)
