# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of launches that serve many layers: real sizes, races, graphs, no waiting, memory that is freed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from triton_still_cases import check_forward, make_inputs

from kvcompact_kernels.backends.triton import pack
from kvcompact_kernels.backends.triton import still_compaction as still
from kvcompact_kernels.ops import pack_slots, still_compaction, still_compaction_chunked
from kvcompact_kernels.reference import still_compaction as reference
from kvcompact_kernels.reference.pack import pack_slots as packed_by_definition
from kvcompact_kernels.rope import Rope
from kvcompact_kernels.still_config import StillConfig, init_still_parameters
from kvcompact_kernels.testing.budget import assert_within_budget
from kvcompact_kernels.testing.memory import requested_bytes

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
    before = requested_bytes()
    packed = pack_slots(keys, values, kept, release=True)
    new = sum(x.nbytes for x in packed[0] + packed[1])
    assert abs(requested_bytes() - (before - old + new)) < 1 << 20


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


def cross_layers(count, dtype, **sizes):
    layers = [make_inputs("cuda", dtype, poison=False, **sizes) for _ in range(count)]
    return [(*layer[:6], *layers[0][6:]) for layer in layers]


SHAPES = {
    "Qwen3-4B, 8k to 1k": (2, {"batch": 1, "kv_heads": 8, "tokens": 8192, "slots": 1024, "head_dim": 128}),
    "SmolLM2, 1k to 64": (30, {"batch": 1, "kv_heads": 3, "tokens": 1024, "slots": 64, "head_dim": 64}),
    "short chunks": (
        6,
        {"batch": 5, "kv_heads": 2, "tokens": 100, "slots": 13, "head_dim": 128, "batched_tables": True},
    ),
    "head dim 96": (3, {"batch": 2, "kv_heads": 2, "tokens": 333, "slots": 130, "head_dim": 96}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_layers_share_launches(name, dtype):
    layers = cross_layers(SHAPES[name][0], dtype, **SHAPES[name][1])
    first = still.run_layers(layers)
    for i in (0, len(layers) // 2, len(layers) - 1):
        check_forward((first[0][i], first[1][i]), layers[i])
    for _ in range(20):
        for x, y in zip(first, still.run_layers(layers)):
            assert torch.equal(x, y)


def compactor_inputs(count=36, tokens=2048, slots=256, dtype=torch.bfloat16, **options):
    config = StillConfig(slots=slots, head_dim=128, **options)
    params = [init_still_parameters(config, dtype=dtype, device="cuda") for _ in range(count)]
    params = [{name: x + 0.05 * torch.randn_like(x) for name, x in p.items()} for p in params]
    keys, values = ([torch.randn(1, 8, tokens, 128, device="cuda").to(dtype) for _ in range(count)] for _ in "kv")
    return keys, values, params, config, Rope(Rope.default(128).inv_freq.cuda())


@pytest.mark.parametrize("chunk", [None, 512])
def test_compaction_of_all_layers_waits_for_nothing_and_replays(chunk):
    args = compactor_inputs(count=4, slots=256 if chunk is None else 64)

    def run():
        if chunk is None:
            return still_compaction(*args, backend="triton")
        return still_compaction_chunked(*args, chunk, backend="triton")

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for block in got:
        for x in block:
            x.fill_(float("nan"))
    graph.replay()
    *layers, config, rope = args
    for block, (keys, values, params) in zip(got, zip(*layers)):
        pieces = config, rope, chunk or keys.shape[2]
        naive = reference.still_compaction_chunked(keys, values, params, *pieces)
        truth = reference.still_compaction_chunked(keys.double(), values.double(), params, *pieces)
        for name, x, y, z in zip(("keys", "values", "beta"), block, naive, truth):
            assert_within_budget(x, y, z, name=name)


def test_launches_follow_the_bytes_and_not_the_layers():
    """As many launches for 12 layers as for 4, both small; one layer needs as many."""
    from torch.profiler import ProfilerActivity, profile

    counts = {}
    for layers in (1, 4, 12):
        args = compactor_inputs(count=layers, tokens=256, slots=32, num_blocks=1)
        still_compaction(*args, backend="triton")
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            still_compaction(*args, backend="triton")
            torch.cuda.synchronize()
        kernels = [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        counts[layers] = sum("project_keys" in name or "attend" in name for name in kernels)
    if not any(counts.values()):
        pytest.skip("the profiler reports no kernels: CUPTI is missing, or this container may not use it")
    assert counts[1] == counts[4] == counts[12], counts


def test_temporary_memory_of_all_layers():
    """At the shapes of Qwen3-4B, 8k to 1k: 4.96% of the keys and values of the 36 layers by the count of
    test_triton_still_layers.py, slots not counted. (Whether it is the 5% of the goal is the benchmark's to say.)"""
    args = compactor_inputs(tokens=8192, slots=1024)
    kept = still_compaction(*args, backend="triton")
    size = sum(x.nbytes for block in kept for x in block)
    del kept
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested_bytes()
    again = still_compaction(*args, backend="triton")
    peak = requested_bytes("peak") - before - size
    assert again and peak <= 0.055 * 36 * 2 * 8 * 8192 * 128 * 2, peak


def test_training_runs_through_the_kernels():
    keys, values, params, config, rope = compactor_inputs(3, 700, 64, torch.float32, num_blocks=1)
    leaves = [x.requires_grad_() for p in params for x in p.values()]

    def gradients(blocks):
        return torch.autograd.grad(sum(x.square().sum() for block in blocks for x in block), leaves)

    got = gradients(still_compaction(keys, values, params, config, rope, backend="triton"))
    wanted = gradients(still_compaction(keys, values, params, config, rope, backend="torch"))
    for x, y in zip(got, wanted):
        assert (x - y).abs().max() <= 1e-3 * y.abs().max().clamp_min(1e-6)
