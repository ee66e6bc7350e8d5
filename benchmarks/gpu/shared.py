# SPDX-License-Identifier: Apache-2.0
"""One block that a whole batch shares, read once: against the same kernel over copies, and against PyTorch's routes.

``stacked`` is the trick in PyTorch: the queries of all requests as the rows of one, which no tail allows.
"""

from __future__ import annotations

import copy
from functools import partial

import routes
import torch
from bench_compact_attention import Case, Inputs, check, kernel
from decode import shape_of, tiny, work_of
from lab import Bench, Goal, Work

CASES = [
    Case("Qwen3-4B", 256, 4096, 0, torch.bfloat16, shared=True),
    Case("Qwen3-4B", 256, 4096, 128, torch.bfloat16, shared=True),
    Case("Qwen3-4B", 32, 16384, 64, torch.bfloat16, shared=True),
]
MOST_COPIED = 12e9  # bytes of the block's copies for the routes that need them


def measure(bench: Bench, case: Case) -> None:
    inputs = Inputs(case, bench.device)
    ours = bench.kernels("compact_attention", lambda name: kernel(inputs, backend=name))
    ours = bench.right(ours, partial(check, case, inputs))
    peers, works = {}, {}
    if case.bytes_of_copies() <= MOST_COPIED:
        copies = copy.copy(inputs)
        copies.keys, copies.values, copies.beta = (
            x.expand(case.batch, *x.shape[1:]).contiguous() for x in (inputs.keys, inputs.values, inputs.beta)
        )
        peers |= {f"{name} unshared": partial(kernel, copies, backend=name) for name in ours}
        if not case.tail:
            bias = inputs.beta.to(case.dtype).expand(case.batch, -1, -1)[:, :, None]
            peers |= routes.biased(inputs.query, copies.keys, copies.values, bias)
            peers |= routes.unbiased(inputs.query, copies.keys, copies.values)
        works = dict.fromkeys(peers, Work(case.bytes_of_copies(), case.operations()))
    if not case.tail:
        stacked = inputs.query.transpose(0, 1).reshape(1, inputs.query.shape[1], case.batch, -1)
        bias = inputs.beta.to(case.dtype)[:, :, None]
        more = routes.unbiased(stacked, inputs.keys, inputs.values)
        more |= routes.biased(stacked, inputs.keys, inputs.values, bias)
        peers |= {f"stacked {name}": call for name, call in more.items()}
    goals = [Goal("percent", 60), *(Goal("ratio", 20, f"{name} unshared", name) for name in ours)]
    bench.record(
        "compact_attention",
        f"decode {shape_of(case)}",
        case.dtype,
        bench.time(ours, peers),
        ours,
        work_of(case),
        works=works,
        groups={"best route with a bias": [n for n in peers if n.endswith("+ bias")]},
        goals=goals,
    )


def run(bench: Bench) -> None:
    for case in CASES:
        case = tiny(case, batch=5) if bench.smoke else case
        bench.attempt(f"shared block, {shape_of(case)}", measure, bench, case)
