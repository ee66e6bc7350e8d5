# SPDX-License-Identifier: Apache-2.0
"""Key scores of a long context against a causal SDPA forward pass of the same shape (which gives no scores), and packing,
of one layer and of all layers of a model."""

from __future__ import annotations

from functools import partial

import routes
import torch
from bench_key_scores import MODELS, Case
from common import temporary_bytes
from lab import Bench, Goal, Work
from torch import Tensor

from kvcompact_kernels.ops import key_scores, pack_slots
from kvcompact_kernels.reference import key_scores as reference
from kvcompact_kernels.testing.budget import assert_within_budget

CASES = [
    Case("Qwen3-4B", 32768, 32768, torch.bfloat16),
    Case("Qwen3-4B", 32768, 64, torch.bfloat16),
]
ROWS = 1024  # queries whose scores over all keys are in memory at once while checking


def check(q: Tensor, k: Tensor, got: Tensor) -> None:
    """The budget of one KV head; the definition runs over some rows at a time."""
    group, total = q.shape[1] // k.shape[1], k.shape[2]
    h = int(torch.randint(k.shape[1], ()))
    heads, keys, scale = q[:, h * group : (h + 1) * group], k[:, h : h + 1], q.shape[3] ** -0.5
    results = []
    for wide in (False, True):
        a, b = (x.double() if wide else x for x in (heads, keys))
        sums = torch.zeros(1, 1, total, dtype=torch.float64 if wide else torch.float32, device=q.device)
        for start in range(0, q.shape[2], ROWS):
            stop = min(start + ROWS, q.shape[2])
            seen = total - q.shape[2] + stop
            sums[..., :seen] += reference.key_scores(a[:, :, start:stop], b[:, :, :seen], None, scale)
        results.append(sums)
    assert_within_budget(got[:, h : h + 1], *results, name=f"scores of KV head {h}")


def measure(bench: Bench, case: Case) -> None:
    heads, kv_heads, d = MODELS[case.model]
    make = partial(torch.empty, dtype=case.dtype, device=bench.device)
    q = make(1, heads, case.query_len, d).normal_()
    k, v = (make(1, kv_heads, case.tokens, d).normal_() for _ in range(2))
    ours = bench.kernels("key_scores", lambda name: (key_scores(q, k, backend=name),))
    ours = bench.right(ours, lambda name: check(q, k, ours[name]()[0]))
    whole = case.query_len == case.tokens
    peers = {f"sdpa {name}": routes.sdpa(name, q, k, v, is_causal=whole, enable_gqa=True) for name in routes.BACKENDS}
    memory = {name: temporary_bytes(call, bench.device) for name, call in ours.items()}
    goals = [Goal("ratio", 0.5, "best SDPA without a bias")] if whole else []
    # the fewest operations: S once for the sums of the rows, and once more, for nothing of size T x T is kept
    work = Work(q.nbytes + k.nbytes + 4.0 * kv_heads * case.tokens, 2 * case.operations())
    forward = Work(2.0 * (q.nbytes + k.nbytes), 2 * case.operations())
    bench.record(
        "key_scores",
        f"key scores {case.model} {heads}/{kv_heads}x{d} {case.query_len} queries, {case.tokens} keys",
        case.dtype,
        bench.time(ours, peers, graphs=not whole),
        ours,
        work,
        works=dict.fromkeys(peers, forward),
        groups={"best SDPA without a bias": list(peers)},
        goals=goals,
        memory=memory,
    )


def packing(bench: Bench, layers: int, tokens: int, slots: int) -> None:
    """All layers in one launch, beside a launch each, and two gathers each."""
    dtype = torch.float32 if bench.smoke else torch.bfloat16
    shape = (1, 8, tokens, 128)
    keys, values = (
        [torch.empty(shape, dtype=dtype, device=bench.device).normal_() for _ in range(layers)] for _ in "kv"
    )
    kept = [torch.rand(shape[:3], device=bench.device).topk(slots).indices.sort().values for _ in range(layers)]
    index = [x[..., None].expand(-1, -1, -1, 128) for x in kept]
    name = "torch" if bench.device == "cpu" else "triton"

    def gathered() -> list:
        return [x.gather(2, i) for x, i in zip([*keys, *values], [*index, *index])]

    def at_once() -> list:
        return [x for half in pack_slots(keys, values, kept, backend=name) for x in half]

    def one_by_one() -> list:
        pairs = [pack_slots(*layer, backend=name) for layer in zip(keys, values, kept)]
        return [x for pair in zip(*pairs) for x in pair]

    ours = {name: at_once}
    if layers > 1:
        ours[f"{name}, layer by layer"] = one_by_one
    wanted = gathered()

    def same() -> None:
        for call in ours.values():
            for x, y in zip(call(), wanted):
                if not torch.equal(x, y):
                    raise AssertionError("packed slots differ from the gathered ones")

    bench.verify(same)
    work = Work(2.0 * sum(x.nbytes for x in wanted) + sum(x.nbytes for x in kept), 0.0)
    shown = f"pack {f'{layers} layers ' if layers > 1 else ''}8x128 {tokens}->{slots}"
    bench.record("pack_slots", shown, dtype, bench.time(ours, {"two gathers": gathered}), ours, work)


def run(bench: Bench) -> None:
    for case in CASES:
        if bench.smoke:
            case = Case("SmolLM2-135M", 40, min(case.query_len, 40), torch.float32)
        bench.attempt(f"key scores, {case.tokens}, {case.query_len} queries", measure, bench, case)
    for layers, tokens, slots in ((1, 64, 8), (3, 24, 4)) if bench.smoke else ((1, 131072, 16384), (36, 8192, 1024)):
        bench.attempt(f"packing, {layers} layers", packing, bench, layers, tokens, slots)
