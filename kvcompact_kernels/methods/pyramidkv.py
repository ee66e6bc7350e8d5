# SPDX-License-Identifier: Apache-2.0
"""``pyramidkv``: SnapKV with more slots in the first layers than in the last."""

from dataclasses import dataclass

from ..reference.selection import pyramid_budgets
from ._selection import check_share
from .base import register_method
from .snapkv import SnapKV


@register_method
@dataclass
class PyramidKV(SnapKV):
    """SnapKV whose budgets fall linearly from the first layer to the last; their mean is the budget asked for.

    PyramidKV (arXiv 2406.02069, section 4.2). The options of SnapKV, and:

    Attributes:
        steepness: the last layer gets the mean divided by this (the paper's beta); 1 is SnapKV. The pyramid is flatter
            where a layer would otherwise get more slots than there are tokens, or fewer than ``min_slots``.
    """

    name = "pyramidkv"
    summary = "SnapKV with more slots in the first layers, fewer in the last"
    source = "PyramidKV, arXiv 2406.02069, section 4.2"
    separate_heads = False  # it has numbers of its own for the layers

    steepness: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        self.steepness = check_share("steepness", self.steepness, minimum=1.0)

    def budgets(self, slots: int, num_tokens: int, num_layers: int) -> list[int]:
        return pyramid_budgets(slots, num_tokens, num_layers, self.steepness, min(self.min_slots, slots))
