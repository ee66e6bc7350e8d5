# SPDX-License-Identifier: Apache-2.0
"""``CompactSession``: the transformers cache of one conversation on top of compact blocks.

The blocks are shared and never written to; each session owns only its tail, the ordinary tokens that came after them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..cache import CompactBlock, CompactCache, WindowBlock
from ..model_spec import ModelSpec

if TYPE_CHECKING:
    from .compaction import Compactor


class _Layer(CacheLayerMixin):
    """What both kinds of layer share: a batch that grows from one row to as many as the first tokens have."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def lazy_initialization(self, *args: Any) -> None:
        self.is_initialized = True

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @property
    def max_batch_size(self) -> int:
        return 1 if self.keys is None else self.keys.shape[0]

    def offload(self) -> None:
        raise NotImplementedError("a compact cache cannot be offloaded by transformers: use CompactCache.to")

    prefetch = offload


class CompactLayer(_Layer):
    """A block of slots (or none yet) followed by a tail; transformers' ``keys`` and ``values`` are the tail alone."""

    def __init__(self, block: CompactBlock | None, start: int):
        super().__init__()
        self.is_initialized = True
        self.source = block
        self.block = block
        self.rows: Tensor | None = None
        self.start = start
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def tail_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_seq_length(self) -> int:
        return self.start + self.tail_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Mask columns and the logical position of the first: the tail only, for slots are visible to every query."""
        if isinstance(query_length, Tensor):  # cache_position, before transformers 5.4
            query_length = query_length.shape[0]
        return self.tail_length + query_length, self.start

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends to the tail and returns it."""
        tracked = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (key_states, value_states, self.keys, self.values)
        )
        if tracked:  # autograd keeps what it saved: nothing is written in place
            self.keys, self.values = self.join(key_states, value_states)
            self._buffers = None
        else:
            self._append(key_states, value_states)
        return self.keys, self.values

    def join(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The tail with new tokens behind it; stores nothing."""
        if self.keys is None:
            return key_states, value_states
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Writes into a buffer that grows geometrically, so that a token costs no copy of the tail."""
        batch, heads, new, dim = key_states.shape
        old = self.tail_length
        if old == 0 and new > 1:  # a prompt: held as it came, the buffer starts with the next token
            self.keys, self.values, self._buffers = key_states, value_states, None
            return
        buffers = self._buffers
        usable = (
            buffers is not None
            and buffers[0].shape[2] >= old + new
            and (torch.is_inference_mode_enabled() or not buffers[0].is_inference())
        )
        if not usable:
            size = old + new + max(64, (old + new) // 2)
            buffers = tuple(x.new_empty(batch, heads, size, dim) for x in (key_states, value_states))
            if old:
                buffers[0][:, :, :old], buffers[1][:, :, :old] = self.keys.detach(), self.values.detach()
            self._buffers = buffers
        buffers[0][:, :, old : old + new], buffers[1][:, :, old : old + new] = key_states, value_states
        self.keys, self.values = (x[:, :, : old + new] for x in buffers)

    def append_block(self, block: CompactBlock, tokens: int) -> None:
        """Puts a block that stands for the whole tail of ``tokens`` tokens behind the present one; drops the tail."""
        self.block = self.source = block if self.block is None else CompactBlock.cat([self.block, block])
        self.rows = None
        self.start += tokens
        self.keys = self.values = self._buffers = None

    def select_rows(self, index: Tensor) -> None:
        if self.source is not None and self.source.batch_size > 1:
            index = index.to(self.source.keys.device)
            rows = torch.arange(self.source.batch_size, device=index.device) if self.rows is None else self.rows
            chosen = rows[index]
            if chosen.shape != rows.shape or not torch.equal(chosen, rows):  # beams of one request share their block
                self.block, self.rows = self.source.index_batch(chosen), chosen
        if self.keys is not None:
            index = index.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
            self._buffers = None

    def check_shorten(self, tokens: int) -> None:
        if tokens > self.tail_length:
            raise ValueError(
                f"cannot crop {tokens} tokens: only the {self.tail_length} behind the compacted {self.start} can be cropped"
            )

    def shorten(self, tokens: int) -> None:
        """Forgets the newest ``tokens`` tokens of the tail."""
        keep = self.tail_length - tokens
        self.keys, self.values = (self.keys[:, :, :keep], self.values[:, :, :keep]) if keep else (None, None)

    def reset(self) -> None:
        self.keys = self.values = self._buffers = None


class WindowLayer(_Layer):
    """A sliding-window layer: the last tokens, as they are."""

    is_sliding = True

    def __init__(self, block: WindowBlock | None, start: int, window: int):
        super().__init__()
        self.is_initialized = True
        self.block = block
        self.start = start
        self.window = window
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.keys, self.values = (None, None) if self.block is None else (self.block.keys, self.block.values)
        self.length = self.start
        self.slack = 0

    @property
    def held(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        if isinstance(query_length, Tensor):
            query_length = query_length.shape[0]
        return self.held + query_length, self.length - self.held

    def activate_past_recording(self) -> None:
        """Keeps what leaves the window until the next crop (assisted decoding rolls back)."""
        self.record_past = True

    def join(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            return key_states, value_states
        batch = key_states.shape[0]
        old = [x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (self.keys, self.values)]
        return torch.cat([old[0], key_states], 2), torch.cat([old[1], value_states], 2)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.join(key_states, value_states)
        self.length += key_states.shape[2]
        self.keys, self.values = keys, values
        if not self.record_past:
            self._trim()
        return keys, values

    def _trim(self) -> None:
        keep = self.window - 1 + self.slack
        if self.held > keep:
            # a copy: a view would keep the whole prompt alive
            self.keys, self.values = (x[:, :, x.shape[2] - keep :].clone() for x in (self.keys, self.values))

    def left_align_padding(self, real: Tensor) -> None:
        """Moves hidden columns (``real`` bool ``[B, all columns]``) to the left of the real ones."""
        if self.keys is not None:
            order = real[:, real.shape[1] - self.held :].long().argsort(dim=1, stable=True)
            order = order[:, None, :, None].expand_as(self.keys)
            self.keys, self.values = self.keys.gather(2, order), self.values.gather(2, order)
        self.slack = 0
        self._trim()

    def select_rows(self, index: Tensor) -> None:
        if self.keys is not None and self.keys.shape[0] > 1:
            index = index.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)

    def check_shorten(self, tokens: int) -> None:
        if tokens > self.length - self.start:
            raise ValueError(f"cannot crop {tokens} tokens: only {self.length - self.start} came after the context")
        if tokens and self.held - tokens < min(self.window - 1, self.length - tokens):
            raise ValueError(
                f"cannot crop {tokens} tokens: the window has dropped what it would show again "
                "(activate_past_recording keeps it)"
            )

    def shorten(self, tokens: int) -> None:
        if tokens:
            self.keys, self.values = (x[:, :, : x.shape[2] - tokens] for x in (self.keys, self.values))
            self.length -= tokens
        self._trim()


class CompactSession(Cache):
    """A transformers ``Cache`` made from a :class:`CompactCache`; what a patched model's forward pass works on.

    ``generate`` makes one per call, so that the CompactCache never changes; the session comes back as
    ``generate(..., return_dict_in_generate=True).past_key_values`` (``.cache`` since transformers 5.24) and can be passed to
    the next call together with the ids that it has not seen (the last generated token among them).

    Attributes:
        lengths: None, or int64 ``[B]``: context tokens of each row, without padding.
        tail_mask: None (no padding), or bool ``[B, tail]``: which tokens after the context are real.
        columns: None, or position (int64) and validity (bool) ``[B, T + tail + new]`` of the pass that runs.
        chunk_size: None, or the most new tokens that one forward pass reads; longer inputs are read in several, and the
            outputs are the last one's.
        functional: a forward pass stores nothing: many passes, or a recomputed one, see the same cache.
        reading: a patched model's forward pass has begun: its attention sees the slots.
    """

    def __init__(self, spec: ModelSpec, cache: CompactCache | None = None, compactor: Compactor | None = None):
        start = 0 if cache is None else cache.logical_length
        layers: list[_Layer] = []
        for index, kind in enumerate(spec.layer_kinds):
            block = None if cache is None else cache.layers[index]
            if kind == "full":
                layers.append(CompactLayer(block, start))
            else:
                layers.append(WindowLayer(block, start, spec.sliding_window))
        super().__init__(layers=layers)
        self.spec = spec
        self.lengths = None if cache is None else cache.lengths
        self.context_batch = None if cache is None else cache.batch_size
        self.initial_lengths = self.lengths
        self.tail_mask: Tensor | None = None
        self.functional = False
        self.reading = False
        self.chunk_size: int | None = None
        self.compactor = compactor
        self._full = [layer for layer in layers if not layer.is_sliding]
        self.columns: tuple[Tensor, Tensor] | None = None
        self._unaligned: Tensor | None = None

    @property
    def context_length(self) -> int:
        """Logical tokens that the blocks stand for, padding included."""
        return self._full[0].start

    @property
    def tail_length(self) -> int:
        return self.get_seq_length() - self.context_length

    @property
    def batch_size(self) -> int | None:
        """Rows of the session; None while one context (or none) still fits any number of questions."""
        if self._full[0].keys is not None:
            return self._full[0].keys.shape[0]
        if self.context_batch is not None and self.context_batch > 1:
            return self.context_batch
        return None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._full[0].get_seq_length()

    def check_batch(self, batch: int) -> None:
        """Raises ValueError when ``batch`` rows of new tokens do not fit."""
        if self.batch_size not in (None, batch):
            raise ValueError(
                f"the input has batch size {batch}, but the compact cache has {self.batch_size}: pass one row per context "
                "(a cache of batch size 1 takes any number)"
            )

    def begin(
        self, attention_mask: Tensor | None, batch: int, new: int, device: torch.device, store: bool
    ) -> Tensor | None:
        """Takes note of a forward pass over ``new`` tokens.

        Args:
            attention_mask: None, ``[B, new]``, or ``[B, T + tail + new]`` (the context's columns are not read).
            store: False for a pass that changes nothing.

        Returns:
            None when nothing is padded, else the mask of all logical positions, int64 ``[B, T + tail + new]``.
        """
        self.check_batch(batch)
        self.reading = True
        self._realign_windows()
        mask = self._tail_mask(attention_mask, batch, new, device)
        if store:
            self.tail_mask = mask
        if mask is None and self.lengths is None:
            self.columns = None
            return None
        if mask is None:
            mask = torch.ones(batch, self.tail_length + new, dtype=torch.bool, device=device)
        lengths = self._context_lengths(batch, device)[:, None]
        whole = torch.cat([self.context_mask(batch, device), mask], 1)
        # columns of the context count backwards from its end, those behind it forwards
        before = lengths - self.context_length + torch.arange(self.context_length, device=device)
        self.columns = (torch.cat([before, lengths + mask.long().cumsum(1) - 1], 1), whole)
        for layer in self.layers:
            if layer.is_sliding:
                layer.slack = int((~mask).sum(1).max())
        return whole.long()

    def end(self) -> None:
        """The forward pass is over, or has failed."""
        self.reading = False

    def generation_mask(self, attention_mask: Tensor | None, batch: int, new: int, device: torch.device) -> Tensor:
        """What transformers' ``generate`` counts positions from: int64 ``[B, T + tail + new]``, nothing left out."""
        tail = self._tail_mask(attention_mask, batch, new, device)
        if tail is None:
            tail = torch.ones(batch, self.tail_length + new, dtype=torch.bool, device=device)
        return torch.cat([self.context_mask(batch, device), tail], 1).long()

    def positions(self, new: int) -> Tensor | None:
        """int64 ``[B, new]`` positions of the newest tokens, 0 at padding; None when all rows count alike."""
        return None if self.columns is None else self.columns[0][:, -new:].clamp(min=0)

    def context_mask(self, batch: int, device: torch.device) -> Tensor:
        """bool ``[batch, T]``: the context's logical columns, left-padded to its rows' lengths."""
        column = torch.arange(self.context_length, device=device)
        return column[None] >= self.context_length - self._context_lengths(batch, device)[:, None]

    def _context_lengths(self, batch: int, device: torch.device) -> Tensor:
        if self.lengths is None:
            return torch.full((batch,), self.context_length, device=device)
        return self.lengths.to(device).expand(batch)

    def _tail_mask(self, attention_mask: Tensor | None, batch: int, new: int, device: torch.device) -> Tensor | None:
        tail = self.tail_length
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
                shape = (
                    tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
                )
                raise ValueError(
                    f"attention_mask must be 2-D with a compact cache ([batch, new tokens] or [batch, all tokens]), got {shape}"
                )
            whole = self.context_length + tail + new
            if attention_mask.shape[0] != batch or attention_mask.shape[1] not in (new, whole):
                raise ValueError(
                    f"attention_mask must have shape [{batch}, {new}] or [{batch}, {whole}], got {list(attention_mask.shape)}"
                )
            given = attention_mask.to(device).bool()
            if given.shape[1] == whole:
                given = given[:, self.context_length :]
            if given.shape[1] == tail + new:
                return None if given.all() else given
            if given.all() and self.tail_mask is None:
                return None
        else:
            if self.tail_mask is None:
                return None
            given = torch.ones(batch, new, dtype=torch.bool, device=device)
        old = self.tail_mask
        if old is None:
            old = torch.ones(batch, tail, dtype=torch.bool, device=device)
        return torch.cat([old, given], 1)

    def after_attention(self, layer_idx: int, query: Tensor, out: Tensor) -> None:
        """Called by the attention function once a layer's attention has run: query ``[B, H, Lq, d]``, out ``[B, Lq, H, d]``."""
        if self.compactor is not None and not self.layers[layer_idx].is_sliding:
            self.compactor.after_attention(self, layer_idx, query)

    def compacted(self, lengths: Tensor | None) -> None:
        """All layers have turned their tails into slots; ``lengths`` are the rows' real tokens, None if all are."""
        self._unaligned = None if self.columns is None else self.columns[1]
        self.lengths, self.tail_mask = lengths, None
        self.context_batch = self._full[0].block.batch_size

    def _realign_windows(self) -> None:
        """After a compaction padding stands left of the context: sliding layers move theirs there too."""
        if self._unaligned is None:
            return
        for layer in self.layers:
            if layer.is_sliding:
                layer.left_align_padding(self._unaligned)
        self._unaligned = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if not self.reading:
            raise TypeError(
                "the cache is a CompactSession, whose slots this model would not see: it is not, or no longer, patched "
                "(kvcompact_kernels.patch_model)"
            )
        layer = self.layers[layer_idx]
        return layer.join(key_states, value_states) if self.functional else layer.update(key_states, value_states)

    def _select(self, index: Tensor) -> None:
        for layer in self.layers:
            layer.select_rows(index)
        if self.compactor is not None:
            self.compactor.select_rows(index)
        if self.tail_mask is not None:
            self.tail_mask = self.tail_mask[index.to(self.tail_mask.device)]
        if self.lengths is not None and self.lengths.numel() > 1:
            self.lengths = self.lengths[index.to(self.lengths.device)]
        if self.context_batch is not None and self.context_batch > 1:
            self.context_batch = index.numel()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx``; a block that all rows share stays where it is."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.batch_size is not None:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        self._select(indices)

    def crop(self, max_length: int) -> None:
        """Forgets the newest tokens: down to ``max_length`` logical tokens, or ``-max_length`` of them if negative."""
        remove = -max_length if max_length <= 0 else max(0, self.get_seq_length() - max_length)
        for layer in self.layers:
            layer.check_shorten(remove)
        for layer in self.layers:
            layer.shorten(remove)
        if self.tail_mask is not None and remove:
            self.tail_mask = self.tail_mask[:, :-remove]

    def reset(self) -> None:
        """Back to the bare context."""
        for layer in self.layers:
            layer.reset()
        self.tail_mask, self.lengths = None, self.initial_lengths
