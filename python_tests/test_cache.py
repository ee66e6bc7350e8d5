# SPDX-License-Identifier: Apache-2.0
"""Blocks, caches and their file format, without any model."""

import json
import os
import struct

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompact_kernels._checks import BadFileError
from kvcompact_kernels.cache import FORMAT, CompactBlock, CompactCache, WindowBlock, save_safetensors
from kvcompact_kernels.rope import Rope


def random_heads(batch=2, heads=3, counts=((4, 4, 4), (4, 4, 4)), dim=6, dtype=torch.float32, biased=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        [
            (
                torch.randn(counts[b][h], dim, generator=g).to(dtype),
                torch.randn(counts[b][h], dim, generator=g).to(dtype),
                torch.randn(counts[b][h], generator=g).to(wide) if biased else None,
            )
            for h in range(heads)
        ]
        for b in range(batch)
    ]


RAGGED = ((4, 1, 7), (2, 5, 3))


def same_heads(a, b):
    return all(
        torch.equal(x, y) if x is not None else y is None
        for row_a, row_b in zip(a, b, strict=True)
        for head_a, head_b in zip(row_a, row_b, strict=True)
        for x, y in zip(head_a, head_b, strict=True)
    )


def make_cache(batch=1, ragged=False, length=20, seed=0, fingerprint=None, lengths=None, dtype=torch.float32):
    counts = RAGGED[:batch] if ragged else ((4, 4, 4),) * batch
    layers = (
        CompactBlock.pack(random_heads(batch, counts=counts, seed=seed, dtype=dtype)),
        WindowBlock(*torch.randn(2, batch, 3, 5, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)),
        CompactBlock.pack(random_heads(batch, seed=seed + 1, biased=False, dtype=dtype)),
    )
    ropes = {"full": Rope.default(6), "sliding": Rope(Rope.default(6, 100.0).inv_freq, 1.5, "yarn")}
    return CompactCache(
        layers, length, fingerprint or {"family": "x", "layers": [1, 2]}, ropes, lengths, "m", {"ratio": 2.0}
    )


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("counts", [((4, 4, 4), (4, 4, 4)), RAGGED], ids=["equal", "ragged"])
def test_pack_and_heads_are_inverse(counts, biased):
    heads = random_heads(counts=counts, biased=biased)
    block = CompactBlock.pack(heads)
    assert same_heads(block.heads(), heads)
    assert (block.offsets is None) == (counts is not RAGGED)
    assert block.slot_counts.tolist() == [list(row) for row in counts]
    assert (block.batch_size, block.num_kv_heads, block.head_dim) == (2, 3, 6)
    assert block.num_slots == max(max(row) for row in counts)
    slots = sum(sum(row) for row in counts)
    wanted = slots * 6 * 2 * 4 + (slots * 4 if biased else 0) + (7 * 8 if counts is RAGGED else 0)
    assert block.nbytes == wanted


def test_a_head_may_be_empty():
    heads = random_heads(counts=((0, 3, 2), (1, 0, 0)))
    block = CompactBlock.pack(heads)
    assert same_heads(block.heads(), heads) and block.slot_counts.tolist() == [[0, 3, 2], [1, 0, 0]]


@pytest.mark.parametrize("counts", [((4, 4, 4), (4, 4, 4)), RAGGED], ids=["equal", "ragged"])
def test_index_batch(counts):
    heads = random_heads(counts=counts)
    chosen = CompactBlock.pack(heads).index_batch(torch.tensor([1, 0, 1, 1]))
    assert same_heads(chosen.heads(), [heads[1], heads[0], heads[1], heads[1]])


def test_gradients_of_repeated_rows_are_no_atomic_sums():
    """index_add is what a GPU sums in any order: a training run that is resumed would not end with the same bits."""
    called = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket)
            return func(*args, **kwargs or {})

    block = CompactBlock(*(torch.randn(2, 3, 4, 6, requires_grad=True) for _ in "kv"), torch.randn(2, 3, 4))
    rows = block.index_batch(torch.tensor([0, 1, 0, 0]))
    with Ops():
        (gradient,) = torch.autograd.grad(rows.keys.sum(), block.keys)
    assert gradient[:, 0, 0, 0].tolist() == [3, 1]
    assert torch.ops.aten.index_add_ not in called and torch.ops.aten.index_add not in called and called


