# SPDX-License-Identifier: Apache-2.0
"""Compares `attention_matching` with its authors' code by what both are for: the error of attention over the slots.

    python scripts/oracles/compare_attention_matching.py [--code FOLDER] [--model FOLDER]

``--code`` is a checkout of https://github.com/adamzweiger/compaction (MIT), the code of "Fast KV Compaction via Attention
Matching" (arXiv 2602.16284); it needs nothing but torch. Without it, what the paper describes is written out here in a few
lines (``paper_matching``), and the comparison says so: that is a check of the solvers, not of someone else's program.

Each KV head of each layer is compacted by both, from the same keys, values and reference queries to the same number of slots:

- "rms": keys of the largest root mean square attention, weights in ``exp(-3) ... exp(3)`` by projected gradient (theirs),
  least-squares values. Ours solves the weights' problem exactly, in ``exp(-7) ... exp(7)``, with small ridges.
- "omp": orthogonal matching pursuit, theirs one key at a time with weights up to ``exp(7)``, ours several at a time.

Ours keeps no sinks here, for they do not.

Half of the queries are the reference, every other one; the rest are held out. The error is the squared distance of the
attention's output from the full cache's, over the squared size of that output, on the held-out queries. Ours must not be
larger than theirs by more than 2% (their weights come from a random start of a power iteration). Errors on the reference
queries are printed too; there ours may be larger, for ridges give some of it away.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import add_model_argument, load, read_layers
from torch import Tensor

from kvcompact_kernels.methods.attention_matching import AttentionMatching
from kvcompact_kernels.methods.base import LayerInput

SLACK = 1.02
Slots = tuple[Tensor, Tensor, Tensor]  # keys [t, d], beta [t], values [t, d]


def paper_matching(keys: Tensor, values: Tensor, queries: Tensor, slots: int) -> Slots:
    """Sections 3 and 4 of the paper for one head: keys by root mean square attention, weights, values.

    Args:
        keys, values: ``[T, d]``. queries: ``[n, d]``. slots: keys to keep.
    """
    logits = queries @ keys.T / math.sqrt(keys.shape[1])
    mass = (logits - logits.amax(1, keepdim=True)).exp()
    attention = mass / mass.sum(1, keepdim=True)
    chosen = attention.square().mean(0).topk(slots).indices
    design, target = mass[:, chosen], mass.sum(1)
    low, high = math.exp(-3), math.exp(3)
    weight = torch.linalg.lstsq(design, target[:, None]).solution[:, 0].clamp(low, high)
    step = 1 / torch.linalg.matrix_norm(design, 2) ** 2
    for _ in range(2):
        weight = (weight - step * (design.T @ (design @ weight - target))).clamp(low, high)
    beta = weight.log()
    reached = (logits[:, chosen] + beta).softmax(1)
    return keys[chosen], beta, torch.linalg.lstsq(reached, attention @ values).solution


def authors_code(folder: str) -> dict[str, Callable[..., Slots]]:
    """Their two default algorithms out of a checkout."""
    sys.path.insert(0, folder)
    found = importlib.import_module("compaction.algorithms")
    rms = found.HighestAttentionKeysCompaction(
        score_method="rms", nnls_iters=2, nnls_lower_bound=math.exp(-3), nnls_upper_bound=math.exp(3), c2_method="lsq"
    )
    omp = found.OMPCompaction(nnls_iters=0, nnls_upper_bound=math.exp(7), drop_key_beta_cutoff=-7, c2_method="lsq")
    return {
        name: lambda k, v, q, t, algorithm=algorithm: algorithm.compute_compacted_cache(k, v, q, t)[:3]
        for name, algorithm in (("rms", rms), ("omp", omp))
    }


@dataclass
class Given(AttentionMatching):
    """Ours, with the reference queries ``[1, 1, n, d]`` that it is given."""

    given: Tensor | None = None

    def _reference_queries(self, layer: LayerInput) -> Tensor:
        return self.given


def ours(layer: LayerInput, queries: Tensor, slots: int, keys: str) -> Slots:
    """One head of our method; the default options but for the choice of keys."""
    method = Given(keys=keys, given=queries[None, None], sinks=0)
    block = method.compact_layer(layer, slots)
    return block.keys[0, 0], block.beta[0, 0], block.values[0, 0]


def output(queries: Tensor, slots: Slots, scale: float) -> Tensor:
    """Attention of ``queries [n, d]`` over slots."""
    keys, beta, values = (x.double() for x in slots)
    return (scale * queries.double() @ keys.T + beta).softmax(-1) @ values


def compare(model: Any, ids: Tensor, theirs: dict[str, Callable[..., Slots]], ratios: list[int]) -> bool:
    """Prints a line for each algorithm and ratio; whether ours is good enough in all."""
    tokens, good = ids.shape[1], True
    layers = read_layers(model, ids)
    plain = AttentionMatching()
    for name, algorithm in theirs.items():
        for ratio in ratios:
            slots = tokens // ratio
            sums = torch.zeros(2, 2, dtype=torch.float64)  # ours, theirs by reference, held out
            for layer in layers:
                queries = plain._reference_queries(layer)[0]
                for head in range(layer.keys.shape[1]):
                    one = replace(layer, keys=layer.keys[:1, head : head + 1], values=layer.values[:1, head : head + 1])
                    k, v = one.keys[0, 0], one.values[0, 0]
                    seen, unseen = queries[head, ::2], queries[head, 1::2]
                    made = ours(one, seen, slots, name), algorithm(k, v, seen, slots)
                    whole = k, torch.zeros(tokens), v
                    for j, q in enumerate((seen, unseen)):
                        want = output(q, whole, layer.scale)
                        for i, block in enumerate(made):
                            error = output(q, block, layer.scale) - want
                            sums[i, j] += error.square().sum() / want.square().sum()
            sums /= len(layers) * layers[0].keys.shape[1]
            fine = bool(sums[0, 1] <= SLACK * sums[1, 1])
            good &= fine
            print(
                f"{'no worse' if fine else 'WORSE   '}  {name}, {tokens} tokens to {slots} slots: squared error, held out: "
                f"ours {sums[0, 1]:.3e}, theirs {sums[1, 1]:.3e}; reference: ours {sums[0, 0]:.3e}, theirs {sums[1, 0]:.3e}",
                flush=True,
            )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="compares attention_matching with its authors' code")
    parser.add_argument("--code", help="a checkout of the authors' code")
    add_model_argument(parser, tokens=256)
    parser.add_argument("--ratios", type=int, nargs="+", default=[4, 8, 16])
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.code is None:
        print("without the authors' code (--code): compared with the paper's algorithm, written out here")
        theirs: dict[str, Callable[..., Slots]] = {"rms": paper_matching}
    else:
        try:
            theirs = authors_code(args.code)
        except ImportError as error:
            print(f"skipped: {args.code} holds no code that can be imported: {error}")
            return 0
    model, ids = load(args.model, args.tokens)
    return 0 if compare(model.float(), ids[:1], theirs, args.ratios) else 1


if __name__ == "__main__":
    sys.exit(main())
