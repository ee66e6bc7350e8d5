# SPDX-License-Identifier: Apache-2.0
"""``uniform``: every so manieth token."""

from dataclasses import dataclass

from torch import Tensor

from .._checks import check_int
from ..reference.selection import uniform_tokens
from ._selection import SelectionMethod, leading_sinks
from .base import LayerInput, register_method


@register_method
@dataclass
class Uniform(SelectionMethod):
    """Keeps the first tokens and others at even distances, up to the last one.

    Attributes:
        sinks: first tokens of the context kept.
    """

    name = "uniform"
    summary = "tokens at even distances: a baseline"
    source = "none"
    separate_heads = True

    sinks: int = 4

    def __post_init__(self):
        check_int("sinks", self.sinks, minimum=0)

    @property
    def min_slots(self) -> int:
        return self.sinks + 1

    def select(self, layer: LayerInput, slots: int) -> Tensor:
        return uniform_tokens(layer.num_tokens, slots, leading_sinks(layer, self.sinks))
