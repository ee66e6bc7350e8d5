# SPDX-License-Identifier: Apache-2.0
"""Attention Matching (arXiv 2602.16284): slots whose attention, over reference queries, matches that of the whole cache.

Per KV head, with reference queries ``q_r`` and the softmax ``p_ri = exp(s_ri) / sum_l exp(s_rl)`` over all T keys:

1. choose t keys (largest root mean square or maximum over r of ``p_ri``, or orthogonal matching pursuit);
2. weights ``w = exp(beta)`` in a box: ``min sum_r (sum_j p_rj w_j - 1)^2``, which is
   ``sum_j w_j exp(s_rj) = sum_i exp(s_ri)`` with each row divided by its right side;
3. values: ``min sum_r |sum_j c_rj v_j - o_r|^2`` with ``c_r = softmax_j(s_rj + beta_j)`` and ``o_r`` the full output.

Both are solved through their normal equations, which are accumulated in chunks of queries: nothing of size R x T is in
memory. A ridge pulls the weights towards 1 and the values towards those of the chosen keys.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .compact_attention import accumulation_dtype

CHUNK_ELEMENTS = 1 << 22


def reference_queries(queries: Tensor, num_kv_heads: int, limit: int | None = None) -> Tensor:
    """``queries [B, H, Tq, d]`` as ``[B, Hkv, R, d]``: a group's queries together, evenly thinned to ``R <= limit``.

    Positions are thinned, so every query head of the group keeps the same ones; at least one position is left.
    """
    batch, heads, count, dim = queries.shape
    group = heads // num_kv_heads
    if limit is not None and group * count > limit:
        keep = max(1, limit // group)
        index = torch.linspace(count - 1, 0, keep, dtype=torch.float64).round().long().flip(0)
        queries = queries[:, :, index.to(queries.device)]
    return queries.reshape(batch, num_kv_heads, -1, dim)


def _chunks(queries: Tensor, row_elements: int) -> Iterator[slice]:
    rows = queries.shape[2]
    step = max(1, CHUNK_ELEMENTS // max(1, queries.shape[0] * queries.shape[1] * row_elements))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def full_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, statistic: str = "rms"
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the reference queries over the whole cache, and a score of each key, in one pass.

    Args:
        queries: ``[B, Hkv, R, d]``, which see every key.
        keys, values: ``[B, Hkv, T, d]``.
        statistic: score of a key over the queries: "rms", the root mean square of its probabilities, or "max".

    Returns:
        ``(outputs [B, Hkv, R, d], lse [B, Hkv, R], scores [B, Hkv, T])`` in fp32 (fp64), natural log.
    """
    if statistic not in ("rms", "max"):
        raise ValueError(f"statistic must be 'rms' or 'max', got {statistic!r}")
    acc = accumulation_dtype(keys.dtype)
    transposed, values = keys.to(acc).transpose(-1, -2), values.to(acc)
    outputs = torch.empty(queries.shape, dtype=acc, device=keys.device)
    lse = outputs.new_empty(queries.shape[:3])
    scores = outputs.new_zeros(keys.shape[:3])
    for rows in _chunks(queries, keys.shape[2]):
        logits = (queries[:, :, rows].to(acc) * scale) @ transposed
        lse[:, :, rows] = logits.logsumexp(-1)
        prob = logits.sub_(lse[:, :, rows, None]).exp_()
        outputs[:, :, rows] = prob @ values
        if statistic == "rms":
            scores += prob.square_().sum(2)
        else:
            scores = torch.maximum(scores, prob.amax(2))
    return outputs, lse, (scores / queries.shape[2]).sqrt() if statistic == "rms" else scores


