# SPDX-License-Identifier: Apache-2.0
"""How many slots each KV head of a model needs, measured.

At equal bytes it matters which heads the slots belong to: most heads lose nothing with a fraction of them, a few carry nearly
all that a compact cache gets wrong. Which ones depends on the model far more than on the text, so it is measured once
(Attention Matching, arXiv 2602.16284, has budgets per head, too, that are measured once per model).
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_int
from ..cache import CompactBlock, CompactCache
from ..evaluation.store import Store
from ..head_shares import HeadShares
from ..methods import Method, get_method
from ..model_spec import ModelSpec
from ..patch.compaction import check_compactable
from ..patch.families import decoder, model_spec
from ..patch.model import compact
from ..patch.session import CompactSession
from ..version import __version__
from .common import check_output, frozen, machine
from .data import KINDS, Corpus, Recipe, collate, make_example, read_texts, tail_means
from .distill import Targets, distillation_loss, hidden_states, teacher_targets
from .loop import TrainingInterrupted

Shares = tuple[tuple[float, ...], ...]

RATIO, FACTS = 8, 3
# of the slots at RATIO: what a head is given while all others keep theirs
FEWER, MORE = 0.4, 2.5
# A single context must not decide: of its KL, a head counts for so much at most. Nor must noise: no head gets less than a
# quarter of the mean.
LARGEST_COST, SMALLEST_SHARE = 0.5, 0.25
# With more than this a head holds all of its tokens at RATIO even when it is given fewer, and there is nothing to measure.
LARGEST_SHARE = 12.0


@dataclass(frozen=True)
class SharesOptions:
    """What shares are measured on.

    Attributes:
        rounds: how often it is measured. The first time all heads have as many slots, then each has what the round before said.
        contexts: how many are read in each round.
        lengths: tokens of a context; one is drawn for each.
        continuation: tokens of the text behind it that are read on.
        chat: share of contexts in the chat template, for models that have one.
        seed: of the contexts.
    """

    rounds: int = 2
    contexts: int = 8
    lengths: tuple[int, ...] = (256, 384, 512, 768, 1024)
    continuation: int = 64
    chat: float = 0.7
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))
        check_int("rounds", self.rounds, minimum=1)
        check_int("contexts", self.contexts, minimum=1)
        check_int("continuation", self.continuation, minimum=2)
        check_int("seed", self.seed, minimum=0)
        if not self.lengths:
            raise ValueError("lengths must not be empty")
        for length in self.lengths:
            check_int("lengths", length, minimum=16)
        if isinstance(self.chat, bool) or not isinstance(self.chat, (int, float)):
            raise TypeError(f"chat must be a number, got {type(self.chat).__name__}")
        if not 0 <= self.chat <= 1:
            raise ValueError(f"chat must be a share in [0, 1], got {self.chat}")

    def recipe(self) -> Recipe:
        """What an example is made of."""
        return Recipe(dict.fromkeys(KINDS, 1.0), continuation=self.continuation, distractors=0, chat=self.chat)


def train_shares(
    model: Any,
    tokenizer: Any,
    data: Any,
    *,
    out: str | Path,
    method: str | Method = "attention_matching",
    options: SharesOptions | None = None,
    run_folder: str | Path | None = None,
    progress: bool = False,
) -> HeadShares:
    """Measures how many slots each KV head of a model needs, or goes on with what ``run_folder`` holds.

    Args:
        model: of a supported family, on the device to measure on; it stays as it is.
        tokenizer: the model's.
        data: a folder of .txt and .md files, a file, or a sequence of texts.
        out: the file, for the option ``shares`` of methods.
        method: what contexts are compacted with meanwhile: one with ``separate_heads``, or ``still`` with a selector.
        options: how many contexts, and which; default ``SharesOptions()``.
        run_folder: for what was measured of each context; default is ``out`` with ``.run`` behind it.
        progress: show a progress bar.

    Raises:
        UnsupportedModelError: a model of another family, without full-attention layers, or with another kind of RoPE.
        ValueError, TypeError: bad options or data, a method whose heads do not stand apart, a folder of another measurement.
        TrainingInterrupted: Ctrl-C; contexts that were finished are kept.
        OSError: a file could not be written.
    """
    spec = model_spec(model)
    check_compactable(spec)
    options, method = options or SharesOptions(), get_method(method)
    if tokenizer is None:
        raise ValueError("tokenizer must be given: facts are made of text")
    method.prepare(spec)
    method.with_shares(None)  # raises where heads do not stand apart
    out = check_output(out)
    folder = Path(f"{out}.run") if run_folder is None else Path(run_folder)
    corpus = Corpus(read_texts(data), tokenizer, spec.fingerprint["vocab_size"], 0.0)
    corpus.check_length(max(options.lengths) + options.continuation)
    info = {
        "method": method.name,
        "method_options": {name: str(value) for name, value in method.settings().items()},
        "options": asdict(options) | {"lengths": list(options.lengths)},
        "data": {"texts": corpus.digest, "tokenizer": corpus.key},
        "dtype": str(model.dtype).removeprefix("torch."),
    }

    with frozen(model), Store(folder, info | {"model": spec.fingerprint}) as store:
        try:
            shares = measure_shares(model, spec, method, corpus, options, progress=progress, store=store)
        except KeyboardInterrupt as stop:
            total = options.rounds * options.contexts
            raise TrainingInterrupted(
                f"interrupted after {len(store.rows)} of {total} contexts; the same call goes on from {folder}"
            ) from stop
    note = {"version": __version__, "documents": corpus.documents, "measured_on": machine(model.device)}
    made = HeadShares(shares, spec.fingerprint, info | note)
    made.save(out)
    return made


@torch.no_grad()
def measure_shares(
    model: Any,
    spec: ModelSpec,
    method: Method,
    corpus: Corpus,
    options: SharesOptions,
    *,
    progress: bool = False,
    store: Store | None = None,
) -> Shares:
    """Shares ``[layers][Hkv]``, of mean 1.

    A context is compacted at ratio 8, and read on from: text that follows, and questions on facts that were planted. Then one
    head after the other gets 0.4 and 2.5 times its slots while the others keep theirs. What that does to the KL from the full
    cache, relative to what it was, is taken to be ``cost * (its slots / slots - 1)``: what the head adds to the KL goes as one
    over its slots. The sum over the heads is least, at an equal number of slots, when their slots are proportional to the
    square roots of what they would cost with one slot each. The next round begins with these shares: where a head needs many
    times the mean, what 2.5 times the mean does says too little.

    Takes ``2 * layers * Hkv`` short forward passes a context, half a pass each on average.

    Args:
        model: patched and frozen.
        method: what contexts are compacted with; in the first round all heads get as many slots.
        corpus, options: what contexts are made of.
        progress: show a progress bar.
        store: keeps each context's costs; what it has already is not measured again.
    """
    from tqdm import tqdm

    heads = spec.layer_kinds.count("full") * spec.num_kv_heads
    rows = [torch.tensor(row["costs"]) for row in (store.rows if store else [])]
    shares = None
    total = options.rounds * options.contexts * heads
    with tqdm(total=total, initial=len(rows) * heads, desc="slots per head", unit="head", disable=not progress) as bar:
        for number in range(options.rounds):
            sharing = method.with_shares(None if shares is None else HeadShares(shares, spec.fingerprint))
            sharing.prepare(spec)
            found = []
            for index in range(number * options.contexts, (number + 1) * options.contexts):
                if index == len(rows):
                    rows.append(_context_costs(model, spec, sharing, corpus, options, index, bar))
                    if store:
                        store.append({"context": index, "costs": rows[-1].tolist()})
                found.append(rows[index])
            cost = torch.stack(found).mean(0).clamp(min=0)
            shares = _shares(cost if shares is None else cost * torch.tensor(shares))
    return shares


def _shares(cost: Tensor) -> Shares:
    """In proportion to the square root of what a head would cost with the mean number of slots, ``[layers, Hkv]``."""
    if not cost.any():
        return ((1.0,) * cost.shape[1],) * cost.shape[0]
    shares = cost.sqrt()
    shares = (shares / shares.mean()).clamp(SMALLEST_SHARE, LARGEST_SHARE)
    return tuple(tuple(round(float(x), 3) for x in row) for row in shares / shares.mean())


def _context_costs(
    model: Any, spec: ModelSpec, method: Method, corpus: Corpus, options: SharesOptions, index: int, bar: Any
) -> Tensor:
    """``[layers, Hkv]``: what the slots that each head has are worth, in context ``index``."""
    draw = random.Random(f"{options.seed} shares {index}")
    length = draw.choice(options.lengths)
    kinds = ["facts"] * FACTS + ["continuation"]
    example = make_example(corpus, corpus.train, options.recipe(), length, draw, kinds)
    ids = torch.tensor([example.context], device=model.device)
    slots = max(method.min_slots + 1, length // RATIO)
    counts = [max(method.min_slots, round(slots * factor)) for factor in (FEWER, 1, MORE)]
    caches = [compact(model, ids, method, slots=min(n, length)) for n in counts]
    student = _Student(model, spec, collate(example.tails, model.device), [t.kind for t in example.tails])
    student.teach(compact(model, ids, "full", ratio=1))
    return student.costs(caches, bar)


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

    def costs(self, caches: Sequence[CompactCache], bar: Any) -> Tensor:
        """``[layers, Hkv]``: cost of each head, summed over the kinds of tails; ``caches`` have fewer, usual and more slots."""
        usual = caches[1]
        full = [i for i, kind in enumerate(self.spec.layer_kinds) if kind == "full"]
        blocks = [[cache.layers[i].heads()[0] for i in full] for cache in caches]
        slots = torch.stack([torch.stack([cache.layers[i].slot_counts[0] for i in full]) for cache in caches]).double()
        x = slots[1] / slots[::2] - 1  # of a head with all tokens less than what was asked for
        slope = x / x.square().sum(0).clamp(min=1e-9)  # of the line through the origin that fits changes at x best
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
                    found = slope[:, number, head] @ torch.stack(changes).double().cpu()
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
