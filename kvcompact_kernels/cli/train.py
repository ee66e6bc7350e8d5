# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train``: one subcommand per thing that can be trained."""

import argparse
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .common import (
    CliError,
    Loaded,
    add_model_arguments,
    bytes_text,
    check_fields,
    explained,
    load_model,
    reporter,
)

NAME = "train"
HELP = "train a compactor (selector, still, kv_distill) or a document's cache (cartridge), or measure heads (shares)"
DESCRIPTION = """\
Trains against the frozen model, on a CPU or a GPU. Ctrl-C finishes the step and saves; the same command goes on from there.

  kvcompact train shares --model M --data FOLDER --out F
  kvcompact train selector --model M --data FOLDER --out F
  kvcompact train still --model M --data FOLDER --ratio 8 --context 2048 --out F
  kvcompact train kv_distill --model M --data FOLDER --ratio 8 --context 512 --out F
  kvcompact train cartridge notes.txt --model M --slots 512 --out F
"""
# Each names itself, its help and description, and adds its arguments, as the commands themselves do.
SUBCOMMANDS = ("train_shares", "train_selector", "train_still", "train_kv_distill", "train_cartridge")


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


def add_text_arguments(parser: argparse.ArgumentParser, made: str, options: str, config: str) -> None:
    """Model, texts, output, and two tables of options, of what is trained on a folder of texts.

    Args:
        made: what the file holds.
        options: class of -O, with an example.
        config: class of -C.
    """
    add_model_arguments(parser)
    add_data_arguments(parser, f"{made} (safetensors)")
    repeatable = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument("-C", "--config", **repeatable, help=f"a field of {config} (repeatable)")
    parser.add_argument("-O", "--option", **repeatable, help=f"a field of {options} (repeatable)")


def add_data_arguments(parser: argparse.ArgumentParser, made: str) -> None:
    """Texts and output; ``made`` is what the file holds."""
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="a folder of .txt and .md files, or one text file"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help=made)


def add_distillation_arguments(parser: argparse.ArgumentParser, context: str) -> None:
    """How a compactor's contexts are drawn and read, with the command's default of ``--context``."""
    parser.add_argument("--ratio", default="8", metavar="R", help="tokens per slot; several as in 4,8,16 (8)")
    parser.add_argument(
        "--context",
        default=context,
        metavar="T",
        help=f"longest context in tokens; several as in 512,1k,2k ({context})",
    )
    parser.add_argument("--start", metavar="FILE", help="start from the parameters of such a file")
    parser.add_argument("--batch", type=int, default=1, help="contexts of a micro-step, of one length (1)")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-steps of an optimizer step (4)")
    parser.add_argument("--autocast", choices=("bfloat16",), help="run student and teacher in it")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    parser.add_argument(
        "--data-cache", metavar="FOLDER", help="for prepared data, to share between runs (default: the run's folder)"
    )


def distillation_options(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """These options, and those of -O, as keyword arguments of ``cls``, ``StillOptions`` or a kind of them."""
    from ..evaluation.specs import parse_lengths, parse_ratios

    return {
        "ratios": tuple(parse_ratios(args.ratio)),
        "contexts": tuple(parse_lengths(args.context)),
        "batch": args.batch,
        "autocast": args.autocast,
        "gradient_checkpointing": args.gradient_checkpointing,
        **check_fields(cls, args.option, "--option"),
    }


def train_on_texts(args: argparse.Namespace, run: Callable[[Loaded], Any]) -> tuple[Any, Loaded]:
    """Loads the model, once output and texts have been looked at, and trains.

    Args:
        run: trains with what was loaded.

    Returns:
        What ``run`` returned, and what was loaded.
    """
    from ..training.data import read_texts
    from ..training.loop import TrainingInterrupted

    tell = reporter(args)
    check_output(Path(args.out))
    with training_errors():
        read_texts(args.data)  # before the model is loaded, which takes time
    loaded = load_model(args.model, args.dtype, args.device, quiet=args.quiet)
    tell(f"{loaded.source}: {loaded.dtype_note}")
    try:
        with training_errors():
            return run(loaded), loaded
    except TrainingInterrupted as stop:
        tell(str(stop))
        raise


def report_training(
    args: argparse.Namespace, loaded: Loaded, trained: Any, steps: int, note: str = "", **more: Any
) -> dict[str, Any]:
    """Prints how a training ended, and returns it for ``--json``.

    Args:
        trained: the loop's ``TrainResult``.
        steps: of the whole run.
        note: of the file, for the first line.
        more: entries of the result.
    """
    out = Path(args.out)
    size = out.stat().st_size
    if not args.json:
        print(f"{out}: step {trained.step} of {steps}, {bytes_text(size)}{note and ', '}{note}")
        shown = {k: v for k, v in (trained.evaluation or {}).items() if not k.startswith("none")}
        if shown:
            print("held out: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        if not trained.finished:
            print("the time is up; the same command goes on from here")
    return {
        "file": str(out),
        "file_bytes": size,
        "step": trained.step,
        "steps": steps,
        "finished": trained.finished,
        "seconds": trained.seconds,
        **more,
        "held_out": trained.evaluation,
        "loss": sum(trained.losses[-50:]) / len(trained.losses[-50:]) if trained.losses else None,
        "model": loaded.path,
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
