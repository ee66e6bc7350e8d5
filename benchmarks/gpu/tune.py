# SPDX-License-Identifier: Apache-2.0
"""Measures candidate configurations of the Triton kernels on this GPU and writes the table that the registry reads:
``make bench-gpu OUT=folder BENCH_ARGS=--tune``.

The result is ``folder/<gpu>.json``; copied to ``kvcompact_kernels/backends/configs`` it is taken instead of the table of the
GPU's generation. An entry changes only where a candidate gave the same result and was 3% faster. Where the CUDA kernel beats
Triton's decoding, the table gets classes of shapes (``compact_attention_cuda``) for which it is then preferred.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import commit, measure_on, versions
from lab import Bench, relative_error
from torch import Tensor

from kvcompact_kernels.backends.triton import runtime

GAIN = 1.03  # times faster that a candidate must be
SAME = 0.02  # relative error (Frobenius) against the present configuration: other tiles round otherwise
FINALISTS = 3
QUICK, THOROUGH = 0.01, 0.1  # seconds of timing per candidate: of all, then of the best
FIELDS = ("BM", "BN", "warps", "stages", "loops")
CUDA_KEYS = (256, 1024, 4096, 16384, 131072)
CUDA_ROWS = ((4, 1), (4, 4), (8, 1))  # query heads of a group, queries


@dataclass(frozen=True)
class Workload:
    """A call that spends its time in one entry of the table: kernel, element bits, padded head dimension, rows."""

    kernel: str
    bits: int
    dim: int
    rows: int
    make: Callable[[], Callable[[], list[Tensor]]]

    def __str__(self) -> str:
        return f"{self.kernel} d{self.dim} rows {self.rows} {self.bits} bits"

    def entry(self, table: dict) -> dict | None:
        """The entry that such a call takes, which need not be of this very number of rows."""
        found = [e for e in table[self.kernel] if e["bits"] == self.bits and e["dim"] == self.dim]
        return next((e for e in found if e["rows"] >= self.rows), found[-1]) if found else None


@contextlib.contextmanager
def using(table: dict) -> Iterator[None]:
    """Lets the kernels read this table."""
    before = runtime.table
    runtime.table = lambda arch: table
    runtime.pick.cache_clear()
    try:
        yield
    finally:
        runtime.table = before
        runtime.pick.cache_clear()


def with_entry(table: dict, workload: Workload, choice: dict) -> dict:
    """The table with one entry replaced."""
    changed = copy.deepcopy(table)
    workload.entry(changed).update(choice)
    return changed


def candidates(entry: dict) -> list[dict]:
    """Neighbours of an entry, itself first: half and twice the keys and rows of a tile, warps, stages."""
    own = {name: entry[name] for name in FIELDS if name in entry}
    rows = {entry["BM"]} if entry["BM"] <= 16 else {entry["BM"] // 2, entry["BM"], min(128, 2 * entry["BM"])}
    keys = {max(16, entry["BN"] // 2), entry["BN"], min(256, 2 * entry["BN"])}
    found = [own]
    for m in sorted(rows):
        for n in sorted(keys):
            # a tile that is larger than twice the present one spills; one that is both smaller and lower wins nothing
            if not entry["BM"] * entry["BN"] / 2 <= m * n <= 2 * entry["BM"] * entry["BN"]:
                continue
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    choice = {**own, "BM": m, "BN": n, "warps": warps, "stages": stages}
                    if choice != own:
                        found.append(choice)
    return found


def attention(group: int, query_len: int, slots: int, tail: int, batch: int, dim: int, backward: bool = False):
    """A call of compact attention through Triton's launches."""
    from kvcompact_kernels.backends.triton import compact_attention as backend

    def make() -> Callable[[], list[Tensor]]:
        args = _attention_inputs(group, query_len, slots, tail, batch, dim)
        if not backward:
            return lambda: list(backend.forward(*args))
        out, lse = backend.forward(*args)
        grads = torch.randn_like(out), torch.zeros_like(lse)

        def call() -> list[Tensor]:
            dq, dk, dv, db, dtk, dtv = backend.backward(*grads, out, lse, *args)
            return [dq, *dk, *dv, *db, dtk, dtv]

        return call

    return make


def _attention_inputs(group: int, query_len: int, slots: int, tail: int, batch: int, dim: int) -> tuple:
    kv_heads = 1024 // dim
    rand = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q = rand(batch, kv_heads * group, query_len, dim)
    k, v = (rand(batch, kv_heads, slots, dim) for _ in range(2))
    beta = torch.randn(batch, kv_heads, slots, device="cuda")
    ends = [rand(batch, kv_heads, tail, dim) if tail else None for _ in range(2)]
    return q, [k], [v], [beta], [None], *ends, None, dim**-0.5, True, -1, kv_heads


