# SPDX-License-Identifier: Apache-2.0
"""The token selector as a network and a file, and method "still" with one."""

import math
from dataclasses import replace

import pytest
import torch

from kvcompact_kernels.head_shares import HeadShares
from kvcompact_kernels.methods import LayerInput, get_method
from kvcompact_kernels.methods import still as still_module
from kvcompact_kernels.methods.attention_matching import fit_slots
from kvcompact_kernels.methods.still import packaged_selector
from kvcompact_kernels.model_spec import ModelSpec
from kvcompact_kernels.reference import matching
from kvcompact_kernels.reference.selection import top_tokens
from kvcompact_kernels.rope import Rope
from kvcompact_kernels.token_selector import SelectorConfig, TokenSelector, token_features

DIM, HEADS, LAYERS = 8, 2, 3


def make_spec(layers=LAYERS, **changes):
    fingerprint = {"family": "llama", "head_dim": DIM, "weights": "0123", **changes}
    rope = {"full": Rope.default(DIM)}
    return ModelSpec("llama", layers, 4, HEADS, DIM, ("full",) * layers, (0.3,) * layers, rope, None, fingerprint)


def make_selector(spec=None, disturb=0.3, **config):
    spec = spec or make_spec()
    selector = TokenSelector(
        SelectorConfig(DIM, HEADS, **{"hidden": 12, "kernel": 3, **config}),
        spec.layer_kinds.count("full"),
        spec.fingerprint,
        {"steps": 3},
        torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        for p in selector.parameters():
            p.add_(disturb * torch.rand_like(p))
    return selector


def make_layer(tokens=60, index=1, batch=2, start=0, dtype=torch.float32):
    keys, values = (torch.randn(batch, HEADS, tokens, DIM, dtype=dtype) for _ in range(2))
    queries = torch.randn(batch, 2 * HEADS, tokens, DIM, dtype=dtype)
    positions = torch.arange(start, start + tokens)
    return LayerInput(index, LAYERS, keys, values, queries, positions, Rope.default(DIM), DIM**-0.5)


def random_inputs(tokens=40, batch=2):
    keys, values = torch.randn(2, batch, HEADS, tokens, DIM)
    return keys, values, torch.rand(batch, HEADS, tokens)


def test_at_the_start_continuation_is_the_contexts_own_attention():
    selector = make_selector(disturb=0.0)
    keys, values, attention = random_inputs()
    continuation, recall = selector(0, *token_features(keys, values, attention))
    torch.testing.assert_close(continuation, (attention + 1e-7).log())
    torch.testing.assert_close(recall, 0.5 * (attention + 1e-7).log() - 3)


def test_features_hold_what_they_say():
    config = SelectorConfig(DIM, HEADS)
    keys, values, attention = random_inputs(11, 1)
    features, log_attention = token_features(keys, values, attention)
    assert features.shape == (1, 11, config.features) and features.dtype == torch.float32
    width = HEADS * DIM
    torch.testing.assert_close(features[0, 4, :width], keys[0, :, 4].reshape(-1))
    torch.testing.assert_close(features[0, 4, width : 2 * width], values[0, :, 4].reshape(-1))
    figures = features[0, 4, 2 * width : -2].view(HEADS, 3)
    torch.testing.assert_close(figures[:, 0], (keys[0, :, 4].norm(dim=-1) + 1e-6).log())
    torch.testing.assert_close(figures[:, 1], (values[0, :, 4].norm(dim=-1) + 1e-6).log())
    torch.testing.assert_close(figures[:, 2], log_attention[0, :, 4] + math.log(11))
    torch.testing.assert_close(features[0, 4, -2:], torch.tensor([7.0, 5.0]).log())


def test_a_token_is_judged_with_its_neighbours_and_no_others():
    selector = make_selector(kernel=5)
    keys, values, attention = random_inputs(30, 1)
    before = selector(2, *token_features(keys, values, attention))[1]
    values[:, :, 12] += 3.0
    moved = (selector(2, *token_features(keys, values, attention))[1] - before).abs().amax((0, 1)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("trust, weight", [(0.0, 1e-9), (1.0, 1e-9), (0.4, 2.0)])
def test_scores_mix_both_answers(trust, weight):
    selector = make_selector(trust=trust, recall_weight=weight)
    keys, values, attention = random_inputs(25)
    continuation, recall = (x.double() for x in selector(1, *token_features(keys, values, attention)))
    own = (attention.double() + 1e-7).log()
    own = own - own.logsumexp(-1, keepdim=True) + continuation.logsumexp(-1, keepdim=True)
    wanted = (((1 - trust) * own + trust * continuation).exp() + weight * recall.exp()).log()
    torch.testing.assert_close(selector.scores(1, keys, values, attention).double(), wanted, rtol=1e-5, atol=1e-5)
    wanted = (((1 - trust) * own + trust * continuation).exp() + 5 * recall.exp()).log()
    torch.testing.assert_close(selector.scores(1, keys, values, attention, 5).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_brings_it_back(tmp_path, dtype):
    selector = make_selector(trust=0.25)
    selector.save(tmp_path / "s.safetensors", dtype)
    again = TokenSelector.load(tmp_path / "s.safetensors")
    assert again.config == selector.config and again.info == {"steps": 3}
    assert again.fingerprint == selector.fingerprint
    for (name, a), (other, b) in zip(selector.named_parameters(), again.named_parameters()):
        assert name == other and torch.equal(a.to(dtype).float(), b)


def test_bad_files(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        TokenSelector.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        get_method("still", weights=str(path))
    selector = make_selector()
    selector.save(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="truncated or damaged"):
        get_method("still", weights=str(path))
    with torch.no_grad():
        selector.layers[1]["mid_bias"][0] = float("nan")
    selector.save(path)
    with pytest.raises(ValueError, match="NaN"):
        TokenSelector.load(path)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"kernel": 4}, ValueError, "kernel must be odd"),
        ({"hidden": 0}, ValueError, "hidden"),
        ({"trust": 1.5}, ValueError, r"trust must be in \[0, 1\]"),
        ({"recall_weight": 0.0}, ValueError, "recall_weight must be finite and above 0"),
        ({"recall_weight": "1"}, TypeError, "recall_weight must be a number"),
        ({"shares": ((1.0,),)}, ValueError, "shares must have a number for each of the 2 KV heads"),
        ({"shares": ((1.0, 0.0),)}, ValueError, "shares must be finite and above 0"),
        ({"shares": ((1.0, float("nan")),)}, ValueError, "shares must be finite and above 0"),
        ({"shares": ((1.0, 2.0),)}, ValueError, "shares must have a row for each of the 3 layers, got 1"),
    ],
)
def test_bad_config(fields, error, message):
    with pytest.raises(error, match=message):
        TokenSelector(SelectorConfig(DIM, HEADS, **fields), LAYERS, {})


