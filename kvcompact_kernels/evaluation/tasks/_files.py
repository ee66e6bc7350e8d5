# SPDX-License-Identifier: Apache-2.0
"""Reading the files that users bring along."""

import json
import re
from pathlib import Path
from typing import Any

from ..._checks import BadFileError
from .base import Room

LETTERS = "ABCDEFGH"


def check_path(option: str, value: Any, what: str) -> Path:
    """The file.

    Raises:
        TypeError: no text. FileNotFoundError: there is no such file.
    """
    if not isinstance(value, str):
        raise TypeError(f"{option} must be a path, got {value!r}")
    path = Path(value).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: {what}")
    return path


def read_json(path: Path) -> Any:
    """The file's content.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFileError(f"{path} is not JSON: {error}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line.

    Raises:
        ValueError: a line is something else; the message names it.
    """
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise BadFileError(f"{path}, line {i + 1} is not a JSON object: {error}") from error
    if not rows:
        raise BadFileError(f"{path} is empty")
    return rows


def take(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """An entry of the wanted type.

    Raises:
        ValueError: it is missing or of another type.
    """
    value = row.get(key) if isinstance(row, dict) else None
    fits = isinstance(value, kind)
    if not fits:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise BadFileError(f"{where}: expected {key!r} of type {kind.__name__}, found {found}")
    return value


def beginning(room: Room, text: str, tokens: int | None = None) -> str:
    """As many words from the start as fit into the room."""
    tokens = room.tokens if tokens is None else tokens
    return _longest(room, text, tokens, lambda words, n: "".join(words[:n]))


def both_ends(room: Room, text: str) -> str:
    """The text with its middle left out, so that it fits into the room (as LongBench cuts, arXiv 2308.14508)."""
    return _longest(
        room, text, room.tokens, lambda words, n: "".join(words[: (n + 1) // 2]) + "".join(words[len(words) - n // 2 :])
    )


def _longest(room: Room, text: str, tokens: int, part) -> str:
    if room.count(text) <= tokens:
        return text
    words = re.findall(r"\S+\s*", text)
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if room.count(part(words, middle)) <= tokens else (low, middle - 1)
    if low == 0:
        raise ValueError(f"length {room.length} is too small: not one word of the document fits")
    return part(words, low)


def multiple_choice(question: str, options: list[str]) -> str:
    """The question with lettered options and what to answer with."""
    lines = [question.strip(), *(f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options))]
    return "\n".join([*lines, "Answer with the letter of the right option only."])
