# SPDX-License-Identifier: Apache-2.0
"""What the library knows of a model: sizes, layer kinds, rotary embeddings, and the fingerprint that caches carry."""

from dataclasses import dataclass, field
from typing import Any

from .rope import Rope


class UnsupportedModelError(ValueError):
    """The model's family (or a feature that it uses) is not supported; the message names what is."""


@dataclass(frozen=True)
class ModelSpec:
    """A supported model, described without transformers.

    Attributes:
        family: transformers' ``model_type``: "llama", "qwen2", "qwen3", "mistral", "gemma3_text".
        layer_kinds: per layer "full" (compacted) or "sliding" (keeps its own window and is never compacted).
        scales: per layer, factor on the logits.
        ropes: layer kind -> rotary embedding, as the model uses it now.
        sliding_window: tokens that a sliding layer sees, or None.
        fingerprint: JSON-able identity (family, sizes, rope, a digest of the weights), compared when a cache is loaded.
    """

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_kinds: tuple[str, ...]
    scales: tuple[float, ...]
    ropes: dict[str, Rope] = field(compare=False)
    sliding_window: int | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict, compare=False)


def fingerprint_differences(found: dict[str, Any], wanted: dict[str, Any], check_weights: bool = True) -> list[str]:
    """One line per entry in which two fingerprints differ; empty when they describe the same model.

    Args:
        check_weights: False leaves out what a fine-tuned sibling changes: the digest of the weights, the vocabulary's size.
    """
    left_out = () if check_weights else ("weights", "vocab_size")
    different = [k for k in sorted(found.keys() | wanted.keys()) if k not in left_out and found.get(k) != wanted.get(k)]
    # said already by what else differs
    if "num_layers" in different:
        different = [k for k in different if k != "layer_kinds"]
    if len(different) > 1:
        different = [k for k in different if k != "weights"]
    return [f"{key} is {found.get(key)!r}, expected {wanted.get(key)!r}" for key in different]