@pytest.fixture
def weights(tmp_path):
    make_selector().save(tmp_path / "s.safetensors")
    return str(tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    "slots, start, dtype", [(9, 0, torch.float32), (59, 0, torch.bfloat16), (12, 30, torch.float32)]
)
def test_still_keeps_the_keys_of_the_best_tokens(weights, slots, start, dtype):
    layer = make_layer(start=start, dtype=dtype)
    method = get_method("still", weights=weights)
    method.prepare(make_spec())
    assert method.queries_needed == -1 and method.min_slots == 5
    block = method.compact_layer(layer, slots)
    assert block.keys.shape == block.values.shape == (2, HEADS, slots, DIM) and block.keys.dtype == dtype
    assert block.beta.shape == (2, HEADS, slots) and block.beta.dtype == torch.float32
    # each kept key is a token's own, in their order; the first four are kept where the context begins
    same = (block.keys[:, :, :, None] == layer.keys[:, :, None]).all(-1)
    assert same.any(-1).all()
    places = same.float().argmax(-1)
    assert (places.diff() > 0).all()
    if start == 0:
        assert (places[:, :, :4] == torch.arange(4)).all()


def test_still_follows_the_selectors_scores(weights, monkeypatch):
    layer = make_layer()
    wanted = torch.randn(2, HEADS, 60)
    seen = {}

    def scores(self, layer_idx, keys, values, attention, recall_weight):
        seen.update(layer_idx=layer_idx, keys=keys, attention=attention, recall_weight=recall_weight)
        return wanted

    monkeypatch.setattr(TokenSelector, "scores", scores)
    block = get_method("still", weights=weights, sinks=0, recall_weight=3).compact_layer(layer, 7)
    best = wanted.topk(7).indices.sort().values[..., None].expand(-1, -1, -1, DIM)
    assert torch.equal(block.keys, layer.keys.gather(2, best))
    assert seen["layer_idx"] == 1 and seen["recall_weight"] == 3.0
    torch.testing.assert_close(layer.rope.rotate(seen["keys"], layer.positions), layer.keys)
    # root mean square over queries and heads of a group, from the position behind the context
    queries = layer.rope.rotate(layer.rope.unrotate(layer.queries, layer.positions), torch.full((60,), 60))
    prob = (queries.view(2, HEADS, 2, 60, DIM) @ layer.keys[:, :, None].transpose(-1, -2) * layer.scale).softmax(-1)
    torch.testing.assert_close(seen["attention"], prob.square().mean((2, 3)).sqrt())


