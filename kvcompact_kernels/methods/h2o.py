# SPDX-License-Identifier: Apache-2.0
"""``h2o``: heavy hitters of all prefill queries, and the newest tokens."""

from dataclasses import dataclass

from torch import Tensor

from .._checks import check_int
from ..ops.key_scores import key_scores
from ..reference.selection import kept_recent
from ._scored import ScoredMethod
from ._selection import check_share, leading_sinks
from .base import LayerInput, register_method


@register_method
@dataclass
class H2O(ScoredMethod):
    """Keeps the tokens that received most attention, summed over all prefill queries, and the newest ones.

    H2O (arXiv 2306.14048, section 4), with the scores of a whole prefill instead of step by step, and summed over the
    query heads of a KV head. Early tokens are seen by more queries, so the sum favours them: that is the paper's rule.

    Attributes:
        recent_share: share of the slots for the newest tokens; the paper halves the budget.
        sinks: first tokens of the context kept in any case, out of the heavy hitters' part (the paper has no such rule: 0).
    """

    name = "h2o"
    summary = "the tokens that all prefill queries attended to most, and the newest ones"
    source = "H2O, arXiv 2306.14048, section 4"

    recent_share: float = 0.5
    sinks: int = 4

    def __post_init__(self):
        self.recent_share = check_share("recent_share", self.recent_share, maximum=1.0)
        check_int("sinks", self.sinks, minimum=0)

    @property
    def queries_needed(self) -> int:
        return -1

    @property
    def min_slots(self) -> int:
        return self.sinks + 1

    def ends(self, layer: LayerInput, slots: int) -> tuple[int, int]:
        sinks = leading_sinks(layer, self.sinks)
        return sinks, kept_recent(slots, self.recent_share, sinks)

    def scores(self, layer: LayerInput) -> Tensor:
        return key_scores(layer.queries[:, :, -layer.num_tokens :], layer.keys, scale=layer.scale)