def mass_equations(queries: Tensor, keys: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Normal equations of the weights: ``gram [B, Hkv, t, t] = sum_r p_r p_r^T``, ``rhs [B, Hkv, t] = sum_r p_r``.

    ``keys [B, Hkv, t, d]`` are the chosen ones, ``lse [B, Hkv, R]`` the log-sum-exp over all keys, so that
    ``p_rj = exp(scale * q_r.k_j - lse_r)``.
    """
    slots, acc = keys.shape[2], accumulation_dtype(keys.dtype)
    gram = torch.zeros(*keys.shape[:2], slots, slots, dtype=acc, device=keys.device)
    rhs = gram.new_zeros(keys.shape[:3])
    transposed = keys.to(acc).transpose(-1, -2)
    for rows in _chunks(queries, slots):
        logits = (queries[:, :, rows].to(acc) * scale) @ transposed
        prob = logits.sub_(lse[:, :, rows, None]).exp_()
        gram += prob.transpose(-1, -2) @ prob
        rhs += prob.sum(2)
    return gram, rhs


def match_mass(gram: Tensor, rhs: Tensor, ridge: float, limit: float) -> Tensor:
    """``beta [B, Hkv, t]`` with ``|beta| <= limit``: the logarithm of the weights that solve the normal equations.

    ``min |P w - 1|^2 + ridge * mean(diag gram) * |w - 1|^2`` over ``exp(-limit) <= w <= exp(limit)``; fp64 inside.
    """
    wide_gram, wide_rhs = gram.double(), rhs.double()
    pull = ridge * wide_gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    weight = bounded_least_squares(
        wide_gram + torch.diag_embed(pull.expand_as(wide_rhs)),
        wide_rhs + pull,
        torch.tensor(-limit, dtype=torch.float64).exp().item(),
        torch.tensor(limit, dtype=torch.float64).exp().item(),
    )
    return weight.log().clamp(-limit, limit).to(gram.dtype)


def value_equations(
    queries: Tensor, keys: Tensor, beta: Tensor, outputs: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Normal equations of the values: ``gram [B, Hkv, t, t] = sum_r c_r c_r^T``, ``rhs [B, Hkv, t, d] = sum_r c_r o_r^T``.

    ``keys [B, Hkv, t, d]`` and ``beta [B, Hkv, t]`` are those of the slots; ``c_r = softmax(scale * q_r.k + beta)``.
    """
    slots, acc = keys.shape[2], accumulation_dtype(keys.dtype)
    gram = torch.zeros(*keys.shape[:2], slots, slots, dtype=acc, device=keys.device)
    rhs = gram.new_zeros(keys.shape)
    transposed = keys.to(acc).transpose(-1, -2)
    for rows in _chunks(queries, slots):
        logits = (queries[:, :, rows].to(acc) * scale) @ transposed
        weight = logits.add_(beta[:, :, None]).softmax(-1)
        gram += weight.transpose(-1, -2) @ weight
        rhs += weight.transpose(-1, -2) @ outputs[:, :, rows]
    return gram, rhs


def match_values(gram: Tensor, rhs: Tensor, start: Tensor, ridge: float) -> Tensor:
    """Values ``[B, Hkv, t, d]`` with ``(gram + lam I) V = rhs + lam start``, ``lam = ridge * mean(diag gram)``; fp64 inside."""
    wide = gram.double()
    lam = ridge * wide.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    factor = _cholesky(wide + lam * torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device))
    return torch.cholesky_solve(rhs.double() + lam * start.double(), factor).to(start.dtype).contiguous()


