# SPDX-License-Identifier: Apache-2.0
"""What caches of one document make of short gold answers.

    python benchmarks/gold_answers.py DOC QUESTIONS.json --model M --first 512 [--cache NAME=FILE ...] --out ROWS.jsonl

Each question and its answer are read once, without generating anything, behind the full cache, behind none (the prompt's
opening), behind the document's first N tokens (``--first``, what an untrained cartridge is) and behind each file. ``score`` is
1 where every token of the answer is the likeliest one, so that greedy decoding would begin with the answer, word for word:
stricter than finding it somewhere in a generated text. ``kl`` is KL(full || cache) at the answer's tokens, over the full
cache's 200 likeliest tokens, the answer's own and one for all others. With ``--write N`` the model also writes N tokens for
each question, and rows of the task ``written_answers`` have a ``score`` of 1 where an accepted answer is found in them.
ROWS.jsonl holds a row per question and cache; the table beside it (.csv) has the columns of ``kvcompact eval`` and 95%
bootstrap intervals over questions.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from kvcompact_kernels import patch_model
from kvcompact_kernels.cache import CompactCache
from kvcompact_kernels.cli.common import load_model, read_text
from kvcompact_kernels.evaluation.aggregate import aggregate, to_csv
from kvcompact_kernels.evaluation.metrics import score_any
from kvcompact_kernels.patch import CompactSession, model_spec
from kvcompact_kernels.prompt import document_ids, prompt_format, question_ids
from kvcompact_kernels.training.distill import (
    Targets,
    distillation_loss,
    hidden_states,
    pad_answers,
    teacher_targets,
)
from kvcompact_kernels.training.generation import generate

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("document")
    parser.add_argument("questions", help="a JSON list of query, answer_prompt and answers; the first answer is taken")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--first", type=int, action="append", default=[], metavar="N", help="the first N tokens")
    parser.add_argument("--cache", action="append", default=[], metavar="NAME=FILE", help="a cache file")
    parser.add_argument("--write", type=int, default=0, metavar="N", help="tokens to write as well (0)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    loaded = load_model(args.model, args.dtype, "cpu", quiet=True)
    model, tokenizer = patch_model(loaded.model.requires_grad_(False), "full"), loaded.tokenizer
    form, spec = prompt_format(tokenizer), model_spec(model)
    context = document_ids(tokenizer, form, read_text(args.document).strip())
    items, accepted = [], []
    for entry in json.loads(Path(args.questions).read_text(encoding="utf-8")):
        prompt = question_ids(tokenizer, form, f"{entry['query']} {entry.get('answer_prompt') or ''}".strip())
        answer = tokenizer(entry["answers"][0], add_special_tokens=False).input_ids
        items.append((entry.get("id", str(len(items))), prompt, answer))
        accepted.append(tuple(entry["answers"]))

    def read(ids: list[int]) -> CompactCache:
        return model.compact(torch.tensor([ids]), method="full", ratio=1)

    makers = {"full": lambda: read(context), "no_context": lambda: read(document_ids(tokenizer, form, ""))}
    makers |= {f"first_{n}": lambda n=n: read(context[:n]) for n in args.first}
    for pair in args.cache:
        name, _, file = pair.partition("=")
        makers[name] = lambda file=file: CompactCache.load(file, model)
    # questions of like length together
    order = sorted(range(len(items)), key=lambda i: len(items[i][1]) + len(items[i][2]))
    groups = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    targets: dict[int, Targets] = {}
    rows, full_bytes = [], 0
    for name, make in makers.items():
        start = time.process_time()
        cache = make()
        full_bytes = full_bytes or cache.nbytes
        found = {}
        for group in groups:
            found |= measure(model, spec, cache, group, items, targets)
        tasks = {"gold_answers": found}
        if args.write:
            tasks["written_answers"] = write(model, tokenizer, cache, groups, items, accepted, args.write)
        for task, i in ((task, i) for task in tasks for i in range(len(items))):
            rows.append(
                {
                    "task": task,
                    "length": len(context),
                    "case": 0,
                    "probe": i,
                    "query_aware": False,
                    "tokens": len(context),
                    "method": name,
                    "ratio": None if name in ("full", "no_context") else round(full_bytes / cache.nbytes, 2),
                    "slots": cache.num_slots,
                    "physical_bytes": cache.nbytes,
                    "logical_bytes": full_bytes,
                    **dict.fromkeys(
                        ("budget_bytes", "temporary_bytes", "peak_bytes", "read_seconds", "compact_seconds")
                    ),
                    **dict.fromkeys(("first_token_seconds", "decode_tokens_per_second", "same_answer", "error")),
                    "meta": {"id": items[i][0]},
                    **tasks[task][i],
                }
            )
        means = {k: sum(x[k] for x in found.values()) / len(items) for k in ("score", "cross_entropy", "kl")}
        if args.write:
            means["written"] = sum(x["score"] for x in tasks["written_answers"].values()) / len(items)
        print(name, {k: round(v, 4) for k, v in means.items()}, f"{time.process_time() - start:.0f} s", flush=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args.out.with_suffix(".csv").write_text(to_csv(aggregate(rows)), encoding="utf-8")


@torch.no_grad()
def measure(model, spec, cache, group, items, targets) -> dict[int, dict[str, float]]:
    """Figures of a few questions; those of the first cache that is asked become the targets of the others."""
    ids, places = pad_answers([items[i][1:] for i in group])
    session = CompactSession(spec, cache)
    session.functional = True
    hidden = hidden_states(model, ids, session, places)
    counts = [len(items[i][2]) for i in group]
    if group[0] not in targets:
        made = teacher_targets(model, hidden, ids[places], 200)
        targets |= {i: Targets(*pair) for i, pair in zip(group, zip(made.ids.split(counts), made.logs.split(counts)))}
    wanted = Targets(torch.cat([targets[i].ids for i in group]), torch.cat([targets[i].logs for i in group]))
    figures = zip(group, counts, *(x.split(counts) for x in distillation_loss(model, hidden, wanted)))
    return {
        i: {
            "kl": max(0.0, kl.mean().item()),
            "cross_entropy": entropy.mean().item(),
            "predicted_tokens": count,
            "agreement": right.mean().item(),
            "score": float(right.all()),
        }
        for i, count, kl, entropy, right in figures
    }


def write(model, tokenizer, cache, groups, items, accepted, tokens) -> dict[int, dict[str, Any]]:
    """Whether an accepted answer stands in what the model writes, and what that is."""
    found = {}
    for group in groups:
        for i, answer in zip(group, generate(model, [items[i][1] for i in group], tokens, past=cache)):
            text = tokenizer.decode(answer.ids, skip_special_tokens=True)
            nothing = dict.fromkeys(("kl", "cross_entropy", "predicted_tokens", "agreement"))
            found[i] = {"score": score_any(accepted[i], text), "answer": text, **nothing}
    return found


if __name__ == "__main__":
    main()
