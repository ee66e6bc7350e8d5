# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a JSON note and safetensors pieces, complete or as they were.

A folder holds ``checkpoint.json`` and the pieces that it names: consecutive parts of one safetensors file, so that
``cat checkpoint-00000200.*`` gives a file that any reader of safetensors opens. Pieces of a new checkpoint are written
beside those of the old one; replacing the note is what makes it the folder's checkpoint, and only then the old pieces go.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from ..evaluation.store import write_atomically

NOTE = "checkpoint.json"
FORMAT = "kvcompact-training"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another run; the message names the file or the field."""


def save_checkpoint(
    folder: Path, tensors: dict[str, Tensor], header: dict[str, Any], step: int, piece_bytes: int | None = None
) -> int:
    """Replaces the folder's checkpoint.

    Args:
        tensors: on any device; stored as they are, bit for bit.
        header: JSON-able.
        step: optimizer steps done.
        piece_bytes: largest piece; None writes one.

    Returns:
        Bytes of the pieces.

    Raises:
        OSError: it could not be written (a full disk, say); the old checkpoint is as it was.
    """
    old = _read_note(folder)
    data = safetensors_torch.save({name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()})
    size = len(data) if piece_bytes is None else piece_bytes
    pieces = []
    try:
        for start in range(0, len(data), size):
            part = data[start : start + size]
            name = f"checkpoint-{step:08d}.{len(pieces):03d}"
            pieces.append({"file": name, "bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()})
            if old is None or pieces[-1] not in old["pieces"]:
                write_atomically(folder / name, part)
        note = {"format": FORMAT, "version": FORMAT_VERSION, "step": step, **header, "pieces": pieces}
        write_atomically(folder / NOTE, (json.dumps(note, indent=1) + "\n").encode())
    except OSError as error:
        kept = {piece["file"] for piece in old["pieces"]} if old else set()
        _remove(folder, kept)
        state = f"the checkpoint of step {old['step']} is intact" if old else "there is no earlier checkpoint"
        reason = error.strerror or str(error)
        raise OSError(f"could not write the checkpoint of step {step} to {folder}: {reason}; {state}") from error
    _remove(folder, {piece["file"] for piece in pieces})
    return len(data)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The folder's note and tensors, or None when it holds no checkpoint.

    Raises:
        CheckpointError: the note or a piece is missing, damaged, or of a newer format.
    """
    note = _read_note(folder)
    if note is None:
        return None
    data = bytearray()
    for piece in note["pieces"]:
        path = folder / piece["file"]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {NOTE} beside it names it as a piece of the checkpoint")
        part = path.read_bytes()
        if hashlib.sha256(part).hexdigest() != piece["sha256"]:
            raise CheckpointError(f"{path} is damaged: its digest is not the one that {NOTE} beside it holds")
        data += part
    try:
        return note, safetensors_torch.load(bytes(data))
    except SafetensorError as error:
        raise CheckpointError(f"the checkpoint in {folder} is damaged: {error}") from error


def check_identity(found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raises CheckpointError that names every field in which two (nested) descriptions of a run differ."""
    different = _differences(found, wanted, "")
    if different:
        raise CheckpointError(
            f"{where} belongs to another run: {'; '.join(different[:8])}"
            f"{'' if len(different) <= 8 else f'; and {len(different) - 8} more'}. "
            "Take the old options, or another folder"
        )


def _differences(found: Any, wanted: Any, name: str) -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for key in sorted(found.keys() | wanted.keys()):
            inner = f"{name}.{key}" if name else key
            lines += _differences(found.get(key), wanted.get(key), inner)
        return lines
    return [] if found == wanted else [f"{name} was {found!r}, now {wanted!r}"]


def _read_note(folder: Path) -> dict[str, Any] | None:
    path = folder / NOTE
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["format"] != FORMAT or not isinstance(note["version"], int):
            raise CheckpointError(f"{path} is no note of a training checkpoint")
        if note["version"] > FORMAT_VERSION:
            raise CheckpointError(f"{path} has format version {note['version']}; this release reads {FORMAT_VERSION}")
        for piece in note["pieces"]:
            if Path(piece["file"]).name != piece["file"] or not isinstance(piece["sha256"], str):
                raise CheckpointError(f"{path} is damaged: {piece!r} is no piece")
        int(note["step"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return note


def _remove(folder: Path, kept: set[str]) -> None:
    for path in folder.glob("checkpoint-*.*"):
        if path.name not in kept:
            path.unlink(missing_ok=True)
