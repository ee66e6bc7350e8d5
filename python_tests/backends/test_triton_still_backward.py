# SPDX-License-Identifier: Apache-2.0
"""Gradients of STILL's cross-attention kernels against the fp64 reference: interpreted without a GPU, compiled with one."""

import pytest
import torch
from triton_cases import DEVICES, far_apart
from triton_still_cases import ATTEND, PROJECT, check_gradients, make_inputs

pytest.importorskip("triton")
from kvcompact_kernels.backends.triton import still_compaction as backend
from kvcompact_kernels.backends.triton.runtime import Config
from kvcompact_kernels.testing.draws import draws

pytestmark = pytest.mark.parametrize("device", DEVICES)
SMALL = Config(BM=32, BN=32, warps=4, stages=1)

CASES = {
    "plain": {"tokens": 63},
    "one token, one slot": {"tokens": 1, "slots": 1},
    "more slots than a tile": {"tokens": 34, "slots": 33, "batch": 1},
    "head dim 128": {"tokens": 40, "head_dim": 128, "batch": 1},
    "shared query, three heads": {"kv_heads": 3, "tokens": 17, "head_dim": 32},
    "a query each": {"kv_heads": 3, "tokens": 17, "head_dim": 32, "query_shape": (2, 3)},
    "a query per head": {"kv_heads": 3, "tokens": 17, "head_dim": 32, "query_shape": (1, 3)},
    "a query per request": {"kv_heads": 3, "tokens": 17, "head_dim": 32, "query_shape": (2, 1)},
    "no bias": {"bias": False, "tokens": 33},
    "no norm": {"norm": False, "tokens": 33},
    "no bias, no norm": {"bias": False, "norm": False, "tokens": 33},
    "head dim 80, wider latents": {"head_dim": 80, "width": 200, "tokens": 35, "batch": 1},
    "head dim 8": {"head_dim": 8},
    "tables of each request": {"batch": 3, "batched_tables": True, "head_dim": 32},
}


def run(args, config=SMALL, splits=None):
    pooled, lse = backend.forward(*args, configs=(PROJECT, ATTEND), splits=1)
    grads = torch.randn_like(pooled), torch.randn_like(lse)
    return backend.backward(*grads, pooled, lse, *args, config=config, splits=splits), grads


@pytest.mark.parametrize("name", CASES)
def test_gradients(device, name):
    args = make_inputs(device, **CASES[name])
    gradients, grads = run(args, splits=2)
    check_gradients(gradients, args, *grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(device, dtype):
    args = make_inputs(device, dtype, tokens=50, head_dim=32)
    gradients, grads = run(args, splits=1)
    check_gradients(gradients, args, *grads)


def test_planned_configurations(device):
    args = make_inputs(device, tokens=520, slots=5, batch=1, head_dim=32)
    gradients, grads = run(args, config=None)
    check_gradients(gradients, args, *grads)


def test_groups_add_up(device, monkeypatch):
    """Heads and requests in groups of two, two and one: sums over groups are complete."""
    args = make_inputs(device, batch=2, kv_heads=3, tokens=17, head_dim=32)
    plan = backend.plan_groups
    monkeypatch.setattr(backend, "plan_groups", lambda batch, heads, size: plan(batch, heads, size, 2 * size))
    gradients, grads = run(args, splits=2)
    check_gradients(gradients, args, *grads)


def test_gradients_are_written_in_full_and_repeat(device, monkeypatch):
    """Fresh memory is poisoned, and a second run gives the same bits."""
    args = make_inputs(device, tokens=37, slots=19, head_dim=24)
    pooled, lse = backend.forward(*args, configs=(PROJECT, ATTEND), splits=1)
    grads = torch.randn_like(pooled), torch.randn_like(lse)
    clean = backend.backward(*grads, pooled, lse, *args, config=SMALL, splits=3)
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: real(*a, **k).fill_(float("nan")))
    poisoned = backend.backward(*grads, pooled, lse, *args, config=SMALL, splits=3)
    for x, y in zip(clean, poisoned):
        assert torch.equal(x, y)


@pytest.mark.parametrize("far", ["tokens", "requests"])
@draws(3)
def test_offsets_beyond_31_bits(device, far):
    batch, tokens = (1, 34) if far == "tokens" else (2, 20)
    args = list(make_inputs(device, batch=batch, tokens=tokens, head_dim=64, poison=False))
    args[1:3] = far_apart(far, *args[1:3])
    gradients, grads = run(args, splits=2)
    check_gradients(gradients, args, *grads)


def test_strided_gradient(device):
    """The gradient of a sum over slots arrives expanded, with strides of 0."""
    args = make_inputs(device, tokens=33, head_dim=32)
    pooled, lse = backend.forward(*args, configs=(PROJECT, ATTEND), splits=1)
    grads = torch.randn_like(pooled[:, :, :1]).expand_as(pooled), torch.zeros_like(lse)
    check_gradients(backend.backward(*grads, pooled, lse, *args, config=SMALL, splits=1), args, *grads)


def test_nothing_to_do(device):
    args = make_inputs(device, poison=False)
    args = (args[0][:, :, :0], *args[1:])
    gradients, _ = run(args)
    assert gradients[0].shape == args[0].shape
    for x, gradient in zip(args[1:6], gradients[1:]):
        assert gradient.shape == x.shape and not gradient.any()
