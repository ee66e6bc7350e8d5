# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel configuration that can be picked for sm_80, sm_89, sm_90, sm_100 and sm_120, without a GPU.

    python benchmarks/aot.py                 compile all, compare with benchmarks/results/aot.csv, exit 1 on a regression
    python benchmarks/aot.py --write         compile all and save the table
    python benchmarks/aot.py --only PATTERN  rows whose "kernel config arch" contains PATTERN

The gate of a row: nothing spilled, shared and tensor memory within the arch's limits, tensor-core instructions where a dot of
16-bit operands is: HGMMA of warpgroups (sm_90), tcgen05 on tensor memory (sm_100), or HMMA of warps, on any arch and wherever a
tile is too small for the others. Against the saved table: no more shared memory, no tensor-core instruction kind lost,
registers within a margin (another Triton or ptxas moves them a little). Results are cached by the hash of the kernel sources,
the configuration and the compiler's version; those that are not are compiled on all cores (--jobs). The CUDA kernels (rows
"CUDA ...") are compiled where nvcc is found (12.8 or newer), warnings being errors: to the machine code of sm_80 and sm_90a that
the library holds and, as a newer GPU's driver does with its PTX, to that of sm_100 and sm_120. Without nvcc they are skipped,
and the last line says so.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "aot.csv"
CACHE = ROOT / "build" / "aot"
COUNTS = ("registers", "spill_bytes", "shared_bytes", "hgmma", "hmma", "tcgen05", "tmem_columns")
COLUMNS = ("kernel", "config", "arch", *COUNTS)
ARCHS = {"sm80": 80, "sm89": 89, "sm90": 90, "sm100": 100, "sm120": 120}
TMEM_COLUMNS = 512  # of an SM's tensor memory
REGISTER_MARGIN = 24
KERNELS = ROOT / "kvcompact_kernels" / "backends" / "triton" / "kernels"
CUDA_MODULE = "decode.cuh"  # marks the cases that nvcc compiles
CUDA_SOURCES = ("common/gpu.cuh", "compact_attention/decode.cuh")
# What the PTX and the machine code are for; an sm_89 runs the code for sm_80.
NVCC_ARCHS = {"sm80": ("80", "80"), "sm90": ("90a", "90a"), "sm100": ("80", "100"), "sm120": ("80", "120")}


@dataclass(frozen=True)
class Case:
    """One kernel with one set of compile-time choices; ``types`` of pointers, ``ones`` are strides that are 1."""

    kernel: str
    config: str
    arch: str
    module: str
    constants: dict[str, int]
    types: dict[str, str]
    warps: int
    stages: int
    ones: tuple[str, ...] = ()
    tensor_cores: bool = True

    @property
    def key(self) -> str:
        return f"{self.kernel} {self.config} {self.arch}"


def _element(bits: int, half: str) -> str:
    return half if bits == 16 else "fp32"


def _forward_cases(arch: str, entries: list[dict]) -> Iterator[Case]:
    variants = {
        "beta+mask": {"HAS_BETA": 1, "HAS_MASK": 1},
        "beta": {"HAS_BETA": 1},
        "plain": {},
        "ragged": {"HAS_BETA": 1, "HAS_MASK": 1, "RAGGED": 1},
        "stacked": {"HAS_BETA": 1, "STACKED": 1},
    }
    for entry in entries:
        bits, dim = entry["bits"], entry["dim"]
        for name, flags in variants.items():
            for head_dim in {64: (64,), 128: (128, 96, 80), 256: (256,)}[dim]:
                if head_dim != dim and name != "beta+mask":
                    continue
                if bits == 32 and name not in ("beta+mask", "stacked"):
                    continue
                half = "fp16" if name == "plain" else "bf16"
                element = _element(bits, half)
                partial = name in ("stacked", "ragged") or entry["BM"] < 64
                constants = dict.fromkeys(("HAS_BETA", "HAS_MASK", "RAGGED", "STACKED"), 0)
                yield Case(
                    "attention_forward",
                    f"d{head_dim} {element} {_tile(entry)} {name} -> {'fp32' if partial else element}",
                    arch,
                    "attention_forward",
                    {
                        **constants,
                        **flags,
                        "HEAD_DIM": head_dim,
                        "D": dim,
                        "BM": entry["BM"],
                        "BN": entry["BN"],
                        "LOOPS": 2 if name == "stacked" else entry["loops"],
                        "WIDE": 0,
                        "UPCAST": 0,
                    },
                    {
                        **dict.fromkeys(("Q", "K", "V", "TailK", "TailV"), f"*{element}"),
                        "Beta": "*fp32",
                        "Offsets": "*i64",
                        "TailMask": "*u8",
                        "Out": "*fp32" if partial else f"*{element}",
                        "Lse": "*fp32",
                    },
                    entry["warps"],
                    entry["stages"],
                    ("s_bn", "s_mn"),
                    bits == 16,
                )


