# SPDX-License-Identifier: Apache-2.0
"""STILL's cross-attention on the GPU: which launches a call takes, and the launches.

The pairs of a request and a KV head are independent. They are worked off in groups: a group's projected and un-rotated
keys fit a small workspace (about half of the L2 cache of a large GPU), which the next group uses again. Per group one
launch projects the keys and one attends to them; where the slots alone do not fill the device, the tokens are split and
a third launch merges. Chunks of a long context are more requests, and so are other layers, whose tensors the kernels look up
in a table: a group may hold requests of several layers, so short contexts fill the device, and the number of launches follows
the bytes and not the layers. (Layers at odd addresses, or with odd strides, have launches of their own.)

Nothing waits for the device, and nothing is allocated but the outputs and one workspace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import runtime
from .runtime import Config

WORKSPACE_BYTES = 32 << 20
MIN_TOKENS_PER_SPLIT = 256
MAX_SPLITS = 64
MAX_WIDTH = 256
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Group:
    """Pairs that one set of launches serves: some heads of one request, or all heads of several (of any layers)."""

    first_batch: int
    batches: int
    first_head: int
    heads: int
    kv_heads: int

    @property
    def first_pair(self) -> int:
        return self.first_batch * self.kv_heads + self.first_head

    @property
    def pairs(self) -> int:
        return self.batches * self.heads


def plan_groups(batch: int, kv_heads: int, pair_bytes: int, limit: int = WORKSPACE_BYTES) -> list[Group]:
    """Groups of nearly equal size whose workspaces, ``pair_bytes`` for each pair, stay within ``limit`` where they can."""
    if kv_heads * pair_bytes > limit:
        parts = min(kv_heads, math.ceil(kv_heads / max(1, limit // pair_bytes)))
        share = math.ceil(kv_heads / parts)
        starts = range(0, kv_heads, share)
        return [Group(b, 1, h, min(share, kv_heads - h), kv_heads) for b in range(batch) for h in starts]
    parts = math.ceil(batch / (limit // (kv_heads * pair_bytes)))
    share = math.ceil(batch / parts)
    return [Group(b, min(share, batch - b), 0, kv_heads, kv_heads) for b in range(0, batch, share)]


def fill(programs: int, most: int, sms: int) -> int:
    """Into how many parts the work of each program is divided so that one wave of programs fills the device."""
    return max(1, min(most, sms // max(programs, 1)))


def tile_halves(head_dim: int, width: int) -> tuple[int, int]:
    """Columns of the tiles that hold half of the head dimension and half of D: there are two sizes of kernels."""
    return (32, 64) if max(2 * head_dim, width) <= 128 else (64, 128)


def supports(query: Tensor, keys: Tensor, values: Tensor, *rest: object) -> str | None:
    """None when the kernels run these normalised arguments, else the reason why they do not."""
    for name, size in (("the head dimension twice", 2 * keys.shape[3]), ("D", query.shape[3])):
        if size > MAX_WIDTH:
            return f"needs {name} to be at most {MAX_WIDTH}, got {size}"
    return runtime.problem(query, keys, values)


declines = runtime.declines_cpu


def _row(layer: tuple) -> tuple[list[int], list[int]]:
    """Addresses and strides of a layer in the kernels' table."""
    query, keys, values, weight, *vectors = layer
    tensors = (query, keys, values, weight, *(weight if x is None else x for x in vectors))
    return [x.data_ptr() for x in tensors], [s for x in tensors[:3] for s in runtime.strides(x, 3)]


