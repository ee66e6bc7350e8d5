# SPDX-License-Identifier: Apache-2.0
"""``kvcompact doctor``: what this installation has, and which backend each op would take here."""

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ..version import __version__

NAME = "doctor"
HELP = "show versions, instruction sets, GPU, and which backends work and why not the others"
DESCRIPTION = "Shows what a bug report should hold."

PACKAGES = ("torch", "transformers", "triton", "safetensors", "tokenizers", "numpy", "gguf", "accelerate", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="exit with 1 when the native library does not work")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..backends.cpu import library
    from ..backends.cuda import library as cuda_library
    from ..demo.model import cache_directory

    usable, reason = library.available()
    cuda_usable, cuda_reason = cuda_library.available()
    result = {
        "kvcompact_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "model": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "native_library": {"path": str(library.LIBRARY_PATH), "usable": usable, "reason": reason or None},
        "cuda_library": {
            "path": str(cuda_library.LIBRARY_PATH),
            "usable": cuda_usable,
            "reason": cuda_reason or None,
        },
        "gpus": _gpus(),
        "no_gpu": None if torch.cuda.is_available() else _no_gpu(),
        "backends": _backends(),
        "cache_directory": str(cache_directory()),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("KVCOMPACT_")},
    }
    if usable:
        try:
            result["native_library"] |= {"isa": library.isa(), "isas": library.isas()}
        except RuntimeError as error:
            result["native_library"] |= {"usable": False, "reason": str(error)}
    if not args.json:
        _print(result)
    if args.strict and not result["native_library"]["usable"]:
        from .common import CliError

        raise CliError(f"the native library does not work: {result['native_library']['reason']}")
    return result


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    import torch

    from ..backends.triton import runtime

    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
                "shared_memory_per_block": properties.shared_memory_per_block_optin,
                "kernel_table": f"{runtime.arch_name(torch.device('cuda', i))}.json",
                "triton_kernels": runtime.triton_problem() or runtime.device_problem(i) or "run",
            }
        )
    return found


def _no_gpu() -> str:
    """Why torch sees no GPU."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip(" -1,"):
        return f"CUDA_VISIBLE_DEVICES={hidden} hides every device"
    return f"torch was built for CUDA {torch.version.cuda}, but finds no device, or no driver that is new enough"


def _backends() -> dict[str, dict[str, Any]]:
    """Per op, device and dtype: the backend that a decode-sized call takes, and why not the others."""
    import torch

    from ..backends.registry import explain

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    report: dict[str, dict[str, Any]] = {}
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            for op, (args, kwargs) in _small_calls(device, dtype).items():
                found = explain(op, *args, **kwargs)
                case = f"{device} {str(dtype).removeprefix('torch.')}"
                report.setdefault(op, {})[case] = {"chosen": found.chosen, "others": found.reasons}
    return report


def _small_calls(device: str, dtype: Any) -> dict[str, tuple[tuple, dict[str, Any]]]:
    import torch

    def zeros(*shape: int) -> Any:
        return torch.zeros(shape, device=device, dtype=dtype)

    kv = zeros(1, 2, 32, 64)
    tables = {"cos": 32, "sin": 32, "int_cos": 64, "int_sin": 64}
    return {
        "compact_attention": ((zeros(1, 4, 1, 64), kv, kv), {}),
        "key_scores": ((zeros(1, 4, 1, 64), kv), {}),
        "still_cross_attention": (
            (zeros(1, 2, 8, 128), kv, kv, zeros(128, 128)),
            {name: torch.ones(32, width, device=device) for name, width in tables.items()},
        ),
        "pack_slots": ((kv, kv, torch.zeros(8, dtype=torch.int64, device=device)), {}),
    }


def _print(result: dict[str, Any]) -> None:
    print(f"kvcompact-kernels {result['kvcompact_kernels']}, Python {result['python']}, {result['platform']}")
    print("packages:  " + ", ".join(f"{k} {v or '(not installed)'}" for k, v in result["packages"].items()))
    cpu = result["cpu"]
    print(
        f"CPU:       {cpu['model']}, {cpu['cores']} cores, {cpu['torch_threads']} torch threads, {cpu['torch_capability']}"
    )
    native = result["native_library"]
    if native["usable"]:
        print(
            f"native:    {native['path']}: uses {native['isa']}; this build and machine have {', '.join(native['isas'])}"
        )
    else:
        print(f"native:    not usable: {native['reason']}")
    cuda = result["cuda_library"]
    print(f"CUDA:      {cuda['path'] if cuda['usable'] else 'not usable: ' + cuda['reason']}")
    if not result["gpus"]:
        print(f"GPU:       none that torch can use: {result['no_gpu']}")
    for gpu in result["gpus"]:
        print(
            f"GPU:       {gpu['name']}: sm_{gpu['compute_capability'].replace('.', '')}, {gpu['multiprocessors']} SMs, "
            f"{gpu['memory_bytes'] / 2**30:.1f} GiB, {gpu['shared_memory_per_block'] // 1024} KiB of shared memory per block"
        )
        print(
            f"           Triton kernels: {gpu['triton_kernels']}; tile sizes from backends/configs/{gpu['kernel_table']}"
        )
    print(f"cache:     {result['cache_directory']}")
    for name, value in result["environment"].items():
        print(f"           {name}={value}")
    for op, cases in result["backends"].items():
        print(f"{op}:")
        for case, found in cases.items():
            print(f"    {case}: {found['chosen'] or 'no backend can run this'}")
            for name, reason in found["others"].items():
                print(f"        not {name}: {reason}")