def scores(query_len: int, dim: int):
    from kvcompact_kernels.backends.triton import key_scores as backend

    def make() -> Callable[[], list[Tensor]]:
        rand = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        kv_heads = 1024 // dim
        q, k = rand(1, 4 * kv_heads, query_len, dim), rand(1, kv_heads, 8192, dim)
        return lambda: [backend.forward(q, k, None, dim**-0.5, True, "sum")]

    return make


def still(head_dim: int, backward: bool = False):
    from kvcompact_kernels.backends.triton import still_compaction as backend

    def make() -> Callable[[], list[Tensor]]:
        from bench_still_compaction import MODELS, Case, Layer

        from kvcompact_kernels.still_config import StillConfig

        model = next(name for name, (_, _, d) in MODELS.items() if d == head_dim)
        case = Case(model, 8192, 1024, torch.bfloat16)
        layer = Layer(case, StillConfig(slots=case.slots, head_dim=head_dim, num_blocks=1), "cuda")
        tensors, tables = layer.cross_attention_arguments()
        tensors = [x if i < 4 else x.float() for i, x in enumerate(tensors)]
        args = (*tensors, *tables.values(), tensors[0].shape[-1] ** -0.5, 1e-6)
        if not backward:
            return lambda: list(backend.forward(*args))
        pooled, lse = backend.forward(*args)
        grads = torch.randn_like(pooled), torch.zeros_like(lse)
        return lambda: [x for x in backend.backward(*grads, pooled, lse, *args) if x is not None]

    return make


def workloads() -> list[Workload]:
    """What is tuned, most wanted first."""
    found = []
    for dim in (128, 64, 256):
        found.append(Workload("attention_forward", 16, dim, 16, attention(4, 1, 8192, 64, 8, dim)))
        found.append(Workload("attention_forward", 16, dim, 128, attention(4, 2048, 4096, 2048, 1, dim)))
        found.append(Workload("attention_forward", 16, dim, 32, attention(4, 8, 8192, 64, 8, dim)))
        found.append(Workload("attention_forward", 16, dim, 64, attention(4, 16, 8192, 64, 8, dim)))
        if dim == 128:
            found += _still_workloads(128)
        for kernel in ("attention_backward_keys", "attention_backward_queries"):
            found.append(Workload(kernel, 16, dim, 0, attention(4, 1024, 2048, 1024, 1, dim, backward=True)))
        found += [Workload(kernel, 16, dim, 128, scores(2048, dim)) for kernel in ("key_sums", "rows_lse")]
    return found + _still_workloads(64)


def _still_workloads(head_dim: int) -> list[Workload]:
    width = 2 * head_dim
    found = [Workload("still_attend", 16, width, 128, still(head_dim))]
    found.append(Workload("still_project_keys", 16, width, 0, still(head_dim)))
    for name in ("values", "keys", "queries", "norm", "inputs", "weight"):
        found.append(Workload(f"still_backward_{name}", 16, width, 0, still(head_dim, backward=True)))
    return found


def choose(
    bench: Bench, workload: Workload, table: dict, rows: list[dict], quick: float = QUICK, thorough: float = THOROUGH
) -> dict | None:
    """The fastest candidate of an entry, or None where the present one stays; what was measured goes to ``rows``."""
    entry = workload.entry(table)
    if entry is None:
        return None
    call = workload.make()

    def run(choice: dict) -> list[Tensor]:
        with using(with_entry(table, workload, choice)):
            return call()

    own, *others = candidates(entry)
    expected = [x.float() for x in run(own)]
    usable = {_text(own): own}
    for choice in others:
        try:
            result = run(choice)
            if bench.device != "cpu":
                torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 (a tile that does not fit raises one of several errors)
            rows.append({"entry": str(workload), "choice": _text(choice), "note": type(error).__name__})
            continue
        error = max((relative_error(x, y) for x, y in zip(result, expected) if x.numel()), default=0.0)
        if not error < SAME:
            rows.append({"entry": str(workload), "choice": _text(choice), "note": f"wrong: error {error:.2g}"})
            continue
        usable[_text(choice)] = choice
    if bench.warm:
        return None
    times = _timed(bench, {name: partial(run, c) for name, c in usable.items()}, quick)
    best = sorted((name for name in times if name != _text(own)), key=lambda n: times[n].p50)[:FINALISTS]
    final = _timed(bench, {name: partial(run, usable[name]) for name in (_text(own), *best)}, thorough)
    for name in usable:
        last = final.get(name)
        rows.append(
            {
                "entry": str(workload),
                "choice": name,
                "ms_quick": f"{times[name].p50:.5g}",
                "ms": f"{last.p50:.5g}" if last else "",
                "note": "present" if name == _text(own) else "",
            }
        )
    winner = min(final, key=lambda n: final[n].p50)
    gain = final[_text(own)].p50 / final[winner].p50
    print(f"  {workload}: {_text(own)} {final[_text(own)].p50:.4g} ms; {winner} is {gain:.3f} times faster", flush=True)
    return usable[winner] if gain >= GAIN else None


