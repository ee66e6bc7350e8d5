# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train still``: a compactor for a model."""

import argparse
from pathlib import Path
from typing import Any

from .common import UsageError, add_model_arguments, bytes_text, load_model, parse_options, reporter
from .train import add_loop_arguments, check_output, loop_options, training_errors, usage_errors

NAME = "still"
HELP = "train STILL's compactor for a model on a folder of texts"
DESCRIPTION = """\
Trains the network that turns T cached tokens into T/8 slots in one pass (STILL), against the frozen model itself. The texts
are read, questions about them written and answered by the model, and all of it kept in the run's folder, once.

  kvcompact train still --model M --data FOLDER --ratio 8 --context 2048 --out compactor.safetensors

Ctrl-C finishes the step and saves; the same command goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="a folder of .txt and .md files, or one text file"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the compactor (safetensors)")
    parser.add_argument("--ratio", default="8", metavar="R", help="tokens per slot; several as in 4,8,16 (8)")
    parser.add_argument(
        "--context", default="2048", metavar="T", help="longest context in tokens; several as in 512,1k,2k (2048)"
    )
    parser.add_argument("--slots", type=int, metavar="N", help="slots of a chunk (default: four chunks make a context)")
    parser.add_argument(
        "-C", "--config", action="append", default=[], metavar="NAME=VALUE", help="a field of StillConfig (repeatable)"
    )
    parser.add_argument(
        "-O",
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of training.still.StillOptions, as in tails=4 or mix='{\"facts\": 1}' (repeatable)",
    )
    parser.add_argument("--start", metavar="FILE", help="start from this compactor's parameters")
    parser.add_argument("--batch", type=int, default=1, help="contexts of a micro-step, of one length (1)")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-steps of an optimizer step (4)")
    parser.add_argument("--autocast", choices=("bfloat16",), help="run student and teacher in it")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    parser.add_argument(
        "--data-cache", metavar="FOLDER", help="for prepared data, to share between runs (default: the run's folder)"
    )
    add_loop_arguments(parser, steps=1000, lr=3e-4, warmup=100)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation.specs import parse_lengths, parse_ratios
    from ..training.loop import LoopConfig, TrainingInterrupted
    from ..training.still import StillOptions, train_still

    tell = reporter(args)
    out = Path(args.out)
    with usage_errors():
        options = StillOptions(
            **{
                "ratios": tuple(parse_ratios(args.ratio)),
                "contexts": tuple(parse_lengths(args.context)),
                "batch": args.batch,
                "autocast": args.autocast,
                "gradient_checkpointing": args.gradient_checkpointing,
                **parse_options(args.option),
            }
        )
        loop = LoopConfig(accumulate=args.accumulate, **loop_options(args))
        config = parse_options(args.config)
        if args.start and (config or args.slots is not None):
            raise UsageError("--start comes without --slots and --config: the file has its own")
    check_output(out)
    from ..training.data import read_texts

    with training_errors():
        read_texts(args.data)  # before the model is loaded, which takes time
    loaded = load_model(args.model, args.dtype, args.device, quiet=args.quiet)
    tell(f"{loaded.source}: {loaded.dtype_note}")
    try:
        with training_errors():
            result = train_still(
                loaded.model,
                loaded.tokenizer,
                args.data,
                out=out,
                options=options,
                loop=loop,
                slots=args.slots,
                config=config,
                start=args.start,
                run_folder=args.run_folder,
                data_cache=args.data_cache,
                progress=not args.quiet,
            )
    except TrainingInterrupted as stop:
        tell(str(stop))
        raise
    info, trained = result.compactor.info, result.run
    size = out.stat().st_size
    if not args.json:
        figures = ", ".join(f"{k} {v:.4g}" for k, v in (trained.evaluation or {}).items() if not k.startswith("none"))
        print(
            f"{out}: step {trained.step} of {loop.steps}, {bytes_text(size)}, {result.compactor.config.slots} slots a chunk"
        )
        if figures:
            print(f"held out: {figures}")
        if not trained.finished:
            print("the time is up; the same command goes on from here")
    return {
        "file": str(out),
        "file_bytes": size,
        "step": trained.step,
        "steps": loop.steps,
        "finished": trained.finished,
        "seconds": trained.seconds,
        "slots": result.compactor.config.slots,
        "chunk_tokens": info["chunk_tokens"],
        "held_out": trained.evaluation,
        "loss": sum(trained.losses[-50:]) / len(trained.losses[-50:]) if trained.losses else None,
        "model": loaded.path,
    }
