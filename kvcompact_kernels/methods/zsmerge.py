# SPDX-License-Identifier: Apache-2.0
"""``zsmerge``: what would be dropped is merged into slots that remember how many tokens they stand for."""

from dataclasses import dataclass

import torch

from .._checks import check_int
from ..cache import CompactBlock
from ..ops.key_scores import key_scores
from ..reference.selection import merge_into_kept, top_tokens
from ._selection import check_layer, check_share, leading_sinks, whole_layer
from .base import LayerInput, Method, register_method


@register_method
@dataclass
class ZSMerge(Method):
    """Newest tokens, heavy hitters, and residual slots that the rest is merged into.

    ZSMerge (arXiv 2503.10714): a token that is not kept joins the residual slot whose key is most like its own; the slot
    is the mean of its members, and ``log(count)`` is added to its logit, so that it weighs as much as they did together.
    The paper merges step by step while it generates; here the whole prefill is merged at once, with attention received from
    all queries as the measure of importance.

    Attributes:
        recent_share: share of the slots for the newest tokens.
        residual_share: share of the slots that take in others: the least important of those kept.
        sinks: first tokens of the context kept in any case, never merged into (the paper has no such rule: 0).
    """

    name = "zsmerge"
    summary = "heavy hitters and newest tokens; the others are merged into slots that count their members"
    source = "ZSMerge, arXiv 2503.10714"
    separate_heads = True

    recent_share: float = 0.25
    residual_share: float = 0.25
    sinks: int = 4

    def __post_init__(self):
        self.recent_share = check_share("recent_share", self.recent_share, maximum=1.0)
        self.residual_share = check_share("residual_share", self.residual_share, maximum=1.0)
        check_int("sinks", self.sinks, minimum=0)

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
        scores = key_scores(layer.queries[:, :, -layer.num_tokens :], layer.keys, scale=layer.scale)
        sinks = leading_sinks(layer, self.sinks)
        # a slot between the ends must be left to merge into
        recent = min(int(self.recent_share * slots), slots - sinks - 1)
        indices = top_tokens(scores, slots, first=sinks, last=recent)
        residual = min(max(1, int(self.residual_share * slots)), slots - sinks - recent)
        importance = scores.gather(2, indices)
        importance[..., :sinks] = float("inf")
        importance[..., slots - recent :] = float("inf")
        least = importance.sort(dim=-1, stable=True).indices[..., :residual]
        homes = torch.zeros_like(importance, dtype=torch.bool).scatter_(2, least, True)
        keys, values, counts = merge_into_kept(layer.keys, layer.values, indices, homes)
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        return CompactBlock(keys, values, counts.to(wide).log())
