# SPDX-License-Identifier: Apache-2.0
"""The programs of a GPU visit (benchmarks/gpu), run on the CPU: rows, refusals, time limits, crashes, the table."""

import csv
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvcompact_kernels.backends.cpu import library

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT / "benchmarks" / "gpu", ROOT / "benchmarks"]
MODULES = (
    "lab",
    "routes",
    "table",
    "visit",
    "ceilings",
    "decode",
    "prefill",
    "backward",
    "scores",
    "still",
    "shared",
    "tune",
)


@pytest.fixture(scope="module")
def gpu():
    """The modules of benchmarks/gpu, by name."""
    sys.path[:0] = [str(f) for f in FOLDERS]
    before = set(sys.modules)
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        for folder in FOLDERS:
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:  # plain names, which other tests may mean otherwise
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
                del sys.modules[name]


@pytest.fixture
def bench(gpu, tmp_path, monkeypatch):
    """A bench with known ceilings; of SDPA's backends only the one that a CPU has, for the others cost time to refuse."""
    monkeypatch.setattr(gpu.routes, "BACKENDS", {"flash": gpu.routes.BACKENDS["flash"]})
    monkeypatch.setattr(gpu.lab, "gc", SimpleNamespace(collect=lambda: 0))  # of a heap full of other tests' modules
    found = gpu.lab.Bench("decode", "cpu", tmp_path, smoke=True, seconds=0.001)
    found.save_ceilings(gpu.lab.Ceilings(read=0.5, matmul=2.0))
    return found


def rows_of(bench):
    with open(bench.file.path, newline="") as file:
        return list(csv.DictReader(file))


def small_case(gpu):
    return gpu.decode.Case("SmolLM2-135M", 2, 33, 5, torch.float32)


def test_rows_of_a_case(gpu, bench):
    case = small_case(gpu)
    bench.attempt("decode", gpu.decode.large, bench, case)
    assert bench.exit_code == 0 and not bench.wrong and not bench.failed
    rows = rows_of(bench)
    assert tuple(rows[0]) == gpu.lab.COLUMNS
    times = {r["backend"]: float(r["ms_p50"]) for r in rows}
    assert {"cpu", "cpu without beta", "sdpa flash", "flex + beta"} <= times.keys()
    for row in rows:
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"]) and int(row["calls"]) >= 5
        assert row["commit"] and row["versions"] and row["device"] and row["date"]
        milliseconds = float(row["ms_p50"])
        floors = {"read": float(row["tb_s"]) / 0.5, "matmul": float(row["tflop_s"]) / 2.0}
        assert row["ceiling"] == max(floors, key=floors.get)
        assert float(row["percent"]) == pytest.approx(100 * max(floors.values()), rel=1e-3)
        if row["backend"] == "cpu":
            assert float(row["tb_s"]) == pytest.approx(case.bytes_read() / milliseconds / 1e9, rel=1e-3)
            assert float(row["tflop_s"]) == pytest.approx(case.operations() / milliseconds / 1e9, rel=1e-3)
    ratios = {r["peer"]: float(r["ratio"]) for r in rows if r["role"] == "kernel" and r["peer"]}
    assert ratios["sdpa flash"] == pytest.approx(times["sdpa flash"] / times["cpu"], rel=1e-3)
    assert ratios["best SDPA without a bias"] == ratios["sdpa flash"]
    biased = [n for n in gpu.routes.BIASED if n in times]
    assert ratios["best route with a bias"] == pytest.approx(min(times[n] for n in biased) / times["cpu"], rel=1e-3)
    assert {r["goal"]: r["met"] for r in rows if r["goal"] == ">= 90%"} == {">= 90%": "no"}


def test_a_wrong_result_is_not_timed_and_fails_the_part(gpu, bench, monkeypatch):
    home = sys.modules["bench_compact_attention"]
    right = home.compact_attention

    def wrong(*args, **options):
        out = right(*args, **options)
        if options["backend"] != "cpu":
            return out
        return (out[0] * 1.01, out[1]) if isinstance(out, tuple) else out * 1.01

    monkeypatch.setattr(home, "compact_attention", wrong)
    bench.attempt("decode", gpu.decode.large, bench, small_case(gpu))
    assert bench.wrong == ["decode"] and bench.exit_code == 3
    assert not bench.file.path.exists()
    monkeypatch.setattr(home, "compact_attention", right)
    bench.attempt("decode again", gpu.decode.large, bench, small_case(gpu))
    assert rows_of(bench) and bench.exit_code == 3


