# SPDX-License-Identifier: Apache-2.0
"""``compact_attention``: attention over compact KV blocks and a causal tail, in one pass."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_int, check_tensor
from ..backends import registry
from ..backends.cpu import compact_attention as cpu
from ..backends.cpu import library
from ..backends.cuda import compact_attention as cuda
from ..backends.torch import compact_attention as plain
from ..backends.triton import compact_attention as triton

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compact_attention(
    query: Tensor,
    keys: Tensor | Sequence[Tensor],
    values: Tensor | Sequence[Tensor],
    beta: Tensor | Sequence[Tensor | None] | None = None,
    *,
    offsets: Tensor | Sequence[Tensor | None] | None = None,
    tail_keys: Tensor | None = None,
    tail_values: Tensor | None = None,
    tail_mask: Tensor | None = None,
    num_kv_heads: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries over compact slots, each with an additive bias, followed by a tail of ordinary tokens.

    ::

        s_j = scale * q.k_j + beta_j     every slot of every block: visible to all queries
        s_i = scale * q.k_i              tail token i, where visible (see causal, window, tail_mask)
        out = softmax([s_slots, s_tail]) @ [V_slots; V_tail]

    The last query is aligned with the last tail token::

        causal, Lq = 2, Tt = 4        slots  tail
                            query 0   1 1 1  1 1 1 0
                            query 1   1 1 1  1 1 1 1

    Args:
        query: ``[B, H, Lq, d]``, float32, bfloat16, float16 or float64, already rotated. ``H`` is a multiple of the
            number of KV heads ``Hkv``; query head h reads KV head ``h // (H // Hkv)``.
        keys, values: a block, or a sequence of blocks, of query's dtype: ``[B, Hkv, t, d]``; ``[1, Hkv, t, d]``, one
            block that the whole batch shares and that is read once; or ragged heads packed as ``[N, d]`` together with
            ``offsets``. Keys are already rotated. An empty sequence leaves only the tail. Strides are honoured.
        beta: bias on each slot's logit, natural-log units, float32 (float64 with float64 inputs): ``[B or 1, Hkv, t]``
            or ``[N]`` as the block; one entry per block for a sequence; None is no bias. -inf switches a slot off.
        offsets: int64 ``[Bk * Hkv + 1]`` of a packed block, ascending from 0 to N: rows ``offsets[i]:offsets[i + 1]``
            belong to batch element and KV head ``divmod(i, Hkv)``; ``Bk`` is B, or 1 for a shared block.
        tail_keys, tail_values: ``[B, Hkv, Tt, d]`` ordinary tokens, the queries' own included.
        tail_mask: bool ``[B, Tt]``, False hides a tail token (padding) from every query of its batch element.
        num_kv_heads: needed only when every block is packed and there is no tail.
        scale: of the logits, default ``1 / sqrt(d)``.
        causal: query r sees tail token i only if ``i <= Tt - Lq + r``.
        window: query r sees tail token i only if ``i > Tt - Lq + r - window`` (sliding window); slots are not affected.
        return_lse: also return the log-sum-exp of the logits.
        backend: ``"auto"``, or a backend's name, which then runs or raises.

    Returns:
        ``out [B, H, Lq, d]`` in query's dtype; with ``return_lse`` also ``lse [B, H, Lq]``, float32 (float64 for float64
        inputs), natural log. A query that sees no key gets out = 0 and lse = -inf. Both are differentiable in query,
        keys, values, beta and the tail.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.
        BackendUnavailableError: the named backend cannot run this call.

    Source: Cartridges (arXiv 2506.06266) for the block in front of a causal tail, Attention Matching (arXiv 2602.16284)
    for the bias per key.

    Example::

        q = torch.randn(2, 8, 1, 64)
        k, v, beta = torch.randn(1, 2, 256, 64), torch.randn(1, 2, 256, 64), torch.zeros(1, 2, 256)
        compact_attention(q, k, v, beta).shape  # torch.Size([2, 8, 1, 64])
    """
    args = _normalise(
        query,
        keys,
        values,
        beta,
        offsets=offsets,
        tail_keys=tail_keys,
        tail_values=tail_values,
        tail_mask=tail_mask,
        num_kv_heads=num_kv_heads,
        scale=scale,
        causal=causal,
        window=window,
    )
    chosen = registry.select("compact_attention", backend, args)
    out, lse = chosen.run(*args, need_lse=return_lse)
    return (out, lse) if return_lse else out


