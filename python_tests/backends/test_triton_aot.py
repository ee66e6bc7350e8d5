# SPDX-License-Identifier: Apache-2.0
"""The gate that needs no GPU: what the Triton and CUDA kernels compile to for each GPU generation, against benchmarks/results/aot.csv.

``make aot`` compiles every configuration (minutes); here a sample of them.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

from kvcompact_kernels.backends.triton import runtime

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def aot():
    spec = importlib.util.spec_from_file_location("kvcompact_aot", ROOT / "benchmarks" / "aot.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def gate(aot, chosen):
    saved = aot.saved_table()
    failures = {}
    for case in chosen:
        found = aot.problems(case, aot.compile_case(case), saved.get((case.kernel, case.config, case.arch)))
        if found:
            failures[case.key] = found
    assert not failures, failures


def test_the_saved_table_passes_the_gate_and_is_complete(aot):
    saved = aot.saved_table()
    cases = aot.cases()
    assert {(c.kernel, c.config, c.arch) for c in cases} == set(saved)
    for case in cases:
        row = saved[case.kernel, case.config, case.arch]
        row = {**row, **{name: int(row[name]) for name in aot.COUNTS}}
        assert not aot.problems(case, row, row), case.key


def test_a_sample_compiles_as_saved(aot):
    """One configuration of each kernel for sm_90 and sm_100, and the forward kernel's for the others."""
    sample = {}
    for case in aot.cases():
        if case.module == aot.CUDA_MODULE and aot.nvcc() is None:
            continue
        if case.arch in ("sm90", "sm100") or case.kernel == "attention_forward":
            sample.setdefault((case.kernel, case.arch), case)
    gate(aot, sample.values())


def test_the_gate_sees_regressions(aot):
    case = next(c for c in aot.cases() if c.arch == "sm90" and c.tensor_cores)
    good = dict(zip(aot.COUNTS, (128, 0, 65536, 8, 0, 0, 0), strict=True))
    assert aot.problems(case, good, good) == []
    for change in (
        {"spill_bytes": 8},
        {"shared_bytes": 65537},
        {"registers": 128 + aot.REGISTER_MARGIN + 1},
        {"hgmma": 0, "hmma": 8},
        {"hgmma": 0},
    ):
        assert aot.problems(case, {**good, **change}, good), change
    assert aot.problems(case, good, None)
    large = {**good, "shared_bytes": 227 * 1024 + 1}
    assert aot.problems(case, large, large)


def test_the_gate_knows_tensor_memory(aot):
    case = next(c for c in aot.cases() if c.arch == "sm100" and c.tensor_cores)
    good = dict(zip(aot.COUNTS, (128, 0, 65536, 0, 0, 8, 512), strict=True))
    assert aot.problems(case, good, good) == []
    assert aot.problems(case, {**good, "tcgen05": 0, "hmma": 8}, good) == [
        "lost its instructions on tensor memory (tcgen05)"
    ]
    too_much = {**good, "tmem_columns": 513}
    assert "columns of tensor memory" in aot.problems(case, too_much, too_much)[0]


def test_the_gate_compiles_every_table_for_a_gpu_that_takes_it(aot):
    assert set(aot.ARCHS) == set(runtime.SHARED_BYTES)
    for arch, capability in aot.ARCHS.items():
        assert runtime.table_name(capability // 10, runtime.SHARED_BYTES[arch]) == arch


def test_several_processes_give_the_rows_in_order_and_name_what_does_not_compile(aot, monkeypatch):
    chosen = [case for i, case in enumerate(aot.cases()) if i % 40 == 0 or case.module == aot.CUDA_MODULE]
    monkeypatch.setattr(aot, "compile_case", lambda case: {"key": case.key})
    for jobs in (1, 3):
        assert [row["key"] for row in aot.compile_cases(chosen, jobs)] == [case.key for case in chosen]

    def fail(case):
        raise ValueError("no such layout")

    monkeypatch.setattr(aot, "compile_case", fail)
    with pytest.raises(RuntimeError) as caught:
        list(aot.compile_cases(chosen, 2))
    assert str(caught.value) == f"{chosen[0].key} does not compile: ValueError: no such layout"


def test_without_nvcc_the_cuda_kernels_are_skipped_aloud_and_their_rows_kept(aot, monkeypatch, tmp_path, capsys):
    table = tmp_path / "aot.csv"
    table.write_bytes(aot.TABLE.read_bytes())
    monkeypatch.setattr(aot, "TABLE", table)
    monkeypatch.setattr(aot, "nvcc", lambda: None)
    found = [case for arch in aot.NVCC_ARCHS for case in aot._cuda_cases(arch)]
    monkeypatch.setattr(aot, "cases", lambda: found)
    assert aot.main(["--write"]) == 0
    said = capsys.readouterr().out
    assert f"{len(found)} configurations of CUDA kernels were skipped: nvcc was not found" in said
    kept = [line for line in aot.TABLE.read_text().splitlines() if "CUDA" in line]
    assert len(kept) == len(found) > 48 and len(table.read_text().splitlines()) == 1 + len(found)
