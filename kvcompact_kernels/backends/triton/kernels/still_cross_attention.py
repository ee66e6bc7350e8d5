# SPDX-License-Identifier: Apache-2.0
"""STILL's cross-attention: keys un-rotated, projected and rotated by one kernel, then attended to by another.

Pairs. A request's KV head is a pair, numbered ``request * kv_heads + head``; a launch covers a range of pairs whose
projected keys fit a workspace, laid out ``[pair of the range, token, column]``. With ``LAYERS`` requests are numbered through
the layers, ``layer * batch + request``, and what lies elsewhere in each layer is looked up in a table, whose addresses and
strides keep the promise of ``layers.py``: without it the tiles spill.

Columns. Rotations work on halves, and tiles are powers of two: a vector of ``n`` dimensions is two tiles of ``H`` columns,
zeros beyond ``n / 2``. Projected keys (width D: tiles of ``WH``) and un-rotated keys (head dimension d: tiles of ``HP``)
are stored so in the workspace, padding included, and loads from it need no mask on columns. There are two sizes of
kernels, ``(HP, WH) = (32, 64)`` and ``(64, 128)``.
"""

import triton
import triton.language as tl

from .common import LN2, dot, load_tile, narrow
from .layers import table_pointer, table_row, table_stride

SIZES = [
    "tokens",
    "slots",
    "kv_heads",
    "first_pair",
    "pairs",
    "first_batch",
    "first_head",
    "heads",
    "head_parts",
    "splits",
    "batch_size",
]
COLUMNS = tl.constexpr(15)  # of a layer's row: query, keys, values, weight, bias, norm; the first three's strides


