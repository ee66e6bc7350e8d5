# SPDX-License-Identifier: Apache-2.0
"""Gradients of queries over a block and their causal tail: the backward pass alone, against SDPA's without a bias at equal
operations (as in ``prefill``; FlexAttention's too, which here gets no gradient of the bias).

Operations are 2.5 times the forward pass's: five products instead of two.
"""

from __future__ import annotations

from dataclasses import replace

import routes
import torch
from bench_compact_attention import MODELS, Case, Inputs
from decode import shape_of, tiny
from lab import Bench, Goal, Work
from torch import Tensor

from kvcompact_kernels.ops import compact_attention
from kvcompact_kernels.reference import compact_attention as reference
from kvcompact_kernels.testing.budget import assert_within_budget

CASES = [
    Case("Qwen3-4B", 1, slots, rows, torch.bfloat16, query_len=rows) for rows, slots in ((2048, 4096), (4096, 4096))
]
CASES.append(Case("Qwen3-4B", 8, 4096, 128, torch.bfloat16, query_len=128, shared=True))
NAMES = ("query", "keys", "values", "beta", "tail_keys", "tail_values")


def leaves_of(inputs: Inputs) -> list[Tensor]:
    found = (inputs.query, inputs.keys, inputs.values, inputs.beta, *inputs.tail)
    return [x.detach().requires_grad_() for x in found]


def forward(leaves: list[Tensor], backend: str) -> Tensor:
    q, k, v, beta, tail_keys, tail_values = leaves
    return compact_attention(q, k, v, beta, tail_keys=tail_keys, tail_values=tail_values, backend=backend)


def backward_of(out: Tensor, leaves: list[Tensor], grad: Tensor):
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def check(case: Case, inputs: Inputs, grad: Tensor, got: tuple[Tensor, ...]) -> None:
    """The budget of gradients, of one KV head (of the whole batch, over which a shared block's gradients are sums)."""
    heads, kv_heads, _ = MODELS[case.model]
    h = int(torch.randint(kv_heads, ()))
    group = heads // kv_heads
    mine, one = slice(h * group, (h + 1) * group), slice(h, h + 1)
    batches = [slice(0, case.batch)] if case.shared else [slice(b, b + 1) for b in range(min(case.batch, 2))]
    for rows in batches:
        block = slice(0, 1) if case.shared else rows
        parts = [x[rows, mine] for x in (inputs.query,)]
        parts += [x[block, one] for x in (inputs.keys, inputs.values, inputs.beta)]
        parts += [x[rows, one] for x in inputs.tail]
        where = [(rows, mine), *[(block, one)] * 3, *[(rows, one)] * 2]
        naive, truth = (_reference(parts, grad[rows, mine], wide) for wide in (False, True))
        for name, place, x, y, z in zip(NAMES, where, got, naive, truth):
            assert_within_budget(x[place], y, z, factor=3.0, name=f"gradient of {name}")


def _reference(parts: list[Tensor], grad: Tensor, wide: bool) -> tuple[Tensor, ...]:
    leaves = [(x.double() if wide else x).detach().requires_grad_() for x in parts]
    q, k, v, beta, *tail = leaves
    out, _ = reference.compact_attention(q, [k], [v], [beta], [None], *tail, None, q.shape[-1] ** -0.5)
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


def measure(bench: Bench, case: Case) -> None:
    inputs = Inputs(case, bench.device)
    grad = torch.randn_like(inputs.query)
    leaves = leaves_of(inputs)
    with torch.enable_grad():
        found = bench.kernels("compact_attention", lambda name: forward(leaves, name))
        # all forward kernels share one backward pass: that of the first that has one
        name = "triton" if "triton" in found else next(iter(found))
        ours = {name: backward_of(forward(leaves, name), leaves, grad)}
        bench.verify(check, case, inputs, grad, ours[name]())
        peers = {}
        if not case.shared:
            peers = unbiased_backward(case, inputs, grad, bench.smoke)
        times = bench.time(ours, peers, graphs=False)
    # the peers' operations are equal by construction; bytes do not bind
    bench.record(
        "compact_attention",
        f"backward {shape_of(case)} q{case.query_len}",
        case.dtype,
        times,
        ours,
        Work(3.0 * case.bytes_read(), 2.5 * case.operations()),
        groups={"best SDPA without a bias": routes.UNBIASED},
        goals=[Goal("ratio", 0.70, "best SDPA without a bias")],
    )


def unbiased_backward(case: Case, inputs: Inputs, grad: Tensor, smoke: bool) -> dict:
    """Backward passes of SDPA's backends at equal operations, and of FlexAttention; those that do not run raise when called."""

    def lazy(make):
        made = []

        def call():
            if not made:  # the forward pass is made once, when the route is first tried, and kept
                made.append(make())
            out, leaves, gradient = made[0]
            return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

        return call

    def sdpa_graph(name: str):
        def make():
            with torch.no_grad():
                k, v, keys = *inputs.peer_layout(case)[:2], case.slots + max(1, round((case.query_len + 1) / 2))
                q = routes.packed(inputs.query, k.shape[1])
                leaves = [x.contiguous().requires_grad_() for x in (q.clone(), k[:, :, :keys], v[:, :, :keys])]
            with torch.enable_grad():
                out = routes.sdpa(name, *leaves)()
            return out, leaves, grad.view(out.shape)

        return make

    def flex_graph():
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # a graph that is kept cannot give its buffers away
        with torch.no_grad():
            k, v, bias = inputs.peer_layout(case)
            beta = bias[:, :, 0].float()
            beta[:, :, : case.slots] = inputs.beta
            leaves = [x.clone().requires_grad_() for x in (inputs.query, k, v)]
        with torch.enable_grad():
            out = routes.flex_prefill(*leaves, beta, case.slots, smoke)()
        return out, leaves, grad

    return {f"sdpa {name}": lazy(sdpa_graph(name)) for name in routes.BACKENDS} | {"flex + beta": lazy(flex_graph)}


def run(bench: Bench) -> None:
    for case in CASES:
        if bench.smoke:
            case = tiny(replace(case, batch=min(case.batch, 2)))
        bench.attempt(f"backward, {shape_of(case)}", measure, bench, case)
