# SPDX-License-Identifier: Apache-2.0
"""Compact attention of short queries by the CUDA kernel (csrc/compact_attention/decode.cu).

A call is one launch, slots of all blocks and the tail included, and one that merges partial results where there are
several. A block that the batch shares is read once for every 16 rows of the stacked queries. It has no backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..cpu import library as cpu_library
from ..triton import runtime
from . import library

HEAD_DIMS = (64, 96, 128, 256)
MAX_QUERY_LEN = 16
MAX_BLOCKS = 8
_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 8  # elements: copies are of 16 bytes


def supports(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    betas: list[Tensor | None],
    offsets: list[Tensor | None],
    tail_keys: Tensor | None,
    tail_values: Tensor | None,
    *rest: object,
) -> str | None:
    """None when the kernel runs these normalised arguments, else the reason why it does not."""
    if query.device.type != "cuda":
        return f"needs CUDA tensors, got {query.device}"
    reason = unsupported_shape(query, keys, values, betas, tail_keys, tail_values)
    return reason or library.missing() or _device_problem(query.device.index or 0, query.shape[-1])


def unsupported_shape(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    betas: list[Tensor | None],
    tail_keys: Tensor | None,
    tail_values: Tensor | None,
) -> str | None:
    """The part of ``supports`` that does not ask for the device."""
    if query.dtype not in _DTYPES:
        return f"needs bfloat16 or float16, got {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] not in HEAD_DIMS:
        return f"needs a head dimension of {', '.join(map(str, HEAD_DIMS))}, got {query.shape[-1]}"
    if query.shape[2] > MAX_QUERY_LEN:
        return f"is for at most {MAX_QUERY_LEN} queries of a request, got {query.shape[2]}"
    if len(keys) > MAX_BLOCKS:
        return f"takes at most {MAX_BLOCKS} blocks, got {len(keys)}"
    tensors = {"query": [query], "keys": [*keys, tail_keys], "values": [*values, tail_values]}
    for name, group in tensors.items():
        for x in group:
            if x is not None and not _is_aligned(x):
                return (
                    f"needs rows of contiguous elements that start on 16 bytes, {name} has strides {tuple(x.stride())}"
                )
    leaves = [query, *keys, *values, *betas, tail_keys, tail_values]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        return "has no backward pass, and an input requires a gradient"
    return None


def _is_aligned(x: Tensor) -> bool:
    # Dynamo knows no storage offsets; the op itself checks the address.
    if x.stride(-1) != 1 or (not torch.compiler.is_compiling() and x.storage_offset() % _ALIGNMENT):
        return False
    return all(n <= 1 or stride % _ALIGNMENT == 0 for n, stride in zip(x.shape[:-1], x.stride()[:-1]))


@torch.compiler.assume_constant_result  # a device does not change; nothing for Dynamo to trace
def _device_problem(index: int, head_dim: int) -> str | None:
    return _find_device_problem(index, head_dim)


@functools.cache
def _find_device_problem(index: int, head_dim: int) -> str | None:
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"needs compute capability 8.0 or newer, the device has {major}.{minor}"
    code = torch.ops.kvcompact.compact_attention_decode_code()
    if not library.runs_on(code, major, minor):
        return (
            f"{library.LIBRARY_PATH.name} was built to {code.replace('+', ', ')}, which do not run on compute capability "
            f"{major}.{minor}: build it with KVCOMPACT_CUDA_ARCHS={major}{minor}"
        )
    needed = torch.ops.kvcompact.compact_attention_decode_shared_bytes(head_dim)
    limit = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
    if limit < needed:
        return (
            f"needs {needed} bytes of shared memory per block at head dimension {head_dim}, the device allows {limit}"
        )
    return None


def declines(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    betas: list[Tensor | None],
    offsets: list[Tensor | None],
    tail_keys: Tensor | None,
    tail_values: Tensor | None,
    tail_mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    num_kv_heads: int,
) -> str | None:
    """Why the call is left to Triton unless this backend is asked for by name: nothing was measured in its favour."""
    arch, classes = _measured_classes(query.device)
    slots = sum(k.shape[2] if o is None else -(-k.shape[0] // (o.numel() - 1)) for k, o in zip(keys, offsets))
    total = slots + (0 if tail_keys is None else tail_keys.shape[2])
    if is_measured_to_win(classes, query.shape[-1], query.shape[1] // num_kv_heads * query.shape[2], total):
        return None
    return f"no measurement in backends/configs/{arch}.json says that it beats Triton for this shape"


def is_measured_to_win(classes: Iterable[tuple[int, int, int, int]], head_dim: int, rows: int, keys: int) -> bool:
    """Whether one of the classes of shapes ``(dim, rows, min_keys, max_keys)`` covers the call.

    ``dim`` is the head dimension, ``rows`` the most query rows of a KV head and request, the others bound the slots and tail
    of a head. They stand in a GPU's table under ``"compact_attention_cuda"`` where this kernel was measured to be faster.
    """
    return any(d == head_dim and rows <= r and least <= keys <= most for d, r, least, most in classes)


@torch.compiler.assume_constant_result
def _measured_classes(device: torch.device) -> tuple[str, tuple[tuple[int, int, int, int], ...]]:
    arch = runtime.arch_name(device)
    entries = runtime.table(arch).get("compact_attention_cuda", [])
    return arch, tuple((e["dim"], e["rows"], e["min_keys"], e["max_keys"]) for e in entries)


def run(*args, need_lse: bool = True) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; the kernel has the log-sum-exp at hand, so it comes whether needed or not."""
    return torch.ops.kvcompact.compact_attention_decode(*args)


if cpu_library.available()[0]:

    @torch.library.register_fake("kvcompact::compact_attention_decode")
    def _fake(query, *rest):
        return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
            query.shape[:3], dtype=torch.float32
        )
