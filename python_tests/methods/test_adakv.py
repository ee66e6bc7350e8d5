# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from test_selection_methods import make_layer

from kvcompact_kernels.methods import get_method, list_methods
from kvcompact_kernels.methods._scored import ScoredMethod
from kvcompact_kernels.ops.key_scores import key_scores
from kvcompact_kernels.reference.selection import share_budget


def kept(layer, block):
    """Token indices of each head."""
    found = []
    for b, row in enumerate(block.heads()):
        for h, (keys, values, beta) in enumerate(row):
            match = (layer.keys[b, h][None] == keys[:, None]).all(-1)
            assert (match.sum(-1) == 1).all() and beta is None
            index = match.int().argmax(-1)
            assert torch.equal(layer.values[b, h, index], values)
            found.append(index)
    return found


def test_the_best_scores_of_all_heads_are_kept():
    while True:  # heads that win equally often, by chance, would make a rectangular block
        layer = make_layer(50, kv_heads=3)
        scores = key_scores(layer.queries, layer.keys, scale=layer.scale)
        owners = scores.flatten(1).topk(24).indices // 50
        if any((owners == head).sum() != 16 for head in range(3)):
            break
    options = {"recent_share": 0.0, "sinks": 0}
    block = get_method("adakv", scorer="h2o", options=options, floor_share=0.0).compact_layer(layer, 8)
    for b in range(2):
        best = scores[b].flatten().topk(24).indices
        for h in range(3):
            want = (best[best // 50 == h] % 50).sort().values
            # a head that wins nothing keeps its best token
            want = want if want.numel() else scores[b, h].argmax()[None]
            assert torch.equal(kept(layer, block)[b * 3 + h], want)
    assert block.offsets is not None and block.slot_counts.sum(1).tolist() == [24, 24]
    assert block.keys.shape[0] == 48, "padding is stored"


def test_floor_and_ends():
    layer = make_layer(60, kv_heads=2)
    quiet = layer.queries.clone()
    quiet[:, :3] *= 0.01  # head 0 spreads its attention evenly: single tokens get little of it
    layer = make_layer(60, kv_heads=2, keys=layer.keys, values=layer.values, queries=quiet)
    options = {"window": 6, "sinks": 2}
    block = get_method("adakv", scorer="snapkv", options=options, floor_share=0.6).compact_layer(layer, 20)
    assert block.slot_counts.min() >= 12 and (block.slot_counts.sum(1) == 40).all()
    for index in kept(layer, block):
        assert index[:2].tolist() == [0, 1] and index[-6:].tolist() == list(range(54, 60))


SCORERS = [name for name, cls in list_methods().items() if issubclass(cls, ScoredMethod)]


def test_every_scorer_is_known():
    assert {"snapkv", "pyramidkv", "h2o", "scissorhands", "expected_attention", "finch"} <= set(SCORERS)


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_head_at_its_own_budget_is_the_scorer_itself(scorer):
    layer = make_layer(60)
    options = {"rerotate": False} if scorer == "finch" else {}
    plain = get_method(scorer, **options).compact_layer(layer, 24)
    ada = get_method("adakv", scorer=scorer, options=options, floor_share=1.0).compact_layer(layer, 24)
    assert torch.equal(ada.keys, plain.keys) and torch.equal(ada.values, plain.values)


def test_budgets_by_hand():
    scores = torch.tensor([[[9.0, 1, 1, 1], [8, 7, 6, 5]]])
    assert share_budget(scores, 2, 1).tolist() == [[1, 3]]
    assert share_budget(scores, 2, 2).tolist() == [[2, 2]]
    assert share_budget(scores, 3, 2, last=1).tolist() == [[2, 4]]
    with pytest.raises(ValueError, match="floor"):
        share_budget(scores, 2, 1, first=1, last=1)


def test_bad_options():
    with pytest.raises(ValueError, match="scorer must be one of"):
        get_method("adakv", scorer="attention_matching")
    with pytest.raises(TypeError, match="no option 'x'"):
        get_method("adakv", scorer="h2o", options={"x": 1})
    with pytest.raises(ValueError, match="floor_share"):
        get_method("adakv", floor_share=1.5)
