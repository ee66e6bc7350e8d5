# SPDX-License-Identifier: Apache-2.0
"""``minicache``: pairs of layers hold one direction per slot together."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache import CompactBlock, PairedBlock, SharedSlots
from ..model_spec import ModelSpec
from ..reference.merging import angular_distance, merge_layers
from ..reference.selection import gather_tokens
from ._selection import SelectionMethod, check_layer, check_share, whole_layer, wrapped_scorer
from .base import LayerInput, Method, register_method


@register_method
@dataclass
class MiniCache(Method):
    """From the middle of the model on, two layers share the directions of their keys and values; lengths stay their own.

    MiniCache (arXiv 2405.14366): the keys of a token in two adjacent layers become one unit vector between them (spherical
    interpolation), and so do its values; each layer keeps the lengths. Tokens whose directions differ most between the two
    layers stay as they are. At ratio 1 this is the method alone, every token kept, which saves a quarter of the memory
    where half of the layers are paired and at most half where all are. Beyond that ``scorer`` selects tokens first: the lower
    layer's choice holds for both layers of a pair. A given number of slots takes fewer bytes than with the scorer alone;
    ``kvcompact eval``, which compares at equal bytes, gives it more slots.

    Unlike the paper, which takes a threshold on the distances, the same number of tokens is retained in each KV head, by the
    mean distance of keys and values. The paper's merging of tokens that are generated later is not here: those stay exact.
    Attention reads a layer's keys and values from a copy that is made for each layer and step and dropped after it.
    While a context is read each layer has slots of its own; they are paired at the end, so the peak is above what is left.

    It rests on directions being alike in adjacent layers. Measure that for your model: in SmolLM2-135M they are at right
    angles (mean cosine of keys between -0.25 and 0.19, of values between -0.04 and 0.03, by pair of layers), and merging half
    of its layers leaves less than no context at all: 1.09 against 0.61 nats of KL with all of 512 tokens kept (3 contexts).

    Attributes:
        start: share of the layers, from the first, that are left alone; the paper pairs from the middle on.
        weight: of the upper layer in the interpolation.
        retain: share of the slots that stay unmerged.
        scorer: a method that selects tokens; its budgets per layer are not used.
        options: of the scorer.
    """

    name = "minicache"
    summary = "pairs of layers share the directions of keys and values, each with lengths of its own"
    source = "MiniCache, arXiv 2405.14366"
    joins_layers = True

    start: float = 0.5
    weight: float = 0.6
    retain: float = 0.05
    scorer: str = "snapkv"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("start", "weight", "retain"):
            setattr(self, name, check_share(name, getattr(self, name), maximum=1.0))
        self._scorer = wrapped_scorer(SelectionMethod, self.scorer, self.options)

    @property
    def queries_needed(self) -> int:
        return self._scorer.queries_needed

    @property
    def min_slots(self) -> int:
        return self._scorer.min_slots

    def prepare(self, spec: ModelSpec) -> None:
        """Raises ValueError when ``start`` leaves no two layers to pair."""
        self._scorer.prepare(spec)
        layers = spec.layer_kinds.count("full")
        if not self._lower_layers(layers):
            raise ValueError(
                f"start: of {layers} layers that can be compacted, {self.start} leaves fewer than two to pair"
            )

    def _lower_layers(self, num_layers: int) -> range:
        """Indices of the lower layer of each pair; a last layer without partner stays alone."""
        return range(round(self.start * num_layers), num_layers - 1, 2)

    @torch.no_grad()
    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        check_layer(self, layer, slots)
        if slots == layer.num_tokens:
            return whole_layer(layer)
        lower = self._lower_layers(layer.num_layers)
        if layer.layer_idx - 1 not in lower:
            kept = self._scorer.select(layer, slots).to(layer.keys.device)
            layer.notes["kept"] = kept.expand(*layer.keys.shape[:2], slots)
        kept = layer.notes["kept"]
        return CompactBlock(gather_tokens(layer.keys, kept), gather_tokens(layer.values, kept))

    @torch.no_grad()
    def finish(self, blocks: list[CompactBlock]) -> list[CompactBlock]:
        """Pairs the layers.

        Raises:
            ValueError: rows of the batch hold unequal numbers of tokens.
        """
        blocks = list(blocks)
        for i in self._lower_layers(len(blocks)):
            blocks[i : i + 2] = self._pair(blocks[i], blocks[i + 1])
        return blocks

    def _pair(self, lower: CompactBlock, upper: CompactBlock) -> tuple[PairedBlock, PairedBlock]:
        if lower.offsets is not None or upper.offsets is not None:
            raise ValueError(
                f"method {self.name!r} needs rows of equal length: compact contexts of unequal length one by one"
            )
        distance = angular_distance(lower.keys, upper.keys) + angular_distance(lower.values, upper.values)
        alone = math.ceil(self.retain * lower.num_slots)
        order = distance.sort(dim=-1, descending=True, stable=True).indices
        retained, merged = order[..., :alone], order[..., alone:].sort(dim=-1).values
        shared, norms = [], []
        for name in ("keys", "values"):
            below, above = getattr(lower, name), getattr(upper, name)
            direction, *lengths = merge_layers(*(gather_tokens(x, merged) for x in (below, above)), self.weight)
            shared.append(torch.cat([gather_tokens(below, retained), direction, gather_tokens(above, retained)], 2))
            ones = lengths[0].new_ones(retained.shape)
            norms.append((torch.cat([ones, lengths[0]], 2), torch.cat([lengths[1], ones], 2)))
        both = SharedSlots(*shared)
        return PairedBlock(both, norms[0][0], norms[1][0], False), PairedBlock(both, norms[0][1], norms[1][1], True)
