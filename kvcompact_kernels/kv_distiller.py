# SPDX-License-Identifier: Apache-2.0
"""KV-Distill (arXiv 2503.10337), fitted to caches: a scorer of tokens and a low-rank adapter for every compacted layer.

The scorer says which tokens' keys and values are kept, for each KV head; the adapter changes those that are kept. Both are
trained so that the frozen model says the same behind the few as behind all (``training/kv_distill.py``).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_int
from .cache import CompactBlock
from .reference.matching import accumulation_dtype
from .reference.selection import gather_tokens, top_tokens
from .rope import Rope
from .token_selector import ReaderConfig, TokenReader, reader_shapes, start_reader, token_features


@dataclass(frozen=True)
class DistillerConfig(ReaderConfig):
    """Sizes of scorer and adapter.

    Attributes:
        head_dim, num_kv_heads, hidden, kernel: of the scorer, see ``ReaderConfig``; the adapter mixes as many tokens.
        rank: of the adapter.
        sinks: first tokens of a context that are kept in any case, and as they are.
    """

    rank: int = 16
    sinks: int = 4

    def __post_init__(self):
        super().__post_init__()
        check_int("rank", self.rank, minimum=1)
        check_int("sinks", self.sinks, minimum=0)


def _shapes(config: DistillerConfig) -> dict[str, tuple[int, ...]]:
    heads, dim, rank = config.num_kv_heads, config.head_dim, config.rank
    return reader_shapes(config) | {
        "score_weight": (heads, config.hidden),
        "attention_weight": (heads,),
        "down_weight": (rank, config.features),
        "near_weight": (rank, config.kernel),
        "key_up": (heads, dim, rank),
        "value_up": (heads, dim, rank),
    }


def _start(config: DistillerConfig, generator: torch.Generator | None) -> dict[str, Tensor]:
    """The tokens that the context's own queries attend to are kept, and kept as they are."""
    made = {name: torch.zeros(shape) for name, shape in _shapes(config).items()} | start_reader(config, generator)
    made["attention_weight"].fill_(1.0)
    made["down_weight"].normal_(0.0, config.features**-0.5, generator=generator)
    made["near_weight"][:, config.kernel // 2] = 1.0
    return made


class KVDistiller(TokenReader):
    """Scorer and adapter for every compacted layer of one model; arguments and files as for ``LayerNetworks``."""

    file_format = "kvcompact-kv-distill"
    config_type = DistillerConfig
    shapes = staticmethod(_shapes)
    start = staticmethod(_start)

    def slots_for(self, tokens: int, ratio: float) -> int:
        """Slots that a context of so many tokens gets in training: one more than the sinks at least."""
        return max(self.config.sinks + 1, math.ceil(tokens / ratio))

    def forward(
        self,
        layer_idx: int,
        keys: Tensor,
        values: Tensor,
        rope: Rope,
        positions: Tensor,
        *,
        attention: Tensor,
        slots: int,
        sinks: int | None = None,
        noise: float = 0.0,
    ) -> CompactBlock:
        """The block of compacted layer ``layer_idx``, differentiable in the parameters.

        Args:
            keys, values: ``[B, Hkv, T, d]``, keys rotated as cached.
            rope, positions: of the keys; int64 ``[T]``.
            attention: ``[B, Hkv, T]``, what the context's own queries give each token, see ``own_attention``.
            slots: tokens that each head keeps, in [sinks + 1, T].
            sinks: first tokens that are kept in any case, unchanged; None takes the config's. 0 where the tokens do not
                begin the context (``positions[0] > 0``).
            noise: scale of Gumbel noise on the scores (natural-log units), from torch's global generator: in training it
                lets tokens in that are not quite among the best, so that their worth is learned too.

        Returns:
            A block with the keys' dtype. With gradients it has a ``beta`` that is 0 everywhere and through which the
            scores of the kept tokens get the gradient of their attention logits (straight-through); else it has none.
        """
        sinks = self.config.sinks if sinks is None else sinks
        sinks = sinks if int(positions[0]) == 0 else 0
        with torch.autocast(keys.device.type, enabled=False):
            free = rope.unrotate(keys, positions)
            features, log_attention = token_features(free, values, attention)
            measured, hidden = self.read(layer_idx, features)
            scores = self._scores(layer_idx, hidden, log_attention)
            chosen = scores.detach()
            if noise:
                uniform = torch.rand_like(chosen).clamp_(1e-7, 1 - 1e-7)
                chosen = chosen - noise * (-uniform.log()).log()
            indices = top_tokens(chosen, slots, first=sinks)
            new_keys, new_values = self._adapted(layer_idx, keys, values, rope, positions, measured, indices, sinks)
            beta = None
            if scores.requires_grad:
                kept = scores.gather(2, indices)
                changed = torch.arange(slots, device=keys.device) >= sinks
                beta = torch.where(changed, kept - kept.detach(), 0.0).to(new_keys.dtype)
        return CompactBlock(new_keys.to(keys.dtype), new_values.to(values.dtype), beta)

    def scores(self, layer_idx: int, keys: Tensor, values: Tensor, attention: Tensor) -> Tensor:
        """Scores to keep tokens by, fp32 ``[B, Hkv, T]``; keys un-rotated, the others as for :meth:`forward`."""
        features, log_attention = token_features(keys, values, attention)
        return self._scores(layer_idx, self.read(layer_idx, features)[1], log_attention)

    def _scores(self, layer_idx: int, hidden: Tensor, log_attention: Tensor) -> Tensor:
        p = self.layers[layer_idx]
        return F.linear(hidden, p["score_weight"]).transpose(1, 2) + p["attention_weight"][:, None] * log_attention

    def _adapted(
        self,
        layer_idx: int,
        keys: Tensor,
        values: Tensor,
        rope: Rope,
        positions: Tensor,
        measured: Tensor,
        indices: Tensor,
        sinks: int,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens ``indices [B, Hkv, t]`` with what the adapter adds, fp32 (fp64) ``[B, Hkv, t, d]``."""
        wide = accumulation_dtype(keys.dtype)
        p, config = self.layers[layer_idx], self.config
        batch, heads, slots = indices.shape
        low = F.linear(measured, p["down_weight"]).transpose(1, 2)
        low = F.conv1d(low, p["near_weight"][:, None], padding=config.kernel // 2, groups=config.rank)
        low = low[:, None].expand(batch, heads, config.rank, -1).transpose(2, 3)
        low = gather_tokens(low, indices)
        changed = (torch.arange(slots, device=keys.device) >= sinks)[:, None]
        # in units of how much each number varies from token to token, which differs a lot between layers
        width = heads * config.head_dim
        scales = p["deviation"][: 2 * width].view(2, heads, 1, config.head_dim)
        added = [low @ p[name].transpose(1, 2) * scale for name, scale in zip(("key_up", "value_up"), scales)]
        added = [torch.where(changed, x, 0.0) for x in added]
        # a rotation is linear: what is added is rotated by itself, so that adding nothing changes no bit
        turned = _rotate(rope, added[0], positions[indices])
        return gather_tokens(keys, indices).to(wide) + turned, gather_tokens(values, indices).to(wide) + added[1]


def _rotate(rope: Rope, x: Tensor, positions: Tensor) -> Tensor:
    """``x [B, Hkv, t, d]`` rotated to positions ``[B, Hkv, t]`` that differ from head to head."""
    return rope.rotate(x.flatten(0, 2), positions.flatten()).view_as(x)
