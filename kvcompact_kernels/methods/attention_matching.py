# SPDX-License-Identifier: Apache-2.0
"""``attention_matching``: kept keys, fitted biases and values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._checks import check_choice, check_int
from ..cache import CompactBlock
from ..reference import matching
from ..reference.selection import gather_tokens, top_tokens
from ._selection import check_layer, check_share, leading_sinks, whole_layer
from .base import LayerInput, Method, register_method

BETA_LIMIT = 7.0  # nats: a slot weighs at most e^7 times what its own key does


@register_method
@dataclass
class AttentionMatching(Method):
    """Keeps some keys and fits a bias and a value to each, so that the slots answer reference queries as the cache does.

    Attention Matching (arXiv 2602.16284), training-free; the math is in ``reference/matching.py``.

    Attributes:
        queries: "prefill": the context's own, all moved to the position right behind it, from where they see every key;
            "repeat": of a second reading of the context, which costs a second prefill. On SmolLM2-135M and WikiText-2,
            512 tokens to 64 slots, a continuation's KL from the full cache is 0.08 nats with "prefill" and 0.26 with
            "repeat"; but "repeat" recalls planted facts better (NLL 1.3 against 1.8 nats per token at 128 slots).
        keys: which are kept: "rms" or "max", those with the largest root mean square, or maximum, of the attention that the
            reference queries give them; "omp": orthogonal matching pursuit, far slower, for its cost grows with T^2.
        max_queries: reference queries per KV head, thinned evenly; None takes all. Fewer are faster, but the fit suffers
            when they are fewer than about ten per slot.
        mass_ridge, value_ridge: how strongly weights are pulled to 1 and values to those of the kept keys, relative to
            the mean diagonal of the normal equations.
        beta_limit: biases stay in ``[-beta_limit, beta_limit]`` (nats).
        sinks: first tokens of the context whose keys are kept in any case.
    """

    name = "attention_matching"
    summary = "kept keys with biases and values fitted to reference queries (least squares, no training)"
    source = "Attention Matching, arXiv 2602.16284"
    separate_heads = True

    queries: str = "prefill"
    keys: str = "rms"
    max_queries: int | None = 8192
    mass_ridge: float = 1e-3
    value_ridge: float = 1e-3
    beta_limit: float = BETA_LIMIT
    sinks: int = 4

    def __post_init__(self):
        check_choice("queries", self.queries, ("repeat", "prefill"))
        check_choice("keys", self.keys, ("rms", "max", "omp"))
        if self.max_queries is not None:
            check_int("max_queries", self.max_queries, minimum=1)
        self.mass_ridge = check_share("mass_ridge", self.mass_ridge, minimum=1e-8)
        self.value_ridge = check_share("value_ridge", self.value_ridge, minimum=1e-8)
        self.beta_limit = check_share("beta_limit", self.beta_limit, minimum=1e-3, maximum=50.0)
        check_int("sinks", self.sinks, minimum=0)

    @property
    def prefill_passes(self) -> int:
        return 2 if self.queries == "repeat" else 1

    @property
    def queries_needed(self) -> int:
        return -1

    @property
    def min_slots(self) -> int:
        return self.sinks + 1

    @torch.no_grad()
    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        check_layer(self, layer, slots)
        if slots == layer.num_tokens:
            return whole_layer(layer)
        queries, sinks = self._reference_queries(layer), leading_sinks(layer, self.sinks)
        statistic = "rms" if self.keys == "omp" else self.keys
        outputs, lse, scores = matching.full_attention(queries, layer.keys, layer.values, layer.scale, statistic)
        if self.keys == "omp":
            indices = matching.matching_pursuit(
                queries, layer.keys, lse, slots, layer.scale, self.mass_ridge, self.beta_limit, first=sinks
            )
        else:
            indices = top_tokens(scores, slots, first=sinks)
        return fit_slots(layer, queries, outputs, lse, indices, self.mass_ridge, self.value_ridge, self.beta_limit)

    def _reference_queries(self, layer: LayerInput) -> Tensor:
        if self.queries == "prefill":
            return queries_from_behind(layer, self.max_queries)
        return matching.reference_queries(layer.queries, layer.keys.shape[1], self.max_queries)


def queries_from_behind(layer: LayerInput, limit: int | None, behind: int | None = None) -> Tensor:
    """The context's own queries, moved to the position right behind it, or to ``behind``, from where they see every key.

    Returns:
        ``[B, Hkv, R, d]``, at most ``limit`` per KV head.
    """
    queries = layer.queries[:, :, -layer.num_tokens :]
    there = layer.positions[-queries.shape[2] :]
    moved = (there[-1:] + 1).expand_as(there) if behind is None else torch.full_like(there, behind)
    queries = layer.rope.rotate(layer.rope.unrotate(queries, there), moved)
    return matching.reference_queries(queries, layer.keys.shape[1], limit)


def own_attention(layer: LayerInput, limit: int | None = None) -> Tensor:
    """``[B, Hkv, T]``: root mean square of the attention that :func:`queries_from_behind` give each token."""
    queries = queries_from_behind(layer, limit)
    return matching.full_attention(queries, layer.keys, layer.values, layer.scale)[2]


def fit_slots(
    layer: LayerInput,
    queries: Tensor,
    outputs: Tensor,
    lse: Tensor,
    indices: Tensor,
    mass_ridge: float,
    value_ridge: float,
    beta_limit: float,
) -> CompactBlock:
    """The block of the tokens ``indices [B, Hkv, t]``: their keys, with the biases and values that match the cache best.

    ``queries``, ``outputs`` and ``lse`` are the reference queries and what ``matching.full_attention`` says of them; the
    other arguments are :class:`AttentionMatching`'s.
    """
    keys, values = gather_tokens(layer.keys, indices), gather_tokens(layer.values, indices)
    beta = matching.match_mass(*matching.mass_equations(queries, keys, lse, layer.scale), mass_ridge, beta_limit)
    gram, rhs = matching.value_equations(queries, keys, beta, outputs, layer.scale)
    return CompactBlock(keys, matching.match_values(gram, rhs, values, value_ridge), beta)


def fit_best(
    layer: LayerInput,
    queries: Tensor,
    outputs: Tensor,
    lse: Tensor,
    scores: Tensor,
    counts: Sequence[int],
    mass_ridge: float,
    value_ridge: float,
    beta_limit: float = BETA_LIMIT,
    first: int = 0,
    before: int = 0,
) -> CompactBlock:
    """:func:`fit_slots` of the tokens with the best scores, as many as each KV head is to keep.

    A head that keeps all of its tokens keeps them as they are.

    Args:
        scores: ``[B, Hkv, T]``.
        counts: slots of each KV head.
        first: tokens that are kept in any case.
        before: leading tokens that are there for the fit alone: they are neither counted nor returned.
    """

    def some(heads: slice, count: int) -> CompactBlock:
        keys, values = layer.keys[:, heads], layer.values[:, heads]
        if count == layer.num_tokens - before:
            return CompactBlock(keys[:, :, before:].clone(), values[:, :, before:].clone())
        part = replace(layer, keys=keys, values=values, queries=None)
        indices = top_tokens(scores[:, heads], before + count, first=first)
        block = fit_slots(
            part, queries[:, heads], outputs[:, heads], lse[:, heads], indices, mass_ridge, value_ridge, beta_limit
        )
        return CompactBlock(*(x[:, :, before:] for x in (block.keys, block.values, block.beta)))

    if len(set(counts)) == 1:
        return some(slice(None), counts[0])
    return CompactBlock.join_heads([some(slice(h, h + 1), count) for h, count in enumerate(counts)])
