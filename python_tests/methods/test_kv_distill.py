# SPDX-License-Identifier: Apache-2.0
"""Scorer and adapter of KV-Distill as networks and a file, and the method that uses them."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from test_token_selector import DIM, HEADS, LAYERS, make_layer, make_selector, make_spec
from tiny_models import tiny_ids, tiny_model

from kvcompact_kernels import compact, patch_model
from kvcompact_kernels.kv_distiller import DistillerConfig, KVDistiller
from kvcompact_kernels.methods import get_method
from kvcompact_kernels.methods.attention_matching import own_attention
from kvcompact_kernels.patch.families import model_spec
from kvcompact_kernels.reference.selection import gather_tokens, top_tokens
from kvcompact_kernels.token_selector import token_features


def make_distiller(spec=None, scorer=0.5, adapter=0.5, **config):
    """With parameters away from their start: ``scorer`` for the choice, ``adapter`` for what is changed."""
    spec = spec or make_spec()
    sizes = {"hidden": 12, "kernel": 3, "rank": 2, **config}
    generator = torch.Generator().manual_seed(1)
    made = KVDistiller(
        DistillerConfig(spec.head_dim, spec.num_kv_heads, **sizes),
        spec.layer_kinds.count("full"), spec.fingerprint, {"steps": 3}, generator,
    )  # fmt: skip
    with torch.no_grad():
        for layer in made.layers:
            for name, p in layer.items():
                by = (
                    scorer if name in ("score_weight", "attention_weight") else adapter if name.endswith("_up") else 0.1
                )
                p.add_(by * torch.randn(p.shape, generator=generator).abs())
    return made


def block_of(distiller, layer, slots, **more):
    return distiller(
        layer.layer_idx, layer.keys, layer.values, layer.rope, layer.positions,
        attention=own_attention(layer), slots=slots, **more,
    )  # fmt: skip


def scores_of(distiller, layer):
    free = layer.rope.unrotate(layer.keys, layer.positions)
    return distiller.scores(layer.layer_idx, free, layer.values, own_attention(layer))


@pytest.fixture
def weights(tmp_path):
    make_distiller().save(tmp_path / "d.safetensors")
    return str(tmp_path / "d.safetensors")


def test_own_attention_is_what_the_contexts_queries_see_from_behind_it():
    layer = make_layer(30, start=7)
    queries = layer.rope.rotate(layer.rope.unrotate(layer.queries, layer.positions), torch.full((30,), 37))
    for b in range(2):
        for head in range(HEADS):
            seen = queries[b, 2 * head : 2 * head + 2].reshape(-1, DIM) @ layer.keys[b, head].T * layer.scale
            wanted = seen.double().softmax(-1).square().mean(0).sqrt()
            torch.testing.assert_close(own_attention(layer)[b, head].double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("start", [0, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_an_adapter_it_is_plain_selection_of_what_the_scorer_ranks_first(start, dtype):
    distiller = make_distiller(adapter=0.0)
    layer = make_layer(start=start, dtype=dtype)
    wanted = top_tokens(scores_of(distiller, layer), 11, first=4 if start == 0 else 0)
    for made in (block_of(distiller, layer, 11), block_of(distiller.requires_grad_(False), layer, 11)):
        assert torch.equal(made.keys, gather_tokens(layer.keys, wanted)) and made.keys.dtype == dtype
        assert torch.equal(made.values, gather_tokens(layer.values, wanted))
    assert made.beta is None


def test_the_start_of_a_training_keeps_what_the_context_attends_to():
    layer = make_layer()
    start = make_distiller(scorer=0.0, adapter=0.0)
    with torch.no_grad():
        made = block_of(start, layer, 13)
    untrained = get_method("kv_distill", weights="identity").compact_layer(layer, 13)
    assert torch.equal(made.keys, untrained.keys) and torch.equal(made.values, untrained.values)
    assert untrained.beta is None
    best = own_attention(layer)[..., 4:].topk(9).indices.sort().values + 4
    assert torch.equal(untrained.keys[:, :, 4:], gather_tokens(layer.keys, best))


def test_the_adapter_changes_kept_tokens_by_a_low_rank_of_their_neighbourhood():
    distiller, layer = make_distiller(), make_layer(40, start=0)
    indices = top_tokens(scores_of(distiller, layer), 12, first=4)
    with torch.no_grad():
        block = block_of(distiller, layer, 12)
        p = {name: x.double() for name, x in distiller.layers[1].items()}
        free = layer.rope.unrotate(layer.keys, layer.positions)
        features = token_features(free, layer.values, own_attention(layer))[0].double()
        measured = (features - p["mean"]) / p["deviation"]
        low = measured @ p["down_weight"].T
        width = HEADS * DIM
        for b in range(2):
            for head in range(HEADS):
                for slot, token in enumerate(indices[b, head].tolist()):
                    near = [low[b, i] if 0 <= i < 40 else 0.0 for i in (token - 1, token, token + 1)]
                    mixed = sum(p["near_weight"][:, i] * x for i, x in enumerate(near))
                    units = slice(head * DIM, (head + 1) * DIM)
                    key, value = free[b, head, token].double(), layer.values[b, head, token].double()
                    if slot >= 4:
                        key = key + p["key_up"][head] @ mixed * p["deviation"][:width][units]
                        value = value + p["value_up"][head] @ mixed * p["deviation"][width : 2 * width][units]
                    key = layer.rope.rotate(key[None], torch.tensor([token]))[0]
                    torch.testing.assert_close(block.keys[b, head, slot].double(), key, rtol=1e-4, atol=1e-4)
                    torch.testing.assert_close(block.values[b, head, slot].double(), value, rtol=1e-4, atol=1e-4)
    # the sinks are the tokens themselves, and nothing else is
    same = (block.keys == gather_tokens(layer.keys, indices)).all(-1)
    assert same[:, :, :4].all() and not same[:, :, 4:].any()


def test_the_gate_gives_scores_the_gradient_of_their_attention():
    distiller, layer = make_distiller(adapter=0.0), make_layer(40)
    block = block_of(distiller, layer, 10)
    assert block.beta.abs().max() == 0 and block.beta.requires_grad
    (found,) = torch.autograd.grad((block.beta * torch.arange(10.0)).sum(), distiller.layers[1]["attention_weight"])
    indices = top_tokens(scores_of(distiller, layer), 10, first=4)
    logs = (own_attention(layer) + 1e-7).log().gather(2, indices)
    # the sinks are kept whatever their scores are
    wanted = (logs * torch.arange(10.0))[:, :, 4:].sum((0, 2))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_noise_lets_others_in_and_keeps_the_sinks():
    distiller, layer = make_distiller(adapter=0.0), make_layer(60)
    with torch.no_grad():
        plain = block_of(distiller, layer, 12)
        torch.manual_seed(0)
        noisy = [block_of(distiller, layer, 12, noise=2.0) for _ in range(2)]
        torch.manual_seed(0)
        again = block_of(distiller, layer, 12, noise=2.0)
    assert torch.equal(noisy[0].keys, again.keys)
    assert not torch.equal(noisy[0].keys, plain.keys) and not torch.equal(noisy[0].keys, noisy[1].keys)
    assert all(torch.equal(x.keys[:, :, :4], layer.keys[:, :, :4]) for x in noisy)
    same = (noisy[0].keys[:, :, :, None] == layer.keys[:, :, None]).all(-1)
    assert same.any(-1).all()


@pytest.mark.parametrize(
    "slots, start, dtype", [(5, 0, torch.float32), (59, 0, torch.bfloat16), (9, 30, torch.float64)]
)
def test_the_method_is_the_networks_of_its_file(weights, slots, start, dtype):
    layer = make_layer(start=start, dtype=dtype)
    method = get_method("kv_distill", weights=weights)
    method.prepare(make_spec())
    assert method.queries_needed == -1 and method.min_slots == 5
    block = method.compact_layer(layer, slots)
    with torch.no_grad():
        wanted = block_of(KVDistiller.load(weights), layer, slots)
    assert torch.equal(block.keys, wanted.keys) and torch.equal(block.values, wanted.values) and block.beta is None
    assert block.keys.dtype == dtype and block.keys.shape == (2, HEADS, slots, DIM)
    assert block.keys.untyped_storage().nbytes() == block.keys.numel() * block.keys.element_size()
    other = get_method("kv_distill", weights=weights, sinks=1)
    assert other.min_slots == 2
    if slots == 59:
        kept = other.compact_layer(layer, slots).keys
        assert torch.equal(kept[:, :, :1], layer.keys[:, :, :1]) and not torch.equal(
            kept[:, :, 1:4], layer.keys[:, :, 1:4]
        )


def test_all_tokens_stay_when_all_fit(weights):
    layer = make_layer(20)
    block = get_method("kv_distill", weights=weights).compact_layer(layer, 20)
    assert torch.equal(block.keys, layer.keys) and torch.equal(block.values, layer.values)
    with pytest.raises(ValueError, match=r"slots must be in \[5, 20\]"):
        get_method("kv_distill", weights=weights).compact_layer(layer, 4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_padding_changes_nothing(tmp_path, family):
    model = tiny_model(family, torch.float32)
    spec = model_spec(model)
    make_distiller(spec).save(tmp_path / "d.safetensors")
    patch_model(model, "kv_distill", weights=str(tmp_path / "d.safetensors"))
    ids = tiny_ids(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    together = model.compact(ids, attention_mask=mask, ratio=4)
    for row, tokens in ((0, 37), (1, 50)):
        alone = model.compact(ids[row : row + 1, 50 - tokens :], ratio=4)
        for a, b in zip(together.layers, alone.layers):
            if hasattr(b, "heads"):
                for (k, v, _), (k1, v1, _) in zip(a.heads()[row], b.heads()[0]):
                    assert k.shape[0] == math.ceil(tokens / 4)
                    torch.testing.assert_close(k, k1, rtol=1e-5, atol=1e-5)
                    torch.testing.assert_close(v, v1, rtol=1e-5, atol=1e-5)


def test_a_running_conversation_with_weights(tmp_path):
    model = tiny_model(dtype=torch.float32)
    make_distiller(model_spec(model), adapter=0.05).save(tmp_path / "d.safetensors")
    patch_model(model, "kv_distill", weights=str(tmp_path / "d.safetensors"), ratio=2, compact_over=24)
    out = model.generate(tiny_ids(1, 60), max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    session = out.past_key_values
    assert out.sequences.shape == (1, 90)
    assert all(layer.block.keys.isfinite().all() for layer in session.layers)


def test_without_weights_it_warns_once_per_model():
    model = patch_model(tiny_model(dtype=torch.float32), "kv_distill")
    with pytest.warns(UserWarning, match="untrained.*kvcompact train kv_distill"):
        model.compact(tiny_ids(1, 30), ratio=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.compact(tiny_ids(1, 30), ratio=3)
        compact(model, tiny_ids(1, 30), get_method("kv_distill", weights="identity"), ratio=3)


def test_weights_of_another_model_are_refused(weights):
    with pytest.raises(ValueError, match="trained for another model: weights is '0123', expected '4567'"):
        get_method("kv_distill", weights=weights).prepare(make_spec(weights="4567"))
    get_method("kv_distill", weights=weights, check_weights=False).prepare(make_spec(weights="4567"))
    with pytest.raises(ValueError, match="it has 3 layers, the model 2 to compact"):
        get_method("kv_distill", weights=weights).prepare(make_spec(LAYERS - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_brings_it_back(tmp_path, dtype):
    distiller = make_distiller(rank=3, sinks=2)
    distiller.save(tmp_path / "d.safetensors", dtype)
    again = KVDistiller.load(tmp_path / "d.safetensors", make_spec())
    assert again.config == distiller.config and again.info == {"steps": 3}
    for (name, a), (other, b) in zip(distiller.named_parameters(), again.named_parameters()):
        assert name == other and torch.equal(a.to(dtype).float(), b) and a.requires_grad == b.requires_grad


def test_bad_files_and_options(tmp_path, weights):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        get_method("kv_distill", weights=str(tmp_path / "nothing"))
    (tmp_path / "cut").write_bytes(Path(weights).read_bytes()[:-50])
    with pytest.raises(ValueError, match="truncated or damaged"):
        get_method("kv_distill", weights=str(tmp_path / "cut"))
    make_selector().save(tmp_path / "selector")
    with pytest.raises(ValueError, match="kvcompact-kv-distill"):
        get_method("kv_distill", weights=str(tmp_path / "selector"))
    with pytest.raises(TypeError, match="check_weights must be a bool"):
        get_method("kv_distill", check_weights=1)
    with pytest.raises(ValueError, match="sinks must be >= 0"):
        get_method("kv_distill", sinks=-1)
    with pytest.raises(ValueError, match="rank must be >= 1"):
        DistillerConfig(8, 2, rank=0)
    with pytest.raises(ValueError, match="second must be one of"):
        get_method("compose", second="kv_distill")
