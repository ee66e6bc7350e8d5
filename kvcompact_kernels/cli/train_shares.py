# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train shares``: how many slots each KV head of a model gets, measured."""

import argparse
from pathlib import Path
from typing import Any

from .common import add_model_arguments, add_plugin_argument, bytes_text, check_fields, run_plugins, usage_errors
from .train import add_data_arguments, train_on_texts

NAME = "shares"
HELP = "measure how many slots each KV head of a model needs (minutes; for any method)"
DESCRIPTION = """\
Compacts some contexts, gives one head after the other fewer and more slots, and sees what that does to the model. Nothing is
trained. The file is for the option "shares" of selection methods and attention_matching, at any ratio and length.

  kvcompact train shares --model M --data FOLDER --out shares.json
  kvcompact compact notes.txt --model M --method attention_matching -O shares=shares.json --out notes.kvc

Ctrl-C keeps the contexts that are done; the same command goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser, "the shares (JSON)")
    parser.add_argument(
        "--method",
        default="attention_matching",
        metavar="SPEC",
        help="with options, as in snapkv:window=16 or still:weights=FILE (attention_matching)",
    )
    parser.add_argument("--rounds", type=int, default=2, help="each begins with what the one before found (2)")
    parser.add_argument("--contexts", type=int, default=8, metavar="N", help="that are read in each round (8)")
    parser.add_argument(
        "--context",
        default="256,384,512,768,1k",
        metavar="T",
        help="tokens of a context; one of these is drawn (256,384,512,768,1k)",
    )
    parser.add_argument(
        "-O",
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of training.head_shares.SharesOptions, as in continuation=96 (repeatable)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the contexts (0)")
    parser.add_argument(
        "--run-folder",
        metavar="FOLDER",
        help="for what is measured of each context (default: the --out file's name + .run)",
    )
    add_plugin_argument(parser, "methods")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation.specs import parse_lengths, parse_spec
    from ..methods import get_method
    from ..training.head_shares import SharesOptions, train_shares

    run_plugins(args)
    with usage_errors():
        options = SharesOptions(
            **{
                "rounds": args.rounds,
                "contexts": args.contexts,
                "lengths": tuple(parse_lengths(args.context)),
                "seed": args.seed,
                **check_fields(SharesOptions, args.option, "--option"),
            }
        )
        name, settings = parse_spec(args.method)
        method = get_method(name, **settings)
        method.with_shares(None)  # raises where heads do not stand apart

    def measure(loaded: Any) -> Any:
        return train_shares(
            loaded.model,
            loaded.tokenizer,
            args.data,
            out=args.out,
            method=method,
            options=options,
            run_folder=args.run_folder,
            progress=not args.quiet,
        )

    made, loaded = train_on_texts(args, measure)
    out = Path(args.out)
    flat = sorted((x for row in made.shares for x in row), reverse=True)
    half = next(n for n in range(1, len(flat) + 1) if 2 * sum(flat[:n]) >= sum(flat))
    if not args.json:
        print(
            f"{out}: {len(flat)} KV heads, from {options.rounds * options.contexts} contexts, {bytes_text(out.stat().st_size)}"
        )
        print(f"half of all slots go to {half} heads; shares from {flat[-1]:.2f} to {flat[0]:.2f} of the mean")
    return {
        "file": str(out),
        "heads": len(flat),
        "heads_with_half": half,
        "smallest": flat[-1],
        "largest": flat[0],
        "contexts": options.rounds * options.contexts,
        "model": loaded.path,
    }