def test_chunks_are_selected_by_themselves(weights):
    layer = make_layer(60, batch=1)
    whole = get_method("still", weights=weights, chunk=20).compact_layer(layer, 21)
    assert whole.num_slots == 21
    selector = TokenSelector.load(weights)
    for start in (0, 20, 40):
        # the context's first four tokens, its attention sinks, stand before a later chunk; their slots belong to the first one
        before = 4 if start else 0
        index = torch.cat([torch.arange(before), torch.arange(start, start + 20)])
        keys, values, positions = layer.keys[:, :, index], layer.values[:, :, index], layer.positions[index]
        there = layer.positions[start : start + 20]
        queries = layer.rope.unrotate(layer.queries[:, :, start : start + 20], there)
        queries = layer.rope.rotate(queries, torch.full((20,), 60))  # from behind the whole context
        queries = matching.reference_queries(queries, HEADS)
        outputs, lse, attention = matching.full_attention(queries, keys, values, layer.scale)
        scores = selector.scores(1, layer.rope.unrotate(keys, positions), values, attention)
        indices = top_tokens(scores, 7 + before, first=4)
        part = replace(layer, keys=keys, values=values)
        block = fit_slots(part, queries, outputs, lse, indices, 1e-2, 2e-2, 7.0)
        at = 7 * start // 20
        for name in ("keys", "values", "beta"):
            torch.testing.assert_close(getattr(whole, name)[:, :, at : at + 7], getattr(block, name)[:, :, before:])
    with pytest.raises(ValueError, match="needs 5"):
        get_method("still", weights=weights, chunk=10).compact_layer(layer, 12)


def test_long_contexts_are_chunked_unless_chunks_get_few_slots(weights):
    method = get_method("still", weights=weights)
    assert method._chunks(1500, 750) == [1500]
    assert method._chunks(4096, 512) == [1024, 2048, 3072, 4096]
    assert method._chunks(4096, 60) == [2048, 4096]
    assert method._chunks(4096, 16) == [4096]
    assert get_method("still", weights=weights, chunk=1 << 20)._chunks(4096, 512) == [4096]
    layer = make_layer(2100, batch=1)
    default = method.compact_layer(layer, 64)
    chunked = get_method("still", weights=weights, chunk=1050).compact_layer(layer, 64)
    assert torch.equal(default.keys, chunked.keys) and torch.equal(default.beta, chunked.beta)
    once = get_method("still", weights=weights, chunk=2100).compact_layer(layer, 64)
    assert not torch.equal(default.keys, once.keys)


