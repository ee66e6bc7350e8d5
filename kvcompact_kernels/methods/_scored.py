# SPDX-License-Identifier: Apache-2.0
"""Selection methods that keep the best of one score per token and head; ``adakv`` can share budgets among such heads."""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ..reference.selection import top_tokens
from ._selection import SelectionMethod
from .base import LayerInput


@dataclass
class ScoredMethod(SelectionMethod):
    """Keeps the tokens at both ends that :meth:`ends` names, and the highest scores of the others."""

    separate_heads = True

    @abstractmethod
    def scores(self, layer: LayerInput) -> Tensor:
        """``[B, Hkv, T]``: higher is kept; comparable between the heads of a layer."""

    def ends(self, layer: LayerInput, slots: int) -> tuple[int, int]:
        """First and last tokens that are kept in any case, out of ``slots``."""
        return 0, 0

    def select(self, layer: LayerInput, slots: int) -> Tensor:
        first, last = self.ends(layer, slots)
        return top_tokens(self.scores(layer), slots, first=first, last=last)
