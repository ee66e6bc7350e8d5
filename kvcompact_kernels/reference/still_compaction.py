# SPDX-License-Identifier: Apache-2.0
"""STILL (arXiv 2606.07878): a small Perceiver per layer that turns T cached tokens into t slots.

Heads are a batch axis: the KV heads of a layer share the parameters. Nothing is normalised at the end, so that the
natural variation of key and value norms survives. See ``still_config.py`` for the options and the parameters' names.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import silu

from ..rope import Rope
from ..still_config import StillConfig, int_inv_freq
from .compact_attention import accumulation_dtype


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Forward rotation of ``x [..., n, D]`` by tables ``[n, D / 2]``, ``rotate_half`` convention, in x's dtype."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation by the negative angle."""
    return rotate(x, cos, -sin)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; of several layers' weights ``[L, m, n]`` each acts on its own part of ``x [L, ..., n]``."""
    if weight.ndim == 2:
        return functional.linear(x, weight, bias)
    y = (x.flatten(1, -2) @ weight.transpose(1, 2)).unflatten(1, x.shape[1:-1])
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension (no mean subtraction); None: x as it is."""
    if weight is None:
        return x
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def project_keys(
    keys: Tensor,
    values: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    key_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    int_cos: Tensor,
    int_sin: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """``x = [K_free ; V] [B, Hkv, T, 2d]`` and ``k' = RoPE_int(norm(Wk x + b)) [B, Hkv, T, D]`` (steps 1, 2 and 4)."""
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    x = torch.cat([unrotate(keys, cos, sin), values], -1)
    projected = linear(x, key_weight, None if key_bias is None else key_bias.to(x.dtype))
    return x, rotate(rms_norm(projected, key_norm, norm_eps), int_cos, int_sin)


def still_cross_attention(
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
) -> tuple[Tensor, Tensor]:
    """The definition, with the input and the ``t x T`` scores in memory; arguments as in ``ops.still_cross_attention``.

    In fp64 it is the truth; in a low precision it is the naive peer of the error budget.

    Returns:
        ``(pooled [B, Hkv, t, 2d] in query's dtype, lse [B, Hkv, t] fp32/fp64, natural log)``.
    """
    x, k = project_keys(keys, values, key_weight, key_bias, key_norm, cos, sin, int_cos, int_sin, norm_eps)
    scores = (query @ k.transpose(-1, -2)).to(accumulation_dtype(query.dtype)) * scale
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(x.dtype) @ x, lse


def latent_positions(positions: Tensor, count: int) -> Tensor:
    """``linspace(first, last, count)`` in fp64: where the latents stand, in general between two tokens."""
    start, steps = positions[0].to(torch.float64), torch.arange(count, dtype=torch.float64, device=positions.device)
    return start + steps * ((positions[-1].to(torch.float64) - start) / max(count - 1, 1))


def int_tables(config: StillConfig, positions: Tensor, origin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin ``[n, D / 2]`` of the compactor's own rotation; only distances matter, so ``origin`` counts as 0."""
    angle = (positions.to(torch.float64) - origin.to(torch.float64))[:, None] * int_inv_freq(config, positions.device)
    if dtype != torch.float64:  # an angle that was brought near 0 fits into fp32, where its cosine costs half as much
        angle = (angle - (angle * (0.5 / math.pi)).round_().mul_(2.0 * math.pi)).to(torch.float32)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def latent_queries(
    latents: Tensor, params: dict[str, Tensor], block: str, config: StillConfig, tables: tuple[Tensor, Tensor]
) -> Tensor:
    """``RoPE_int(norm(Wq z + b))`` of a block's cross-attention, in z's shape."""
    q = linear(latents, params[block + "cross_q_weight"], params[block + "cross_q_bias"])
    return rotate(rms_norm(q, params.get(block + "cross_q_norm"), config.norm_eps), *tables)


def update_latents(
    latents: Tensor,
    pooled: Tensor,
    params: dict[str, Tensor],
    block: str,
    config: StillConfig,
    tables: tuple[Tensor, Tensor],
) -> Tensor:
    """The rest of a block, after the cross-attention's average ``pooled [B, Hkv, n, 2d]`` of x.

    ``Wv`` and ``Wo`` commute with the average, so they act on n rows instead of T. Then self-attention over the
    latents and the feed-forward layer, where the config has them, each with a residual.
    """
    pooled = pooled.to(latents.dtype)
    z = latents + linear(linear(pooled, params[block + "cross_v_weight"]), params[block + "cross_o_weight"])
    if config.self_attention:
        w = {name: params[f"{block}self_{name}_weight"] for name in "qkvo"}
        q = rotate(rms_norm(linear(z, w["q"]), params.get(block + "self_q_norm"), config.norm_eps), *tables)
        k = rotate(rms_norm(linear(z, w["k"]), params.get(block + "self_k_norm"), config.norm_eps), *tables)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(config.d_latent)).softmax(-1)
        z = z + linear(weights @ linear(z, w["v"]), w["o"])
    if config.ffn:
        z = z + linear(silu(linear(z, params[block + "ffn_up_weight"])), params[block + "ffn_down_weight"])
    return z