SHARES = ((1.0, 1.0), (3.0, 1.0), (0.2, 0.6))


@pytest.fixture
def shared(tmp_path):
    """A selector's file that says how slots are shared."""
    make_selector(shares=SHARES).save(tmp_path / "shares.safetensors")
    return str(tmp_path / "shares.safetensors")


def test_heads_get_their_shares_of_the_slots(shared, weights):
    method = get_method("still", weights=shared)
    budgets = method.budgets(10, 60, LAYERS)
    assert budgets == [8, 17, 5]  # of 30 by 2 : 4 : 0.8, and five at least
    assert method.budgets(50, 60, LAYERS) == [60, 60, 30]
    layer = make_layer(start=0)
    block = method.compact_layer(layer, 16)
    assert block.slot_counts.tolist() == [[24, 8]] * 2 and block.offsets is not None
    # each head has what it would have if all had so many
    equal = get_method("still", weights=shared, shares="equal")
    for head, count in enumerate((24, 8)):
        alone = equal.compact_layer(layer, count)
        for b in range(2):
            for got, wanted in zip(block.heads()[b][head], alone.heads()[b][head]):
                torch.testing.assert_close(got, wanted)
    assert equal.budgets(10, 60, LAYERS) == [10] * LAYERS
    # a file that says nothing gives all the same
    plain = get_method("still", weights=weights)
    assert plain.budgets(10, 60, LAYERS) == [10] * LAYERS and plain.compact_layer(layer, 16).offsets is None


def test_layers_get_their_shares_and_blocks_stay_rectangular(shared):
    method = get_method("still", weights=shared, shares="layers")
    assert method.budgets(10, 60, LAYERS) == [8, 17, 5]
    block = method.compact_layer(make_layer(), 16)
    assert block.offsets is None and block.num_slots == 16


def test_a_head_that_keeps_all_its_tokens_keeps_them_as_they_are(shared):
    layer = make_layer(40, batch=1)
    block = get_method("still", weights=shared).compact_layer(layer, 28)
    assert block.slot_counts.tolist() == [[40, 16]]
    keys, values, beta = block.heads()[0][0]
    assert torch.equal(keys, layer.keys[0, 0]) and torch.equal(values, layer.values[0, 0]) and not beta.any()


@pytest.mark.parametrize("tokens", [59, 60, 61])
@pytest.mark.parametrize("slots", [5, 17, 43])
def test_shares_hold_in_every_chunk(shared, tokens, slots):
    method, wanted = get_method("still", weights=shared, chunk=20), max(slots, 17)
    budgets = method.budgets(wanted, tokens, LAYERS)
    assert sum(budgets) == wanted * LAYERS and min(budgets) >= 15  # five for each of three chunks
    for index, budget in enumerate(budgets):  # the least, too, can be compacted
        block = method.compact_layer(make_layer(tokens, index), budget)
        assert (block.slot_counts.sum(1) == budget * HEADS).all() and int(block.slot_counts.min()) >= 5
    once = get_method("still", weights=shared, chunk=60).compact_layer(make_layer(tokens), slots)
    assert (once.slot_counts.sum(1) == slots * HEADS).all() and int(once.slot_counts.min()) >= 5


def test_a_file_of_shares_takes_the_place_of_the_selectors(shared, weights, tmp_path):
    layer, spec = make_layer(), make_spec()
    other = HeadShares([row[::-1] for row in SHARES], spec.fingerprint)
    other.save(tmp_path / "other.json")
    for file in (shared, weights):
        for given in (other, str(tmp_path / "other.json")):
            method = get_method("still", weights=file, shares=given)
            method.prepare(spec)
            assert method.budgets(10, 60, LAYERS) == [8, 17, 5]
            assert method.compact_layer(layer, 16).slot_counts.tolist() == [[8, 24]] * 2