def _merge_cases(arch: str) -> Iterator[Case]:
    from kvcompact_kernels.backends.triton.compact_attention import merge_tile

    for head_dim, dim in ((64, 64), (96, 128), (128, 128), (256, 256)):
        for parts in (2, 4, 5):
            rows_at_once, parts_at_once = merge_tile(parts)
            yield Case(
                "merge",
                f"d{head_dim} bf16 {rows_at_once}x{parts_at_once} w4",
                arch,
                "attention_forward",
                {"HEAD_DIM": head_dim, "D": dim, "BR": rows_at_once, "BP": parts_at_once},
                {"PartOut": "*fp32", "PartLse": "*fp32", "Out": "*bf16", "Lse": "*fp32"},
                4,
                3,
                tensor_cores=False,
            )


STILL_KERNELS = {
    "still_project_keys": ("still_cross_attention", "project_keys"),
    "still_attend": ("still_cross_attention", "attend"),
    "still_backward_values": ("still_backward", "attend_backward_values"),
    "still_backward_keys": ("still_backward", "attend_backward_keys"),
    "still_backward_queries": ("still_backward", "attend_backward_queries"),
    "still_backward_norm": ("still_backward", "project_backward_norm"),
    "still_backward_inputs": ("still_backward", "project_backward_inputs"),
    "still_backward_weight": ("still_backward", "project_backward_weight"),
}


def _still_cases(arch: str, table: dict[str, list[dict]]) -> Iterator[Case]:
    from kvcompact_kernels.backends.triton.still_compaction import tile_halves

    for name, (module, kernel) in STILL_KERNELS.items():
        projects = kernel in ("project_keys", "project_backward_norm")
        for entry in table[name]:
            bits = entry["bits"]
            for head_dim, width in {128: ((64, 128), (48, 96)), 256: ((128, 256), (96, 192), (64, 256))}[entry["dim"]]:
                halves = tile_halves(head_dim, width)
                if bits == 32 and 2 * head_dim != entry["dim"]:
                    continue
                variants = [""]
                if kernel == "project_keys":
                    variants = ["bias+norm", "plain", "bias+norm layers"]
                elif projects:
                    variants = ["bias+norm", "plain"]
                elif kernel == "attend":
                    variants = ["-> fp32", "-> half", "-> fp32 layers", "-> half layers"]
                for variant in variants:
                    layers = variant.endswith("layers")
                    whole = 2 * head_dim == entry["dim"]
                    if variant in ("plain", "-> half", "-> half layers") and (bits == 32 or not whole):
                        continue
                    element = _element(bits, "fp16" if variant in ("plain", "-> half") else "bf16")
                    flags = dict.fromkeys(("HAS_BIAS", "HAS_NORM"), int(variant.startswith("bias"))) if projects else {}
                    if kernel in ("project_keys", "attend"):
                        flags["LAYERS"] = int(layers)
                    inputs = ("Q", "K", "V", "Weight", "Projected", "Free", "DOut", "DProjected", "DKeys", "DValues")
                    yield Case(
                        kernel,
                        f"d{head_dim} D{width} {element} {_tile(entry)} {variant}".rstrip(),
                        arch,
                        module,
                        {
                            "HEAD_DIM": head_dim,
                            "HP": halves[0],
                            "WIDTH": width,
                            "WH": halves[1],
                            "BM": entry["BM"],
                            "BN": entry["BN"],
                            "UPCAST": 0,
                            **flags,
                        },
                        {
                            **dict.fromkeys(inputs, f"*{element}"),
                            **dict.fromkeys(("Cos", "Sin", "IntCos", "IntSin", "Lse", "Delta", "Partial"), "*fp32"),
                            **dict.fromkeys(("Bias", "Norm", "DQuery"), "*fp32"),
                            "Table": "*i64",
                            "Out": "*fp32" if variant.startswith("-> fp32") else f"*{element}",
                            "norm_eps": "fp32",
                        },
                        entry["warps"],
                        entry["stages"],
                        tensor_cores=bits == 16 and not (kernel == "project_backward_norm" and variant == "plain"),
                    )


