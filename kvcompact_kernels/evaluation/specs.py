# SPDX-License-Identifier: Apache-2.0
"""Names with options, as they stand on the command line: ``snapkv:window=16:pooling=max``."""

import json
from typing import Any


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options. Values are JSON where they parse as JSON, else strings.

    Raises:
        ValueError: an empty name, or an option without "=".
    """
    name, *pairs = text.strip().split(":")
    raw: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if raw and not (equals and key.isidentifier()):  # a colon inside a value, such as a path or a dict
            last = next(reversed(raw))
            raw[last] = f"{raw[last]}:{pair}"
        elif not equals or not key.isidentifier():
            raise ValueError(f"an option must read NAME=VALUE, got {pair!r} in {text!r}")
        else:
            raw[key] = value
    options = {}
    for key, value in raw.items():
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = {"True": True, "False": False, "None": None}.get(value, value)
    if not name:
        raise ValueError(f"there is no name in {text!r}")
    return name, options


def parse_lengths(text: str) -> list[int]:
    """``"512,1k,2k"`` as ``[512, 1024, 2048]``.

    Raises:
        ValueError: something else than whole numbers of tokens, each with an optional k.
    """
    lengths = []
    for part in text.lower().split(","):
        digits, factor = (part[:-1], 1024) if part.endswith("k") else (part, 1)
        if not digits.isdigit() or int(digits) < 1:
            raise ValueError(f"lengths must be whole numbers of tokens such as 512 or 4k, got {part!r}")
        lengths.append(int(digits) * factor)
    return sorted(set(lengths))


def parse_ratios(text: str) -> list[float]:
    """``"4,8,16"`` as numbers of at least 1.

    Raises:
        ValueError: something else.
    """
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"ratios must be numbers separated by commas, got {text!r}") from None
    if any(not 1 <= r < float("inf") for r in ratios):
        raise ValueError(f"ratios must be at least 1, got {text!r}")
    return sorted(set(ratios))
