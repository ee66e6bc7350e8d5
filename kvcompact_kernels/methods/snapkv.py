# SPDX-License-Identifier: Apache-2.0
"""``snapkv``: what the last queries attend to."""

from dataclasses import dataclass

from torch import Tensor

from .._checks import check_choice, check_int
from ..ops.key_scores import key_scores
from ..reference.selection import kept_window, pool_before_window
from ._scored import ScoredMethod
from ._selection import leading_sinks
from .base import LayerInput, register_method


@register_method
@dataclass
class SnapKV(ScoredMethod):
    """Keeps the last ``window`` tokens and those that these attend to most, pooled over neighbours.

    SnapKV (arXiv 2404.14469, section 4); the query heads of a KV head vote together. With few slots the kept window
    shrinks to half of what the sinks leave, so that selection always has its half; all ``window`` queries still vote.

    Attributes:
        window: last queries that vote, and are kept.
        kernel_size: odd width of the pooling.
        pooling: "avg" or "max".
        sinks: first tokens of the context kept in any case (the paper has no such rule: 0).
    """

    name = "snapkv"
    summary = "the last tokens, and those that their queries attend to most"
    source = "SnapKV, arXiv 2404.14469, section 4"

    window: int = 32
    kernel_size: int = 7
    pooling: str = "avg"
    sinks: int = 4

    def __post_init__(self):
        check_int("window", self.window, minimum=1)
        check_int("kernel_size", self.kernel_size, minimum=1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        check_choice("pooling", self.pooling, ("avg", "max"))
        check_int("sinks", self.sinks, minimum=0)

    @property
    def queries_needed(self) -> int:
        return self.window

    @property
    def min_slots(self) -> int:
        return self.sinks + 1

    def ends(self, layer: LayerInput, slots: int) -> tuple[int, int]:
        sinks = leading_sinks(layer, self.sinks)
        return sinks, kept_window(slots, min(self.window, layer.num_tokens), sinks)

    def scores(self, layer: LayerInput) -> Tensor:
        window = min(self.window, layer.num_tokens)
        scores = key_scores(layer.queries[:, :, -window:], layer.keys, scale=layer.scale)
        return pool_before_window(scores, window, self.kernel_size, self.pooling)