def _backward_cases(arch: str, table: dict[str, list[dict]]) -> Iterator[Case]:
    for kernel, variants in (
        (
            "attention_backward_keys",
            {
                "beta": {"HAS_BETA": 1},
                "plain": {},
                "ragged": {"HAS_BETA": 1, "RAGGED": 1},
                "stacked": {"HAS_BETA": 1, "STACKED": 1},
                "tail": {"TAIL": 1},
                "tail+mask": {"TAIL": 1, "HAS_MASK": 1},
            },
        ),
        (
            "attention_backward_queries",
            {"beta+mask": {"HAS_BETA": 1, "HAS_MASK": 1}, "plain": {}, "ragged": {"HAS_BETA": 1, "RAGGED": 1}},
        ),
    ):
        for entry in table[kernel]:
            bits, dim = entry["bits"], entry["dim"]
            for name, flags in variants.items():
                for head_dim in {64: (64,), 128: (128, 96), 256: (256,)}[dim]:
                    if (head_dim != dim or bits == 32) and name not in ("beta", "tail+mask", "beta+mask"):
                        continue
                    element = _element(bits, "fp16" if name == "plain" else "bf16")
                    optional = ("HAS_BETA", "HAS_MASK", "RAGGED", *(("TAIL", "STACKED") if "keys" in kernel else ()))
                    tile = {"HEAD_DIM": head_dim, "D": dim, "BM": entry["BM"], "BN": entry["BN"]}
                    data = ("Q", "K", "V", "TailK", "TailV", "GradOut", "GradQ", "GradK", "GradV")
                    floats = ("Beta", "Lse", "Delta", "GradBeta", "Sum")
                    yield Case(
                        kernel,
                        f"d{head_dim} {element} {_tile(entry)} {name}",
                        arch,
                        "attention_backward",
                        {**dict.fromkeys(optional, 0), **flags, **tile, "WIDE": 0, "UPCAST": 0},
                        {
                            **dict.fromkeys(data, f"*{element}"),
                            **dict.fromkeys(floats, "*fp32"),
                            "Offsets": "*i64",
                            "Mask": "*u8",
                            "TailMask": "*u8",
                        },
                        entry["warps"],
                        entry["stages"],
                        ("s_bn", "s_mn"),
                        bits == 16,
                    )
    for head_dim, dim in ((64, 64), (96, 128), (128, 128), (256, 256)):
        yield Case(
            "attention_delta",
            f"d{head_dim} bf16",
            arch,
            "attention_backward",
            {"HEAD_DIM": head_dim, "D": dim, "BM": 16},
            {"GradOut": "*bf16", "Out": "*bf16", "GradLse": "*fp32", "Delta": "*fp32"},
            4,
            3,
            tensor_cores=False,
        )


def _pack_cases(arch: str) -> Iterator[Case]:
    from kvcompact_kernels.backends.triton import pack, runtime

    for head_dim, element in ((64, "bf16"), (96, "fp16"), (128, "bf16"), (128, "fp32"), (256, "bf16")):
        for layers in (0, 1):
            tile = {"HEAD_DIM": head_dim, "D": runtime.padded_dim(head_dim), "BM": pack.ROWS}
            yield Case(
                "pack_slots",
                f"d{head_dim} {element} {pack.ROWS} w4{' layers' if layers else ''}",
                arch,
                "pack",
                {**tile, "LAYERS": layers, "ALIGNED": layers},
                {**dict.fromkeys(("K", "V", "OutK", "OutV"), f"*{element}"), "Indices": "*i64", "Table": "*i64"},
                4,
                3,
                () if layers else ("s_in",),
                tensor_cores=False,
            )


