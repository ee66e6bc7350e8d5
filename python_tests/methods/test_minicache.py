# SPDX-License-Identifier: Apache-2.0
import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from test_selection_methods import make_layer
from tiny_models import tiny_ids, tiny_model
from transformers import DynamicCache

from kvcompact_kernels import CompactCache, compact, patch_model
from kvcompact_kernels.cache import FORMAT, CompactBlock, PairedBlock, SharedSlots, load_safetensors
from kvcompact_kernels.evaluation.reading import EqualBytes, byte_budget, read
from kvcompact_kernels.methods import LayerInput, get_method
from kvcompact_kernels.methods.base import finished_blocks

DIM, HEADS = 16, 2  # of the tiny model: head dim, KV heads


def model_of(layers=4, dtype=torch.float64, family="llama", **options):
    return tiny_model(family, dtype, num_hidden_layers=layers, **options)


def merged_by_hand(below, above, retain, weight):
    """Keys and values of both layers after the merge, token by token in fp64; ``below = (keys, values)``."""
    out = [[x.clone() for x in pair] for pair in (below, above)]
    batch, heads, tokens, _ = below[0].shape

    def cosine(x, y):
        return float((x @ y / (x.norm() * y.norm())).clamp(-1, 1))

    for b in range(batch):
        for h in range(heads):
            far = [sum(math.acos(cosine(p[b, h, i], q[b, h, i])) for p, q in zip(below, above)) for i in range(tokens)]
            retained = sorted(range(tokens), key=lambda i: -far[i])[: math.ceil(retain * tokens)]
            for i in set(range(tokens)) - set(retained):
                for kind in range(2):
                    x, y = below[kind][b, h, i], above[kind][b, h, i]
                    a = math.acos(cosine(x, y))
                    e = (math.sin((1 - weight) * a) * x / x.norm() + math.sin(weight * a) * y / y.norm()) / math.sin(a)
                    out[0][kind][b, h, i], out[1][kind][b, h, i] = e * x.norm(), e * y.norm()
    return out


def sorted_rows(x):
    """The slots of each head in an order of their own: a merged pair stores them in another one."""
    return x.gather(2, x[..., :1].argsort(dim=2).expand_as(x))


@pytest.mark.parametrize("retain, weight", [(0.05, 0.6), (0.0, 0.5), (0.3, 0.2), (1.0, 0.6)])
def test_the_rule_by_hand(retain, weight):
    model, ids = model_of(5), tiny_ids(2, 21)
    full = compact(model, ids, "full")
    got = compact(model, ids, "minicache", ratio=1, start=0.25, retain=retain, weight=weight)
    kinds = [type(block) for block in got.layers]
    assert kinds == [CompactBlock, PairedBlock, PairedBlock, PairedBlock, PairedBlock]
    assert torch.equal(got.layers[0].keys, full.layers[0].keys)
    for i in (1, 3):
        pairs = [(full.layers[j].keys, full.layers[j].values) for j in (i, i + 1)]
        want = merged_by_hand(*pairs, retain, weight)
        for j in range(2):
            block = got.layers[i + j]
            torch.testing.assert_close(sorted_rows(block.keys), sorted_rows(want[j][0]), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(sorted_rows(block.values), sorted_rows(want[j][1]), rtol=1e-9, atol=1e-9)
            # keys and values of a slot are of one token: its keys' length belongs to its values' length
            lengths = [torch.stack([x.norm(dim=-1) for x in kv], -1) for kv in ((block.keys, block.values), want[j])]
            torch.testing.assert_close(*map(sorted_rows, lengths), rtol=1e-9, atol=1e-9)


def test_a_last_layer_without_partner_stays_alone():
    got = compact(model_of(4), tiny_ids(1, 20), "minicache", ratio=1, start=0.25)
    assert [type(block) for block in got.layers] == [CompactBlock, PairedBlock, PairedBlock, CompactBlock]
    assert [block.upper for block in got.layers[1:3]] == [False, True]
    assert got.layers[1].shared is got.layers[2].shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retained_tokens_are_exact_and_the_most_different(dtype):
    model, ids = model_of(dtype=dtype), tiny_ids(1, 40)
    full = compact(model, ids, "full")
    got = compact(model, ids, "minicache", ratio=1, start=0.5, retain=0.25)
    exact = []
    for i in (2, 3):
        same = (got.layers[i].keys[:, :, :, None] == full.layers[i].keys[:, :, None]).all(-1)
        same &= (got.layers[i].values[:, :, :, None] == full.layers[i].values[:, :, None]).all(-1)
        exact.append(same.any(2))
    assert torch.equal(*exact) and (exact[0].sum(-1) == 10).all()
    lower, upper = full.layers[2:]
    cosines = [torch.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in
               ((lower.keys, upper.keys), (lower.values, upper.values))]  # fmt: skip
    far = sum(x.clamp(-1, 1).acos() for x in cosines)
    assert (far.masked_fill(~exact[0], 9).amin(-1) >= far.masked_fill(exact[0], -9).amax(-1)).all()


@pytest.mark.parametrize("dtype, size, wide", [(torch.float32, 4, 4), (torch.bfloat16, 2, 4), (torch.float64, 8, 8)])
def test_bytes(dtype, size, wide):
    tokens, layers = 60, 6
    model, ids = model_of(layers, dtype), tiny_ids(1, tokens)
    got = compact(model, ids, "minicache", ratio=1, start=0.0, retain=0.1)
    slots = HEADS * tokens
    vectors = 2 * DIM * size * HEADS * (tokens + 6)  # those retained are there twice
    lengths = 2 * wide * slots * 2  # of keys and values, in both layers
    assert got.nbytes == layers // 2 * (vectors + lengths)
    assert got.logical_nbytes == layers * 2 * DIM * size * slots
    # what is really there, each storage once
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for block in got.layers for x in (block.shared.keys, block.shared.values, block.key_norms, block.value_norms)}  # fmt: skip
    assert sum(storages.values()) == got.nbytes