@pytest.mark.parametrize("second", [((2, 2, 2), (2, 2, 2)), ((2, 2, 2),), RAGGED, (RAGGED[1],)], ids=str)
def test_cat_appends_slots(second):
    one, two = random_heads(), random_heads(len(second), counts=second, biased=False, seed=5)
    merged = CompactBlock.cat([CompactBlock.pack(one), CompactBlock.pack(two)])
    two = two * 2 if len(two) == 1 else two
    for b in range(2):
        for h in range(3):
            keys, values, beta = merged.heads()[b][h]
            assert torch.equal(keys, torch.cat([one[b][h][0], two[b][h][0]]))
            assert torch.equal(values, torch.cat([one[b][h][1], two[b][h][1]]))
            assert torch.equal(beta, torch.cat([one[b][h][2], torch.zeros(two[b][h][0].shape[0])]))


def test_cat_refuses_what_does_not_fit():
    block = CompactBlock.pack(random_heads())
    with pytest.raises(ValueError, match=r"blocks\[1\] must have batch size 1 or 3"):
        CompactBlock.cat([CompactBlock.pack(random_heads(3, counts=((4, 4, 4),) * 3)), block])
    with pytest.raises(ValueError, match=r"blocks\[1\] has 3 KV heads of dim 8"):
        CompactBlock.cat([block, CompactBlock.pack(random_heads(dim=8))])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"keys": torch.zeros(3, 4)}, ValueError, "keys must have 4 dimensions"),
        ({"values": torch.zeros(1, 2, 4, 5)}, ValueError, "values must have shape"),
        ({"values": torch.zeros(1, 2, 3, 5, dtype=torch.float16)}, TypeError, "values must be float32"),
        ({"beta": torch.zeros(1, 2, 4)}, ValueError, "beta must have shape"),
        ({"beta": torch.zeros(1, 2, 3, dtype=torch.float64)}, TypeError, "beta must be float32"),
        ({"beta": [0.0]}, TypeError, "beta must be a torch.Tensor"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_bad_rectangular_blocks(change, error, words):
    fine = {"keys": torch.zeros(1, 2, 3, 5), "values": torch.zeros(1, 2, 3, 5)}
    CompactBlock(**fine)
    with pytest.raises(error, match=words):
        CompactBlock(**{**fine, **change})


@pytest.mark.parametrize(
    "offsets", [[0, 2], [0, 1, 4], [0, 2, 3, 5], [1, 2, 5], [0, 3, 2, 4, 5], [0]], ids=lambda o: str(o)
)
def test_bad_offsets(offsets):
    packed = torch.zeros(5, 4)
    CompactBlock(packed, packed, None, torch.tensor([0, 2, 5]), 2)
    with pytest.raises(ValueError, match="offsets must"):
        CompactBlock(packed, packed, None, torch.tensor(offsets), 2)


def test_block_dtypes():
    block = CompactBlock.pack(random_heads())
    assert block.to(dtype=torch.bfloat16).beta.dtype == torch.float32
    assert block.to(dtype=torch.float64).beta.dtype == torch.float64
    assert block.to(dtype=torch.float64).to(dtype=torch.float32).beta.dtype == torch.float32


def test_cache_properties():
    cache = make_cache(batch=2, ragged=True, lengths=torch.tensor([20, 11]))
    assert cache.slots_per_layer == [7, 4] and cache.batch_size == 2
    assert cache.num_slots == round((4 + 1 + 7 + 2 + 5 + 3 + 6 * 4) / 12)
    assert cache.nbytes == sum(x.nbytes for b in cache.layers for x in b.tensors().values())
    window = 2 * 2 * 3 * 5 * 6 * 4
    assert cache.logical_nbytes == 2 * (2 * 31 * 3 * 6 * 4) + window
    assert "slots=4" in repr(cache) and "batch=2" in repr(cache)
    half = cache.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.layers[0].beta.dtype == torch.float32 and half.lengths is not None
    with pytest.raises(TypeError, match="floating"):
        cache.to(dtype=torch.int8)


def test_bad_caches():
    block = CompactBlock.pack(random_heads())
    with pytest.raises(ValueError, match="at least one block"):
        CompactCache((), 4, {})
    with pytest.raises(ValueError, match="logical_length must be >= 1"):
        CompactCache((block,), 0, {})
    with pytest.raises(TypeError, match="logical_length must be an int"):
        CompactCache((block,), 4.0, {})
    with pytest.raises(ValueError, match="one batch size"):
        CompactCache((block, CompactBlock.pack(random_heads(1))), 4, {})
    for lengths in ([1, 9], [0, 4]):
        with pytest.raises(ValueError, match=r"lengths must lie in \[1, 8\]"):
            CompactCache((block,), 8, {}, lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match="lengths must have shape"):
        CompactCache((block,), 8, {}, lengths=torch.tensor([3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_save_and_load(tmp_path, ragged, dtype):
    cache = make_cache(2, ragged, lengths=torch.tensor([20, 7]), dtype=dtype)
    path = tmp_path / "c.safetensors"
    cache.save(path)
    loaded = CompactCache.load(path)
    for a, b in zip(cache.layers, loaded.layers, strict=True):
        assert type(a) is type(b) and a.tensors().keys() == b.tensors().keys()
        assert all(torch.equal(x, b.tensors()[n]) for n, x in a.tensors().items())
    for name in ("logical_length", "fingerprint", "method", "info"):
        assert getattr(cache, name) == getattr(loaded, name)
    assert torch.equal(cache.lengths, loaded.lengths)
    for kind, rope in cache.ropes.items():
        other = loaded.ropes[kind]
        assert torch.equal(rope.inv_freq, other.inv_freq)
        assert (rope.attention_scaling, rope.rope_type) == (other.attention_scaling, other.rope_type)
    assert CompactCache.load(path, dtype=torch.float16).dtype == torch.float16


def test_views_are_saved_as_they_are(tmp_path):
    big = torch.randn(1, 2, 9, 4)
    block = CompactBlock(big[:, :, 2:5], big[:, :, 2:5])  # one storage, twice
    CompactCache((block,), 9, {}).save(tmp_path / "c")
    loaded = CompactCache.load(tmp_path / "c").layers[0]
    assert torch.equal(loaded.keys, block.keys) and os.path.getsize(tmp_path / "c") < 2000


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    make_cache().save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("kvcompact_kernels.cache.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        make_cache(seed=9).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.safetensors"]
    with pytest.raises(FileNotFoundError, match="the folder"):
        make_cache().save(tmp_path / "no" / "c")


def rewritten(data, change):
    """The file with its JSON header changed."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    inner = json.loads(header["__metadata__"][FORMAT])
    change(header, inner)
    header["__metadata__"][FORMAT] = json.dumps(inner)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda h, i: i.update(num_layers=9),
        lambda h, i: i.update(num_layers="two"),
        lambda h, i: i.update(num_kv_heads=[5, 5, 5]),
        lambda h, i: i.update(logical_length=-3),
        lambda h, i: i.update(logical_length=None),
        lambda h, i: i.pop("fingerprint"),
        lambda h, i: i.pop("ropes"),
        lambda h, i: i["ropes"].update(other={"attention_scaling": 1.0, "rope_type": "default"}),
        lambda h, i: i["ropes"]["full"].update(surprise=1),
        lambda h, i: h.update({"layers.0.kez": h.pop("layers.0.keys")}),
        lambda h, i: h["layers.0.keys"].update(shape=[1, 1]),
    ],
)
def test_tampered_headers(tmp_path, change):
    make_cache(ragged=True).save(tmp_path / "c")
    bad = tmp_path / "bad"
    bad.write_bytes(rewritten((tmp_path / "c").read_bytes(), change))
    with pytest.raises(ValueError, match="bad"):
        CompactCache.load(bad)


def test_what_can_be_written_and_read_is_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        make_cache().save(tmp_path)
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        CompactCache.load(tmp_path)
    (tmp_path / "text").write_text("no cache")
    with pytest.raises(BadFileError, match="truncated or damaged"):
        CompactCache.load(tmp_path / "text")


def test_to_takes_what_a_tensor_takes():
    cache = make_cache()
    for changed in (cache.to(torch.bfloat16), cache.to(dtype=torch.bfloat16), cache.to("cpu", torch.bfloat16)):
        assert changed.dtype == torch.bfloat16 and changed.device == cache.device
    for wrong in ("bfloat16", torch.int8):
        with pytest.raises(TypeError, match="dtype must be a floating torch.dtype, got"):
            cache.to(dtype=wrong)


def test_versions_and_formats(tmp_path):
    make_cache().save(tmp_path / "c")
    data = (tmp_path / "c").read_bytes()
    for version in (3, "1", None):
        (tmp_path / "new").write_bytes(rewritten(data, lambda h, i, v=version: i.update(version=v)))
        with pytest.raises(ValueError, match="format version"):
            CompactCache.load(tmp_path / "new")
    save_safetensors(tmp_path / "other", {"x": torch.zeros(2)}, {"something": "{}"})
    with pytest.raises(ValueError, match="is not a kvcompact-cache file"):
        CompactCache.load(tmp_path / "other")


def test_compose_moves_the_later_caches():
    one, two, three = make_cache(length=20), make_cache(length=31, seed=3), make_cache(length=5, seed=6)
    composed = CompactCache.compose([one, two, three])
    assert composed.logical_length == 56 and composed.method == "m" and len(composed.info["composed"]) == 3
    rope = one.ropes["full"]
    wanted = torch.cat(
        [one.layers[0].keys, rope.shift(two.layers[0].keys, 20), rope.shift(three.layers[0].keys, 51)], 2
    )
    assert torch.equal(composed.layers[0].keys, wanted)
    assert torch.equal(composed.layers[0].beta, torch.cat([c.layers[0].beta for c in (one, two, three)], 2))
    assert torch.equal(composed.layers[0].values, torch.cat([c.layers[0].values for c in (one, two, three)], 2))
    sliding = one.ropes["sliding"]
    assert torch.equal(composed.layers[1].keys, sliding.shift(three.layers[1].keys, 51))  # the newest window
    apart = CompactCache.compose([one, two], reposition=False)
    assert apart.logical_length == 31
    assert torch.equal(apart.layers[0].keys, torch.cat([one.layers[0].keys, two.layers[0].keys], 2))


def test_compose_ragged_and_batches():
    one, two = make_cache(1), make_cache(2, ragged=True, seed=4)
    composed = CompactCache.compose([one, two])
    assert composed.batch_size == 2 and composed.layers[0].slot_counts.tolist() == [[8, 5, 11], [6, 9, 7]]
    assert all(block.batch_size == 2 for block in composed.layers)


def test_compose_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one cache"):
        CompactCache.compose([])
    with pytest.raises(TypeError, match=r"caches\[1\] must be a CompactCache"):
        CompactCache.compose([make_cache(), "file"])
    with pytest.raises(TypeError, match="must be a list of CompactCaches, got one"):
        CompactCache.compose(make_cache())
    with pytest.raises(ValueError, match=r"caches\[1\] is of another model.*family"):
        CompactCache.compose([make_cache(), make_cache(fingerprint={"family": "y", "layers": [1, 2]})])
    with pytest.raises(ValueError, match="padded"):
        CompactCache.compose([make_cache(2, lengths=torch.tensor([20, 3]))] * 2)
    ropeless = make_cache()
    ropeless = CompactCache(ropeless.layers, 20, ropeless.fingerprint)
    with pytest.raises(ValueError, match="without its rotary embedding"):
        CompactCache.compose([ropeless, ropeless])


def test_one_cache_composes_to_itself():
    cache = make_cache()
    composed = CompactCache.compose([cache])
    assert composed.logical_length == 20 and torch.equal(composed.layers[0].keys, cache.layers[0].keys)