def _key_scores_cases(arch: str, table: dict[str, list[dict]]) -> Iterator[Case]:
    for kernel in ("rows_lse", "key_sums"):
        for entry in table[kernel]:
            for head_dim in {64: (64,), 128: (128, 96), 256: (256,)}[entry["dim"]]:
                element = _element(entry["bits"], "bf16")
                yield Case(
                    kernel,
                    f"d{head_dim} {element} {_tile(entry)}",
                    arch,
                    "key_scores",
                    {
                        "HEAD_DIM": head_dim,
                        "D": entry["dim"],
                        "BM": entry["BM"],
                        "BN": entry["BN"],
                        "WIDE": 0,
                        "UPCAST": 0,
                    },
                    {"Q": f"*{element}", "K": f"*{element}", "Lse": "*fp32", "Scores": "*fp32"},
                    entry["warps"],
                    entry["stages"],
                    tensor_cores=entry["bits"] == 16,
                )
    yield Case(
        "merge_lse",
        "128 rows",
        arch,
        "key_scores",
        {"BR": 128},
        {"PartLse": "*fp32", "Lse": "*fp32"},
        4,
        3,
        tensor_cores=False,
    )


CUDA_KERNELS = {  # C++ template, its parameter struct, bytes of dynamic shared memory
    "decode_attention": ("Decode", "DecodeShared<{dim}>::kBytes"),
    "decode_merge": ("DecodeMerge", "kDecodeMergeShared<{dim}>"),
}


def _cuda_cases(arch: str) -> Iterator[Case]:
    from kvcompact_kernels.backends.cuda.compact_attention import HEAD_DIMS

    for kernel in CUDA_KERNELS:
        for dim in HEAD_DIMS:
            if dim == 256 and arch == "sm120":  # needs more shared memory than there is: the backend refuses it
                continue
            for element in ("Bf16", "Fp16"):
                config = f"CUDA d{dim} {element.lower()}"
                constants = {"HEAD_DIM": dim}
                attends = kernel == "decode_attention"
                yield Case(kernel, config, arch, CUDA_MODULE, constants, {"Out": element}, 4, 0, (), attends)


@functools.cache
def nvcc() -> str | None:
    """The CUDA compiler that setup.py would take, or None."""
    spec = importlib.util.spec_from_file_location("kvcompact_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.find_nvcc()


@functools.cache
def _nvcc_version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _compile_cuda(arch: str) -> dict[tuple[str, str], dict[str, str | int]]:
    """All rows of CUDA kernels for one arch, by kernel and configuration."""
    import triton.backends.nvidia

    chosen = list(_cuda_cases(arch))
    lines = [f'#include "{CUDA_SOURCES[-1]}"', "namespace kvc {"]
    for i, case in enumerate(chosen):
        parameters, shared = CUDA_KERNELS[case.kernel]
        dim = case.constants["HEAD_DIM"]
        name = f"{case.kernel}<{case.types['Out']}, {dim}>"
        lines.append(f"template __global__ void {name}(KVC_PARAMETERS({parameters}));")
        lines.append(f'extern "C" __device__ int kvc_shared_{i} = {shared.format(dim=dim)};')
    with tempfile.TemporaryDirectory() as folder:
        source, ptx, cubin = (Path(folder, f"kernels.{suffix}") for suffix in ("cu", "ptx", "cubin"))
        source.write_text("\n".join([*lines, "}", ""]))
        portable, machine = NVCC_ARCHS[arch]
        compiler = [nvcc(), "-Werror", "all-warnings", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"]
        _checked([*compiler, f"-arch=compute_{portable}", "-ptx", str(source), "-o", str(ptx)])
        assembler = [*compiler, f"-gencode=arch=compute_{portable},code=sm_{machine}"]
        _checked([*assembler, "-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror", "-cubin", str(ptx), "-o", str(cubin)])
        tools = Path(triton.backends.nvidia.__file__).parent / "bin"
        usage = _checked([str(tools / "cuobjdump"), "-res-usage", str(cubin)])
        sass = _checked([str(tools / "nvdisasm"), str(cubin)])
        shared = dict(re.findall(r"kvc_shared_(\d+) = (\d+)", ptx.read_text()))
    functions = {name: text for name, text in re.findall(r"Function (\S+):\n(.*)", usage)}
    code = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, re.MULTILINE | re.DOTALL))
    rows = {}
    for i, case in enumerate(chosen):
        parts = (f"{len(case.kernel)}{case.kernel}I", f"4{case.types['Out']}", f"ELi{case.constants['HEAD_DIM']}E")
        name = next(n for n in functions if all(part in n for part in parts))
        rows[case.kernel, case.config] = {
            "kernel": case.kernel,
            "config": case.config,
            "arch": arch,
            "registers": int(re.search(r"REG:(\d+)", functions[name])[1]),
            "spill_bytes": sum(int(re.search(rf"{k}:(\d+)", functions[name])[1]) for k in ("STACK", "LOCAL")),
            "shared_bytes": int(shared[str(i)]),
            "hgmma": len(re.findall(r"\bHGMMA\b", code[name])),
            "hmma": len(re.findall(r"\bHMMA\b", code[name])),
            "tcgen05": 0,
            "tmem_columns": 0,
        }
    return rows


