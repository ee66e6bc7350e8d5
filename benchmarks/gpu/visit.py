# SPDX-License-Identifier: Apache-2.0
"""Everything that one visit to a GPU is for: ``make bench-gpu OUT=folder``, or ``python benchmarks/gpu/visit.py --out folder``.

Builds the native libraries, runs the GPU tests, the CUDA kernels under compute-sanitizer, and the benchmarks with their
ceilings; prints a short table last. It uses the Python that runs it, with the torch and CUDA that this finds, and downloads
nothing. Each part is a process of its own with a share of the time that is left: one that overruns is cut and says so, one
that crashes takes nothing with it. In the folder:

    rows.csv        a row for each kernel, peer and pair of them, written as they come
    table.txt       the table
    visit.log       everything that the parts printed
    ceilings.json   read bandwidth and matrix products, measured before the rows
    rows.png        the rows as a picture, where matplotlib is installed

Exit code: 0, or 1 when something was wrong, failed or crashed (parts that were cut do not count), 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUTS = ("rows.csv", "table.txt", "visit.log", "ceilings.json", "rows.png")
BENCHMARKS = ("decode", "still", "shared", "prefill", "backward", "scores", "model")
COMPILING = ("decode", "prefill", "backward", "still")  # parts whose peers take long to compile
WORKERS = 10  # test processes; each compiles, and holds about half a GiB of the GPU
SOFT = 0.85  # of a part's time after which it begins no further case
STATUS = {0: "ok", 3: "wrong", 4: "failed", 5: "crashed"}


@dataclass
class Part:
    """Commands that run one after the other within ``seconds``; or the reason why they do not run."""

    name: str
    seconds: float
    commands: list[list[str]] = field(default_factory=list)
    skip: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    optional: bool = False  # only prepares others: it ends with them, and its failure is no failure
    limited: bool = False  # takes --limit


@dataclass
class Outcome:
    name: str
    status: str
    seconds: float
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.status in ("wrong", "failed", "crashed")


class Log:
    """One file for what all parts print."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1, errors="replace")
        self._lock = threading.Lock()

    def write(self, name: str, line: str) -> None:
        with self._lock:
            self._file.write(f"[{name}] {line.rstrip()}\n")

    def close(self) -> None:
        self._file.close()


