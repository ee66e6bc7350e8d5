# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train``: one subcommand per thing that can be trained."""

import argparse
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .common import CliError, UsageError, explained

NAME = "train"
HELP = "train a compactor (selector, still) or a document's cache (cartridge)"
DESCRIPTION = """\
Trains against the frozen model, on a CPU or a GPU. Ctrl-C finishes the step and saves; the same command goes on from there.

  kvcompact train selector --model M --data FOLDER --out F
  kvcompact train still --model M --data FOLDER --ratio 8 --context 2048 --out F
  kvcompact train cartridge notes.txt --model M --slots 512 --out F
"""
# Each names itself, its help and description, and adds its arguments, as the commands themselves do.
SUBCOMMANDS = ("train_selector", "train_still", "train_cartridge")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common = argparse.ArgumentParser(add_help=False)
    # the command above has them too, and its values must not be reset here
    common.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="machine-readable result on stdout"
    )
    common.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="no messages, no progress bars")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name in SUBCOMMANDS:
        module = importlib.import_module(f".{name}", __package__)
        sub = kinds.add_parser(
            module.NAME,
            parents=[common],
            help=module.HELP,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run_kind=module.run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return args.run_kind(args)


def add_loop_arguments(parser: argparse.ArgumentParser, steps: int, lr: float, warmup: int) -> None:
    """Options of the shared loop, with the caller's defaults."""
    group = parser.add_argument_group("the run")
    group.add_argument("--steps", type=int, default=steps, help=f"optimizer steps ({steps})")
    group.add_argument("--lr", type=float, default=lr, help=f"learning rate ({lr:g})")
    group.add_argument("--warmup", type=int, default=warmup, help=f"steps in which it rises ({warmup})")
    group.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    group.add_argument("--checkpoint-every", type=int, default=100, metavar="N", help="steps between checkpoints (100)")
    group.add_argument(
        "--evaluate-every", type=int, default=100, metavar="N", help="steps between held-out figures (100)"
    )
    group.add_argument("--max-minutes", type=float, metavar="M", help="save and end after so long; run again to go on")
    group.add_argument(
        "--piece-mb", type=float, metavar="MB", help="cut checkpoints into files of this size (default: one file)"
    )
    group.add_argument(
        "--run-folder",
        metavar="FOLDER",
        help="for checkpoints, log and prepared data (default: the --out file's name + .run)",
    )


def loop_options(args: argparse.Namespace) -> dict[str, Any]:
    """The loop's options as keyword arguments of ``LoopConfig``."""
    return {
        "steps": args.steps,
        "lr": args.lr,
        "warmup": args.warmup,
        "seed": args.seed,
        "checkpoint_every": args.checkpoint_every,
        "evaluate_every": args.evaluate_every,
        "max_seconds": None if args.max_minutes is None else 60 * args.max_minutes,
        "piece_bytes": None if args.piece_mb is None else round(args.piece_mb * 2**20),
    }


def check_output(out: Path) -> None:
    """Raises CliError when a file cannot be written there: before hours of training, not after."""
    if out.is_dir():
        raise CliError(f"--out {out} is a folder")
    if not out.parent.is_dir():
        raise CliError(f"--out {out}: the folder {out.parent} does not exist")


@contextmanager
def training_errors() -> Iterator[None]:
    """Turns what training can run into into a CliError with its message."""
    import torch

    from ..training.loop import TrainingError

    with explained(ValueError, TypeError, OSError, TrainingError, torch.OutOfMemoryError):
        yield


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns refused options into a UsageError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
