# SPDX-License-Identifier: Apache-2.0
import math
import random

import pytest
import torch

from kvcompact_kernels.reference.key_scores import key_scores
from kvcompact_kernels.reference.selection import (
    gather_tokens,
    kept_recent,
    kept_window,
    pool_before_window,
    pool_scores,
    proportional_counts,
    pyramid_budgets,
    sinks_and_recent,
    top_tokens,
)


def heavy_hitters(scores, slots, recent_share=0.5, sinks=0):
    """H2O's rule, put together as the method does."""
    return top_tokens(scores, slots, first=sinks, last=kept_recent(slots, recent_share, sinks))


def observed_by_window(scores, slots, window=32, kernel_size=7, sinks=0):
    """SnapKV's rule, put together as the method does."""
    pooled = pool_before_window(scores, window, kernel_size)
    return top_tokens(pooled, slots, first=sinks, last=kept_window(slots, window, sinks))


def test_top_tokens_by_hand():
    scores = torch.tensor([0.0, 9.0, 1.0, 8.0, 2.0, 7.0, 0.5])
    assert top_tokens(scores, 3).tolist() == [1, 3, 5]
    assert top_tokens(scores, 3, first=1).tolist() == [0, 1, 3]
    assert top_tokens(scores, 3, first=1, last=1).tolist() == [0, 1, 6]
    assert top_tokens(scores, 3, last=3).tolist() == [4, 5, 6]
    assert top_tokens(scores, 7, first=2, last=2).tolist() == list(range(7))


def test_top_tokens_are_unique_ascending_and_equally_many_per_head():
    scores = torch.rand(2, 3, 57, dtype=torch.float64)
    kept = top_tokens(scores, 19, first=3, last=5)
    assert kept.shape == (2, 3, 19) and kept.dtype == torch.int64
    assert (kept.diff(dim=-1) > 0).all()
    for b in range(2):
        for h in range(3):
            dropped = sorted(set(range(57)) - set(kept[b, h].tolist()))
            chosen = kept[b, h, 3:-5]
            assert scores[b, h, chosen].min() > scores[b, h, dropped].max()


def test_ties_go_to_the_earlier_token():
    assert top_tokens(torch.ones(9), 4, first=1, last=1).tolist() == [0, 1, 2, 8]


@pytest.mark.parametrize("slots, first, last", [(0, 0, 1), (3, 2, 2), (8, 0, 0), (3, -1, 0)])
def test_top_tokens_refuses_impossible_counts(slots, first, last):
    with pytest.raises(ValueError, match="slots must be at least first"):
        top_tokens(torch.rand(7), slots, first=first, last=last)


def test_nan_scores_are_refused():
    scores = torch.rand(2, 9)
    scores[1, 4] = float("nan")
    for rule in (
        lambda: top_tokens(scores, 3),
        lambda: heavy_hitters(scores, 3),
        lambda: observed_by_window(scores, 3),
    ):
        with pytest.raises(ValueError, match="NaN"):
            rule()


def test_sinks_and_recent():
    assert sinks_and_recent(11, 5, 2).tolist() == [0, 1, 8, 9, 10]
    assert sinks_and_recent(11, 5, 0).tolist() == [6, 7, 8, 9, 10]
    assert sinks_and_recent(5, 5, 4).tolist() == [0, 1, 2, 3, 4]


def test_heavy_hitters_shares():
    scores = torch.tensor([0.0, 5.0, 1.0, 9.0, 2.0, 3.0, 0.1, 0.2])
    assert heavy_hitters(scores, 4).tolist() == [1, 3, 6, 7]
    assert heavy_hitters(scores, 4, recent_share=0.0).tolist() == [1, 3, 4, 5]
    assert heavy_hitters(scores, 4, recent_share=1.0).tolist() == [4, 5, 6, 7]
    assert heavy_hitters(scores, 4, sinks=1).tolist() == [0, 3, 6, 7]
    # no room for both halves and three sinks: the newest tokens yield
    assert heavy_hitters(scores, 4, recent_share=0.75, sinks=3).tolist() == [0, 1, 2, 7]


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_pool_scores_by_hand(pooling):
    scores = torch.tensor([[3.0, 0.0, 0.0, 6.0, 0.0]])
    want = {"avg": [[1.0, 1.0, 2.0, 2.0, 2.0]], "max": [[3.0, 3.0, 6.0, 6.0, 6.0]]}[pooling]
    assert pool_scores(scores, 3, pooling).tolist() == want
    assert torch.equal(pool_scores(scores, 1, pooling), scores)


def test_pool_scores_refuses():
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        pool_scores(torch.rand(4), 2)
    with pytest.raises(ValueError, match="pooling must be"):
        pool_scores(torch.rand(4), 3, "sum")


def test_observed_by_window_keeps_the_window_and_whole_phrases():
    scores = torch.zeros(20)
    scores[6] = 9.0
    assert observed_by_window(scores, 5, window=2, kernel_size=3).tolist() == [5, 6, 7, 18, 19]
    assert observed_by_window(scores, 6, window=2, kernel_size=3, sinks=1).tolist() == [0, 5, 6, 7, 18, 19]
    # a large score inside the window must not lift its neighbours before the window
    scores[18] = 99.0
    assert observed_by_window(scores, 5, window=2, kernel_size=3).tolist() == [5, 6, 7, 18, 19]


