# SPDX-License-Identifier: Apache-2.0
"""Compaction methods, one file each; every module of this folder registers its own when the folder is imported."""

import importlib
import pkgutil

from ._scored import ScoredMethod
from ._selection import SelectionMethod
from .base import LayerInput, Method, get_method, list_methods, register_method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)

__all__ = [
    "LayerInput",
    "Method",
    "ScoredMethod",
    "SelectionMethod",
    "get_method",
    "list_methods",
    "register_method",
]
