# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train selector``: which tokens to keep, learned for a model."""

import argparse
from pathlib import Path
from typing import Any

from .common import add_model_arguments, bytes_text, load_model, parse_options, reporter
from .train import add_loop_arguments, check_output, loop_options, training_errors, usage_errors

NAME = "selector"
HELP = "train a model's token selector on a folder of texts (minutes; any ratio and length)"
DESCRIPTION = """\
Reads contexts with facts planted in them, and learns to tell from keys and values which tokens the text's continuation and
questions will attend to. No gradient passes through the model. The file is weights for method "still", at any ratio.

  kvcompact train selector --model M --data FOLDER --out selector.safetensors

Ctrl-C finishes the step and saves; the same command goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="a folder of .txt and .md files, or one text file"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the selector (safetensors)")
    parser.add_argument(
        "--context",
        default="256,384,512,512,768,1k,2k",
        metavar="T",
        help="tokens of a context; one of these is drawn (256,384,512,512,768,1k,2k)",
    )
    parser.add_argument("--examples", type=int, default=400, metavar="N", help="contexts that are read (400)")
    parser.add_argument("--batch", type=int, default=2, help="contexts of a step (2)")
    parser.add_argument(
        "-O",
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of training.selector.SelectorOptions, as in facts=6 (repeatable)",
    )
    parser.add_argument(
        "-C",
        "--config",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of SelectorConfig (repeatable)",
    )
    add_loop_arguments(parser, steps=1200, lr=2e-3, warmup=50)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation.specs import parse_lengths
    from ..patch.families import model_spec
    from ..token_selector import SelectorConfig
    from ..training.data import read_texts
    from ..training.loop import TrainingInterrupted
    from ..training.selector import SelectorOptions, default_loop, train_selector

    tell = reporter(args)
    out = Path(args.out)
    with usage_errors():
        options = SelectorOptions(
            **{
                "contexts": tuple(parse_lengths(args.context)),
                "examples": args.examples,
                "batch": args.batch,
                **parse_options(args.option),
            }
        )
        loop = default_loop(**loop_options(args))
        fields = parse_options(args.config)
        SelectorConfig(**{"head_dim": 1, "num_kv_heads": 1, **fields})
    check_output(out)
    with training_errors():
        read_texts(args.data)  # before the model is loaded, which takes time
    loaded = load_model(args.model, args.dtype, args.device, quiet=args.quiet)
    tell(f"{loaded.source}: {loaded.dtype_note}")
    try:
        with training_errors():
            spec = model_spec(loaded.model)
            result = train_selector(
                loaded.model,
                loaded.tokenizer,
                args.data,
                out=out,
                options=options,
                loop=loop,
                config=SelectorConfig(**{"head_dim": spec.head_dim, "num_kv_heads": spec.num_kv_heads, **fields}),
                run_folder=args.run_folder,
                progress=not args.quiet,
            )
    except TrainingInterrupted as stop:
        tell(str(stop))
        raise
    trained, size = result.run, out.stat().st_size
    if not args.json:
        print(f"{out}: step {trained.step} of {loop.steps}, {bytes_text(size)}")
        if trained.evaluation:
            print("held out: " + ", ".join(f"{name} {value:.4g}" for name, value in trained.evaluation.items()))
        if not trained.finished:
            print("the time is up; the same command goes on from here")
    return {
        "file": str(out),
        "file_bytes": size,
        "step": trained.step,
        "steps": loop.steps,
        "finished": trained.finished,
        "seconds": trained.seconds,
        "held_out": trained.evaluation,
        "loss": sum(trained.losses[-50:]) / len(trained.losses[-50:]) if trained.losses else None,
        "model": loaded.path,
    }
