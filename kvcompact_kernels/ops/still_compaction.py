# SPDX-License-Identifier: Apache-2.0
"""``still_compaction``: one layer of STILL; ``still_cross_attention``: its kernel, latents that attend to cached tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from .._checks import check_int, check_layers, check_tensor
from ..backends import registry
from ..backends.cpu import library
from ..backends.cpu import still_compaction as cpu
from ..backends.torch import still_compaction as plain
from ..backends.triton import still_compaction as triton
from ..reference import still_compaction as reference
from ..rope import Rope
from ..still_config import StillConfig, still_parameter_shapes
from .compact_attention import compact_attention

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Layers whose latents are computed together may take this much memory beyond what all layers' slots will take in the end:
# less than a twentieth of the keys and values of Qwen3-4B at 8,192 tokens.
LATENT_BYTES = 44 << 20
LATENT_TENSORS = (
    11  # of the latents' size, at most at once: while they attend to each other, rotations being in float32
)


def still_cross_attention(
    query: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence[Tensor],
    values: Tensor | Sequence[Tensor],
    key_weight: Tensor | Sequence[Tensor],
    key_bias: Tensor | Sequence[Tensor] | None = None,
    key_norm: Tensor | Sequence[Tensor] | None = None,
    *,
    cos: Tensor,
    sin: Tensor,
    int_cos: Tensor,
    int_sin: Tensor,
    scale: float | None = None,
    norm_eps: float = 1e-6,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor] | list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Latents attend to a layer's cached tokens; keys are un-rotated, projected, normed and rotated on the way.

    ::

        k1, k2 = halves of keys
        x  = [k1 cos + k2 sin ; k2 cos - k1 sin ; values]           the model's rotation undone; width 2d
        k' = RoPE_int(rms_norm(x @ key_weight.T + key_bias) * key_norm)
        pooled = softmax(scale * query @ k'.T) @ x

    Neither x nor the scores are ever in memory as a whole. The value and output projections of STILL commute with the
    average, so they are the caller's, on ``t`` rows.

    Takes one layer, or lists with an entry a layer, which agree in shape, dtype and device and share the tables. On a GPU
    layers then share launches, as many as fit a small workspace; their gradients are computed layer by layer.

    Args:
        query: ``[B or 1, Hkv or 1, t, D]``, float32, bfloat16, float16 or float64: latents, already projected, normed and
            rotated; a size of 1 is shared by the batch, or by the heads. ``D`` is even.
        keys, values: ``[B, Hkv, T, d]`` as cached (keys rotated), of query's dtype. Strides are honoured.
        key_weight: ``[D, 2d]`` of query's dtype, shared by the heads.
        key_bias: ``[D]`` of query's dtype or float32, or None.
        key_norm: ``[D]`` weight of an RMS norm (no mean subtraction), of query's dtype or float32; None is no norm.
        cos, sin: ``[T, d / 2]`` float32 (float64 with float64 inputs): tables of the model's rotation at the tokens'
            positions, already divided by its attention scaling; or ``[B, T, d / 2]`` where the requests stand at different
            positions, as chunks of one context do.
        int_cos, int_sin: ``[T, D / 2]``: tables of the compactor's own rotation.
        scale: of the logits, default ``1 / sqrt(D)``.
        norm_eps: epsilon of the RMS norm.
        return_lse: also return the log-sum-exp of the logits.
        backend: ``"auto"``, or a backend's name, which then runs or raises.

    Returns:
        ``pooled [B, Hkv, t, 2d]`` in query's dtype; with ``return_lse`` also ``lse [B, Hkv, t]`` float32 (float64 for
        float64 inputs), natural log. Differentiable in query, keys, values, key_weight, key_bias and key_norm. For lists,
        lists of such, whose entries share memory.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape, an empty list, lists of different
            lengths, layers that do not agree.
        BackendUnavailableError: the named backend cannot run this call.

    Source: STILL (arXiv 2606.07878), the cross-attention of one block.
    """
    shared = {"cos": cos, "sin": sin, "int_cos": int_cos, "int_sin": int_sin, "scale": scale, "norm_eps": norm_eps}
    if not isinstance(keys, Tensor):
        given = {"key_bias": key_bias, "key_norm": key_norm}
        given = {name: x for name, x in given.items() if x is not None}
        check_layers(keys=keys, query=query, values=values, key_weight=key_weight, **given)
        found = _attend_layers(query, keys, values, key_weight, key_bias, key_norm, shared, return_lse, backend)
        return tuple(list(x.unbind()) for x in found) if return_lse else list(found[0].unbind())
    args = _normalise(query, keys, values, key_weight, key_bias, key_norm, **shared)
    pooled, lse = registry.select("still_cross_attention", backend, args).run(*args, need_lse=return_lse)
    return (pooled, lse) if return_lse else pooled


