# SPDX-License-Identifier: Apache-2.0
"""Training: one loop, and what it trains."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "train_cartridge": "cartridge",
    "train_kv_distill": "kv_distill",
    "train_selector": "selector",
    "train_shares": "head_shares",
    "train_still": "still",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    # loaded when it is used: parts of training import one another
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
