# SPDX-License-Identifier: Apache-2.0
"""Which tokens a selection method keeps: pure functions from scores to indices, one per rule.

Scores are ``[..., T]``, one per token and KV head: how much attention the token received (``reference/key_scores.py``; the
query heads of a group are summed there). Indices are int64 ``[..., slots]``, ascending, with no repetition; every head
keeps the same number of tokens. Of equal scores the earlier token wins.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d


def top_tokens(scores: Tensor, slots: int, first: int = 0, last: int = 0) -> Tensor:
    """The ``first`` and the ``last`` tokens, and of those between them the highest scores, ``slots`` in all.

    Raises:
        ValueError: scores hold NaN, or ``first + last <= slots <= T`` does not hold.
    """
    tokens = scores.shape[-1]
    if first < 0 or last < 0 or not first + last <= slots <= tokens:
        raise ValueError(
            f"slots must be at least first + last = {first} + {last} and at most the {tokens} tokens, got {slots}"
        )
    if scores.isnan().any():
        raise ValueError("scores hold NaN: keys or queries of this layer are not finite")
    middle = scores[..., first : tokens - last]
    # a stable sort, so that ties do not depend on the device
    best = middle.sort(dim=-1, descending=True, stable=True).indices[..., : slots - first - last] + first
    head = torch.arange(first, device=scores.device).expand(*scores.shape[:-1], first)
    tail = torch.arange(tokens - last, tokens, device=scores.device).expand(*scores.shape[:-1], last)
    return torch.cat([head, best.sort(dim=-1).values, tail], -1)


def sinks_and_recent(num_tokens: int, slots: int, sinks: int) -> Tensor:
    """StreamingLLM (arXiv 2309.17453, section 3.2): the first ``sinks`` tokens and the newest; int64 ``[slots]``."""
    return top_tokens(torch.zeros(num_tokens), slots, first=sinks, last=slots - sinks)


def kept_recent(slots: int, share: float, sinks: int) -> int:
    """How many of the newest tokens get ``share`` of the slots, rounded down: they yield to the ``sinks`` first tokens."""
    return min(int(share * slots), slots - sinks)


def pool_scores(scores: Tensor, kernel_size: int, pooling: str = "avg") -> Tensor:
    """Each score becomes the mean or maximum of its ``kernel_size`` (odd) neighbours; beyond the ends there are zeros.

    SnapKV (arXiv 2404.14469, section 4.2): whole phrases are kept rather than single tokens.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if pooling not in ("avg", "max"):
        raise ValueError(f"pooling must be 'avg' or 'max', got {pooling!r}")
    if scores.shape[-1] == 0:
        return scores
    pool = avg_pool1d if pooling == "avg" else max_pool1d
    flat = scores.reshape(-1, 1, scores.shape[-1])
    return pool(flat, kernel_size, stride=1, padding=kernel_size // 2).reshape(scores.shape)


def kept_window(slots: int, window: int, sinks: int) -> int:
    """How many of the last ``window`` tokens are kept: all, but at most half of the slots that the sinks leave."""
    return min(window, (slots - sinks) // 2)


def pool_before_window(scores: Tensor, window: int = 32, kernel_size: int = 7, pooling: str = "avg") -> Tensor:
    """SnapKV (arXiv 2404.14469, section 4): scores pooled over neighbours, but for those of the last ``window`` tokens.

    Args:
        scores: ``[..., T]`` attention received, summed over the last ``window`` queries.
        kernel_size, pooling: see :func:`pool_scores`.
    """
    # the window's own scores must not leak into those before it
    before = scores.shape[-1] - min(window, scores.shape[-1] - 1)
    return torch.cat([pool_scores(scores[..., :before], kernel_size, pooling), scores[..., before:]], -1)


def pyramid_budgets(
    slots: int, num_tokens: int, num_layers: int, steepness: float = 20.0, minimum: int = 1
) -> list[int]:
    """PyramidKV (arXiv 2406.02069, section 4.2): budgets that fall linearly from the first layer to the last.

    The last layer gets ``slots / steepness``, the first ``2 * slots`` less that, so that the mean is ``slots`` exactly; a
    flatter pyramid where that would leave ``[minimum, num_tokens]``.

    Raises:
        ValueError: ``minimum <= slots <= num_tokens`` or ``steepness >= 1`` does not hold.
    """
    if not minimum <= slots <= num_tokens:
        raise ValueError(f"slots must be in [{minimum}, {num_tokens}], got {slots}")
    if not steepness >= 1:
        raise ValueError(f"steepness must be at least 1, got {steepness}")
    spread = slots - max(slots / steepness, minimum)
    spread = min(spread, num_tokens - slots)
    budgets = [slots] * num_layers
    for i in range(num_layers // 2):
        above = round(spread * (1 - 2 * i / (num_layers - 1)))
        budgets[i], budgets[-1 - i] = slots + above, slots - above
    return budgets


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """``x [B, Hkv, T, d]`` at ``indices [B, Hkv, slots]`` (or ``[slots]``), in memory of its own."""
    batch, heads, _, dim = x.shape
    indices = indices.to(x.device).expand(batch, heads, indices.shape[-1])
    return x.gather(2, indices[..., None].expand(*indices.shape, dim)).contiguous()


def random_tokens(batch: int, num_kv_heads: int, num_tokens: int, slots: int, sinks: int, seed: int) -> Tensor:
    """``sinks`` first tokens and others drawn without repetition, for each head anew; int64 ``[B, Hkv, slots]``.

    The draw is made on the CPU, so that it is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    return top_tokens(torch.rand(batch, num_kv_heads, num_tokens, generator=generator), slots, first=sinks)


def uniform_tokens(num_tokens: int, slots: int, sinks: int) -> Tensor:
    """``sinks`` first tokens and others at even distances up to the last one; int64 ``[slots]``."""
    if not 0 <= sinks <= slots <= num_tokens:
        raise ValueError(f"slots must be in [{sinks}, {num_tokens}], got {slots}")
    rest, among = slots - sinks, num_tokens - sinks
    # the i-th of equal parts ends with the token that stands for it, so that the last token is kept
    picked = torch.arange(1, rest + 1, dtype=torch.int64) * among // max(rest, 1) - 1 + sinks
    return torch.cat([torch.arange(sinks), picked])


def persistence(query: Tensor, keys: Tensor, scale: float, history: int) -> Tensor:
    """Scissorhands (arXiv 2305.17118, algorithm 2): how often each token was important lately, fp32 ``[B, Hkv, T]``.

    A query holds a token for important when its attention is above the mean over the tokens that the query sees (the
    paper's threshold 1/t). The counts of the last ``history`` queries are added over the query heads of a KV head.

    Args:
        query: ``[B, H, Lq, d]`` of the last positions. keys: ``[B, Hkv, T, d]``.
    """
    batch, heads, _, dim = query.shape
    num_kv_heads, tokens = keys.shape[1:3]
    query = query[:, :, -history:]
    count = query.shape[2]
    grouped = query.reshape(batch, num_kv_heads, heads // num_kv_heads, count, dim)
    logits = (grouped @ keys[:, :, None].transpose(-1, -2)).float() * scale
    seen = torch.arange(tokens, device=keys.device)[None] <= (
        torch.arange(count, device=keys.device)[:, None] + tokens - count
    )
    attention = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    threshold = 1.0 / seen.sum(-1, keepdim=True)
    return (attention > threshold).float().sum((2, 3))


def merge_into_kept(
    keys: Tensor, values: Tensor, indices: Tensor, homes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """ZSMerge (arXiv 2503.10714, residual merging): tokens that are not kept are merged into kept ones that they resemble.

    Each goes to the home whose key has the largest cosine similarity with its own. A home becomes the mean of its
    members, keys and values alike, and remembers how many they are.

    Args:
        keys, values: ``[B, Hkv, T, d]``.
        indices: int64 ``[B, Hkv, slots]`` of the kept tokens.
        homes: None (all kept tokens), or bool ``[B, Hkv, slots]``: those that others may be merged into; at least one
            in each head.

    Returns:
        keys and values ``[B, Hkv, slots, d]`` in the inputs' dtype, and int64 counts ``[B, Hkv, slots]``.
    """
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    batch, heads, tokens, dim = keys.shape
    slots = indices.shape[-1]
    unit = torch.nn.functional.normalize(keys.to(wide), dim=-1)
    likeness = unit @ gather_tokens(unit, indices).transpose(-1, -2)  # [B, Hkv, T, slots]
    if homes is not None:
        if not homes.any(-1).all():
            raise ValueError("homes must name at least one slot of each head")
        likeness = likeness.masked_fill(~homes[:, :, None], float("-inf"))
    home = likeness.argmax(-1)
    home.scatter_(2, indices, torch.arange(slots, device=keys.device).expand(batch, heads, slots))
    counts = torch.zeros(batch, heads, slots, dtype=torch.int64, device=keys.device)
    counts.scatter_add_(2, home, torch.ones_like(home))
    merged = []
    for x in (keys, values):
        where = home[..., None].expand(batch, heads, tokens, dim)
        sums = torch.zeros(batch, heads, slots, dim, dtype=wide, device=x.device).scatter_add_(2, where, x.to(wide))
        merged.append((sums / counts[..., None]).to(x.dtype))
    return merged[0], merged[1], counts


def share_budget(scores: Tensor, slots: int, floor: int, first: int = 0, last: int = 0) -> Tensor:
    """AdaKV (arXiv 2407.11550, adaptive allocation): slots of each KV head, int64 ``[B, Hkv]``; each row's sum is ``Hkv * slots``.

    The heads compete: the ``Hkv * slots`` best scores of all heads are kept wherever they are, but no head gets fewer than
    ``floor`` slots.

    Args:
        scores: ``[B, Hkv, T]``, comparable between heads (attention received).
        first, last: tokens at the ends that every head keeps in any case; they count.
    """
    batch, heads, tokens = scores.shape
    if not max(first + last, 1) <= floor <= slots <= tokens:
        raise ValueError(
            f"floor must be in [{max(first + last, 1)}, {slots}] and slots at most {tokens}, got {floor} and {slots}"
        )
    scores = scores.float().clone()
    scores[..., :first] = float("inf")
    scores[..., tokens - last :] = float("inf")
    # the head's own best `floor` tokens are its in any case
    own = scores.sort(dim=-1, descending=True, stable=True).indices[..., :floor]
    scores.scatter_(2, own, float("inf"))
    best = scores.reshape(batch, -1).sort(dim=-1, descending=True, stable=True).indices[:, : heads * slots]
    counts = torch.zeros(batch, heads, dtype=torch.int64, device=scores.device)
    return counts.scatter_add_(1, best // tokens, torch.ones_like(best)).cpu()


def proportional_counts(total: int, weights: Sequence[float], minimum: int, maximum: int) -> list[int]:
    """Whole numbers in ``[minimum, maximum]`` that add up to ``total`` and are otherwise proportional to ``weights``.

    Raises:
        ValueError: no such numbers exist, or a weight is not above 0.
    """
    count = len(weights)
    if not 0 <= minimum * count <= total <= maximum * count:
        raise ValueError(f"total must be in [{minimum * count}, {maximum * count}], got {total}")
    if not all(0 < w < math.inf for w in weights):
        raise ValueError(f"weights must be finite and above 0, got {list(weights)}")
    # those that a bound holds leave the others more, or less, to share: at each round one more bound is known to hold
    shares, free, left = [0.0] * count, set(range(count)), float(total)
    while free:
        scale = left / sum(weights[i] for i in free)
        low = {i for i in free if weights[i] * scale < minimum}
        high = {i for i in free if weights[i] * scale > maximum}
        if not low and not high:
            for i in free:
                shares[i] = weights[i] * scale
            break
        missing = sum(minimum - weights[i] * scale for i in low) - sum(weights[i] * scale - maximum for i in high)
        for i in low if missing >= 0 else high:
            shares[i] = minimum if missing >= 0 else maximum
            left -= shares[i]
            free.discard(i)
    counts = [min(maximum, max(minimum, int(x))) for x in shares]
    # what rounding down left goes to those that lost most by it
    for i in sorted(range(count), key=lambda i: counts[i] - shares[i]):
        if sum(counts) == total:
            break
        counts[i] += counts[i] < maximum
    return counts


def expected_attention_scores(
    mean: Tensor, covariance: Tensor, keys: Tensor, values: Tensor, scale: float, epsilon: float
) -> Tensor:
    """Expected Attention (arXiv 2510.00636): what future queries, taken for Gaussian, will give each key.

    ``E[exp(scale q.k)] = exp(scale mu.k + scale^2 k.Sigma.k / 2)`` for ``q ~ N(mu, Sigma)``, normalised over the keys,
    averaged over the query heads of a KV head; plus ``epsilon``, times the value's norm.

    Args:
        mean: ``[B, H, d]`` of the future rotated queries. covariance: ``[B, H, d, d]``.
        keys, values: ``[B, Hkv, T, d]``.

    Returns:
        fp32 ``[B, Hkv, T]`` (fp64 for fp64 keys).
    """
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    batch, heads = mean.shape[:2]
    groups = heads // keys.shape[1]
    k = keys.to(wide).repeat_interleave(groups, 1)
    logits = scale * (k @ mean.to(wide)[..., None])[..., 0]
    logits = logits + scale**2 / 2 * ((k @ covariance.to(wide)) * k).sum(-1)
    attention = logits.softmax(-1).reshape(batch, keys.shape[1], groups, -1).mean(2)
    return (attention + epsilon) * values.to(wide).norm(dim=-1)


def collision_probability(cosine: Tensor, bits: int, tables: int) -> Tensor:
    """MagicPIG (arXiv 2410.16179): how probable it is that two vectors share a hash in at least two of ``tables`` tables.

    A hash of a table is ``bits`` signs of random projections (SimHash): one sign agrees with probability
    ``p = 1 - angle / pi``, a table with ``p^bits``.

    Args:
        cosine: of the angle between the vectors, any shape.
    """
    table = (1 - cosine.clamp(-1, 1).acos() / math.pi) ** bits
    # log1p and expm1, for a table's probability may be far below the rounding of 1
    none = tables * torch.log1p(-table.clamp(max=1 - torch.finfo(table.dtype).eps))
    one = tables * table * ((tables - 1) / tables * none).exp()
    return (-torch.expm1(none) - one).clamp(0, 1)


def inclusion_probability(scores: Tensor, slots: int, first: int = 0, last: int = 0) -> Tensor:
    """Probabilities ``[..., T]`` in (0, 1], proportional to scores where below 1, whose sum is ``slots``.

    Args:
        scores: ``[..., T]``, not negative; raised to 1e-6 of the row's mean, so that no token is impossible.
        first, last: tokens at the ends that are certain.
    """
    tokens = scores.shape[-1]
    if first < 0 or last < 0 or not first + last <= slots <= tokens:
        raise ValueError(f"slots must be in [{first + last}, {tokens}], got {slots}")
    scores = scores.double()
    if not (scores.isfinite().all() and (scores >= 0).all()):
        raise ValueError("scores must be finite and not negative")
    scores = scores + (1e-6 * scores.mean(-1, keepdim=True)).clamp_min(1e-12)
    place = torch.arange(tokens, device=scores.device)
    certain = ((place < first) | (place >= tokens - last)).expand(scores.shape).clone()
    while True:
        left = slots - certain.sum(-1, keepdim=True)
        shared = scores.masked_fill(certain, 0.0)
        share = left * shared / shared.sum(-1, keepdim=True).clamp_min(1e-300)
        more = ~certain & (share >= 1)
        if not more.any():
            return share.masked_fill(certain, 1.0)
        certain |= more


def systematic_sample(probability: Tensor, seed: int) -> Tensor:
    """Ascending indices ``[..., slots]``: token i is among them with ``probability[..., i]``; ``slots`` is their sum.

    One draw for each row (systematic sampling): every whole number that the running sum passes picks a token.
    """
    running = probability.double().cumsum(-1)
    slots = int(running[..., -1].flatten()[0].round())
    if not (running[..., -1] - slots).abs().lt(1e-6).all():
        raise ValueError("the probabilities of every row must have the same whole number as their sum")
    running[..., -1] = slots
    start = torch.rand(running.shape[:-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ticks = (running + start[..., None].to(running.device)).floor()
    before = torch.cat([torch.zeros_like(ticks[..., :1]), ticks[..., :-1]], -1)
    return (ticks > before).nonzero()[:, -1].reshape(*running.shape[:-1], slots)
