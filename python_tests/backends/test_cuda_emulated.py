# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, compiled as C++ and run thread by thread on the CPU, against the fp64 reference.

Host code and device code are those of csrc/; only the instructions (csrc/common/gpu.cuh) and the launches are emulated.
"""

import ctypes
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton_cases import DECODE, check_forward, convert, make_inputs

from kvcompact_kernels.backends.cpu import library as cpu_library
from kvcompact_kernels.backends.cuda import compact_attention as backend
from kvcompact_kernels.reference import compact_attention as reference
from kvcompact_kernels.testing.draws import draws

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))
from build import COMPILER, HERE, ROOT, compile_emulated

pytestmark = [
    pytest.mark.skipif(COMPILER is None or not (ROOT / "csrc").exists(), reason="needs a compiler and the source tree"),
    pytest.mark.skipif(not cpu_library.available()[0], reason="the op's schema comes with the native library"),
]
DTYPES = [torch.bfloat16, torch.float16]
CASES = [name for name, case in DECODE.items() if case.get("head_dim", 64) in backend.HEAD_DIMS]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    source = ROOT / "csrc/compact_attention/decode.cu"
    path = compile_emulated(source, tmp_path_factory.mktemp("emulation") / "decode.so")
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.kvc_emulation_launches.restype = ctypes.c_int64
    library.kvc_emulation_bank_conflicts.restype = ctypes.c_int64
    library.kvc_emulation_seed.argtypes = library.kvc_emulation_multiprocessors.argtypes = [ctypes.c_int64]
    return library


@pytest.fixture
def decode(emulation):
    """``decode(*args, splits=0)``; fresh tensors, the kernels' outputs and workspace too, hold NaN. Threads run in a fresh order."""
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    torch.manual_seed(seed)
    emulation.kvc_emulation_seed(seed)
    emulation.kvc_emulation_multiprocessors(2)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch allocates

    def run(*args, splits=0):
        assert torch.empty(3).isnan().all()
        return torch.ops.kvcompact.compact_attention_decode(*args, splits)

    yield run
    torch.use_deterministic_algorithms(before)


