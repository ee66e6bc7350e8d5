# SPDX-License-Identifier: Apache-2.0
"""What the methods share: checks of options and layers, and the base of those that keep tokens as they are."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._checks import check_choice, check_int
from ..cache import CompactBlock
from ..ops import pack_slots
from .base import SHARES, LayerInput, Method, get_method, list_methods


def check_share(name: str, value: object, minimum: float = 0.0, maximum: float = math.inf) -> float:
    """Returns ``value`` when it is a finite number in ``[minimum, maximum]``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or not minimum <= value <= maximum:
        allowed = f"at least {minimum}" if maximum == math.inf else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{name} must be finite and {allowed}, got {value}")
    return float(value)


def wrapped_scorer(kind: type[Method], scorer: str, options: dict[str, Any]) -> Any:
    """The method ``scorer`` with its ``options``, for a method that works with another's choice.

    Raises:
        ValueError, TypeError: no registered method of that ``kind`` has the name, or it refuses an option.
    """
    check_choice("scorer", scorer, tuple(name for name, cls in list_methods().items() if issubclass(cls, kind)))
    if not isinstance(options, dict):
        raise TypeError(f"options must be a dict of the scorer's options, got {type(options).__name__}")
    if options.get(SHARES) is not None:
        raise ValueError(f"options must leave out {SHARES}: the scores alone are used")
    return get_method(scorer, **options)


def check_layer(method: Method, layer: LayerInput, slots: int) -> None:
    """The layer can be compacted to ``slots`` slots by ``method``.

    Raises:
        TypeError, ValueError: slots is no whole number between the method's minimum and the layer's tokens, the method's
            queries are missing, or keys, values or queries hold NaN or infinities.
    """
    check_int("slots", slots, minimum=1)
    if not method.min_slots <= slots <= layer.num_tokens:
        raise ValueError(
            f"slots must be in [{method.min_slots}, {layer.num_tokens}] for method {method.name!r} and a context of "
            f"{layer.num_tokens} tokens, got {slots}"
        )
    needed = method.queries_needed
    if needed:
        wanted = layer.num_tokens if needed < 0 else min(needed, layer.num_tokens)
        if layer.queries is None or layer.queries.shape[2] < wanted:
            got = "none" if layer.queries is None else layer.queries.shape[2]
            raise ValueError(f"queries of layer {layer.layer_idx}: method {method.name!r} needs {wanted}, got {got}")
    named = {"keys": layer.keys, "values": layer.values, "queries": layer.queries if needed else None}
    for name, tensor in named.items():
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"{name} of layer {layer.layer_idx} hold NaN or infinities")


def whole_layer(layer: LayerInput) -> CompactBlock:
    """Every token of the layer, in memory of its own."""
    return CompactBlock(layer.keys.clone().contiguous(), layer.values.clone().contiguous())


def leading_sinks(layer: LayerInput, sinks: int) -> int:
    """``sinks`` where the layer's tokens begin the context; 0 for a later part of a running conversation."""
    return sinks if int(layer.positions[0]) == 0 else 0


@dataclass
class SelectionMethod(Method):
    """A method that keeps some tokens, unchanged and at their own positions, and frees the others."""

    @abstractmethod
    def select(self, layer: LayerInput, slots: int) -> Tensor:
        """Ascending int64 indices ``[B, Hkv, slots]`` or ``[slots]`` of the tokens to keep."""

    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        check_layer(self, layer, slots)
        if slots == layer.num_tokens:
            return whole_layer(layer)
        indices = self.select(layer, slots)
        return CompactBlock(*pack_slots(layer.keys, layer.values, indices.to(layer.keys.device)))