def _as_list(name: str, value: object) -> list:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(value).__name__}")
    return list(value)


def _per_block(name: str, value: object, blocks: int) -> list:
    items = [None] * blocks if value is None else _as_list(name, value)
    if len(items) != blocks:
        raise ValueError(f"{name} must have one entry per block: keys has {blocks}, {name} has {len(items)}")
    return items


def _normalise(
    query,
    keys,
    values,
    beta=None,
    *,
    offsets=None,
    tail_keys=None,
    tail_values=None,
    tail_mask=None,
    num_kv_heads=None,
    scale=None,
    causal=True,
    window=None,
    return_lse=False,
) -> tuple:
    check_tensor("query", query, ndim=4, dtypes=_DTYPES)
    batch, heads, query_len, head_dim = query.shape
    same = {"dtypes": (query.dtype,), "device": query.device}
    keys, values = _as_list("keys", keys), _as_list("values", values)
    betas, offsets = _per_block("beta", beta, len(keys)), _per_block("offsets", offsets, len(keys))
    if len(values) != len(keys):
        raise ValueError(f"values must have one entry per block: keys has {len(keys)}, values has {len(values)}")
    if not keys and tail_keys is None:
        raise ValueError("keys is empty and tail_keys is None: there is nothing to attend to")
    if (tail_keys is None) != (tail_values is None):
        raise ValueError("tail_keys and tail_values must be given together")
    if tail_keys is not None:
        check_tensor("tail_keys", tail_keys, shape=(batch, None, None, head_dim), **same)
        check_tensor("tail_values", tail_values, shape=tuple(tail_keys.shape), **same)
        found = tail_keys.shape[1]
    else:
        found = next((k.shape[1] for k in keys if isinstance(k, Tensor) and k.ndim == 4), None)
    num_kv_heads = _check_num_kv_heads(num_kv_heads, found, heads)
    for i in range(len(keys)):
        _check_block(i, keys[i], values[i], betas[i], offsets[i], query, num_kv_heads)
    if tail_mask is not None:
        if tail_keys is None:
            raise ValueError("tail_mask needs tail_keys")
        check_tensor(
            "tail_mask", tail_mask, shape=(batch, tail_keys.shape[2]), dtypes=(torch.bool,), device=query.device
        )
    if tail_keys is not None and causal and tail_keys.shape[2] < query_len:
        raise ValueError(
            f"query has {query_len} positions but tail_keys only {tail_keys.shape[2]}: with causal=True the tail holds "
            "the queries' own tokens, so it must be at least as long"
        )
    if any(b is None for b in betas) and any(b is not None and b.requires_grad for b in betas):
        # A list that holds a None is opaque to the op's autograd: its tensors would get no gradient.
        betas = [_zero_bias(k, o) if b is None else b for k, b, o in zip(keys, betas, offsets)]
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    elif not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    window = -1 if window is None else check_int("window", window, minimum=1)
    return (
        query,
        keys,
        values,
        betas,
        offsets,
        tail_keys,
        tail_values,
        tail_mask,
        float(scale),
        bool(causal),
        window,
        num_kv_heads,
    )


def _zero_bias(keys: Tensor, offsets: Tensor | None) -> Tensor:
    shape = keys.shape[:3] if offsets is None else keys.shape[:1]
    return keys.new_zeros(shape, dtype=torch.float64 if keys.dtype == torch.float64 else torch.float32)


def _check_num_kv_heads(given: int | None, found: int | None, heads: int) -> int:
    if given is None and found is None:
        raise ValueError("num_kv_heads must be given when every block is packed and there is no tail")
    number = check_int("num_kv_heads", found if given is None else given, minimum=1)
    if found is not None and number != found:
        raise ValueError(f"num_kv_heads is {number} but keys or tail_keys have {found} KV heads")
    if heads % number:
        raise ValueError(f"query has {heads} heads, which is not a multiple of the {number} KV heads of keys")
    return number


