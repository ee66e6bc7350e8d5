# SPDX-License-Identifier: Apache-2.0
"""How many slots each KV head of a model gets, relative to the others, and the file that says so.

At equal bytes it matters which heads the slots belong to. ``kvcompact train shares`` measures it, and every method that makes
each head's slots by themselves takes the file as its option ``shares``.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ._checks import BadFileError, check_file
from .evaluation.store import write_atomically
from .model_spec import ModelSpec, fingerprint_differences
from .reference.selection import proportional_counts

FORMAT, FORMAT_VERSION = "kvcompact-head-shares", 1


def check_shares(shares: Sequence[Sequence[float]], num_kv_heads: int | None = None) -> tuple[tuple[float, ...], ...]:
    """``[layers][Hkv]`` as tuples.

    Raises:
        ValueError, TypeError: a row of another length than ``num_kv_heads`` (or than the first), or a share that is no
            finite number above 0.
    """
    rows = tuple(tuple(row) for row in shares)
    if not rows or not rows[0]:
        raise ValueError("shares must not be empty")
    heads = num_kv_heads or len(rows[0])
    if any(len(row) != heads for row in rows):
        raise ValueError(f"shares must have a number for each of the {heads} KV heads of a layer")
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) for row in rows for x in row):
        raise TypeError("shares must be numbers")
    if not all(0 < share < math.inf for row in rows for share in row):
        raise ValueError("shares must be finite and above 0")
    return rows


@dataclass(frozen=True)
class HeadShares:
    """The shares of one model.

    Attributes:
        shares: ``[layers][Hkv]`` over the compacted layers; only their proportions count.
        fingerprint: of the model, see ``ModelSpec.fingerprint``.
        info: how they were measured, as JSON values.
    """

    shares: tuple[tuple[float, ...], ...]
    fingerprint: dict[str, Any]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "shares", check_shares(self.shares))

    def save(self, path: str | os.PathLike) -> None:
        """Writes a JSON file, atomically.

        Raises:
            OSError: the folder is missing or the disk is full.
        """
        note = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        write_atomically(Path(path), (json.dumps(note, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadShares":
        """Reads what :meth:`save` wrote, or what a token selector's file (``kvcompact train selector``) says of them.

        Raises:
            TypeError: ``path`` is no path.
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, damaged, of another format or a newer version, or does not say any.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"shares must be a path, got {type(path).__name__}")
        check_file(path)
        with open(path, "rb") as file:
            ninth = file.read(9)[8:]
        if ninth == b"{":  # where the header of safetensors begins
            from .token_selector import TokenSelector

            found = TokenSelector.load(path).head_shares
            if found is None:
                raise BadFileError(f"shares: {path} does not say how many slots each head needs")
            return found
        try:
            note = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadFileError(f"{path} is damaged, or holds no shares of slots: {error}") from error
        if not isinstance(note, dict) or note.get("format") != FORMAT:
            raise BadFileError(f"{path} holds no shares of slots: its format is not {FORMAT!r}")
        if note.get("version") != FORMAT_VERSION:
            raise BadFileError(
                f"{path} has version {note.get('version')!r} of its format, this library reads {FORMAT_VERSION}"
            )
        try:
            return cls(note["shares"], dict(note["fingerprint"]), dict(note["info"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadFileError(f"{path} is damaged: {error}") from error

    @classmethod
    def mean(cls, measured: Sequence["HeadShares"]) -> "HeadShares":
        """The geometric mean of several measurements, with several methods for instance; its mean is 1.

        Raises:
            ValueError: there are none, or they are of different models.
        """
        if not measured:
            raise ValueError("measured must not be empty")
        first = measured[0]
        for other in measured[1:]:
            different = fingerprint_differences(other.fingerprint, first.fingerprint)
            if different or [len(row) for row in other.shares] != [len(row) for row in first.shares]:
                raise ValueError(f"measured must be of one model: {'; '.join(different) or 'they have other heads'}")
        heads = len(first.shares[0])
        logs = [[math.log(x / fmean(sum(m.shares, ()))) for row in m.shares for x in row] for m in measured]
        means = [math.exp(fmean(column)) for column in zip(*logs)]
        means = [x / fmean(means) for x in means]
        rows = tuple(tuple(means[i : i + heads]) for i in range(0, len(means), heads))
        return cls(rows, first.fingerprint, {"mean_of": [m.info for m in measured]})

    def check_model(self, spec: ModelSpec, where: str = "the shares") -> None:
        """Raises ValueError unless they are for the model of ``spec``."""
        different = fingerprint_differences(self.fingerprint, spec.fingerprint)
        wanted = spec.layer_kinds.count("full"), spec.num_kv_heads
        if (len(self.shares), len(self.shares[0])) != wanted:
            different.append(
                f"they are of {len(self.shares)} x {len(self.shares[0])} heads, the model has {wanted[0]} x {wanted[1]}"
            )
        if different:
            raise ValueError(f"{where} was made for another model: {'; '.join(different)}")

    def layers(self, slots: int, least: int, most: int) -> list[int]:
        """Slots of each layer, per KV head, of mean ``slots`` and in ``[least, most]``."""
        return proportional_counts(slots * len(self.shares), [sum(row) for row in self.shares], least, most)

    def heads(self, layer_idx: int, slots: int, least: int, most: int) -> list[int]:
        """Slots of each KV head of a layer, of mean ``slots`` and in ``[least, most]``."""
        row = self.shares[layer_idx]
        return proportional_counts(slots * len(row), row, least, most)
