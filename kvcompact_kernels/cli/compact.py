# SPDX-License-Identifier: Apache-2.0
"""``kvcompact compact``: a document becomes a cache file."""

import argparse
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..prompt import document_ids, prompt_format
from .common import (
    DEMO_MODEL,
    CliError,
    UsageError,
    add_model_arguments,
    add_plugin_argument,
    bytes_text,
    explained,
    load_model,
    make_method,
    parse_options,
    read_text,
    reporter,
    run_plugins,
)

NAME = "compact"
HELP = "compact a document into a cache file"
DESCRIPTION = """\
Reads a text with the model, compacts its KV cache and writes it to a file that `kvcompact ask` answers from.

  kvcompact compact notes.txt --method snapkv --ratio 4 --out notes.kvc
  kvcompact ask notes.kvc "Who wrote the notes?"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("document", metavar="DOC", help="a UTF-8 text file, or - for stdin")
    add_model_arguments(parser)
    parser.add_argument("--method", required=True, help="see `kvcompact methods`")
    parser.add_argument(
        "--option", "-O", action="append", default=[], metavar="NAME=VALUE", help="an option of the method (repeatable)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--ratio", type=float, help="tokens per slot (default 8)")
    size.add_argument("--slots", type=int, help="slots per KV head and layer, instead of a ratio")
    parser.add_argument("--out", required=True, metavar="FILE", help="the cache file (replaced when it exists)")
    add_plugin_argument(parser, "methods")


def check_size(ratio: float | None, slots: int | None) -> None:
    """Raises UsageError for a ratio below 1 (or no number) and for less than one slot."""
    if ratio is not None and not 1 <= ratio < float("inf"):
        raise UsageError(f"--ratio must be at least 1, got {ratio}")
    if slots is not None and slots < 1:
        raise UsageError(f"--slots must be at least 1, got {slots}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    tell = reporter(args)
    check_size(args.ratio, args.slots)
    run_plugins(args)
    method = make_method(args.method, parse_options(args.option))
    text = read_text(args.document)
    out = Path(args.out)
    if out.is_dir():
        raise CliError(f"--out {out} is a folder")
    if not out.parent.is_dir():
        raise CliError(f"--out {out}: the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK):
        raise CliError(f"--out {out}: the folder {out.parent} cannot be written to")
    loaded = load_model(args.model, args.dtype, args.device, quiet=args.quiet)
    import torch

    from .. import compact

    with explained(ValueError):
        form = prompt_format(loaded.tokenizer)
    ids = document_ids(loaded.tokenizer, form, text)
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and len(ids) > limit:
        tell(
            f"warning: the document has {len(ids)} tokens, more than the {limit} positions that the model was made for"
        )
    tell(f"{loaded.source}: {loaded.dtype_note}; the document has {len(ids)} tokens")
    start = time.perf_counter()
    with explained(ValueError, TypeError, torch.OutOfMemoryError):
        cache = compact(
            loaded.model,
            torch.tensor([ids], device=loaded.model.device),
            method,
            ratio=args.ratio,
            slots=args.slots,
            progress=not args.quiet,
        )
    seconds = time.perf_counter() - start
    note = {
        # the fetched model lies elsewhere on another machine, so it is named and not located
        "model": DEMO_MODEL if args.model == DEMO_MODEL else loaded.path,
        "prompt": form.to_json(),
        "document": "stdin" if args.document == "-" else Path(args.document).name,
        "document_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    cache = replace(cache, info={**cache.info, "prompt": note})
    with explained(OSError, prefix=f"could not write {out}: "):
        cache.save(out)
    result = {
        "file": str(out),
        "method": cache.method,
        "tokens": cache.logical_length,
        "slots": cache.num_slots,
        "ratio": cache.logical_length / cache.num_slots,
        "nbytes": cache.nbytes,
        "logical_nbytes": cache.logical_nbytes,
        "file_bytes": out.stat().st_size,
        "seconds": seconds,
        "model": loaded.path,
        "dtype": str(cache.dtype).removeprefix("torch."),
    }
    if not args.json:
        print(
            f"{out}: {cache.logical_length} tokens in {cache.num_slots} slots per head on average ({result['ratio']:.1f}x), "
            f"{bytes_text(cache.logical_nbytes)} -> {bytes_text(cache.nbytes)}, {seconds:.1f} s"
        )
    return result
