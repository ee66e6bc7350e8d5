# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernel of compact attention, in every instruction-set variant that this machine runs."""

import math
import random

import pytest
import torch

from kvcompact_kernels.backends.cpu import compact_attention as cpu
from kvcompact_kernels.backends.cpu import library
from kvcompact_kernels.reference import compact_attention as reference
from kvcompact_kernels.testing.budget import assert_within_budget
from kvcompact_kernels.testing.poison import poisoned

available, reason = library.available()
pytestmark = pytest.mark.skipif(not available, reason=reason or "the native library is there")
ISAS = library.isas() if available else ["base"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    library.set_isa(request.param)
    assert library.isa() == request.param
    yield request.param
    library.set_isa("")


@pytest.fixture(autouse=True)
def fresh_seed(request):
    seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))
    print("seed", seed)


def block(batch, kv_heads, slots, d, dtype, bias=True):
    k, v = (poisoned(torch.randn(batch, kv_heads, slots, d).to(dtype)) for _ in range(2))
    return k, v, poisoned(torch.randn(batch, kv_heads, slots)) if bias else None


def ragged_block(lengths, d, dtype, bias=True):
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    n = int(offsets[-1])
    k, v = (poisoned(torch.randn(n, d).to(dtype)) for _ in range(2))
    return k, v, torch.randn(n) if bias else None, offsets


def run_and_check(q, blocks, tail=None, tail_mask=None, causal=True, window=-1, kv_heads=1, scale=None):
    """Runs the kernel on blocks of (k, v, beta[, offsets]) and holds it to the error budget; returns (out, lse)."""
    lists = [[b[0] for b in blocks], [b[1] for b in blocks], [b[2] for b in blocks]]
    lists.append([b[3] if len(b) > 3 else None for b in blocks])
    tail_k, tail_v = tail if tail is not None else (None, None)
    rest = (tail_mask, scale or q.shape[-1] ** -0.5, causal, window, kv_heads)
    assert cpu.supports(q, *lists, tail_k, tail_v, *rest) is None
    out, lse = cpu.run(q, *lists, tail_k, tail_v, *rest)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.dtype == torch.float32

    def wide(x):
        return None if x is None else x if x.dtype == torch.int64 else x.double()

    naive = reference.compact_attention(q, *lists, tail_k, tail_v, *rest)
    truth = reference.compact_attention(
        wide(q), *[[wide(x) for x in xs] for xs in lists], wide(tail_k), wide(tail_v), *rest
    )
    assert_within_budget(out, naive[0], truth[0], name="out")
    assert_within_budget(lse, naive[1], truth[1], name="lse")
    return out, lse


