# SPDX-License-Identifier: Apache-2.0
"""The other ways to compute attention over keys with a bias: PyTorch's backends, FlexAttention, the bias folded into keys.

Inputs are laid out for each route before it is timed. ``k``, ``v`` are ``[B, Hkv, S, d]``, slots and tail side by side;
``query`` ``[B, H, Lq, d]`` is packed to ``[B, Hkv, G * Lq, d]`` where every row sees the same keys, so that a KV head is read
once for its group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
UNBIASED = [f"sdpa {name}" for name in BACKENDS]
BIASED = [*(f"sdpa {name} + bias" for name in ("cudnn", "efficient")), "flex + beta", "folded beta"]


def packed(query: Tensor, kv_heads: int) -> Tensor:
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[3])


def sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return scaled_dot_product_attention(q, k, v, **options)

    return call


def unbiased(query: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> dict[str, Callable[[], Tensor]]:
    """Every SDPA backend, without the bias and without a mask."""
    q = packed(query, k.shape[1])
    return {f"sdpa {name}": sdpa(name, q, k, v, scale=scale) for name in BACKENDS}


def biased(query: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """SDPA with the bias ``[B, Hkv, 1, S]`` as a mask, in the backends that take one."""
    q = packed(query, k.shape[1])
    mask = bias.expand(-1, -1, q.shape[2], -1)
    return {f"sdpa {name} + bias": sdpa(name, q, k, v, attn_mask=mask) for name in ("cudnn", "efficient")}


def compiled(function: Callable, smoke: bool) -> Callable:
    """``torch.compile`` for these shapes alone; as it is in a smoke run, where a compiler may be missing."""
    if smoke:
        return function
    torch._dynamo.reset()  # one function compiled for many cases would pass the limit of recompilations
    return torch.compile(function, dynamic=False)


def flex_decode(query: Tensor, k: Tensor, v: Tensor, beta: Tensor, smoke: bool) -> Callable[[], Tensor]:
    """FlexAttention with the captured fp32 bias ``[B, Hkv, S]``, the group packed into the query's rows."""
    from torch.nn.attention.flex_attention import flex_attention

    def add_beta(score, b, h, row, key):
        return score + beta[b, h, key]

    q, run = packed(query, k.shape[1]), compiled(flex_attention, smoke)
    return lambda: run(q, k, v, score_mod=add_beta)


def flex_prefill(query: Tensor, k: Tensor, v: Tensor, beta: Tensor, slots: int, smoke: bool) -> Callable[[], Tensor]:
    """FlexAttention with the captured bias, behind the slots a causal tail of as many tokens as there are queries."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    group = query.shape[1] // k.shape[1]

    def add_beta(score, b, h, row, key):
        return score + beta[b, h // group, key]

    def visible(b, h, row, key):
        return key - slots <= row

    mask = create_block_mask(visible, None, None, query.shape[2], k.shape[2], device=str(query.device))
    run = compiled(flex_attention, smoke)
    return lambda: run(query, k, v, score_mod=add_beta, block_mask=mask, enable_gqa=True)


def folded(query: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Callable[[], Tensor]:
    """FlashAttention with the bias in two of eight more dimensions, as a high and a low half: no mask is read."""
    d, kv_heads = query.shape[3], k.shape[1]
    exact = beta.double() * d**0.5
    high = exact.to(k.dtype)
    low = (exact - high.double()).to(k.dtype)
    more = k.new_zeros(*k.shape[:3], 8)
    wide_v = torch.cat([v, more], -1)
    more[..., 0], more[..., 1] = high, low
    wide_k = torch.cat([k, more], -1)
    q = packed(query, kv_heads)
    ones = q.new_zeros(*q.shape[:3], 8)
    ones[..., :2] = 1
    flash = sdpa("flash", torch.cat([q, ones], -1), wide_k, wide_v, scale=d**-0.5)
    return lambda: flash()[..., :d]
