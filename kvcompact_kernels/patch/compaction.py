# SPDX-License-Identifier: Apache-2.0
"""From tokens to slots: the compaction pass, and compaction of a running conversation.

Both are one mechanism. A session with a :class:`Compactor` is a cache whose layers, right after a layer's attention has
run, hand their tail to the method and keep its slots instead: so only one layer's keys and values exist at a time.
"""

import hashlib
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .._checks import check_int, check_tensor
from ..cache import CompactBlock, CompactCache, WindowBlock
from ..methods import LayerInput, Method
from ..methods.base import checked_block, finished_blocks, layer_budgets
from ..model_spec import ModelSpec, UnsupportedModelError
from .families import read_ropes, read_tokens
from .session import CompactSession

DEFAULT_RATIO = 8.0


class Compactor:
    """Turns the tail of a session's layers into slots.

    Args:
        method: makes the blocks.
        ratio, slots: the size asked for; exactly one is given.
        limit: compacts after a forward pass that leaves more tail tokens than this; None for never.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ModelSpec,
        method: Method,
        ratio: float | None,
        slots: int | None,
        limit: int | None,
        on_layer: Any = None,
    ):
        self.model, self.spec, self.method = model, spec, method
        self.ratio, self.slots, self.limit = ratio, slots, limit
        self.on_layer = on_layer
        self.full = [i for i, kind in enumerate(spec.layer_kinds) if kind == "full"]
        self.context: int | None = None
        self.queries: dict[int, Tensor] = {}
        self._budgets: dict[tuple[int, int], list[int]] = {}
        self._notes: dict[tuple[int, int], dict[str, Any]] = {}
        self._ropes: dict[str, Any] | None = None

    def after_attention(self, session: CompactSession, layer_idx: int, query: Tensor) -> None:
        if session.functional or self.limit is None:
            return
        layer = session.layers[layer_idx]
        self._record(layer_idx, query, session.tail_mask)
        tokens = layer.tail_length if self.context is None else self.context
        if tokens <= self.limit:
            return
        keys, values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
        if layer_idx == self.full[0]:
            self._ropes = read_ropes(self.model)  # now: dynamic scaling has seen this pass's length
            self._notes = {}
        real = session.tail_mask
        real = None if real is None else real[:, :tokens]
        lengths = session.lengths
        block = self._compact(layer_idx, keys, values, real, lengths, layer.start)
        layer.append_block(block, tokens)
        if self.on_layer is not None:
            self.on_layer()
        if layer_idx == self.full[-1]:
            if real is not None or lengths is not None:
                count = torch.full((keys.shape[0],), tokens) if real is None else real.sum(1).cpu()
                before = torch.tensor([layer.start - tokens]) if lengths is None else lengths.cpu()
                lengths = (count + before).to(keys.device)
            session.compacted(lengths)

    def select_rows(self, index: Tensor) -> None:
        self.queries = {i: q.index_select(0, index.to(q.device)) for i, q in self.queries.items()}

    def _record(self, layer_idx: int, query: Tensor, real: Tensor | None) -> None:
        needed = self.method.queries_needed
        if needed == 0:
            return
        if layer_idx in self.queries:
            query = torch.cat([self.queries[layer_idx], query.detach()], 2)
        if needed > 0:
            needed += 0 if real is None else int((~real).sum(1).max())
            query = query[:, :, -needed:]
        self.queries[layer_idx] = query.detach().clone() if needed > 0 else query.detach()

    def _compact(
        self, layer_idx: int, keys: Tensor, values: Tensor, real: Tensor | None, lengths: Tensor | None, start: int
    ) -> CompactBlock:
        """The block of one layer: rows with equal numbers of tokens together, others apart."""
        batch, tokens = keys.shape[0], keys.shape[2]
        for name, x in (("keys", keys), ("values", values)):
            if not x.isfinite().all():
                raise ValueError(
                    f"layer {layer_idx}: its {name} hold NaN or infinite values, so they cannot be compacted"
                )
        queries = self.queries.pop(layer_idx, None)
        counts = [tokens] * batch if real is None else real.sum(1).tolist()
        starts = [start] * batch if lengths is None else lengths.expand(batch).tolist()
        groups = defaultdict(list)
        for row in range(batch):
            groups[counts[row], starts[row]].append(row)
        if len(groups) == 1 and counts[0] == tokens:
            needed = self.method.queries_needed
            kept = queries if queries is None or needed < 0 else queries[:, :, -needed:]
            return self._one_group(layer_idx, keys, values, kept, starts[0])
        parts: list[Any] = [None] * batch
        for (count, first), rows in groups.items():
            if count == 0:
                nothing = keys.new_empty(0, keys.shape[3])
                parts = [[(nothing, nothing, None)] * keys.shape[1] if i in rows else p for i, p in enumerate(parts)]
                continue
            picked = [[self._valid(x, real, row) for row in rows] for x in (keys, values)]
            seen = None
            if queries is not None:
                kept = [self._valid(queries, real, row) for row in rows]
                if self.method.queries_needed > 0:
                    kept = [q[:, -self.method.queries_needed :] for q in kept]
                seen = torch.stack([q[:, -min(k.shape[1] for k in kept) :] for q in kept])
            block = self._one_group(layer_idx, torch.stack(picked[0]), torch.stack(picked[1]), seen, first)
            for row, heads in zip(rows, block.heads()):
                parts[row] = heads
        return CompactBlock.pack(parts)

    @staticmethod
    def _valid(x: Tensor, real: Tensor | None, row: int) -> Tensor:
        if real is None:
            return x[row]
        # queries may be of a second reading, as long as the first, or the newest ones only
        mask = real[row] if x.shape[2] == real.shape[1] else real[row, real.shape[1] - x.shape[2] :]
        return x[row][:, mask]

    def _one_group(
        self, layer_idx: int, keys: Tensor, values: Tensor, queries: Tensor | None, first: int
    ) -> CompactBlock:
        count = keys.shape[2]
        index = self.full.index(layer_idx)
        layer = LayerInput(
            layer_idx=index,
            num_layers=len(self.full),
            keys=keys,
            values=values,
            queries=queries,
            positions=torch.arange(first, first + count, device=keys.device),
            rope=self._ropes["full"],
            scale=self.spec.scales[layer_idx],
            notes=self._notes.setdefault((count, first), {}),
        )
        if self.slots_for(count) < self.method.min_slots:  # a running conversation's short row stays as it is
            return CompactBlock(keys.clone(), values.clone())
        block = self.method.compact_layer(layer, self._layer_slots(count)[index])
        return checked_block(self.method, block, layer, layer_idx)

    def slots_for(self, tokens: int) -> int:
        """Slots per KV head that ``tokens`` tokens get on average."""
        return min(self.slots, tokens) if self.slots is not None else max(1, math.ceil(tokens / self.ratio))

    def _layer_slots(self, tokens: int) -> list[int]:
        slots = self.slots_for(tokens)
        if (tokens, slots) not in self._budgets:
            budgets = layer_budgets(self.method, slots, tokens, len(self.full))
            self._budgets = {(tokens, slots): budgets}
        return self._budgets[tokens, slots]


def check_size(ratio: Any, slots: Any, default: float | None = DEFAULT_RATIO) -> tuple[float | None, int | None]:
    """The validated pair (ratio, slots), of which one is None."""
    if ratio is not None and slots is not None:
        raise ValueError(f"give ratio or slots, not both: got ratio={ratio!r} and slots={slots!r}")
    if slots is not None:
        return None, check_int("slots", slots, minimum=1)
    if ratio is None:
        return default, None
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a number, got {type(ratio).__name__}")
    if not math.isfinite(ratio) or ratio < 1:
        raise ValueError(f"ratio must be a finite number >= 1, got {ratio!r}")
    return float(ratio), None


def check_compactable(spec: ModelSpec) -> None:
    """Raises UnsupportedModelError for a model without full-attention layers."""
    if "full" not in spec.layer_kinds:
        raise UnsupportedModelError(
            f"every layer of this {spec.family} model has a sliding window of {spec.sliding_window} tokens and keeps no "
            "more than that: there is nothing to compact"
        )


def context_digest(ids: Tensor) -> str:
    """Identity of one row of token ids, padding left out."""
    return hashlib.sha256(ids.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()[:32]


def check_context(model: PreTrainedModel, input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor | None]:
    """The ids, padding moved to the left, and their bool mask (None when nothing is padded)."""
    check_tensor("input_ids", input_ids, ndim=2)
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must hold integers, got {input_ids.dtype}")
    if input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must hold at least one token, got shape {list(input_ids.shape)}")
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"input_ids must lie in [0, {vocabulary - 1}], got values from {low} to {high}")
    device = next(model.parameters()).device
    input_ids = input_ids.to(device)
    if attention_mask is None:
        return input_ids, None
    check_tensor("attention_mask", attention_mask, shape=tuple(input_ids.shape))
    mask = attention_mask.to(device).bool()
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"attention_mask hides every token of the rows {empty}: an empty context cannot be compacted")
    if mask.all():
        return input_ids, None
    order = mask.long().argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    first = int(mask.any(0).long().argmax())
    input_ids, mask = input_ids.gather(1, order)[:, first:], mask[:, first:]
    return input_ids, None if mask.all() else mask


def run_compaction(
    model: PreTrainedModel,
    spec: ModelSpec,
    method: Method,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    ratio: float | None,
    slots: int | None,
    progress: bool,
) -> CompactCache:
    """Reads the context with a patched model and compacts it, layer by layer."""
    check_compactable(spec)
    ids, mask = check_context(model, input_ids, attention_mask)
    tokens = ids.shape[1]
    counts = [tokens] * ids.shape[0] if mask is None else mask.sum(1).tolist()
    bar = None
    method.prepare(spec)
    compactor = Compactor(model, spec, method, ratio, slots, None, lambda: bar is not None and bar.update())
    for row, count in enumerate(counts):
        where = "" if len(counts) == 1 else f" (row {row})"
        if slots is not None and slots > count:
            raise ValueError(f"the context{where} has {count} tokens, fewer than the {slots} slots asked for")
        got = compactor.slots_for(count)
        if got < method.min_slots:
            raise ValueError(
                f"method {method.name!r} needs at least {method.min_slots} slots, but the {count} tokens of the "
                f"context{where} get {got}"
            )
        compactor._layer_slots(count)
    session = CompactSession(spec, compactor=compactor)
    twice = method.prefill_passes == 2
    modes = [(module, module.training) for module in model.modules()]
    bar = tqdm(total=len(compactor.full), desc=f"compacting {tokens} tokens", unit="layer", disable=not progress)
    try:
        model.eval()
        # in the model's own dtype: autocast would give keys and values different ones
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            if twice:
                read_tokens(model, ids, session, attention_mask=mask)
                ropes = read_ropes(model)
                windows = _windows(session, spec)
                compactor.context = tokens
            compactor.limit = 0
            read_tokens(model, ids, session, attention_mask=mask)
            if not twice:
                ropes = read_ropes(model)
                windows = _windows(session, spec)
    finally:
        bar.close()
        for module, training in modes:
            module.training = training
    blocks = iter(finished_blocks(method, [layer.block for layer in session.layers if not layer.is_sliding]))
    layers = [windows[i] if layer.is_sliding else next(blocks) for i, layer in enumerate(session.layers)]
    rows = [ids[i] if mask is None else ids[i][mask[i]] for i in range(ids.shape[0])]
    info = {
        "options": _options(method),
        "ratio": ratio,
        "slots": slots,
        "context_digest": [context_digest(row) for row in rows],
    }
    return CompactCache(
        tuple(layers),
        tokens,
        spec.fingerprint,
        {kind: ropes[kind] for kind in set(spec.layer_kinds)},
        None if mask is None else mask.sum(1),
        method.name,
        info,
    )


def _windows(session: CompactSession, spec: ModelSpec) -> dict[int, WindowBlock]:
    windows = {}
    for i, layer in enumerate(session.layers):
        if layer.is_sliding:
            first = max(0, layer.held - (spec.sliding_window - 1))
            windows[i] = WindowBlock(layer.keys[:, :, first:].clone(), layer.values[:, :, first:].clone())
    return windows


def _options(method: Method) -> dict[str, Any]:
    """The method's options as they can be written to a file."""
    plain = (str, int, float, bool, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in method.settings().items()}
