# SPDX-License-Identifier: Apache-2.0
"""Compact attention through ``scaled_dot_product_attention``: the fallback, and the honest PyTorch baseline.

Without a bias it passes SDPA what Hugging Face's own attention function passes, so that a cache which keeps every token
gives an unpatched model's logits bit for bit. With a bias and one query token the queries of a KV head are packed into
one tile (``[B, Hkv, G, d]``), so that keys are neither repeated nor read more than once.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...reference import compact_attention as reference


def supports(*args) -> str | None:
    """PyTorch runs every valid call."""
    return None


def run(
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
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)``; lse is None unless ``need_lse``, for SDPA does not return it."""
    if need_lse:
        return reference.compact_attention(
            query, keys, values, betas, offsets, tail_keys, tail_values, tail_mask, scale, causal, window, num_kv_heads
        )
    batch, heads, query_len, head_dim = query.shape
    k, v, beta, seen = reference.gather_keys(
        query, keys, values, betas, offsets, tail_keys, tail_values, tail_mask, causal, window, num_kv_heads
    )
    group = heads // num_kv_heads
    if beta is None:
        pure_causal = seen is not None and not keys and tail_mask is None and window < 0 and query_len == k.shape[2]
        out = scaled_dot_product_attention(
            query,
            k.repeat_interleave(group, 1),
            v.repeat_interleave(group, 1),
            attn_mask=None if pure_causal else seen,
            is_causal=pure_causal,
            scale=scale,
        )
        return _zero_blind_rows(out, seen), None
    bias = beta[:, :, None, None, :]
    if seen is not None:
        bias = bias.masked_fill(~seen[:, :, None], float("-inf"))
    bias = bias.to(query.dtype).expand(batch, num_kv_heads, group, query_len, -1)
    out = scaled_dot_product_attention(
        query.reshape(batch, num_kv_heads, group * query_len, head_dim),
        k,
        v,
        attn_mask=bias.reshape(batch, num_kv_heads, group * query_len, -1),
        scale=scale,
    )
    alive = (bias > float("-inf")).any(-1)  # SDPA's answer for a row without keys differs by version and backend
    return out.reshape(query.shape).masked_fill(~alive.reshape(batch, heads, query_len, 1), 0.0), None


def _zero_blind_rows(out: Tensor, seen: Tensor | None) -> Tensor:
    return out if seen is None else out.masked_fill(~seen.any(-1, keepdim=True), 0.0)


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
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """Gradients of query, keys, values, betas, tail_keys and tail_values from the saved log-sum-exp.

    Probabilities are recomputed block by block, ``dS = P * (dP - rowsum(dO * O) + dlse)``; absent inputs get empty
    tensors. A shared block sums over the batch.
    """
    batch, heads, query_len, head_dim = query.shape
    acc = reference.accumulation_dtype(query.dtype)
    shape = (batch, num_kv_heads, heads // num_kv_heads * query_len)
    q = query.to(acc).reshape(*shape, head_dim)
    do = grad_out.to(acc).reshape(*shape, head_dim)
    row = (lse.to(acc)).masked_fill(lse == float("-inf"), float("inf")).reshape(*shape, 1)
    delta = (grad_lse.to(acc) - (grad_out.to(acc) * out.to(acc)).sum(-1)).reshape(*shape, 1)
    own = (q, do, row, delta, torch.zeros_like(q))
    # behind a shared block the rows of all requests are rows of one
    folded = tuple(x.transpose(0, 1).flatten(1, 2)[None] for x in own) if batch > 1 else own

    def one_range(rows, k, v, beta=None, seen=None):
        """dK, dV [B, Hkv, n, d] and dbeta [B, Hkv, n] of one range of keys; adds to the rows' dq."""
        q, do, row, delta, dq = rows
        k, v = k.to(acc), v.to(acc)
        scores = q @ k.transpose(-1, -2) * scale
        if beta is not None:
            scores = scores + beta.to(acc)[:, :, None, :]
        prob = (scores - row).exp()
        if seen is not None:
            seen = seen[:, :, None].expand(-1, -1, shape[2] // query_len, -1, -1).flatten(2, 3)
            prob = prob.masked_fill(~seen, 0.0)
        ds = prob * (do @ v.transpose(-1, -2) + delta)
        dq.add_(ds @ k, alpha=scale)
        return ds.transpose(-1, -2) @ q * scale, prob.transpose(-1, -2) @ do, ds.sum(-2)

    def ragged_range(rows, k, v, beta, offset):
        """The same, packed, head by head: heads that hold unequal numbers of slots need no padding."""
        parts = []
        for i, (start, end) in enumerate(pairwise(offset.tolist())):
            b, h = divmod(i, num_kv_heads)
            some = tuple(x[b : b + 1, h : h + 1] for x in rows)
            bias = None if beta is None else beta[None, None, start:end]
            parts.append([x[0, 0] for x in one_range(some, k[None, None, start:end], v[None, None, start:end], bias)])
        return [torch.cat(grads) for grads in zip(*parts)]

    def none():
        """Fresh each time: outputs of a custom op must not alias one another."""
        return query.new_empty(0)

    d_keys, d_values, d_betas = [], [], []
    for k, v, beta, offset in zip(keys, values, betas, offsets):
        shared = (k.shape[0] == 1) if offset is None else offset.numel() - 1 == num_kv_heads
        rows = folded if shared else own
        dk, dv, db = one_range(rows, k, v, beta) if offset is None else ragged_range(rows, k, v, beta, offset)
        d_keys.append(dk.to(k.dtype))
        d_values.append(dv.to(v.dtype))
        d_betas.append(none() if beta is None else db.to(beta.dtype))
    d_tail_keys, d_tail_values = none(), none()
    if tail_keys is not None:
        seen = reference.tail_visibility(query_len, tail_keys.shape[2], causal, window, tail_mask, query.device)
        dk, dv, _ = one_range(own, tail_keys, tail_values, seen=seen)
        d_tail_keys, d_tail_values = dk.to(tail_keys.dtype), dv.to(tail_values.dtype)
    dq = own[-1]
    if batch > 1:
        dq = dq + folded[-1][0].unflatten(1, (batch, shape[2])).transpose(0, 1)
    return dq.reshape(query.shape).to(query.dtype), d_keys, d_values, d_betas, d_tail_keys, d_tail_values
