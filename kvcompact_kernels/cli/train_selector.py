# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train selector``: which tokens to keep, learned for a model."""

import argparse
from typing import Any

from .common import check_fields, usage_errors
from .train import (
    add_loop_arguments,
    add_text_arguments,
    loop_options,
    report_training,
    train_on_texts,
)

NAME = "selector"
HELP = "train a model's token selector on a folder of texts (minutes; any ratio and length)"
DESCRIPTION = """\
Reads contexts with facts planted in them, and learns to tell from keys and values which tokens the text's continuation and
questions will attend to. No gradient passes through the model. The file is weights for method "still", at any ratio.

  kvcompact train selector --model M --data FOLDER --out selector.safetensors

Ctrl-C finishes the step and saves; the same command goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options = "training.selector.SelectorOptions, as in facts=6"
    add_text_arguments(parser, "the selector", options, "SelectorConfig")
    parser.add_argument(
        "--context",
        default="256,384,512,512,768,1k,2k",
        metavar="T",
        help="tokens of a context; one of these is drawn (256,384,512,512,768,1k,2k)",
    )
    parser.add_argument("--examples", type=int, default=400, metavar="N", help="contexts that are read (400)")
    parser.add_argument("--batch", type=int, default=2, help="contexts of a step (2)")
    add_loop_arguments(parser, steps=1200, lr=2e-3, warmup=50)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation.specs import parse_lengths
    from ..patch.families import model_spec
    from ..token_selector import SelectorConfig
    from ..training.selector import SelectorOptions, default_loop, train_selector

    with usage_errors():
        options = SelectorOptions(
            **{
                "contexts": tuple(parse_lengths(args.context)),
                "examples": args.examples,
                "batch": args.batch,
                **check_fields(SelectorOptions, args.option, "--option"),
            }
        )
        loop = default_loop(**loop_options(args))
        fields = check_fields(SelectorConfig, args.config, "--config")
        SelectorConfig(**{"head_dim": 1, "num_kv_heads": 1, **fields})

    def train(loaded: Any) -> Any:
        spec = model_spec(loaded.model)
        return train_selector(
            loaded.model,
            loaded.tokenizer,
            args.data,
            out=args.out,
            options=options,
            loop=loop,
            config=SelectorConfig(**{"head_dim": spec.head_dim, "num_kv_heads": spec.num_kv_heads, **fields}),
            run_folder=args.run_folder,
            progress=not args.quiet,
        )

    result, loaded = train_on_texts(args, train)
    return report_training(args, loaded, result.run, loop.steps)