def _checked(command: list[str]) -> str:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return result.stdout + result.stderr


def _tile(entry: dict) -> str:
    return f"{entry['BM']}x{entry['BN']} w{entry['warps']} s{entry['stages']} r{entry['rows']}"


def cases() -> list[Case]:
    """Every configuration that can be picked, for every arch."""
    from kvcompact_kernels.backends.triton import runtime

    found = []
    for arch in ARCHS:
        table = runtime.table(arch)
        found += _forward_cases(arch, table["attention_forward"])
        found += _merge_cases(arch)
        found += _backward_cases(arch, table)
        found += _key_scores_cases(arch, table)
        found += _still_cases(arch, table)
        found += _pack_cases(arch)
        if arch in NVCC_ARCHS:
            found += _cuda_cases(arch)
    unique = {case.key: case for case in found}
    return list(unique.values())


def _source(case: Case):
    import importlib

    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"kvcompact_kernels.backends.triton.kernels.{case.module}"), case.kernel)
    unspecialised = set(function.do_not_specialize or ())
    constants = {**case.constants, **dict.fromkeys((n for n in case.ones if n in function.arg_names), 1)}
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = case.types.get(name, "fp32" if name.endswith("scale") else "i32")
        if signature[name].startswith("*") or (name.startswith("s_") and name not in unspecialised):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)


def compile_case(case: Case) -> dict[str, str | int]:
    """The row of one case; from the cache if nothing that it depends on has changed."""
    import triton

    if case.module == CUDA_MODULE:
        sources = "".join((ROOT / "csrc" / name).read_text() for name in CUDA_SOURCES)
        identity = f"{sources}{case}{_nvcc_version()}{inspect.getsource(_compile_cuda)}"
        return _from_cache(identity, lambda: _compile_cuda(case.arch)[case.kernel, case.config])
    shared = (
        {"still_cross_attention", "layers"}
        if "still" in case.module
        else {"layers"}
        if "pack" in case.module
        else set()
    )
    modules = {"common", case.module, *shared}
    source = "".join((KERNELS / f"{name}.py").read_text() for name in sorted(modules))
    method = inspect.getsource(_source) + inspect.getsource(_compile)
    return _from_cache(f"{source}{case}{triton.__version__}{method}", lambda: _compile(case))


def _from_cache(identity: str, compute: Callable[[], dict[str, str | int]]) -> dict[str, str | int]:
    cached = CACHE / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    row = compute()
    CACHE.mkdir(parents=True, exist_ok=True)
    cached.write_text(json.dumps(row))
    return row


