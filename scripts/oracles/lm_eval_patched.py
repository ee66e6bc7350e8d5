# SPDX-License-Identifier: Apache-2.0
"""Runs lm-eval on a patched model through its ordinary Hugging Face wrapper, on a tiny task that needs no network.

    python scripts/oracles/lm_eval_patched.py [--model FOLDER] [--method snapkv] [--ratio 4] [--compact-over 64]

lm-eval's wrapper takes a model that is loaded already. It knows nothing of this package: a model that was patched with
``compact_over`` compacts long prompts by itself in ``generate``, which is what tasks of the kind ``generate_until`` call.
Tasks by likelihood read prompt and answer in one pass without a cache, so there is nothing to compact: a patched model scores
exactly what the plain one does, and this is checked.

Prints one line of JSON; exits with 1 when the patched model compacted nothing or likelihoods differ. ``.ci/oracles`` runs it.
"""

import argparse
import json
import logging
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from kvcompact_kernels import patch_model, unpatch_model
from kvcompact_kernels.patch.session import CompactSession

SAMPLES = 4


def task_config(folder: Path, kind: str) -> dict[str, Any]:
    """A task over a JSON-lines file in ``folder``: one planted number among other sentences."""
    draw = random.Random(0)
    path = folder / "task.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(SAMPLES):
            number = str(draw.randrange(1000, 10000))
            lines = [f"Box {draw.randrange(100)} is {draw.choice(['red', 'green', 'blue'])}." for _ in range(16)]
            lines.insert(draw.randrange(len(lines)), f"The code of the door is {number}.")
            question = " ".join(lines) + "\n\nQuestion: What is the code of the door?\nAnswer:"
            file.write(json.dumps({"question": question, "answer": number}) + "\n")
    config = {
        "task": f"tiny_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{answer}}",
        "metadata": {"version": 1},
    }
    if kind == "generate_until":
        config |= {
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "process_results": lambda doc, results: {"contained": float(doc["answer"] in results[0])},
            "metric_list": [{"metric": "contained", "aggregation": "mean", "higher_is_better": True}],
        }
    else:
        config |= {
            "process_results": lambda doc, results: {"likelihood": results[0][0]},
            "metric_list": [{"metric": "likelihood", "aggregation": "mean", "higher_is_better": True}],
        }
    return config


def evaluate(model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
    """What lm-eval makes of the model, patched or not."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    tasks = [task_config(folder, "generate_until"), task_config(folder, "loglikelihood")]
    results = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, bootstrap_iters=0, log_samples=False)["results"]
    return {
        "contained": results["tiny_generate_until"]["contained,none"],
        "likelihood": results["tiny_loglikelihood"]["likelihood,none"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="runs lm-eval on a patched model")
    parser.add_argument("--model", help="a model folder; default: a random Llama with one token per byte")
    parser.add_argument("--method", default="snapkv")
    parser.add_argument("--ratio", type=float, default=4.0)
    parser.add_argument("--compact-over", type=int, default=64)
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    try:
        import datasets
        import lm_eval  # noqa: F401
    except ImportError as error:
        print(f"skipped: {error}")
        return 0
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if args.model is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_tests"))
        from tiny_folder import tiny_tokenizer
        from tiny_models import tiny_model

        model = tiny_model("llama", torch.float32, vocab_size=261, max_position_embeddings=2048)
        tokenizer = tiny_tokenizer(chat=False)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        plain = evaluate(model, tokenizer, Path(folder))
        patch_model(model, args.method, ratio=args.ratio, compact_over=args.compact_over)
        compacted = []
        told = CompactSession.compacted

        def count(session: CompactSession, *rest: Any) -> None:
            told(session, *rest)
            compacted.append(session.context_length)

        CompactSession.compacted = count
        try:
            patched = evaluate(model, tokenizer, Path(folder))
        finally:
            CompactSession.compacted = told
            unpatch_model(model)
    print(json.dumps({"plain": plain, "patched": patched, "contexts compacted": len(compacted)}))
    same = abs(plain["likelihood"] - patched["likelihood"]) <= 1e-4 * abs(plain["likelihood"])
    return 0 if len(compacted) >= SAMPLES and same else 1


if __name__ == "__main__":
    sys.exit(main())