def _attend_layers(
    query, keys, values, key_weight, key_bias, key_norm, shared, need_lse, backend, out=None
) -> tuple[Tensor, Tensor | None]:
    """``pooled [L, B, Hkv, t, 2d]`` and ``lse [L, B, Hkv, t]`` of lists that :func:`still_cross_attention` describes.

    ``out`` is memory that ``pooled`` may take, that of the queries for instance; it takes it where nothing else needs it.
    """
    names = ("query", "keys", "values", "key_weight", "key_bias", "key_norm")
    lists = (query, keys, values, key_weight, key_bias, key_norm)
    first = _normalise(*(None if x is None else x[0] for x in lists), **shared)
    layers = [first]
    for i in range(1, len(keys)):
        tensors = [None if x is None else x[i] for x in lists]
        for name, x, like in zip(names, tensors, first):
            if like is not None:
                check_tensor(f"{name}[{i}]", x, shape=tuple(like.shape), dtypes=(like.dtype,), device=like.device)
        layers.append((*tensors, *first[6:]))
    chosen = registry.select_for_layers("still_cross_attention", backend, layers)
    flat = [x for args in layers for x in args[:6]]
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat)
    alone = len(layers) == 1 and (out is None or wants_grad)
    if chosen.run_layers is None or alone or torch.compiler.is_compiling():
        found = [[None if x is None else x[None] for x in chosen.run(*args, need_lse=need_lse)] for args in layers]
        if len(layers) == 1:
            return found[0][0], found[0][1] if need_lse else None
        pooled, lse = zip(*found)
        return torch.cat(pooled), torch.cat(lse) if need_lse else None
    if wants_grad:
        return _LayersTogether.apply(chosen.run_layers, first[6:], *flat)
    return chosen.run_layers(layers, need_lse, out=out)


class _LayersTogether(torch.autograd.Function):
    """Forward of all layers together, backward layer by layer: six inputs a layer, after a function and what they share."""

    @staticmethod
    def forward(ctx, run_layers, shared, *flat):
        pooled, lse = run_layers([(*flat[i : i + 6], *shared) for i in range(0, len(flat), 6)])
        ctx.save_for_backward(pooled, lse, *shared[:4], *flat)
        ctx.numbers = shared[4:]
        return pooled, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_pooled, grad_lse):
        pooled, lse, *tensors = ctx.saved_tensors
        tables, flat = tensors[:4], tensors[4:]
        grads = []
        for layer, i in enumerate(range(0, len(flat), 6)):
            args = (*flat[i : i + 6], *tables, *ctx.numbers)
            chosen = registry.select_backward("still_cross_attention", args)
            grads += chosen.backward(grad_pooled[layer], grad_lse[layer], pooled[layer], lse[layer], *args)
        return None, None, *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[2:]))


