# SPDX-License-Identifier: Apache-2.0
"""Decoding over compact blocks: large ones against every route in PyTorch, small ones in a graph of a model's layers.

What a row does not show: the rest of a decoding step, weights above all; ``model`` has that.
"""

from __future__ import annotations

from functools import partial

import routes
import torch
from bench_compact_attention import MODELS, Case, Inputs, check, kernel
from lab import Bench, Goal, Work

LARGE = [
    Case("Qwen3-4B", 1, 16384, 0, torch.bfloat16),
    Case("Qwen3-4B", 8, 16384, 0, torch.bfloat16),
    Case("Qwen3-4B", 32, 4096, 256, torch.bfloat16),
    Case("Qwen3-4B", 1, 131072, 0, torch.bfloat16),
    Case("SmolLM2-135M", 32, 8192, 0, torch.bfloat16),
    Case("Gemma3-4B", 8, 8192, 0, torch.bfloat16),
]
SMALL = [
    Case("Qwen3-4B", 1, 256, 0, torch.bfloat16),
    Case("Qwen3-4B", 1, 1024, 0, torch.bfloat16),
    Case("Qwen3-4B", 1, 1024, 64, torch.bfloat16),
]
# Slots of KV heads over their mean, much as `still` was measured to need them (training/head_shares.py).
UNEVEN = (4.7, 0.23, 1.2, 0.23, 0.5, 0.23, 0.68, 0.23)
LAYERS = 36  # of a step: each has its own block, so that together they outgrow the L2 cache as they do in a model
TINY = {"Qwen3-4B": 40, "SmolLM2-135M": 33, "Gemma3-4B": 20}  # slots in a smoke run


def shape_of(case: Case) -> str:
    heads, kv_heads, d = MODELS[case.model]
    tail = f" tail {case.tail}" if case.tail else ""
    shared = " shared" if case.shared else ""
    return f"{case.model} {heads}/{kv_heads}x{d} B{case.batch} t{case.slots}{shared}{tail}"


def work_of(case: Case) -> Work:
    return Work(case.bytes_read(), case.operations())


def tiny(case: Case, slots: int = 24, batch: int = 2) -> Case:
    """A case's small sibling, for a smoke run."""
    dtype = torch.float32 if case.dtype == torch.float16 else case.dtype
    query_len, tail = (min(x, 7) for x in (case.query_len, case.tail))
    return Case(case.model, min(case.batch, batch), slots, tail, dtype, case.shared, query_len)


def large(bench: Bench, case: Case) -> None:
    inputs = Inputs(case, bench.device)
    ours = bench.kernels("compact_attention", lambda name: kernel(inputs, backend=name))

    def check_both(name: str) -> None:
        check(case, inputs, name)
        check(case, inputs, name, beta=False)

    ours = bench.right(ours, check_both)
    plain = {f"{name} without beta": partial(kernel, inputs, backend=name, beta=False) for name in ours}
    k, v, bias = inputs.peer_layout(case)
    beta = bias[:, :, 0].float()
    beta[:, :, : case.slots] = inputs.beta
    peers = plain | routes.unbiased(inputs.query, k, v) | routes.biased(inputs.query, k, v, bias)
    peers["flex + beta"] = routes.flex_decode(inputs.query, k, v, beta, bench.smoke)
    peers["folded beta"] = routes.folded(inputs.query, k, v, beta)
    expected = dict.fromkeys(routes.BIASED, next(iter(ours.values()))())
    times = bench.time(ours, peers, expected)
    unbiased_bytes = Work(case.bytes_of_copies(), case.operations())
    goals = [
        Goal("percent", 90),
        *(Goal("ratio", 0.98, f"{name} without beta", name) for name in ours),
        Goal("ratio", 1.0, "best SDPA without a bias"),
        Goal("ratio", 2.0, "best route with a bias"),
    ]
    bench.record(
        "compact_attention",
        f"decode {shape_of(case)}",
        case.dtype,
        times,
        ours,
        work_of(case),
        works=dict.fromkeys((*plain, *routes.UNBIASED), unbiased_bytes),
        groups={"best SDPA without a bias": routes.UNBIASED, "best route with a bias": routes.BIASED},
        goals=goals,
    )


def small(bench: Bench, case: Case) -> None:
    layers = [Inputs(case, bench.device) for _ in range(2 if bench.smoke else LAYERS)]

    def each(function) -> None:
        for layer in layers:
            function(layer)

    names = bench.kernels("compact_attention", lambda name: kernel(layers[0], backend=name))
    names = bench.right(names, partial(check, case, layers[0]))
    ours = {name: partial(each, partial(kernel, backend=name)) for name in names}
    layouts = [layer.peer_layout(case) for layer in layers]
    made = [
        routes.unbiased(layer.query, k, v) | routes.biased(layer.query, k, v, bias)
        for layer, (k, v, bias) in zip(layers, layouts)
    ]
    peers = {name: partial(lambda name: [m[name]() for m in made], name) for name in made[0]}
    times = {name: t.divided(len(layers)) for name, t in bench.time(ours, peers).items()}
    bench.record(
        "compact_attention",
        f"decode {shape_of(case)}",
        case.dtype,
        times,
        ours,
        work_of(case),
        groups={"best SDPA without a bias": routes.UNBIASED, "best route with a bias": routes.BIASED},
        goals=[Goal("ms", 0.010)],
        notes={name: f"one of {len(layers)} layers in one graph" for name in times},
    )


def uneven(bench: Bench, case: Case) -> None:
    """Heads with unequal numbers of slots, against as many slots in equal heads."""
    pairs = [(Inputs(case, bench.device), Inputs(case, bench.device)) for _ in range(2 if bench.smoke else LAYERS)]
    for shared, _ in pairs:
        shared.share_unevenly(UNEVEN)

    def each(which: int, name: str) -> None:
        for pair in pairs:
            kernel(pair[which], backend=name)

    names = bench.kernels("compact_attention", lambda name: kernel(pairs[0][0], backend=name))
    names = bench.right(names, partial(check, case, pairs[0][0]))
    ours = {name: partial(each, 0, name) for name in names}
    peers = {f"{name}, equal heads": partial(each, 1, name) for name in names}
    times = {name: t.divided(len(pairs)) for name, t in bench.time(ours, peers).items()}
    bench.record(
        "compact_attention",
        f"decode uneven heads {shape_of(case)}",
        case.dtype,
        times,
        ours,
        work_of(case),
        notes={name: f"one of {len(pairs)} layers in one graph" for name in times},
    )


def run(bench: Bench) -> None:
    for case in SMALL:
        case = tiny(case) if bench.smoke else case
        bench.attempt(f"small block, {shape_of(case)}", small, bench, case)
    for case in (SMALL[1], Case("Qwen3-4B", 8, 1024, 0, torch.bfloat16)):
        case = tiny(case, TINY[case.model]) if bench.smoke else case
        bench.attempt(f"uneven heads, {shape_of(case)}", uneven, bench, case)
    for case in LARGE:
        case = tiny(case, TINY[case.model]) if bench.smoke else case
        bench.attempt(f"decode, {shape_of(case)}", large, bench, case)
