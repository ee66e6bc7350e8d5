# SPDX-License-Identifier: Apache-2.0
"""What every kind of training does around its loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..patch import is_patched, patch_model, unpatch_model
from ..version import __version__


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """The model patched, in eval mode and without gradients of its own; afterwards as it came."""
    own = not is_patched(model)
    if own:
        patch_model(model, "full")
    gradients = [(x, x.requires_grad) for x in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for x, wanted in gradients:
            x.requires_grad_(wanted)
        for module, training in modes:
            module.training = training
        if own:
            unpatch_model(model)


def check_output(out: str | Path) -> Path:
    """The file to write, whose place is checked before hours of training and not after.

    Raises:
        OSError: it is a folder, or the folder that it should stand in does not exist.
    """
    out = Path(out)
    if out.is_dir() or not out.parent.is_dir():
        raise OSError(f"out: {out} is a folder" if out.is_dir() else f"out: the folder {out.parent} does not exist")
    return out


def machine(device: torch.device) -> str:
    """What a model was trained on, for the note that travels with it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def training_note(run: Any, loop: Any, options: Any, data: dict[str, Any], corpus: Any, device: torch.device) -> dict:
    """What a trained file says of how it came about, as JSON values.

    Args:
        run, loop: the ``TrainResult`` and ``LoopConfig``.
        options: with ``to_dict``.
        data: its identity.
        corpus: the texts.
    """
    return {
        "version": __version__,
        "steps": run.step,
        "finished": run.finished,
        "held_out": run.evaluation,
        "options": options.to_dict(),
        "loop": loop.identity(),
        "data": data | {"train_tokens": corpus.train.ids.numel(), "documents": corpus.documents},
        "trained_on": machine(device),
    }
