# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the public functions: each error names the argument, what came and what is allowed."""

import os

import torch
from torch import Tensor


class BadFileError(ValueError):
    """A file that is there, but is truncated, damaged, of another kind or of a newer format."""


def check_file(path: str | os.PathLike) -> None:
    """Raises FileNotFoundError or IsADirectoryError unless ``path`` is a file."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder, and a file is needed")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")


def check_tensor(
    name: str,
    value: object,
    *,
    ndim: int | None = None,
    shape: tuple[int | None, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Returns ``value`` when it is a tensor of the wanted rank, shape (None = any size), dtype and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    if shape is not None:
        wanted = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
        if value.ndim != len(shape) or any(s is not None and s != v for s, v in zip(shape, value.shape)):
            raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(_dtype(d) for d in dtypes)}, got {_dtype(value.dtype)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    return value


def check_layers(**lists: object) -> int:
    """The common length of lists (or tuples) with an entry a layer."""
    first, count = "", 0
    for name, value in lists.items():
        if not isinstance(value, (list, tuple)):
            wanted = (
                f"a list with an entry a layer, as {first} is" if first else "a tensor, or a list with an entry a layer"
            )
            raise TypeError(f"{name} must be {wanted}; got {type(value).__name__}")
        if not value:
            raise ValueError(f"{name} must hold at least one layer, got an empty list")
        if first and len(value) != count:
            raise ValueError(f"{name} must hold {count} layers, as {first} does, got {len(value)}")
        first, count = first or name, len(value)
    return count


def check_int(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """Returns ``value`` when it is a whole number in ``[minimum, maximum]``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum or (maximum is not None and value > maximum):
        allowed = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return value


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """Returns ``value`` when it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
