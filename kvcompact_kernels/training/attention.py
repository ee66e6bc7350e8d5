# SPDX-License-Identifier: Apache-2.0
"""What later tokens attend to in a context: their queries, and how much each of the context's tokens gets of them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model_spec import ModelSpec
from ..patch.session import CompactSession


class Recorder(CompactSession):
    """A session that stores nothing of a pass but its queries and keys, by layer."""

    def __init__(self, spec: ModelSpec, past: Any):
        super().__init__(spec, past)
        self.functional = True
        self.queries: dict[int, Tensor] = {}
        self.tail_keys: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        self.tail_keys[layer_idx] = key_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def after_attention(self, layer_idx: int, query: Tensor) -> None:
        self.queries[layer_idx] = query


def received_attention(
    queries: Tensor,
    tail_keys: Tensor,
    keys: Tensor,
    lengths: Sequence[int],
    scale: float,
    begins: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """How much attention a token of a context gets from the queries behind it.

    Args:
        queries: ``[R, H, n, d]``, rows of new tokens, padded on the right.
        tail_keys: ``[R, Hkv, n, d]``, of the same tokens, which see one another causally.
        keys: ``[1, Hkv, T, d]``, of the context.
        lengths: real tokens of each row.
        scale: factor on the logits.
        begins: first query of each row that counts; None for all.

    Returns:
        ``(most, rms)``, fp32 ``[R, Hkv, T]``: maximum and root mean square over a row's queries and the heads of the group.
    """
    kv_heads, tokens, dim = keys.shape[1:]
    most, rms = [], []
    for row in range(queries.shape[0]):
        count = lengths[row]
        first = 0 if begins is None else begins[row]
        q = queries[row, :, first:count].float().view(kv_heads, -1, count - first, dim) * scale
        there = q @ keys[0].float().transpose(-1, -2)[:, None]
        here = q @ tail_keys[row, :, :count].float().transpose(-1, -2)[:, None]
        later = torch.ones(count - first, count, dtype=torch.bool, device=q.device).triu(1 + first)
        prob = torch.cat([there, here.masked_fill(later, -math.inf)], -1).softmax(-1)[..., :tokens]
        most.append(prob.amax((1, 2)))
        rms.append(prob.square().mean((1, 2)).sqrt())
    return torch.stack(most), torch.stack(rms)
