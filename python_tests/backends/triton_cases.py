# SPDX-License-Identifier: Apache-2.0
"""What the tests of the GPU kernels share: where they run, inputs, and the comparison with the fp64 reference."""

import os

import pytest
import torch

from kvcompact_kernels.reference import compact_attention as reference
from kvcompact_kernels.testing.budget import assert_within_budget
from kvcompact_kernels.testing.poison import poisoned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not INTERPRETED, reason="needs TRITON_INTERPRET=1: test_triton_interpreter.py runs it"
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


class Counted:
    """A kernel that notes its grids."""

    def __init__(self, kernel, grids):
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def far_apart(far, *tensors):
    """The tensors ``[B, H, n, d]`` with strides so large that 32-bit offsets would wrap, in virtual memory that is mostly
    untouched: "tokens" are far apart (of one request, more than 32), or "requests" (two or more)."""
    batch, heads, rows, dim = tensors[0].shape
    tokens = far == "tokens"
    strides = (0, dim, 1 << 26, 1) if tokens else (1 << 31, dim * rows, dim, 1)
    step = dim * heads * (1 if tokens else rows)
    size = step * len(tensors) + sum((n - 1) * s for n, s in zip(tensors[0].shape, strides))
    assert size > 1 << 31 and (batch == 1 or not tokens)
    try:
        buffer = torch.empty(size, dtype=tensors[0].dtype, device=tensors[0].device)
    except RuntimeError as error:
        pytest.skip(f"no address space for {size} elements: {error}")
    views = [buffer.as_strided(x.shape, strides, step * i) for i, x in enumerate(tensors)]
    for view, x in zip(views, tensors):
        view.copy_(x)
    return views


# Keywords of make_inputs: short queries in every kind of call.
DECODE = {
    "plain": {},
    "no beta": {"beta": False},
    "group 7": {"group": 7, "kv_heads": 1},
    "group 1": {"group": 1, "kv_heads": 3},
    "one slot": {"blocks": ((None, 1),), "tail": 0},
    "empty tail": {"tail": 0},
    "no slots": {"blocks": ((None, 0),), "tail": 9},
    "only a tail": {"blocks": (), "tail": 21},
    "tail of uneven lengths": {"tail": 23, "mask": True, "batch": 3},
    "some slots off": {"off": 0.4},
    "all slots off": {"off": 1.0, "tail": 0},
    "all slots off but a tail": {"off": 1.0, "tail": 3},
    "two queries": {"query_len": 2, "tail": 6},
    "five queries, window": {"query_len": 5, "tail": 19, "window": 4},
    "window of one": {"tail": 18, "window": 1},
    "not causal": {"query_len": 3, "tail": 7, "causal": False},
    "not causal, tail shorter than the query": {"query_len": 5, "tail": 2, "causal": False},
    "not causal, window": {"query_len": 3, "tail": 40, "causal": False, "window": 17},
    "ragged": {"blocks": ((None, [17, 0, 1, 40]),)},
    "ragged without beta or tail": {"blocks": ((None, [3, 18, 33, 2]),), "beta": False, "tail": 0},
    "one head sees nothing": {"blocks": ((None, [17, 0, 1, 40]),), "tail": 0},
    "ragged and shared": {"blocks": ((1, [29, 3]),), "batch": 3},
    "two blocks": {"blocks": ((None, 19), (None, 33))},
    "three blocks of each kind": {"blocks": ((1, 19), (None, 33), (None, [5, 0, 21, 2])), "batch": 2},
    "shared": {"blocks": ((1, 45),), "batch": 5, "tail": 4},
    "shared, no tail": {"blocks": ((1, 45),), "batch": 5, "tail": 0},
    "shared, three queries": {"blocks": ((1, 35),), "batch": 3, "query_len": 3, "tail": 8, "mask": True},
    "head dim 80": {"head_dim": 80},
    "head dim 96": {"head_dim": 96, "query_len": 2},
    "head dim 128": {"head_dim": 128, "kv_heads": 1},
    "head dim 256": {"head_dim": 256, "kv_heads": 1, "batch": 1},
    "head dim 8": {"head_dim": 8},
}


def ragged_offsets(lengths, device):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int64, device=device)


