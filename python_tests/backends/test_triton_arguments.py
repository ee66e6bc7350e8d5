# SPDX-License-Identifier: Apache-2.0
"""What a launch's arguments make Triton compile anew, and what of choosing a backend Dynamo is not to trace."""

import importlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from kvcompact_kernels.backends.triton import runtime

MODULES = (
    "attention_forward",
    "attention_backward",
    "key_scores",
    "pack",
    "still_cross_attention",
    "still_backward",
)


@pytest.mark.parametrize("module", MODULES)
def test_sizes_are_not_specialised(module):
    """Triton compiles anew for an integer that is 1 or a multiple of 16, unless it is told not to: numbers of tokens, slots,
    heads and the like are. Left are pointers, floating-point numbers, and strides, which follow the head dimension."""
    found = importlib.import_module(f"kvcompact_kernels.backends.triton.kernels.{module}")
    kernels = [f for f in vars(found).values() if isinstance(f, JITFunction) and f.do_not_specialize]
    if not kernels:
        pytest.skip("the interpreter compiles nothing")
    for kernel in kernels:
        names = [p.name for p in kernel.params if not p.is_constexpr and p.name not in kernel.do_not_specialize]
        numbers = [n for n in names if not n[0].isupper() and not n.endswith(("scale", "eps"))]
        assert all(n.startswith("s_") for n in numbers), (kernel.__name__, numbers)


@pytest.mark.parametrize("said", [None, "too old"])
def test_what_asks_the_device_is_not_traced(monkeypatch, said):
    """On a GPU the answer comes from the driver; a compiled call takes it as a constant."""
    monkeypatch.setattr(runtime, "triton_problem", lambda: SimpleNamespace(said=None).said)
    monkeypatch.setattr(runtime, "device_problem", lambda index: SimpleNamespace(said=said).said)

    def chosen(x):
        return x + (1 if runtime._machine_problem(0) is None else 2)

    torch.compiler.reset()
    found = torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(1))
    assert found.item() == (1 if said is None else 2)