def still_compaction(
    keys: Tensor | Sequence[Tensor],
    values: Tensor | Sequence[Tensor],
    params: dict[str, Tensor] | Sequence[dict[str, Tensor]],
    config: StillConfig,
    rope: Rope,
    positions: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None] | list[tuple[Tensor, Tensor, Tensor | None]]:
    """One layer of STILL: T cached tokens become ``config.slots`` slots, ready for ``compact_attention``.

    Keys are un-rotated, latents at ``linspace(first, last)`` of the positions attend to keys and values in
    ``config.num_blocks`` blocks, and keys, values and a bias are read out of them; the keys are rotated to the latents'
    positions.

    Given lists of keys, values and params with an entry a layer, it compacts all of them: on a GPU layers share launches, of
    the latents' products too, as many at a time as keep the temporary memory small.

    Args:
        keys, values: ``[B, Hkv, T, d]`` as cached (keys rotated), float32, bfloat16, float16 or float64; or lists of such,
            which agree in shape, dtype and device.
        params: parameters of the layer by name (see ``still_config``), floating; the latents and everything of their
            size are computed in the parameters' dtype, the attention over the tokens in the cache's. Or a list of such.
        config: the compactor's options.
        rope: the model's rotation in this layer.
        positions: ``[T]`` of the tokens, ascending; None is ``0 .. T - 1``.
        backend: of ``still_cross_attention`` and, among the latents, ``compact_attention``: ``"auto"``, or a name.

    Returns:
        ``(K_c [B, Hkv, t, d], V_c [B, Hkv, t, d], beta [B, Hkv, t])``, keys and values in the cache's dtype, beta float32
        (float64) or None when the config has none. Differentiable in the parameters, keys and values. For lists a list of
        such, in which layers that were worked off together are views of the same tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape, a parameter missing or unknown,
            fewer tokens than slots, an empty list, lists of different lengths, layers that do not agree.
        BackendUnavailableError: the named backend cannot run this call.

    Source: STILL (arXiv 2606.07878).

    Example::

        config = StillConfig(slots=64, head_dim=64)
        params = init_still_parameters(config)
        k, v = torch.randn(1, 3, 512, 64), torch.randn(1, 3, 512, 64)
        k_c, v_c, beta = still_compaction(k, v, params, config, Rope.default(64))
        k_c.shape  # torch.Size([1, 3, 64, 64])
    """
    if not isinstance(keys, Tensor):
        return _compact_layers(keys, values, params, config, rope, positions, backend)
    positions = _check_layer(keys, values, params, config, rope, positions)
    tables = _Tables.of(positions[config.sink :], config, rope, keys.dtype)
    return _compact([keys], [values], [params], config, rope, tables, backend)[0]


