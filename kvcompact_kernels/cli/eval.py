# SPDX-License-Identifier: Apache-2.0
"""``kvcompact eval``: methods side by side on many tasks, at equal bytes."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

from .common import (
    DEMO_MODEL,
    CliError,
    UsageError,
    add_model_arguments,
    add_plugin_argument,
    explained,
    load_model,
    read_text,
    reporter,
    run_plugins,
    usage_errors,
)

NAME = "eval"
HELP = "compare methods on many tasks at equal bytes: tables, pictures, an HTML page"
DESCRIPTION = """\
Compacts generated and given contexts with every method at every ratio, asks questions of what is left, and compares with
the full cache and with no context. Methods get equal bytes. Results grow row by row in the folder: an interrupted run
goes on where it stopped when it is started again with the same options.

  kvcompact eval --methods snapkv,h2o --tasks niah_single,continuation_kl --lengths 512,1k --ratios 4,8 --out results
  kvcompact eval --list
  kvcompact eval --report --out results

Options of a method or task follow its name: snapkv:window=16:pooling=max, niah_single:haystack=stories:template=1.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--methods", default="snapkv,h2o,streaming_llm", help="comma-separated, see `kvcompact methods`"
    )
    parser.add_argument("--tasks", default="niah_single,continuation_kl", help="comma-separated, see --list")
    parser.add_argument("--lengths", default="1k", help="tokens of the contexts: 512,1k,4k (1k)")
    parser.add_argument("--ratios", default="4,8,16", help="bytes of the full cache per byte kept (4,8,16)")
    parser.add_argument("--samples", type=int, default=20, help="contexts of each task and length (20)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is generated (0)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="for rows, tables and pictures; goes on with a folder's own run"
    )
    parser.add_argument(
        "--query-aware",
        action="store_true",
        help="the question is known when the context is compacted (default: it is not)",
    )
    parser.add_argument(
        "--texts",
        action="append",
        default=[],
        metavar="PATH",
        help="a text file or a folder of .txt and .md (repeatable)",
    )
    add_plugin_argument(parser, "methods or tasks")
    parser.add_argument("--no-plots", action="store_true", help="tables only (pictures need matplotlib)")
    parser.add_argument(
        "--report", action="store_true", help="only make tables and pictures of the rows in --out again"
    )
    parser.add_argument("--list", action="store_true", help="list the tasks and their options")


def run(args: argparse.Namespace) -> dict[str, Any]:
    plugins = run_plugins(args)
    if args.list:
        return _list_tasks(args)
    if args.out is None:
        raise UsageError("--out FOLDER is needed")
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; a folder is needed")
    tell = reporter(args)
    if not args.no_plots:
        from ..evaluation.plots import PlotError, check_plots

        try:
            check_plots()
        except PlotError as error:
            raise CliError(f"{error} (--no-plots)") from error
    if not args.report:
        _evaluate(args, folder, plugins, tell)
    return _report(args, folder)


def _evaluate(args: argparse.Namespace, folder: Path, plugins: list[dict[str, str]], tell: Any) -> None:
    from ..evaluation.runner import EvalConfig, run_evaluation
    from ..evaluation.specs import parse_lengths, parse_ratios

    with usage_errors():
        config = EvalConfig(
            methods=_names(args.methods),
            tasks=_names(args.tasks),
            lengths=tuple(parse_lengths(args.lengths)),
            ratios=tuple(parse_ratios(args.ratios)),
            samples=args.samples,
            seed=args.seed,
            query_aware=args.query_aware,
        )
        # before the model is loaded, which takes time
        config.make_methods()
        config.make_tasks()
    texts = [(path, read_text(str(path))) for given in args.texts for path in text_files(given)]
    loaded = load_model(args.model, args.dtype, args.device, quiet=args.quiet)
    tell(f"model: {loaded.source}, {loaded.dtype_note}")
    extra = {
        "texts": [{"name": path.name, "sha256": hashlib.sha256(text.encode()).hexdigest()} for path, text in texts],
        "plugins": plugins,
    }
    name = DEMO_MODEL if args.model == DEMO_MODEL else Path(loaded.path).name or loaded.path
    try:
        with explained(ValueError, TypeError, OSError):
            run_evaluation(
                loaded.model,
                loaded.tokenizer,
                config,
                folder,
                model_name=name,
                texts=[text for _, text in texts],
                extra=extra,
                progress=not args.quiet,
                report=tell,
            )
    except KeyboardInterrupt:
        tell(f"interrupted; the rows so far are in {folder}, and the same command goes on from there")
        raise


def _report(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from ..evaluation.plots import PlotError
    from ..evaluation.report import write_report
    from ..evaluation.tables import markdown

    with explained(ValueError, OSError, PlotError):
        lines, files = write_report(folder, not args.no_plots)
    if not args.json:
        print(markdown(lines))
        print(f"written: {', '.join(str(path) for path in files)}")
    result = {"folder": str(folder), "lines": lines, "files": [str(path) for path in files]}
    worked = {line["method"] for line in lines if line["samples"]}
    never = [name for name in dict.fromkeys(line["method"] for line in lines) if name not in worked]
    if never and not args.report:
        raise CliError(f"nothing but failures of {', '.join(never)}; the other rows are in {folder}", result)
    return result


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def text_files(given: str) -> list[Path]:
    """The file itself, or the folder's .txt and .md files by name.

    Raises:
        CliError: there is no such path, or the folder holds no text.
    """
    path = Path(given)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
        if not found:
            raise CliError(f"--texts {given}: the folder holds no .txt or .md file")
        return found
    if not path.is_file():
        raise CliError(f"--texts {given}: there is no such file or folder")
    return [path]


def _list_tasks(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import MISSING, fields

    from ..evaluation.tasks import list_tasks

    found = []
    for name, cls in list_tasks().items():
        options = {f.name: None if f.default is MISSING else f.default for f in fields(cls) if f.init}
        found.append({"name": name, "summary": cls.summary, "options": options})
        if not args.json:
            print(f"{name}: {cls.summary}")
            print(f"    options: {', '.join(f'{k}={v!r}' for k, v in options.items()) or 'none'}")
    return {"tasks": found}
