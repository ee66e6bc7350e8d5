# SPDX-License-Identifier: Apache-2.0
"""``kvcompact demo``: a real model, a real document, every method side by side."""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

from .common import CliError, UsageError, add_model_arguments, explained, load_model, reporter

NAME = "demo"
HELP = "compact a real document with every method, ask questions, show a table and a picture"
DESCRIPTION = """\
Reads the Python language reference with facts planted in it, compacts its KV cache with every method at several ratios,
asks for the facts, and compares with the full cache. Takes some minutes on two cores. Ctrl-C keeps the rows done so far.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--out", default="demo_out", metavar="FOLDER", help="for the table and picture (demo_out)")
    parser.add_argument("--methods", help="comma-separated (default: all of the demo's)")
    parser.add_argument("--ratios", default="2,4,8", help="comma-separated (2,4,8)")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the document (2048)")
    parser.add_argument("--needles", type=int, default=10, help="planted facts (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the planted facts (0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..demo.runner import METHODS, Demo, Outcome, run_demo
    from ..methods import list_methods

    tell = reporter(args)
    known = list_methods()
    methods = [m for m in METHODS if m in known] if args.methods is None else args.methods.split(",")
    for name in methods:
        if name not in known:
            raise UsageError(f"--methods: there is no method {name!r}; there are: {', '.join(known)}")
    ratios = parse_ratios(args.ratios)
    folder = Path(args.out)
    with explained(OSError, prefix=f"--out {folder}: "):
        folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    loaded = load_model(args.model, args.dtype, args.device, quiet=args.quiet)
    import torch
    import transformers

    from ..demo.document import make_document
    from ..demo.report import picture, write_files

    def count(text: str) -> int:
        return len(loaded.tokenizer(text, add_special_tokens=False).input_ids)

    try:
        document = make_document(count, args.tokens, args.needles, args.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with explained(ValueError):
        demo = Demo(loaded.model, loaded.tokenizer, document)
    outcome = Outcome(
        {
            "model_name": "SmolLM2-135M-Instruct" if args.model == "demo" else Path(loaded.path).name,
            "model_source": loaded.source,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "dtype_reason": loaded.dtype_note,
            "document": f"Python {platform.python_version()} language reference (pydoc_data.topics) with planted facts",
            "tokens": demo.num_tokens,
            "needles": len(document.needles),
            "seed": args.seed,
            "device": str(loaded.model.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    )
    tell(
        f"model:    {outcome.settings['model_name']} from {loaded.source}, {loaded.dtype_note}, {torch.get_num_threads()} threads"
    )
    tell(f"document: {outcome.settings['document']}: {demo.num_tokens} tokens, {len(document.needles)} facts")

    def keep(current: Any) -> None:
        with explained(OSError, prefix=f"could not write to {folder}: "):
            write_files(current, folder)

    try:
        run_demo(demo, outcome, methods, ratios, keep, tell, progress=not args.quiet)
    finally:
        # also after Ctrl-C: the rows so far are worth their time
        outcome.settings["total_seconds"] = time.perf_counter() - started
        if outcome.rows:
            keep(outcome)
            _show(outcome, folder, args, tell, picture)
    failed = [row for row in outcome.rows if row.error and row.method in known]
    if failed:
        raise CliError("; ".join(f"{row.method} failed: {row.error}" for row in failed))
    return outcome.to_json()


def parse_ratios(text: str) -> list[float]:
    """``"2,4,8"`` as numbers.

    Raises:
        UsageError: something that is no number of at least 1.
    """
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--ratios takes numbers separated by commas, got {text!r}") from error
    if any(not 1 <= r < float("inf") for r in ratios):
        raise UsageError(f"--ratios must be at least 1, got {text!r}")
    return ratios


def _show(outcome: Any, folder: Path, args: argparse.Namespace, tell: Any, picture: Any) -> None:
    from ..demo import report

    files = [folder / "results.csv", folder / "results.json"]
    try:
        with explained(OSError, prefix=f"could not write to {folder}: "):
            if picture(outcome, folder / "quality.png"):
                files.append(folder / "quality.png")
    except ImportError:
        tell("no picture: matplotlib is not installed (pip install 'kvcompact-kernels[demo]')")
    if not args.json:
        print()
        print(report.side_by_side(outcome))
        print()
        print(report.table(outcome))
        print()
        print(report.LEGEND)
        for line in report.findings(outcome):
            print(line)
        if not outcome.complete:
            print("Interrupted: the table holds the rows that were done.")
        print(f"{outcome.settings['total_seconds']:.0f} s; written: {', '.join(map(str, files))}")
