# SPDX-License-Identifier: Apache-2.0
"""``kvcompact ask``: answers questions from a cache file."""

import argparse
import os
import time
from typing import Any

from ..prompt import PromptFormat, prompt_format, question_ids
from .common import (
    DEMO_MODEL,
    CliError,
    UsageError,
    add_model_arguments,
    explained,
    load_model,
    reporter,
)

NAME = "ask"
HELP = "answer questions from a cache file"
DESCRIPTION = """\
Answers questions from a file that `kvcompact compact` wrote; the document itself is not needed any more.

  kvcompact ask notes.kvc "Who wrote the notes?" "When?"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the cache file")
    parser.add_argument("questions", metavar="QUESTION", nargs="+", help="each is asked of the untouched cache")
    add_model_arguments(parser, default=None)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most so many per answer (128)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if any(not question.strip() for question in args.questions):
        raise UsageError("a QUESTION is empty")
    tell = reporter(args)
    import torch

    from ..cache import CompactCache

    with explained(OSError, ValueError):
        cache = CompactCache.load(args.file)
    if cache.batch_size != 1:
        raise CliError(f"{args.file} holds {cache.batch_size} contexts; this command asks of one")
    note = cache.info.get("prompt") or {}
    name, local = _model_name(args, note)
    loaded = load_model(name, _dtype(args, cache), args.device, quiet=args.quiet, local_only=local)
    from .. import patch_model
    from ..patch import check_fingerprint

    with explained(ValueError, TypeError):
        check_fingerprint(cache, loaded.model, args.file)
        patch_model(loaded.model)
    cache = cache.to(loaded.model.device, loaded.model.dtype)
    with explained(ValueError, prefix=f"{args.file}: "):
        form = PromptFormat.from_json(note["prompt"]) if "prompt" in note else prompt_format(loaded.tokenizer)
    tell(f"{cache.logical_length} tokens in {cache.num_slots} slots per head on average, compacted with {cache.method}")
    answers = []
    for question in args.questions:
        ids = torch.tensor([question_ids(loaded.tokenizer, form, question)], device=loaded.model.device)
        start = time.perf_counter()
        with explained(ValueError, torch.OutOfMemoryError):
            out = loaded.model.generate(ids, past_key_values=cache, max_new_tokens=args.max_new_tokens, do_sample=False)
        seconds = time.perf_counter() - start
        text = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        answers.append(
            {"question": question, "answer": text, "tokens": out.shape[1] - ids.shape[1], "seconds": seconds}
        )
        if not args.json:
            print(f"> {question}\n{text}" if len(args.questions) > 1 else text, flush=True)
    return {
        "file": args.file,
        "model": loaded.path,
        "method": cache.method,
        "context_tokens": cache.logical_length,
        "slots": cache.num_slots,
        "answers": answers,
    }


def _model_name(args: argparse.Namespace, note: dict[str, Any]) -> tuple[str, bool]:
    """The model to use and whether it must be on this machine: a file must not make the command download things."""
    if args.model is not None:
        return args.model, False
    stored = note.get("model")
    if stored == DEMO_MODEL:
        return stored, False
    if not isinstance(stored, str):
        raise UsageError(f"{args.file} does not say which model it was made with; pass --model")
    if os.path.isabs(stored) and not os.path.isdir(stored):
        raise CliError(f"the model that {args.file} was made with, {stored}, is not there; pass --model")
    return stored, True


def _dtype(args: argparse.Namespace, cache: Any) -> str:
    """The cache's own dtype unless another was asked for: other weights would not fit the fingerprint."""
    return str(cache.dtype).removeprefix("torch.") if args.dtype == "auto" else args.dtype
