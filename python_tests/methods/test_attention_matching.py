# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch

from kvcompact_kernels.methods import LayerInput, get_method
from kvcompact_kernels.reference.compact_attention import compact_attention
from kvcompact_kernels.rope import Rope


def make_layer(tokens=90, batch=2, heads=6, kv_heads=2, dim=16, dtype=torch.float64):
    """Queries and keys that share a low-dimensional structure, as those of a model do; held-out queries beside them."""
    basis = torch.randn(4, dim, dtype=dtype)
    keys = torch.randn(batch, kv_heads, tokens, 4, dtype=dtype) @ basis
    drawn = 2 * torch.randn(batch, heads, 2 * tokens, 4, dtype=dtype) @ basis
    queries, held_out = drawn[:, :, :tokens], drawn[:, :, tokens:]
    values = torch.randn(batch, kv_heads, tokens, dim, dtype=dtype)
    return LayerInput(0, 2, keys, values, queries, torch.arange(tokens), Rope.default(dim), dim**-0.5), held_out


def output_error(layer, queries, block):
    def attend(keys, values, beta):
        return compact_attention(queries, [keys], [values], [beta], [None], None, None, None, layer.scale, True, -1, 2)

    full, full_lse = attend(layer.keys, layer.values, None)
    out, lse = attend(block.keys, block.values, block.beta)
    return (out - full).square().mean().item(), (lse - full_lse).square().mean().item()


@pytest.mark.parametrize("keys", ["rms", "max", "omp"])
def test_beats_selection_on_held_out_queries(keys):
    layer, held_out = make_layer()
    fitted = get_method("attention_matching", queries="repeat", keys=keys, sinks=0).compact_layer(layer, 20)
    errors = output_error(layer, held_out, fitted)
    for name in ("snapkv", "h2o"):
        selected = output_error(layer, held_out, get_method(name, sinks=0).compact_layer(layer, 20))
        assert errors[0] < 0.5 * selected[0], (name, errors, selected)
        assert errors[1] < 0.5 * selected[1], (name, errors, selected)
    without_fit = output_error(layer, held_out, replace(fitted, beta=None))
    assert errors[1] < without_fit[1]


def test_slots_have_their_own_memory_and_kept_keys():
    layer, _ = make_layer(dtype=torch.float32)
    block = get_method("attention_matching", sinks=3).compact_layer(layer, 17)
    assert block.keys.shape == (2, 2, 17, 16) and block.beta.shape == (2, 2, 17) and block.beta.dtype == torch.float32
    match = (layer.keys[:, :, None] == block.keys[:, :, :, None]).all(-1)
    assert (match.sum(-1) == 1).all()
    index = match.int().argmax(-1)
    assert (index.diff(dim=-1) > 0).all() and (index[..., :3] == torch.arange(3)).all()
    assert not torch.equal(block.values, layer.values.gather(2, index[..., None].expand_as(block.values)))
    for tensor in block.tensors().values():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("limit", [0.25, 7.0])
def test_beta_stays_in_its_limits(limit):
    layer, _ = make_layer()
    block = get_method("attention_matching", beta_limit=limit).compact_layer(layer, 12)
    assert block.beta.abs().max() <= limit


def test_all_slots_is_the_cache_itself():
    layer, _ = make_layer()
    block = get_method("attention_matching").compact_layer(layer, 90)
    assert torch.equal(block.keys, layer.keys) and torch.equal(block.values, layer.values) and block.beta is None


def test_prefill_queries_are_moved_behind_the_context():
    layer, _ = make_layer()
    behind = torch.full((90,), 90)
    moved = replace(layer, queries=layer.rope.rotate(layer.rope.unrotate(layer.queries, layer.positions), behind))
    prefill = get_method("attention_matching", queries="prefill").compact_layer(layer, 20)
    repeat = get_method("attention_matching", queries="repeat").compact_layer(moved, 20)
    torch.testing.assert_close(prefill.values, repeat.values)
    torch.testing.assert_close(prefill.beta, repeat.beta)
    assert get_method("attention_matching", queries="prefill").prefill_passes == 1
    assert get_method("attention_matching", queries="repeat").prefill_passes == 2


def test_fewer_reference_queries_are_still_a_fit():
    layer, held_out = make_layer(tokens=200)
    few = get_method("attention_matching", queries="repeat", max_queries=150).compact_layer(layer, 30)
    selected = get_method("snapkv").compact_layer(layer, 30)
    assert output_error(layer, held_out, few)[0] < output_error(layer, held_out, selected)[0]


def test_low_precision_stays_near_fp64():
    layer, held_out = make_layer()
    narrow = replace(
        layer, keys=layer.keys.bfloat16(), values=layer.values.bfloat16(), queries=layer.queries.bfloat16()
    )
    block = get_method("attention_matching", queries="repeat", sinks=0).compact_layer(narrow, 20)
    assert block.keys.dtype == block.values.dtype == torch.bfloat16 and block.beta.dtype == torch.float32
    wide = output_error(layer, held_out, block.to(dtype=torch.float64))
    selected = output_error(layer, held_out, get_method("snapkv", sinks=0).compact_layer(layer, 20))
    assert wide[0] < 0.5 * selected[0]


@pytest.mark.parametrize("where", ["keys", "values", "queries"])
def test_nan_is_refused(where):
    layer, _ = make_layer()
    getattr(layer, where)[1, 1, 50, 3] = float("nan")
    with pytest.raises(ValueError, match=f"{where} of layer 0 hold NaN"):
        get_method("attention_matching").compact_layer(layer, 10)


@pytest.mark.parametrize(
    "options",
    [
        {"queries": "self-study"},
        {"keys": "random"},
        {"max_queries": 0},
        {"mass_ridge": 0.0},
        {"value_ridge": -1.0},
        {"beta_limit": 0.0},
        {"sinks": -1},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        get_method("attention_matching", **options)
