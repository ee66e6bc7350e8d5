# SPDX-License-Identifier: Apache-2.0
"""Tables of addresses on their way to a device: what a captured graph will copy again stays as it was."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from kvcompact_kernels.backends.triton import runtime

DEVICE = SimpleNamespace(type="cuda")


@pytest.fixture
def stream(monkeypatch):
    """A device whose copies are tensors of the CPU, and a stream that may be captured; copies are noted with their source."""
    state = SimpleNamespace(capturing=False, sources=[])
    empty = torch.empty

    def copy(tensor, device, non_blocking):
        assert non_blocking
        state.sources.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options).fill_(-1))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    monkeypatch.setattr(runtime, "_ARENA", [])
    return state


def rows(count, first):
    return [[first + 16 * i + j for j in range(16)] for i in range(count)]


def test_the_first_call_must_not_be_captured(stream):
    stream.capturing = True
    with pytest.raises(RuntimeError, match="must run once before it is captured"):
        runtime.device_table(rows(2, 0), DEVICE)


def test_a_graph_keeps_its_table(stream):
    assert runtime.device_table(rows(3, 1 << 47), DEVICE).tolist() == rows(3, 1 << 47)
    stream.capturing = True
    for first in (1000, 2000):
        assert runtime.device_table(rows(3, first), DEVICE).tolist() == rows(3, first)
    stream.capturing = False
    runtime.device_table(rows(3, 3000), DEVICE)
    # a replay reads the host's memory again
    assert [x.tolist() for x in stream.sources[1:3]] == [rows(3, 1000), rows(3, 2000)]
    arena = runtime._ARENA[0].untyped_storage().data_ptr()
    assert [x.untyped_storage().data_ptr() == arena for x in stream.sources] == [False, True, True, False]


def test_a_full_arena_is_an_error_and_stays_whole(stream, monkeypatch):
    monkeypatch.setattr(runtime, "ARENA_BYTES", 8 * 16 * 4)
    runtime.device_table(rows(1, 0), DEVICE)
    stream.capturing = True
    runtime.device_table(rows(3, 100), DEVICE)
    with pytest.raises(RuntimeError, match="which is full"):
        runtime.device_table(rows(2, 200), DEVICE)
    assert runtime.device_table(rows(1, 300), DEVICE).tolist() == rows(1, 300)
    assert stream.sources[1].tolist() == rows(3, 100)
