# SPDX-License-Identifier: Apache-2.0
"""How many slots each KV head of a model needs, measured for a selector that is trained.

At equal bytes it matters which heads the slots belong to: most heads lose nothing with a fraction of them, a few carry nearly
all that a compact cache gets wrong. Which ones depends on the model far more than on the text, so it is measured once
(Attention Matching, arXiv 2602.16284, has budgets per head, too, that are measured once per model).
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import CompactBlock, CompactCache
from ..methods import get_method
from ..model_spec import ModelSpec
from ..patch.families import decoder
from ..patch.model import compact
from ..patch.session import CompactSession
from .data import Corpus, Recipe, collate, make_example, tail_means
from .distill import Targets, distillation_loss, hidden_states, teacher_targets

RATIO, FACTS = 8, 3
# of the slots at RATIO: what a head is given while all others keep theirs
FEWER, MORE = 0.4, 2.5
# A single context must not decide: of its KL, a head counts for so much at most. Nor must noise: no head gets less than a
# quarter of the mean.
LARGEST_COST, SMALLEST_SHARE = 0.5, 0.25


@torch.no_grad()
def measure_shares(
    model: Any,
    spec: ModelSpec,
    weights: str | Path,
    corpus: Corpus,
    recipe: Recipe,
    lengths: Sequence[int],
    contexts: int,
    *,
    seed: int = 0,
    progress: bool = False,
) -> tuple[tuple[float, ...], ...]:
    """What ``SelectorConfig.shares`` should be.

    A context is compacted at ratio 8, and read on from: text that follows, and questions on facts that were planted. Then one
    head after the other gets 0.4 and 2.5 times its slots while the others keep theirs. What that does to the KL from the full
    cache, relative to what it was, is taken to be ``cost * (slots at ratio 8 / slots - 1)``. The sum of ``cost / slots`` over
    the heads is least, at an equal number of slots, when they are proportional to ``sqrt(cost)``.

    Takes ``2 * layers * Hkv`` short forward passes a context, half a pass each on average.

    Args:
        model: patched and frozen.
        weights: file of the selector.
        corpus, recipe, lengths: what contexts are made of; a length is drawn for each.
        contexts: how many.
        seed: of the contexts.
        progress: show a progress bar.

    Returns:
        ``[layers][Hkv]``, of mean 1.
    """
    from tqdm import tqdm

    method = get_method("still", weights=str(weights), shares="equal")
    full = [i for i, kind in enumerate(spec.layer_kinds) if kind == "full"]
    cost = torch.zeros(len(full), spec.num_kv_heads)
    with tqdm(total=contexts * cost.numel(), desc="slots per head", unit="head", disable=not progress) as bar:
        for index in range(contexts):
            draw = random.Random(f"{seed} shares {index}")
            length = draw.choice(lengths)
            example = make_example(corpus, corpus.train, recipe, length, draw, ["facts"] * FACTS + ["continuation"])
            ids = torch.tensor([example.context], device=model.device)
            slots = max(method.min_slots + 1, length // RATIO)
            counts = [max(method.min_slots, round(slots * factor)) for factor in (FEWER, 1, MORE)]
            caches = [compact(model, ids, method, slots=min(n, length)) for n in counts]
            student = _Student(model, spec, collate(example.tails, model.device), [t.kind for t in example.tails])
            student.teach(compact(model, ids, "full", ratio=1))
            cost += student.costs(caches, full, counts, bar) / contexts
    shares = cost.clamp(min=0).sqrt()
    if not shares.any():
        return ((1.0,) * spec.num_kv_heads,) * len(full)
    shares = (shares / shares.mean()).clamp(min=SMALLEST_SHARE)
    return tuple(tuple(round(float(x), 3) for x in row) for row in shares / shares.mean())


class _Student:
    """The model behind caches of one context, on the same tails."""

    def __init__(self, model: Any, spec: ModelSpec, batch: tuple[Tensor, Tensor, Tensor], kinds: list[str]):
        self.model, self.spec, self.kinds = model, spec, kinds
        self.ids, self.scored, self.tail = batch
        self.layers = decoder(model).layers
        self.targets: Targets | None = None

    def _hidden(self, cache: CompactCache) -> Tensor:
        session = CompactSession(self.spec, cache)
        session.functional = True
        return hidden_states(self.model, self.ids, session, self.scored)

    def teach(self, cache: CompactCache) -> None:
        self.targets = teacher_targets(self.model, self._hidden(cache), self.ids[self.scored])

    def kl(self, cache: CompactCache) -> Tensor:
        """From the teacher, the mean of each kind's tails."""
        kl = distillation_loss(self.model, self._hidden(cache), self.targets)[0]
        means = tail_means(kl, self.tail, len(self.kinds))
        kinds = list(dict.fromkeys(self.kinds))
        return torch.stack([means[[k == kind for k in self.kinds]].mean() for kind in kinds])

    def costs(self, caches: Sequence[CompactCache], full: Sequence[int], counts: Sequence[int], bar: Any) -> Tensor:
        """``[layers, Hkv]``: cost of each head, summed over the kinds of tails; ``caches`` have fewer, usual and more slots."""
        usual = caches[1]
        blocks = [[cache.layers[i].heads()[0] for i in full] for cache in caches]
        x = torch.tensor([counts[1] / counts[0] - 1, counts[1] / counts[2] - 1], dtype=torch.float64)
        costs = torch.zeros(len(full), self.spec.num_kv_heads)
        with _recorded(self.layers) as outputs:
            before = self.kl(usual)
        for number, i in enumerate(full):
            with _starting(self.layers, i, outputs):
                for head in range(self.spec.num_kv_heads):
                    changes = []
                    for other in (blocks[0], blocks[2]):
                        heads = list(blocks[1][number])
                        heads[head] = other[number][head]
                        layers = list(usual.layers)
                        layers[i] = CompactBlock.pack([heads])
                        changes.append(
                            (self.kl(replace(usual, layers=tuple(layers))) - before) / before.clamp(min=1e-4)
                        )
                    found = (x[:, None] * torch.stack(changes).double().cpu()).sum(0) / x.square().sum().clamp(min=1e-9)
                    costs[number, head] = found.clamp(max=LARGEST_COST).sum()
                    bar.update()
        return costs


@contextmanager
def _recorded(layers: nn.ModuleList) -> Iterator[list[Any]]:
    """What each layer puts out, in a list that is filled meanwhile."""
    outputs: list[Any] = []
    hooks = [layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _starting(layers: nn.ModuleList, first: int, outputs: Sequence[Any]) -> Iterator[None]:
    """Layers before ``first`` put out what was recorded: nothing that changes behind them reaches them."""
    own = [layer.__dict__.get("forward") for layer in layers[:first]]
    try:
        for layer, output in zip(layers[:first], outputs):
            layer.forward = lambda *args, output=output, **kwargs: output
        yield
    finally:
        for layer, forward in zip(layers[:first], own):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