def test_window_shrinks_to_half_of_what_the_sinks_leave():
    assert [kept_window(slots, 32, 4) for slots in (5, 8, 64, 68, 500)] == [0, 2, 30, 32, 32]
    kept = observed_by_window(torch.rand(100), 12, window=32, sinks=4)
    assert kept.tolist()[:4] == [0, 1, 2, 3] and kept.tolist()[-4:] == [96, 97, 98, 99]


def test_h2o_keeps_an_early_heavy_hitter_that_snapkv_misses():
    # 40 queries: all but the last four attend to key 3, the last four to key 20
    keys, queries = torch.zeros(1, 1, 40, 8, dtype=torch.float64), torch.zeros(1, 1, 40, 8, dtype=torch.float64)
    keys[0, 0, 3, 0] = keys[0, 0, 20, 1] = 12.0
    queries[0, 0, :36, 0] = queries[0, 0, 36:, 1] = 12.0
    every = key_scores(queries, keys, scale=1.0)[0, 0]
    last = key_scores(queries[:, :, -4:], keys, scale=1.0)[0, 0]
    assert heavy_hitters(every, 4).tolist() == [3, 20, 38, 39]
    assert heavy_hitters(every, 3).tolist() == [3, 20, 39]
    assert heavy_hitters(every, 2).tolist() == [3, 39]
    assert observed_by_window(last, 2, window=1, kernel_size=1).tolist() == [20, 39]


def test_scores_are_summed_over_the_group():
    # neither query head alone prefers key 5, both together do
    keys = torch.eye(8, dtype=torch.float64)[None, None]
    queries = torch.zeros(1, 2, 1, 8, dtype=torch.float64)
    queries[0, 0, 0, 2], queries[0, 1, 0, 4] = 3.0, 3.0
    queries[0, :, 0, 5] = 2.7
    scores = key_scores(queries, keys, scale=1.0, causal=False)[0, 0]
    alone = [key_scores(queries[:, h : h + 1], keys, scale=1.0, causal=False)[0, 0] for h in range(2)]
    assert [top_tokens(s, 1).item() for s in alone] == [2, 4]
    assert top_tokens(scores, 1).item() == 5


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
@pytest.mark.parametrize("slots, tokens", [(5, 512), (64, 512), (101, 128), (128, 128)])
def test_pyramid_budgets_fall_and_their_mean_is_slots(slots, tokens, layers):
    budgets = pyramid_budgets(slots, tokens, layers, minimum=5)
    assert len(budgets) == layers and sum(budgets) == slots * layers
    assert all(5 <= b <= tokens for b in budgets)
    assert budgets == sorted(budgets, reverse=True)


def test_pyramid_follows_the_paper_where_there_is_room():
    budgets = pyramid_budgets(100, 1000, 5, steepness=20.0)
    assert budgets == [195, 148, 100, 52, 5]
    assert pyramid_budgets(100, 1000, 5, steepness=1.0) == [100] * 5
    assert pyramid_budgets(100, 120, 5)[0] == 120


@pytest.mark.parametrize("slots, steepness", [(0, 20.0), (4, 20.0), (65, 20.0), (10, 0.5), (10, float("nan"))])
def test_pyramid_refuses(slots, steepness):
    with pytest.raises(ValueError):
        pyramid_budgets(slots, 64, 4, steepness, minimum=5)


@pytest.mark.parametrize("seed", range(60))
def test_proportional_counts_are_whole_bounded_and_proportional(seed):
    draw = random.Random(seed)
    weights = [10 ** draw.uniform(-3, 2) for _ in range(draw.randint(1, 12))]
    low = draw.randint(0, 6)
    high = low + draw.randint(0, 60)
    total = draw.randint(low * len(weights), high * len(weights))
    counts = proportional_counts(total, weights, low, high)
    assert sum(counts) == total and all(low <= n <= high for n in counts)
    # some factor explains all of them, up to rounding: heads that the bounds do not hold are proportional
    least = max([(n - 1) / w for n, w in zip(counts, weights) if n > low], default=0)
    most = min([(n + 1) / w for n, w in zip(counts, weights) if n < high], default=math.inf)
    assert least <= most * (1 + 1e-9)


def test_proportional_counts_by_hand():
    assert proportional_counts(12, [1, 2, 3], 0, 12) == [2, 4, 6]
    assert proportional_counts(12, [1, 2, 9], 3, 5) == [3, 4, 5]
    assert proportional_counts(7, [1, 1, 1], 0, 7) == [3, 2, 2]


@pytest.mark.parametrize("total, weights", [(3, [1, 1]), (21, [1, 1]), (8, [1, 0]), (8, [1, math.inf])])
def test_proportional_counts_refuse(total, weights):
    with pytest.raises(ValueError, match="total must be in|weights must be finite"):
        proportional_counts(total, weights, 2, 10)


def test_gather_tokens_owns_its_memory():
    x = torch.randn(2, 3, 11, 4).transpose(1, 2).contiguous().transpose(1, 2)
    index = torch.stack([torch.randperm(11)[:5].sort().values for _ in range(6)]).reshape(2, 3, 5)
    got = gather_tokens(x, index)
    assert got.is_contiguous() and got.untyped_storage().nbytes() == got.numel() * got.element_size()
    for b in range(2):
        for h in range(3):
            assert torch.equal(got[b, h], x[b, h, index[b, h]])
    assert torch.equal(gather_tokens(x, torch.tensor([1, 4])), x[:, :, [1, 4]])