def test_one_wrong_kernel_of_several_is_left_out_and_fails_the_part(gpu, bench):
    x, draws, timed = torch.ones(3), [], []

    def case():
        draws.append(1)
        ours = {"right": lambda: x, "wrong": lambda: 2 * x}

        def check(name):
            assert torch.equal(ours[name](), x), f"{name} errs"

        timed.extend(bench.right(ours, check))

    bench.attempt("two kernels", case)
    assert len(draws) == gpu.lab.DRAWS and timed == ["right"]
    assert bench.wrong == ["two kernels (wrong)"] and bench.exit_code == 3


def test_one_failing_kernel_of_several_is_left_out_and_fails_the_part(gpu, bench, capsys):
    def call(name):
        if name == "cuda":
            raise RuntimeError("too many resources requested")
        if name == "triton":
            raise gpu.lab.BackendUnavailableError("triton: no")

    bench.attempt("launch", lambda: bench.kernels("compact_attention", call))
    assert bench.failed == ["launch (cuda)"] and bench.exit_code == 4
    assert "FAILED decode: launch: cuda: RuntimeError: too many" in capsys.readouterr().out


def test_bad_luck_of_one_draw_is_forgiven(gpu, bench):
    draws = []

    def case():
        draws.append(torch.rand(()).item())
        bench.verify(lambda: pytest.fail("unlucky") if len(draws) == 1 else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "verify", lambda check: _verified(gpu, len(draws)))
        bench.attempt("luck", case)
    assert len(draws) == 2 and bench.exit_code == 0


def _verified(gpu, draw):
    if draw == 1:
        raise gpu.lab.WrongResultError("unlucky")


def test_verify_turns_only_assertions_into_wrong_results(gpu, bench):
    def check(value):
        assert value == 1

    bench.verify(check, 1)
    with pytest.raises(gpu.lab.WrongResultError):
        bench.verify(check, 2)
    with pytest.raises(ZeroDivisionError):
        bench.verify(lambda: 1 / 0)


def test_a_failing_case_does_not_stop_the_others(bench, capsys):
    ran = []
    bench.attempt("bad", lambda: 1 / 0)
    bench.attempt("good", ran.append, 1)
    assert ran == [1] and bench.failed == ["bad"] and bench.exit_code == 4
    assert "FAILED decode: bad: ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_no_case_begins_after_the_deadline(gpu, tmp_path, capsys):
    bench = gpu.lab.Bench("decode", "cpu", tmp_path, deadline=time.monotonic() - 1)
    bench.attempt("late", pytest.fail)
    assert bench.cut == ["late"] and bench.exit_code == 0
    assert capsys.readouterr().out.startswith("CUT decode: late")


def test_peers_that_fail_or_compute_something_else_are_left_out(bench, capsys):
    x = torch.ones(3)
    peers = {
        "same": lambda: x,
        "other": lambda: 2 * x,
        "nan": lambda: x * math.nan,
        "broken": lambda: 1 / 0,
        "of another kind": lambda: 7 * x,
    }
    expected = dict.fromkeys(("same", "other", "nan"), x)
    times = bench.time({"ours": lambda: x}, peers, expected)
    assert set(times) == {"ours", "same", "of another kind"}
    out = capsys.readouterr().out
    assert "other is left out: it errs by 1" in out and "broken is left out: ZeroDivisionError" in out


def test_warming_calls_everything_and_writes_nothing(gpu, bench):
    bench.warm = True
    bench.attempt("decode", gpu.decode.large, bench, small_case(gpu))
    assert bench.exit_code == 0 and not bench.file.path.exists()


class FakeCuda:
    """A device whose clock only functions move, by what they cost: whether ``measure_cuda`` measures what it says."""

    def __init__(self):
        self.now, self.log, self.capturing, self.strict = 0.0, [], False, False
        self.uncapturable, self.waiting = (), ()

    def function(self, name, cost):
        def call():
            if self.capturing and name in self.uncapturable:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            if self.strict and name in self.waiting:
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.capturing:
                self.captured = call
            else:
                self.now += cost
                self.log.append(name)

        return call