class _Call:
    """What the launches of a forward or backward call have in common: sizes, layouts, tables.

    ``layers`` hold ``(query, keys, values, key_weight, key_bias, key_norm)`` each, of the same shapes, dtypes and device. The
    launches see the first one's tensors, and those of more layers through ``table``.
    """

    def __init__(self, layers: Sequence[tuple], cos, sin, int_cos, int_sin, norm_eps):
        self.layers = [(q, k, v, w.contiguous(), b, n) for q, k, v, w, b, n in layers]
        self.query, self.keys, self.values, self.weight, self.bias, self.norm = self.layers[0]
        self.many = len(layers) > 1
        self.batch, self.kv_heads, self.tokens, self.head_dim = self.keys.shape
        self.slots, self.width = self.query.shape[2:]
        self.tables = [x.contiguous() for x in (cos, sin, int_cos, int_sin)]
        self.table_stride = self.tables[0].stride(0) if cos.ndim == 3 and cos.shape[0] > 1 else 0
        self.norm_eps = norm_eps
        self.bits = self.query.element_size() * 8
        halves = tile_halves(self.head_dim, self.width)
        self.dims = {"HEAD_DIM": self.head_dim, "HP": halves[0], "WIDTH": self.width, "WH": halves[1]}
        self.free_columns, self.columns = 2 * halves[0], 2 * halves[1]
        self.arch = runtime.arch_name(self.query.device)
        self.sms = runtime.multiprocessors(self.query.device)
        pair_bytes = self.tokens * (self.free_columns + self.columns) * self.query.element_size()
        self.groups = plan_groups(len(layers) * self.batch, self.kv_heads, pair_bytes)
        self.most_pairs = max(group.pairs for group in self.groups)
        self.table = self.query
        if self.many:
            self.table = runtime.device_table([[*a, *s] for a, s in map(_row, self.layers)], self.query.device)

    def strides(self, tensor: Tensor) -> list[int]:
        """Strides as a launch takes them; the table has those of many layers."""
        return [0, 0, 0] if self.many else runtime.strides(tensor, 3)

    def pick(self, kernel: str, rows: int) -> Config:
        return runtime.pick(self.arch, kernel, self.bits, self.columns, rows)

    def workspace(self) -> tuple[Tensor, Tensor]:
        """``projected [pairs, T, columns]`` and ``free [pairs, T, columns]`` of the largest group."""
        rows = self.most_pairs * self.tokens
        buffer = self.query.new_empty(rows * (self.columns + self.free_columns))
        return buffer[: rows * self.columns], buffer[rows * self.columns :]

    def project(self, group: Group, projected: Tensor, free: Tensor, config: Config | None = None) -> None:
        from .kernels import still_cross_attention as kernels

        config = config or self.pick("still_project_keys", 0)
        tiles = -(-self.tokens // config.BM) * group.batches
        head_parts = fill(tiles, group.heads, self.sms)
        kernels.project_keys[(tiles * head_parts,)](
            self.keys,
            self.values,
            self.weight,
            self.weight if self.bias is None else self.bias,
            self.weight if self.norm is None else self.norm,
            *self.tables,
            projected,
            free,
            self.table,
            self.norm_eps,
            *self.strides(self.keys),
            *self.strides(self.values),
            self.table_stride,
            self.tokens,
            self.batch,
            group.first_batch,
            group.first_head,
            group.heads,
            head_parts,
            **self.dims,
            LAYERS=self.many,
            BM=config.BM,
            BN=config.BN,
            HAS_BIAS=self.bias is not None,
            HAS_NORM=self.norm is not None,
            UPCAST=runtime.interpreted(),
            num_warps=config.warps,
            num_stages=config.stages,
        )


def forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    key_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    int_cos: Tensor,
    int_sin: Tensor,
    scale: float,
    norm_eps: float,
    configs: tuple[Config, Config] | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``(pooled [B, Hkv, t, 2d], lse [B, Hkv, t] fp32, natural log)``.

    ``configs`` (of the projection and of the attention) and ``splits`` override the plan, for tests and measurements.
    """
    layer = (query, keys, values, key_weight, key_bias, key_norm, cos, sin, int_cos, int_sin, scale, norm_eps)
    pooled, lse = run_layers([layer], configs=configs, splits=splits)
    return pooled[0], lse[0]


def run_layers(
    layers: Sequence[tuple],
    need_lse: bool = True,
    configs: tuple[Config, Config] | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(pooled [L, B, Hkv, t, 2d], lse [L, B, Hkv, t])`` of L calls of :func:`forward`, whose shapes, dtypes and device
    agree, and which share the tables and the two numbers behind them; without gradients.

    ``out`` is contiguous memory for ``pooled``. It may be that of the queries: a program reads its rows before it writes them.
    """
    from .compact_attention import merge_tile
    from .kernels import attention_forward, still_cross_attention

    if len(layers) > 1 and not all(runtime.aligned(*_row(layer[:6])) for layer in layers):
        # a layer whose memory lies oddly has launches that fit it, and the others have not
        parts = [None] * len(layers) if out is None else out.split(1)
        found = [run_layers([layer], need_lse, configs, splits, part) for layer, part in zip(layers, parts)]
        if out is not None:
            return out, torch.cat([row_lse for _, row_lse in found])
        return tuple(torch.cat(x) for x in zip(*found))
    *tables, scale, norm_eps = layers[0][6:]
    call = _Call([layer[:6] for layer in layers], *tables, norm_eps)
    query, values = call.query, call.values
    pooled = out
    if pooled is None:
        pooled = query.new_empty(len(layers), call.batch, call.kv_heads, call.slots, 2 * call.head_dim)
    lse = query.new_empty(pooled.shape[:4], dtype=torch.float32)
    if pooled.numel() == 0:
        return pooled, lse
    if call.tokens == 0:
        return pooled.zero_(), lse.fill_(float("-inf"))
    project_config, config = configs or (None, call.pick("still_attend", call.slots))
    row_tiles = -(-call.slots // config.BM)
    if splits is None:
        splits = fill(call.most_pairs * row_tiles, min(MAX_SPLITS, call.tokens // MIN_TOKENS_PER_SPLIT), call.sms)
    projected, free = call.workspace()
    rows = call.most_pairs * call.slots
    width = 2 * call.head_dim
    if splits > 1:
        buffer = query.new_empty(splits * rows * (width + 1), dtype=torch.float32)
        part_out, part_lse = buffer[: splits * rows * width], buffer[splits * rows * width :]
    with runtime.on_device(query):
        for group in call.groups:
            first_row = group.first_pair * call.slots
            part, row_lse = pooled.view(-1)[first_row * width :], lse.view(-1)[first_row:]
            call.project(group, projected, free, project_config)
            still_cross_attention.attend[(group.pairs * row_tiles * splits,)](
                query,
                projected,
                free,
                values,
                part_out if splits > 1 else part,
                part_lse if splits > 1 else row_lse,
                call.table,
                scale * LOG2E,
                *call.strides(query),
                *call.strides(values),
                call.tokens,
                call.slots,
                call.batch,
                call.kv_heads,
                group.first_pair,
                group.pairs,
                splits,
                **call.dims,
                LAYERS=call.many,
                BM=config.BM,
                BN=config.BN,
                UPCAST=runtime.interpreted(),
                num_warps=config.warps,
                num_stages=config.stages,
            )
            if splits > 1:
                rows_at_once, parts_at_once = merge_tile(splits)
                attention_forward.merge[(-(-group.pairs * call.slots // rows_at_once),)](
                    part_out,
                    part_lse,
                    part,
                    row_lse,
                    group.pairs * call.slots,
                    splits,
                    HEAD_DIM=width,
                    D=runtime.padded_dim(width),
                    BR=rows_at_once,
                    BP=parts_at_once,
                    num_warps=4,
                )
    return pooled, lse


def backward(
    grad_pooled: Tensor,
    grad_lse: Tensor,
    pooled: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    key_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    int_cos: Tensor,
    int_sin: Tensor,
    scale: float,
    norm_eps: float,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, keys, values, key_weight, key_bias and key_norm; deterministic.

    ``config`` (of every kernel) and ``splits`` override the plan, for tests and measurements.
    """
    from .kernels import still_backward as kernels

    layer = (query, keys, values, key_weight, key_bias, key_norm)
    call = _Call([layer], cos, sin, int_cos, int_sin, norm_eps)
    kv_heads, tokens, slots = call.kv_heads, call.tokens, call.slots
    head_dim, width, half = call.head_dim, call.width, call.columns // 2
    like = {"dtype": torch.float32, "device": query.device}
    dkeys = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    dvalues = torch.empty_like(dkeys)
    dquery = torch.zeros(query.shape, **like)
    dweight = torch.zeros(key_weight.shape, **like)
    sums = torch.zeros(4, half, **like)
    if pooled.numel() and tokens:
        grad_pooled = grad_pooled.contiguous()
        delta = (grad_pooled.float() * pooled.float()).sum(-1) - grad_lse.float()
        names = ("values", "keys", "queries", "norm", "inputs", "weight")
        picked = {name: config or call.pick(f"still_backward_{name}", 0) for name in names}
        row_tiles = -(-slots // picked["queries"].BM)
        weight_tiles = call.columns // picked["weight"].BM
        weight_splits = fill(weight_tiles, -(-call.most_pairs * tokens // picked["weight"].BN), call.sms)
        if splits is None:
            splits = fill(call.most_pairs * row_tiles, min(MAX_SPLITS, tokens // MIN_TOKENS_PER_SPLIT) or 1, call.sms)
        else:
            weight_splits = splits
        projected, free = call.workspace()
        dprojected = torch.empty_like(projected)
        part_query = torch.empty(splits * call.most_pairs * slots * width, **like)
        part_weight = torch.empty(weight_splits, width, 2 * head_dim, **like)

        def launch(name, programs, tensors, numbers, **flags):
            chosen = picked[name]
            kernel = {
                "values": kernels.attend_backward_values,
                "keys": kernels.attend_backward_keys,
                "queries": kernels.attend_backward_queries,
                "norm": kernels.project_backward_norm,
                "inputs": kernels.project_backward_inputs,
                "weight": kernels.project_backward_weight,
            }[name]
            kernel[(programs,)](
                *tensors,
                *numbers,
                **call.dims,
                **flags,
                BM=chosen.BM,
                BN=chosen.BN,
                UPCAST=runtime.interpreted(),
                num_warps=chosen.warps,
                num_stages=chosen.stages,
            )

        with runtime.on_device(query):
            q_strides, v_strides = runtime.strides(query, 3), runtime.strides(values, 3)
            log_scale = scale * LOG2E
            for group in call.groups:
                pairs, first = group.pairs, group.first_pair
                call.project(group, projected, free, config)
                launch(
                    "values",
                    pairs * -(-tokens // picked["values"].BM),
                    (query, projected, grad_pooled, lse, dkeys, dvalues),
                    (log_scale, *q_strides, tokens, slots, kv_heads, first),
                )
                launch(
                    "keys",
                    pairs * -(-tokens // picked["keys"].BM),
                    (query, projected, free, values, grad_pooled, lse, delta, dprojected),
                    (log_scale, scale, *q_strides, *v_strides, tokens, slots, kv_heads, first),
                )
                launch(
                    "queries",
                    pairs * row_tiles * splits,
                    (query, projected, free, values, grad_pooled, lse, delta, part_query),
                    (log_scale, scale, *q_strides, *v_strides, tokens, slots, kv_heads, first, pairs, splits),
                )
                _add_to_query(dquery, part_query, group, splits)
                tiles = -(-tokens // picked["norm"].BM) * group.batches
                head_parts = fill(tiles, group.heads, call.sms)
                part_sums = torch.empty(tiles * head_parts, 4, half, **like)
                launch(
                    "norm",
                    tiles * head_parts,
                    (
                        values,
                        call.weight,
                        call.weight if call.bias is None else call.bias,
                        call.weight if call.norm is None else call.norm,
                        *call.tables[2:],
                        free,
                        dprojected,
                        part_sums,
                    ),
                    (
                        norm_eps,
                        *v_strides,
                        tokens,
                        group.first_batch,
                        group.first_head,
                        group.heads,
                        head_parts,
                    ),
                    HAS_BIAS=call.bias is not None,
                    HAS_NORM=call.norm is not None,
                )
                sums += part_sums.sum(0)
                launch(
                    "inputs",
                    pairs * -(-tokens // picked["inputs"].BM),
                    (dprojected, call.weight, *call.tables[:2], dkeys, dvalues),
                    (call.table_stride, tokens, kv_heads, first),
                )
                launch(
                    "weight",
                    weight_tiles * weight_splits,
                    (dprojected, free, values, part_weight),
                    (*v_strides, tokens, kv_heads, first, pairs, weight_splits),
                )
                dweight += part_weight.sum(0)
    else:
        dkeys.zero_()
        dvalues.zero_()
    vectors = sums[:, : width // 2].reshape(2, width)
    return (
        dquery.to(query.dtype),
        dkeys,
        dvalues,
        dweight.to(key_weight.dtype),
        None if key_bias is None else vectors[0].to(key_bias.dtype),
        None if key_norm is None else vectors[1].to(key_norm.dtype),
    )


def _add_to_query(dquery: Tensor, parts: Tensor, group: Group, splits: int) -> None:
    """Adds a group's partial gradients to those of the query, summed over what the query is shared by."""
    shape = (splits, group.batches, group.heads, *dquery.shape[2:])
    total = parts[: math.prod(shape)].view(shape).sum(0)
    rows, heads = slice(0, 1), slice(0, 1)
    if dquery.shape[0] > 1:
        rows = slice(group.first_batch, group.first_batch + group.batches)
    if dquery.shape[1] > 1:
        heads = slice(group.first_head, group.first_head + group.heads)
    target = dquery[rows, heads]
    target += total.sum_to_size(target.shape)


def run(*args, need_lse: bool = True) -> tuple[Tensor, Tensor]:
    """``(pooled, lse)``; through the registered op where gradients or a compiler need it, else straight to the launches."""
    wants_grad = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
    if wants_grad or torch.compiler.is_compiling():
        return torch.ops.kvcompact.still_cross_attention(*args)
    return forward(*args)
