# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of the CUDA kernel of compact attention: real instructions and sizes, races, graphs, memory."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from triton_cases import DECODE, check_forward, make_inputs

from kvcompact_kernels import BackendUnavailableError, explain
from kvcompact_kernels.backends.cuda import compact_attention as backend
from kvcompact_kernels.backends.cuda import library
from kvcompact_kernels.backends.triton import compact_attention as triton
from kvcompact_kernels.ops import compact_attention
from kvcompact_kernels.testing.draws import draws
from kvcompact_kernels.testing.memory import requested_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not library.available()[0], reason=library.available()[1] or "the CUDA library is there"),
]
DTYPES = [torch.bfloat16, torch.float16]
SMALL = [name for name, case in DECODE.items() if case.get("head_dim", 64) in backend.HEAD_DIMS]
REAL = {
    "4k slots": {"batch": 4, "kv_heads": 8, "group": 4, "blocks": ((None, 4096),), "tail": 77},
    "odd": {"batch": 3, "kv_heads": 5, "group": 7, "blocks": ((None, 1021),), "tail": 13, "mask": True},
    "batch 1": {"batch": 1, "kv_heads": 8, "group": 4, "blocks": ((None, 16001),), "tail": 1},
    "group 3, slots off": {"batch": 2, "kv_heads": 3, "group": 3, "blocks": ((None, 513),), "off": 0.2},
    "sixteen queries": {"batch": 2, "kv_heads": 4, "group": 8, "query_len": 16, "blocks": ((None, 700),), "tail": 300},
    "window": {"batch": 2, "kv_heads": 2, "query_len": 5, "blocks": ((None, 257),), "tail": 900, "window": 130},
    "ragged": {"batch": 2, "kv_heads": 4, "blocks": ((None, [900, 0, 17, 3000, 1, 64, 128, 65]),), "tail": 40},
    "shared by 70": {"batch": 70, "kv_heads": 2, "group": 4, "blocks": ((1, 1030),), "tail": 33, "mask": True},
    "blocks of each kind": {"batch": 4, "kv_heads": 2, "blocks": ((1, 513), (None, 1000), (1, [70, 900])), "tail": 20},
    "only a long tail": {"batch": 2, "kv_heads": 4, "group": 4, "blocks": (), "tail": 5000},
}


def inputs(dtype=torch.bfloat16, **case):
    return make_inputs("cuda", dtype, **{"pad": 8, **case})


@pytest.fixture
def decode():
    """``decode(*args, splits=0)``, with NaN in what torch allocates for it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield lambda *args, splits=0: torch.ops.kvcompact.compact_attention_decode(*args, splits)
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
@draws(2)
def test_small(decode, name, dtype):
    args = inputs(dtype, **DECODE[name])
    for splits in (0, 1, 3, 37):
        check_forward(decode(*args, splits=splits), args)


@pytest.mark.parametrize("head_dim", backend.HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REAL)
@draws(2)
def test_real_sizes(decode, name, dtype, head_dim):
    args = inputs(dtype, head_dim=head_dim, **REAL[name])
    assert backend.supports(*args) is None
    check_forward(decode(*args), args)


@pytest.mark.parametrize("head_dim", backend.HEAD_DIMS)
@pytest.mark.parametrize("name", REAL)
def test_fifty_runs_are_equal_bit_for_bit(name, head_dim):
    """A race shows as a result that moves."""
    args = inputs(head_dim=head_dim, **REAL[name])
    first = backend.run(*args)
    for _ in range(49):
        assert all(torch.equal(x, y) for x, y in zip(first, backend.run(*args)))


def test_two_streams_do_not_meet():
    """Calls have no memory in common but their inputs."""
    args = inputs(head_dim=128, **REAL["batch 1"])
    wanted = backend.run(*args)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 2]):
            results.append(backend.run(*args))
    torch.cuda.synchronize()
    for found in results:
        assert all(torch.equal(x, y) for x, y in zip(found, wanted))


@pytest.mark.parametrize("name", REAL)
def test_graph_capture(name):
    """A captured call reads its inputs where they are: it follows new values, and waits for nothing on the host."""
    args = inputs(head_dim=128, **REAL[name])
    backend.run(*args)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = backend.run(*args)
    for x in (args[0], *args[1], *args[2]):
        x.copy_(torch.randn_like(x))
    out.fill_(float("nan"))
    lse.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    check_forward((out, lse), args)


@pytest.mark.parametrize("name", REAL)
def test_nothing_waits_for_the_device(name):
    args = inputs(**REAL[name])
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.run(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_the_outputs_and_one_workspace():
    args = inputs(head_dim=128, poison=False, **REAL["batch 1"])
    backend.run(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested_bytes()
    out, lse = backend.run(*args)
    torch.cuda.synchronize()
    most_splits = 128
    allowed = out.nbytes + lse.nbytes + most_splits * lse.numel() * (out.shape[-1] + 2) * 4
    assert requested_bytes("peak") - before <= allowed


@pytest.mark.parametrize("far", ["slots", "requests"])
def test_offsets_beyond_31_bits(far):
    batch, kv_heads, slots, dim = (1, 2, 34, 64) if far == "slots" else (2, 2, 20, 64)
    strides = (0, dim, 1 << 26, 1) if far == "slots" else (1 << 31, 2 * dim * slots, dim, 1)
    shape = (batch, kv_heads, slots, dim)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides)) + dim * kv_heads * slots
    args = list(inputs(batch=batch, kv_heads=kv_heads, blocks=((None, slots),), tail=0, poison=False))
    try:
        buffer = torch.empty(size, dtype=torch.bfloat16, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        pytest.skip(f"no room for {size} elements: {error}")
    for which, start in ((1, 0), (2, dim * kv_heads * (slots if far == "requests" else 1))):
        view = buffer.as_strided(shape, strides, start)
        view.copy_(args[which][0])
        args[which] = [view]
    check_forward(backend.run(*args), args)


def test_it_agrees_with_triton():
    if triton.runtime.triton_problem():
        pytest.skip(triton.runtime.triton_problem())
    for name, case in REAL.items():
        args = inputs(torch.float16, head_dim=128, **case)
        for got, wanted in zip(backend.run(*args), triton.forward(*args)):
            torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.01, msg=name)


def test_by_name_it_runs_or_says_why_not():
    args = inputs(poison=False, tail=9)
    call = {"beta": args[3], "tail_keys": args[5], "tail_values": args[6], "return_lse": True}
    out, lse = compact_attention(args[0], args[1], args[2], **call, backend="cuda")
    check_forward((out, lse), args)
    with pytest.raises(BackendUnavailableError, match="no backward pass"):
        compact_attention(args[0].clone().requires_grad_(), args[1], args[2], **call, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="needs bfloat16 or float16"):
        compact_attention(args[0].float(), args[1][0].float(), args[2][0].float(), backend="cuda")
    del call["return_lse"]
    reasons = explain("compact_attention", args[0], args[1], args[2], **call)
    assert reasons.chosen == "cuda" or "no measurement" in reasons.reasons["cuda"]


def test_compile():
    args = inputs(poison=False, head_dim=64, query_len=3, tail=9)
    torch.library.opcheck(torch.ops.kvcompact.compact_attention_decode.default, args)

    def call(q, k, v, b):
        return compact_attention(q, k, v, b, return_lse=True, backend="cuda")

    given = (args[0], args[1][0], args[2][0], args[3][0])
    for got, wanted in zip(torch.compile(call, fullgraph=True)(*given), call(*given)):
        assert torch.equal(got, wanted)