def _compact_layers(
    keys, values, params, config, rope, positions, backend
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    count = check_layers(keys=keys, values=values, params=params)
    for i in range(count):
        found = _check_layer(keys[i], values[i], params[i], config, rope, positions, f"[{i}]")
    _check_agreement(keys, params)
    if keys[0].device.type == "cpu" and backend in ("auto", "cpu"):  # no launches to save
        layers = zip(keys, values, params)
        return [still_compaction(*layer, config, rope, positions, backend=backend) for layer in layers]
    tables = _Tables.of(found[config.sink :], config, rope, keys[0].dtype)
    blocks = []
    for part in _layers_at_once(count, keys[0].shape[0] * keys[0].shape[1], config, params[0], keys[0]):
        blocks += _compact(keys[part], values[part], params[part], config, rope, tables, backend)
    return blocks


def _compact(keys, values, params, config, rope, tables, backend) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """The blocks of layers whose latents are computed together."""
    sink, weights = config.sink, _Weights.of(params)
    z = _attend([x[:, :, sink:] for x in keys], [x[:, :, sink:] for x in values], weights, config, tables, backend)
    block = reference.read_out(z, weights, config, rope, tables.where, keys[0].dtype)
    return [reference.prepend_sink(b, k, v, sink) for b, k, v in zip(_unbind(block, len(keys)), keys, values)]


def still_compaction_chunked(
    keys: Tensor | Sequence[Tensor],
    values: Tensor | Sequence[Tensor],
    params: dict[str, Tensor] | Sequence[dict[str, Tensor]],
    config: StillConfig,
    rope: Rope,
    chunk: int,
    first: int = 0,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None] | list[tuple[Tensor, Tensor, Tensor | None]]:
    """One layer of STILL, ``chunk`` tokens at a time: each chunk becomes ``config.slots`` slots of its own.

    The result is that of :func:`still_compaction` on every chunk, one after the other, concatenated. The chunks of a
    request do not depend on one another: on a GPU they are the batch of one call, in which as many share a launch as fit a
    small workspace. The cost grows as ``T * slots`` instead of ``T * slots * T / chunk``.

    Args:
        keys, values: ``[B, Hkv, T, d]`` as cached, T a multiple of ``chunk``: what is left over stays with the caller, as
            raw tokens. Strides are honoured. Or lists with an entry a layer, as in :func:`still_compaction`.
        params, config, rope, backend: as in :func:`still_compaction`.
        chunk: tokens of a chunk, at least ``config.slots``.
        first: position of the first token; the others follow without gaps.

    Returns:
        ``(K_c [B, Hkv, T / chunk * t, d], V_c, beta)`` as in :func:`still_compaction`, or a list of such.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as :func:`still_compaction`; or T is no multiple of ``chunk``.

    Source: STILL (arXiv 2606.07878), iterative compaction.
    """
    if isinstance(keys, Tensor):
        return _compact_chunked([keys], [values], [params], config, rope, chunk, first, backend, [""])[0]
    which = [f"[{i}]" for i in range(check_layers(keys=keys, values=values, params=params))]
    return _compact_chunked(keys, values, params, config, rope, chunk, first, backend, which)


def _compact_chunked(keys, values, params, config, rope, chunk, first, backend, which) -> list[tuple]:
    chunk = check_int("chunk", chunk, minimum=1)
    first = check_int("first", first, minimum=0)
    for k, v, p, name in zip(keys, values, params, which):
        check_tensor(f"keys{name}", k, ndim=4)
        if k.shape[2] % chunk or k.shape[2] == 0:
            raise ValueError(f"keys{name} must hold a multiple of chunk = {chunk} tokens, got {k.shape[2]}")
        check_tensor(f"values{name}", v, shape=tuple(k.shape))
        _check_layer(k[:, :, :chunk], v[:, :, :chunk], p, config, rope, None, name)
    _check_agreement(keys, params)
    batch, heads, tokens, _ = keys[0].shape
    positions = torch.arange(first, first + tokens, device=keys[0].device).view(-1, chunk)
    if keys[0].device.type == "cpu" and backend in ("auto", "cpu"):
        # No launches to save here, and the CPU kernel takes one set of tables for a call.
        return [
            _cat(
                [
                    still_compaction(k, v, params[i], config, rope, p, backend=backend)
                    for k, v, p in zip(keys[i].split(chunk, 2), values[i].split(chunk, 2), positions)
                ],
                2,
            )
            for i in range(len(keys))
        ]
    tables = _Tables.of(positions[:, config.sink :], config, rope, keys[0].dtype)
    # A request of a layer is an entry: its chunks are the batch, and there is no stride from request to chunk to request.
    entries = [(k, v, p) for layer in zip(keys, values, params) for k, v, p in zip(*layer[:2], [layer[2]] * batch)]
    parts = []
    for part in _layers_at_once(len(entries), positions.shape[0] * heads, config, params[0], keys[0]):
        parts += _chunks(*map(list, zip(*entries[part])), config, rope, tables, positions, backend)
    return [_cat(parts[i : i + batch], 0) for i in range(0, len(parts), batch)]


def _chunks(
    keys, values, params, config, rope, tables, positions, backend
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Blocks ``[1, Hkv, n t, d]`` of the chunks ``[n, chunk]`` of several entries ``[Hkv, T, d]``."""
    (count, _), sink, weights = positions.shape, config.sink, _Weights.of(params)
    keys, values = ([x.unflatten(1, tuple(positions.shape)).transpose(0, 1) for x in many] for many in (keys, values))
    z = _attend([x[:, :, sink:] for x in keys], [x[:, :, sink:] for x in values], weights, config, tables, backend)
    # The slots of all chunks are read out as those of one request: [1, Hkv, n t, D].
    where = tables.where + (positions[:, :1] - positions[0, 0])
    z = z.transpose(-4, -3).flatten(-3, -2).unsqueeze(-4)
    blocks = _unbind(reference.read_out(z, weights, config, rope, where.flatten(), keys[0].dtype), len(keys))
    return [_with_sinks(*layer, count, sink) for layer in zip(blocks, keys, values)] if sink else blocks


def _with_sinks(block, keys, values, count, sink) -> tuple[Tensor, Tensor, Tensor | None]:
    """A block of ``count`` chunks with the first tokens of each chunk in front of its slots."""
    slots, betas = (x.unflatten(2, (count, -1)) for x in block[:2]), block[2]
    raw = (x[:, :, :sink].transpose(0, 1)[None] for x in (keys, values))
    found_keys, found_values = (torch.cat(x, 3).flatten(2, 3) for x in zip(raw, slots))
    if betas is not None:
        betas = betas.unflatten(2, (count, -1))
        betas = torch.cat([betas.new_zeros(*betas.shape[:3], sink), betas], 3).flatten(2, 3)
    return found_keys, found_values, betas


def _cat(blocks, axis) -> tuple[Tensor, Tensor, Tensor | None]:
    if len(blocks) == 1:
        return blocks[0]
    keys, values, betas = zip(*blocks)
    return torch.cat(keys, axis), torch.cat(values, axis), None if betas[0] is None else torch.cat(betas, axis)


def _unbind(block, count) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """The blocks of ``count`` layers; of one layer there is no axis."""
    if count == 1:
        return [block]
    return list(zip(*([None] * count if x is None else x.unbind() for x in block)))


def _layers_at_once(count: int, pairs: int, config: StillConfig, params, keys: Tensor) -> list[slice]:
    """Which layers' latents are computed together, the first ones more at a time.

    Memory that the last layers' slots will take in the end is free until then: the peak is counted with it.
    """
    latents = LATENT_TENSORS * pairs * config.num_latents * config.d_latent * params["latents"].element_size()
    slots = pairs * config.slots * 2 * config.head_dim * keys.element_size()
    found, start = [], 0
    while start < count:
        share = max(1, min(count - start, (LATENT_BYTES + (count - start) * slots) // latents))
        found.append(slice(start, start + share))
        start += share
    return found


class _Weights:
    """Parameters of several layers by name: stacked when they are asked for, vectors so that they meet ``[L, B, Hkv, n, D]``."""

    def __init__(self, layers: Sequence[dict[str, Tensor]]) -> None:
        self.layers = layers

    @classmethod
    def of(cls, layers: Sequence[dict[str, Tensor]]) -> "_Weights | dict[str, Tensor]":
        return cls(layers) if len(layers) > 1 else layers[0]

    def __getitem__(self, name: str) -> Tensor:
        found = torch.stack([params[name] for params in self.layers])
        return found[:, None, None, None] if name.endswith(("_norm", "_bias")) else found

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.layers[0] else None


@dataclass(frozen=True)
class _Tables:
    """What follows from the tokens' positions ``[T]``, or ``[n, T]`` of chunks at equal distances.

    Attributes:
        shared: tables of the tokens, as ``still_cross_attention`` takes them.
        latents: cos and sin of the latents' own rotation.
        where: fp64 positions of the latents (of the first chunk).
    """

    shared: dict[str, Tensor]
    latents: tuple[Tensor, Tensor]
    where: Tensor

    @classmethod
    def of(cls, positions: Tensor, config: StillConfig, rope: Rope, dtype: torch.dtype) -> "_Tables":
        table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = rope.tables(positions.flatten(), table_dtype)
        if rope.attention_scaling != 1.0:
            cos, sin = cos / rope.attention_scaling, sin / rope.attention_scaling
        rest = positions if positions.ndim == 1 else positions[0]
        where = reference.latent_positions(rest, config.num_latents)
        int_cos, int_sin = reference.int_tables(config, rest, rest[0], table_dtype)
        cos, sin = (x.view(*positions.shape, -1) for x in (cos, sin))
        shared = {"cos": cos, "sin": sin, "int_cos": int_cos, "int_sin": int_sin}
        return cls(shared, reference.int_tables(config, where, rest[0], table_dtype), where)


def _attend(keys: list[Tensor], values: list[Tensor], params, config, tables: _Tables, backend) -> Tensor:
    """The latents after all blocks: ``[B, Hkv, n, D]`` of one layer, ``[L, B, Hkv, n, D]`` of several."""
    dtype, layers = keys[0].dtype, len(keys)
    table_dtype = tables.latents[0].dtype
    # The first block's queries do not depend on the tokens: they stay one table for the batch (and the heads).
    lead = (layers,) if layers > 1 else ()
    z = params["latents"].reshape(*lead, 1, -1, config.num_latents, config.d_latent)
    for i in range(config.num_blocks):
        block = f"block{i}_"
        query = reference.latent_queries(z, params, block, config, tables.latents).to(dtype)
        weight = params[block + "cross_k_weight"].to(dtype)
        bias = params[block + "cross_k_bias"].to(table_dtype)
        norm = params[block + "cross_k_norm"].to(table_dtype) if config.qk_norm else None
        lists = [query, weight, bias, norm]
        if layers == 1:
            lists = [None if x is None else x[None] for x in lists]
        query, weight, bias, norm = lists
        vectors = [None if x is None else x.flatten(0, -2).unbind() for x in (bias, norm)]
        shared = {**tables.shared, "norm_eps": config.norm_eps}
        wanted = (layers, *keys[0].shape[:2], config.num_latents, 2 * keys[0].shape[3])
        out = query if query.shape == wanted and query.is_contiguous() else None
        pooled, _ = _attend_layers(query.unbind(), keys, values, weight.unbind(), *vectors, shared, False, backend, out)
        pooled = pooled if layers > 1 else pooled[0]
        z = _update_latents(z, pooled.to(z.dtype), params, block, config, tables.latents, backend)
        del query, lists, out, pooled  # the next block's take their place
    return z


def _update_latents(
    latents: Tensor,
    pooled: Tensor,
    params: dict[str, Tensor] | _Weights,
    block: str,
    config: StillConfig,
    tables: tuple[Tensor, Tensor],
    backend: str,
) -> Tensor:
    """``reference.update_latents`` with one folded projection of the averages and no t x t scores."""
    linear = reference.linear
    z = latents + linear(pooled, params[block + "cross_o_weight"] @ params[block + "cross_v_weight"])
    if config.self_attention:
        q, k = (
            reference.rotate(
                reference.rms_norm(
                    linear(z, params[f"{block}self_{name}_weight"]),
                    params.get(f"{block}self_{name}_norm"),
                    config.norm_eps,
                ),
                *tables,
            )
            for name in "qk"
        )
        v = linear(z, params[block + "self_v_weight"])
        # to each other, a layer is one more request
        mixed = compact_attention(*(x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)), backend=backend)
        z = z + linear(mixed.reshape(z.shape), params[block + "self_o_weight"])
    if config.ffn:
        z = z + linear(silu(linear(z, params[block + "ffn_up_weight"])), params[block + "ffn_down_weight"])
    return z


def _normalise(
    query,
    keys,
    values,
    key_weight,
    key_bias=None,
    key_norm=None,
    *,
    cos,
    sin,
    int_cos,
    int_sin,
    scale=None,
    norm_eps=1e-6,
    return_lse=False,
) -> tuple:
    check_tensor("query", query, ndim=4, dtypes=_DTYPES)
    slots, width = query.shape[2:]
    same = {"dtypes": (query.dtype,), "device": query.device}
    check_tensor("keys", keys, ndim=4, **same)
    batch, num_kv_heads, tokens, head_dim = keys.shape
    check_tensor("values", values, shape=tuple(keys.shape), **same)
    if query.shape[0] not in (1, batch) or query.shape[1] not in (1, num_kv_heads):
        raise ValueError(
            f"query must have batch size 1 or {batch} and 1 or {num_kv_heads} heads, as keys have; got {list(query.shape)}"
        )
    if 0 in (batch, num_kv_heads, tokens, slots):
        raise ValueError(f"query and keys must not be empty, got {list(query.shape)} and {list(keys.shape)}")
    for name, size in (("the last dimension of query (D)", width), ("the last dimension of keys (d)", head_dim)):
        if size == 0 or size % 2:
            raise ValueError(f"{name} must be even and positive, for rotations pair its halves; got {size}")
    check_tensor("key_weight", key_weight, shape=(width, 2 * head_dim), **same)
    table_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    vector = {"shape": (width,), "dtypes": tuple({query.dtype, table_dtype}), "device": query.device}
    for name, value in (("key_bias", key_bias), ("key_norm", key_norm)):
        if value is not None:
            check_tensor(name, value, **vector)
    tables = {"dtypes": (table_dtype,), "device": query.device}
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, **tables)
        if tuple(table.shape) not in ((tokens, head_dim // 2), (batch, tokens, head_dim // 2)):
            raise ValueError(
                f"{name} must have shape {[tokens, head_dim // 2]} or {[batch, tokens, head_dim // 2]}, "
                f"got {list(table.shape)}"
            )
    if cos.ndim != sin.ndim:
        raise ValueError(f"cos and sin must have the same shape, got {list(cos.shape)} and {list(sin.shape)}")
    for name, table in (("int_cos", int_cos), ("int_sin", int_sin)):
        check_tensor(name, table, shape=(tokens, width // 2), **tables)
    if scale is None:
        scale = 1.0 / math.sqrt(width)
    for name, value in (("scale", scale), ("norm_eps", norm_eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    if norm_eps < 0:
        raise ValueError(f"norm_eps must not be negative, got {norm_eps}")
    return (
        query,
        keys,
        values,
        key_weight,
        key_bias,
        key_norm,
        cos,
        sin,
        int_cos,
        int_sin,
        float(scale),
        float(norm_eps),
    )


def _check_agreement(keys: Sequence[Tensor], params: Sequence[dict[str, Tensor]]) -> None:
    like, dtype = keys[0], params[0]["latents"].dtype
    for i in range(1, len(keys)):
        check_tensor(f"keys[{i}]", keys[i], shape=tuple(like.shape), dtypes=(like.dtype,), device=like.device)
        check_tensor(f"params[{i}]['latents']", params[i]["latents"], dtypes=(dtype,))


def _check_layer(keys, values, params, config, rope, positions, which: str = "") -> Tensor:
    if not isinstance(config, StillConfig):
        raise TypeError(f"config must be a StillConfig, got {type(config).__name__}")
    if not isinstance(rope, Rope):
        raise TypeError(f"rope must be a Rope, got {type(rope).__name__}")
    check_tensor(f"keys{which}", keys, shape=(None, None, None, config.head_dim), dtypes=_DTYPES)
    check_tensor(f"values{which}", values, shape=tuple(keys.shape), dtypes=(keys.dtype,), device=keys.device)
    num_kv_heads, tokens = keys.shape[1:3]
    if config.latents_per_head and config.num_kv_heads != num_kv_heads:
        raise ValueError(f"config has latents for {config.num_kv_heads} KV heads but keys{which} have {num_kv_heads}")
    if tokens < config.slots:
        raise ValueError(f"keys{which} hold {tokens} tokens, fewer than the {config.slots} slots of config")
    wanted = still_parameter_shapes(config)
    if params.keys() != wanted.keys():
        missing, unknown = sorted(wanted.keys() - params.keys()), sorted(params.keys() - wanted.keys())
        raise ValueError(f"params{which} does not fit config: missing {missing}, unknown {unknown}")
    dtype = params["latents"].dtype
    for name, shape in wanted.items():
        check_tensor(f"params{which}[{name!r}]", params[name], shape=shape, dtypes=(dtype,), device=keys.device)
    if not dtype.is_floating_point:
        raise TypeError(f"params{which} must be floating, got {dtype}")
    if positions is None:
        return torch.arange(tokens, device=keys.device)
    return check_tensor("positions", positions, shape=(tokens,), device=keys.device)


registry.register(
    "still_cross_attention",
    _normalise,
    [
        registry.Backend(
            "triton",
            triton.supports,
            triton.run,
            declines=triton.declines,
            backward=triton.backward,
            run_layers=triton.run_layers,
        ),
        registry.Backend("cpu", cpu.supports, cpu.run),
        registry.Backend("torch", plain.supports, plain.run, backward=plain.backward),
    ],
)


if library.available()[0]:
    # The native library brings the schema and the CPU kernel.
    torch.library.impl("kvcompact::still_cross_attention", "CUDA")(triton.forward)

    @torch.library.register_fake("kvcompact::still_cross_attention")
    def _fake(query, keys, *rest):
        batch, num_kv_heads, _, head_dim = keys.shape
        slots = query.shape[2]
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return (
            query.new_empty(batch, num_kv_heads, slots, 2 * head_dim),
            query.new_empty(batch, num_kv_heads, slots, dtype=lse_dtype),
        )

    @torch.library.custom_op("kvcompact::still_cross_attention_backward", mutates_args=())
    def _backward_op(
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
    ) -> list[Tensor]:
        args = (
            query,
            keys,
            values,
            key_weight,
            key_bias,
            key_norm,
            cos,
            sin,
            int_cos,
            int_sin,
            scale,
            norm_eps,
        )
        chosen = registry.select_backward("still_cross_attention", args)
        grads = chosen.backward(grad_pooled, grad_lse, pooled, lse, *args)
        return [query.new_empty(0) if g is None else g for g in grads]

    @_backward_op.register_fake
    def _backward_fake(grad_pooled, grad_lse, pooled, lse, query, keys, values, key_weight, key_bias, key_norm, *rest):
        return [
            query.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (query, keys, values, key_weight, key_bias, key_norm)
        ]

    def _setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.norm_eps = inputs
        ctx.save_for_backward(*output, *tensors)

    def _backward(ctx, grad_pooled, grad_lse):
        pooled, lse, *tensors = ctx.saved_tensors
        grad_pooled = torch.zeros_like(pooled) if grad_pooled is None else grad_pooled
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        grads = torch.ops.kvcompact.still_cross_attention_backward(
            grad_pooled, grad_lse, pooled, lse, *tensors, ctx.scale, ctx.norm_eps
        )
        grads = [None if x is None else g for g, x in zip(grads, tensors[:6])]
        return *grads, None, None, None, None, None, None

    torch.library.register_autograd("kvcompact::still_cross_attention", _backward, setup_context=_setup_context)
