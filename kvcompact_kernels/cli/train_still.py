# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train still``: a compactor for a model."""

import argparse
from typing import Any

from .common import UsageError, check_fields, usage_errors
from .train import (
    add_distillation_arguments,
    add_loop_arguments,
    add_text_arguments,
    distillation_options,
    loop_options,
    report_training,
    train_on_texts,
)

NAME = "still"
HELP = "train STILL's compactor for a model on a folder of texts"
DESCRIPTION = """\
Trains the network that turns T cached tokens into T/8 slots in one pass (STILL), against the frozen model itself. The texts
are read, questions about them written and answered by the model, and all of it kept in the run's folder, once.

  kvcompact train still --model M --data FOLDER --ratio 8 --context 2048 --out compactor.safetensors

Ctrl-C finishes the step and saves; the same command goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options = "training.still.StillOptions, as in tails=4 or mix='{\"facts\": 1}'"
    add_text_arguments(parser, "the compactor", options, "StillConfig")
    parser.add_argument("--slots", type=int, metavar="N", help="slots of a chunk (default: four chunks make a context)")
    add_distillation_arguments(parser, "2048")
    add_loop_arguments(parser, steps=1000, lr=3e-4, warmup=100)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..still_config import StillConfig
    from ..training.loop import LoopConfig
    from ..training.still import StillOptions, train_still

    with usage_errors():
        options = StillOptions(**distillation_options(args, StillOptions))
        loop = LoopConfig(accumulate=args.accumulate, **loop_options(args))
        config = check_fields(StillConfig, args.config, "--config")
        if args.start and (config or args.slots is not None):
            raise UsageError("--start comes without --slots and --config: the file has its own")
    result, loaded = train_on_texts(
        args,
        lambda loaded: train_still(
            loaded.model,
            loaded.tokenizer,
            args.data,
            out=args.out,
            options=options,
            loop=loop,
            slots=args.slots,
            config=config,
            start=args.start,
            run_folder=args.run_folder,
            data_cache=args.data_cache,
            progress=not args.quiet,
        ),
    )
    slots = result.compactor.config.slots
    chunks = result.compactor.info["chunk_tokens"]
    return report_training(
        args, loaded, result.run, loop.steps, f"{slots} slots a chunk", slots=slots, chunk_tokens=chunks
    )