@triton.jit
def half_columns(n: tl.constexpr, H: tl.constexpr):
    """``(column, whether it exists)`` of the ``2 H`` columns that hold ``n`` dimensions."""
    lane = tl.arange(0, 2 * H)
    inner = lane % H
    return (lane // H) * (n // 2) + inner, inner < n // 2


@triton.jit
def load_columns(base, offsets, ok, columns, exists, FULL: tl.constexpr):
    """``[n, columns]`` rows of a matrix, zeros where a row is not ok or a column does not exist."""
    pointers = base + offsets[:, None] + columns[None, :]
    if FULL:
        return tl.load(pointers, mask=ok[:, None], other=0.0)
    return tl.load(pointers, mask=ok[:, None] & exists[None, :], other=0.0)


@triton.jit
def load_weight(Weight, rows, columns, rows_ok, columns_ok, s_row: tl.constexpr):
    pointers = Weight + rows[:, None] * s_row + columns[None, :]
    return tl.load(pointers, mask=rows_ok[:, None] & columns_ok[None, :], other=0.0)


@triton.jit
def load_vector(Vector, index, ok, PRESENT: tl.constexpr):
    if PRESENT:
        return tl.load(Vector + index, mask=ok, other=0.0).to(tl.float32)
    return tl.zeros(index.shape, tl.float32)


@triton.jit
def load_chunk(
    f_base,
    v_base,
    Weight,
    f_rows,
    v_rows,
    ok,
    chunk,
    HEAD_DIM: tl.constexpr,
    HP: tl.constexpr,
    WIDTH: tl.constexpr,
    WH: tl.constexpr,
    BN: tl.constexpr,
):
    """``BN`` columns of ``x = [free ; values]`` and of both halves of the weight's rows; the first chunks are of free."""
    column = chunk % (2 * HP // BN) * BN + tl.arange(0, BN)
    if chunk >= 2 * HP // BN:
        x_base = v_base
        x_rows = v_rows
        w_column = HEAD_DIM + column
        exists = column < HEAD_DIM
    else:
        x_base = f_base
        x_rows = f_rows
        w_column = column // HP * (HEAD_DIM // 2) + column % HP
        exists = column % HP < HEAD_DIM // 2
    x = tl.load(x_base + x_rows[:, None] + column[None, :], mask=ok[:, None] & exists[None, :], other=0.0)
    wd = tl.arange(0, WH)
    wd_ok = wd < WIDTH // 2
    w1 = load_weight(Weight, wd, w_column, wd_ok, exists, 2 * HEAD_DIM)
    w2 = load_weight(Weight, WIDTH // 2 + wd, w_column, wd_ok, exists, 2 * HEAD_DIM)
    return x, w1, w2


@triton.jit(do_not_specialize=[*SIZES, "s_tb"])
def project_keys(
    K,
    V,
    Weight,
    Bias,
    Norm,
    Cos,
    Sin,
    IntCos,
    IntSin,
    Projected,
    Free,
    Table,
    norm_eps,
    s_kb,
    s_kh,
    s_kn,
    s_vb,
    s_vh,
    s_vn,
    s_tb,
    tokens,
    batch_size,
    first_batch,
    first_head,
    heads,
    head_parts,
    HEAD_DIM: tl.constexpr,
    HP: tl.constexpr,
    WIDTH: tl.constexpr,
    WH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    LAYERS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``Free = [pairs, tokens, 2 HP]`` and ``Projected = [pairs, tokens, 2 WH]``: un-rotated keys, and projected ones.

    A program owns a tile of tokens and walks over heads, twice: it un-rotates, then it multiplies what it has written. So
    the rotations' tables, which are as large as the keys of several heads, are read once for all of them.
    """
    half: tl.constexpr = HEAD_DIM // 2
    mid: tl.constexpr = WIDTH // 2
    CHUNKS: tl.constexpr = 2 * HP // BN
    hd = tl.arange(0, HP)
    hd_ok = hd < half
    wd = tl.arange(0, WH)
    wd_ok = wd < mid
    tiles = tl.cdiv(tokens, BM)
    share = tl.cdiv(heads, head_parts)

    pid = tl.program_id(0)
    tile = pid % tiles
    first = pid // tiles % head_parts * share
    last = tl.minimum(first + share, heads)
    batch = pid // (tiles * head_parts)
    b = (first_batch + batch).to(tl.int64)
    if LAYERS:
        line = table_row(Table, b // batch_size, COLUMNS)
        b = b % batch_size
        K = table_pointer(line, 1, K, True)
        V = table_pointer(line, 2, V, True)
        Weight = table_pointer(line, 3, Weight, True)
        Bias = table_pointer(line, 4, Bias, True)
        Norm = table_pointer(line, 5, Norm, True)
        s_kb = table_stride(line, 9, True)
        s_kh = table_stride(line, 10, True)
        s_kn = table_stride(line, 11, True)
        s_vb = table_stride(line, 12, True)
        s_vh = table_stride(line, 13, True)
        s_vn = table_stride(line, 14, True)
    token = tile * BM + tl.arange(0, BM)
    ok = token < tokens
    rows = (batch * heads).to(tl.int64) * tokens + token

    angles = token[:, None] * half + hd[None, :] + b * s_tb
    seen = ok[:, None] & hd_ok[None, :]
    cos = tl.load(Cos + angles, mask=seen, other=0.0)
    sin = tl.load(Sin + angles, mask=seen, other=0.0)
    k_rows = token.to(tl.int64) * s_kn
    for head in range(first, last):
        k_base = K + b * s_kb + (first_head + head) * tl.cast(s_kh, tl.int64)
        k1 = load_tile(k_base, k_rows[:, None] + hd[None, :], ok, hd, half, HP).to(tl.float32)
        k2 = load_tile(k_base + half, k_rows[:, None] + hd[None, :], ok, hd, half, HP).to(tl.float32)
        free = Free + (rows + head * tl.cast(tokens, tl.int64))[:, None] * (2 * HP) + hd[None, :]
        tl.store(free, narrow(k1 * cos + k2 * sin, Free.dtype.element_ty, UPCAST), mask=ok[:, None])
        tl.store(free + HP, narrow(k2 * cos - k1 * sin, Free.dtype.element_ty, UPCAST), mask=ok[:, None])
    tl.debug_barrier()  # other threads read what this one has written

    int_angles = token[:, None] * mid + wd[None, :]
    int_seen = ok[:, None] & wd_ok[None, :]
    int_cos = tl.load(IntCos + int_angles, mask=int_seen, other=0.0)
    int_sin = tl.load(IntSin + int_angles, mask=int_seen, other=0.0)
    bias1 = load_vector(Bias, wd, wd_ok, HAS_BIAS)[None, :]
    bias2 = load_vector(Bias, mid + wd, wd_ok, HAS_BIAS)[None, :]
    norm1 = load_vector(Norm, wd, wd_ok, HAS_NORM)[None, :]
    norm2 = load_vector(Norm, mid + wd, wd_ok, HAS_NORM)[None, :]
    v_rows = token.to(tl.int64) * s_vn
    f_rows = token.to(tl.int64) * (2 * HP)
    y1 = tl.zeros([BM, WH], tl.float32)
    y2 = tl.zeros([BM, WH], tl.float32)
    # One loop over heads and columns of x, so that loads run ahead from head to head.
    for step in range(first * 2 * CHUNKS, last * 2 * CHUNKS):
        head = step // (2 * CHUNKS)
        chunk = step % (2 * CHUNKS)
        v_base = V + b * s_vb + (first_head + head) * tl.cast(s_vh, tl.int64)
        f_base = Free + (batch * heads + head) * tl.cast(tokens, tl.int64) * (2 * HP)
        x, w1, w2 = load_chunk(f_base, v_base, Weight, f_rows, v_rows, ok, chunk, HEAD_DIM, HP, WIDTH, WH, BN)
        y1 += dot(x, tl.trans(w1), UPCAST)
        y2 += dot(x, tl.trans(w2), UPCAST)
        if chunk == 2 * CHUNKS - 1:
            y1 += bias1
            y2 += bias2
            if HAS_NORM:
                square = (tl.sum(y1 * y1, 1) + tl.sum(y2 * y2, 1)) / WIDTH
                inverse = tl.rsqrt(square + norm_eps)[:, None]
                y1 = y1 * inverse * norm1
                y2 = y2 * inverse * norm2
            row = rows + head * tl.cast(tokens, tl.int64)
            projected = Projected + row[:, None] * (2 * WH) + wd[None, :]
            element = Projected.dtype.element_ty
            tl.store(projected, narrow(y1 * int_cos - y2 * int_sin, element, UPCAST), mask=ok[:, None])
            tl.store(projected + WH, narrow(y2 * int_cos + y1 * int_sin, element, UPCAST), mask=ok[:, None])
            y1 = tl.zeros([BM, WH], tl.float32)
            y2 = tl.zeros([BM, WH], tl.float32)


@triton.jit
def _step(q, k, f, v, bias, q_scale, m, l, acc_f, acc_v, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    s = dot(q, tl.trans(k), UPCAST) * q_scale
    if MASKED:
        s += bias[None, :]
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    p = narrow(p, v.dtype, UPCAST)
    acc_f = acc_f * alpha[:, None] + dot(p, f, UPCAST)
    acc_v = acc_v * alpha[:, None] + dot(p, v, UPCAST)
    return m_new, l, acc_f, acc_v


@triton.jit(do_not_specialize=SIZES)
def attend(
    Q,
    Projected,
    Free,
    V,
    Out,
    Lse,
    Table,
    q_scale,
    s_qb,
    s_qh,
    s_qn,
    s_vb,
    s_vh,
    s_vn,
    tokens,
    slots,
    batch_size,
    kv_heads,
    first_pair,
    pairs,
    splits,
    HEAD_DIM: tl.constexpr,
    HP: tl.constexpr,
    WIDTH: tl.constexpr,
    WH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LAYERS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``Out[split, pair of the range, slot, 2 d]`` and ``Lse`` (natural log): one tile of slots, one split of the tokens.

    The value of a token is its un-rotated key and its value: two accumulators, one P; the two are never concatenated.
    """
    row_tiles = tl.cdiv(slots, BM)
    pid = tl.program_id(0)
    tile = pid % row_tiles  # neighbours read the same tokens
    split = pid // row_tiles % splits
    local = (pid // (row_tiles * splits)).to(tl.int64)
    pair = first_pair + local
    b = pair // kv_heads
    h = pair % kv_heads
    if LAYERS:
        line = table_row(Table, b // batch_size, COLUMNS)
        b = b % batch_size
        Q = table_pointer(line, 0, Q, True)
        V = table_pointer(line, 2, V, True)
        s_qb = table_stride(line, 6, True)
        s_qh = table_stride(line, 7, True)
        s_qn = table_stride(line, 8, True)
        s_vb = table_stride(line, 12, True)
        s_vh = table_stride(line, 13, True)
        s_vn = table_stride(line, 14, True)

    row = tile * BM + tl.arange(0, BM)
    row_ok = row < slots
    w_column, w_exists = half_columns(WIDTH, WH)
    f_column, f_exists = half_columns(HEAD_DIM, HP)
    q_rows = row.to(tl.int64) * s_qn
    q = load_columns(Q + b * s_qb + h * s_qh, q_rows, row_ok, w_column, w_exists, 2 * WH == WIDTH)

    tiles = tl.cdiv(tokens, BN)
    share = tl.cdiv(tiles, splits)
    lo = split * share * BN
    hi = tl.minimum(lo + share * BN, tokens)
    full = lo + tl.maximum(hi - lo, 0) // BN * BN

    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc_f = tl.zeros([BM, 2 * HP], tl.float32)
    acc_v = tl.zeros([BM, 2 * HP], tl.float32)
    lane = tl.arange(0, BN)
    wd = tl.arange(0, 2 * WH)
    vd = tl.arange(0, 2 * HP)
    vn = tl.cast(s_vn, tl.int64)
    k_base = Projected + local * tokens * (2 * WH)
    f_base = Free + local * tokens * (2 * HP)
    v_base = V + b * s_vb + h * s_vh
    k_offsets = lane[:, None] * (2 * WH) + wd[None, :]
    f_offsets = lane[:, None] * (2 * HP) + vd[None, :]
    v_offsets = lane[:, None] * vn + vd[None, :]
    everywhere = lane >= 0
    none = tl.zeros([BN], tl.float32)
    for n0 in range(lo, full, BN):
        start = tl.cast(n0, tl.int64)
        k = tl.load(k_base + start * (2 * WH) + k_offsets)
        f = tl.load(f_base + start * (2 * HP) + f_offsets)
        if HEAD_DIM == 2 * HP:
            v = tl.load(v_base + start * vn + v_offsets)
        else:
            v = load_tile(v_base + start * vn, v_offsets, everywhere, vd, HEAD_DIM, 2 * HP)
        m, l, acc_f, acc_v = _step(q, k, f, v, none, q_scale, m, l, acc_f, acc_v, False, UPCAST)
    for n0 in range(full, hi, BN):
        start = tl.cast(n0, tl.int64)
        ok = n0 + lane < hi
        k = tl.load(k_base + start * (2 * WH) + k_offsets, mask=ok[:, None], other=0.0)
        f = tl.load(f_base + start * (2 * HP) + f_offsets, mask=ok[:, None], other=0.0)
        v = load_tile(v_base + start * vn, v_offsets, ok, vd, HEAD_DIM, 2 * HP)
        bias = tl.where(ok, 0.0, float("-inf"))
        m, l, acc_f, acc_v = _step(q, k, f, v, bias, q_scale, m, l, acc_f, acc_v, True, UPCAST)

    alive = l > 0.0  # a split without tokens has seen nothing
    safe = tl.where(alive, l, 1.0)
    inverse = tl.where(alive, 1.0 / safe, 0.0)[:, None]
    out_row = (tl.cast(split, tl.int64) * pairs + local) * slots + row
    out = Out + out_row[:, None] * (2 * HEAD_DIM)
    element = Out.dtype.element_ty
    f_ok = row_ok[:, None] & f_exists[None, :]
    v_ok = row_ok[:, None] & (vd < HEAD_DIM)[None, :]
    tl.store(out + f_column[None, :], narrow(acc_f * inverse, element, UPCAST), mask=f_ok)
    tl.store(out + (HEAD_DIM + vd)[None, :], narrow(acc_v * inverse, element, UPCAST), mask=v_ok)
    tl.store(Lse + out_row, tl.where(alive, (m + tl.log2(safe)) * LN2, float("-inf")), mask=row_ok)
