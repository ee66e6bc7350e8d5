# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train kv_distill``: which tokens to keep, and what to change about them."""

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

NAME = "kv_distill"
HELP = "train KV-Distill's scorer and adapter for a model on a folder of texts (any ratio and length)"
DESCRIPTION = """\
Trains a scorer that chooses the tokens whose keys and values are kept, and a low-rank adapter that changes them, against the
frozen model itself (KV-Distill, arXiv 2503.10337). Texts and questions are prepared as for `kvcompact train still`.

  kvcompact train kv_distill --model M --data FOLDER --ratio 8 --context 512 --out distiller.safetensors

Ctrl-C finishes the step and saves; the same command goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options = "training.kv_distill.KVDistillOptions, as in reverse=0.4 or tails=4"
    add_text_arguments(parser, "scorer and adapter", options, "DistillerConfig, as in rank=8")
    add_distillation_arguments(parser, "512")
    add_loop_arguments(parser, steps=1000, lr=1e-3, warmup=50)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..kv_distiller import DistillerConfig
    from ..training.kv_distill import KVDistillOptions, default_loop, train_kv_distill

    with usage_errors():
        options = KVDistillOptions(**distillation_options(args, KVDistillOptions))
        loop = default_loop(accumulate=args.accumulate, **loop_options(args))
        config = check_fields(DistillerConfig, args.config, "--config")
        if args.start and config:
            raise UsageError("--start comes without --config: the file has its own")
        DistillerConfig(**{"head_dim": 1, "num_kv_heads": 1, **config})
    result, loaded = train_on_texts(
        args,
        lambda loaded: train_kv_distill(
            loaded.model,
            loaded.tokenizer,
            args.data,
            out=args.out,
            options=options,
            loop=loop,
            config=config,
            start=args.start,
            run_folder=args.run_folder,
            data_cache=args.data_cache,
            progress=not args.quiet,
        ),
    )
    return report_training(args, loaded, result.run, loop.steps)
