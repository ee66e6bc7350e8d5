# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of STILL's kernels: real sizes, races, graphs, memory, no compilation per length."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from triton_still_cases import check_forward, check_gradients, make_inputs

from kvcompact_kernels import explain
from kvcompact_kernels.backends.cpu import library
from kvcompact_kernels.backends.triton import still_compaction as backend
from kvcompact_kernels.ops import still_compaction, still_compaction_chunked
from kvcompact_kernels.reference import still_compaction as reference
from kvcompact_kernels.rope import Rope
from kvcompact_kernels.still_config import StillConfig, init_still_parameters
from kvcompact_kernels.testing.budget import assert_within_budget
from kvcompact_kernels.testing.memory import requested_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = {
    "Qwen3-4B, one head, 8k to 1k": {"batch": 1, "tokens": 8192, "slots": 1024, "head_dim": 128},
    "odd": {"batch": 1, "kv_heads": 3, "tokens": 2049, "slots": 257, "head_dim": 128},
    "SmolLM2, 4k to 64": {"batch": 1, "kv_heads": 3, "tokens": 4096, "slots": 64, "head_dim": 64},
    "few slots": {"batch": 2, "tokens": 3000, "slots": 16, "head_dim": 128},
    "head dim 96": {"batch": 1, "kv_heads": 2, "tokens": 1500, "slots": 130, "head_dim": 96},
    "head dim 80, wider latents": {"batch": 1, "tokens": 1100, "slots": 70, "head_dim": 80, "width": 256},
    "chunks": {"batch": 16, "kv_heads": 2, "tokens": 512, "slots": 64, "head_dim": 128, "batched_tables": True},
    "a query each": {"batch": 2, "kv_heads": 2, "tokens": 700, "slots": 100, "head_dim": 64, "query_shape": (2, 2)},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_forward(name, dtype):
    args = make_inputs("cuda", dtype, **SHAPES[name])
    first = backend.forward(*args)
    check_forward(first, args)
    for _ in range(20):  # a race shows as a result that moves
        for x, y in zip(first, backend.forward(*args)):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients(name, dtype):
    args = make_inputs("cuda", dtype, **SHAPES[name])
    pooled, lse = backend.forward(*args)
    grads = torch.randn_like(pooled), torch.randn_like(lse)
    first = backend.backward(*grads, pooled, lse, *args)
    check_gradients(first, args, *grads)
    for _ in range(5):
        for x, y in zip(first, backend.backward(*grads, pooled, lse, *args)):
            assert x is None or torch.equal(x, y)


def test_replays_in_a_graph():
    args = make_inputs("cuda", torch.bfloat16, tokens=3000, slots=64, head_dim=128, poison=False)
    wanted = backend.forward(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backend.forward(*args)
    for x in got:
        x.fill_(float("nan"))
    graph.replay()
    for x, y in zip(got, wanted):
        assert torch.equal(x, y)


def test_waits_for_nothing():
    args = make_inputs("cuda", torch.bfloat16, tokens=3000, slots=64, head_dim=128, poison=False)
    backend.forward(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pooled, lse = backend.forward(*args)
        backend.backward(pooled, lse, pooled, lse, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_temporary_memory():
    """At the shapes of Qwen3-4B, 8k to 1k: at most 5% of the keys and values of the 36 layers."""
    args = make_inputs("cuda", torch.bfloat16, 1, 8, 8192, 1024, 128, poison=False)
    kept = backend.forward(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested_bytes()
    again = backend.forward(*args)
    peak = requested_bytes("peak") - before - sum(x.numel() * x.element_size() for x in again)
    assert peak <= 0.05 * 36 * 2 * 8 * 8192 * 128 * 2, peak
    assert torch.equal(kept[0], again[0])


def test_a_new_length_compiles_nothing():
    from kvcompact_kernels.backends.triton.kernels import still_cross_attention as kernels

    def compiled():
        both = (kernels.project_keys, kernels.attend)
        return sum(len(cache[0]) for kernel in both for cache in kernel.device_caches.values())

    for tokens, slots in ((1024, 200), (16, 200), (1, 200), (5000, 200)):
        backend.forward(*make_inputs("cuda", torch.bfloat16, 1, 2, tokens, slots, 128, poison=False))
    before = compiled()
    for tokens, slots in ((1025, 201), (4096, 1024), (333, 129)):
        backend.forward(*make_inputs("cuda", torch.bfloat16, 1, 2, tokens, slots, 128, poison=False))
    assert compiled() == before


def layer(dtype, tokens=2048, **options):
    config = StillConfig(slots=128, head_dim=64, **options)
    params = init_still_parameters(config, dtype=dtype, device="cuda")
    params = {name: p + 0.05 * torch.randn_like(p) for name, p in params.items()}
    keys, values = (torch.randn(1, 3, tokens, 64, device="cuda").to(dtype) for _ in range(2))
    return keys, values, params, config, Rope.default(64)


def test_a_layer_and_its_chunks():
    keys, values, params, config, rope = layer(torch.bfloat16)
    query = torch.zeros(1, 1, 128, 128, device="cuda", dtype=keys.dtype)
    tables = {name: torch.zeros(2048, 32, device="cuda") for name in ("cos", "sin")}
    tables |= {name: torch.zeros(2048, 64, device="cuda") for name in ("int_cos", "int_sin")}
    weight = params["block0_cross_k_weight"]
    assert explain("still_cross_attention", query, keys, values, weight, **tables).chosen == "triton"
    for chunk in (2048, 512):
        got = still_compaction_chunked(keys, values, params, config, rope, chunk, backend="triton")
        naive = reference.still_compaction_chunked(keys, values, params, config, rope, chunk)
        truth = reference.still_compaction_chunked(keys.double(), values.double(), params, config, rope, chunk)
        for name, x, y, z in zip(("keys", "values", "beta"), got, naive, truth):
            assert_within_budget(x, y, z, name=name)


@pytest.mark.skipif(not library.available()[0], reason="gradients go through the registered op of the native library")
def test_training_runs_through_the_kernels():
    keys, values, params, config, rope = layer(torch.float32, tokens=700, num_blocks=1)
    for p in params.values():
        p.requires_grad_()
    names = list(params)

    def gradients(outputs):
        objective = sum(x.float().square().sum() for x in outputs)
        return torch.autograd.grad(objective, [params[n] for n in names])

    got = gradients(still_compaction(keys, values, params, config, rope, backend="triton"))
    wanted = gradients(still_compaction(keys, values, params, config, rope, backend="torch"))
    for name, x, y in zip(names, got, wanted):
        scale = y.abs().max().clamp_min(1e-6)
        assert ((x - y).abs().max() / scale) < 1e-3, name
