# SPDX-License-Identifier: Apache-2.0
"""Whether Triton kernels can run here, and with which tile sizes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MIN_VERSION = (3, 5)
# The tables that come with the package, best first, by the shared memory that a block must be allowed (with the opt-in
# limit): a B200's, an H100's, an A100's, and those of workstation and consumer cards, sm_120 and sm_86 or sm_89.
SHARED_BYTES = {
    "sm100": 227 * 1024,
    "sm90": 227 * 1024,
    "sm80": 163 * 1024,
    "sm120": 99 * 1024,
    "sm89": 99 * 1024,
}
# Tables for one major version: Triton has tensor memory for 10 and warpgroup products for 9 alone; registers of 12 run out
# at other tiles.
MAJORS = {"sm100": 10, "sm90": 9, "sm120": 12}
ARENA_BYTES = 8 << 20  # some 1,700 captured launches of 36 layers
_ARENA: list = []  # pinned memory, and the number of its elements that graphs hold
_ARENA_LOCK = threading.Lock()
SIMULATED_SMS = 4  # what the interpreter plans for: a few programs, so that splits are exercised


@dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel: ``BM`` rows by ``BN`` keys, warps per program, stages of the copy pipeline.

    ``loops``: how the forward kernel walks the keys, 1 for short queries and 3 for prefill; other kernels ignore it.
    """

    BM: int
    BN: int
    warps: int
    stages: int
    loops: int = 1


def interpreted() -> bool:
    """True when Triton was told to run kernels in its interpreter, on CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_problem() -> str | None:
    """None when a usable Triton is installed, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import triton
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton does not import: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_VERSION:
        return f"needs Triton {'.'.join(map(str, MIN_VERSION))} or newer, found {triton.__version__}"
    return None


@functools.cache
def device_problem(index: int) -> str | None:
    """None when CUDA device ``index`` runs the kernels, else the reason."""
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"needs compute capability 8.0 or newer, the device has {major}.{minor}"
    limit = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
    least = min(SHARED_BYTES.values())
    if limit < least:
        return f"needs {least // 1024} KiB of shared memory per block, the device allows {limit // 1024} KiB"
    return None


def problem(*tensors: Tensor | None) -> str | None:
    """None when Triton kernels can run on these tensors' device with their layout, else the reason."""
    device = tensors[0].device
    if device.type == "cpu" and not interpreted():
        return "needs CUDA tensors, got cpu"
    if device.type not in ("cuda", "cpu"):
        return f"needs CUDA tensors, got {device}"
    if tensors[0].dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"needs bfloat16, float16 or float32, got {str(tensors[0].dtype).removeprefix('torch.')}"
    if tensors[0].shape[-1] > 256:
        return f"needs a head dimension of at most 256, got {tensors[0].shape[-1]}"
    for tensor in tensors:
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"needs a contiguous last dimension, got strides {tuple(tensor.stride())}"
    return _machine_problem((device.index or 0) if device.type == "cuda" else None)


@torch.compiler.assume_constant_result  # a machine does not change; what asks it is not for Dynamo to trace
def _machine_problem(index: int | None) -> str | None:
    return triton_problem() or (None if index is None else device_problem(index))


def declines_cpu(query: Tensor, *args: object) -> str | None:
    """Why CPU tensors are not taken unasked: the interpreter is for tests."""
    return None if query.device.type == "cuda" else "the interpreter runs only when it is asked for by name"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of SMs of a CUDA device."""
    if device.type != "cuda":
        return SIMULATED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_slug(name: str) -> str:
    """A device's name as a file's: ``"NVIDIA H100 80GB HBM3"`` is ``"nvidia_h100_80gb_hbm3"``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def table_name(major: int, shared_bytes: int) -> str:
    """The packaged table for a GPU of that major compute capability and shared memory per block."""
    fits = (n for n, least in SHARED_BYTES.items() if least <= shared_bytes and MAJORS.get(n, major) == major)
    return next(fits, "sm89")


@functools.cache
def arch_name(device: torch.device) -> str:
    """Name of the configuration file for a device: its own where one was measured, else :func:`table_name`'s."""
    if device.type != "cuda":
        return "sm80"
    own = device_slug(torch.cuda.get_device_name(device))
    if (CONFIGS / f"{own}.json").exists():
        return own
    major, _ = torch.cuda.get_device_capability(device)
    return table_name(major, torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@functools.cache
def table(arch: str) -> dict[str, list[dict[str, int]]]:
    """The configurations of one arch, by kernel."""
    with open(CONFIGS / f"{arch}.json") as file:
        return json.load(file)


@functools.cache
def pick(arch: str, kernel: str, bits: int, dim: int, rows: int) -> Config:
    """The configuration for this element size and padded head dimension that has room for ``rows``, else the largest."""
    fitting = [c for c in table(arch)[kernel] if c["bits"] == bits and c["dim"] == dim]
    chosen = next((c for c in fitting if c["rows"] >= rows), fitting[-1])
    return Config(chosen["BM"], chosen["BN"], chosen["warps"], chosen["stages"], chosen.get("loops", 1))


def padded_dim(head_dim: int) -> int:
    """The head dimension that the tiles have: a power of two, 64 at least."""
    return max(64, 1 << (head_dim - 1).bit_length())


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's CUDA device current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def strides(tensor: Tensor | None, dims: int) -> list[int]:
    """The first ``dims`` strides, 0 where a dimension has one entry (its stride is arbitrary) or the tensor is absent."""
    if tensor is None:
        return [0] * dims
    return [0 if tensor.shape[i] == 1 else tensor.stride(i) for i in range(dims)]


def aligned(addresses: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a layer's row of a table keeps the promise of ``kernels/layers.py``."""
    return not any(x % 16 for x in (*addresses, *strides))


def device_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of 64-bit integers in the device's memory, without waiting for it.

    A graph that is being captured copies them at each replay, from host memory that is kept for as long as the process
    lives: a few KiB of a small arena, which a call outside of any capture has made.

    Raises:
        RuntimeError: the first call of all is captured, or the arena is full.
    """
    values = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cpu":
        return values
    with torch.cuda.device(device), _ARENA_LOCK:
        captured = torch.cuda.is_current_stream_capturing()
        if not _ARENA:
            if captured:
                raise RuntimeError("a launch for many layers must run once before it is captured in a CUDA graph")
            _ARENA.extend((torch.empty(ARENA_BYTES // 8, dtype=torch.int64, pin_memory=True), 0))
        if not captured:
            return values.pin_memory().to(device, non_blocking=True)
        start, end = _ARENA[1], _ARENA[1] + values.numel()
        if end > _ARENA[0].numel():
            raise RuntimeError(
                f"graphs hold tables of layers in {ARENA_BYTES >> 20} MiB of pinned memory, which is full"
            )
        _ARENA[1] = end
        return _ARENA[0][start:end].view(values.shape).copy_(values).to(device, non_blocking=True)
