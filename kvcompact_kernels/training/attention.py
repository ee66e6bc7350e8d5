# SPDX-License-Identifier: Apache-2.0
"""What later tokens attend to in a context: their queries, and how much each of the context's tokens gets of them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model_spec import ModelSpec
from ..patch.families import read_tokens
from ..patch.session import CompactSession


class Recorder(CompactSession):
    """A session that stores nothing of a pass but what attention read and gave, by layer.

    Attributes:
        queries: ``[B, H, n, d]``, rotated.
        tail_keys, tail_values: ``[B, Hkv, n, d]`` of the new tokens.
        outputs: ``[B, n, H, d]``.
    """

    def __init__(self, spec: ModelSpec, past: Any):
        super().__init__(spec, past)
        self.functional = True
        self.queries: dict[int, Tensor] = {}
        self.tail_keys: dict[int, Tensor] = {}
        self.tail_values: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        self.tail_keys[layer_idx], self.tail_values[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def after_attention(self, layer_idx: int, query: Tensor, out: Tensor) -> None:
        self.queries[layer_idx], self.outputs[layer_idx] = query, out


def read_behind(
    model: Any, spec: ModelSpec, past: Any, rows: Sequence[Tensor], batch: int
) -> Iterator[tuple[list[int], Recorder]]:
    """Has the model read each of ``rows``, int64 ``[n]``, behind the cache ``past``.

    Yields ``(numbers, recorder)``: which rows were read together, padded on the right. Rows of like length share a pass.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(order), batch):
        numbers = order[first : first + batch]
        padded = torch.nn.utils.rnn.pad_sequence([rows[i] for i in numbers], batch_first=True).to(model.device)
        session = Recorder(spec, past)
        read_tokens(model, padded, session)
        yield numbers, session


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
