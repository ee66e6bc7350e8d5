# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: timing, the description of the machine, saved rows."""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from kvcompact_kernels.backends.cpu import library
from kvcompact_kernels.testing.memory import requested_bytes
from kvcompact_kernels.version import __version__

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parents[1]
FLUSHES = 4  # an L2 cache is flushed by reading so many times its size


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the 20th, 50th and 80th percentile of ``calls`` calls.

    ``how``: "clock" on a CPU; on a GPU "graph" for replays of a captured graph and "launches" for ordinary calls, both
    between two events.
    """

    p20: float
    p50: float
    p80: float
    calls: int
    how: str = "clock"

    def divided(self, parts: int) -> Timing:
        """Of one of ``parts`` equal pieces of the call."""
        return Timing(self.p20 / parts, self.p50 / parts, self.p80 / parts, self.calls, self.how)


def measure(
    functions: dict[str, Callable[[int], object]], seconds: float = 1.0, least_calls: int = 5, most_calls: int = 200
) -> dict[str, Timing]:
    """Times functions against each other: one call of each in turn, so that what else the machine does hits them alike.

    Args:
        functions: each takes the number of the call, to pick one of several inputs (so that none stays in the cache).
        seconds: wanted time per function; a slow function is called ``least_calls`` times nevertheless.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(0)
    call = 1
    active = set(functions)
    while active:
        for name, function in functions.items():
            if name not in active:
                continue
            start = time.perf_counter()
            function(call)
            times[name].append(1e3 * (time.perf_counter() - start))
            spent, calls = sum(times[name]) / 1e3, len(times[name])
            if calls >= most_calls or (calls >= least_calls and spent >= seconds):
                active.discard(name)
        call += 1
    return {name: _percentiles(values) for name, values in times.items()}


def _percentiles(values: list[float], how: str = "clock") -> Timing:
    ordered = sorted(values)
    p20, p50, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, len(ordered), how)


def capture(function: Callable[[], object]) -> tuple[Callable[[], None] | None, str]:
    """``(replay, "")`` of a CUDA graph of one call, or ``(None, why not)``. The call is made twice, then captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            function()  # compiles, and fills the caches of libraries, where a capture may not
            # a capture that fails leaves the allocator in disorder: what waits for the device is found before
            torch.cuda.set_sync_debug_mode("error")
            function()
    except RuntimeError as error:
        return None, _first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            function()
    except RuntimeError as error:
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch.cuda.synchronize()
        return None, _first_line(error)
    return graph.replay, ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


class Flush:
    """Reads more than the L2 cache of a GPU holds, so that the next call finds its inputs in memory. Nothing is written:
    dirty lines would be written back while the next call runs."""

    def __init__(self, device: torch.device | str) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.data = torch.ones(max(FLUSHES * cache, 64 << 20) // 4, dtype=torch.int32, device=device)
        self.sum = torch.empty((), dtype=torch.int64, device=device)

    def __call__(self) -> None:
        torch.sum(self.data, dim=0, out=self.sum)


def measure_cuda(
    functions: dict[str, Callable[[], object]],
    seconds: float = 0.2,
    least_calls: int = 5,
    most_calls: int = 100,
    graphs: bool = True,
) -> dict[str, Timing]:
    """:func:`measure` on the current CUDA device: between events, one call of each in turn, the L2 cache flushed before each.

    The flush runs on the device while the host launches the call behind it, so short calls do not wait for the host.

    Args:
        graphs: captures each function once and times replays; one that cannot be captured is launched as it is.
    """
    flush = Flush(torch.cuda.current_device())
    ready, how, times = {}, {}, {}
    for name, function in functions.items():
        function()
        replay, reason = capture(function) if graphs else (None, "")
        if reason:
            print(f"    {name} runs without a graph: {reason}")
        ready[name], how[name] = replay or function, "graph" if replay else "launches"

    def timed(name: str) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        begin.record()
        ready[name]()
        end.record()
        return begin, end

    wanted = {}
    for name in functions:
        timed(name)
        begin, end = timed(name)
        end.synchronize()
        wanted[name] = min(most_calls, max(least_calls, math.ceil(seconds * 1e3 / (begin.elapsed_time(end) + 0.1))))
        times[name] = []
    for start in range(0, max(wanted.values(), default=0), 10):  # the queue of launches stays short
        events = [
            (name, *timed(name))
            for turn in range(start, start + 10)
            for name, number in wanted.items()
            if turn < number
        ]
        torch.cuda.synchronize()
        for name, begin, end in events:
            times[name].append(begin.elapsed_time(end))
    return {name: _percentiles(values, how[name]) for name, values in times.items()}


def measure_on(
    device: str, functions: dict[str, Callable[[], object]], seconds: float, graphs: bool = True, least_calls: int = 5
) -> dict[str, Timing]:
    """Times functions against each other on ``"cpu"`` or ``"cuda"``."""
    if device == "cpu":
        return measure({n: lambda _, f=f: f() for n, f in functions.items()}, seconds, least_calls)
    return measure_cuda(functions, seconds, least_calls, graphs=graphs)


def temporary_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """The most that a call holds at once from PyTorch's allocator, less the tensors that it returns."""
    function()
    if device == "cpu":
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(profile_memory=True, activities=activities) as profile:
            result = function()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = requested_bytes()
        result = function()
        torch.cuda.synchronize()
        peak = requested_bytes("peak") - before
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in result if x is not None}
    return peak - sum(kept.values())


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes, default=32 << 20)


