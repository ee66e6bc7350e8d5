# SPDX-License-Identifier: Apache-2.0
"""Runs parts of a GPU visit: ``python benchmarks/gpu/part.py NAME ... --out FOLDER [--device cpu --smoke]``.

``visit.py`` calls it, each part in a process of its own. Exit code: 0 done, 3 a result was wrong, 4 a case failed, 5 the CUDA
context was lost.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("ceilings", "decode", "shared", "prefill", "backward", "still", "scores", "model", "tune")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=PARTS, metavar="NAME", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes: whether the program works, not how fast it is"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing per function and shape")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--warm", action="store_true", help="no timing and no rows: only what is compiled is kept")
    parser.add_argument("--shard", default="0/1", help="of tune: this process's share of the candidates")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.limit
    for folder in (HERE, HERE.parent, HERE.parents[1]):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    import torch
    from lab import Bench

    seed = int(time.time()) & 0xFFFFFF
    torch.manual_seed(seed)
    worst = 0
    for name in args.names:
        print(f"{name}: seed {seed}", flush=True)
        bench = Bench(name, args.device, args.out, args.smoke, args.seconds, deadline, args.warm, args.shard)
        with torch.no_grad():
            importlib.import_module(name).run(bench)
        worst = max(worst, bench.exit_code)
    return worst


if __name__ == "__main__":
    sys.exit(main())