class Running:
    """A part at work, in a process group of its own."""

    def __init__(self, part: Part, limit: float, log: Log) -> None:
        self.part, self.log = part, log
        self.start = time.monotonic()
        self.deadline = self.start + limit
        self.lines: list[str] = []
        self.code: int | None = None
        self.cut = False
        self._process: subprocess.Popen | None = None
        self._thread = threading.Thread(target=self._run, args=(limit,), daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def _run(self, limit: float) -> None:
        codes = []
        for command in self.part.commands:
            if self.cut:
                break
            extra = ["--limit", f"{SOFT * limit:.0f}"] if self.part.limited else []
            self.log.write(self.part.name, "$ " + " ".join([*command, *extra]))
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.part.environment}
            try:
                self._process = subprocess.Popen(
                    [*command, *extra],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
            except OSError as error:
                self._keep(f"FAILED {self.part.name}: {error}")
                codes.append(127)
                continue
            for line in self._process.stdout:
                self._keep(line)
            codes.append(self._process.wait())
        self.code = next((code for code in codes if code), 0)

    def _keep(self, line: str) -> None:
        self.lines.append(line.rstrip("\n"))
        self.log.write(self.part.name, line)

    def stop(self) -> None:
        """Ends the part's processes, those that it started included."""
        self.cut = True
        process = self._process
        if process is not None and process.poll() is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._thread.join(10)

    def outcome(self) -> Outcome:
        seconds = time.monotonic() - self.start
        if self.part.optional:
            status = "ended"
        elif self.cut:
            status = "cut"
        else:
            status = "ok" if self.code == 0 else STATUS.get(self.code, "crashed") if self.part.limited else "failed"
        return Outcome(self.part.name, status, seconds, self._detail(status))

    def _detail(self, status: str) -> str:
        found = []
        # a line that starts with the word is of pytest's summary and repeats one
        ran = [line for line in self.lines if "::" in line and not line.startswith(_RESULTS)]
        tests = {w: sum(bool(re.search(rf"\b{w}\b", line)) for line in ran) for w in _RESULTS}
        if any(tests.values()):
            found.append(", ".join(f"{n} {w.lower()}" for w, n in tests.items() if n))
        said = [line.strip("= ") for line in self.lines if "SUMMARY:" in line or "gave the right result" in line]
        said += sorted({line for line in self.lines if line.startswith("skipped: ")})
        if self.part.name == "sanitizer":
            found += said
        for tag in ("WRONG", "FAILED", "CUT"):
            tagged = [line.split(": ", 1)[-1] for line in self.lines if line.startswith(f"{tag} {self.part.name}")]
            if tagged:
                found.append(f"{tag} {len(tagged)}: {tagged[0][:90]}")
        if status == "cut":
            found.append("overran and was cut; its rows so far stand")
        if status in ("crashed", "failed") and not found:
            last = next((line for line in reversed(self.lines) if line.strip()), "it printed nothing")
            found.append(f"exit {self.code}: {last.strip()[:110]}")
        return "; ".join(found)


_RESULTS = ("PASSED", "FAILED", "ERROR", "SKIPPED")


def run_group(parts: list[Part], limit: float, log: Log) -> list[Outcome]:
    """Runs parts side by side; optional ones end when the others have."""
    outcomes = [Outcome(p.name, "skipped", 0.0, p.skip) for p in parts if p.skip]
    running = [Running(p, limit, log) for p in parts if not p.skip]
    try:
        while any(not r.done for r in running):
            if all(r.done for r in running if not r.part.optional):
                break
            if any(time.monotonic() > r.deadline for r in running):
                break
            time.sleep(0.05)
    finally:
        for r in running:
            if not r.done:
                r.stop()
    return outcomes + [r.outcome() for r in running]


def run_visit(groups: list[list[Part]], seconds: float, out: Path, tell: Callable[[str], object]) -> list[Outcome]:
    """Runs groups one after the other; each gets a share of what is left of ``seconds``, in proportion to its wish."""
    outcomes = []
    end = time.monotonic() + seconds
    with contextlib.closing(Log(out / "visit.log")) as log:
        for i, group in enumerate(groups):
            left = end - time.monotonic()
            wishes = [max((p.seconds for p in g if not p.skip), default=0.0) for g in groups[i:]]
            if left <= 1 and wishes[0]:
                found = [Outcome(p.name, "cut", 0.0, "the visit's time was over before it began") for p in group]
            else:
                found = run_group(group, left * wishes[0] / sum(wishes) if wishes[0] else 0.0, log)
            for outcome in found:
                line = f"{outcome.name:10s} {outcome.status:8s} {outcome.seconds:4.0f} s  {outcome.detail}".rstrip()
                tell(line)
                log.write("visit", line)
            outcomes += found
    return outcomes


def plan(args: argparse.Namespace) -> list[list[Part]]:
    """The parts, those in one list side by side."""
    gpu = args.device == "cuda"
    no_gpu = "" if gpu else "--device cpu"
    python = sys.executable
    program = [python, str(HERE / "part.py")]
    options = ["--out", str(args.out), "--device", args.device, "--seconds", str(args.seconds)]
    options += ["--smoke"] if args.smoke else []

    def benchmark(name: str, seconds: float) -> Part:
        return Part(name, seconds, [[*program, name, *options]], limited=True)

    build = Part("build", 110, [[python, "setup.py", "build_ext", "--inplace"]], no_gpu, _build_environment(gpu))
    start, end = benchmark("ceilings", 30), benchmark("ceilings", 12)
    if args.tune:
        shards = [
            Part(f"compile {i}", 150, [[*program, "tune", *options, "--warm", "--shard", f"{i}/{args.shards}"]])
            for i in range(args.shards)
        ]
        groups = [[build], [start], shards, [benchmark("tune", 250)]]
    else:
        tests = Part("tests", 160, [_pytest()], no_gpu, {"OMP_NUM_THREADS": "1"})
        warm = Part("warm", 160, [[*program, *COMPILING, *options, "--warm"]], no_gpu, optional=True, limited=True)
        wishes = {"decode": 60, "still": 60, "shared": 25, "prefill": 50, "backward": 45, "scores": 20, "model": 60}
        groups = [[build], [start], [tests, sanitizer(gpu), warm]]
        groups += [[benchmark(name, wishes[name])] for name in BENCHMARKS] + [[end]]
    if args.only:
        known = {p.name for g in groups for p in g}
        unknown = set(args.only) - known
        if unknown:
            raise SystemExit(f"there is no part {', '.join(sorted(unknown))}; there are: {', '.join(sorted(known))}")
        groups = [[p for p in g if p.name in args.only] for g in groups]
    return [g for g in groups if g]


def _build_environment(gpu: bool) -> dict[str, str]:
    """Only this GPU's architecture is built, unless the environment names others: half the time."""
    if not gpu or os.environ.get("KVCOMPACT_CUDA_ARCHS"):
        return {}
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {"KVCOMPACT_CUDA_ARCHS": f"{major}{minor}{'a' if major >= 9 else ''}"}


def gpu_tests() -> list[str]:
    """The test files that have tests for a GPU: collecting the others would cost each worker seconds."""
    files = sorted((ROOT / "python_tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if re.search(r"mark\.gpu|\bDEVICES\b", f.read_text())]


def _pytest() -> list[str]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--tb=short", *gpu_tests()]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(WORKERS, (os.cpu_count() or 2) - 4))), "--dist", "worksteal"]
    return command


def sanitizer(gpu: bool) -> Part:
    """Small calls of the kernels under memcheck and racecheck, each tensor an allocation of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    skip = "" if gpu else "--device cpu"
    if not skip and tool is None:
        skip = "compute-sanitizer is not installed"
    if not skip and not any((ROOT / "csrc").glob("*/*.cu")):
        skip = "there are no CUDA sources"
    program = [sys.executable, str(HERE / "sanitize.py")]
    runs = [("memcheck", "cuda"), ("racecheck", "cuda"), ("memcheck", "triton")]
    # what libraries try while they load, and handle, is no finding: memcheck counts API calls that fail as errors
    options = {"memcheck": ["--report-api-errors", "no"]}
    commands = [
        [str(tool), "--tool", which, "--error-exitcode", "9", "--print-limit", "5", *options.get(which, [])]
        + [*program, "--backend", backend]
        for which, backend in runs
    ]
    return Part("sanitizer", 160, commands, skip, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"})


def prepare(out: Path) -> None:
    """Makes the folder; files of an earlier visit move into a folder of their own."""
    out.mkdir(parents=True, exist_ok=True)
    old = [out / name for name in OUTPUTS if (out / name).exists()]
    if old:
        kept = out / time.strftime("earlier-%Y%m%d-%H%M%S", time.localtime(max(p.stat().st_mtime for p in old)))
        kept.mkdir(exist_ok=True)
        for path in old:
            path.replace(kept / path.name)


def finish(out: Path, outcomes: list[Outcome]) -> str:
    """Writes the table and, where it can be drawn, the picture; returns the table."""
    sys.path[:0] = [str(p) for p in (HERE, HERE.parent, ROOT) if str(p) not in sys.path]
    from lab import read_rows
    from table import draw, report

    rows = read_rows(out / "rows.csv")
    text = report(rows, [(o.name, o.status, o.seconds, o.detail) for o in outcomes])
    (out / "table.txt").write_text(text + "\n")
    try:
        draw(rows, out / "rows.png")
    except Exception as error:  # noqa: BLE001 (the rows are what counts)
        print(f"no picture: {type(error).__name__}: {error}", file=sys.stderr)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes: whether the program works, not how fast it is"
    )
    parser.add_argument("--minutes", type=float, default=8.7, help="for all parts together")
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing per function and shape")
    parser.add_argument("--only", nargs="*", metavar="PART", help="only these parts")
    parser.add_argument(
        "--tune", action="store_true", help="measure candidate configurations of the Triton kernels instead"
    )
    parser.add_argument("--shards", type=int, default=10, help="processes that compile candidates while tuning")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(
                "bench-gpu needs a CUDA device, and this torch sees none "
                f"(torch {torch.__version__}); --device cpu --smoke only exercises the program",
                file=sys.stderr,
            )
            return 2
    signal.signal(signal.SIGTERM, _interrupt)
    prepare(args.out)
    start = time.monotonic()
    outcomes = run_visit(plan(args), 60 * args.minutes, args.out, functools.partial(print, flush=True))
    print()
    print(finish(args.out, outcomes))
    print(f"{time.monotonic() - start:.0f} s; everything in {args.out}")
    return 1 if any(o.bad for o in outcomes) else 0


def _interrupt(*_: object) -> None:
    """SIGTERM ends a visit as Ctrl-C does: with the parts that run."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