def read_out(
    latents: Tensor,
    params: dict[str, Tensor],
    config: StillConfig,
    rope: Rope,
    positions: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Heads and re-rotation (steps 6 and 7): ``K_c``, ``V_c`` in ``dtype`` and beta in fp32 (fp64), or None."""
    cos, sin = rope.tables(positions, accumulation_dtype(latents.dtype))
    keys = rotate(linear(latents, params["key_head"]), cos, sin) * rope.attention_scaling
    values = linear(latents, params["value_head"])
    beta = None
    if config.use_beta:
        weight = params["beta_head"]  # [D], or [L, D] of several layers
        beta = latents @ weight if weight.ndim == 1 else linear(latents, weight[:, None])[..., 0]
        beta = beta.to(accumulation_dtype(dtype))
    return keys.to(dtype), values.to(dtype), beta


def prepend_sink(
    block: tuple[Tensor, Tensor, Tensor | None], keys: Tensor, values: Tensor, sink: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The block with the first ``sink`` tokens in front, as they are; their beta is 0."""
    if not sink:
        return block
    k, v, beta = block
    beta = None if beta is None else torch.cat([beta.new_zeros(*beta.shape[:2], sink), beta], -1)
    return torch.cat([keys[:, :, :sink], k], 2), torch.cat([values[:, :, :sink], v], 2), beta


def still_compaction(
    keys: Tensor,
    values: Tensor,
    params: dict[str, Tensor],
    config: StillConfig,
    rope: Rope,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer of STILL in the inputs' dtype; arguments as in ``ops.still_compaction``.

    Returns:
        ``(K_c [B, Hkv, t, d] rotated, V_c [B, Hkv, t, d], beta [B, Hkv, t] or None)``.
    """
    if positions is None:
        positions = torch.arange(keys.shape[2], device=keys.device)
    sink, dtype = config.sink, keys.dtype
    table_dtype = accumulation_dtype(dtype)
    params = {name: p.to(dtype) for name, p in params.items()}
    rest_keys, rest_values, rest = keys[:, :, sink:], values[:, :, sink:], positions[sink:]
    where = latent_positions(rest, config.num_latents)
    cos, sin = (table / rope.attention_scaling for table in rope.tables(rest, table_dtype))
    token_tables = int_tables(config, rest, rest[0], table_dtype)
    latent_tables = int_tables(config, where, rest[0], table_dtype)

    z = params["latents"].expand(*keys.shape[:2], -1, -1)
    for i in range(config.num_blocks):
        block = f"block{i}_"
        pooled, _ = still_cross_attention(
            latent_queries(z, params, block, config, latent_tables),
            rest_keys,
            rest_values,
            params[block + "cross_k_weight"],
            params[block + "cross_k_bias"],
            params.get(block + "cross_k_norm"),
            cos,
            sin,
            *token_tables,
            1.0 / math.sqrt(config.d_latent),
            config.norm_eps,
        )
        z = update_latents(z, pooled, params, block, config, latent_tables)
    return prepend_sink(read_out(z, params, config, rope, where, dtype), keys, values, sink)


def still_compaction_chunked(
    keys: Tensor,
    values: Tensor,
    params: dict[str, Tensor],
    config: StillConfig,
    rope: Rope,
    chunk: int,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """STILL's iterative compaction: :func:`still_compaction` of every chunk; arguments as in ``ops.still_compaction_chunked``."""
    blocks = []
    for start in range(0, keys.shape[2], chunk):
        piece = slice(start, start + chunk)
        positions = torch.arange(first + start, first + start + chunk, device=keys.device)
        blocks.append(still_compaction(keys[:, :, piece], values[:, :, piece], params, config, rope, positions))
    return tuple(None if parts[0] is None else torch.cat(parts, 2) for parts in zip(*blocks))