def test_shares_of_another_model_or_without_a_selector_are_refused(shared, tmp_path):
    HeadShares(SHARES, make_spec(weights="4567").fingerprint).save(tmp_path / "other.json")
    with pytest.raises(ValueError, match="other.json was made for another model"):
        get_method("still", weights=shared, shares=str(tmp_path / "other.json")).prepare(make_spec())
    with pytest.raises(ValueError, match="shares must be 'heads' without a selector"):
        get_method("still", weights="identity", shares=str(tmp_path / "other.json")).prepare(make_spec())


def test_shares_are_refused_by_name(shared):
    with pytest.raises(ValueError, match="shares must be"):
        get_method("still", weights=shared, shares="rows")
    with pytest.raises(ValueError, match="unequal numbers of slots with a selector only"):
        get_method("still", weights="identity").with_shares(None)


def test_all_tokens_stay_when_all_fit(weights):
    layer = make_layer(20)
    block = get_method("still", weights=weights).compact_layer(layer, 20)
    assert torch.equal(block.keys, layer.keys) and torch.equal(block.values, layer.values)


def test_weights_of_another_model_are_refused(weights):
    with pytest.raises(ValueError, match="trained for another model: weights is '0123', expected '4567'"):
        get_method("still", weights=weights).prepare(make_spec(weights="4567"))
    get_method("still", weights=weights, check_weights=False).prepare(make_spec(weights="4567"))
    with pytest.raises(ValueError, match="it has 3 layers, the model 2 to compact"):
        get_method("still", weights=weights).prepare(make_spec(2))
    with pytest.raises(ValueError, match="config must be left out"):
        get_method("still", weights=weights, config={"num_blocks": 1})


def test_packaged_weights_are_found_by_the_models_shape(tmp_path, monkeypatch):
    make_selector(make_spec(head_dim=32)).save(tmp_path / "a.safetensors")
    mine = make_selector(trust=0.125)
    mine.save(tmp_path / "b.safetensors")
    monkeypatch.setattr(still_module, "WEIGHTS", tmp_path)
    found = packaged_selector(make_spec(weights="of a sibling"))
    assert found.config.trust == 0.125 and not any(p.requires_grad for p in found.parameters())
    assert packaged_selector(make_spec(family="qwen3")) is None
    method = get_method("still")
    method.prepare(make_spec())
    assert method.queries_needed == -1
    for other in (get_method("still", weights="identity"), get_method("still", config={"num_blocks": 1})):
        other.prepare(make_spec())
        assert other.queries_needed == 0 and other.compact_layer(make_layer(), 9).num_slots == 9
    with pytest.warns(UserWarning, match="untrained: train some with `kvcompact train selector`"):
        method.prepare(make_spec(family="qwen3"))  # another model, without weights: the identity start
    assert method.queries_needed == 0


def test_the_packaged_weights_are_whole_and_small():
    files = sorted(still_module.WEIGHTS.glob("*.safetensors"))
    assert [f.name for f in files] == ["smollm2-135m-selector.safetensors"]
    assert files[0].stat().st_size <= 16 << 20
    selector = TokenSelector.load(files[0])
    assert selector.info["finished"] and selector.info["trained_with"]
    spec = make_spec(len(selector.layers))
    spec.fingerprint.clear()
    spec.fingerprint.update({**selector.fingerprint, "weights": "of the full-precision original"})
    assert packaged_selector(spec).config == selector.config
    keys, values = torch.randn(2, 1, selector.config.num_kv_heads, 50, selector.config.head_dim)
    assert selector.scores(29, keys, values, torch.rand(1, selector.config.num_kv_heads, 50)).isfinite().all()
