# SPDX-License-Identifier: Apache-2.0
"""``scissorhands``: what stayed important over the last queries."""

from dataclasses import dataclass

from torch import Tensor

from .._checks import check_int
from ..reference.selection import kept_recent, persistence
from ._scored import ScoredMethod
from ._selection import check_share, leading_sinks
from .base import LayerInput, register_method


@register_method
@dataclass
class Scissorhands(ScoredMethod):
    """Keeps the newest tokens and those that most of the last queries held for important.

    Scissorhands (arXiv 2305.17118, algorithm 2): a query counts a token as important when its attention is above the mean;
    what was important stays important. The paper drops tokens step by step while it generates; here the whole prefill is
    there, and the last ``history`` queries vote. Of equal counts the earlier token wins.

    Attributes:
        history: queries that vote.
        recent_share: share of the slots for the newest tokens (the paper keeps a fixed number of them).
        sinks: first tokens of the context kept in any case (the paper has no such rule: 0).
    """

    name = "scissorhands"
    summary = "the newest tokens, and those that the last queries agree on"
    source = "Scissorhands, arXiv 2305.17118, algorithm 2"

    history: int = 256
    recent_share: float = 0.1
    sinks: int = 4

    def __post_init__(self):
        check_int("history", self.history, minimum=1)
        self.recent_share = check_share("recent_share", self.recent_share, maximum=1.0)
        check_int("sinks", self.sinks, minimum=0)

    @property
    def queries_needed(self) -> int:
        return self.history

    @property
    def min_slots(self) -> int:
        return self.sinks + 1

    def ends(self, layer: LayerInput, slots: int) -> tuple[int, int]:
        sinks = leading_sinks(layer, self.sinks)
        return sinks, kept_recent(slots, self.recent_share, sinks)

    def scores(self, layer: LayerInput) -> Tensor:
        return persistence(layer.queries[:, :, -layer.num_tokens :], layer.keys, layer.scale, self.history)
