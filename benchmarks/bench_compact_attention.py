# SPDX-License-Identifier: Apache-2.0
"""Compact attention while decoding on the CPU, against PyTorch's routes and the machine's read bandwidth.

    python benchmarks/bench_compact_attention.py [--full] [--out FOLDER] [--threads N]

Each shape is first held to the error budget on the inputs that are then timed. Inputs rotate through several times the
last-level cache where they are large enough to be bound by memory at all. Peers, in the same run and call by call in turn:

- ``sdpa_packed``: ``scaled_dot_product_attention`` with the bias as a mask and the G queries of a KV head packed into one
  tile, on keys, values and bias that lie concatenated (block and tail) and, for a shared block, copied per request.
  Making that layout is not timed.
- ``eager``: what public implementations run: keys and values repeated to every query head, scores, bias, softmax, sum.

A row's ratio is the peer's median time over the kernel's. GB/s counts keys, values and beta once. What a row does not
show: the rest of a decoding step (weights, projections), which bounds it below some tens of thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import Rows, Timing, arguments, last_level_cache, machine, measure
from peaks import ReadProbe
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcompact_kernels.backends.cpu import library
from kvcompact_kernels.ops import compact_attention
from kvcompact_kernels.reference import compact_attention as reference
from kvcompact_kernels.reference.selection import proportional_counts
from kvcompact_kernels.testing.budget import assert_within_budget

MODELS = {  # query heads, KV heads, head dim
    "SmolLM2-135M": (9, 3, 64),
    "Qwen3-4B": (32, 8, 128),
    "Gemma3-1B": (4, 1, 256),
    "Gemma3-4B": (8, 4, 256),
}
LARGEST = 600e6  # bytes of keys and values of one set of inputs


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    slots: int
    tail: int
    dtype: torch.dtype
    shared: bool = False
    query_len: int = 1

    def bytes_read(self) -> int:
        _, kv_heads, d = MODELS[self.model]
        requests = 1 if self.shared else self.batch
        pair = 2 * d * self.dtype.itemsize
        return kv_heads * (requests * self.slots * (pair + 4) + self.batch * self.tail * pair)

    def operations(self) -> float:
        """Floating-point operations of both products, over the pairs that are visible (the tail is causal)."""
        heads, _, d = MODELS[self.model]
        tail = self.query_len * (self.tail - (self.query_len - 1) / 2) if self.tail else 0
        return 4.0 * d * heads * self.batch * (self.query_len * self.slots + tail)

    def bytes_of_copies(self) -> int:
        _, kv_heads, d = MODELS[self.model]
        return self.batch * kv_heads * (self.slots + self.tail) * 2 * d * self.dtype.itemsize


def cases(full: bool) -> list[Case]:
    dtypes = (torch.bfloat16, torch.float32)
    if full:
        grid = [(b, t, n) for t in (256, 1024, 4096, 16384) for n in (0, 256, 1024) for b in (1, 8, 32)]
        shared = [(16, 1024, 0), (16, 4096, 0), (16, 4096, 256), (32, 16384, 0)]
    else:
        grid = [(1, 1024, 0), (1, 4096, 256), (1, 16384, 0), (8, 4096, 256)]
        shared = [(16, 4096, 0)]
    found = [Case(m, b, t, n, dtype) for dtype in dtypes for m in MODELS for b, t, n in grid]
    found += [Case(m, b, t, n, dtype, True) for dtype in dtypes for m in MODELS for b, t, n in shared]
    return [case for case in found if case.bytes_of_copies() <= LARGEST]


class Inputs:
    """One set of inputs of a case: as the kernel takes them, and as the peers do."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        heads, self.kv_heads, d = MODELS[case.model]
        requests = 1 if case.shared else case.batch

        def rand(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=case.dtype, device=device).normal_()

        self.query = rand(case.batch, heads, case.query_len, d)
        self.keys, self.values = (rand(requests, self.kv_heads, case.slots, d) for _ in range(2))
        self.beta = torch.randn(requests, self.kv_heads, case.slots, device=device)
        self.tail = [rand(case.batch, self.kv_heads, case.tail, d) for _ in range(2)] if case.tail else [None, None]
        self.offsets: Tensor | None = None

    def share_unevenly(self, shares: Sequence[float]) -> None:
        """Gives the KV heads numbers of slots in proportion to ``shares``, packed; as many in all."""
        requests, heads, slots = self.keys.shape[:3]
        counts = proportional_counts(heads * slots, shares, 1, heads * slots) * requests
        self.offsets = torch.tensor([0, *counts], device=self.keys.device).cumsum(0)
        self.keys, self.values, self.beta = (x.reshape(-1, *x.shape[3:]) for x in (self.keys, self.values, self.beta))

    def head(self, request: int, h: int) -> list[Tensor]:
        """Keys and values ``[1, 1, t, d]`` and beta ``[1, 1, t]`` of one KV head."""
        parts = (self.keys, self.values, self.beta)
        if self.offsets is None:
            return [x[request : request + 1, h : h + 1] for x in parts]
        start, end = self.offsets[request * self.kv_heads + h :][:2].tolist()
        return [x[None, None, start:end] for x in parts]

    def peer_layout(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[B, Hkv, S, d]`` and bias ``[B, Hkv, 1, S]`` in query's dtype, block and tail side by side."""

        def whole(x: Tensor, tail: Tensor | None) -> Tensor:
            x = x.expand(case.batch, *x.shape[1:])
            return torch.cat([x] if tail is None else [x, tail], 2).contiguous()

        bias_tail = self.beta.new_zeros(case.batch, self.kv_heads, case.tail) if case.tail else None
        bias = whole(self.beta, bias_tail).to(case.dtype)[:, :, None]
        return whole(self.keys, self.tail[0]), whole(self.values, self.tail[1]), bias


def kernel(inputs: Inputs, return_lse: bool = False, backend: str = "cpu", beta: bool = True):
    return compact_attention(
        inputs.query,
        inputs.keys,
        inputs.values,
        inputs.beta if beta else None,
        tail_keys=inputs.tail[0],
        tail_values=inputs.tail[1],
        return_lse=return_lse,
        offsets=inputs.offsets,
        num_kv_heads=inputs.kv_heads,
        backend=backend,
    )


def sdpa_packed(query: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    packed = query.view(query.shape[0], k.shape[1], -1, query.shape[3])
    mask = bias.expand(-1, -1, packed.shape[2], -1)
    return scaled_dot_product_attention(packed, k, v, attn_mask=mask).view(query.shape)


def eager(query: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    group = query.shape[1] // k.shape[1]
    k, v, bias = (x.repeat_interleave(group, 1) for x in (k, v, bias))
    scores = query @ k.transpose(2, 3) * query.shape[3] ** -0.5 + bias
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ v


def check(case: Case, inputs: Inputs, backend: str = "cpu", beta: bool = True) -> None:
    """The error budget on (some requests, KV heads and queries of) the inputs that will be timed."""
    out, lse = kernel(inputs, return_lse=True, backend=backend, beta=beta)
    group = out.shape[1] // inputs.kv_heads
    picks = torch.cartesian_prod(torch.arange(case.batch), torch.arange(inputs.kv_heads))
    for b, h in picks[torch.randperm(len(picks))[:4]].tolist():
        heads, block = slice(h * group, (h + 1) * group), 0 if case.shared else b
        k, v, bias = ([x] for x in inputs.head(block, h))
        if not beta:
            bias = [None]
        tail = [None if x is None else x[b : b + 1, h : h + 1] for x in inputs.tail]
        for rows in checked_rows(case.query_len):
            q = inputs.query[b : b + 1, heads, rows]
            # rows before the last see a shorter tail; the last of them is aligned with its last token
            seen = [None if x is None else x[:, :, : case.tail - case.query_len + rows.stop] for x in tail]
            args = (q, k, v, bias, [None], *seen, None, q.shape[-1] ** -0.5)
            naive = reference.compact_attention(*args)
            truth = reference.compact_attention(*_doubled(args))
            where = (slice(b, b + 1), heads, rows)
            name = f"{case}, {backend}, request {b}, KV head {h}"
            assert_within_budget(out[where], naive[0], truth[0], name=f"{name}: out")
            assert_within_budget(lse[where], naive[1], truth[1], name=f"{name}: lse")


def checked_rows(query_len: int, most: int = 96) -> list[slice]:
    """The queries that are compared: all, or the first, some in the middle and the last."""
    if query_len <= 3 * most:
        return [slice(0, query_len)]
    return [slice(start, start + most) for start in (0, query_len // 2, query_len - most)]


def _doubled(args: tuple) -> tuple:
    wide = [[x if x is None else x.double() for x in a] if isinstance(a, list) else a for a in args]
    return tuple(x.double() if isinstance(x, Tensor) else x for x in wide)


def time_case(case: Case, probe: ReadProbe, seconds: float) -> dict[str, Timing]:
    copies = max(1, min(64, round(8 * last_level_cache() / case.bytes_read())))
    inputs = [Inputs(case) for _ in range(copies)]
    check(case, inputs[0])
    peer_copies = max(1, min(copies, round(8 * last_level_cache() / case.bytes_of_copies())))
    layouts = [x.peer_layout(case) for x in inputs[:peer_copies]]
    peer_inputs = [(x.query, *layout) for x, layout in zip(inputs, layouts)]
    functions = {
        "read": probe,
        "cpu": lambda call: kernel(inputs[call % copies]),
        "sdpa_packed": lambda call: sdpa_packed(*peer_inputs[call % peer_copies]),
        "eager": lambda call: eager(*peer_inputs[call % peer_copies]),
    }
    with torch.inference_mode():
        return measure(functions, seconds)


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    library.load()
    probe, where = ReadProbe(), machine()
    shown = ("model", "batch", "slots", "tail", "dtype", "shared", "backend", "ms_p50", "gbps", "read_percent", "ratio")
    rows = Rows(args.out / "compact_attention_cpu.csv", shown)
    for case in cases(args.full):
        times = time_case(case, probe, args.seconds)
        bandwidth = probe.gigabytes_per_second(times.pop("read").p50)
        heads, kv_heads, d = MODELS[case.model]
        for backend, time in times.items():
            moved = case.bytes_read() if backend == "cpu" else case.bytes_of_copies()
            gbps = moved / time.p50 / 1e6
            rows.add(
                op="compact_attention",
                model=case.model,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=d,
                batch=case.batch,
                slots=case.slots,
                tail=case.tail,
                dtype=str(case.dtype).removeprefix("torch."),
                shared=int(case.shared),
                backend=backend,
                ms_p20=time.p20,
                ms_p50=time.p50,
                ms_p80=time.p80,
                calls=time.calls,
                gbps=gbps,
                read_gbps=bandwidth,
                read_percent=100 * gbps / bandwidth,
                ratio=time.p50 / times["cpu"].p50,
                **where,
            )
    rows.save()


if __name__ == "__main__":
    main()
