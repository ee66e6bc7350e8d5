# SPDX-License-Identifier: Apache-2.0
"""Compact attention on the GPU: which launches a call takes, and the launches.

A call is one launch per block, the tail riding with the last block, and one merge if there is more than one partial
result. Nothing waits for the device, and nothing is allocated but the outputs and one workspace, so a call can be
captured in a CUDA graph. A block that the whole batch shares is read once for short queries: its rows are the stacked
queries of all requests; the tail then has a launch of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import runtime
from .runtime import Config

# Rows of one request up to which a shared block is read once for the whole batch; longer queries fill tiles by themselves.
STACK_ROWS = 64
MIN_KEYS_PER_SPLIT = 256
MAX_SPLITS = 128
PROGRAMS_PER_SM = 2
# Slots of a full head over the mean, where heads share slots by what each was measured to need (training/head_shares.py).
UNEVEN = 4
DELTA_ROWS = 16
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """One launch of the forward kernel: a block (or none), with or without the tail."""

    block: int | None
    tail: bool
    stacked: bool
    config: Config
    splits: int
    split_base: int
    programs: int


def plan_forward(
    batch: int,
    kv_heads: int,
    group: int,
    query_len: int,
    blocks: list[tuple[int, bool]],
    tail_len: int,
    bits: int,
    dim: int,
    arch: str,
    sms: int,
    config: Config | None = None,
    splits: int | None = None,
) -> list[Launch]:
    """The launches of a call, from sizes that the host knows.

    Args:
        blocks: per block the slots of a head (of ragged heads those of a full one) and whether the batch shares it.
        config, splits: fixed choices, for tests and measurements.
    """
    stacked = [shared and batch > 1 and query_len * group <= STACK_ROWS for _, shared in blocks]
    own = [i for i, s in enumerate(stacked) if not s]
    with_tail = own[-1] if own else None
    todo = [(i, i == with_tail and tail_len > 0) for i in range(len(blocks))]
    if with_tail is None and (tail_len > 0 or not blocks):
        todo.append((None, True))
    launches = []
    base = 0
    for block, tail in todo:
        stack = block is not None and stacked[block]
        rows = query_len * group * (batch if stack else 1)
        keys = (0 if block is None else blocks[block][0]) + (tail_len if tail else 0)
        chosen = config or runtime.pick(arch, "attention_forward", bits, dim, rows)
        tiles = -(-rows // chosen.BM) * kv_heads * (1 if stack else batch)
        number = splits
        if number is None:
            room = PROGRAMS_PER_SM * sms // max(tiles, 1)
            number = max(1, min(room, keys // MIN_KEYS_PER_SPLIT, MAX_SPLITS))
        launches.append(Launch(block, tail, stack, chosen, number, base, tiles * number))
        base += number
    return launches


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
    """None when the kernels run these normalised arguments, else the reason why they do not."""
    return runtime.problem(query, *keys, *values, tail_keys, tail_values)


def merge_tile(parts: int) -> tuple[int, int]:
    """Rows and parts that one step of the merge loads."""
    return (8, 2) if parts <= 2 else (4, 4) if parts <= 4 else (1, 16)


declines = runtime.declines_cpu


def forward(
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
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out [B, H, Lq, d], lse [B, H, Lq] fp32, natural log)``; ``config`` and ``splits`` override the plan."""
    from .kernels import attention_forward as kernels

    batch, heads, query_len, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    group = heads // num_kv_heads
    tail_len = 0 if tail_keys is None else tail_keys.shape[2]
    dim = runtime.padded_dim(head_dim)
    blocks = [_planned_size(k, o, batch, num_kv_heads) for k, o in zip(keys, offsets)]
    launches = plan_forward(
        batch,
        num_kv_heads,
        group,
        query_len,
        blocks,
        tail_len,
        query.element_size() * 8,
        dim,
        runtime.arch_name(query.device),
        runtime.multiprocessors(query.device),
        config,
        splits,
    )
    parts = launches[-1].split_base + launches[-1].splits
    part_out, part_lse = out, lse
    if parts > 1:
        workspace = torch.empty((parts, lse.numel(), head_dim + 1), dtype=torch.float32, device=query.device)
        part_out = workspace.view(-1)[: parts * out.numel()]
        part_lse = workspace.view(-1)[parts * out.numel() :]
    with runtime.on_device(query):
        for launch in launches:
            i = launch.block
            key = tail_keys if i is None else keys[i]
            value = tail_values if i is None else values[i]
            beta, offset = (None, None) if i is None else (betas[i], offsets[i])
            kernels.attention_forward[(launch.programs,)](
                query,
                key,
                value,
                lse if beta is None else beta,
                lse if offset is None else offset.contiguous(),
                tail_keys if launch.tail else query,
                tail_values if launch.tail else query,
                tail_mask.view(torch.uint8) if launch.tail and tail_mask is not None else query,
                part_out,
                part_lse,
                scale * LOG2E,
                *runtime.strides(query, 3),
                *_block_strides(key, offset, num_kv_heads),
                *_block_strides(value, offset, num_kv_heads),
                *_beta_strides(beta, offset, num_kv_heads),
                *runtime.strides(tail_keys if launch.tail else None, 3),
                *runtime.strides(tail_values if launch.tail else None, 3),
                *runtime.strides(tail_mask if launch.tail else None, 2),
                batch,
                num_kv_heads,
                group,
                query_len,
                0 if i is None or offset is not None else key.shape[2],
                tail_len if launch.tail else 0,
                int(causal),
                window,
                launch.splits,
                launch.split_base,
                HEAD_DIM=head_dim,
                D=dim,
                BM=launch.config.BM,
                BN=launch.config.BN,
                HAS_BETA=beta is not None,
                HAS_MASK=launch.tail and tail_mask is not None,
                RAGGED=offset is not None,
                STACKED=launch.stacked,
                LOOPS=2 if launch.stacked else launch.config.loops,
                WIDE=_is_wide(launch.config.BN, key, value, *([tail_keys, tail_values] if launch.tail else [])),
                UPCAST=runtime.interpreted(),
                num_warps=launch.config.warps,
                num_stages=launch.config.stages,
            )
        if parts > 1:
            rows_at_once, parts_at_once = merge_tile(parts)
            kernels.merge[(-(-lse.numel() // rows_at_once),)](
                part_out,
                part_lse,
                out,
                lse,
                lse.numel(),
                parts,
                HEAD_DIM=head_dim,
                D=dim,
                BR=rows_at_once,
                BP=parts_at_once,
                num_warps=4,
            )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
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
    config: Config | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """Gradients of query, keys, values, betas, tail_keys and tail_values; absent inputs get empty tensors.

    One launch per block and one for the tail for the keys' side, one per block (the tail rides along) for the queries'.
    Deterministic.
    """
    from .kernels import attention_backward as kernels

    batch, heads, query_len, head_dim = query.shape
    group = heads // num_kv_heads
    dim = runtime.padded_dim(head_dim)
    arch, bits = runtime.arch_name(query.device), query.element_size() * 8
    key_config = config or runtime.pick(arch, "attention_backward_keys", bits, dim, 0)
    query_config = config or runtime.pick(arch, "attention_backward_queries", bits, dim, 0)
    out, lse, grad_out, grad_lse = (x.contiguous() for x in (out, lse, grad_out, grad_lse))
    tail_len = 0 if tail_keys is None else tail_keys.shape[2]
    mask = None if tail_mask is None else tail_mask.view(torch.uint8)

    def gradient(x: Tensor | None) -> Tensor:
        """Written in full by its launch; zeros where no query means no launch."""
        if x is None:
            return query.new_empty(0)
        new = torch.zeros if query.numel() == 0 else torch.empty
        return new(x.shape, dtype=x.dtype, device=x.device)

    grad_query = gradient(query)
    grad_keys, grad_values, grad_betas = ([gradient(x) for x in xs] for xs in (keys, values, betas))
    grad_tail_keys, grad_tail_values = gradient(tail_keys), gradient(tail_values)
    result = grad_query, grad_keys, grad_values, grad_betas, grad_tail_keys, grad_tail_values
    if query.numel() == 0:
        return result
    delta = torch.empty(lse.shape, dtype=torch.float32, device=query.device)
    common = {"HEAD_DIM": head_dim, "D": dim, "UPCAST": runtime.interpreted()}

    def keys_side(key, value, beta, offset, tail, grad_key, grad_value, grad_beta):
        count, shared = _block_size(key, offset, batch, num_kv_heads)
        if key.numel() == 0:
            return
        stacked = shared and batch > 1 and not tail
        # A ragged head may be longer than the mean: programs take several tiles then.
        tile_programs = -(-(count if offset is None else min(2 * count, key.shape[0])) // key_config.BN)
        kv_batch = 1 if stacked else batch
        kernels.attention_backward_keys[(tile_programs * num_kv_heads * kv_batch,)](
            query,
            key,
            value,
            lse if beta is None else beta,
            lse if offset is None else offset.contiguous(),
            mask if tail and mask is not None else query,
            grad_out,
            lse,
            delta,
            grad_key,
            grad_value,
            lse if beta is None else grad_beta,
            scale * LOG2E,
            scale,
            *runtime.strides(query, 3),
            *_block_strides(key, offset, num_kv_heads),
            *_block_strides(value, offset, num_kv_heads),
            *_beta_strides(beta, offset, num_kv_heads),
            *runtime.strides(mask if tail else None, 2),
            batch,
            num_kv_heads,
            group,
            query_len,
            0 if offset is not None else key.shape[2],
            tail_len,
            int(causal),
            window,
            tile_programs,
            BM=key_config.BM,
            BN=key_config.BN,
            TAIL=tail,
            HAS_BETA=beta is not None,
            HAS_MASK=tail and mask is not None,
            RAGGED=offset is not None,
            STACKED=stacked,
            WIDE=_is_wide(key_config.BN, key, value),
            num_warps=key_config.warps,
            num_stages=key_config.stages,
            **common,
        )

    with runtime.on_device(query):
        kernels.attention_delta[(-(-lse.numel() // DELTA_ROWS),)](
            grad_out, out, grad_lse, delta, lse.numel(), HEAD_DIM=head_dim, D=dim, BM=DELTA_ROWS, num_warps=4
        )
        for i in range(len(keys)):
            keys_side(keys[i], values[i], betas[i], offsets[i], False, grad_keys[i], grad_values[i], grad_betas[i])
        if tail_len:
            keys_side(tail_keys, tail_values, None, None, True, grad_tail_keys, grad_tail_values, None)
        launches = list(range(len(keys))) or [None]
        total = grad_query
        if len(launches) > 1:
            total = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        for number, i in enumerate(launches):
            last = number == len(launches) - 1
            tail = last and tail_len > 0
            key = tail_keys if i is None else keys[i]
            value = tail_values if i is None else values[i]
            beta, offset = (None, None) if i is None else (betas[i], offsets[i])
            tiles = -(-query_len * group // query_config.BM)
            kernels.attention_backward_queries[(tiles * batch * num_kv_heads,)](
                query,
                key,
                value,
                lse if beta is None else beta,
                lse if offset is None else offset.contiguous(),
                tail_keys if tail else query,
                tail_values if tail else query,
                mask if tail and mask is not None else query,
                grad_out,
                lse,
                delta,
                total,
                grad_query if last else total,
                scale * LOG2E,
                scale,
                *runtime.strides(query, 3),
                *_block_strides(key, offset, num_kv_heads),
                *_block_strides(value, offset, num_kv_heads),
                *_beta_strides(beta, offset, num_kv_heads),
                *runtime.strides(tail_keys if tail else None, 3),
                *runtime.strides(tail_values if tail else None, 3),
                *runtime.strides(mask if tail else None, 2),
                num_kv_heads,
                group,
                query_len,
                0 if i is None or offset is not None else key.shape[2],
                tail_len if tail else 0,
                int(causal),
                window,
                int(number > 0),
                BM=query_config.BM,
                BN=query_config.BN,
                HAS_BETA=beta is not None,
                HAS_MASK=tail and mask is not None,
                RAGGED=offset is not None,
                WIDE=_is_wide(query_config.BN, key, value, *([tail_keys, tail_values] if tail else [])),
                num_warps=query_config.warps,
                num_stages=query_config.stages,
                **common,
            )
    return result


def run(*args, need_lse: bool = True) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; through the registered op where gradients or a compiler need it, else straight to the launches."""
    tensors = [args[0], *args[1], *args[2], *[b for b in args[3] if b is not None], args[5], args[6]]
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if wants_grad or torch.compiler.is_compiling():
        return torch.ops.kvcompact.compact_attention(*args)
    return forward(*args)


def _block_size(keys: Tensor, offsets: Tensor | None, batch: int, kv_heads: int) -> tuple[int, bool]:
    if offsets is None:
        return keys.shape[2], keys.shape[0] == 1
    heads = offsets.numel() - 1
    return math.ceil(keys.shape[0] / heads), heads == kv_heads


def _planned_size(keys: Tensor, offsets: Tensor | None, batch: int, kv_heads: int) -> tuple[int, bool]:
    """Slots of a head that splits are planned for, and whether the batch shares the block.

    Ragged heads take as long as the fullest, whose length only the device knows: one of ``UNEVEN`` times the mean is planned
    for. Splits that find nothing to do end at once.
    """
    count, shared = _block_size(keys, offsets, batch, kv_heads)
    return (count if offsets is None else count * min(UNEVEN, kv_heads)), shared


def _block_strides(x: Tensor, offsets: Tensor | None, kv_heads: int) -> list[int]:
    """``(batch, head, slot)`` strides, of packed rows ``(batch stride of the offsets, 0, slot stride)``."""
    if offsets is None:
        return runtime.strides(x, 3)
    return [_offsets_stride(offsets, kv_heads), 0, x.stride(0)]


def _offsets_stride(offsets: Tensor, kv_heads: int) -> int:
    return 0 if offsets.numel() - 1 == kv_heads else kv_heads


def _is_wide(keys_per_tile: int, *tensors: Tensor) -> bool:
    """Whether an offset inside a tile of keys may exceed 31 bits."""
    return any(keys_per_tile * x.stride(-2) + x.shape[-1] >= 1 << 31 for x in tensors)


def _beta_strides(beta: Tensor | None, offsets: Tensor | None, kv_heads: int) -> list[int]:
    if offsets is not None:
        return [_offsets_stride(offsets, kv_heads), 0, 1 if beta is None else beta.stride(0)]
    return [0, 0, 1] if beta is None else [*runtime.strides(beta, 2), beta.stride(2)]