def _check_block(i: int, keys, values, beta, offsets, query: Tensor, num_kv_heads: int) -> None:
    batch, head_dim = query.shape[0], query.shape[3]
    same = {"dtypes": (query.dtype,), "device": query.device}
    if offsets is None:
        check_tensor(f"keys[{i}]", keys, shape=(None, num_kv_heads, None, head_dim), **same)
        rows = (keys.shape[0], num_kv_heads, keys.shape[2])
        if keys.shape[0] not in (1, batch):
            raise ValueError(f"keys[{i}] must have batch size 1 (shared) or {batch}, got {keys.shape[0]}")
    else:
        check_tensor(f"keys[{i}]", keys, shape=(None, head_dim), **same)
        check_tensor(f"offsets[{i}]", offsets, ndim=1, dtypes=(torch.int64,), device=query.device)
        if offsets.numel() - 1 not in (num_kv_heads, batch * num_kv_heads):
            raise ValueError(
                f"offsets[{i}] must have {num_kv_heads + 1} (shared block) or {batch * num_kv_heads + 1} entries for "
                f"{num_kv_heads} KV heads and batch size {batch}, got {offsets.numel()}"
            )
        rows = (keys.shape[0],)
    check_tensor(f"values[{i}]", values, shape=tuple(keys.shape), **same)
    if beta is not None:
        wanted = torch.float64 if query.dtype == torch.float64 else torch.float32
        check_tensor(f"beta[{i}]", beta, shape=rows, dtypes=(wanted,), device=query.device)


registry.register(
    "compact_attention",
    _normalise,
    [
        registry.Backend("cuda", cuda.supports, cuda.run, declines=cuda.declines),
        registry.Backend("triton", triton.supports, triton.run, declines=triton.declines, backward=triton.backward),
        registry.Backend("cpu", cpu.supports, cpu.run),
        registry.Backend("torch", plain.supports, plain.run, backward=plain.backward),
    ],
)


if library.available()[0]:
    # The native library brings the schema and the CPU kernel.
    torch.library.impl("kvcompact::compact_attention", "CUDA")(triton.forward)

    @torch.library.register_fake("kvcompact::compact_attention")
    def _fake(query, keys, values, betas, offsets, tail_keys, tail_values, tail_mask, *rest):
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
            query.shape[:3], dtype=lse_dtype
        )

    @torch.library.custom_op("kvcompact::compact_attention_backward", mutates_args=())
    def _backward_op(
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
    ) -> list[Tensor]:
        args = (
            query,
            keys,
            values,
            betas,
            offsets,
            tail_keys,
            tail_values,
            tail_mask,
            scale,
            causal,
            window,
            num_kv_heads,
        )
        chosen = registry.select_backward("compact_attention", args)
        dq, dk, dv, db, dtk, dtv = chosen.backward(grad_out, grad_lse, out, lse, *args)
        return [dq, *dk, *dv, *db, dtk, dtv]

    @_backward_op.register_fake
    def _backward_fake(
        grad_out, grad_lse, out, lse, query, keys, values, betas, offsets, tail_keys, tail_values, *rest
    ):
        inputs = [query, *keys, *values, *betas, tail_keys, tail_values]
        return [
            query.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in inputs
        ]

    def _setup_context(ctx, inputs, output):
        query, keys, values, betas, offsets, tail_keys, tail_values, tail_mask, *ctx.rest = inputs
        lists = [*keys, *values, *betas, *offsets]
        ctx.blocks = len(keys)
        ctx.save_for_backward(query, *output, tail_keys, tail_values, tail_mask, *lists)

    def _backward(ctx, grad_out, grad_lse):
        query, out, lse, tail_keys, tail_values, tail_mask, *lists = ctx.saved_tensors
        n = ctx.blocks
        keys, values, betas, offsets = (list(lists[i * n : (i + 1) * n]) for i in range(4))
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        grads = torch.ops.kvcompact.compact_attention_backward(
            grad_out,
            grad_lse,
            out,
            lse,
            query,
            keys,
            values,
            betas,
            offsets,
            tail_keys,
            tail_values,
            tail_mask,
            *ctx.rest,
        )
        # A list that holds a None counts as one argument without a gradient.
        d_betas = None if any(b is None for b in betas) else grads[1 + 2 * n : 1 + 3 * n]
        d_offsets = None if any(o is None for o in offsets) else [None] * n
        d_tail = grads[1 + 3 * n :] if tail_keys is not None else [None, None]
        return (
            grads[0],
            grads[1 : 1 + n],
            grads[1 + n : 1 + 2 * n],
            d_betas,
            d_offsets,
            *d_tail,
            None,
            *[None] * len(ctx.rest),
        )

    torch.library.register_autograd("kvcompact::compact_attention", _backward, setup_context=_setup_context)