def test_bytes_of_the_file_and_the_way_back(tmp_path):
    got = compact(model_of(dtype=torch.float32), tiny_ids(2, 50), "minicache", ratio=2, start=0.0)
    got.save(tmp_path / "c.kvc")
    assert got.nbytes < (tmp_path / "c.kvc").stat().st_size < got.nbytes + 8192
    header, _ = load_safetensors(tmp_path / "c.kvc", FORMAT, 2)
    assert header["version"] == 2
    back = CompactCache.load(tmp_path / "c.kvc")
    assert back.nbytes == got.nbytes
    for i, (a, b) in enumerate(zip(got.layers, back.layers)):
        assert isinstance(b, PairedBlock) and b.upper == bool(i % 2) and b.shared is back.layers[i - i % 2].shared
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    with pytest.raises(ValueError, match="format version 2; this release reads up to 1"):
        load_safetensors(tmp_path / "c.kvc", FORMAT, 1)
    compact(model_of(), tiny_ids(1, 50), "snapkv").save(tmp_path / "d.kvc")
    assert load_safetensors(tmp_path / "d.kvc", FORMAT, 1)[0]["version"] == 1


def test_a_file_without_the_lower_layer_is_refused(tmp_path):
    got = compact(model_of(), tiny_ids(1, 30), "minicache", ratio=1)
    replace(got, layers=(*got.layers[:2], got.layers[3], got.layers[3])).save(tmp_path / "c.kvc")
    with pytest.raises(ValueError, match="damaged: shared must be SharedSlots"):
        CompactCache.load(tmp_path / "c.kvc")


def test_copies_of_a_cache_still_share():
    got = compact(model_of(dtype=torch.float32), tiny_ids(3, 30), "minicache", ratio=2, start=0.0)
    moved = got.to(dtype=torch.bfloat16)
    assert moved.dtype == torch.bfloat16 and moved.layers[0].key_norms.dtype == torch.float32
    for copied in (moved, copy.deepcopy(got), pickle.loads(pickle.dumps(got))):
        for i in (0, 2):
            assert copied.layers[i].shared is copied.layers[i + 1].shared
            assert copied.layers[i].shared is not got.layers[i].shared
    index = torch.tensor([2, 0, 0])
    rows = [block.index_batch(index) for block in got.layers]
    assert rows[0].shared is rows[1].shared and rows[2].shared is rows[3].shared is not rows[0].shared
    assert all(torch.equal(a.keys[index], b.keys) for a, b in zip(got.layers, rows))
    # no stale copy for another index
    again = got.layers[0].index_batch(torch.tensor([1]))
    assert torch.equal(again.values, got.layers[0].values[1:2])