def inputs(dtype=torch.float16, **case):
    return make_inputs("cpu", dtype, pad=8, **case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@draws(2)
def test_decode(decode, name, dtype):
    args = inputs(dtype, **DECODE[name])
    for splits in (0, 1, 3):
        check_forward(decode(*args, splits=splits), args)


SIZES = {
    "d 64, 1000 slots": {"head_dim": 64, "blocks": ((None, 1000),), "tail": 77, "mask": True},
    "d 96, 333 slots": {"head_dim": 96, "group": 7, "blocks": ((None, 333),), "tail": 18, "query_len": 2, "window": 5},
    "d 128, 517 slots": {"head_dim": 128, "group": 4, "blocks": ((None, 517),), "tail": 33, "query_len": 4},
    "d 256, 321 slots": {"head_dim": 256, "group": 16, "blocks": ((None, 321),), "tail": 16},
    "rows of several tiles": {"head_dim": 64, "group": 7, "query_len": 16, "tail": 40, "window": 9, "batch": 1},
    "stacked rows of several tiles": {
        "head_dim": 128,
        "kv_heads": 1,
        "batch": 11,
        "blocks": ((1, 130), (1, [70]), (None, 20)),
        "tail": 12,
        "mask": True,
    },
    "eight blocks": {"blocks": ((1, 5), (None, 17), (1, 33), (None, [1, 2, 3, 40]), *[(None, 9)] * 4), "off": 0.2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
@draws(2)
def test_sizes(decode, emulation, name, dtype):
    args = inputs(dtype, **{"batch": 2, "kv_heads": 1 if "d " in name else 2, **SIZES[name]})
    check_forward(decode(*args, splits=random.SystemRandom().randrange(1, 6)), args)
    emulation.kvc_emulation_multiprocessors(64)
    check_forward(decode(*args), args)


@pytest.mark.parametrize("head_dim", backend.HEAD_DIMS)
@draws(2)
def test_many_partial_results(decode, head_dim):
    """More parts than a warp has lanes, each with a larger maximum than those before it."""
    args = inputs(torch.bfloat16, batch=1, kv_heads=1, head_dim=head_dim, blocks=((None, 620),), tail=20)
    args[3][0].add_(torch.linspace(0, 20, 620))
    check_forward(decode(*args, splits=37), args)
    check_forward(decode(*args, splits=100), args)  # more than tiles


def test_one_launch_or_two(decode, emulation):
    args = inputs(blocks=((None, 100), (None, 30)), tail=9)
    for splits, launches in ((1, 1), (2, 2)):
        before = emulation.kvc_emulation_launches()
        decode(*args, splits=splits)
        assert emulation.kvc_emulation_launches() - before == launches


def test_the_plan_splits_long_blocks_only(decode, emulation):
    emulation.kvc_emulation_multiprocessors(132)
    for slots, launches in ((250, 1), (300, 2)):
        args = inputs(batch=1, kv_heads=1, blocks=((None, slots),), tail=1)
        before = emulation.kvc_emulation_launches()
        check_forward(decode(*args), args)
        assert emulation.kvc_emulation_launches() - before == launches


@pytest.mark.parametrize("head_dim", backend.HEAD_DIMS)
def test_no_bank_conflicts(decode, emulation, head_dim):
    before = emulation.kvc_emulation_bank_conflicts()
    decode(*inputs(head_dim=head_dim))
    assert emulation.kvc_emulation_bank_conflicts() == before


def test_repeated_runs_are_equal_whatever_the_order_of_threads(decode):
    args = inputs(torch.bfloat16, head_dim=128, blocks=((1, 90), (None, 200)), tail=30, mask=True, batch=3)
    first = decode(*args, splits=3)
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, decode(*args, splits=3)))


def test_transposed_layout_and_strided_beta(decode):
    """Keys as ``[B, t, Hkv, d]`` in memory; beta, the mask and the offsets with gaps between their entries."""
    for blocks in (((None, 37),), ((None, [17, 0, 1, 40]),)):
        args = list(inputs(blocks=blocks, poison=False, tail=9, mask=True))
        args[0] = args[0].transpose(1, 2).contiguous().transpose(1, 2)
        args[5] = args[5].transpose(1, 2).contiguous().transpose(1, 2)
        args[3] = [torch.stack([b, torch.full_like(b, float("nan"))], -1)[..., 0] for b in args[3]]
        args[7] = torch.stack([args[7], ~args[7]], -1)[..., 0]
        if args[4][0] is None:
            args[1] = [k.transpose(1, 2).contiguous().transpose(1, 2) for k in args[1]]
        else:
            args[4] = [torch.stack([o, o + 5], -1)[..., 0] for o in args[4]]
        check_forward(decode(*args, splits=2), args)


@pytest.mark.parametrize("far", ["slots", "requests"])
def test_offsets_beyond_31_bits(decode, far):
    """Strides so large that 32-bit offsets would wrap; the memory is virtual and mostly untouched."""
    torch.use_deterministic_algorithms(False)  # or all of it would be filled
    batch, kv_heads, slots, dim = (1, 2, 34, 64) if far == "slots" else (2, 2, 20, 64)
    strides = (0, dim, 1 << 26, 1) if far == "slots" else (1 << 31, 2 * dim * slots, dim, 1)
    shape = (batch, kv_heads, slots, dim)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    assert size > 1 << 31
    args = list(inputs(batch=batch, kv_heads=kv_heads, blocks=((None, slots),), tail=0, poison=False))
    try:
        buffer = torch.empty(size + dim * kv_heads * slots, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no address space for {size} elements: {error}")
    for which, start in ((1, 0), (2, dim * kv_heads * (slots if far == "requests" else 1))):
        view = buffer.as_strided(shape, strides, start)
        view.copy_(args[which][0])
        args[which] = [view]
    check_forward(torch.ops.kvcompact.compact_attention_decode(*args, 2), args)


def test_nan_is_not_swallowed(decode):
    args = inputs(poison=False)
    args[0][0, 1, 0, 5] = float("nan")
    out, lse = decode(*args, splits=2)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
    assert not out[1].isnan().any() and not lse[1].isnan().any()


def test_empty_query_and_no_keys(decode):
    args = inputs(poison=False)
    out, lse = decode(args[0][:, :, :0], *args[1:])
    assert out.shape == (2, 6, 0, 64) and lse.shape == (2, 6, 0)
    out, lse = decode(args[0], [], [], [], [], None, None, None, *args[8:])
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_a_window_larger_than_the_tail(decode):
    args = list(inputs(tail=9, query_len=3))
    args[10] = (1 << 62) + 1
    wanted = reference.compact_attention(*convert([*args[:10], -1, args[11]], torch.float64))
    assert (decode(*args)[0].double() - wanted[0]).abs().max() < 1e-2


def test_the_host_side_refuses_what_the_kernel_cannot_read(decode):
    def refused(match, change, **case):
        args = list(inputs(poison=False, **case))
        change(args)
        with pytest.raises(RuntimeError, match=match):
            decode(*args)

    def replace(index, new):
        return lambda args: args.__setitem__(index, new(args))

    refused("head_dim must be 64, 96, 128 or 256, got 80", lambda args: None, head_dim=80)
    refused("bfloat16 or float16", replace(0, lambda a: a[0].float()))
    refused("keys.0. must have query's device and dtype", replace(1, lambda a: [a[1][0].float()]))
    refused("values.0. has a wrong shape", replace(2, lambda a: [a[2][0][:, :, 1:]]))
    misaligned = torch.zeros(2, 2, 37, 65, dtype=torch.float16)[..., 1:]
    refused(
        "keys.0. must be contiguous in its last dimension, with rows on 16 bytes", replace(1, lambda a: [misaligned])
    )
    refused("tail_values has a wrong shape", replace(6, lambda a: a[6][:, :, 1:]))
    refused("tail_mask has a wrong", replace(7, lambda a: torch.ones(2, 4, dtype=torch.bool)))
    refused("betas.0. has a wrong", replace(3, lambda a: [a[3][0].double()]))
    refused("not a multiple of num_kv_heads, 4", replace(11, lambda a: 4))
    refused("one entry per block", replace(3, lambda a: []))
    refused("at most 8 blocks, got 9", lambda args: None, blocks=((None, 1),) * 9)
    refused("must have batch size 1 or 2, got 3", lambda args: None, blocks=((3, 4),))


def test_shared_memory_is_what_the_table_says(emulation):
    needed = [torch.ops.kvcompact.compact_attention_decode_shared_bytes(d) for d in (*backend.HEAD_DIMS, 80)]
    assert all(16 * d * 2 < n <= 163 * 1024 for n, d in zip(needed, backend.HEAD_DIMS)) and needed[-1] == -1


def test_devices_that_the_build_is_for(emulation, monkeypatch):
    """Of another major version than the machine code, a device runs the PTX; without it the backend says what to build."""
    device = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)

    def problem(major, minor, code=None, head_dim=128):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
        if code:
            monkeypatch.setattr(torch.ops.kvcompact, "compact_attention_decode_code", lambda: code)
        return backend._find_device_problem.__wrapped__(0, head_dim)

    assert [problem(*version) for version in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [None] * 5
    assert "needs compute capability 8.0 or newer, the device has 7.5" in problem(7, 5)
    assert "bytes of shared memory per block at head dimension 256, the device allows 101376" in problem(
        12, 0, head_dim=256
    )
    assert problem(12, 0, "sm_80+sm_90a") == (
        "_C_cuda.so was built to sm_80, sm_90a, which do not run on compute capability 12.0: "
        "build it with KVCOMPACT_CUDA_ARCHS=120"
    )


def test_opcheck_and_compile(emulation):
    args = inputs(poison=False, query_len=3, tail=9, blocks=((None, 20), (1, [3, 4])))
    torch.library.opcheck(torch.ops.kvcompact.compact_attention_decode.default, args)
    wanted = backend.run(*args)
    for got, want in zip(torch.compile(backend.run, fullgraph=True, backend="aot_eager")(*args), wanted):
        assert torch.equal(got, want)


@pytest.fixture(scope="module")
def self_check(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "self_check.so"
    function = ctypes.CDLL(str(compile_emulated(HERE / "self_check.cpp", path, with_torch=False))).kvc_self_check
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_int, ctypes.c_uint64]
    return lambda mistake, seed: function(mistake, seed).decode()


MISTAKES = [  # in the order of self_check.cpp, with what the emulation may say
    [""],
    ["wrong result", "a thread ended with copies that nobody waited for"],
    ["wrong result"],
    ["wrong result"],
    ["a copy to where others may still be reading"],
    ["the threads of a warp have parted"],
    ["an address beside the shared memory"],
    ["a misaligned address in shared memory"],
]


@pytest.mark.parametrize("mistake", range(len(MISTAKES)))
def test_the_emulation_finds_mistakes(self_check, mistake):
    for seed in range(1, 40, 2):
        assert self_check(mistake, seed) in MISTAKES[mistake]
