# SPDX-License-Identifier: Apache-2.0
"""What the benchmark programs of a GPU visit share: rows and goals, ceilings, correctness before time, and what is done
with a case that is wrong, fails or comes too late."""

from __future__ import annotations

import contextlib
import csv
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import Timing, commit, machine, measure_on, versions
from peaks import CudaReadProbe, ReadProbe, matmul
from torch import Tensor

from kvcompact_kernels.backends.registry import BackendUnavailableError, backend_names

COLUMNS = (
    "part",
    "op",
    "shape",
    "dtype",
    "role",
    "backend",
    "how",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "calls",
    "tb_s",
    "tflop_s",
    "ceiling",
    "percent",
    "peer",
    "ratio",
    "goal",
    "met",
    "temporary_mib",
    "note",
    "device",
    "driver",
    "versions",
    "commit",
    "date",
)
DRAWS = 3  # a check that fails is repeated on fresh inputs: the budget compares the tails of two rounding errors
PEER_TOLERANCE = 0.05  # relative error (Frobenius) of a peer against the kernel: whether it computes the same at all
EXIT_WRONG, EXIT_FAILED, EXIT_BROKEN = 3, 4, 5


class WrongResultError(Exception):
    """A result that breaks the error budget: it is not timed."""


@dataclass(frozen=True)
class Work:
    """The fewest bytes that a call moves and the floating-point operations that it makes."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Goal:
    """A wish about a row: ``metric`` is "percent" or "memory_percent" (of a ceiling, of the bytes read), "ms" or "ratio"
    (to ``peer``)."""

    metric: str
    limit: float
    peer: str = ""
    kernel: str = ""  # only about this one

    @property
    def at_least(self) -> bool:
        return self.metric in ("percent", "ratio")

    def __str__(self) -> str:
        unit = {"percent": "%", "memory_percent": "% memory", "ms": " ms", "ratio": "x"}[self.metric]
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{unit}"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Ceilings:
    """TB/s of a kernel that only reads, and TFLOP/s of a large bf16 product, both measured in this visit."""

    read: float
    matmul: float

    def share(self, work: Work, milliseconds: float) -> tuple[str, float]:
        """Which ceiling binds, and what percentage of it was reached."""
        floors = {"read": work.bytes / self.read / 1e9, "matmul": work.operations / self.matmul / 1e9}
        binding = max(floors, key=floors.get)
        return binding, 100 * floors[binding] / milliseconds


def measure_ceilings(device: str, smoke: bool) -> tuple[Ceilings, dict[str, Timing]]:
    """The ceilings and the times behind them."""
    seconds = 0.02 if smoke else 0.1
    size = 256 if smoke else 8192
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    product, operations = matmul(dtype, size, device)
    if device == "cpu":
        probe = ReadProbe()
        times = measure_on("cpu", {"read": lambda: probe(0), "matmul": product}, seconds)
        read = probe.gigabytes_per_second(times["read"].p50) / 1e3
    else:
        times = measure_on(device, {"matmul": product}, 3 * seconds, graphs=False)
        read, times["read"] = CudaReadProbe(device).fastest(seconds)
    return Ceilings(read, operations / times["matmul"].p50 / 1e9), times


class RowFile:
    """A CSV that grows by whole rows, so that what is written stays when the program dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._where = None

    def add(self, device: str, **cells: object) -> None:
        unknown = cells.keys() - set(COLUMNS)
        if unknown:
            raise ValueError(f"rows have no column {', '.join(sorted(unknown))}")
        if self._where is None:
            here = machine(device)
            self._where = {name: here[name] for name in ("device", "driver", "date")}
            self._where |= {"versions": versions(), "commit": commit()}
        row = {name: _cell(value) for name, value in {**cells, **self._where}.items()}
        new = not self.path.exists() or self.path.stat().st_size == 0
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a :class:`RowFile`, none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Bench:
    """One part of a visit: its cases, one after the other, each on its own.

    Args:
        seconds: of timing per function.
        deadline: ``time.monotonic()`` after which no case is begun.
        warm: everything but the timing and the rows: what is compiled then waits in the caches on disk.
        shard: ``"i/n"``: which of n equal shares of a long list this process takes (``tune``).
    """

    def __init__(
        self,
        part: str,
        device: str,
        out: Path,
        smoke: bool = False,
        seconds: float = 0.2,
        deadline: float = float("inf"),
        warm: bool = False,
        shard: str = "0/1",
    ) -> None:
        self.part, self.device, self.out, self.smoke = part, device, out, smoke
        self.seconds, self.deadline, self.warm, self.shard = seconds, deadline, warm, shard
        self.file = RowFile(out / "rows.csv")
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.cut: list[str] = []
        self.broken = False
        self._case, self._last_draw = "", True
        self._ceilings: Ceilings | None = None

    @property
    def ceilings(self) -> Ceilings:
        if self._ceilings is None:
            saved = self.out / "ceilings.json"
            if saved.exists():
                self._ceilings = Ceilings(**json.loads(saved.read_text()))
            else:
                self._ceilings, _ = measure_ceilings(self.device, self.smoke)
        return self._ceilings

    def save_ceilings(self, ceilings: Ceilings) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "ceilings.json").write_text(json.dumps(asdict(ceilings)))

    @property
    def exit_code(self) -> int:
        if self.broken:
            return EXIT_BROKEN
        return EXIT_WRONG if self.wrong else EXIT_FAILED if self.failed else 0

    def attempt(self, name: str, case: Callable[..., None], *args: object) -> None:
        """Runs a case; what goes wrong with it is said and kept, and does not stop the others.

        A wrong result is tried again on fresh inputs (``case`` draws its own), for the error budget compares the largest of
        many rounding errors and fails by chance now and then.
        """
        if self.broken:
            return
        if time.monotonic() > self.deadline:
            self.cut.append(name)
            print(f"CUT {self.part}: {name}: no time was left", flush=True)
            return
        start = time.monotonic()
        for draw in range(DRAWS):
            self._case, self._last_draw = name, draw == DRAWS - 1
            try:
                case(*args)
                break
            except WrongResultError as error:
                if self._last_draw:
                    self.wrong.append(name)
                    print(f"WRONG {self.part}: {name}: {error}", flush=True)
                else:
                    print(f"    {name}, draw {draw + 1}: {error}", flush=True)
            except Exception as error:  # noqa: BLE001 (whatever it is, the other cases are wanted)
                self.failed.append(name)
                print(f"FAILED {self.part}: {name}: {_first_line(error)}", flush=True)
                traceback.print_exc()
                break
            finally:
                self._release()
        print(f"  {name}: {time.monotonic() - start:.1f} s", flush=True)

    def _release(self) -> None:
        gc.collect()
        if self.device == "cpu":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # an illegal access ends the context: nothing after it can run
            self.broken = True
            print(f"FAILED {self.part}: the CUDA context is lost: {error}", flush=True)
            return
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

    def verify(self, check: Callable[..., None], *args: object, **options: object) -> None:
        """Runs a check that raises AssertionError.

        Raises:
            WrongResultError: in its place.
        """
        try:
            check(*args, **options)
        except AssertionError as error:
            raise WrongResultError(str(error)) from error

    def kernels(self, op: str, call: Callable[[str], object]) -> dict[str, Callable[[], object]]:
        """``name -> call`` of every backend of an op that runs ``call(name)`` here; PyTorch's own counts as a peer.

        One that takes the call and then fails is kept as a failure, and the others go on.
        """
        found = {}
        for name in backend_names(op):
            if name == "torch":
                continue
            try:
                call(name)
                self._wait()
            except BackendUnavailableError as error:
                print(f"    {error}")
                continue
            except Exception as error:  # the other backends are wanted
                self.failed.append(f"{self._case} ({name})")
                print(f"FAILED {self.part}: {self._case}: {name}: {_first_line(error)}", flush=True)
                traceback.print_exc()
                self._release()
                if self.broken:
                    raise
                continue
            found[name] = lambda name=name: call(name)
        if not found:
            raise RuntimeError(f"no kernel of {op} runs here")
        return found

    def right(
        self, ours: dict[str, Callable[[], object]], check: Callable[[str], None]
    ) -> dict[str, Callable[[], object]]:
        """Those kernels for which ``check(name)`` raises no AssertionError; a wrong one is not timed, the others are.

        Raises:
            WrongResultError: one is wrong and there are fresh inputs to try, or all are.
        """
        kept, wrong = {}, {}
        for name, call in ours.items():
            try:
                self.verify(check, name)
                kept[name] = call
            except WrongResultError as error:
                if not self._last_draw:
                    raise
                wrong[name] = error
        if not kept:
            raise next(iter(wrong.values()))
        for name, error in wrong.items():
            self.wrong.append(f"{self._case} ({name})")
            print(f"WRONG {self.part}: {self._case}: {name}: {error}", flush=True)
        return kept

    def time(
        self,
        ours: dict[str, Callable[[], object]],
        peers: dict[str, Callable[[], object]],
        expected: dict[str, Tensor] | None = None,
        graphs: bool = True,
        least_calls: int = 5,
    ) -> dict[str, Timing]:
        """Times kernels and peers against each other; a peer that cannot run, or computes something else, is left out.

        Args:
            expected: what peers must give; those that are not named compute another function (no bias).
        """
        usable = dict(ours)
        for name, call in peers.items():
            try:
                result = call()
                if name in (expected or {}):
                    result = result[0] if isinstance(result, (tuple, list)) else result
                    error = relative_error(result, expected[name])
                    if not error < PEER_TOLERANCE:
                        print(f"    {name} is left out: it errs by {error:.2g} against the kernel")
                        continue
                self._wait()
            except Exception as error:  # noqa: BLE001 (whatever a peer raises, the kernel's own row is wanted)
                print(f"    {name} is left out: {_first_line(error)}")
                self._release()
                continue
            usable[name] = call
        if self.warm:
            for call in ours.values():
                call()
            self._wait()
            return {}
        times = measure_on(self.device, usable, self.seconds, graphs, least_calls)
        return times

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def record(
        self,
        op: str,
        shape: str,
        dtype: torch.dtype,
        times: dict[str, Timing],
        ours: Iterator[str] | list[str],
        work: Work,
        works: dict[str, Work] | None = None,
        groups: dict[str, list[str]] | None = None,
        goals: list[Goal] | None = None,
        memory: dict[str, float] | None = None,
        memory_base: float | None = None,
        notes: dict[str, str] | None = None,
    ) -> None:
        """Writes the rows of one case: one of each peer, and for each kernel one without a peer and one per peer.

        Args:
            work, works: of a call; of those backends whose calls differ.
            groups: name -> peers; the fastest of them is one more peer by that name.
            memory, memory_base: backend -> temporary bytes; what the goal of memory is a percentage of.
        """
        if not times:
            return
        works, groups, goals, memory, notes = works or {}, groups or {}, goals or [], memory or {}, notes or {}
        kernels = [name for name in ours if name in times]
        best = {
            g: min((n for n in names if n in times), key=lambda n: times[n].p50, default=None)
            for g, names in groups.items()
        }
        for name, timing in times.items():
            amount = works.get(name, work)
            binding, percent = self.ceilings.share(amount, timing.p50)
            row = {
                "part": self.part,
                "op": op,
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "role": "kernel" if name in kernels else "peer",
                "backend": name,
                "how": timing.how,
                "ms_p20": timing.p20,
                "ms_p50": timing.p50,
                "ms_p80": timing.p80,
                "calls": timing.calls,
                "tb_s": amount.bytes / timing.p50 / 1e9,
                "tflop_s": amount.operations / timing.p50 / 1e9,
                "ceiling": binding,
                "percent": percent,
                "temporary_mib": memory[name] / 2**20 if name in memory else None,
                "note": notes.get(name, ""),
            }
            figures = {"percent": percent, "ms": timing.p50}
            if name in memory and memory_base:
                figures["memory_percent"] = 100 * memory[name] / memory_base
            own = [g for g in goals if name in kernels and not g.peer and g.metric in figures]
            for goal in own or [None]:
                self.file.add(self.device, **row, **_verdict(goal, figures))
            if name not in kernels:
                continue
            for peer, other in [*((p, p) for p in times if p != name), *((g, b) for g, b in best.items() if b)]:
                ratio = times[other].p50 / timing.p50
                goal = next((g for g in goals if g.peer == peer and g.kernel in ("", name)), None)
                note = {"note": f"the fastest is {other}"} if peer in groups else {}
                self.file.add(
                    self.device, **{**row, **note}, peer=peer, ratio=ratio, **_verdict(goal, {"ratio": ratio})
                )
        shown = ", ".join(f"{name} {timing.p50:.4g} ms" for name, timing in times.items())
        print(f"  {op} {shape}: {shown}", flush=True)


def _verdict(goal: Goal | None, figures: dict[str, float]) -> dict[str, str]:
    if goal is None:
        return {}
    return {"goal": str(goal), "met": "yes" if goal.met(figures[goal.metric]) else "no"}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:300]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``; NaN where either is not finite."""
    expected = expected.float()
    return ((result.float().reshape(expected.shape) - expected).norm() / expected.norm()).item()
