# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks rest on, on a real GPU: the timer, the read probe, and that what they capture replays rightly."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu"), str(ROOT / "python_tests")]

from kvcompact_kernels.backends.cpu import library
from kvcompact_kernels.cache import CompactBlock, CompactCache
from kvcompact_kernels.ops import compact_attention, still_compaction, still_compaction_chunked
from kvcompact_kernels.rope import Rope
from kvcompact_kernels.still_config import StillConfig, init_still_parameters
from kvcompact_kernels.testing.draws import draws

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@draws(5)  # what other processes do on the GPU meanwhile is timed as well
def test_the_timer_sees_twice_the_work():
    from common import measure_cuda

    x = torch.randn(4096, 4096, device="cuda")
    functions = {"one": lambda: x @ x, "two": lambda: x @ x @ x}
    for graphs in (True, False):
        times = measure_cuda(functions, seconds=0.05, graphs=graphs)
        assert times["one"].how == ("graph" if graphs else "launches")
        assert 1.7 < times["two"].p50 / times["one"].p50 < 2.3


def test_what_cannot_be_captured_is_launched():
    from common import measure_cuda

    x = torch.ones(100, device="cuda")
    times = measure_cuda({"waits": lambda: x.sum().item(), "fine": lambda: x + 1}, seconds=0.01)
    assert (times["waits"].how, times["fine"].how) == ("launches", "graph")
    assert torch.equal(x + 1, torch.full_like(x, 2))


def test_the_read_probe_reads_everything():
    from peaks import CudaReadProbe

    probe = CudaReadProbe(size=64 << 20, sms=4)
    for way in probe.WAYS:
        size = probe.launch(*way)
        programs = 4 * way[2]
        read = probe.data[: size // 4].view(-1, programs, way[0])  # step, program, lane
        wanted = torch.zeros(programs, dtype=torch.int64, device="cuda")
        for bit in range(32):  # exclusive or, bit by bit: whether an odd number of words has it
            odd = ((read >> bit) & 1).sum((0, 2)) & 1
            wanted |= odd << bit
        got = probe.out[:programs].long() & 0xFFFFFFFF
        assert torch.equal(got, wanted), way


def test_temporary_bytes():
    from common import temporary_bytes

    x = torch.ones(1 << 20, device="cuda")
    assert temporary_bytes(lambda: (x + 1,), "cuda") == 0
    assert temporary_bytes(lambda: ((x + 1) * 2,), "cuda") == 4 << 20


def captured(function):
    """``(replay, outputs)`` of a graph of one call."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("shared", [False, True])
def test_layers_of_decoding_in_one_graph(backend, shared):
    """The public op, several layers one behind the other with blocks of their own, replayed on new queries."""
    batch, rand = 5, lambda *shape: torch.randn(*shape, device="cuda").bfloat16()
    blocks = [(rand(1 if shared else batch, 8, 777, 128), rand(1 if shared else batch, 8, 777, 128)) for _ in range(4)]
    tail = rand(batch, 8, 19, 128), rand(batch, 8, 19, 128)
    query = rand(batch, 32, 1, 128)

    def step():
        return [
            compact_attention(query, k, v, tail_keys=tail[0], tail_values=tail[1], backend=backend) for k, v in blocks
        ]

    with torch.no_grad():
        replay, outputs = captured(step)
        query.copy_(torch.randn_like(query))
        for x in outputs:
            x.fill_(float("nan"))
        for _ in range(20):
            replay()
        assert all(torch.equal(x, y) for x, y in zip(outputs, step()))


def test_two_streams_do_not_disturb_each_other():
    """Each call has a workspace of its own: calls on two streams at once give what they give alone."""
    rand = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()
    inputs = [(rand(1, 32, 1, 128), rand(1, 8, 9001, 128), rand(1, 8, 9001, 128)) for _ in range(2)]
    with torch.no_grad():
        alone = [compact_attention(*x) for x in inputs]
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in inputs], [[], []]
        for _ in range(30):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    results[i].append(compact_attention(*inputs[i]))
        torch.cuda.synchronize()
    for wanted, found in zip(alone, results):
        assert all(torch.equal(wanted, x) for x in found)


@pytest.mark.parametrize("chunk", [None, 256])
def test_still_of_several_layers_in_one_graph(chunk):
    config = StillConfig(slots=64, head_dim=64)
    rope = Rope(Rope.default(64).inv_freq.cuda())
    layers = []
    for _ in range(3):
        params = init_still_parameters(config, device="cuda", dtype=torch.bfloat16)
        params = {name: p + 0.05 * torch.randn_like(p) for name, p in params.items()}
        layers.append((*(torch.randn(1, 3, 1024, 64, device="cuda").bfloat16() for _ in range(2)), params))

    def compact():
        found = []
        for keys, values, params in layers:
            if chunk is None:
                found += still_compaction(keys, values, params, config, rope)
            else:
                found += still_compaction_chunked(keys, values, params, config, rope, chunk)
        return found

    with torch.no_grad():
        replay, outputs = captured(compact)
        layers[0][0].copy_(torch.randn_like(layers[0][0]))
        for x in outputs:
            x.fill_(float("nan"))
        replay()
        for x, y in zip(outputs, compact()):  # matrix products of libraries need not be equal to the bit
            assert (x.float() - y.float()).norm() < 0.01 * y.float().norm()


@pytest.mark.skipif(not library.available()[0], reason="the patched model uses the registered op")
def test_a_step_of_a_patched_model_in_a_graph():
    """One decoded token over a compact cache, replayed: the same logits as launched, and as through PyTorch's attention."""
    from tiny_models import tiny_ids, tiny_model

    from kvcompact_kernels import patch_model
    from kvcompact_kernels.patch.families import model_spec
    from kvcompact_kernels.patch.model import _state, new_session

    model = tiny_model("qwen3", dtype=torch.float32, head_dim=64).cuda()
    patch_model(model, method="snapkv")
    spec = model_spec(model)
    shape = (3, spec.num_kv_heads, 100, 64)
    blocks = [
        CompactBlock(*(torch.randn(shape, device="cuda") for _ in range(2)), torch.randn(shape[:3], device="cuda"))
        for _ in range(spec.num_layers)
    ]
    ropes = {kind: replace(r, inv_freq=r.inv_freq.cuda()) for kind, r in spec.ropes.items()}
    cache = CompactCache(blocks, 200, spec.fingerprint, ropes, method="random")
    session = new_session(model, _state(model), cache)
    ids = tiny_ids(3, 8).cuda()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=session, use_cache=True)
        session.functional = True
        token = ids[:, :1].contiguous()

        def step():
            return model(input_ids=token, past_key_values=session, use_cache=True).logits

        replay, logits = captured(step)
        token.copy_(tiny_ids(3, 1, seed=5).cuda())
        logits.fill_(float("nan"))
        replay()
        launched = step()
        assert (logits - launched).norm() < 1e-5 * launched.norm()
        _state(model).backend = "torch"
        other = step()
    assert (logits - other).norm() < 1e-3 * other.norm()
