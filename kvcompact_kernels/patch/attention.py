# SPDX-License-Identifier: Apache-2.0
"""The attention and mask functions that transformers calls for a patched model.

Both are registered under one name: without a mask function of that name transformers would pass no mask at all.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache import CompactBlock
from ..ops.compact_attention import compact_attention

NAME = "kvcompact"

_local = threading.local()


@dataclass
class Route:
    """What one forward pass of a patched model tells its attention layers; travels to them as a keyword argument.

    Attributes:
        previous: the attention implementation that the model had before it was patched.
        backend: of ``compact_attention``.
        session: the ``CompactSession`` of this pass, or None for an ordinary cache or no cache.
        columns: of a padded pass: position and validity of every logical column (see ``CompactSession.begin``).
        detached: the layers do not get the cache (gradient checkpointing takes it away), so this pass stores nothing.
    """

    previous: str
    backend: str
    session: Any = None
    columns: tuple[Tensor, Tensor] | None = None
    detached: bool = False


def register() -> None:
    """Makes both functions known to transformers; called by ``patch_model``, never at import."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


@contextmanager
def masks_of(implementation: str) -> Iterator[None]:
    """Outside of forward passes (generate prepares some there) masks are built for ``implementation``."""
    outer = getattr(_local, "outside", None)
    _local.outside = implementation
    try:
        yield
    finally:
        _local.outside = outer


def begin_pass(implementation: str) -> None:
    """Until :func:`end_pass` masks are built for ``implementation``."""
    _local.inside = implementation


def end_pass() -> None:
    _local.inside = None


def make_mask(*args: Any, **kwargs: Any) -> Any:
    """The mask that the model's own implementation would get; bool ``[B, 1, Lq, Lk]`` or None with a compact cache."""
    implementation = getattr(_local, "inside", None) or getattr(_local, "outside", None) or "sdpa"
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, **kwargs)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kvcompact: Route | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: query ``[B, H, Lq, d]``, key and value as the cache layer's ``update`` returned them.

    Returns ``(out [B, Lq, H, d], attention weights or None)``.
    """
    session = kvcompact.session if kvcompact is not None else None
    if session is None:
        previous = kvcompact.previous if kvcompact is not None else "sdpa"
        return _ordinary(previous, module, query, key, value, attention_mask, scaling, dropout, kwargs)
    layer = session.layers[module.layer_idx]
    if kvcompact.detached:
        key, value = layer.join(key, value)
    block = None if layer.is_sliding else layer.block
    if block is None:
        if layer.is_sliding:
            attention_mask = _window_mask(kvcompact.columns, layer.window, attention_mask, query.shape[2], key.shape[2])
        out, _ = _ordinary("sdpa", module, query, key, value, attention_mask, scaling, dropout, kwargs)
    else:
        out = _compact(block, query, key, value, attention_mask, scaling, dropout, kvcompact.backend)
    if not kvcompact.detached:
        session.after_attention(module.layer_idx, query, out)
    return out, None


def _compact(
    block: CompactBlock,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    backend: str,
) -> Tensor:
    if dropout:
        raise ValueError(
            f"attention dropout ({dropout}) does not work with a compact cache: set attention_dropout to 0"
        )
    kind = query.device.type
    if torch.is_autocast_enabled(
        kind
    ):  # as scaled_dot_product_attention does; query and value may differ in dtype here
        dtype = torch.get_autocast_dtype(kind)
        query, key, value, block = query.to(dtype), key.to(dtype), value.to(dtype), block.to(dtype=dtype)
    out = compact_attention(
        query,
        block.keys,
        block.values,
        block.beta,
        offsets=block.offsets,
        tail_keys=key,
        tail_values=value,
        # causality is the op's own; of the mask only the hidden keys are news, and the last query sees all others
        tail_mask=None if attention_mask is None else attention_mask[:, 0, -1].expand(query.shape[0], -1),
        num_kv_heads=key.shape[1],
        scale=scaling,
        backend=backend,
    )
    return out.transpose(1, 2).contiguous()


def _window_mask(
    columns: tuple[Tensor, Tensor] | None, window: int, mask: Tensor | None, new: int, keys: int
) -> Tensor | None:
    """The mask of a sliding layer: transformers' own, unless something is padded.

    transformers counts a window in cache columns; padding between context and question would push real tokens out of it.
    """
    if columns is None:
        return mask
    position, real = (x[:, x.shape[1] - keys :] for x in columns)
    distance = position[:, keys - new :, None] - position[:, None, :]
    seen = (distance >= 0) & (distance < window) & real[:, None, :]
    return seen[:, None]


def _ordinary(previous, module, query, key, value, attention_mask, scaling, dropout, kwargs):
    """The model's own attention function, with its own arguments."""
    if previous == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[previous]
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
