# SPDX-License-Identifier: Apache-2.0
"""``adakv``: heads share one budget; a head whose attention is spread out gets more slots."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache import CompactBlock
from ..model_spec import ModelSpec
from ..reference.selection import share_budget, top_tokens
from ._scored import ScoredMethod
from ._selection import check_layer, check_share, whole_layer, wrapped_scorer
from .base import LayerInput, Method, register_method


@register_method
@dataclass
class AdaKV(Method):
    """Another method's scores, with slots shared among the KV heads of a layer.

    AdaKV (arXiv 2407.11550): the best scores of all heads of a layer are kept, wherever they are, but every head keeps at
    least a share of what equal budgets would give it. Heads really hold unequal numbers of slots: no padding is stored.

    Attributes:
        scorer: any method that is a ``ScoredMethod``: "snapkv", "pyramidkv", "h2o", ... Only its scores are taken: the keys
            that "finch" would move stay where they are.
        options: of the scorer.
        floor_share: share of the equal budget that each head keeps in any case (the paper's safeguard).
    """

    name = "adakv"
    summary = "another method's scores, with slots shared among the heads of a layer"
    source = "AdaKV, arXiv 2407.11550, adaptive allocation with safeguard"

    scorer: str = "snapkv"
    options: dict[str, Any] = field(default_factory=dict)
    floor_share: float = 0.2

    def __post_init__(self):
        self.floor_share = check_share("floor_share", self.floor_share, maximum=1.0)
        self._scorer = wrapped_scorer(ScoredMethod, self.scorer, self.options)

    @property
    def queries_needed(self) -> int:
        return self._scorer.queries_needed

    @property
    def min_slots(self) -> int:
        return self._scorer.min_slots

    def prepare(self, spec: ModelSpec) -> None:
        self._scorer.prepare(spec)

    def budgets(self, slots: int, num_tokens: int, num_layers: int) -> list[int]:
        return self._scorer.budgets(slots, num_tokens, num_layers)

    @torch.no_grad()
    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        check_layer(self, layer, slots)
        if slots == layer.num_tokens:
            return whole_layer(layer)
        scores, (first, last) = self._scorer.scores(layer), self._scorer.ends(layer, slots)
        floor = min(slots, max(1, first + last, int(self.floor_share * slots)))
        counts = share_budget(scores, slots, floor, first, last)
        heads = []
        for b, row in enumerate(counts.tolist()):
            heads.append([])
            for h, count in enumerate(row):
                kept = top_tokens(scores[b, h], count, first=first, last=last)
                heads[-1].append((layer.keys[b, h, kept], layer.values[b, h, kept], None))
        return CompactBlock.pack(heads)
