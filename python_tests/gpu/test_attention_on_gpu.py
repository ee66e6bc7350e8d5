# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of compact attention and key scores: the picked tiles at real sizes, races, graphs, compile."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from triton_cases import check_backward, check_forward, make_inputs

from kvcompact_kernels import explain
from kvcompact_kernels.backends.cpu import library
from kvcompact_kernels.backends.triton import compact_attention as backend
from kvcompact_kernels.backends.triton import key_scores as scores_backend
from kvcompact_kernels.ops import compact_attention, key_scores
from kvcompact_kernels.reference.key_scores import key_scores as scores_reference
from kvcompact_kernels.testing.budget import assert_within_budget
from kvcompact_kernels.testing.memory import requested_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_library = pytest.mark.skipif(not library.available()[0], reason="the op's schema comes with the native library")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = {
    "decode, 4k slots": {"batch": 4, "kv_heads": 8, "group": 4, "blocks": ((None, 4096),), "tail": 77},
    "decode, odd": {"batch": 3, "kv_heads": 5, "group": 7, "blocks": ((None, 1021),), "tail": 13, "mask": True},
    "decode, batch 1": {"batch": 1, "kv_heads": 8, "group": 4, "blocks": ((None, 16001),), "tail": 1},
    "decode, group 3": {"batch": 2, "kv_heads": 3, "group": 3, "blocks": ((None, 513),), "off": 0.2},
    "eight queries": {"batch": 2, "kv_heads": 4, "group": 8, "query_len": 8, "blocks": ((None, 700),), "tail": 300},
    "ragged": {"batch": 2, "kv_heads": 4, "blocks": ((None, [900, 0, 17, 3000, 1, 64, 128, 65]),), "tail": 40},
    "shared by 70": {"batch": 70, "kv_heads": 2, "group": 4, "blocks": ((1, 1030),), "tail": 33, "mask": True},
    "blocks of each kind": {
        "batch": 4,
        "kv_heads": 2,
        "blocks": ((1, 513), (None, 1000), (1, [70, 900])),
        "tail": 20,
    },
    "prefill": {"batch": 1, "kv_heads": 2, "group": 4, "query_len": 513, "blocks": ((None, 700),), "tail": 513},
    "prefill, window": {"batch": 2, "kv_heads": 2, "query_len": 300, "blocks": ((1, 257),), "tail": 900, "window": 130},
    "prefill, padded": {"batch": 2, "kv_heads": 2, "query_len": 257, "tail": 257, "mask": True},
    "prefill, not causal": {"batch": 1, "kv_heads": 1, "query_len": 200, "tail": 150, "causal": False},
}
TRAINED = [name for name in SHAPES if name != "decode, batch 1"]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_forward(name, dtype, head_dim):
    args = make_inputs("cuda", dtype, head_dim=head_dim, **SHAPES[name])
    check_forward(backend.forward(*args), args)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRAINED)
def test_backward(name, dtype, head_dim):
    args = make_inputs("cuda", dtype, head_dim=head_dim, **SHAPES[name])
    check_backward(backend.forward, backend.backward, args)


@pytest.mark.parametrize("name", SHAPES)
def test_fifty_runs_are_equal_bit_for_bit(name):
    """A race shows as a result that moves."""
    args = make_inputs("cuda", torch.bfloat16, head_dim=128, **SHAPES[name])

    def everything():
        out, lse = backend.forward(*args)
        dq, dk, dv, db, dtk, dtv = backend.backward(torch.ones_like(out), torch.ones_like(lse), out, lse, *args)
        return [out, lse, dq, *dk, *dv, *db, dtk, dtv]

    first = everything()
    for _ in range(49):
        assert all(torch.equal(x, y) for x, y in zip(first, everything()))


