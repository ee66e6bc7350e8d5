# SPDX-License-Identifier: Apache-2.0
"""The gradients' kernels against fp64 autograd: in the interpreter without a GPU, compiled with one."""

import pytest
import torch
from triton_cases import DEVICES, INTERPRETED, check_backward, far_apart, make_inputs

pytest.importorskip("triton")
from kvcompact_kernels.backends.triton import compact_attention as backend
from kvcompact_kernels.backends.triton.runtime import Config
from kvcompact_kernels.testing.draws import draws

pytestmark = pytest.mark.parametrize("device", DEVICES)
# More rows than keys in a tile and the other way round; both with remainders.
TILES = Config(BM=32, BN=16, warps=4, stages=2)

CASES = {
    "one query": {},
    "no beta": {"beta": False, "query_len": 3, "tail": 7},
    "group 7": {"group": 7, "kv_heads": 1, "query_len": 9, "tail": 12},
    # Of few slots the naive gradient of beta is exact, and ours carries the rounding of the saved output.
    "one slot": {"blocks": ((None, 1),), "tail": 1, "beta": False},
    "one slot, no tail": {"blocks": ((None, 1),), "tail": 0, "beta": False},
    "no slots": {"blocks": ((None, 0),), "tail": 9, "query_len": 4},
    "only a tail": {"blocks": (), "tail": 41, "query_len": 41, "batch": 1},
    "padded tail": {"tail": 23, "mask": True, "query_len": 20, "batch": 3, "kv_heads": 1},
    "some slots off": {"off": 0.4, "query_len": 5, "tail": 5},
    "all slots off": {"off": 1.0, "tail": 0},
    "window": {"query_len": 25, "tail": 49, "window": 10, "batch": 1},
    "not causal": {"query_len": 21, "tail": 40, "causal": False, "window": 17, "batch": 1},
    "not causal, short tail": {"query_len": 21, "tail": 7, "causal": False, "window": 5, "batch": 1},
    "older tail": {"query_len": 13, "tail": 60, "batch": 1},
    "ragged": {"blocks": ((None, [17, 0, 1, 70]),), "query_len": 3},
    "ragged and shared": {"blocks": ((1, [29, 3]),), "batch": 3, "query_len": 3},
    "shared": {"blocks": ((1, 37),), "batch": 3, "query_len": 11, "tail": 11},
    "ragged and shared, more rows": {"blocks": ((1, [70, 33]),), "batch": 2, "query_len": 25, "tail": 25},
    "three blocks of each kind": {"blocks": ((1, 19), (None, 33), (None, [5, 0, 21, 2])), "query_len": 2},
    "head dim 96": {"head_dim": 96, "kv_heads": 1, "query_len": 6, "tail": 8},
    "head dim 256": {"head_dim": 256, "kv_heads": 1, "batch": 1, "query_len": 6, "tail": 8},
}


@pytest.mark.parametrize("name", CASES)
@draws(3)
def test_gradients(device, name):
    check_backward(backend.forward, lambda *a: backend.backward(*a, config=TILES), make_inputs(device, **CASES[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@draws(3)
def test_dtypes(device, dtype):
    args = make_inputs(device, dtype, query_len=7, blocks=((None, 50), (1, 20)), tail=9)
    check_backward(backend.forward, backend.backward, args)


@draws(3)
def test_gradients_are_written_in_full(device, monkeypatch):
    real = torch.empty

    def poisoned_empty(*shape, **kwargs):
        x = real(*shape, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    args = make_inputs(device, blocks=((None, [17, 0, 1, 40]), (1, 33)), tail=11, mask=True, query_len=4)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    check_backward(backend.forward, lambda *a: backend.backward(*a, config=TILES), args)


@pytest.mark.parametrize("tiles", [TILES, Config(BM=16, BN=64, warps=4, stages=2)])  # offsets of a tile, or inside it
@pytest.mark.parametrize("far", ["tokens", "requests"])
@draws(3)
def test_offsets_beyond_31_bits(device, far, tiles):
    batch, rows = (1, 34) if far == "tokens" else (2, 20)
    sizes = {"batch": batch, "kv_heads": 2, "blocks": ((None, rows),), "tail": rows, "query_len": 3, "poison": False}
    args = list(make_inputs(device, torch.float16, **sizes))
    keys, values, *tail = far_apart(far, args[1][0], args[2][0], *args[5:7])
    args[1:3], args[5:7] = ([keys], [values]), tail
    check_backward(backend.forward, lambda *a: backend.backward(*a, config=tiles), args)


def test_a_query_without_rows(device):
    args = list(make_inputs(device, poison=False))
    args[0] = args[0][:, :, :0]
    out, lse = backend.forward(*args)
    dq, (dk,), (dv,), (db,), dtk, dtv = backend.backward(out, lse, out, lse, *args)
    assert dq.shape == args[0].shape
    assert all(not x.any() for x in (dk, dv, db, dtk, dtv))


def test_autograd_of_the_public_op(device):
    """The op's own registration: forward, autograd and the choice of the backward kernels by device."""
    if INTERPRETED:
        pytest.skip("on CPU tensors the registered op is the native one")
    from kvcompact_kernels.backends.cpu import library
    from kvcompact_kernels.ops import compact_attention

    if not library.available()[0]:
        pytest.skip(library.available()[1])
    args = make_inputs(device, query_len=5, tail=9, poison=False)
    leaves = [args[0], *args[1], *args[2], *args[3], args[5], args[6]]

    def gradients(backend_name):
        q, k, v, b, tk, tv = (x.detach().clone().requires_grad_() for x in leaves)
        out = compact_attention(q, k, v, b, tail_keys=tk, tail_values=tv, backend=backend_name)
        torch.manual_seed(1)
        return torch.autograd.grad(out, [q, k, v, b, tk, tv], torch.randn_like(out))

    for got, want in zip(gradients("triton"), gradients("torch")):
        assert (got - want).norm() < 0.02 * want.norm()
