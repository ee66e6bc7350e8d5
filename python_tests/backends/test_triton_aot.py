# SPDX-License-Identifier: Apache-2.0
"""The gate that needs no GPU: what the Triton and CUDA kernels compile to for sm_80, sm_89 and sm_90, against benchmarks/results/aot.csv.

``make aot`` compiles every configuration (minutes); here a sample of them.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

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
    numbers = ("registers", "spill_bytes", "shared_bytes", "hgmma", "hmma")
    for case in cases:
        row = saved[case.kernel, case.config, case.arch]
        row = {**row, **{name: int(row[name]) for name in numbers}}
        assert not aot.problems(case, row, row), case.key


def test_a_sample_compiles_as_saved(aot):
    """One configuration of each kernel for sm_90, and the forward kernel's for the others."""
    sample = {}
    for case in aot.cases():
        if case.module == aot.CUDA_MODULE and aot.nvcc() is None:
            continue
        if case.arch == "sm90" or case.kernel == "attention_forward":
            sample.setdefault((case.kernel, case.arch), case)
    gate(aot, sample.values())


def test_the_gate_sees_regressions(aot):
    case = next(c for c in aot.cases() if c.arch == "sm90" and c.tensor_cores)
    good = {"registers": 128, "spill_bytes": 0, "shared_bytes": 65536, "hgmma": 8, "hmma": 0}
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


def test_without_nvcc_the_cuda_kernels_are_skipped_aloud_and_their_rows_kept(aot, monkeypatch, tmp_path, capsys):
    table = tmp_path / "aot.csv"
    table.write_bytes(aot.TABLE.read_bytes())
    monkeypatch.setattr(aot, "TABLE", table)
    monkeypatch.setattr(aot, "nvcc", lambda: None)
    monkeypatch.setattr(aot, "cases", lambda: [case for arch in aot.NVCC_ARCHS for case in aot._cuda_cases(arch)])
    assert aot.main(["--write"]) == 0
    assert "32 configurations of CUDA kernels were skipped: nvcc was not found" in capsys.readouterr().out
    kept = [line for line in aot.TABLE.read_text().splitlines() if "CUDA" in line]
    assert len(kept) == 32 and len(table.read_text().splitlines()) == 33