def test_a_block_acts_like_one_with_slots_of_its_own():
    block = compact(model_of(), tiny_ids(2, 30), "minicache", ratio=2).layers[2]
    plain = block.plain()
    assert type(plain) is CompactBlock and plain.plain() is plain
    for name in ("batch_size", "num_kv_heads", "head_dim", "num_slots", "beta", "offsets"):
        assert getattr(block, name) == getattr(plain, name)
    assert torch.equal(block.slot_counts, plain.slot_counts)
    for row, other in zip(block.heads(), plain.heads()):
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(row, other))
    both = CompactBlock.cat([block, plain])
    assert torch.equal(both.values, torch.cat([plain.values, plain.values], 2))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("ratio", [1, 3])
def test_generation_is_that_of_slots_restored_beforehand(family, ratio):
    model = patch_model(model_of(8, family=family))
    cache = model.compact(tiny_ids(1, 60), method="minicache", ratio=ratio, start=0.3)
    assert sum(isinstance(b, PairedBlock) for b in cache.layers) >= 2
    eager = replace(cache, layers=tuple(b.plain() if isinstance(b, CompactBlock) else b for b in cache.layers))
    assert eager.nbytes > cache.nbytes
    questions = tiny_ids(3, 7, seed=5)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for more in ({}, {"num_beams": 2}):
        a, b = (model.generate(questions, past_key_values=c, **kwargs, **more) for c in (cache, eager))
        assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), rtol=1e-9, atol=1e-9)


def test_generation_is_that_of_the_plain_model_on_the_merged_cache():
    model, ids, question = model_of(4), tiny_ids(2, 40), tiny_ids(2, 6, seed=7)
    past = DynamicCache()
    full = compact(model, ids, "full")
    pairs = [(block.keys, block.values) for block in full.layers]
    pairs[2:] = merged_by_hand(*pairs[2:], 0.05, 0.6)
    for i, (keys, values) in enumerate(pairs):
        past.update(keys, values, i)
    with torch.no_grad():
        want = model(question, past_key_values=past).logits
        other = model(question, past_key_values=DynamicCache()).logits
        cache = compact(model, ids, "minicache", ratio=1)
        got = patch_model(model)(question, past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(got, other, rtol=1e-2)


def test_rows_of_a_batch_with_beams():
    model = patch_model(model_of(4))
    ids, question = tiny_ids(2, 30), tiny_ids(2, 5, seed=3)
    cache = model.compact(ids, method="minicache", ratio=2)
    out = model.generate(question, past_key_values=cache, max_new_tokens=6, do_sample=False, num_beams=3)
    for row in range(2):
        alone = model.compact(ids[row : row + 1], method="minicache", ratio=2)
        one = model.generate(
            question[row : row + 1], past_key_values=alone, max_new_tokens=6, do_sample=False, num_beams=3
        )
        assert torch.equal(out[row], one[0])


@pytest.mark.parametrize("scorer", ["snapkv", "uniform", "finch", "pyramidkv"])
def test_the_lower_layer_selects_for_both(scorer):
    method, notes, blocks, kept = get_method("minicache", scorer=scorer, start=0.0), {}, [], []
    options = {"rerotate": False} if scorer == "finch" else {}
    for index in range(2):
        layer = make_layer(60)
        layer = LayerInput(**{**vars(layer), "layer_idx": index, "num_layers": 2, "notes": notes})
        blocks.append(method.compact_layer(layer, 20))
        match = (layer.keys[:, :, None] == blocks[-1].keys[:, :, :, None]).all(-1)
        kept.append(match.int().argmax(-1))
        if index == 0:
            assert torch.equal(blocks[0].keys, get_method(scorer, **options).compact_layer(layer, 20).keys)
    assert torch.equal(*kept)
    assert all(isinstance(block, PairedBlock) for block in finished_blocks(method, blocks))


def test_equal_bytes_give_it_more_slots():
    model, ids = model_of(6, torch.float32), tiny_ids(1, 150)
    (full,) = read(model, ids, [(get_method("full"), 1)])
    method = get_method("minicache", start=0.0)
    wanted = [("mini", method, r) for r in (1.2, 3.0, 8.0)] + [("snapkv", get_method("snapkv"), 8.0)]
    equal = EqualBytes()
    for _ in range(2):  # the second time it knows what a slot costs
        made = equal.read(model, ids, full.cache, wanted)
        for (_, _, ratio), result in zip(wanted, made):
            assert result.error is None and result.cache.nbytes <= byte_budget(full.cache, ratio)
        assert made[0].cache.num_slots == 150, "at this ratio nothing need be dropped"
        for result, ratio in zip(made[1:3], (3.0, 8.0)):
            assert byte_budget(full.cache, ratio) - result.cache.nbytes < 6 * 2 * 2 * DIM * 2 * 4
        assert made[2].cache.num_slots > 1.3 * made[3].cache.num_slots
        for result in made[:3]:
            before = sum(b.plain().nbytes for b in result.cache.layers)
            assert result.peak_bytes >= before + result.cache.nbytes


def test_one_reading_gives_the_cache_of_a_separate_run():
    model, ids = model_of(5), tiny_ids(1, 70)
    wanted = [(get_method("minicache", start=0.2), slots) for slots in (12, 30)] + [(get_method("h2o"), 12)]
    for (method, slots), result in zip(wanted, read(model, ids, wanted)):
        alone = compact(model, ids, method, slots=slots)
        for one, other in zip(result.cache.layers, alone.layers):
            torch.testing.assert_close(one.keys, other.keys, rtol=1e-9, atol=1e-9)


def test_composed_caches_have_slots_of_their_own():
    model = patch_model(model_of(4))
    parts = [model.compact(tiny_ids(1, 30, seed=s), method="minicache", ratio=2) for s in (1, 2)]
    both = CompactCache.compose(parts)
    assert all(type(block) is CompactBlock for block in both.layers)
    eager = [replace(c, layers=tuple(b.plain() for b in c.layers)) for c in parts]
    want = CompactCache.compose(eager)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(both.layers, want.layers))


