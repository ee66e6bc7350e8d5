# SPDX-License-Identifier: Apache-2.0
"""When the CUDA backend runs, when it leaves a call to Triton, and what it says. Needs no GPU and no CUDA library."""

import pytest
import torch
from triton_cases import make_inputs

from kvcompact_kernels import BackendUnavailableError, explain
from kvcompact_kernels.backends.cuda import compact_attention as backend
from kvcompact_kernels.backends.cuda import library
from kvcompact_kernels.backends.triton import runtime
from kvcompact_kernels.ops import compact_attention


def reason(dtype=torch.float16, change=None, **case):
    args = list(make_inputs("cpu", dtype, pad=8, **case))
    if change:
        change(args)
    return backend.unsupported_shape(*args[:4], *args[5:7])


def test_shapes_that_run():
    assert reason(torch.bfloat16) is None
    for head_dim in backend.HEAD_DIMS:
        assert reason(head_dim=head_dim, query_len=16, tail=20) is None
    assert reason(blocks=((1, 3), (None, [1, 2, 0, 4])) * 4) is None
    assert reason(blocks=(), tail=3) is None


def test_shapes_that_do_not_run():
    assert "needs bfloat16 or float16, got float32" in reason(torch.float32)
    assert "needs a head dimension of 64, 96, 128, 256, got 80" in reason(head_dim=80)
    assert "at most 16 queries of a request, got 17" in reason(query_len=17, tail=17)
    assert "takes at most 8 blocks, got 9" in reason(blocks=((None, 2),) * 9)
    assert "no backward pass" in reason(change=lambda args: args[5].requires_grad_())
    with torch.no_grad():
        assert reason(change=lambda args: args[5].requires_grad_()) is None


def test_rows_must_start_on_16_bytes():
    assert "start on 16 bytes, query has strides" in reason(change=lambda args: args.__setitem__(0, _shifted(args[0])))
    assert "start on 16 bytes, values has" in reason(change=lambda args: args.__setitem__(2, [_shifted(args[2][0])]))
    assert "start on 16 bytes, keys has" in reason(change=lambda args: args.__setitem__(5, _strided(args[5])))
    # The stride of a dimension with one entry does not matter.
    assert (
        reason(change=lambda args: args.__setitem__(0, args[0].contiguous().as_strided(args[0].shape, (384, 64, 3, 1))))
        is None
    )


def _shifted(x):
    return torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]]


def _strided(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def test_by_name_it_raises_with_the_reason():
    q, k = torch.zeros(1, 4, 1, 64), torch.zeros(1, 2, 9, 64)
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run this call: needs CUDA tensors, got cpu"):
        compact_attention(q, k, k, backend="cuda")
    assert explain("compact_attention", q, k, k).reasons["cuda"] == "needs CUDA tensors, got cpu"


def test_unasked_it_runs_only_where_a_measurement_says_so():
    classes = [(64, 4, 100, 1000), (128, 16, 1, 50)]
    assert backend.is_measured_to_win(classes, 64, 4, 100) and backend.is_measured_to_win(classes, 128, 7, 50)
    for shape in ((64, 5, 500), (64, 4, 99), (64, 4, 1001), (96, 1, 500), (128, 1, 100)):
        assert not backend.is_measured_to_win(classes, *shape)


def test_the_tables_decide(monkeypatch):
    args = make_inputs("cpu", blocks=((None, [30, 30, 30, 31]), (1, 5)), tail=4)
    found = backend.declines(*args)
    assert found == "no measurement in backends/configs/sm80.json says that it beats Triton for this shape"
    entry = {"dim": 64, "rows": 3, "min_keys": 31 + 5 + 4, "max_keys": 31 + 5 + 4}
    monkeypatch.setattr(runtime, "table", lambda arch: {"compact_attention_cuda": [entry]})
    assert backend.declines(*args) is None
    entry["min_keys"] += 1
    assert backend.declines(*args) is not None


@pytest.mark.parametrize("arch", runtime.SHARED_BYTES)
def test_entries_of_the_tables_are_complete(arch):
    for entry in runtime.table(arch)["compact_attention_cuda"]:
        assert set(entry) == {"dim", "rows", "min_keys", "max_keys"} and entry["dim"] in backend.HEAD_DIMS


@pytest.mark.parametrize(
    ("code", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0), (12, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("compute_80", [(8, 0), (9, 0), (10, 3), (12, 1)], [(7, 5)]),
        ("compute_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("sm_80+sm_90a+compute_80", [(8, 0), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
    ],
)
def test_where_machine_code_and_ptx_run(code, runs, does_not):
    assert all(library.runs_on(code, *version) for version in runs)
    assert not any(library.runs_on(code, *version) for version in does_not)


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    available = library.available.__wrapped__
    monkeypatch.setattr(torch.version, "cuda", None)
    assert available() == (False, f"torch {torch.__version__} was built without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "_C_cuda.so")
    monkeypatch.setattr(library.cpu_library, "available", lambda: (False, "no schemas"))
    assert available() == (False, "no schemas")
    monkeypatch.setattr(library.cpu_library, "available", lambda: (True, ""))
    usable, said = available()
    assert not usable and said.startswith(f"{tmp_path / '_C_cuda.so'} does not exist: build it with nvcc")
    (tmp_path / "_C_cuda.so").write_text("not a library")
    usable, said = available()
    assert not usable and "does not load with torch" in said
