# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of launches that serve many layers: real sizes, races, graphs, no waiting, memory that is freed."""

import pytest
import torch

from kvcompact_kernels.backends.triton import pack
from kvcompact_kernels.ops import pack_slots
from kvcompact_kernels.reference.pack import pack_slots as packed_by_definition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def caches(layers=36, tokens=2048, slots=256, dtype=torch.bfloat16):
    """Keys, values and kept tokens of layers that hold unequal numbers of slots."""
    keys, values = ([torch.randn(1, 8, tokens, 128, device="cuda").to(dtype) for _ in range(layers)] for _ in "kv")
    counts = [slots + 3 * i for i in range(layers)]
    kept = [torch.rand(1, 8, tokens, device="cuda").topk(n).indices.sort().values for n in counts]
    return keys, values, kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_layers_are_packed_in_one_launch(dtype):
    keys, values, kept = caches(dtype=dtype)
    wanted = [packed_by_definition(*layer) for layer in zip(keys, values, kept)]
    for _ in range(20):  # a race shows as a result that moves
        for pair, want in zip(zip(*pack_slots(keys, values, kept, backend="triton")), wanted):
            assert torch.equal(pair[0], want[0]) and torch.equal(pair[1], want[1])


def test_packing_waits_for_nothing_and_replays_in_a_graph():
    keys, values, kept = caches(layers=5)
    wanted = pack_slots(keys, values, kept)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack_slots(keys, values, kept)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    results = []
    for graph in graphs:  # two: their tables must not meet
        with torch.cuda.graph(graph):
            results.append(pack_slots(keys, values, kept))
    pack_slots(*caches(layers=4))  # other tables pass through the same host memory
    for graph, got in zip(graphs, results):
        for x in got[0] + got[1]:
            x.fill_(float("nan"))
        for x in keys + values:
            x.mul_(2)
        graph.replay()
        for x, y in zip(got[0] + got[1], wanted[0] + wanted[1]):
            y.mul_(2)
            assert torch.equal(x, y)


def test_release_frees_the_old_memory():
    keys, values, kept = caches(layers=8, tokens=8192, slots=1000)
    old = sum(x.nbytes for x in keys + values)
    before = torch.cuda.memory_allocated()
    packed = pack_slots(keys, values, kept, release=True)
    new = sum(x.nbytes for x in packed[0] + packed[1])
    assert abs(torch.cuda.memory_allocated() - (before - old + new)) < 1 << 20


def test_other_layers_compile_nothing():
    from kvcompact_kernels.backends.triton.kernels import pack as kernels

    def compiled():
        return sum(len(cache[0]) for cache in kernels.pack_slots.device_caches.values())

    pack_slots(*caches(layers=2, tokens=100, slots=7))
    before = compiled()
    for layers, tokens, slots in ((36, 2048, 256), (3, 333, 1), (16, 1000, 16)):
        pack_slots(*caches(layers, tokens, slots))
    assert compiled() == before


def test_the_single_layer_takes_no_table(monkeypatch):
    keys, values, kept = caches(layers=1)
    monkeypatch.setattr(pack.runtime, "device_table", None)
    for got, want in zip(pack_slots(keys, values, kept), packed_by_definition(keys[0], values[0], kept[0])):
        assert torch.equal(got[0], want)