def test_errors():
    model = model_of(4)
    with pytest.raises(ValueError, match="of 2 layers that can be compacted, 0.5 leaves fewer than two"):
        compact(model_of(2), tiny_ids(1, 30), "minicache", ratio=2)
    with pytest.raises(
        ValueError, match="compact_over cannot be used with method 'minicache', which lets layers share"
    ):
        patch_model(model, "minicache", compact_over=20)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :7] = 0
    with pytest.raises(ValueError, match="'minicache' needs rows of equal length"):
        compact(model, tiny_ids(2, 30), "minicache", attention_mask=mask, ratio=2)
    for options, error in (
        ({"start": 1.5}, "start must be finite and in"),
        ({"weight": -0.1}, "weight must be finite and in"),
        ({"retain": 2}, "retain must be finite and in"),
        ({"scorer": "adakv"}, "scorer must be one of"),
        ({"scorer": "minicache"}, "scorer must be one of"),
    ):
        with pytest.raises(ValueError, match=error):
            get_method("minicache", **options)
    with pytest.raises(TypeError, match="options must be a dict"):
        get_method("minicache", options=3)
    with pytest.raises(ValueError, match="second must be one of"):
        get_method("compose", second="minicache")
    norms = torch.ones(1, 2, 5)
    shared = SharedSlots(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4))
    with pytest.raises(ValueError, match="key_norms must be"):
        PairedBlock(shared, torch.ones(1, 2, 7), torch.ones(1, 2, 7), False)
    with pytest.raises(ValueError, match="value_norms"):
        PairedBlock(shared, norms, norms[:, :, :4], False)
    with pytest.raises(TypeError, match="key_norms"):
        PairedBlock(shared, norms.double(), norms.double(), False)
    with pytest.raises(TypeError, match="shared must be SharedSlots"):
        PairedBlock(None, norms, norms, True)


def test_what_finish_returns_is_checked():
    method = get_method("minicache")
    blocks = [CompactBlock(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))] * 2
    for answer, kind, error in (
        (blocks[:1], ValueError, "must return 2 blocks, got 1"),
        ([blocks[0], "no"], TypeError, "must return CompactBlocks, got str for layer 1"),
        ([blocks[0], blocks[0].to(dtype=torch.float64)], ValueError, "for layer 1, got"),
    ):
        method.finish = lambda given, answer=answer: answer
        with pytest.raises(kind, match=error):
            finished_blocks(method, blocks)