@pytest.fixture
def fake_cuda(gpu, monkeypatch):
    common, fake = sys.modules["common"], FakeCuda()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = fake.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    class Context:
        def __init__(self, *args, **options):
            self.graph = args[0] if args else None

        def __enter__(self):
            fake.capturing = isinstance(self.graph, Graph)

        def __exit__(self, kind, *error):
            if isinstance(self.graph, Graph) and kind is None:
                self.graph.replay = fake.captured
            fake.capturing = False

    class Graph:
        pass

    stream = SimpleNamespace(wait_stream=lambda other: None)
    names = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Context,
        "stream": Context,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "current_device": lambda: 0,
        "graph_pool_handle": lambda: (0, 0),
        "synchronize": lambda: None,
        "set_sync_debug_mode": lambda mode: setattr(fake, "strict", mode == "error"),
    }
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(common, "Flush", lambda device: fake.function("flush", 0.07))
    return fake


@pytest.mark.parametrize("graphs", [True, False])
def test_timing_on_a_device(gpu, fake_cuda, graphs):
    common, fake = sys.modules["common"], fake_cuda
    fake.uncapturable, fake.waiting = ("slow",), ("waits",)
    costs = {"quick": 0.01, "slow": 40.0, "waits": 300.0}
    functions = {name: fake.function(name, cost) for name, cost in costs.items()}
    times = common.measure_cuda(functions, seconds=0.2, least_calls=5, most_calls=23, graphs=graphs)
    assert times["quick"] == common.Timing(*[pytest.approx(0.01)] * 3, 23, "graph" if graphs else "launches")
    assert times["slow"] == common.Timing(*[pytest.approx(40.0)] * 3, 5, "launches")
    assert times["waits"].how == "launches" and times["waits"].p50 == pytest.approx(300.0)
    assert not fake.strict and not fake.capturing
    timed = fake.log[fake.log.index("flush") :]
    assert timed[::2] == ["flush"] * (len(timed) // 2)  # before every timed call
    assert timed[13:24:2] == ["quick", "slow", "waits"] * 2  # in turn, after two calls of each that are not kept


def test_rows_append_and_refuse_unknown_columns(gpu, tmp_path):
    for backend in ("a", "b"):  # two processes, one after the other
        file = gpu.lab.RowFile(tmp_path / "rows.csv")
        file.add("cpu", part="p", backend=backend, ms_p50=1.23456789, note="x, y")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[0] == ",".join(gpu.lab.COLUMNS) and len(lines) == 3
    assert [r["ms_p50"] for r in gpu.lab.read_rows(tmp_path / "rows.csv")] == ["1.2346"] * 2
    with pytest.raises(ValueError, match="no column colour"):
        file.add("cpu", colour="red")
    assert gpu.lab.read_rows(tmp_path / "none.csv") == []


def test_goals(gpu):
    goal = gpu.lab.Goal
    assert goal("percent", 90).met(91) and not goal("percent", 90).met(89)
    assert goal("ms", 0.01).met(0.009) and not goal("ms", 0.01).met(0.011)
    assert goal("ratio", 2, "x").met(2) and goal("memory_percent", 5).met(4)
    assert str(goal("ms", 18.0)) == "<= 18 ms" and str(goal("ratio", 1.3, "x")) == ">= 1.3x"


def test_ceilings_are_measured_once_and_again_at_the_end(gpu, tmp_path, capsys):
    bench = gpu.lab.Bench("ceilings", "cpu", tmp_path, smoke=True)
    gpu.ceilings.run(bench)
    first = json.loads((tmp_path / "ceilings.json").read_text())
    gpu.ceilings.run(bench)
    assert json.loads((tmp_path / "ceilings.json").read_text()) == first
    rows = rows_of(bench)
    assert [r["shape"] for r in rows] == ["read (start)", "matmul (start)", "read (end)", "matmul (end)"]
    assert all(float(r["tb_s"] or r["tflop_s"]) > 0 for r in rows) and rows[0]["role"] == "ceiling"


@pytest.mark.parametrize("name", ["prefill", "backward", "shared", "scores"])
def test_parts_run_whole(gpu, bench, monkeypatch, name):
    module = getattr(gpu, name)
    monkeypatch.setattr(module, "CASES", module.CASES[1:2])
    bench.part = name
    module.run(bench)
    assert bench.exit_code == 0, (bench.wrong, bench.failed)
    kernels = [r for r in rows_of(bench) if r["role"] == "kernel"]
    assert kernels and all(float(r["ms_p50"]) > 0 for r in kernels)


def test_equal_operations_of_the_unbiased_peers(gpu):
    """The keys that SDPA sees in prefill stand for as many visible pairs as the kernel has."""
    case = gpu.prefill.CASES[0]
    inputs = SimpleNamespace(
        peer_layout=lambda c: [torch.zeros(1, 8, c.slots + c.tail, 1)] * 2, query=torch.zeros(1, 32, 8, 1)
    )
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.routes, "unbiased", lambda q, k, v: seen.append(k.shape[2]) or {})
        gpu.prefill.equal_work(case, inputs)
    heads, _, d = sys.modules["bench_compact_attention"].MODELS[case.model]
    assert 4.0 * heads * d * case.query_len * seen[0] == pytest.approx(case.operations(), rel=1e-3)


