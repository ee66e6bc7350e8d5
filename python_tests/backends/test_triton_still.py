# SPDX-License-Identifier: Apache-2.0
"""STILL's cross-attention kernels against the fp64 reference: in the interpreter without a GPU, compiled with one."""

import pytest
import torch
from triton_cases import DEVICES, Counted
from triton_still_cases import ATTEND, PROJECT, check_forward, make_inputs

pytest.importorskip("triton")
from kvcompact_kernels.backends.triton import still_compaction as backend
from kvcompact_kernels.backends.triton.still_compaction import plan_groups

pytestmark = pytest.mark.parametrize("device", DEVICES)

CASES = {
    "plain": {},
    # many of them: the largest of a few errors is no yardstick
    "one token, one slot": {"tokens": 1, "slots": 1, "kv_heads": 4, "batch": 8},
    "more slots than a tile": {"tokens": 40, "slots": 33},
    "130 tokens, head dim 128": {"tokens": 130, "slots": 7, "head_dim": 128, "batch": 1},
    "three heads, shared query": {"kv_heads": 3, "tokens": 33},
    "three heads, a query each": {"kv_heads": 3, "tokens": 33, "query_shape": (2, 3)},
    "a query per head": {"kv_heads": 3, "tokens": 33, "query_shape": (1, 3)},
    "a query per request": {"kv_heads": 2, "tokens": 33, "query_shape": (2, 1)},
    "no bias": {"bias": False},
    "no norm": {"norm": False},
    "no bias, no norm": {"bias": False, "norm": False},
    "head dim 80": {"head_dim": 80, "tokens": 35, "batch": 1},
    "head dim 96, wider latents": {"head_dim": 96, "width": 200, "tokens": 35, "batch": 1},
    "head dim 8, wide latents": {"head_dim": 8, "width": 64},
    "head dim 6": {"head_dim": 6},
    "narrow latents": {"head_dim": 64, "width": 22, "batch": 1},
    "tables of each request": {"batch": 3, "batched_tables": True},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("splits", [1, 3])
def test_forward(device, name, splits):
    args = make_inputs(device, **CASES[name])
    check_forward(backend.forward(*args, configs=(PROJECT, ATTEND), splits=splits), args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(device, dtype):
    args = make_inputs(device, dtype, tokens=50, kv_heads=2)
    check_forward(backend.forward(*args, configs=(PROJECT, ATTEND), splits=2), args)


def test_planned_configurations(device):
    """Whatever the plan takes, with the splits it takes."""
    for shape in ({"tokens": 600, "slots": 5, "batch": 1}, {"tokens": 70, "slots": 140, "kv_heads": 2, "head_dim": 32}):
        args = make_inputs(device, **shape)
        check_forward(backend.forward(*args), args)


@pytest.mark.parametrize("fitting,groups", [(0, 6), (1, 6), (2, 3), (4, 2), (5, 2), (6, 1)])
def test_groups_reuse_the_workspace(device, monkeypatch, fitting, groups):
    """A workspace for ``fitting`` pairs: heads of a request, or whole requests, are worked off one group after another."""
    args = make_inputs(device, batch=3, kv_heads=2, tokens=41, head_dim=32, batched_tables=True)
    plans = []

    def plan(batch, kv_heads, pair_bytes):
        plans.append(plan_groups(batch, kv_heads, pair_bytes, fitting * pair_bytes))
        return plans[-1]

    monkeypatch.setattr(backend, "plan_groups", plan)
    check_forward(backend.forward(*args, configs=(PROJECT, ATTEND), splits=1 + fitting % 2), args)
    assert len(plans[0]) == groups
    assert [group.first_pair + i for group in plans[0] for i in range(group.pairs)] == list(range(6))


def make_layers(device, count=3, dtype=torch.float16, odd=False, **sizes):
    """Calls that share tables, of several memory layouts, NaN around them; ``odd``: one lies at addresses of single elements."""
    layers = [list(make_inputs(device, dtype, poison=False, **sizes)) for _ in range(count)]
    for n, layer in enumerate(layers):
        layer[6:] = layers[0][6:]
        for i in (0, 1, 2):
            x = layer[i].transpose(1, 2) if n == 1 else layer[i]  # [B, T, Hkv, d] in memory
            gap = torch.full_like(x, float("nan"))
            start = 1 if odd and n == count - 1 else x.shape[3]
            x = torch.cat([gap[..., :start], x, gap], -1).contiguous()[..., start : start + x.shape[3]]
            layer[i] = x.transpose(1, 2) if n == 1 else x
    layers[-1][3] = layers[-1][3].t().contiguous().t()
    return [tuple(layer) for layer in layers]


def poison_fresh_memory(monkeypatch):
    real = torch.Tensor.new_empty

    def poisoned_empty(self, *shape, **kwargs):
        found = real(self, *shape, **kwargs)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_empty)


LAYERS = {
    "one layer": {"count": 1},
    "three": {"kv_heads": 2, "tokens": 37, "slots": 19},
    "odd addresses": {"kv_heads": 2, "tokens": 37, "odd": True},
    "head dim 6": {"head_dim": 6, "count": 2},
    "head dim 80, no norm": {"head_dim": 80, "tokens": 35, "batch": 1, "norm": False},
    "a query each, no bias": {"kv_heads": 2, "tokens": 33, "query_shape": (2, 2), "bias": False},
    "tables of each request": {"batch": 3, "batched_tables": True},
    "one token, one slot": {"tokens": 1, "slots": 1, "kv_heads": 4, "batch": 8, "count": 4},
    "bfloat16": {"dtype": torch.bfloat16, "tokens": 50},
    "float32": {"dtype": torch.float32, "tokens": 50},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("splits", [1, 3])
def test_layers(device, name, splits):
    layers = make_layers(device, **LAYERS[name])
    pooled, lse = backend.run_layers(layers, configs=(PROJECT, ATTEND), splits=splits)
    for i, layer in enumerate(layers):
        check_forward((pooled[i], lse[i]), layer)


@pytest.mark.parametrize("fitting,groups", [(1, 12), (2, 6), (4, 3), (6, 2), (99, 1)])
def test_a_group_holds_requests_of_several_layers(device, monkeypatch, fitting, groups):
    """Three launches a group, however many layers share it; memory that a launch forgets stays NaN."""
    from kvcompact_kernels.backends.triton.kernels import attention_forward, still_cross_attention

    layers = make_layers(device, batch=2, kv_heads=2, tokens=41, head_dim=32)
    launches = []
    for module, name in (
        (still_cross_attention, "project_keys"),
        (still_cross_attention, "attend"),
        (attention_forward, "merge"),
    ):
        monkeypatch.setattr(module, name, Counted(getattr(module, name), launches))
    monkeypatch.setattr(backend, "plan_groups", lambda b, h, size: plan_groups(b, h, size, fitting * size))
    poison_fresh_memory(monkeypatch)
    pooled, lse = backend.run_layers(layers, configs=(PROJECT, ATTEND), splits=2)
    assert len(launches) == 3 * groups
    for i, layer in enumerate(layers):
        check_forward((pooled[i], lse[i]), layer)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("fitting,splits", [(1, 1), (3, 1), (99, 3)])
def test_averages_may_take_the_memory_of_the_queries(device, monkeypatch, fitting, splits, odd):
    layers = make_layers(device, batch=2, kv_heads=2, tokens=41, slots=37, head_dim=32, query_shape=(2, 2), odd=odd)
    query = torch.stack([layer[0] for layer in layers])
    assert query.shape[4] == 2 * layers[0][1].shape[3]
    monkeypatch.setattr(backend, "plan_groups", lambda b, h, size: plan_groups(b, h, size, fitting * size))
    shared = [(q, *layer[1:]) for q, layer in zip(query.unbind(), layers)]
    pooled, lse = backend.run_layers(shared, configs=(PROJECT, ATTEND), splits=splits, out=query)
    assert pooled.data_ptr() == query.data_ptr() and pooled.shape == query.shape
    for i, layer in enumerate(layers):
        check_forward((pooled[i], lse[i]), layer)


def test_layers_without_slots(device):
    layers = make_layers(device)
    pooled, lse = backend.run_layers([(x[0][:, :, :0], *x[1:]) for x in layers])
    assert pooled.shape == (3, 2, 1, 0, 128) and lse.shape == (3, 2, 1, 0)


def test_outputs_are_written_in_full(device, monkeypatch):
    """Fresh memory is poisoned: whatever a launch forgets stays NaN."""
    args = make_inputs(device, tokens=37, slots=19, head_dim=24, kv_heads=2)
    poison_fresh_memory(monkeypatch)
    for splits in (1, 5):
        check_forward(backend.forward(*args, configs=(PROJECT, ATTEND), splits=splits), args)


def test_transposed_layout(device):
    """Keys as ``[B, T, Hkv, d]`` in memory, the weight transposed, tables with gaps between rows."""
    args = list(make_inputs(device, kv_heads=3, tokens=34, head_dim=32, poison=False))
    for i in (0, 1, 2):
        args[i] = args[i].transpose(1, 2).contiguous().transpose(1, 2)
    args[3] = args[3].t().contiguous().t()
    for i in range(6, 10):
        args[i] = torch.cat([args[i], torch.full_like(args[i], float("nan"))], -1)[:, : args[i].shape[1]]
    check_forward(backend.forward(*args, configs=(PROJECT, ATTEND), splits=2), args)


def test_large_logits(device):
    """Sharp attention, as at the start of training: the softmax neither overflows nor loses its one winner."""
    args = list(make_inputs(device, torch.float32, tokens=45, norm=False))
    args[0] = args[0] * 60.0
    check_forward(backend.forward(*args, configs=(PROJECT, ATTEND), splits=2), args)


def test_nothing_to_do(device):
    args = make_inputs(device, poison=False)
    pooled, lse = backend.forward(args[0][:, :, :0], *args[1:])
    assert pooled.shape == (2, 1, 0, 128) and lse.shape == (2, 1, 0)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("far", ["tokens", "requests"])
def test_offsets_beyond_31_bits(device, far, layers):
    """Strides so large that 32-bit offsets would wrap; the memory is virtual and mostly untouched."""
    batch, tokens, dim = (1, 34, 64) if far == "tokens" else (3, 20, 64)
    strides = (0, 0, 1 << 26, 1) if far == "tokens" else (1 << 30, 0, dim, 1)
    args = list(make_inputs(device, batch=batch, tokens=tokens, head_dim=dim, poison=False))
    size = (batch - 1) * strides[0] + (tokens - 1) * strides[2] + 3 * dim * tokens
    assert size > 1 << 31
    try:
        buffer = torch.empty(size, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no address space for {size} elements: {error}")
    for which, start in ((1, 0), (2, dim * tokens if far == "requests" else dim)):
        view = buffer.as_strided((batch, 1, tokens, dim), strides, start)
        view.copy_(args[which])
        args[which] = view
    near = (*make_inputs(device, batch=batch, tokens=tokens, head_dim=dim)[:6], *args[6:])
    pooled, lse = backend.run_layers([near, args][-layers:], configs=(PROJECT, ATTEND), splits=2)
    check_forward((pooled[-1], lse[-1]), args)