def _compile(case: Case) -> dict[str, str | int]:
    import triton
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    compiled = triton.compile(
        _source(case),
        target=GPUTarget("cuda", ARCHS[case.arch], 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    usage = usage.stdout + usage.stderr
    return {
        "kernel": case.kernel,
        "config": case.config,
        "arch": case.arch,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "hgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "hmma": len(re.findall(r"\bHMMA\b", sass)),
        "tcgen05": len(re.findall(r"\bUTC\w*MMA\b", sass)),
        "tmem_columns": compiled.metadata.tmem_size,
    }


def problems(case: Case, row: dict, saved: dict | None) -> list[str]:
    """Why this row fails the gate; empty if it passes. ``saved`` is its row of the saved table, None if it has none."""
    from kvcompact_kernels.backends.triton.runtime import SHARED_BYTES

    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    limit = SHARED_BYTES[case.arch]
    if row["shared_bytes"] > limit:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, {case.arch} has {limit}")
    if row["tmem_columns"] > TMEM_COLUMNS:
        found.append(f"needs {row['tmem_columns']} columns of tensor memory, an SM has {TMEM_COLUMNS}")
    if case.tensor_cores and not row["hgmma"] + row["hmma"] + row["tcgen05"]:
        found.append("has no tensor-core instruction")
    if saved is None:
        found.append("is not in the saved table: run benchmarks/aot.py --write")
        return found
    if row["shared_bytes"] > int(saved["shared_bytes"]):
        found.append(f"shared memory grew from {saved['shared_bytes']} to {row['shared_bytes']}")
    if row["registers"] > int(saved["registers"]) + REGISTER_MARGIN:
        found.append(f"registers grew from {saved['registers']} to {row['registers']}")
    if int(saved["hgmma"]) and not row["hgmma"]:
        found.append("lost its warpgroup instructions (HGMMA)")
    if int(saved["tcgen05"]) and not row["tcgen05"]:
        found.append("lost its instructions on tensor memory (tcgen05)")
    return found


def saved_table() -> dict[tuple[str, str, str], dict[str, str]]:
    """The rows of ``benchmarks/results/aot.csv`` by kernel, config and arch."""
    with open(TABLE, newline="") as file:
        return {(row["kernel"], row["config"], row["arch"]): row for row in csv.DictReader(file)}


def compile_cases(chosen: list[Case], jobs: int) -> Iterator[dict[str, str | int]]:
    """The rows of the cases, in their order, compiled by so many processes."""
    # One nvcc serves all CUDA kernels of an arch, so that they make one piece of work.
    pieces: dict[tuple, list[Case]] = {}
    for case in chosen:
        pieces.setdefault(("CUDA", case.arch) if case.module == CUDA_MODULE else (case.key,), []).append(case)
    if jobs == 1:
        yield from (row for piece in pieces.values() for row in _compile_piece(piece))
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for rows in pool.map(_compile_piece, pieces.values()):
            yield from rows


def _compile_piece(piece: list[Case]) -> list[dict[str, str | int]]:
    try:
        return [compile_case(case) for case in piece]
    except Exception as error:  # noqa: BLE001  not every compiler's error can be sent to another process
        raise RuntimeError(f"{piece[0].key} does not compile: {type(error).__name__}: {error}") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="save the table")
    parser.add_argument("--quiet", action="store_true", help="print only the rows that fail")
    parser.add_argument("--only", default="", help="rows whose 'kernel config arch' contains this")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="processes to compile with (default: all cores)")
    options = parser.parse_args(argv)
    chosen = [case for case in cases() if options.only in case.key]
    saved = saved_table() if TABLE.exists() else {}
    skipped = [case for case in chosen if case.module == CUDA_MODULE] if nvcc() is None else []
    rows, failures = [], 0
    chosen = [case for case in chosen if case not in skipped]
    for case, row in zip(chosen, compile_cases(chosen, options.jobs), strict=True):
        rows.append(row)
        old = row if options.write else saved.get((case.kernel, case.config, case.arch))
        found = problems(case, row, old)
        failures += bool(found)
        if found or not options.quiet:
            print(*(row[c] for c in COLUMNS), *(["FAILS:", "; ".join(found)] if found else []), flush=True)
    if options.write:
        kept = {(case.kernel, case.config, case.arch) for case in skipped}
        merged = dict(saved) if options.only else {key: row for key, row in saved.items() if key in kept}
        merged.update({(r["kernel"], r["config"], r["arch"]): r for r in rows})
        with open(TABLE, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(merged.values())
    print(f"{len(rows)} configurations, {failures} fail")
    if skipped:
        print(f"{len(skipped)} configurations of CUDA kernels were skipped: nvcc was not found")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