def test_operations_of_still(gpu):
    """As many as a profiler counts in PyTorch's own route, which makes the same matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    still = sys.modules["bench_still_compaction"]
    case = still.Case("SmolLM2-135M", 96, 16, torch.float32)
    for options in ({}, {"num_blocks": 1, "self_attention": False}):
        config = gpu.still.StillConfig(slots=16, head_dim=64, **options)
        layer = still.Layer(case, config)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            gpu.still.of_layer(layer, "torch")
        # the head of beta is a vector, which neither counts
        assert counter.get_total_flops() == gpu.still.operations(config, 96, 3)


def part(gpu, name, code, seconds=10.0, **options):
    return gpu.visit.Part(name, seconds, [[sys.executable, "-c", code]], **options)


def test_a_part_that_overruns_is_cut_with_its_children(gpu, tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid)); print('begun', flush=True); time.sleep(60)\n"
    )
    start = time.monotonic()
    groups = [[part(gpu, "slow", code, 1)], [part(gpu, "after", "print(1)", 19)]]
    slow, after = gpu.visit.run_visit(groups, 100, tmp_path, str)  # 5 s for the first
    assert (slow.status, after.status) == ("cut", "ok") and "overran" in slow.detail and not slow.bad
    assert time.monotonic() - start < 50
    stat = Path(f"/proc/{child.read_text()}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of the part that was cut still runs")
    assert "[slow] begun" in (tmp_path / "visit.log").read_text()


def test_crashes_and_failures_are_told_apart_and_take_nothing_with_them(gpu, tmp_path):
    groups = [
        [part(gpu, "abort", "import os; print('last words', flush=True); os.abort()", limited=True)],
        [part(gpu, "wrong", "print('WRONG wrong: decode: max error'); raise SystemExit(3)", limited=True)],
        [part(gpu, "failed", "raise SystemExit(4)", limited=True)],
        [part(gpu, "build", "raise SystemExit(1)")],
        [gpu.visit.Part("none", 5, [["/does/not/exist"]])],
        [gpu.visit.Part("left out", 5, skip="no GPU")],
        [part(gpu, "good", "print('CUT good: late: no time was left')", limited=True)],
    ]
    told = []
    outcomes = {o.name: o for o in gpu.visit.run_visit(groups, 60, tmp_path, told.append)}
    wanted = {"abort": "crashed", "wrong": "wrong", "failed": "failed", "build": "failed", "none": "failed"}
    assert {n: o.status for n, o in outcomes.items()} == {**wanted, "left out": "skipped", "good": "ok"}
    assert "last words" in outcomes["abort"].detail and "exit -6" in outcomes["abort"].detail
    assert "WRONG 1" in outcomes["wrong"].detail and "CUT 1" in outcomes["good"].detail
    assert [o.bad for o in outcomes.values()] == [True] * 5 + [False] * 2
    assert len(told) == len(groups)


def test_optional_parts_end_with_the_others(gpu, tmp_path):
    group = [
        part(gpu, "tests", "print('a.py::t PASSED')"),
        part(gpu, "warm", "import time; time.sleep(60)", optional=True),
    ]
    start = time.monotonic()
    outcomes = gpu.visit.run_visit([group], 50, tmp_path, str)
    assert [(o.name, o.status) for o in outcomes] == [("tests", "ok"), ("warm", "ended")]
    assert outcomes[0].detail == "1 passed" and time.monotonic() - start < 50


def test_each_test_counts_once(gpu, tmp_path):
    lines = ["[gw1] [ 50%] FAILED a.py::t", "[gw0] [100%] PASSED a.py::u", "FAILED a.py::t - AssertionError: ERROR"]
    tests = part(gpu, "tests", f"print({chr(10).join(lines)!r}); raise SystemExit(1)")
    outcome = gpu.visit.run_visit([[tests]], 50, tmp_path, str)[0]
    assert (outcome.status, outcome.detail) == ("failed", "1 passed, 1 failed")


def test_a_lost_context_ends_the_process_that_tests(monkeypatch, request):
    """With worksteal it would fail, one after the other, all tests that are left."""
    conftest = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "MOST_KEPT"))
    ended, item = [], SimpleNamespace(keywords={"gpu": True})

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(conftest.os, "_exit", ended.append)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    conftest.pytest_runtest_setup(item)
    assert not ended
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    conftest.pytest_runtest_setup(SimpleNamespace(keywords={}))
    assert not ended
    conftest.pytest_runtest_setup(item)
    assert ended == [1]
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    with pytest.raises(pytest.exit.Exception, match="context is lost: an illegal"):
        conftest.pytest_runtest_setup(item)


def test_what_one_part_leaves_over_goes_to_the_next(gpu, tmp_path):
    quick, limits = part(gpu, "quick", "pass", 100), []
    code = "import sys; print(sys.argv[1:])"
    gpu.visit.run_visit([[quick], [part(gpu, "next", code, 100, limited=True)]], 20, tmp_path, limits.append)
    line = next(x for x in (tmp_path / "visit.log").read_text().splitlines() if x.startswith("[next] ['--limit'"))
    assert 13 <= int(line.split("'")[3]) <= 17  # 85% of nearly 20 s, not of 10 s


def test_plan_of_a_visit(gpu, tmp_path):
    options = {
        "device": "cpu",
        "out": tmp_path,
        "seconds": 0.1,
        "smoke": True,
        "only": None,
        "tune": False,
        "shards": 2,
    }
    groups = gpu.visit.plan(SimpleNamespace(**options))
    names = [p.name for g in groups for p in g]
    assert names[:2] == ["build", "ceilings"] and names[-1] == "ceilings" and set(gpu.visit.BENCHMARKS) < set(names)
    assert all(p.skip for g in groups for p in g if p.name in ("build", "tests", "sanitizer", "warm"))
    tuned = gpu.visit.plan(SimpleNamespace(**options | {"tune": True}))
    assert [p.name for g in tuned for p in g] == ["build", "ceilings", "compile 0", "compile 1", "tune"]
    with pytest.raises(SystemExit, match="there is no part tea"):
        gpu.visit.plan(SimpleNamespace(**options | {"only": ["tea"]}))


def test_all_files_with_gpu_tests_are_run(gpu):
    found = set(gpu.visit.gpu_tests())
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "python_tests" / "gpu").glob("test_*.py")} <= found
    assert "python_tests/backends/test_triton_forward.py" in found and "python_tests/test_rope.py" not in found


def test_what_the_sanitizer_said(gpu, tmp_path):
    lines = [
        "28 calls of cuda gave the right result",
        "========= ERROR SUMMARY: 0 errors",
        "skipped: no",
        "skipped: no",
    ]
    outcome = gpu.visit.run_visit([[part(gpu, "sanitizer", f"print({chr(10).join(lines)!r})")]], 30, tmp_path, str)[0]
    assert outcome.detail == "28 calls of cuda gave the right result; ERROR SUMMARY: 0 errors; skipped: no"


def test_an_earlier_visit_is_kept(gpu, tmp_path):
    (tmp_path / "rows.csv").write_text("old")
    (tmp_path / "other.txt").write_text("mine")
    gpu.visit.prepare(tmp_path)
    assert not (tmp_path / "rows.csv").exists() and (tmp_path / "other.txt").exists()
    assert next(tmp_path.glob("earlier-*/rows.csv")).read_text() == "old"


def fake_rows(gpu, count):
    base = dict.fromkeys(gpu.lab.COLUMNS, "")
    base |= {
        "device": "H",
        "driver": "5",
        "versions": "torch 2",
        "commit": "abc",
        "date": "2026-01-01",
        "dtype": "bfloat16",
    }
    rows = [{**base, "role": "ceiling", "op": "ceiling", "shape": "read (start)", "tb_s": "3.1"}]
    for i in range(count):
        row = {**base, "op": "compact_attention", "shape": f"decode {i}", "role": "kernel", "backend": "triton"}
        row |= {"ms_p50": "0.03", "tb_s": "2.5", "tflop_s": "10", "ceiling": "read", "percent": "81"}
        rows.append({**row, "goal": ">= 90%", "met": "no"})
        rows.append({**row, "peer": "best route with a bias", "ratio": "2.25", "goal": ">= 2x", "met": "yes"})
        rows.append({**row, "backend": "slower", "ms_p50": "0.05"})
    step = {**base, "op": "decode_step", "role": "kernel", "backend": "patched", "ms_p50": "3", "percent": "50"}
    step |= {"tb_s": "1", "tflop_s": "1", "ceiling": "read"}
    rows.append({**step, "shape": "Qwen3-4B 32768 tokens B1 8x", "note": "300 tokens/s 0.57 GiB"})
    rows.append({**step, "shape": "Qwen3-4B 32768 tokens B1 full", "ms_p50": "", "note": "does not fit"})
    return rows


def test_the_table_is_short(gpu):
    outcomes = [("tests", "ok", 100.0, "540 passed"), ("still", "crashed", 3.0, "exit -6"), ("model", "ok", 9.0, "")]
    text = gpu.table.report(fake_rows(gpu, 60), outcomes)
    lines = text.split("\n")
    assert len(lines) <= 40 and max(map(len, lines)) <= gpu.table.WIDTH
    assert "more cases in rows.csv" in text and "goals met: 60 of 120" in text
    assert "CRASHED: still after 3 s: exit -6" in text and "tests: 540 passed" in text
    assert "8x 300 tokens/s 0.57 GiB | full does not fit" in text
    short = gpu.table.report(fake_rows(gpu, 1), outcomes)
    line = next(x for x in short.split("\n") if x.startswith("decode 0"))
    assert line.split() == [
        "decode",
        "0",
        "bf16",
        "triton",
        "0.0300",
        "2.50",
        "10",
        "81%",
        "read",
        "1/2",
        "biased",
        "2.25x",
    ]
    assert gpu.table.report([], outcomes).count("no rows") == 1


def test_the_picture(gpu, tmp_path):
    pytest.importorskip("matplotlib")
    assert gpu.table.draw(fake_rows(gpu, 3), tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 10000
    assert not gpu.table.draw([], tmp_path / "none.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_the_command_says_that_it_needs_a_gpu(gpu, tmp_path, capsys):
    assert gpu.visit.main(["--out", str(tmp_path / "x")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_one_command_without_an_environment_of_its_own():
    command = [
        "make",
        "--no-print-directory",
        "-n",
        "bench-gpu",
        "OUT=a folder",
        "PYTHON=python3.12",
        "BENCH_ARGS=--tune",
    ]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == 'python3.12 benchmarks/gpu/visit.py --out "a folder" --tune'


def test_the_commit_is_known_without_git(gpu, monkeypatch):
    common = sys.modules["common"]
    monkeypatch.setenv("KVCOMPACT_COMMIT", "1234567")
    common.commit.cache_clear()
    assert common.commit() == "1234567"
    monkeypatch.delenv("KVCOMPACT_COMMIT")
    monkeypatch.setenv("PATH", "/nowhere")
    common.commit.cache_clear()
    assert common.commit() == f"sources-{common.sources_digest()}" and len(common.sources_digest()) == 12
    common.commit.cache_clear()


@pytest.mark.skipif(not library.available()[0], reason="needs the CPU kernel")
def test_small_calls_for_the_sanitizer():
    program = str(ROOT / "benchmarks/gpu/sanitize.py")
    command = [sys.executable, program, "--device", "cpu", "--backend", "cpu", "--dims", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "7 calls of cpu gave the right result" in result.stdout


def test_candidates_are_neighbours_and_begin_with_the_present_one(gpu):
    entry = {"bits": 16, "dim": 128, "rows": 128, "BM": 128, "BN": 64, "warps": 8, "stages": 3, "loops": 3}
    found = gpu.tune.candidates(entry)
    assert found[0] == {"BM": 128, "BN": 64, "warps": 8, "stages": 3, "loops": 3}
    assert len({tuple(c.values()) for c in found}) == len(found) and all(c["loops"] == 3 for c in found)
    assert {c["BM"] for c in found} == {64, 128} and {c["BN"] for c in found} == {32, 64, 128}
    assert {c["BM"] for c in gpu.tune.candidates({**entry, "BM": 16})} == {16}


def test_every_tuned_kernel_has_entries(gpu):
    runtime = gpu.tune.runtime
    for arch in runtime.SHARED_BYTES:
        table = runtime.table(arch)
        for workload in gpu.tune.workloads():
            entry = workload.entry(table)
            assert entry is not None, workload
            picked = runtime.pick(arch, workload.kernel, workload.bits, workload.dim, workload.rows)
            assert (picked.BM, picked.BN, picked.warps) == (entry["BM"], entry["BN"], entry["warps"])


def test_the_tuner_takes_the_fastest_right_candidate(gpu, tmp_path, monkeypatch):
    """A stand-in for a kernel: 32 keys a tile are fastest but wrong, three stages do not fit, 8 warps are faster than 4."""
    tune, runtime = gpu.tune, gpu.tune.runtime
    clock = SimpleNamespace(
        now=0.0, perf_counter=lambda: clock.now
    )  # a real one would measure what else the machine does
    monkeypatch.setattr(sys.modules["common"], "time", clock)
    table = {"k": [{"bits": 16, "dim": 64, "rows": 16, "BM": 16, "BN": 64, "warps": 4, "stages": 2}]}

    def call():
        config = runtime.pick("any", "k", 16, 64, 1)
        if config.stages == 3:
            raise RuntimeError("out of resource: shared memory")
        clock.now += 1e-3 * {32: 0.5, 64: 1, 128: 3}[config.BN] * (1 if config.warps == 8 else 3)
        return [torch.full((4,), 1.0 if config.BN != 32 else 2.0)]

    bench, rows = gpu.lab.Bench("tune", "cpu", tmp_path), []
    workload = tune.Workload("k", 16, 64, 16, lambda: call)
    choice = tune.choose(bench, workload, table, rows, 0.001, 0.01)
    assert (choice["BN"], choice["warps"], choice["stages"]) == (64, 8, 2)
    notes = {(r["choice"], r["note"]) for r in rows}
    assert ("16x32 w8 s2", "wrong: error 1") in notes and ("16x64 w4 s3", "RuntimeError") in notes
    assert table["k"][0]["warps"] == 4  # the caller decides
    workload.entry(table).update(choice)
    assert tune.choose(bench, workload, table, [], 0.001, 0.01) is None


def test_a_tuned_table_is_what_the_registry_reads(gpu, tmp_path, monkeypatch):
    tune, runtime = gpu.tune, gpu.tune.runtime
    table = json.loads((runtime.CONFIGS / "sm90.json").read_text())
    table["attention_forward"][0]["stages"] = 5
    table["compact_attention_cuda"] = [{"dim": 128, "rows": 4, "min_keys": 1, "max_keys": 4096}]
    path = tune.write_table(table, "NVIDIA H100 80GB HBM3", tmp_path)
    assert path.name == "nvidia_h100_80gb_hbm3.json"
    monkeypatch.setattr(runtime, "CONFIGS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    caches = (runtime.arch_name, runtime.table, runtime.pick)
    for cache in caches:
        cache.cache_clear()
    try:
        arch = runtime.arch_name(torch.device("cuda", 0))
        read = runtime.table(arch)
        assert {k: v for k, v in read.items() if k != "note"} == {k: v for k, v in table.items() if k != "note"}
        assert "NVIDIA H100" in read["note"]
        first = table["attention_forward"][0]
        assert runtime.pick(arch, "attention_forward", first["bits"], first["dim"], 1).stages == 5
    finally:
        for cache in caches:
            cache.cache_clear()


def test_classes_of_shapes_that_the_cuda_kernel_wins(gpu):
    ratios = {(128, 4, k): r for k, r in ((256, 1.3), (1024, 1.1), (4096, 0.9), (16384, 1.2))}
    ratios |= {(64, 4, 256): 1.0, (64, 4, 1024): 1.5}
    assert gpu.tune.winning_classes(ratios) == [
        {"dim": 64, "rows": 4, "min_keys": 1024, "max_keys": 1 << 40},
        {"dim": 128, "rows": 4, "min_keys": 1, "max_keys": 1024},
        {"dim": 128, "rows": 4, "min_keys": 16384, "max_keys": 1 << 40},
    ]


def test_the_tuner_compares_nothing_where_the_cuda_library_is_missing(gpu, bench, monkeypatch, capsys):
    from kvcompact_kernels.backends.cuda import library as cuda

    monkeypatch.setattr(cuda, "available", lambda: (False, "it was not built"))
    rows = []
    assert gpu.tune.compare_cuda(bench, rows) is None and rows == []
    assert "it was not built" in capsys.readouterr().out
