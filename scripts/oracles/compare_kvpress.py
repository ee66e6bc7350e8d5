# SPDX-License-Identifier: Apache-2.0
"""Compares selection methods with kvpress on one model and one input; `.ci/oracles` runs it in an environment of its own.

    python scripts/oracles/compare_kvpress.py [--model FOLDER] [--tokens 384] [--ratio 3]

kvpress (https://github.com/NVIDIA/kvpress, Apache-2.0) needs a transformers older than the one that this package is tested
with, so versions are pinned in ``kvpress.txt`` beside this file. Without ``--model`` a random Llama of four layers, with
grouped queries, in float64 is used; with it, the first tokens of Python's language reference are read. Scores are compared entry by entry; kept tokens are compared as sets, where a token at
the edge may differ when its score ties with the edge's to within the same tolerance.

What is compared, and where the two differ on purpose:

- snapkv: the scores of all tokens before the window (ours are sums over queries and the heads of a group, theirs means) and
  the kept tokens. Ours keeps sinks as well (0 here), and shrinks the kept window to half of the slots when they are few.
- pyramidkv: budgets and, in layers whose budget holds two windows, the kept tokens. kvpress falls back to equal budgets when
  the last layer's would be below the window, and caps the first layer's at tokens - window; ours is the pyramid with
  ``steepness``, flatter where it would leave [min_slots, tokens], with the mean budget exact. The case is chosen so that
  neither cap applies; budgets may differ by one for rounding.
- expected_attention: scores behind the sinks, and the kept tokens; both with our ``epsilon`` (kvpress's class has 0 by
  default, its evaluations 0.01).
- finch: scores of the tokens before the prompt, the kept tokens, and the keys. kvpress re-rotates kept keys to the positions
  0 ... slots - 1 and goes on behind them; here the cache keeps its logical length, and they get T - slots ... T - 1: theirs
  are rotated on by T - slots before they are compared.
- h2o: kvpress's "observed attention" is the mean over the queries that see a token, the paper's rule (ours) the sum: ours are
  divided by that number before they are compared. Kept tokens follow different rules and are not compared.
"""

import argparse
import sys
from importlib.metadata import version
from typing import Any

import torch
from common import add_model_argument, load, read_layers
from torch import Tensor

from kvcompact_kernels.methods import LayerInput, get_method
from kvcompact_kernels.reference.selection import gather_tokens

WINDOW = 16


