# SPDX-License-Identifier: Apache-2.0
"""The option ``shares``: unequal numbers of slots for the KV heads, whatever the method."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cache import CompactBlock
from ..head_shares import HeadShares
from ..model_spec import ModelSpec
from ._selection import check_layer, whole_layer
from .base import SHARES, LayerInput, Method


@dataclass
class WithShares(Method):
    """A method whose KV heads get as many slots as a file says; :func:`.base.get_method` makes it of the option ``shares``.

    Attributes:
        method: one that has ``separate_heads``; it is given one head of a layer at a time.
        shares: of the model, or a file of ``kvcompact train shares`` or ``train selector``.
    """

    summary = "a method with measured numbers of slots"
    source = "head budgets measured once per model, as in Attention Matching's code (arXiv 2602.16284)"

    method: Method
    shares: str | HeadShares

    def __post_init__(self):
        self._shares = self.shares if isinstance(self.shares, HeadShares) else HeadShares.load(self.shares)

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def prefill_passes(self) -> int:
        return self.method.prefill_passes

    @property
    def queries_needed(self) -> int:
        return self.method.queries_needed

    @property
    def min_slots(self) -> int:
        return self.method.min_slots

    @property
    def whole_context_only(self) -> str | None:
        return self.method.whole_context_only

    def settings(self) -> dict[str, Any]:
        return {**self.method.settings(), SHARES: self.shares}

    def prepare(self, spec: ModelSpec) -> None:
        """Raises ValueError when the file is of another model."""
        self._shares.check_model(spec, f"shares {self.shares}")
        self.method.prepare(spec)

    def budgets(self, slots: int, num_tokens: int, num_layers: int) -> list[int]:
        return self._shares.layers(slots, min(slots, self.min_slots), num_tokens)

    @torch.no_grad()
    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        check_layer(self, layer, slots)
        if slots == layer.num_tokens:
            return whole_layer(layer)
        counts = self._shares.heads(layer.layer_idx, slots, min(slots, self.min_slots), layer.num_tokens)
        group = 0 if layer.queries is None else layer.queries.shape[1] // layer.keys.shape[1]
        blocks = []
        for head, count in enumerate(counts):
            one = replace(
                layer,
                keys=layer.keys[:, head : head + 1],
                values=layer.values[:, head : head + 1],
                queries=None if layer.queries is None else layer.queries[:, head * group : (head + 1) * group],
            )
            blocks.append(self.method.compact_layer(one, count))
        return CompactBlock.join_heads(blocks)
