# SPDX-License-Identifier: Apache-2.0
"""``kvcompact bench``: the checkout's benchmarks, or a short built-in one where there is no checkout."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from .common import CliError, UsageError, plain_table, reporter

NAME = "bench"
HELP = "time the kernels on this machine"
DESCRIPTION = """\
In a checkout this runs benchmarks/run.py, which saves its rows in benchmarks/results; in an installed package, or with
--quick, it runs a built-in benchmark of about ten seconds: decoding over a compact block with a bias, each backend in
turn. The figures say how the backends compare on this machine under its present load; they are not for publication.
All of this is about the CPU; a GPU's kernels are measured by `make bench-gpu OUT=folder` in a checkout.
"""

# heads, KV heads, head dim
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Qwen3-4B": (32, 8, 128)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the built-in benchmark, also in a checkout")
    parser.add_argument("--slots", type=int, default=4096, help="slots of the block in the built-in one (4096)")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="passed to benchmarks/run.py, after --")


def checkout_runner() -> Path | None:
    """benchmarks/run.py of the checkout that this package is imported from, or None."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
    return path if path.is_file() else None


def run(args: argparse.Namespace) -> dict[str, Any]:
    tell = reporter(args)
    if args.slots < 1:
        raise UsageError(f"--slots must be at least 1, got {args.slots}")
    runner = checkout_runner()
    if runner is not None and not args.quick:
        rest = [a for a in args.rest if a != "--"]
        tell(f"running {runner}; --quick runs the built-in benchmark instead")
        command = [sys.executable, str(runner), *rest]
        code = subprocess.run(command, check=False, stdout=2 if args.json else None).returncode
        if code:
            raise CliError(f"{runner.name} ended with exit code {code}")
        return {"runner": str(runner), "arguments": rest}
    if args.rest:
        raise UsageError("arguments for benchmarks/run.py were given, but the built-in benchmark runs")
    tell("built-in benchmark: one decoded token, compact_attention with a bias")
    rows = _quick(args.slots)
    if not args.json:
        table = [
            [r["shape"], r["dtype"], r["backend"], f"{r['microseconds']:.0f}", f"{r['gbytes_per_second']:.1f}"]
            for r in rows
        ]
        print(plain_table(["shape", "dtype", "backend", "us", "GB/s"], table, {3, 4}))
    return {"runner": "built-in", "slots": args.slots, "rows": rows}


def _quick(slots: int) -> list[dict[str, Any]]:
    import torch

    from ..backends.registry import BackendUnavailableError, backend_names
    from ..ops import compact_attention
    from .speed import median_seconds

    rows = []
    for shape, (heads, kv_heads, dim) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            query = torch.randn(1, heads, 1, dim).to(dtype)
            # several blocks in turn, so that the last-level cache does not hold the one that comes next
            blocks = [
                [torch.randn(1, kv_heads, slots, dim).to(dtype) for _ in range(2)] + [torch.randn(1, kv_heads, slots)]
                for _ in range(4)
            ]
            size = sum(x.numel() * x.element_size() for x in blocks[0])
            for backend in backend_names("compact_attention"):

                def decode(backend=backend, query=query, blocks=blocks):
                    for keys, values, beta in blocks:
                        compact_attention(query, keys, values, beta, backend=backend)

                try:
                    seconds = median_seconds(decode, 0.5) / len(blocks)
                except BackendUnavailableError:
                    continue
                rows.append(
                    {
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "backend": backend,
                        "slots": slots,
                        "microseconds": seconds * 1e6,
                        "gbytes_per_second": size / seconds / 1e9,
                    }
                )
    return rows