def make_inputs(
    device,
    dtype=torch.float16,
    batch=2,
    kv_heads=2,
    group=3,
    query_len=1,
    head_dim=64,
    blocks=((None, 37),),
    tail=5,
    beta=True,
    mask=False,
    causal=True,
    window=-1,
    off=0.0,
    poison=True,
    pad=3,
):
    """Normalised arguments of compact_attention.

    ``blocks``: per block ``(Bk, slots)``, Bk None for the batch size; slots may be a list of lengths, one per head: ragged.
    ``off``: the share of slots whose beta is -inf. ``pad``: of the poison around each tensor; 8 keeps rows on 16 bytes.
    """

    def wrap(x):
        return poisoned(x, pad) if poison else x

    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    keys, values, betas, offsets = [], [], [], []
    for block_batch, slots in blocks:
        if isinstance(slots, int):
            shape = (block_batch or batch, kv_heads, slots)
            offsets.append(None)
        else:
            shape = (sum(slots),)
            offsets.append(ragged_offsets(slots, device))
        keys.append(wrap(randn(*shape, head_dim)))
        values.append(wrap(randn(*shape, head_dim)))
        bias = torch.randn(shape, device=device)
        bias = bias.masked_fill(torch.rand(shape, device=device) < off, float("-inf"))
        betas.append(wrap(bias) if beta else None)
    tail_keys = tail_values = tail_mask = None
    if tail:
        tail_keys, tail_values = (wrap(randn(batch, kv_heads, tail, head_dim)) for _ in range(2))
    if tail and mask:
        # Left padding, a different amount in each request, and a hole.
        tail_mask = torch.arange(tail, device=device) >= torch.arange(batch, device=device)[:, None] * (tail // 3 + 1)
        tail_mask[0, tail // 2] = False
        hidden = ~tail_mask[:, None, :, None]
        tail_keys.masked_fill_(hidden, float("nan"))
        tail_values.masked_fill_(hidden, float("nan"))
    query = wrap(randn(batch, kv_heads * group, query_len, head_dim))
    scale = head_dim**-0.5
    return (query, keys, values, betas, offsets, tail_keys, tail_values, tail_mask, scale, causal, window, kv_heads)


def convert(args, dtype):
    """The same arguments with tensors of another dtype, and zeros where hidden tail tokens were poisoned."""
    query, keys, values, betas, offsets, tail_keys, tail_values, tail_mask, *rest = args
    acc = reference.accumulation_dtype(dtype)

    def clean(x):
        if x is None:
            return None
        return (x if tail_mask is None else x.masked_fill(~tail_mask[:, None, :, None], 0.0)).to(dtype)

    return (
        query.to(dtype),
        [k.to(dtype) for k in keys],
        [v.to(dtype) for v in values],
        [None if b is None else b.to(acc) for b in betas],
        offsets,
        clean(tail_keys),
        clean(tail_values),
        tail_mask,
        *rest,
    )


def check_forward(actual, args):
    """Compares ``(out, lse)`` with the fp64 reference under the error budget."""
    truth = reference.compact_attention(*convert(args, torch.float64))
    naive = reference.compact_attention(*convert(args, args[0].dtype))
    assert actual[0].dtype == args[0].dtype and actual[1].dtype == torch.float32
    assert_within_budget(actual[0], naive[0], truth[0], name="out")
    assert_within_budget(actual[1], naive[1], truth[1], name="lse")


def gradients(args, grad_out, grad_lse, dtype):
    """Gradients by autograd through the reference in ``dtype``: a flat list in the order of the op's backward pass."""
    query, keys, values, betas, offsets, tail_keys, tail_values, *rest = convert(args, dtype)
    leaves = [query, *keys, *values, *betas, tail_keys, tail_values]
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    n = len(keys)
    out, lse = reference.compact_attention(
        leaves[0],
        leaves[1 : 1 + n],
        leaves[1 + n : 1 + 2 * n],
        leaves[1 + 2 * n : 1 + 3 * n],
        offsets,
        *leaves[1 + 3 * n :],
        *rest,
    )
    wanted = [x for x in leaves if x is not None]
    found = iter(
        torch.autograd.grad([out, lse], wanted, [grad_out.to(out.dtype), grad_lse.to(lse.dtype)], allow_unused=True)
    )
    return [None if x is None else next(found) for x in leaves]


def check_backward(run_forward, run_backward, args):
    """Compares all gradients with fp64 autograd under the error budget of gradients."""
    out, lse = run_forward(*args)
    grad_out = torch.randn_like(out)
    grad_lse = torch.randn_like(lse).masked_fill(lse == float("-inf"), 0.0)
    dq, dk, dv, db, dtk, dtv = run_backward(grad_out, grad_lse, out, lse, *args)
    actual = [dq, *dk, *dv, *db, dtk, dtv]
    truth = gradients(args, grad_out, grad_lse, torch.float64)
    naive = gradients(args, grad_out, grad_lse, args[0].dtype)
    n = len(args[1])
    names = ["query", *(f"{x}[{i}]" for x in ("keys", "values", "beta") for i in range(n)), "tail_keys", "tail_values"]
    for name, got, want, peer in zip(names, actual, truth, naive):
        if want is None:
            assert got.numel() == 0, name
        elif want.numel():
            assert_within_budget(got, peer, want, factor=3.0, name=f"gradient of {name}")
        else:
            assert got.shape == want.shape