def kvpress_run(model: Any, ids: Tensor, press: Any) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Scores of each layer, and the keys and values that are left."""
    from kvpress.presses.base_press import BasePress
    from transformers import DynamicCache

    scores, score = [], press.score

    def record(*args: Any, **kwargs: Any) -> Tensor:
        scores.append(score(*args, **kwargs))
        return scores[-1]

    press.score = record
    cache = DynamicCache()
    with torch.no_grad(), BasePress.__call__(press, model):  # FinchPress's own looks for a delimiter token
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
    return scores, [(layer.keys, layer.values) for layer in cache.layers]


class Report:
    """Collects what was compared; prints a line for each."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.failed = False

    def line(self, what: str, good: bool, detail: str) -> None:
        self.failed |= not good
        print(f"{'agrees ' if good else 'DIFFERS'}  {what}: {detail}")

    def tensors(self, what: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
        """Largest difference over layers, relative to the layer's largest entry."""
        worst = 0.0
        for a, b in zip(ours, theirs, strict=True):
            b = b.to(a.dtype)
            if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
                return self.line(what, False, f"shapes {tuple(a.shape)}, {tuple(b.shape)}, or not finite")
            worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
        self.line(what, worst <= self.tolerance, f"{len(ours)} layers, largest difference {worst:.1e}")

    def kept(self, what: str, ours: list[Tensor], theirs: list[Tensor], scores: list[Tensor]) -> None:
        """Sets of token indices; those in one set only must tie with the lowest kept score."""
        total = edge = wrong = 0
        for a, b, s in zip(ours, theirs, scores, strict=True):
            one = torch.zeros(s.shape, dtype=torch.bool).scatter_(2, a, True)
            two = torch.zeros(s.shape, dtype=torch.bool).scatter_(2, b, True)
            border = s.masked_fill(~two, float("inf")).amin(-1, keepdim=True)
            different = one ^ two
            total += a.numel()
            edge += int(different.sum())
            wrong += int((different & ((s - border).abs() > self.tolerance * border.abs())).sum())
        self.line(
            f"{what} kept tokens", wrong == 0, f"{total} kept, {edge} differ at the edge by rounding, {wrong} else"
        )


def indices_of(layers: list[LayerInput], left: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Where kept keys and values stand in each layer, ascending."""
    found = []
    for layer, (keys, values) in zip(layers, left, strict=True):
        own = torch.cat([layer.keys, layer.values], -1).double()
        kept = torch.cat([keys, values], -1).double()
        index = torch.cdist(kept, own).argmin(-1)
        far = ((gather_tokens(own, index) - kept).norm(dim=-1) / own.norm(dim=-1).mean()).max()
        index = index.sort(-1).values
        if far > 1e-3 or (index.diff(dim=-1) == 0).any():
            raise ValueError(f"kvpress holds keys or values that are not the layer's own: they differ by {far:.1e}")
        found.append(index)
    return found


def compare(model: Any, ids: Tensor, ratio: float, report: Report) -> None:
    import kvpress

    tokens = ids.shape[1]
    layers = read_layers(model, ids)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    slots = int(tokens / ratio)
    share = 1 - (slots + 0.5) / tokens  # kvpress rounds down in one place, to the nearest in another

    snap = get_method("snapkv", window=WINDOW, kernel_size=5, sinks=0)
    theirs, left = kvpress_run(
        model, ids, kvpress.SnapKVPress(compression_ratio=share, window_size=WINDOW, kernel_size=5)
    )
    ours = [snap.scores(x)[..., : tokens - WINDOW] / (WINDOW * group) for x in layers]
    report.tensors("snapkv scores", ours, [s[..., : tokens - WINDOW] for s in theirs])
    report.kept("snapkv", [snap.select(x, slots) for x in layers], indices_of(layers, left), theirs)

    window, steep = 4, 10
    pyramid = get_method("pyramidkv", window=window, kernel_size=5, sinks=0, steepness=float(steep))
    press = kvpress.PyramidKVPress(compression_ratio=share, window_size=window, kernel_size=5, beta=steep)
    theirs, left = kvpress_run(model, ids, press)
    budgets = pyramid.budgets(slots, tokens, len(layers))
    found = [v.shape[2] for _, v in left]
    good = all(abs(a - b) <= 1 for a, b in zip(budgets, found, strict=True)) and found[0] > found[-1]
    report.line(
        "pyramidkv budgets", good, f"first and last {budgets[0]}, {budgets[-1]}; kvpress {found[0]}, {found[-1]}"
    )
    wide = [i for i, n in enumerate(found) if n >= 2 * window]
    report.kept(
        "pyramidkv",
        [pyramid.select(layers[i], found[i]) for i in wide],
        indices_of([layers[i] for i in wide], [left[i] for i in wide]),
        [theirs[i] for i in wide],
    )

    expected = get_method("expected_attention")
    theirs, left = kvpress_run(
        model, ids, kvpress.ExpectedAttentionPress(compression_ratio=share, epsilon=expected.epsilon)
    )
    sinks = expected.sinks
    report.tensors(
        "expected_attention scores", [expected.scores(x)[..., sinks:] for x in layers], [s[..., sinks:] for s in theirs]
    )
    report.kept("expected_attention", [expected.select(x, slots) for x in layers], indices_of(layers, left), theirs)

    finch = get_method("finch", window=WINDOW, sinks=0)
    press = kvpress.FinchPress(compression_ratio=share, rerotate_keys=False)
    press.window_size = WINDOW
    theirs, left = kvpress_run(model, ids, press)
    kept = indices_of(layers, left)
    press = kvpress.FinchPress(compression_ratio=share)
    press.window_size = WINDOW
    _, left = kvpress_run(model, ids, press)
    before = tokens - WINDOW
    report.tensors(
        "finch scores", [finch.scores(x)[..., :before] / group for x in layers], [s[..., :before] for s in theirs]
    )
    report.kept("finch", [finch.select(x, slots) for x in layers], kept, theirs)
    ours, moved = [], []
    for layer, (keys, _), index in zip(layers, left, kept):
        free = gather_tokens(layer.rope.unrotate(layer.keys, layer.positions), index)
        ours.append(layer.rope.rotate(free, layer.positions[-slots:]))
        here = layer.rope.unrotate(keys, torch.arange(slots))
        moved.append(layer.rope.rotate(here, layer.positions[-slots:]))
    report.tensors("finch re-rotated keys", ours, moved)

    h2o = get_method("h2o")
    theirs, _ = kvpress_run(model, ids, kvpress.ObservedAttentionPress(compression_ratio=share))
    seen = torch.arange(tokens, 0, -1)
    report.tensors("h2o scores", [h2o.scores(x) / seen / group for x in layers], theirs)


def main() -> int:
    parser = argparse.ArgumentParser(description="compares selection methods with kvpress")
    add_model_argument(parser)
    parser.add_argument("--ratio", type=float, default=3.0)
    args = parser.parse_args()
    try:
        import kvpress  # noqa: F401
        import transformers
    except ImportError as error:
        print(f"skipped: {error}")
        return 0
    print(f"kvpress {version('kvpress')}, transformers {transformers.__version__}")
    model, ids = load(args.model, args.tokens)
    report = Report(1e-5 if args.model is None else 1e-4)
    compare(model, ids, args.ratio, report)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