def query(batch, heads, length, d, dtype):
    return poisoned(torch.randn(batch, heads, length, d).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("slots", [1, 63, 65, 1000])
def test_decode(dtype, d, slots):
    group = {64: 3, 80: 1, 96: 7, 128: 4, 256: 4}[d]
    run_and_check(query(2, 2 * group, 1, d, dtype), [block(2, 2, slots, d, dtype)], kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group,length,tail", [(1, 5, 5), (3, 40, 130), (4, 17, 33), (7, 1, 1), (2, 130, 200)])
@pytest.mark.parametrize("window", [-1, 9])
def test_block_and_tail(dtype, group, length, tail, window):
    tails = poisoned(torch.randn(2, 2, 2, tail, 64).to(dtype)).unbind(0)
    blocks = [block(2, 2, 100, 64, dtype), block(2, 2, 31, 64, dtype, bias=False)]
    q = query(2, 2 * group, length, 64, dtype)
    mask = torch.rand(2, tail) > 0.3
    run_and_check(q, blocks, tails, mask, window=window, kv_heads=2)
    run_and_check(q, blocks, tails, None, causal=False, window=window, kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [33, 40, 72, 320])
def test_unusual_head_dims(dtype, d):
    tails = [torch.randn(1, 2, 19, d).to(dtype) for _ in range(2)]
    run_and_check(query(1, 6, 3, d, dtype), [block(1, 2, 70, d, dtype)], tails, kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch,group,length", [(3, 4, 1), (16, 4, 1), (5, 3, 7)])
@pytest.mark.parametrize("own", [False, True])
def test_shared_block(dtype, batch, group, length, own):
    shared, q = block(1, 2, 300, 64, dtype), query(batch, 2 * group, length, 64, dtype)
    blocks = [shared, block(batch, 2, 77, 64, dtype)] if own else [shared]
    tails = [torch.randn(batch, 2, 20, 64).to(dtype) for _ in range(2)] if own else None
    run_and_check(q, blocks, tails, kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_ragged_heads(dtype, shared):
    lengths = [0, 65, 7] if shared else [0, 65, 7, 300, 1, 0]
    q = query(2, 9, 2, 64, dtype)
    out, lse = run_and_check(q, [ragged_block(lengths, 64, dtype)], kv_heads=3)
    assert (out[0, :3] == 0).all() and (lse[0, :3] == -math.inf).all()
    run_and_check(q, [ragged_block(lengths, 64, dtype, bias=False), block(1, 3, 40, 64, dtype)], kv_heads=3)
    tails = [torch.randn(2, 3, 4, 64).to(dtype) for _ in range(2)]
    run_and_check(q, [ragged_block(lengths, 64, dtype)], tails, kv_heads=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_ragged_beside_partly_empty_own_block(dtype):
    """A row with keys in the shared block alone must still be merged when other requests have blocks of their own."""
    q = query(3, 4, 1, 64, dtype)
    own = ragged_block([0, 40, 9, 0, 0, 500], 64, dtype)
    run_and_check(q, [ragged_block([30, 0], 64, dtype), own], kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_that_are_off_may_hold_nan(dtype):
    k, v, beta = block(2, 2, 130, 64, dtype)
    off = torch.rand(2, 2, 130) < 0.5
    beta[off] = -math.inf
    clean = run_and_check(query(2, 4, 1, 64, dtype), [(k, v, beta)], kv_heads=2)
    assert clean[0].isfinite().all()
    q = query(2, 4, 3, 64, dtype)
    args = [[None], None, None, None, 0.125, True, -1, 2]
    want = cpu.run(q, [k.clone()], [v.clone()], [beta], *args)
    k[off], v[off] = math.nan, math.nan
    got = cpu.run(q, [k], [v], [beta], *args)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tail_may_hold_nan(dtype):
    tail_k, tail_v = (torch.randn(2, 2, 50, 64).to(dtype) for _ in range(2))
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, :20] = False
    q, b = query(2, 4, 3, 64, dtype), block(2, 2, 30, 64, dtype)
    want = run_and_check(q, [b], (tail_k, tail_v), mask, kv_heads=2)
    tail_k[0, :, :20], tail_v[0, :, :20] = math.nan, math.nan
    got = cpu.run(q, [b[0]], [b[1]], [b[2]], [None], tail_k, tail_v, mask, 0.125, True, -1, 2)
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing(dtype):
    k, v, beta = block(2, 2, 70, 64, dtype)
    beta[1] = -math.inf
    out, lse = run_and_check(query(2, 4, 2, 64, dtype), [(k, v, beta)], kv_heads=2)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    tails = [torch.randn(2, 2, 5, 64).to(dtype) for _ in range(2)]
    mask = torch.tensor([[True] * 5, [False] * 5])
    out, lse = run_and_check(query(2, 4, 2, 64, dtype), [(k, v, beta)], tails, mask, kv_heads=2)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all() and lse[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_large_logits(dtype):
    k, v, _ = block(1, 1, 200, 64, dtype)
    # logits of 500 are rounded to 3e-5: with few queries it is chance whose largest error is larger
    q = query(128, 3, 1, 64, dtype)
    run_and_check(q, [(k, v, torch.linspace(-3e4, 3e4, 200)[None, None])], kv_heads=1)
    run_and_check(q, [(k, v, torch.full((1, 1, 200), -500.0))], kv_heads=1)
    q[0, 1] = math.nan
    out, lse = cpu.run(q, [k], [v], [None], [None], None, None, None, 0.125, True, -1, 1)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
    assert out[0, [0, 2]].isfinite().all() and out[1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Sequence-first tails, as a model's projection leaves them, a broadcast beta and a transposed query."""
    tail_k, tail_v = (torch.randn(2, 37, 2, 64).to(dtype).transpose(1, 2) for _ in range(2))
    q = torch.randn(2, 5, 6, 64).to(dtype).transpose(1, 2)
    k, v, _ = block(2, 2, 90, 64, dtype)
    mask = (torch.rand(37, 2) > 0.2).T
    run_and_check(q, [(k, v, torch.randn(1, 2, 1).expand(2, 2, 90))], (tail_k, tail_v), mask, kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tail_only_and_no_keys(dtype):
    tails = [torch.randn(1, 2, 150, 64).to(dtype) for _ in range(2)]
    q = query(1, 8, 150, 64, dtype)
    run_and_check(q, [], tails, kv_heads=2)
    empty = torch.empty(1, 2, 0, 64, dtype=dtype)
    out, lse = cpu.run(q, [empty], [empty], [None], [None], None, None, None, 0.125, True, -1, 2)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_run_and_with_any_number_of_threads(dtype):
    b, tails = block(2, 3, 3000, 64, dtype), [torch.randn(2, 3, 90, 64).to(dtype) for _ in range(2)]
    q = query(2, 9, 20, 64, dtype)
    args = ([b[0]], [b[1]], [b[2]], [None], *tails, None, 0.125, True, -1, 3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(cpu.run(q, *args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r[0], results[0][0]) and torch.equal(r[1], results[0][1]) for r in results)


def test_supports_names_the_reason():
    q, (k, v, beta) = torch.randn(1, 2, 1, 8), block(1, 2, 4, 8, torch.float32)

    def why(q, k, v):
        return cpu.supports(q, [k], [v], [beta], [None], None, None, None, 1.0, True, -1, 2)

    assert why(q, k, v) is None
    assert "float64" in why(q.double(), k.double(), v.double())
    assert "meta" in why(q.to("meta"), k.to("meta"), v.to("meta"))
    assert "values has stride 2" in why(q, k, torch.randn(1, 2, 4, 16)[..., ::2])


def test_the_native_op_refuses_bad_input():
    q, (k, v, beta) = torch.randn(2, 4, 1, 8), block(2, 2, 4, 8, torch.float32)
    good = {"q": q, "k": k, "v": v, "beta": beta, "offsets": None, "tk": None, "tv": None, "mask": None, "kv": 2}

    def call(**changes):
        a = {**good, **changes}
        return torch.ops.kvcompact.compact_attention(
            a["q"], [a["k"]], [a["v"]], [a["beta"]], [a["offsets"]], a["tk"], a["tv"], a["mask"], 1.0, True, -1, a["kv"]
        )

    call()
    for name, changes in {
        "query": {"q": q[0]},
        "float32 or bfloat16": {"q": q.double()},
        "keys": {"k": k.bfloat16()},
        "values": {"v": v[:, :, :3]},
        "betas": {"beta": beta.double()},
        "batch size": {"k": k.repeat(2, 1, 1, 1)[:3], "v": v.repeat(2, 1, 1, 1)[:3], "beta": None},
        "multiple of num_kv_heads": {"kv": 3},
        "go together": {"tk": k},
        "tail_mask": {"tk": k, "tv": v, "mask": torch.ones(2, 5, dtype=torch.bool)},
        "offsets": {"k": k[0, 0], "v": v[0, 0], "beta": None, "offsets": torch.tensor([0, 3, 2, 4, 4])},
        "last dimension": {"k": torch.randn(2, 2, 4, 16)[..., ::2]},
    }.items():
        with pytest.raises(RuntimeError, match=name):
            call(**changes)
