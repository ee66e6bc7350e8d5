# SPDX-License-Identifier: Apache-2.0
"""Many queries over a block and their own causal tail.

The unbiased SDPA backends get as many floating-point operations as the kernel: the queries over ``slots + (Lq - 1) / 2`` keys,
all visible. They compute something else, so only their time counts. FlexAttention computes the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import routes
import torch
from bench_compact_attention import Case, Inputs, check, kernel
from decode import shape_of, tiny, work_of
from lab import Bench, Goal
from torch.nn.functional import scaled_dot_product_attention

SHAPES = [(2048, 4096), (8192, 16384), (512, 1024), (512, 16384), (8192, 1024)]  # queries, slots
CASES = [Case("Qwen3-4B", 1, slots, rows, torch.bfloat16, query_len=rows) for rows, slots in SHAPES]
CASES.append(Case("Gemma3-4B", 1, 4096, 2048, torch.bfloat16, query_len=2048))
LARGEST_MASK = 1e9  # bytes of a mask that holds bias and causality for every query head


def equal_work(case: Case, inputs: Inputs) -> dict:
    """SDPA without bias and mask over so many keys that the operations are the same."""
    keys = case.slots + max(1, round((case.query_len + 1) / 2))
    k, v = inputs.peer_layout(case)[:2]
    return routes.unbiased(inputs.query, k[:, :, :keys].contiguous(), v[:, :, :keys].contiguous())


def masked(case: Case, inputs: Inputs):
    """SDPA with bias and causality in one mask ``[B, H, Lq, S]``."""
    k, v, bias = inputs.peer_layout(case)
    group = inputs.query.shape[1] // k.shape[1]
    mask = bias.repeat_interleave(group, 1).expand(-1, -1, case.query_len, -1).contiguous()
    hidden = torch.ones(case.query_len, case.tail, dtype=torch.bool, device=mask.device).triu(1)
    mask[..., case.slots :].masked_fill_(hidden, float("-inf"))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return lambda: scaled_dot_product_attention(inputs.query, k, v, attn_mask=mask)


def measure(bench: Bench, case: Case) -> None:
    inputs = Inputs(case, bench.device)
    ours = bench.kernels("compact_attention", lambda name: kernel(inputs, backend=name))
    ours = bench.right(ours, partial(check, case, inputs))
    peers = equal_work(case, inputs)
    k, v, bias = inputs.peer_layout(case)
    beta = bias[:, :, 0].float()
    beta[:, :, : case.slots] = inputs.beta
    peers["flex + beta"] = routes.flex_prefill(inputs.query, k, v, beta, case.slots, bench.smoke)
    heads = inputs.query.shape[1]
    if case.batch * heads * case.query_len * k.shape[2] * case.dtype.itemsize <= LARGEST_MASK:
        peers["sdpa + mask"] = masked(case, inputs)
    expected = dict.fromkeys(("flex + beta", "sdpa + mask"), next(iter(ours.values()))())
    bench.record(
        "compact_attention",
        f"prefill {shape_of(case)} q{case.query_len}",
        case.dtype,
        bench.time(ours, peers, expected),
        ours,
        work_of(case),
        groups={"best SDPA without a bias": routes.UNBIASED},
        goals=[Goal("ratio", 0.85, "best SDPA without a bias"), Goal("ratio", 1.2, "flex + beta")],
    )


def run(bench: Bench) -> None:
    for case in CASES:
        if bench.smoke:
            case = tiny(replace(case, batch=1))
        bench.attempt(f"prefill, {shape_of(case)}", measure, bench, case)