def _timed(bench: Bench, functions: dict, seconds: float) -> dict:
    return measure_on(bench.device, functions, seconds, graphs=bench.device != "cpu", least_calls=3)


def _text(choice: dict) -> str:
    loops = f" loops {choice['loops']}" if "loops" in choice else ""
    return f"{choice['BM']}x{choice['BN']} w{choice['warps']} s{choice['stages']}{loops}"


def winning_classes(ratios: dict[tuple[int, int, int], float], least: float = 1.02) -> list[dict[str, int]]:
    """Classes of shapes from ``(dim, rows, keys) -> times faster than Triton``: runs of neighbouring sizes that all win.

    Sizes between two measured ones belong to a class when both ends won; the largest run is open above, the smallest below.
    """
    found = []
    for dim, rows in sorted({key[:2] for key in ratios}):
        sizes = sorted(k for d, r, k in ratios if (d, r) == (dim, rows))
        run: list[int] = []
        for size in [*sizes, None]:
            if size is not None and ratios[dim, rows, size] >= least:
                run.append(size)
                continue
            if run:
                first = 1 if run[0] == sizes[0] else run[0]
                last = 1 << 40 if run[-1] == sizes[-1] else run[-1]
                found.append({"dim": dim, "rows": rows, "min_keys": first, "max_keys": last})
            run = []
    return found


def compare_cuda(bench: Bench, rows: list[dict]) -> list[dict[str, int]] | None:
    """Where the CUDA kernel beats Triton's at decoding; None where there is none to compare."""
    from kvcompact_kernels.backends.cuda import library
    from kvcompact_kernels.ops import compact_attention

    usable, reason = library.available()
    if not usable:
        print(f"    nothing to compare: {reason}")
        return None
    ratios: dict[tuple[int, int, int], float] = {}
    for dim in (64, 128, 256):
        for group, query_len in CUDA_ROWS:
            for keys in CUDA_KEYS:
                worst = math.inf
                for batch in (1, 8):
                    q, k, v, beta, *_ = _attention_inputs(group, query_len, keys, 0, batch, dim)
                    calls = {
                        name: partial(compact_attention, q, k[0], v[0], beta[0], causal=False, backend=name)
                        for name in ("cuda", "triton")
                    }
                    error = relative_error(calls["cuda"](), calls["triton"]())
                    if bench.warm:
                        continue
                    times = _timed(bench, calls, QUICK)
                    ratio = times["triton"].p50 / times["cuda"].p50 if error < SAME else 0.0
                    name = f"d{dim} rows {group * query_len} keys {keys} batch {batch}"
                    row = {"entry": f"cuda against triton, {name}", "ms": f"{times['cuda'].p50:.5g}"}
                    rows.append({**row, "note": f"{ratio:.3f} times faster, error {error:.2g}"})
                    worst = min(worst, ratio)
                key = (dim, group * query_len, keys)
                ratios[key] = min(ratios.get(key, math.inf), worst)
    return None if bench.warm else winning_classes(ratios)


def write_table(table: dict, device_name: str, folder: Path) -> Path:
    """``folder/<gpu>.json`` in the format of ``backends/configs``: an entry a line."""
    table = {**table, "note": f"Measured on {device_name}: {versions()}, commit {commit()}."}
    parts = []
    for kernel, entries in table.items():
        if isinstance(entries, list):
            body = ",\n".join(f"    {json.dumps(e)}" for e in entries)
            parts.append(f'  "{kernel}": [\n{body}\n  ]' if entries else f'  "{kernel}": []')
        else:
            parts.append(f"  {json.dumps(kernel)}: {json.dumps(entries)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{runtime.device_slug(device_name)}.json"
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    return path


def run(bench: Bench) -> None:
    if bench.device == "cpu":
        print("tune: Triton kernels need a GPU")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    table = copy.deepcopy(runtime.table(runtime.arch_name(device)))
    rows: list[dict] = []
    index, number = map(int, bench.shard.split("/"))
    todo = workloads()[index::number]

    def one(workload: Workload) -> None:
        choice = choose(bench, workload, table, rows)
        if choice is not None:
            workload.entry(table).update(choice)
        if not bench.warm:
            save(name, table, rows, bench.out)

    def cuda() -> None:
        classes = compare_cuda(bench, rows)
        if classes is not None:
            table["compact_attention_cuda"] = classes
            save(name, table, rows, bench.out)

    if index == 0:
        bench.attempt("CUDA against Triton", cuda)
    for workload in todo:
        bench.attempt(str(workload), one, workload)


def save(name: str, table: dict, rows: list[dict], out: Path) -> None:
    """Writes table and measurements as they stand, so that a cut keeps what is known."""
    path = write_table(table, name, out)
    with open(out / "tuning.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("entry", "choice", "ms_quick", "ms", "note"), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"  {path.name} and tuning.csv written", flush=True)
