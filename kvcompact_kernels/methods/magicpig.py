# SPDX-License-Identifier: Apache-2.0
"""``magicpig``: keys drawn with the probability that a hash would find them, and weighted by its inverse."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_int
from ..cache import CompactBlock
from ..reference.selection import collision_probability, gather_tokens, inclusion_probability, systematic_sample
from ._selection import check_layer, check_share, leading_sinks, whole_layer
from .base import LayerInput, Method, register_method


@register_method
@dataclass
class MagicPIG(Method):
    """Draws keys as MagicPIG's hash tables would, once, when the context is compacted; a bias corrects for the draw.

    MagicPIG (arXiv 2410.16179) draws anew for every query while it decodes: a key is attended to when it shares the hash of
    the query in at least two of ``tables`` tables, and its weight is divided by the probability of that, which makes the
    sum over the keys unbiased. A compact cache holds one set of slots for all queries. This is the static part that fits: the
    probability of each key is averaged over the context's last queries, exactly ``slots`` keys are drawn accordingly, and
    the bias of each is ``-log`` of its probability, so that sums of ``exp`` over the slots have those of the whole cache as
    their mean (over seeds; the softmax's quotient is biased, as in the paper). Nothing is drawn at decode time.

    Attributes:
        bits, tables: of the hash (SimHash): K and L of the paper.
        window: last queries that the probabilities are averaged over.
        recent_share: share of the slots for the newest tokens, which are kept for certain (the paper keeps a window).
        sinks: first tokens of the context kept for certain, as in the paper.
        seed: of the draw; every layer has its own.
    """

    name = "magicpig"
    summary = "keys drawn by hash collision with the last queries, weighted by inverse probability (drawn once, static)"
    source = "MagicPIG, arXiv 2410.16179, sampling and its correction, without drawing at decode time"

    bits: int = 10
    tables: int = 150
    window: int = 32
    recent_share: float = 0.1
    sinks: int = 4
    seed: int = 0

    def __post_init__(self):
        check_int("bits", self.bits, minimum=1)
        check_int("tables", self.tables, minimum=2)
        check_int("window", self.window, minimum=1)
        self.recent_share = check_share("recent_share", self.recent_share, maximum=1.0)
        check_int("sinks", self.sinks, minimum=0)
        check_int("seed", self.seed, minimum=0)

    @property
    def queries_needed(self) -> int:
        return self.window

    @property
    def min_slots(self) -> int:
        return self.sinks + 1

    @torch.no_grad()
    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        check_layer(self, layer, slots)
        if slots == layer.num_tokens:
            return whole_layer(layer)
        included = self.probabilities(layer, slots)
        indices = systematic_sample(included, self.seed + layer.layer_idx)
        wide = torch.float64 if layer.keys.dtype == torch.float64 else torch.float32
        beta = -included.gather(2, indices).log().to(wide)
        indices = indices.to(layer.keys.device)
        keys, values = gather_tokens(layer.keys, indices), gather_tokens(layer.values, indices)
        return CompactBlock(keys, values, beta.to(layer.keys.device))

    def probabilities(self, layer: LayerInput, slots: int) -> Tensor:
        """fp64 ``[B, Hkv, T]`` on the CPU: how probable it is that each token is kept; their sum is ``slots``."""
        window = min(self.window, layer.num_tokens)
        wide = torch.float64 if layer.keys.dtype == torch.float64 else torch.float32
        queries, keys = layer.queries[:, :, -window:].to(wide), layer.keys.to(wide)
        batch, num_kv_heads = keys.shape[:2]
        # keys lie in a narrow cone: centred, their directions differ (the paper, on preparing keys)
        keys = keys - keys.mean(2, keepdim=True)
        queries = queries.reshape(batch, num_kv_heads, -1, keys.shape[3])
        unit = [torch.nn.functional.normalize(x, dim=-1) for x in (queries, keys)]
        found = collision_probability(unit[0] @ unit[1].transpose(-1, -2), self.bits, self.tables).mean(2)
        sinks = leading_sinks(layer, self.sinks)
        recent = min(int(self.recent_share * slots), slots - sinks)
        return inclusion_probability(found.double().cpu(), slots, sinks, recent)
