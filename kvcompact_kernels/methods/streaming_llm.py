# SPDX-License-Identifier: Apache-2.0
"""``streaming_llm``: attention sinks and the newest tokens."""

from dataclasses import dataclass

from torch import Tensor

from .._checks import check_int
from ..reference.selection import sinks_and_recent
from ._selection import SelectionMethod, leading_sinks
from .base import LayerInput, register_method


@register_method
@dataclass
class StreamingLLM(SelectionMethod):
    """Keeps the first ``sinks`` tokens and the newest ones (arXiv 2309.17453, section 3.2).

    Unlike the paper's rolling cache, kept tokens stay at their own positions; with ``sinks=0`` it is plain "last tokens",
    which loses the attention sink and is worse than no context at all.

    Attributes:
        sinks: first tokens of the context kept.
    """

    name = "streaming_llm"
    summary = "the first tokens (attention sinks) and the newest ones"
    source = "StreamingLLM, arXiv 2309.17453, section 3.2"
    separate_heads = True

    sinks: int = 4

    def __post_init__(self):
        check_int("sinks", self.sinks, minimum=0)

    @property
    def min_slots(self) -> int:
        return self.sinks + 1

    def select(self, layer: LayerInput, slots: int) -> Tensor:
        return sinks_and_recent(layer.num_tokens, slots, leading_sinks(layer, self.sinks))
