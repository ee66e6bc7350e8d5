# SPDX-License-Identifier: Apache-2.0
import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_ids, tiny_model

from kvcompact_kernels import patch_model
from kvcompact_kernels.cache import CompactBlock, CompactCache, WindowBlock
from kvcompact_kernels.methods import LayerInput, get_method
from kvcompact_kernels.methods.cartridge import Cartridge
from kvcompact_kernels.ops.compact_attention import compact_attention
from kvcompact_kernels.rope import Rope

DIM = 8


def make_cache(slots=7, beta=False, window=True, batch=1, tokens=50, dtype=torch.float32):
    def block():
        bias = torch.randn(batch, 2, slots) if beta else None
        return CompactBlock(
            torch.randn(batch, 2, slots, DIM, dtype=dtype), torch.randn(batch, 2, slots, DIM, dtype=dtype), bias
        )

    sliding = WindowBlock(torch.randn(batch, 2, 5, DIM, dtype=dtype), torch.randn(batch, 2, 5, DIM, dtype=dtype))
    layers = (block(), sliding, block()) if window else (block(), block())
    rope = Rope.default(DIM)
    return CompactCache(
        layers, tokens, {"family": "llama"}, {"full": rope, "sliding": rope}, None, "cartridge", {"slots": 7}
    )


def assert_same_blocks(a, b):
    assert len(a.layers) == len(b.layers)
    for x, y in zip(a.layers, b.layers):
        assert type(x) is type(y) and x.tensors().keys() == y.tensors().keys()
        for name, tensor in x.tensors().items():
            assert torch.equal(tensor, y.tensors()[name]), name


def test_the_method_keeps_the_first_tokens():
    keys, values = torch.randn(2, 2, 30, DIM), torch.randn(2, 2, 30, DIM)
    layer = LayerInput(0, 1, keys, values, None, torch.arange(30), Rope.default(DIM), 1.0)
    block = get_method("cartridge").compact_layer(layer, 11)
    assert torch.equal(block.keys, keys[:, :, :11]) and torch.equal(block.values, values[:, :, :11])
    assert block.keys.untyped_storage().nbytes() == block.keys.numel() * 4
    keys[0, 0, 20, 0] = float("nan")
    with pytest.raises(ValueError, match="keys of layer 0 hold NaN"):
        get_method("cartridge").compact_layer(layer, 11)


@pytest.mark.parametrize("beta", [False, True])
def test_a_trained_one_stands_as_far_from_the_question_as_in_training(tmp_path, beta):
    model = patch_model(tiny_model("llama", torch.float64), "snapkv")
    ids, question = tiny_ids(1, 60), tiny_ids(1, 7, seed=4)
    cache = model.compact(ids[:, :20], method="full", ratio=1)
    cartridge = Cartridge.from_cache(cache, train_beta=beta, dtype=torch.float64)
    with torch.no_grad():
        for p in cartridge.parameters():
            p.add_(0.3 * torch.randn_like(p))
    path = tmp_path / "trained.kvc"
    cartridge.save(path)
    native = model(question, past_key_values=CompactCache.load(path)).logits
    moved = model.compact(ids, method="cartridge", slots=23, file=str(path))
    assert moved.logical_length == 60 and moved.slots_per_layer == [20, 20]
    # the model's own rotation is in fp32, so positions leave a rounding error
    assert torch.allclose(model(question, past_key_values=moved).logits, native, atol=1e-4)
    unmoved = replace(CompactCache.load(path), logical_length=60)
    assert not torch.allclose(model(question, past_key_values=unmoved).logits, native, atol=1e-2)
    with pytest.raises(ValueError, match="needs at least 20 slots"):
        model.compact(ids, method="cartridge", slots=19, file=str(path))
    with pytest.raises(ValueError, match="holds one context, the batch has 2"):
        model.compact(ids.expand(2, -1), method="cartridge", slots=23, file=str(path))
    other = patch_model(tiny_model("llama", torch.float64, seed=5))
    with pytest.raises(ValueError, match="made by another model"):
        other.compact(ids, method="cartridge", slots=23, file=str(path))
    with pytest.raises(FileNotFoundError):
        get_method("cartridge", file=str(tmp_path / "none.kvc"))


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("train_beta", [False, True])
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_starts_as_its_cache(beta, train_beta, sinks):
    cache = make_cache(beta=beta)
    got = Cartridge.from_cache(cache, sinks=sinks, train_beta=train_beta).to_cache()
    if train_beta and not beta:
        assert all((b.beta == 0).all() for b in got.compact_layers)
    else:
        assert_same_blocks(got, cache)
    assert got.logical_length == 50 and got.fingerprint == cache.fingerprint and got.ropes.keys() == cache.ropes.keys()


def test_gradients_flow_to_all_but_the_sinks_and_windows():
    cartridge = Cartridge.from_cache(make_cache(), sinks=2, train_beta=True)
    assert len(list(cartridge.parameters())) == 6
    optimizer = torch.optim.SGD(cartridge.parameters(), lr=1.0)
    before = copy.deepcopy(cartridge).to_cache()
    loss = 0
    for block in cartridge.to_cache().compact_layers:
        query = torch.randn(1, 4, 3, DIM)
        loss = loss + compact_attention(query, block.keys, block.values, block.beta).square().sum()
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in cartridge.parameters())
    optimizer.step()
    after = cartridge.to_cache()
    assert torch.equal(after.layers[1].keys, before.layers[1].keys)
    for old, new in zip(before.compact_layers, after.compact_layers):
        for name in ("keys", "values", "beta"):
            x, y = getattr(old, name), getattr(new, name)
            assert torch.equal(x[:, :, :2], y[:, :, :2]), name
            assert (x[:, :, 2:] != y[:, :, 2:]).any(), name


