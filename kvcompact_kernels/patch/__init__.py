# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models: patching, the compaction pass, and the cache that ``generate`` works on."""

from .families import FAMILIES, cache_argument, check_fingerprint, model_spec
from .model import compact, is_patched, patch_model, unpatch_model
from .session import CompactSession

__all__ = [
    "FAMILIES",
    "CompactSession",
    "cache_argument",
    "check_fingerprint",
    "compact",
    "is_patched",
    "model_spec",
    "patch_model",
    "unpatch_model",
]
