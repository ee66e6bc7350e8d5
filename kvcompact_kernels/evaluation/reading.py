# SPDX-License-Identifier: Apache-2.0
"""Reads a context once and lets many methods compact it, at equal bytes.

A layer is compacted after its attention has run, so what a method does to one layer never reaches the next one while a
context is read: every method sees the same keys, values and queries, and one reading serves them all.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cache import CompactBlock, CompactCache
from ..methods import LayerInput, Method
from ..methods.base import checked_block, finished_blocks, layer_budgets
from ..model_spec import ModelSpec
from .memory import peak_bytes

_FAILURES = Exception  # of any kind: methods may be the user's own programs, and must not end the others' run


@dataclass(frozen=True)
class Compacted:
    """What one method made of a context.

    Attributes:
        cache: None when the method failed.
        error: why.
        read_seconds: the model's own time: reading the context as often as the method wants it.
        compact_seconds: the method's own time, all layers.
        temporary_bytes: most memory that the method held beside its block while it compacted one layer.
        peak_bytes: most memory at one moment for the context, with layers compacted one after the other: blocks made so
            far, the keys, values and queries of the layer at hand, and the method's temporaries. Weights and activations
            of the model are not in it.
    """

    cache: CompactCache | None
    error: str | None = None
    read_seconds: float = 0.0
    compact_seconds: float = 0.0
    temporary_bytes: int = 0
    peak_bytes: int = 0


class _Fan(Method):
    """Hands each layer to several methods and keeps their blocks; what it returns itself is thrown away."""

    name, summary, source = "fan", "several methods at once", "none"

    def __init__(self, wanted: Sequence[tuple[Method, int]], device: torch.device):
        self._wanted = list(wanted)
        self._device = device
        self._passes = {method.prefill_passes for method, _ in wanted}
        self._budgets: list[list[int] | None] = [None] * len(self._wanted)
        self.blocks: list[list[CompactBlock]] = [[] for _ in self._wanted]
        self.errors: list[str | None] = [None] * len(self._wanted)
        self.seconds = [0.0] * len(self._wanted)
        self.temporary = [0] * len(self._wanted)
        self.peak = [0] * len(self._wanted)
        self.measuring = 0.0
        self._notes: list[dict[str, Any]] = [{} for _ in self._wanted]

    @property
    def prefill_passes(self) -> int:
        (passes,) = self._passes
        return passes

    @property
    def queries_needed(self) -> int:
        needed = [method.queries_needed for method, _ in self._wanted]
        return -1 if min(needed) < 0 else max(needed)

    def prepare(self, spec: ModelSpec) -> None:
        for i, (method, _) in enumerate(self._wanted):
            try:
                method.prepare(spec)
            except _FAILURES as error:
                self._fail(i, error)

    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        for i, (method, _) in enumerate(self._wanted):
            if self.errors[i] is None:
                try:
                    self._one(i, method, layer)
                except _FAILURES as error:
                    self._fail(i, error)
        return CompactBlock(layer.keys[:, :, :1].clone(), layer.values[:, :, :1].clone())

    def _one(self, i: int, method: Method, layer: LayerInput) -> None:
        if self._budgets[i] is None:
            self._budgets[i] = _budgets(method, self._wanted[i][1], layer)
        slots = self._budgets[i][layer.layer_idx]
        needed = method.queries_needed
        queries = layer.queries
        if needed == 0 or queries is None:
            queries = None
        elif needed > 0:
            queries = queries[:, :, -needed:]
        before = dict(self._notes[i])
        layer = replace(layer, queries=queries, notes=self._notes[i])
        self._wait()
        start = time.perf_counter()
        block = method.compact_layer(layer, slots)
        self._wait()
        elapsed = time.perf_counter() - start
        self.seconds[i] += elapsed
        self.measuring += elapsed
        block = checked_block(method, block, layer, layer.layer_idx)
        if layer.layer_idx == 0:
            # once more under measurement, which would spoil the time; the first layer has the largest budget
            start = time.perf_counter()
            same = replace(layer, notes=before)
            again, peak = peak_bytes(lambda: method.compact_layer(same, slots), self._device)
            self.temporary[i] = max(0, peak - again.nbytes)
            del again
            self.measuring += time.perf_counter() - start
        raw = sum(x.numel() * x.element_size() for x in (layer.keys, layer.values, queries) if x is not None)
        done = sum(b.nbytes for b in self.blocks[i])
        self.peak[i] = max(self.peak[i], done + raw + self.temporary[i] + block.nbytes)
        self.blocks[i].append(block)

    def finish_all(self) -> None:
        """What methods do to all layers together, at the end."""
        for i, (method, _) in enumerate(self._wanted):
            if self.errors[i] is not None or not method.joins_layers:
                continue
            held = sum(b.nbytes for b in self.blocks[i])
            start = time.perf_counter()
            try:
                self.blocks[i] = finished_blocks(method, self.blocks[i])
            except _FAILURES as error:
                self._fail(i, error)
                continue
            self._wait()
            self.seconds[i] += time.perf_counter() - start
            self.peak[i] = max(self.peak[i], held + sum(b.nbytes for b in self.blocks[i]))

    def _fail(self, i: int, error: Exception) -> None:
        self.errors[i] = f"{type(error).__name__}: {error}"
        self.blocks[i] = []

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _budgets(method: Method, slots: int, layer: LayerInput) -> list[int]:
    if slots < method.min_slots:
        raise ValueError(f"method {method.name!r} needs at least {method.min_slots} slots, the budget has {slots}")
    return layer_budgets(method, min(slots, layer.num_tokens), layer.num_tokens, layer.num_layers)


def read(model: Any, ids: Tensor, wanted: Sequence[tuple[Method, int]]) -> list[Compacted]:
    """Compacts the context ``ids [1, T]`` with every ``(method, slots)``; methods that want two readings share theirs.

    A method that fails gives a ``Compacted`` with an error; the others go on.
    """
    from ..patch import compact

    results: list[Compacted | None] = [None] * len(wanted)
    for passes in sorted({method.prefill_passes for method, _ in wanted}):
        chosen = [i for i, (method, _) in enumerate(wanted) if method.prefill_passes == passes]
        fan = _Fan([wanted[i] for i in chosen], ids.device)
        start = time.perf_counter()
        frame = compact(model, ids, fan, slots=1)
        seconds = time.perf_counter() - start - fan.measuring
        fan.finish_all()
        for place, i in enumerate(chosen):
            if fan.errors[place] is not None:
                results[i] = Compacted(None, fan.errors[place])
                continue
            blocks = iter(fan.blocks[place])
            layers = tuple(next(blocks) if isinstance(b, CompactBlock) else b for b in frame.layers)
            cache = replace(frame, layers=layers, method=wanted[i][0].name)
            results[i] = Compacted(cache, None, seconds, fan.seconds[place], fan.temporary[place], fan.peak[place])
    return results


def byte_budget(full: CompactCache, ratio: float) -> int:
    """Bytes that a cache may have at a ratio: those of the full cache by ratio, sliding windows as they are.

    Args:
        full: the same context with every token kept.
    """
    windows = full.nbytes - sum(block.nbytes for block in full.compact_layers)
    return windows + math.floor((full.nbytes - windows) / ratio)


class EqualBytes:
    """Finds, for each method, how many slots fit into a byte budget: biases, offsets and all else that a block holds count.

    What a slot of a method costs is learned from its first cache and asked for again when it does not hold: fewer slots
    where they are dearer than keys and values alone, more where layers share them.
    """

    ATTEMPTS = 5

    def __init__(self):
        self._bytes_per_slot: dict[str, float] = {}

    def read(
        self, model: Any, ids: Tensor, full: CompactCache, wanted: Sequence[tuple[str, Method, float]]
    ) -> list[Compacted]:
        """Compacts ``ids`` with every ``(label, method, ratio)`` into at most ``byte_budget(full, ratio)`` bytes."""
        tokens = ids.shape[1]
        windows = byte_budget(full, math.inf)
        plain = (full.nbytes - windows) / tokens  # keys and values of one token alone
        slots = []
        for label, _, ratio in wanted:
            free = byte_budget(full, ratio) - windows
            slots.append(max(1, min(tokens, math.floor(free / self._bytes_per_slot.get(label, plain) + 1e-9))))
        results: list[Compacted | None] = [None] * len(wanted)
        open_ones = list(range(len(wanted)))
        grown: set[int] = set()
        for _ in range(self.ATTEMPTS):
            made = read(model, ids, [(wanted[i][1], slots[i]) for i in open_ones])
            still_open = []
            for i, result in zip(open_ones, made):
                label, _, ratio = wanted[i]
                fits = result.cache is not None and result.cache.nbytes <= byte_budget(full, ratio)
                if fits or result.cache is None:
                    if fits or results[i] is None:
                        results[i] = result
                    more = self._affordable(result, byte_budget(full, ratio) - windows, windows, plain, tokens)
                    if i not in grown and more > slots[i]:
                        grown.add(i)
                        self._bytes_per_slot[label] = (result.cache.nbytes - windows) / slots[i]
                        slots[i] = more
                        still_open.append(i)
                    continue
                if results[i] is not None:  # more slots were tried, and do not fit
                    continue
                each = (result.cache.nbytes - windows) / slots[i]
                self._bytes_per_slot[label] = max(each, self._bytes_per_slot.get(label, 0.0))
                fewer = math.floor((byte_budget(full, ratio) - windows) / each + 1e-9)
                slots[i] = min(slots[i] - 1, fewer)
                if slots[i] < 1:
                    results[i] = Compacted(None, f"not even one slot fits into {byte_budget(full, ratio)} bytes")
                else:
                    still_open.append(i)
            open_ones = still_open
            if not open_ones:
                return results
        for i in open_ones:
            if results[i] is not None:
                continue
            results[i] = Compacted(None, f"no number of slots was found that fits into {self.ATTEMPTS} attempts")
        return results

    @staticmethod
    def _affordable(result: Compacted, free: int, windows: int, plain: float, tokens: int) -> int:
        """How many slots of this kind fit into ``free`` bytes, when they are cheaper than keys and values alone; else 0."""
        if result.cache is None:
            return 0
        held = torch.cat([block.slot_counts.flatten() for block in result.cache.compact_layers])
        each = (result.cache.nbytes - windows) / held.double().mean().item()
        return min(tokens, math.floor(free / each + 1e-9)) if each < 0.999 * plain else 0
