# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch
from test_selection_methods import kept_indices, make_layer

from kvcompact_kernels.methods import get_method


def test_slots_come_from_what_the_first_method_kept():
    layer = make_layer(90)
    first = {"window": 8, "sinks": 2}
    method = get_method("compose", first="snapkv", second="h2o", first_ratio=3.0, first_options=first)
    index = kept_indices(layer, method.compact_layer(layer, 12))
    allowed = get_method("snapkv", **first).select(layer, 36)
    for b in range(2):
        for h in range(2):
            assert set(index[b, h].tolist()) <= set(allowed[b, h].tolist())
            # h2o on the selected tokens, their queries and positions alone
            kept = allowed[b, h]
            alone = replace(
                layer,
                keys=layer.keys[b : b + 1, h : h + 1, kept],
                values=layer.values[b : b + 1, h : h + 1, kept],
                queries=layer.queries[b : b + 1, 3 * h : 3 * h + 3, kept],
                positions=layer.positions[kept],
            )
            assert torch.equal(index[b, h], kept[get_method("h2o").select(alone, 12)[0, 0]])


def test_attention_matching_fits_the_selected_tokens():
    layer = make_layer(80, batch=1, dtype=torch.float64)
    block = get_method("compose", first="uniform", first_ratio=2.0).compact_layer(layer, 20)
    assert block.beta is not None and block.keys.shape == (1, 2, 20, 8)
    kept = get_method("uniform").select(layer, 40)
    head = replace(
        layer,
        keys=layer.keys[:, 1:2, kept],
        values=layer.values[:, 1:2, kept],
        queries=layer.queries[:, 3:, kept],
        positions=layer.positions[kept],
    )
    want = get_method("attention_matching").compact_layer(head, 20)
    for name, tensor in want.tensors().items():
        torch.testing.assert_close(getattr(block, name)[:, 1:2], tensor)


def test_a_ratio_that_keeps_everything_is_the_second_method():
    layer = make_layer(40)
    block = get_method("compose", second="zsmerge", first_ratio=9.0).compact_layer(layer, 10)
    want = get_method("zsmerge").compact_layer(layer, 10)
    assert all(torch.equal(getattr(block, name), x) for name, x in want.tensors().items())


def test_two_readings_go_with_a_first_method_without_queries():
    method = get_method("compose", first="uniform", second_options={"queries": "repeat"})
    assert method.prefill_passes == 2
    assert method.compact_layer(make_layer(60), 10).beta is not None
    with pytest.raises(ValueError, match="read twice"):
        get_method("compose", first="snapkv", second_options={"queries": "repeat"})


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"first": "attention_matching"}, ValueError, "first must be one of"),
        ({"second": "still"}, ValueError, "second must be one of"),
        ({"second": "compose"}, ValueError, "second must be one of"),
        ({"first_ratio": 0.5}, ValueError, "first_ratio"),
        ({"first_options": 3}, TypeError, "first_options must be a dict"),
        ({"second_options": {"x": 1}}, TypeError, "no option 'x'"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        get_method("compose", **options)