def machine(device: str = "cpu") -> dict[str, str]:
    """The columns that say where and with what a row was measured."""
    row = {"threads": str(torch.get_num_threads()), "torch": torch.__version__, "kvcompact": __version__}
    if device == "cpu":
        isa = library.isa() if library.available()[0] else ""
        row |= {"device": f"{cpu_name()} ({os.cpu_count()} cores)", "isa": isa, "driver": ""}
    else:
        row |= {"device": torch.cuda.get_device_name(device), "isa": "", "driver": driver_version()}
    return row | {"python": platform.python_version(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}


def versions() -> str:
    """Everything that a GPU row depends on, in one cell."""
    found = {"kvcompact": __version__, "torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return ", ".join(f"{k} {v}" for k, v in (found | {"python": platform.python_version()}).items())


@functools.cache
def driver_version() -> str:
    """Version of the NVIDIA driver; empty where it cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.split("\n")[0].strip() if result.returncode == 0 else ""


@functools.cache
def commit() -> str:
    """The commit that is measured: ``$KVCOMPACT_COMMIT``, or git's, or a hash of the sources where there is no git."""
    given = os.environ.get("KVCOMPACT_COMMIT", "").strip()
    if given:
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        found = result.stdout.strip() if result.returncode == 0 else ""
    except OSError:
        found = ""
    return found or f"sources-{sources_digest()}"


def sources_digest() -> str:
    """Twelve digits of a hash of what is built and run: the package's Python and JSON files and everything in csrc."""
    digest = hashlib.sha256()
    kept = [p for p in (ROOT / "kvcompact_kernels").rglob("*") if p.suffix in (".py", ".json")]
    for path in sorted([*kept, *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Rows:
    """Rows of one benchmark; saved as a CSV whose columns are those of the first row, and printed as they come."""

    def __init__(self, path: Path, shown: tuple[str, ...]) -> None:
        self.path, self.shown, self.rows = path, shown, []

    def add(self, **row: object) -> None:
        self.rows.append({name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in row.items()})
        if len(self.rows) == 1:
            print("  ".join(f"{name:>{self._width(name)}}" for name in self.shown))
        print("  ".join(f"{self.rows[-1][name]:>{self._width(name)}}" for name in self.shown), flush=True)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        print(f"{len(self.rows)} rows in {self.path}")

    @staticmethod
    def _width(name: str) -> int:
        return max(len(name), 9)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows (default: benchmarks/results)")
    parser.add_argument("--full", action="store_true", help="every shape; default is a quick selection")
    parser.add_argument("--threads", type=int, help="default: as torch finds")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per function and shape")
    return parser
