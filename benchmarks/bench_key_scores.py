# SPDX-License-Identifier: Apache-2.0
"""Key scores (column sums of attention) on the CPU, against the eager route and the PyTorch backend.

    python benchmarks/bench_key_scores.py [--full] [--out FOLDER] [--threads N]

Each shape is first held to the error budget on the inputs that are then timed. ``query_len`` equal to ``tokens`` is H2O's use,
64 is SnapKV's. Peers, same dtype, same run, call by call in turn:

- ``eager``: the definition as written (kvcompact_kernels/reference), with the attention matrix in memory.
- ``torch``: the PyTorch backend, in chunks of queries.

``temporary_mib`` is the most memory that a call holds at once from PyTorch's CPU allocator, its result not included, as the
profiler reports it. GFLOP/s counts the products of visible query-key pairs once; the kernel computes them twice when no
log-sum-exp is given, so that it need not keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Rows, arguments, machine, measure, temporary_bytes
from torch import Tensor

from kvcompact_kernels.backends.cpu import library
from kvcompact_kernels.ops import key_scores
from kvcompact_kernels.reference import key_scores as reference
from kvcompact_kernels.testing.budget import assert_within_budget

MODELS = {  # query heads, KV heads, head dim
    "SmolLM2-135M": (9, 3, 64),
    "Qwen3-4B": (32, 8, 128),
}


@dataclass(frozen=True)
class Case:
    model: str
    tokens: int
    query_len: int
    dtype: torch.dtype

    def operations(self) -> float:
        heads, _, d = MODELS[self.model]
        return 2.0 * d * heads * self.query_len * (self.tokens - (self.query_len - 1) / 2)


def cases(full: bool) -> list[Case]:
    shapes = [("SmolLM2-135M", 4096, 4096), ("SmolLM2-135M", 4096, 64)]
    if full:
        shapes += [("SmolLM2-135M", 1024, 1024), ("Qwen3-4B", 2048, 2048), ("Qwen3-4B", 8192, 64)]
    return [Case(*shape, dtype) for dtype in (torch.bfloat16, torch.float32) for shape in shapes]


def functions(q: Tensor, k: Tensor) -> dict[str, Callable[[], tuple[Tensor]]]:
    scale = q.shape[-1] ** -0.5
    return {
        "cpu": lambda: (key_scores(q, k, backend="cpu"),),
        "torch": lambda: (key_scores(q, k, backend="torch"),),
        "eager": lambda: (reference.key_scores(q, k, None, scale),),
    }


def check(q: Tensor, k: Tensor) -> None:
    got, scale = key_scores(q, k, backend="cpu"), q.shape[-1] ** -0.5
    group = q.shape[1] // k.shape[1]
    for h in range(k.shape[1]):  # a head at a time: the matrix of all in fp64 is large
        heads, kv = slice(h * group, (h + 1) * group), slice(h, h + 1)
        naive = reference.key_scores(q[:, heads], k[:, kv], None, scale)
        truth = reference.key_scores(q[:, heads].double(), k[:, kv].double(), None, scale)
        assert_within_budget(got[:, kv], naive, truth)


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    library.load()
    shown = ("model", "tokens", "query_len", "dtype", "backend", "ms_p50", "gflops", "temporary_mib", "ratio")
    rows, where = Rows(args.out / "key_scores_cpu.csv", shown), machine()
    for case in cases(args.full):
        heads, kv_heads, d = MODELS[case.model]
        q = torch.randn(1, heads, case.query_len, d).to(case.dtype)
        k = torch.randn(1, kv_heads, case.tokens, d).to(case.dtype)
        with torch.inference_mode():
            check(q, k)
            calls = functions(q, k)
            memory = {backend: temporary_bytes(call) for backend, call in calls.items()}
            times = measure({backend: lambda _, f=f: f() for backend, f in calls.items()}, args.seconds)
        for backend, time in times.items():
            rows.add(
                op="key_scores",
                model=case.model,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=d,
                tokens=case.tokens,
                query_len=case.query_len,
                dtype=str(case.dtype).removeprefix("torch."),
                backend=backend,
                ms_p20=time.p20,
                ms_p50=time.p50,
                ms_p80=time.p80,
                calls=time.calls,
                gflops=case.operations() / time.p50 / 1e6,
                temporary_mib=memory[backend] / 2**20,
                ratio=time.p50 / times["cpu"].p50,
                **where,
            )
    rows.save()


if __name__ == "__main__":
    main()
