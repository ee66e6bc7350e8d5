# SPDX-License-Identifier: Apache-2.0
"""A cartridge's start from what its own conversations look at.

Which of a text's tokens will be needed is not to be seen from the text's own attention, but the conversations of
:mod:`.self_study` ask for its facts: the tokens that their answers are read from are kept, with keys as they are, and biases
and values fitted to the answers' queries as in Attention Matching (arXiv 2602.16284, which also takes its reference queries
from self-study). A small model asks poor questions; where there is a selector for it, which has learned what questions look
at, its choice is taken, and the conversations are for the fit.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cache import CompactBlock, CompactCache
from ..methods import LayerInput
from ..methods.attention_matching import fit_best
from ..methods.full import Full
from ..methods.still import expected_recall
from ..model_spec import ModelSpec
from ..reference import matching
from ..reference.selection import proportional_counts
from ..token_selector import TokenSelector
from .attention import read_behind, received_attention
from .self_study import GAP, RECALL, Conversation

BATCH = 16
MAX_POSITIONS = 2048  # of answers, whose queries the fit takes; each gives one to every query head
# so many are read at most: for the ranking, and where a selector ranks and they are for the fit alone
RANKING_CONVERSATIONS, FIT_CONVERSATIONS = 2048, 512
# Far above those of Attention Matching: its slots answer for the whole text, where a fact is to be read off its own tokens,
# and a fit that follows the many answers spoils the one that was not asked for. Chosen in docs/training.md's example.
MASS_RIDGE, VALUE_RIDGE = 0.1, 1.0


@torch.no_grad()
def study_start(
    model: Any,
    spec: ModelSpec,
    ids: Sequence[int],
    conversations: Sequence[Conversation],
    slots: int,
    sinks: int = 4,
    selector: TokenSelector | None = None,
    shares: Sequence[Sequence[float]] | None = None,
) -> CompactCache:
    """Slots for the tokens that answers look at.

    The model reads the text, then each conversation behind it. A token's score, for a layer and KV head, is the sum over
    conversations of the most attention that a query of the answer gives it: a token that one answer hangs on counts as much
    as one that a hundred queries glance at. Or, with a selector, what that expects of questions.

    Args:
        model: patched and frozen.
        ids: the text; the model must have as many positions.
        conversations: on it, at least one; passages to continue count only where there is nothing else, and so do gaps where
            there is a selector. ``RANKING_CONVERSATIONS`` of them, or ``FIT_CONVERSATIONS`` with a selector, are drawn once
            and for all.
        slots: per KV head and layer, more than ``sinks`` and at most ``len(ids)``; with ``shares`` the mean of them.
        sinks: first tokens that are kept in any case.
        selector: chooses the tokens.
        shares: ``[compacted layers][KV heads]``: how the slots are shared, as ``HeadShares`` holds it; None takes those of
            the selector, if it has any, or else the same number for all.
    """
    # a passage that is continued looks at all of its tokens alike, and ranks none before another
    unranked = (RECALL,) if selector is None else (RECALL, GAP)
    most = RANKING_CONVERSATIONS if selector is None else FIT_CONVERSATIONS
    conversations = [c for c in conversations if c.kind not in unranked] or list(conversations)
    if len(conversations) > most:
        conversations = random.Random(0).sample(conversations, most)
    reader = Full() if selector is None else _Expectation(selector.to(model.device), sinks)
    full = model.compact(torch.tensor([list(ids)], device=model.device), method=reader, ratio=1)
    kept = [i for i, kind in enumerate(spec.layer_kinds) if kind == "full"]
    scores = {i: torch.zeros(full.layers[i].keys.shape[:3], device=model.device) for i in kept}
    wanted = _positions(conversations)
    # one piece of memory for each layer: thousands of small ones would lie between, and hold, what a batch needs for a moment
    total, filled = sum(map(len, wanted)), 0
    queries: dict[int, Tensor] = {}
    tokens = [c.tokens for c in conversations]
    for rows, session in read_behind(model, spec, full, tokens, BATCH):
        # the query that an answer's token is predicted from stands one place before it
        begins = [len(conversations[i].prompt) - 1 for i in rows]
        for i in kept:
            seen, keys = session.queries[i], full.layers[i].keys
            if selector is None:
                lengths = [len(tokens[i]) for i in rows]
                most, _ = received_attention(seen, session.tail_keys[i], keys, lengths, spec.scales[i], begins)
                scores[i] += most.sum(0, keepdim=True)
            if i not in queries:
                queries[i] = seen.new_empty(seen.shape[1], total, seen.shape[3])
            end = filled
            for row, (number, begin) in enumerate(zip(rows, begins)):
                start, end = end, end + len(wanted[number])
                queries[i][:, start:end] = seen[row, :, [begin + place for place in wanted[number]]]
        filled = end
    if selector is not None:
        scores = dict(zip(kept, reader.scores))
    first = min(sinks, slots - 1)
    if shares is None and selector is not None:
        shares = selector.config.shares
    counts = _slot_counts(shares, spec, slots, first + 1, len(ids))
    layers = list(full.layers)
    for number, i in enumerate(kept):
        block = full.layers[i]
        layer = LayerInput(
            layer_idx=number,
            num_layers=len(kept),
            keys=block.keys,
            values=block.values,
            queries=None,
            positions=torch.arange(len(ids), device=model.device),
            rope=full.ropes["full"],
            scale=spec.scales[i],
        )
        asked = matching.reference_queries(queries.pop(i)[None], block.num_kv_heads)
        outputs, lse, _ = matching.full_attention(asked, block.keys, block.values, layer.scale)
        layers[i] = fit_best(
            layer, asked, outputs, lse, scores[i], counts[number], MASS_RIDGE, VALUE_RIDGE, first=first
        )
    return replace(full, layers=tuple(layers))


def _slot_counts(
    shares: Sequence[Sequence[float]] | None, spec: ModelSpec, slots: int, least: int, most: int
) -> list[list[int]]:
    """Slots of each compacted layer and KV head; their mean is ``slots``."""
    heads, layers = spec.num_kv_heads, spec.layer_kinds.count("full")
    if shares is None:
        return [[slots] * heads] * layers
    counts = proportional_counts(slots * layers * heads, [share for row in shares for share in row], least, most)
    return [counts[i : i + heads] for i in range(0, len(counts), heads)]


class _Expectation(Full):
    """Keeps every token, and notes what a selector expects of questions."""

    queries_needed = -1

    def __init__(self, selector: TokenSelector, sinks: int):
        self.selector, self.sinks = selector, sinks
        self.scores: list[Tensor] = []

    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        self.scores.append(expected_recall(layer, self.selector, self.sinks))
        return super().compact_layer(layer, slots)


def _positions(conversations: Sequence[Conversation]) -> list[list[int]]:
    """Places in each answer whose queries are fitted to, ``MAX_POSITIONS`` of all that there are."""
    places = [(number, place) for number, c in enumerate(conversations) for place in range(len(c.answer))]
    if len(places) > MAX_POSITIONS:
        places = sorted(random.Random(0).sample(places, MAX_POSITIONS))
    chosen: list[list[int]] = [[] for _ in conversations]
    for number, place in places:
        chosen[number].append(place)
    return chosen
