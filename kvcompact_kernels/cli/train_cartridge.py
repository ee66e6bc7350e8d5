# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train cartridge``: slots that are trained for one document."""

import argparse
import re
from pathlib import Path
from typing import Any

from .common import DEMO_MODEL, UsageError, add_model_arguments, load_model, read_text, reporter, usage_errors
from .train import add_loop_arguments, check_output, loop_options, training_errors

NAME = "cartridge"
HELP = "train slots for a document: the model asks itself questions about it"
DESCRIPTION = """\
The model writes conversations about the document, and slots are trained until it answers with them as it does with the
document before it. The file is a cache that `kvcompact ask` answers from. Ctrl-C finishes the step and saves; the same
command goes on from there.

  kvcompact train cartridge notes.txt --model M --slots 512 --out notes.kvc
  kvcompact train cartridge a.txt b.txt --model M --slots 512 --distractors 0.5 --out folder
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("documents", metavar="DOC", nargs="+", help="UTF-8 text files (one may be - for stdin)")
    add_model_arguments(parser)
    parser.add_argument(
        "--out", required=True, metavar="F", help="the cache file; for several documents a folder for DOC.kvc files"
    )
    parser.add_argument("--slots", type=int, default=512, help="per KV head and layer (512)")
    parser.add_argument(
        "--init",
        default="cartridge",
        metavar="METHOD",
        help="whose slots training starts from, with options: attention_matching:queries=repeat, or self_study: the tokens "
        "that the conversations' answers look at (self_study:weights=F: that the selector of F chooses; self_study:shares=F: "
        "with the slots of each head that F says), or cartridge:file=F, to train a file's slots further (default: the first "
        "tokens)",
    )
    parser.add_argument(
        "--layer-steps",
        type=int,
        default=0,
        metavar="N",
        help="fit each layer's slots by themselves for N steps first, from any start but the first tokens (0)",
    )
    parser.add_argument("--sinks", type=int, default=1, help="leading slots that are not trained (1)")
    parser.add_argument("--train-beta", action="store_true", help="also train a bias per slot")
    parser.add_argument("--batch-tokens", type=int, default=2048, metavar="N", help="of conversations in a step (2048)")
    parser.add_argument(
        "--distractors",
        type=float,
        default=None,
        metavar="SHARE",
        help="of the steps with another cartridge beside, for cartridges that compose (0; 0.5 with --distractor)",
    )
    parser.add_argument(
        "--distractor", action="append", default=[], metavar="FILE", help="a cache file to train beside (repeatable)"
    )
    parser.add_argument(
        "--reposition",
        action="store_true",
        help="put them together as CompactCache.compose does by default, one behind the other's tokens",
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        metavar="GB",
        help="for slots, gradients and moments: documents take turns (no limit)",
    )
    group = parser.add_argument_group("self-study")
    group.add_argument("--conversations", type=int, default=512, metavar="N", help="written for each document (512)")
    group.add_argument("--recall", type=int, default=0, metavar="N", help="passages to be continued, beside them (0)")
    group.add_argument(
        "--gaps",
        type=int,
        default=0,
        metavar="N",
        help="passages with a number or name to be filled in, beside them (0)",
    )
    group.add_argument("--held-out", type=int, default=32, metavar="N", help="of them that are not trained (32)")
    group.add_argument("--chunk-tokens", type=int, default=512, metavar="N", help="of the document, in context (512)")
    group.add_argument(
        "--kinds",
        metavar="K,K,…",
        help="of requests, taken in turn: question, structuring, summarisation, use_case, creative; one that stands there "
        "twice comes twice as often (three questions in seven)",
    )
    group.add_argument(
        "--short-answers", type=float, default=0.5, metavar="SHARE", help="of the questions that want few words (0.5)"
    )
    group.add_argument("--request-tokens", type=int, default=64, metavar="N", help="longest request (64)")
    group.add_argument("--answer-tokens", type=int, default=96, metavar="N", help="longest answer (96)")
    group.add_argument("--temperature", type=float, default=0.7, help="of the requests (0.7)")
    group.add_argument("--study-batch", type=int, default=16, metavar="N", help="conversations written together (16)")
    group.add_argument("--top-k", type=int, default=20, help="likeliest tokens kept at each answer token (20)")
    add_loop_arguments(parser, steps=240, lr=2e-2, warmup=10)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..training.cartridge import CartridgeConfig, default_loop, train_cartridge
    from ..training.self_study import SelfStudyConfig

    tell = reporter(args)
    share = args.distractors if args.distractors is not None else 0.5 if args.distractor else 0.0
    if args.memory_gb is not None and not 0 < args.memory_gb < float("inf"):
        raise UsageError(f"--memory-gb must be above 0, got {args.memory_gb}")
    if args.reposition and not share:
        raise UsageError("--reposition is how cartridges stand beside each other: give --distractors or --distractor")
    with usage_errors():
        config = CartridgeConfig(
            args.slots,
            args.init,
            args.sinks,
            args.train_beta,
            args.batch_tokens,
            distractors=share,
            reposition=args.reposition,
            layer_steps=args.layer_steps,
        )
        study = SelfStudyConfig(
            conversations=args.conversations,
            recall=args.recall,
            gaps=args.gaps,
            **({} if args.kinds is None else {"kinds": tuple(kind.strip() for kind in args.kinds.split(","))}),
            short_answers=args.short_answers,
            chunk_tokens=args.chunk_tokens,
            batch=args.study_batch,
            request_tokens=args.request_tokens,
            answer_tokens=args.answer_tokens,
            request_temperature=args.temperature,
            top_k=args.top_k,
            held_out=args.held_out,
            seed=args.seed,
        )
        loop = default_loop(**loop_options(args))
    out = Path(args.out)
    if len(args.documents) == 1:
        check_output(out)
    texts = _texts(args.documents)
    loaded = load_model(args.model, args.dtype, args.device, quiet=args.quiet)
    tell(f"{loaded.source}: {loaded.dtype_note}; {len(texts)} document{'s' if len(texts) > 1 else ''}")
    try:
        with training_errors():
            made = train_cartridge(
                loaded.model,
                loaded.tokenizer,
                texts,
                out,
                config,
                study,
                loop,
                run_folder=args.run_folder,
                distractors=args.distractor,
                memory_bytes=None if args.memory_gb is None else round(args.memory_gb * 2**30),
                model_name=DEMO_MODEL if args.model == DEMO_MODEL else loaded.path,
                progress=not args.quiet,
                report=tell,
            )
    except KeyboardInterrupt as stop:  # while conversations are written it says nothing
        tell(str(stop) or "interrupted; the conversations so far are kept, and the same command goes on from there")
        raise
    entries = []
    for one in made:
        entry = {
            "document": one.name,
            "file": str(one.path),
            "tokens": one.tokens,
            "slots": args.slots,
            "ratio": one.tokens / args.slots,
            "steps": one.steps,
            "finished": one.finished,
            "loss": sum(one.losses[-20:]) / len(one.losses[-20:]) if one.losses else None,
            "evaluation": one.evaluation,
            "seconds": one.seconds,
            "file_bytes": one.path.stat().st_size,
        }
        entries.append(entry)
        if not args.json:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in (one.evaluation or {}).items())
            print(
                f"{one.path}: {one.tokens} tokens in {args.slots} slots per head on average ({entry['ratio']:.1f}x), {one.steps} steps, "
                f"held-out {figures or 'not measured'}"
            )
    return {"model": loaded.path, "cartridges": entries}


def _texts(paths: list[str]) -> dict[str, str]:
    """Documents by name: the files' names without their endings, made different where they are not."""
    texts: dict[str, str] = {}
    for path in paths:
        name = "stdin" if path == "-" else re.sub(r"[^\w.-]+", "_", Path(path).stem)
        name = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(paths) + 2))) if n not in texts)
        texts[name] = read_text(path)
    return texts