def ragged_cache(*counts, beta=False):
    """A cache whose heads hold these numbers of slots, a list for each layer."""
    blocks = []
    for row in counts:
        heads = [(torch.randn(n, DIM), torch.randn(n, DIM), torch.randn(n) if beta else None) for n in row]
        blocks.append(CompactBlock.pack([heads]))
    rope = Rope.default(DIM)
    return CompactCache(tuple(blocks), 50, {"family": "llama"}, {"full": rope, "sliding": rope}, None, "still", {})


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("train_beta", [False, True])
@pytest.mark.parametrize("sinks", [0, 2])
def test_heads_with_unequal_numbers_of_slots(tmp_path, beta, train_beta, sinks):
    cache = ragged_cache([3, 9], [5, 4], [4, 4], beta=beta)
    cartridge = Cartridge.from_cache(cache, sinks=sinks, train_beta=train_beta)
    before = cartridge.to_cache()
    assert before.layers[0].offsets is not None and before.layers[2].offsets is None
    if beta or not train_beta:
        assert_same_blocks(before, cache)
    loss = 0
    for block in cartridge.to_cache().compact_layers:
        query = torch.randn(1, 4, 3, DIM)
        attended = compact_attention(query, block.keys, block.values, block.beta, offsets=block.offsets, num_kv_heads=2)
        loss = loss + attended.square().sum()
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in cartridge.parameters())
    with torch.no_grad():
        for p in cartridge.parameters():
            p -= p.grad
    after = cartridge.to_cache()
    for old, new in zip(before.compact_layers, after.compact_layers):
        for x, y in zip(old.heads()[0], new.heads()[0]):
            for name, a, b in zip(("keys", "values", "beta"), x, y):
                if a is None:
                    continue
                assert torch.equal(a[:sinks], b[:sinks]), name
                changed = (a[sinks:] != b[sinks:]).reshape(len(a) - sinks, -1).any(1)
                assert changed.all() if name != "beta" or train_beta else not changed.any(), name
    cartridge.save(tmp_path / "c.kvc")
    assert_same_blocks(Cartridge.load(tmp_path / "c.kvc").to_cache(), after)


def test_a_cartridge_does_not_touch_its_cache():
    cache = make_cache()
    kept = cache.layers[0].keys.clone()
    cartridge = Cartridge.from_cache(cache)
    with torch.no_grad():
        for p in cartridge.parameters():
            p.zero_()
    assert torch.equal(cache.layers[0].keys, kept)


def test_dtypes():
    cache = make_cache(dtype=torch.bfloat16, beta=True)
    cartridge = Cartridge.from_cache(cache, train_beta=True)
    assert all(p.dtype == torch.float32 for p in cartridge.parameters())
    back = cartridge.to_cache(dtype=torch.bfloat16)
    assert_same_blocks(back, cache)
    assert back.layers[0].keys.requires_grad and back.layers[0].beta.dtype == torch.float32


@pytest.mark.parametrize("train_beta", [False, True])
def test_save_and_load(tmp_path, train_beta):
    cartridge = Cartridge.from_cache(make_cache(), sinks=2, train_beta=train_beta, logical_length=7)
    with torch.no_grad():
        for p in cartridge.parameters():
            p.add_(torch.randn_like(p))
    path = tmp_path / "cartridge.safetensors"
    cartridge.save(path)
    again = Cartridge.load(path)
    assert (again.sinks, again.train_beta, again.logical_length) == (2, train_beta, 7)
    assert_same_blocks(again.to_cache(), cartridge.to_cache())
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in cartridge.parameters()]
    plain = CompactCache.load(path)
    assert_same_blocks(plain, cartridge.to_cache())
    assert not plain.layers[0].keys.requires_grad


def test_load_refuses_what_is_no_cartridge(tmp_path):
    make_cache().save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="no cartridge"):
        Cartridge.load(tmp_path / "cache.safetensors")
    with pytest.raises(FileNotFoundError):
        Cartridge.load(tmp_path / "none.safetensors")


def test_cartridges_compose_and_gradients_reach_each():
    parts = [Cartridge.from_cache(make_cache(slots, window=False), logical_length=slots) for slots in (5, 9)]
    for reposition, length in ((True, 14), (False, 9)):
        cache = CompactCache.compose([c.to_cache() for c in parts], reposition=reposition)
        assert cache.logical_length == length and cache.slots_per_layer == [14, 14]
        sum(b.keys.square().sum() + b.values.sum() for b in cache.layers).backward()
        for cartridge in parts:
            assert all(p.grad.abs().max() > 0 for p in cartridge.parameters())
            cartridge.zero_grad()


def test_bad_caches_and_options():
    with pytest.raises(TypeError, match="CompactCache"):
        Cartridge.from_cache("cache.safetensors")
    with pytest.raises(ValueError, match="batch size 2"):
        Cartridge.from_cache(make_cache(batch=2))
    with pytest.raises(ValueError, match="sinks must be less than the 7 slots of layer 0"):
        Cartridge.from_cache(make_cache(), sinks=7)
    with pytest.raises(ValueError, match="logical_length"):
        Cartridge.from_cache(make_cache(), logical_length=0)
    with pytest.raises(ValueError, match="sinks must be less than the 3 slots of layer 0, got 3"):
        Cartridge.from_cache(ragged_cache([3, 4]), sinks=3)
