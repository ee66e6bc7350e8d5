# SPDX-License-Identifier: Apache-2.0
"""The key scores' kernels against the fp64 reference: in the interpreter without a GPU, compiled with one."""

import pytest
import torch
from triton_cases import DEVICES, INTERPRETED, far_apart

from kvcompact_kernels.reference.key_scores import key_scores as reference
from kvcompact_kernels.testing.budget import assert_within_budget
from kvcompact_kernels.testing.poison import poisoned

pytest.importorskip("triton")
from kvcompact_kernels.backends.triton import key_scores as backend
from kvcompact_kernels.backends.triton.runtime import Config

pytestmark = pytest.mark.parametrize("device", DEVICES)
TILES = Config(BM=32, BN=16, warps=4, stages=2)

CASES = {
    "all queries": (1, 2, 3, 47, 47, 64, True),
    "last queries": (2, 1, 3, 9, 61, 64, True),
    "one query": (2, 2, 7, 1, 33, 64, True),
    "not causal": (1, 2, 2, 21, 37, 64, False),
    "not causal, more queries than keys": (1, 1, 2, 40, 17, 64, False),
    "one key": (2, 2, 2, 1, 1, 64, True),
    "head dim 96": (1, 1, 3, 12, 40, 96, True),
    "head dim 256": (1, 1, 1, 12, 20, 256, True),
}


def inputs(device, case, dtype=torch.float16):
    batch, kv_heads, group, query_len, key_len, head_dim, causal = case
    query = torch.randn(batch, kv_heads * group, query_len, head_dim, device=device).to(dtype)
    keys = torch.randn(batch, kv_heads, key_len, head_dim, device=device).to(dtype)
    return poisoned(query), poisoned(keys), head_dim**-0.5, causal


def check(actual, query, keys, lse, scale, causal, reduce):
    truth = reference(query.double(), keys.double(), None if lse is None else lse.double(), scale, causal, reduce)
    naive = reference(query, keys, lse, scale, causal, reduce)
    assert actual.dtype == torch.float32
    assert_within_budget(actual, naive, truth)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("splits", [1, 3])
def test_key_scores(device, name, reduce, splits):
    query, keys, scale, causal = inputs(device, CASES[name])
    actual = backend.forward(query, keys, None, scale, causal, reduce, config=TILES, splits=splits)
    check(actual, query, keys, None, scale, causal, reduce)


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_given_lse(device, reduce):
    """Any normaliser, a row's own or not; +inf switches a row off."""
    query, keys, scale, causal = inputs(device, CASES["last queries"])
    lse = torch.randn(query.shape[:3], device=device)
    lse[0, 1, 3] = float("inf")
    actual = backend.forward(query, keys, poisoned(lse), scale, causal, reduce, config=TILES)
    check(actual, query, keys, lse, scale, causal, reduce)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_and_planned_configurations(device, dtype):
    query, keys, scale, causal = inputs(device, (1, 1, 3, 20, 70, 64, True), dtype)
    check(backend.forward(query, keys, None, scale, causal, "sum"), query, keys, None, scale, causal, "sum")


@pytest.mark.parametrize("tiles", [TILES, Config(BM=16, BN=64, warps=4, stages=2)])  # offsets of a tile, or inside it
@pytest.mark.parametrize("far", ["tokens", "requests"])
def test_offsets_beyond_31_bits(device, far, tiles):
    batch, rows = (1, 34) if far == "tokens" else (2, 20)
    query, keys, scale, causal = inputs(device, (batch, 2, 2, 9, rows, 64, True))
    wide = far_apart(far, keys)[0]
    if far == "requests":
        query = far_apart(far, query)[0]
    actual = backend.forward(query, wide, None, scale, causal, "sum", config=tiles, splits=2)
    check(actual, query, keys, None, scale, causal, "sum")


def test_outputs_are_written_in_full(device, monkeypatch):
    real = torch.empty

    def poisoned_empty(*shape, **kwargs):
        x = real(*shape, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    query, keys, scale, causal = inputs(device, CASES["last queries"])
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    actual = backend.forward(query, keys, None, scale, causal, "sum", config=TILES, splits=3)
    check(actual, query, keys, None, scale, causal, "sum")


def test_the_public_op(device):
    """By name, and with gradients through the registered op where that runs these kernels."""
    from kvcompact_kernels.backends.cpu import library
    from kvcompact_kernels.ops import key_scores

    query, keys, scale, causal = inputs(device, CASES["all queries"])
    actual = key_scores(query, keys, backend="triton")
    check(actual, query, keys, None, scale, causal, "sum")
    if INTERPRETED or not library.available()[0]:
        return
    leaves = [x.detach().clone().requires_grad_() for x in (query, keys)]
    weight = torch.randn_like(actual)
    found = torch.autograd.grad((key_scores(*leaves, backend="triton") * weight).sum(), leaves)
    wanted = torch.autograd.grad((key_scores(*leaves, backend="torch") * weight).sum(), leaves)
    for got, want in zip(found, wanted):
        assert (got - want).norm() < 0.02 * want.norm()
