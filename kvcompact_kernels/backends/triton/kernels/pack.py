# SPDX-License-Identifier: Apache-2.0
"""Packing: rows of keys and values by index, of all layers in one launch."""

import triton
import triton.language as tl

from .layers import table_pointer, table_row, table_stride

COLUMNS = tl.constexpr(16)  # of a layer's row: five addresses, nine strides, tokens, slots


@triton.jit(do_not_specialize=["tokens", "slots", "kv_heads", "pairs", "tiles", "s_ib", "s_ih"])
def pack_slots(
    K,
    V,
    Indices,
    OutK,
    OutV,
    Table,
    s_kb,
    s_kh,
    s_kn,
    s_vb,
    s_vh,
    s_vn,
    s_ib,
    s_ih,
    s_in,
    tokens,
    slots,
    kv_heads,
    pairs,
    tiles,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    LAYERS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``OutK, OutV [B, Hkv, slots, d]``, contiguous: a tile of slots of one head. An index outside of the tokens gives NaN.

    ``pairs`` are a layer's pairs of a request and a head, ``tiles`` those of the layer with the most slots. With ``LAYERS``
    everything else that differs by layer comes from the table.
    """
    pid = tl.program_id(0)
    if LAYERS:
        row = table_row(Table, pid // (pairs * tiles), COLUMNS)
        pid = pid % (pairs * tiles)
        K = table_pointer(row, 0, K, ALIGNED)
        V = table_pointer(row, 1, V, ALIGNED)
        Indices = table_pointer(row, 2, Indices, False)
        OutK = table_pointer(row, 3, OutK, ALIGNED)
        OutV = table_pointer(row, 4, OutV, ALIGNED)
        s_kb = table_stride(row, 5, ALIGNED)
        s_kh = table_stride(row, 6, ALIGNED)
        s_kn = table_stride(row, 7, ALIGNED)
        s_vb = table_stride(row, 8, ALIGNED)
        s_vh = table_stride(row, 9, ALIGNED)
        s_vn = table_stride(row, 10, ALIGNED)
        s_ib = table_stride(row, 11, False)
        s_ih = table_stride(row, 12, False)
        s_in = table_stride(row, 13, False)
        tokens = tl.load(row + 14)
        slots = tl.load(row + 15)
    slot = pid % tiles * BM + tl.arange(0, BM)
    ok = slot < slots
    pair = (pid // tiles).to(tl.int64)
    b = pair // kv_heads
    h = pair % kv_heads
    index = tl.load(Indices + b * s_ib + h * s_ih + slot * s_in, mask=ok, other=0)
    inside = (index >= 0) & (index < tokens)
    source = tl.where(inside, index, 0)
    dims = tl.arange(0, D)
    read = (ok & inside)[:, None] & (dims < HEAD_DIM)[None, :]
    k_row = K + b * s_kb + h * s_kh + (source * s_kn)[:, None]
    v_row = V + b * s_vb + h * s_vh + (source * s_vn)[:, None]
    k = tl.load(k_row + dims[None, :], mask=read, other=float("nan"))
    v = tl.load(v_row + dims[None, :], mask=read, other=float("nan"))
    out = (pair * slots + slot)[:, None] * HEAD_DIM + dims[None, :]
    out_ok = ok[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(OutK + out, k, mask=out_ok)
    tl.store(OutV + out, v, mask=out_ok)
