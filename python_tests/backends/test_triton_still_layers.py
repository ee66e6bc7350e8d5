# SPDX-License-Identifier: Apache-2.0
"""All layers of STILL through the Triton kernels: whole layers and gradients, against the definition."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_cases import DEVICES, Counted
from triton_still_cases import check_forward, check_gradients, make_inputs

pytest.importorskip("triton")
from kvcompact_kernels.backends.triton import runtime
from kvcompact_kernels.backends.triton.kernels import attention_forward
from kvcompact_kernels.backends.triton.kernels import still_cross_attention as kernels
from kvcompact_kernels.ops import still_compaction, still_compaction_chunked, still_cross_attention
from kvcompact_kernels.reference import still_compaction as reference
from kvcompact_kernels.rope import Rope
from kvcompact_kernels.still_config import StillConfig, init_still_parameters
from kvcompact_kernels.testing.budget import assert_within_budget
from kvcompact_kernels.testing.draws import draws

pytestmark = pytest.mark.parametrize("device", DEVICES)
TABLES = ("cos", "sin", "int_cos", "int_sin")


def make(device, count=3, tokens=34, **options):
    config = StillConfig(slots=5, head_dim=32, **{"num_blocks": 1, **options})
    params = [init_still_parameters(config, device=device) for _ in range(count)]
    params = [{name: x + 0.05 * torch.randn_like(x) for name, x in p.items()} for p in params]
    keys, values = ([torch.randn(1, 2, tokens, 32, device=device) for _ in range(count)] for _ in "kv")
    return keys, values, params, config, Rope(Rope.default(32).inv_freq.to(device))


def check(got, layers, config, rope, chunk=None):
    """Blocks of layers against the definition, chunk by chunk."""
    keys, values, params = layers
    tokens, device = keys[0].shape[2], keys[0].device
    for i, block in enumerate(got):
        wanted = {}
        for name, dtype in (("naive", torch.float32), ("truth", torch.float64)):
            weights, parts = {n: p.to(dtype) for n, p in params[i].items()}, []
            for start in range(0, tokens, chunk or tokens):
                end = start + (chunk or tokens)
                piece, positions = slice(start, end), torch.arange(start, end)
                cache = (x[i][:, :, piece].to(dtype) for x in (keys, values))
                parts.append(reference.still_compaction(*cache, weights, config, rope, positions.to(device)))
            wanted[name] = [torch.cat(x, 2) for x in zip(*parts)]
        for name, x, y, z in zip(("keys", "values", "beta"), block, wanted["naive"], wanted["truth"]):
            assert_within_budget(x, y, z, name=name)


@pytest.mark.parametrize("chunk", [None, 17])
@pytest.mark.parametrize("options", [{}, {"sink": 1, "self_attention": False}])
@draws(3)
def test_layers_against_the_definition(device, chunk, options, monkeypatch):
    keys, values, params, config, rope = make(device, **options)
    launches = []
    for name in ("project_keys", "attend"):
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), launches))
    if chunk is None:
        got = still_compaction(keys, values, params, config, rope, backend="triton")
    else:
        got = still_compaction_chunked(keys, values, params, config, rope, chunk, backend="triton")
    assert len(launches) == 2  # one block, one group: a projection and an attention for all layers and chunks
    check(got, (keys, values, params), config, rope, chunk)


@pytest.mark.parametrize("count", [1, 3])
@draws(3)
def test_averages_take_memory_of_their_own_in_the_first_block_only(device, count, monkeypatch):
    """Its queries are one table for all heads; those of the next blocks make room."""
    keys, values, params, config, rope = make(device, count, num_blocks=2)
    sizes, real = [], torch.Tensor.new_empty

    def recorded(self, *shape, **kwargs):
        sizes.append(shape)
        return real(self, *shape, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    got = still_compaction(keys, values, params, config, rope, backend="triton")
    assert sizes.count((count, 1, 2, 5, 64)) == 1
    check(got, (keys, values, params), config, rope)


class NoLaunch:
    def __getitem__(self, grid):
        return lambda *args, **options: None


class Storages(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they are alive."""

    def __init__(self, known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.alive and storage.data_ptr() not in self.known:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_temporary_memory_of_all_layers(device, monkeypatch):
    """At the shapes of Qwen3-4B, 8k to 1k, on a device of 132 multiprocessors: at most a twentieth of the keys and values."""
    if device != "cpu":
        pytest.skip("counted without launches; test_layers_on_gpu.py measures it")
    for module in (kernels, attention_forward):
        for name in ("project_keys", "attend", "merge", "attention_forward"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, NoLaunch())
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(runtime, "arch_name", lambda device: "sm90")
    monkeypatch.setattr(reference, "linear", lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], weight.shape[-2]))
    config = StillConfig(slots=1024, head_dim=128)
    params = {name: x.bfloat16() for name, x in init_still_parameters(config).items()}
    keys = torch.empty(1, 8, 8192, 128, dtype=torch.bfloat16)
    counter = Storages([keys, *params.values()])
    with counter, torch.no_grad():
        blocks = still_compaction([keys] * 36, [keys] * 36, [params] * 36, config, Rope.default(128), backend="triton")
    slots = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for block in blocks for x in block}
    assert sum(slots.values()) == 36 * 8 * 1024 * (2 * 128 * 2 + 4)
    share = (counter.peak - sum(slots.values())) / (36 * 2 * keys.nbytes)
    assert 0.04 < share <= 0.05, share  # less would be no count of this


@pytest.mark.parametrize("vectors", [True, False])
@draws(3)
def test_gradients_of_layers(device, vectors, monkeypatch):
    """One forward for all layers; in the backward each layer has its own, whichever backend takes its device."""
    sizes = {"kv_heads": 2, "tokens": 35, "head_dim": 32, "dtype": torch.float32, "poison": False}
    layers = [list(make_inputs(device, bias=vectors, norm=vectors, **sizes)) for _ in range(3)]
    for layer in layers:
        layer[6:] = layers[0][6:]
        for x in layer[:6]:
            if x is not None:
                x.requires_grad_()
    layers[1][1].requires_grad_(False)
    launches = []
    monkeypatch.setattr(kernels, "attend", Counted(kernels.attend, launches))
    for which in (layers, layers[:1]):
        lists = [None if x[0] is None else list(x) for x in list(zip(*which))[:6]]
        pooled, lse = still_cross_attention(
            *lists, **dict(zip(TABLES, layers[0][6:10])), return_lse=True, backend="triton"
        )
        grads = [(torch.randn_like(p), torch.randn_like(s)) for p, s in zip(pooled, lse)]
        sum((p * a).sum() + (s * b).sum() for p, s, (a, b) in zip(pooled, lse, grads)).backward()
        for layer, p, s, (a, b) in zip(which, pooled, lse, grads):
            args = [x.detach() if isinstance(x, torch.Tensor) else x for x in layer]
            check_forward((p.detach(), s.detach()), args)
            found = [None if x is None else x.grad for x in layer[:6]]
            assert (found[1] is None) == (not layer[1].requires_grad)
            if found[1] is not None:
                check_gradients(found, args, a, b)
            for x in layer[:6]:
                if x is not None:
                    x.grad = None
        if which is layers:
            assert len(launches) == 1