def matching_pursuit(
    queries: Tensor,
    keys: Tensor,
    lse: Tensor,
    slots: int,
    scale: float,
    ridge: float,
    limit: float,
    first: int = 0,
    refits: int = 64,
) -> Tensor:
    """Ascending ``indices [B, Hkv, slots]`` by orthogonal matching pursuit on the mass (step 2).

    Again and again the keys whose columns ``p_j`` have the largest product with what the weights of the chosen ones leave
    of the target are chosen, ``ceil((slots - first) / refits)`` at a time, and all weights are fitted anew. Columns are not
    normalised: keys that hold much mass go first, which on real caches halves the error of what the slots answer. The
    ``first`` tokens are chosen beforehand. One head at a time, for its gram matrix is T x T.
    """
    batch, heads, tokens, _ = keys.shape
    step = max(1, -(-(slots - first) // refits))
    chosen = torch.empty(batch, heads, slots, dtype=torch.int64, device=keys.device)
    for b in range(batch):
        for h in range(heads):
            one = slice(b, b + 1), slice(h, h + 1)
            gram, rhs = (x[0, 0] for x in mass_equations(queries[one], keys[one], lse[one], scale))
            free = torch.ones(tokens, dtype=torch.bool, device=keys.device)
            picked = torch.arange(first, device=keys.device)
            free[:first] = False
            while picked.numel() < slots:
                left = rhs
                if picked.numel():
                    beta = match_mass(gram[picked[:, None], picked][None, None], rhs[picked][None, None], ridge, limit)
                    left = rhs - gram[:, picked] @ beta[0, 0].exp()
                gain = left.masked_fill(~free, float("-inf"))
                best = gain.sort(descending=True, stable=True).indices[: min(step, slots - picked.numel())]
                free[best] = False
                picked = torch.cat([picked, best])
            chosen[b, h] = picked.sort().values
    return chosen


def bounded_least_squares(gram: Tensor, rhs: Tensor, lower: float, upper: float) -> Tensor:
    """``argmin_x x^T gram x / 2 - rhs^T x`` over ``lower <= x <= upper``, exactly, for positive definite ``gram``.

    Block principal pivoting (Portugal, Judice, Vicente 1994): guess which entries stand at a bound, solve for the others,
    move every entry that breaks the KKT conditions. When that stops to help, projected Newton steps finish (Bertsekas 1982).

    Args:
        gram: ``[..., n, n]``; rhs: ``[..., n]``, one dtype, fp64 for the usual accuracy.

    Raises:
        ValueError: gram is not positive definite, the inputs are not finite, or rounding keeps it from converging.
    """
    if not lower < upper:
        raise ValueError(f"lower must be less than upper, got {lower} and {upper}")
    if not (gram.isfinite().all() and rhs.isfinite().all()):
        raise ValueError("gram and rhs must be finite")
    n = rhs.shape[-1]
    flat = zip(gram.reshape(-1, n, n), rhs.reshape(-1, n))
    return torch.stack([_bounded_least_squares(g, r, lower, upper) for g, r in flat]).reshape(rhs.shape)


def _bounded_least_squares(gram: Tensor, rhs: Tensor, lower: float, upper: float) -> Tensor:
    eps = torch.finfo(gram.dtype).eps
    slack = 64 * eps * max(abs(lower), abs(upper))
    slope = 64 * eps * (gram.abs().sum(-1) * max(abs(lower), abs(upper)) + rhs.abs())
    at = torch.zeros(rhs.shape[0], dtype=torch.int8, device=rhs.device)  # -1 at lower, 0 free, 1 at upper
    fewest, chances = rhs.shape[0] + 1, 3
    while True:
        free = (at == 0).nonzero()[:, 0]
        bound = (at != 0).nonzero()[:, 0]
        x = torch.full_like(rhs, upper).masked_fill_(at < 0, lower)
        if free.numel():
            target = rhs[free] - gram[free[:, None], bound] @ x[bound]
            x[free] = torch.cholesky_solve(target[:, None], _cholesky(gram[free[:, None], free]))[:, 0]
        gradient = gram @ x - rhs
        new = at.clone()
        new[(at == 0) & (x < lower - slack)] = -1
        new[(at == 0) & (x > upper + slack)] = 1
        new[((at < 0) & (gradient < -slope)) | ((at > 0) & (gradient > slope))] = 0
        wrong = (new != at).nonzero()[:, 0]
        if wrong.numel() == 0:
            return x.clamp(lower, upper)
        if wrong.numel() < fewest:
            fewest, chances = wrong.numel(), 3
        elif chances:
            chances -= 1
        else:
            return _projected_newton(gram, rhs, lower, upper, x.clamp(lower, upper), slope)
        at[wrong] = new[wrong]


def _projected_newton(gram: Tensor, rhs: Tensor, lower: float, upper: float, x: Tensor, slope: Tensor) -> Tensor:
    """From a feasible x to the minimum by steps that always descend: for problems that pivoting does not settle.

    Newton steps over the entries that do not press against a bound, along the projection onto the box (Bertsekas 1982).
    """
    for _ in range(100 + 10 * rhs.shape[0]):  # tens are usual
        gradient = gram @ x - rhs
        pressed = ((x <= lower) & (gradient >= -slope)) | ((x >= upper) & (gradient <= slope))
        free = (~pressed).nonzero()[:, 0]
        if (gradient[free].abs() <= slope[free]).all():
            return x
        step = torch.zeros_like(x)
        factor = _cholesky(gram[free[:, None], free])
        step[free] = -torch.cholesky_solve(gradient[free, None], factor)[:, 0]
        length = 1.0
        while True:
            move = (x + length * step).clamp(lower, upper) - x
            if gradient @ move + 0.5 * (move @ gram @ move) <= 1e-4 * (gradient @ move) or length < 1e-12:
                break
            length *= 0.5
        x = (x + move).clamp(lower, upper)
    raise ValueError("the bounded least-squares problem did not converge: raise the ridge")


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.any():
        raise ValueError("the normal equations are not positive definite: raise the ridge")
    return factor