@pytest.mark.parametrize("name", SHAPES)
def test_graph_capture(name):
    """A captured call reads its inputs where they are: it follows new values, and waits for nothing on the host."""
    args = make_inputs("cuda", torch.bfloat16, head_dim=128, **SHAPES[name])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        backend.forward(*args)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = backend.forward(*args)
    for x in (args[0], *args[1], *args[2]):
        x.copy_(torch.randn_like(x))
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    check_forward((out, lse), args)


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_waits_for_the_device(name):
    args = make_inputs("cuda", torch.bfloat16, head_dim=64, **SHAPES[name])
    out, lse = backend.forward(*args)
    backend.backward(out, lse, out, lse, *args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = backend.forward(*args)
        backend.backward(out, lse, out, lse, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_the_outputs_and_one_workspace():
    args = make_inputs("cuda", torch.bfloat16, head_dim=128, poison=False, **SHAPES["decode, batch 1"])
    backend.forward(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested_bytes()
    out, lse = backend.forward(*args)
    torch.cuda.synchronize()
    rows, parts = lse.numel(), backend.MAX_SPLITS
    allowed = out.nbytes + lse.nbytes + parts * rows * (out.shape[-1] + 1) * 4
    assert requested_bytes("peak") - before <= allowed


@needs_library
def test_auto_takes_the_kernels_and_gradients_flow():
    args = make_inputs("cuda", torch.bfloat16, head_dim=64, poison=False, query_len=70, tail=90)
    leaves = [args[0], *args[1], *args[2], *args[3], args[5], args[6]]

    def gradients(name):
        q, k, v, b, tk, tv = (x.detach().clone().requires_grad_() for x in leaves)
        out, lse = compact_attention(q, k, v, b, tail_keys=tk, tail_values=tv, return_lse=True, backend=name)
        return torch.autograd.grad([out.float().sum() + (lse * lse).sum()], [q, k, v, b, tk, tv])

    assert explain("compact_attention", leaves[0], leaves[1], leaves[2], leaves[3]).chosen == "triton"
    for got, want in zip(gradients("auto"), gradients("torch")):
        assert (got - want).norm() < 0.03 * want.norm()


@needs_library
def test_opcheck_and_compile():
    args = make_inputs("cuda", torch.float16, head_dim=64, poison=False, query_len=3, tail=9)
    torch.library.opcheck(torch.ops.kvcompact.compact_attention.default, args)

    def call(q, k, v, b):
        return compact_attention(q, k, v, b, return_lse=True, backend="triton")

    inputs = (args[0], args[1][0], args[2][0], args[3][0])
    for got, want in zip(torch.compile(call, fullgraph=True)(*inputs), call(*inputs)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 4, 700, 700), (2, 3, 3, 33, 2049), (1, 2, 7, 1, 1500)])
def test_key_scores(shape, dtype, head_dim):
    batch, kv_heads, group, query_len, key_len = shape
    query = torch.randn(batch, kv_heads * group, query_len, head_dim, device="cuda").to(dtype)
    keys = torch.randn(batch, kv_heads, key_len, head_dim, device="cuda").to(dtype)
    scale = head_dim**-0.5
    for reduce in ("sum", "max"):
        first = scores_backend.forward(query, keys, None, scale, True, reduce)
        truth = scores_reference(query.double(), keys.double(), None, scale, True, reduce)
        assert_within_budget(first, scores_reference(query, keys, None, scale, True, reduce), truth)
        for _ in range(49):
            assert torch.equal(first, scores_backend.forward(query, keys, None, scale, True, reduce))


@needs_library
def test_key_scores_need_little_memory():
    """Nothing of size ``Lq x T``: 16k queries and keys would be 4 GiB of fp32 probabilities for these heads."""
    query = torch.randn(1, 4, 16384, 64, device="cuda", dtype=torch.bfloat16)
    keys = torch.randn(1, 2, 16384, 64, device="cuda", dtype=torch.bfloat16)
    key_scores(query, keys, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = requested_bytes()
    scores = key_scores(query, keys, backend="triton")
    assert requested_bytes("peak") - before < 16 << 20
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores.sum(), torch.tensor(4.0 * 16384, device="cuda"), rtol=1e-3, atol=0)
