# SPDX-License-Identifier: Apache-2.0
"""``finch``: what the prompt attends to, moved together."""

from dataclasses import dataclass

from torch import Tensor, arange

from .._checks import check_int
from ..cache import CompactBlock
from ..ops.compact_attention import compact_attention
from ..ops.key_scores import key_scores
from ..reference.selection import gather_tokens
from ._scored import ScoredMethod
from ._selection import check_layer, leading_sinks, whole_layer
from .base import LayerInput, register_method


@register_method
@dataclass
class Finch(ScoredMethod):
    """Keeps the prompt's tokens and those that they attend to most, and closes the gaps between their positions.

    FINCH (Corallo and Papotti, arXiv 2408.00167, TACL 12, 2024), in one piece instead of chunk by chunk. The prompt is the
    end of what is compacted: it takes a question there (query-aware use) to be more than SnapKV without pooling. Each
    query's attention is weighted by the number of tokens before it. Kept keys are re-rotated to successive positions. The
    paper continues to count behind them; here the cache keeps its logical length T, so the slots get the positions
    ``T - slots ... T - 1``, which is the same to every later token, for only distances matter to RoPE.

    Two things differ from the authors' code: there all heads of a layer add their attention up and keep the same tokens, here
    each KV head has its own; and there the prompt is not kept but read once more behind the compacted text.

    Attributes:
        window: tokens of the prompt, which are kept as far as half of the slots take them.
        rerotate: False leaves keys at their own positions.
        sinks: first tokens of the context kept in any case (the paper has no such rule: 0).
    """

    name = "finch"
    summary = "what the prompt's tokens attend to, with the gaps between positions closed"
    source = "FINCH, arXiv 2408.00167 (TACL 12, 2024), prompt-guided selection"

    window: int = 32
    rerotate: bool = True
    sinks: int = 4

    def __post_init__(self):
        check_int("window", self.window, minimum=1)
        if not isinstance(self.rerotate, bool):
            raise TypeError(f"rerotate must be True or False, got {self.rerotate!r}")
        check_int("sinks", self.sinks, minimum=0)

    @property
    def queries_needed(self) -> int:
        return self.window

    @property
    def min_slots(self) -> int:
        return self.sinks + 1

    def ends(self, layer: LayerInput, slots: int) -> tuple[int, int]:
        sinks = leading_sinks(layer, self.sinks)
        return sinks, min(self.window, (slots - sinks) // 2)

    def scores(self, layer: LayerInput) -> Tensor:
        tokens, window = layer.num_tokens, min(self.window, layer.num_tokens)
        queries = layer.queries[:, :, -window:]
        tail = {"tail_keys": layer.keys, "tail_values": layer.values, "num_kv_heads": layer.keys.shape[1]}
        _, lse = compact_attention(queries, [], [], **tail, scale=layer.scale, return_lse=True)
        # a later query spreads its attention over more tokens: weighted by how many it has before it
        before = arange(tokens - window, tokens, device=lse.device).clamp(min=1)
        scores = key_scores(queries, layer.keys, lse=lse - before.to(lse.dtype).log(), scale=layer.scale)
        # a token of the prompt is seen by those behind it only: per query that sees it
        return scores / (tokens - arange(tokens, device=scores.device)).clamp(max=window)

    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        check_layer(self, layer, slots)
        if slots == layer.num_tokens:
            return whole_layer(layer)
        indices = self.select(layer, slots)
        keys = gather_tokens(layer.keys, indices)
        if self.rerotate:
            here, rope = layer.positions, layer.rope
            free = gather_tokens(rope.unrotate(layer.keys, here), indices)
            keys = rope.rotate(free, here[-slots:])
        return CompactBlock(keys, gather_tokens(layer.values, indices))
