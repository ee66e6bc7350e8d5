# SPDX-License-Identifier: Apache-2.0
"""The forward kernel against the fp64 reference: in the interpreter without a GPU, compiled with one."""

import pytest
import torch
from triton_cases import DECODE, DEVICES, INTERPRETED, check_forward, make_inputs

pytest.importorskip("triton")
from kvcompact_kernels.backends.triton import compact_attention as backend
from kvcompact_kernels.backends.triton.runtime import Config

pytestmark = pytest.mark.parametrize("device", DEVICES)
SMALL = Config(BM=16, BN=16, warps=4, stages=2)
ONE_LOOP = Config(BM=64, BN=32, warps=4, stages=2)
THREE_LOOPS = Config(BM=64, BN=32, warps=4, stages=2, loops=3)


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("splits", [1, 3])
def test_decode(device, name, splits):
    args = make_inputs(device, **DECODE[name])
    check_forward(backend.forward(*args, config=SMALL, splits=splits), args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(device, dtype):
    args = make_inputs(device, dtype, query_len=2, blocks=((None, 50), (1, 20)), tail=7)
    check_forward(backend.forward(*args, config=SMALL), args)


PREFILL = {
    "question over slots": {"query_len": 50, "tail": 50},
    "chunk after an older tail": {"query_len": 33, "tail": 83, "batch": 1},
    "no slots, square": {"blocks": (), "query_len": 70, "tail": 70, "batch": 1},
    "window": {"query_len": 50, "tail": 95, "window": 21, "batch": 1},
    "padded": {"query_len": 50, "tail": 50, "mask": True},
    "not causal": {"query_len": 50, "tail": 33, "causal": False, "batch": 1},
    "shared": {"blocks": ((1, 41),), "query_len": 50, "tail": 50},
    "two blocks": {"blocks": ((1, 41), (None, 20)), "query_len": 30, "tail": 32},
    "ragged and shared": {"blocks": ((1, [17, 35]),), "query_len": 25, "tail": 25},
    "ragged, group 7": {"blocks": ((None, [17, 35]),), "batch": 1, "group": 7, "query_len": 30, "tail": 31},
}


@pytest.mark.parametrize("name", PREFILL)
@pytest.mark.parametrize("config", [ONE_LOOP, THREE_LOOPS], ids=["one loop", "three loops"])
def test_prefill(device, name, config):
    args = make_inputs(device, **PREFILL[name])
    check_forward(backend.forward(*args, config=config, splits=1), args)


def test_prefill_with_splits(device):
    args = make_inputs(device, query_len=60, tail=90)
    check_forward(backend.forward(*args, config=THREE_LOOPS, splits=4), args)


def test_planned_configurations(device):
    """Whatever the plan takes for these shapes, with the splits it takes."""
    for shape in (
        {"blocks": ((None, 700),), "kv_heads": 1, "batch": 1},
        {"blocks": ((1, 300),), "batch": 12, "query_len": 2, "tail": 3},
        {"blocks": ((None, [900, 40]),), "batch": 1, "kv_heads": 2},
    ):
        args = make_inputs(device, **shape)
        check_forward(backend.forward(*args), args)


def test_more_splits_than_keys(device):
    args = make_inputs(device, blocks=((None, 5),), tail=2)
    check_forward(backend.forward(*args, config=SMALL, splits=9), args)


def test_many_partial_results(device):
    """More parts than the merge joins in one step, each with a larger maximum than those before it."""
    args = make_inputs(device, batch=1, kv_heads=1, blocks=((None, 600),), tail=20)
    args[3][0].add_(torch.linspace(0, 20, 600, device=device))
    check_forward(backend.forward(*args, config=SMALL, splits=37), args)


def test_outputs_are_written_in_full(device, monkeypatch):
    """Fresh memory is poisoned: whatever a launch forgets stays NaN."""
    real = torch.empty

    def poisoned_empty(*shape, **kwargs):
        x = real(*shape, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    args = make_inputs(device, blocks=((None, [17, 0, 1, 40]), (1, 9)), tail=11, mask=True)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    for splits in (1, 4):
        check_forward(backend.forward(*args, config=SMALL, splits=splits), args)


def test_empty_query(device):
    args = make_inputs(device, poison=False)
    out, lse = backend.forward(args[0][:, :, :0], *args[1:])
    assert out.shape == (2, 6, 0, 64) and lse.shape == (2, 6, 0)


def test_transposed_layout_and_strided_beta(device):
    """Keys as ``[B, t, Hkv, d]`` in memory, beta and the mask with gaps between their entries."""
    args = list(make_inputs(device, poison=False, tail=9, mask=True))
    args[1] = [k.transpose(1, 2).contiguous().transpose(1, 2) for k in args[1]]
    args[3] = [torch.stack([b, torch.full_like(b, float("nan"))], -1)[..., 0] for b in args[3]]
    args[7] = torch.stack([args[7], ~args[7]], -1)[..., 0]
    check_forward(backend.forward(*args, config=SMALL, splits=2), args)


@pytest.mark.parametrize("far", ["slots", "requests"])
def test_offsets_beyond_31_bits(device, far):
    """Strides so large that 32-bit offsets would wrap; the memory is virtual and mostly untouched."""
    batch, kv_heads, slots, dim = (1, 2, 34, 64) if far == "slots" else (2, 2, 20, 64)
    strides = (0, dim, 1 << 26, 1) if far == "slots" else (1 << 31, 2 * dim * slots, dim, 1)
    shape = (batch, kv_heads, slots, dim)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    assert size > 1 << 31
    args = list(make_inputs(device, torch.float16, batch, kv_heads, blocks=((None, slots),), tail=0, poison=False))
    try:
        buffer = torch.empty(size + dim * kv_heads * slots, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no address space for {size} elements: {error}")
    for which, start in ((1, 0), (2, dim * kv_heads * (slots if far == "requests" else 1))):
        view = buffer.as_strided(shape, strides, start)
        view.copy_(args[which][0])
        args[which] = [view]
    check_forward(backend.forward(*args, config=SMALL, splits=2), args)  # where tiles start
    check_forward(backend.forward(*args, config=Config(BM=16, BN=64, warps=4, stages=2)), args)  # inside a tile


def test_a_new_length_compiles_nothing(device):
    """Lengths are run-time values: after the first calls, other lengths meet compiled kernels."""
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from kvcompact_kernels.backends.triton.kernels import attention_forward as kernels

    def compiled():
        return sum(len(cache[0]) for cache in kernels.attention_forward.device_caches.values())

    # Both kinds of output: with one split the result itself, with several the partial ones.
    for slots, tail in ((16, 16), (5000, 1)):
        backend.forward(*make_inputs(device, blocks=((None, slots),), tail=tail, poison=False), config=SMALL)
    before = compiled()
    for slots, tail in ((17, 3), (129, 64), (1000, 31)):
        backend.forward(*make_inputs(device, blocks=((None, slots),), tail=tail, poison=False), config=SMALL)
    assert compiled() == before
