# SPDX-License-Identifier: Apache-2.0
"""Training of a STILL compactor (arXiv 2606.07878) for one frozen model.

The teacher is the model with a context's full cache, the student the same model with what the compactor makes of that
cache. A context is read once, without gradients; both answer the same questions on it, and the loss is the forward KL on
the answers' tokens. Contexts are compacted in chunks whose number is drawn, so that iterative compaction is trained too.
"""

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import check_choice, check_int
from ..cache import CompactBlock, CompactCache
from ..layer_networks import LayerNetworks
from ..methods.still import StillCompactor
from ..model_spec import ModelSpec
from ..patch.compaction import check_compactable
from ..patch.families import decoder, model_spec
from ..patch.model import compact
from ..patch.session import CompactSession
from ..still_config import StillConfig
from .common import check_output, frozen, training_note
from .data import KINDS, Corpus, Example, Recipe, collate, make_example, read_texts, tail_means
from .distill import RESTS, Targets, distillation_loss, hidden_states, teacher_targets
from .loop import LoopConfig, ParameterGroup, Step, StepOutput, TrainResult, train
from .questions import add_questions

MIX = {"facts": 0.45, "questions": 0.15, "recall": 0.15, "continuation": 0.25}
LR_SCALES = {"*latents": 8.0, "*_v_weight": 0.25, "*_o_weight": 0.25, "*value_head": 0.25, "*key_head": 0.25}


@dataclass(frozen=True)
class StillOptions:
    """What a compactor is trained on and how. All of it is part of a run's identity.

    Attributes:
        ratios: tokens per slot; each step draws one.
        contexts: tokens of the longest context; each step draws one, and the number of chunks in it.
        max_chunks: most chunks that a context is cut into; None is as many as fit (with a fixed number of slots per chunk a
            chunk has ``ratio * slots`` tokens, and a context of fewer chunks is shorter).
        mix: weight of each kind of tail: "facts" (planted ones are asked for), "questions" (that the model wrote),
            "recall" (a passage of the context, once more) and "continuation".
        tails: per context; continuation, recall, cue: tokens, see ``data.Recipe``.
        distractors: planted facts that nobody asks for, at most.
        chat: share of contexts in the chat template, for models that have one.
        questions: passages that the model is made to write a question about, before training.
        batch: contexts of a step (of a micro-step, when gradients are accumulated).
        top_k: teacher's tokens that the loss looks at.
        rest: what becomes of the other tokens: "lump" or "renormalise".
        gold_weight: weight of the cross-entropy of the answer's tokens, added to the KL.
        lr_scales: pattern of parameter names -> factor on the learning rate; the first that fits counts, others have 1.
        held_out: share of each document's end that is not trained on.
        held_out_contexts: contexts of the held-out figures.
        autocast: "bfloat16" runs student and teacher in it on a model of a wider dtype; None as the model is. A context
            itself is always read in the model's own dtype. (Not "float16": its gradients would need scaling.)
        gradient_checkpointing: recompute the compactor and the student's layers in the backward pass: less memory, about a
            third more time. The gradients are the same.
    """

    ratios: tuple[float, ...] = (8.0,)
    contexts: tuple[int, ...] = (2048,)
    max_chunks: int | None = None
    mix: Mapping[str, float] = field(default_factory=lambda: dict(MIX))
    tails: int = 8
    continuation: int = 64
    recall: int = 48
    cue: int = 8
    distractors: int = 4
    chat: float = 0.5
    questions: int = 256
    batch: int = 1
    top_k: int = 200
    rest: str = "lump"
    gold_weight: float = 0.0
    lr_scales: Mapping[str, float] = field(default_factory=lambda: dict(LR_SCALES))
    held_out: float = 0.05
    held_out_contexts: int = 8
    autocast: str | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self):
        object.__setattr__(self, "ratios", tuple(float(r) for r in _numbers("ratios", self.ratios)))
        object.__setattr__(self, "contexts", tuple(_numbers("contexts", self.contexts)))
        for ratio in self.ratios:
            if not 1 <= ratio < math.inf:
                raise ValueError(f"ratios must be at least 1, got {ratio}")
        for length in self.contexts:
            check_int("contexts", length, minimum=16)
        if self.max_chunks is not None:
            check_int("max_chunks", self.max_chunks, minimum=1)
        for name, least in (("tails", 1), ("continuation", 2), ("recall", 2), ("cue", 1), ("batch", 1), ("top_k", 1)):
            check_int(name, getattr(self, name), minimum=least)
        for name in ("distractors", "questions", "held_out_contexts"):
            check_int(name, getattr(self, name), minimum=0)
        if self.cue >= self.recall:
            raise ValueError(f"cue must be less than recall = {self.recall}, got {self.cue}")
        check_choice("rest", self.rest, RESTS)
        if self.autocast is not None:
            check_choice("autocast", self.autocast, ("bfloat16",))
        unknown = sorted(set(self.mix) - set(KINDS))
        if unknown:
            raise ValueError(f"mix: there is no kind {unknown[0]!r}; there are: {', '.join(KINDS)}")
        for name, table in (("mix", self.mix), ("lr_scales", self.lr_scales)):
            for key, value in table.items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                    raise ValueError(f"{name}[{key!r}] must be a number and at least 0, got {value!r}")
        if not sum(self.mix.values()):
            raise ValueError("mix must give some kind a weight above 0")
        for name, below in (("chat", None), ("held_out", 1.0), ("gold_weight", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if value < 0 or (below is not None and value >= below) or (name == "chat" and value > 1):
                raise ValueError(f"{name} must be a share in [0, 1{')' if below else ']'}, got {value}")

    def recipe(self) -> Recipe:
        """What examples are made of."""
        return Recipe(dict(self.mix), self.tails, self.continuation, self.recall, self.cue, self.distractors, self.chat)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class StillResult:
    """What :func:`train_still` made.

    Attributes:
        compactor: the trained one.
        path: its file.
        run: how the loop ended; ``run.finished`` is False when a time limit ended it early.
    """

    compactor: StillCompactor
    path: Path
    run: TrainResult


def train_still(
    model: Any,
    tokenizer: Any,
    data: Any,
    *,
    out: str | Path,
    ratios: Sequence[float] | float | None = None,
    contexts: Sequence[int] | int | None = None,
    steps: int | None = None,
    options: StillOptions | None = None,
    loop: LoopConfig | None = None,
    slots: int | None = None,
    config: Mapping[str, Any] | None = None,
    start: StillCompactor | str | Path | None = None,
    run_folder: str | Path | None = None,
    data_cache: str | Path | None = None,
    progress: bool = False,
) -> StillResult:
    """Trains a compactor for a model, or goes on with the training that ``run_folder`` holds.

    Args:
        model: of a supported family, on the device to train on; it stays as it is, bit for bit. Loaded in bfloat16 it takes
            half the memory; the compactor's own parameters are float32.
        tokenizer: the model's; None when ``data`` are token ids (then only "recall" and "continuation" are trained).
        data: a folder of .txt and .md files, a file, or a sequence of texts or of 1-D tensors of token ids.
        out: the compactor's file, for ``StillCompactor.load`` and ``patch_model(model, "still", weights=out)``.
        ratios, contexts, steps: shorthands for these fields of ``options`` and ``loop``.
        options: what is trained on and how; default ``StillOptions()``.
        loop: optimizer, schedule, checkpoints; default is AdamW with a learning rate of 3e-4 and 100 steps of warm-up.
        slots: per chunk, of a new compactor; default so that four chunks of the smallest ratio make the longest context and
            the largest ratio's chunk still fits into it.
        config: other fields of ``StillConfig`` for a new compactor; ``sink`` is 1 unless given.
        start: a compactor, or the file of one, whose parameters are the start (then neither ``slots`` nor ``config``).
        run_folder: for checkpoints and log; default is ``out`` with ``.run`` behind it.
        data_cache: folder for tokens and written questions, which several runs may share; default is ``run_folder``.
        progress: show progress bars.

    Returns:
        StillResult

    Raises:
        UnsupportedModelError: a model of another family, without full-attention layers, or with another kind of RoPE.
        ValueError, TypeError: bad options or data, a context longer than the texts or shorter than the slots, a compactor of
            another model.
        CheckpointError, TrainingError, TrainingInterrupted, OSError: see :func:`kvcompact_kernels.training.loop.train`.
    """
    spec = check_teacher(model)
    options = with_changes(options or StillOptions(), ratios=several(ratios), contexts=several(contexts))
    loop = with_changes(loop or LoopConfig(1000, lr=3e-4, warmup=100, evaluate_every=100), steps=steps)
    compactor = _compactor(spec, options, slots, config, start, loop.seed)
    path, run = train_compactor(
        StillTrainer, model, tokenizer, data, compactor, options, loop, out=out, run_folder=run_folder,
        data_cache=data_cache, started=start is not None, progress=progress, description="still",
    )  # fmt: skip
    return StillResult(compactor, path, run)


def check_teacher(model: Any) -> ModelSpec:
    """The model's description.

    Raises:
        UnsupportedModelError: a model of another family, without full-attention layers, or with another kind of RoPE.
        ValueError: it has no vocabulary head.
    """
    spec = model_spec(model)
    check_compactable(spec)
    if model.get_output_embeddings() is None:
        raise ValueError(f"model must have a vocabulary head to be distilled, {type(model).__name__} has none")
    return spec


def train_compactor(
    trainer_type: Callable[..., "StillTrainer"],
    model: Any,
    tokenizer: Any,
    data: Any,
    compactor: LayerNetworks,
    options: StillOptions,
    loop: LoopConfig,
    *,
    out: str | Path,
    run_folder: str | Path | None,
    data_cache: str | Path | None,
    started: bool,
    progress: bool,
    description: str,
) -> tuple[Path, TrainResult]:
    """Trains networks that make slots of a cache, in place, and saves them; most arguments as for :func:`train_still`.

    Args:
        trainer_type: called with ``(model, spec, compactor, corpus, options, plans)``, see :class:`StillTrainer`.
        started: the compactor was trained before, so its parameters belong to the run's identity.
        description: stands at the progress bar.

    Returns:
        The file that was written, and how the loop ended.
    """
    spec = model_spec(model)
    plans = Plans(compactor, options)
    out = check_output(out)
    folder = Path(f"{out}.run") if run_folder is None else Path(run_folder)
    cache = folder if data_cache is None else Path(data_cache)
    for needed in (folder, cache):
        needed.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    texts = read_texts(data)
    corpus = Corpus(texts, tokenizer, spec.fingerprint["vocab_size"], options.held_out, cache, progress)
    if tokenizer is None and any(options.mix.get(kind, 0) for kind in ("facts", "questions")):
        raise ValueError('mix must leave out "facts" and "questions" without a tokenizer: both are made of text')
    corpus.check_length(max(options.contexts) + options.continuation)
    compactor.to(device)
    with frozen(model):
        asked = None
        if options.mix.get("questions", 0) and options.questions:
            asked = add_questions(
                model, corpus, options.questions, spec.fingerprint, cache, seed=loop.seed, progress=progress
            )
        identity = {
            "model": spec.fingerprint,
            "compactor": compactor.config.to_dict(),
            "options": options.to_dict(),
            "data": {"texts": corpus.digest, "tokenizer": corpus.key, "questions": asked},
            "start": _digest(compactor) if started else None,
        }
        # of two runs only the same dtype gives the same bits
        identity["dtype"] = str(model.dtype).removeprefix("torch.")
        trainer = trainer_type(model, spec, compactor, corpus, options, plans)
        run = train(
            trainer,
            parameter_groups(compactor, options.lr_scales),
            loop,
            folder,
            identity=identity,
            evaluate=trainer.evaluate if corpus.held.ids.numel() and options.held_out_contexts else None,
            progress=progress,
            description=description,
        )
    note = training_note(run, loop, options, identity["data"], corpus, device)
    chunks = plans.describe()
    compactor.info = {**compactor.info, **note} | ({} if chunks is None else {"chunk_tokens": chunks})
    compactor.save(out)
    return out, run


class Plans:
    """How long a context is and where it is cut.

    A compactor whose file fixes the slots of a chunk takes chunks of ``ratio * slots`` tokens. One that takes any number
    says so with a method ``slots_for(tokens, ratio)``, and is called with that number as ``slots``.

    Raises:
        ValueError: no chunk of some ratio fits into any context.
    """

    def __init__(self, compactor: Any, options: StillOptions):
        self.options = options
        self.slots_for = getattr(compactor, "slots_for", None)
        self.fixed = None if self.slots_for is not None else compactor.config.slots
        if self.fixed is not None:
            for ratio in options.ratios:
                if self._chunk(ratio) > max(options.contexts):
                    raise ValueError(
                        f"contexts: the {self.fixed} slots of a chunk at ratio {ratio:g} stand for {self._chunk(ratio)} "
                        f"tokens, more than the {max(options.contexts)} of the longest context: give fewer slots"
                    )

    def _chunk(self, ratio: float) -> int:
        return math.ceil(ratio * self.fixed)

    def draw(self, draw: random.Random) -> tuple[list[tuple[int, int]], float]:
        """Chunks ``(start, end)``, one after the other from 0, and the ratio that they are compacted with."""
        ratio = draw.choice(self.options.ratios)
        most = self.options.max_chunks
        if self.fixed is not None:
            size = self._chunk(ratio)
            fitting = [length for length in self.options.contexts if length >= size]
            room = draw.choice(fitting) // size
            count = draw.randint(1, room if most is None else min(most, room))
            return [(i * size, (i + 1) * size) for i in range(count)], ratio
        tokens = draw.choice(self.options.contexts)
        room = max(1, tokens // 64)
        count = draw.randint(1, min(4 if most is None else most, room))
        ends = [tokens * (i + 1) // count for i in range(count)]
        return list(zip([0, *ends], ends)), ratio

    def describe(self) -> dict[str, int] | None:
        """Ratio -> tokens of a chunk, for a fixed number of slots."""
        return None if self.fixed is None else {f"{ratio:g}": self._chunk(ratio) for ratio in self.options.ratios}


class StillTrainer:
    """The step function of :func:`train_still`, and its held-out figures.

    Attributes:
        reverse: share of the reverse KL in the loss, see ``distill.distillation_loss``.

    Args:
        model: patched and frozen.
        compactor: a module that is called as ``compactor(layer, keys, values, rope, positions) -> CompactBlock``, with
            ``slots=`` added when it takes any number of them.
    """

    reverse = 0.0

    def __init__(
        self, model: Any, spec: ModelSpec, compactor: Any, corpus: Corpus, options: StillOptions, plans: Plans
    ):
        self.model, self.spec, self.compactor, self.corpus = model, spec, compactor, corpus
        self.options, self.plans, self.recipe = options, plans, options.recipe()
        self.device = next(model.parameters()).device
        self._none: dict[str, float] | None = None

    def __call__(self, step: Step) -> StepOutput:
        draw = step.random("example")
        chunks, ratio = self.plans.draw(draw)
        examples = [self._example(self.corpus.train, chunks, draw) for _ in range(self.options.batch)]
        kinds = [tail.kind for example in examples for tail in example.tails]
        kl, cross_entropy, _ = self.compare(examples, chunks, ratio)
        loss = kl.mean() + self.options.gold_weight * cross_entropy.mean()
        metrics = {"kl": float(kl.detach().mean()), "tokens": float(chunks[-1][1]), "ratio": ratio}
        for kind in dict.fromkeys(kinds):
            metrics[f"kl_{kind}"] = float(torch.stack([x for x, k in zip(kl.detach(), kinds) if k == kind]).mean())
        return StepOutput(loss, metrics, "; ".join(f"{len(e.context)} tokens of {e.name}" for e in examples))

    def _example(self, stream: Any, chunks: list[tuple[int, int]], draw: random.Random) -> Example:
        return make_example(self.corpus, stream, self.recipe, chunks[-1][1], draw)

    def compare(
        self, examples: Sequence[Example], chunks: list[tuple[int, int]], ratio: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher against student on all tails of some contexts of one length.

        Returns:
            KL, cross-entropy and whether every scored token is the student's most likely one: fp32 ``[tails]``.
        """
        full = self.read(torch.tensor([example.context for example in examples], device=self.device))
        # one context after the other, for its tails share one copy of the full cache that way
        taught = [
            self.teach(_rows(full, [i]), collate(example.tails, self.device)) for i, example in enumerate(examples)
        ]
        targets = Targets(torch.cat([t.ids for t in taught]), torch.cat([t.logs for t in taught]))
        owner = [i for i, example in enumerate(examples) for _ in example.tails]
        batch = collate([tail for example in examples for tail in example.tails], self.device)
        return self.learn(_rows(self.compacted(full, chunks, ratio), owner), batch, targets, len(owner))

    @torch.no_grad()
    def read(self, ids: Tensor) -> CompactCache:
        """The full cache of contexts ``[B, T]``: the teacher's, and what is compacted. Nothing ever writes to it."""
        return compact(self.model, ids, "full", ratio=1)

    @torch.no_grad()
    def teach(self, past: CompactCache | None, batch: tuple[Tensor, Tensor, Tensor]) -> Targets:
        """What the model says behind a cache (or behind nothing)."""
        ids, scored, _ = batch
        with self._autocast():
            hidden = hidden_states(self.model, ids, self._session(past), scored)
            return teacher_targets(self.model, hidden, ids[scored], self.options.top_k)

    def learn(
        self, past: CompactCache | None, batch: tuple[Tensor, Tensor, Tensor], targets: Targets, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How far the model behind this cache is from the targets, per tail."""
        ids, scored, tail = batch
        with self._autocast(), self._checkpointing():
            hidden = hidden_states(self.model, ids, self._session(past), scored)
            # held-out figures are the forward KL whatever is trained with, so that they can be compared
            reverse = self.reverse if torch.is_grad_enabled() else 0.0
            kl, cross_entropy, right = distillation_loss(
                self.model, hidden, targets, rest=self.options.rest, reverse=reverse
            )
        all_right = (tail_means(right, tail, count) > 1 - 1e-4).float()
        return tail_means(kl, tail, count), tail_means(cross_entropy, tail, count), all_right

    def compacted(self, full: CompactCache, chunks: Sequence[tuple[int, int]], ratio: float) -> CompactCache:
        """The full cache with each compacted layer turned into slots, chunk by chunk; differentiable."""
        layers, number = [], 0
        rope = full.ropes["full"]
        positions = torch.arange(full.logical_length, device=self.device)
        with self._autocast():
            for block in full.layers:
                if isinstance(block, CompactBlock):
                    parts = [
                        self._chunk(number, block, rope, positions, *chunk, self.arguments(full, number, *chunk, ratio))
                        for chunk in chunks
                    ]
                    layers.append(CompactBlock.cat(parts))
                    number += 1
                else:
                    layers.append(block)
        return CompactCache(tuple(layers), full.logical_length, full.fingerprint, full.ropes, full.lengths, "still", {})

    def arguments(self, full: CompactCache, layer: int, start: int, end: int, ratio: float) -> dict[str, Any]:
        """What the compactor is given of a chunk beside its keys and values."""
        return {} if self.plans.fixed is not None else {"slots": self.plans.slots_for(end - start, ratio)}

    def _chunk(self, layer: int, block: CompactBlock, rope: Any, positions: Tensor, start: int, end: int, more: dict):
        keys, values = block.keys[:, :, start:end], block.values[:, :, start:end]

        def run() -> tuple[Tensor, Tensor, Tensor | None]:
            made = self.compactor(layer, keys, values, rope, positions[start:end], **more)
            # autocast may have left another dtype, and all slots of a layer share one
            return made.keys.to(keys.dtype), made.values.to(keys.dtype), made.beta

        if self.options.gradient_checkpointing and torch.is_grad_enabled():
            return CompactBlock(*checkpoint(run, use_reentrant=False))
        return CompactBlock(*run())

    def _session(self, past: CompactCache | None) -> CompactSession | None:
        if past is None:
            return None
        session = CompactSession(self.spec, past)
        session.functional = True  # a pass stores nothing: teacher and student never see each other's tokens
        return session

    def _autocast(self):
        dtype = None if self.options.autocast is None else getattr(torch, self.options.autocast)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        if not (self.options.gradient_checkpointing and torch.is_grad_enabled()):
            yield
            return
        base = decoder(self.model)
        was_on = self.model.is_gradient_checkpointing
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        # these modules alone: in training mode the attention modules inside would drop out
        outer = [base, *base.layers]
        modes = [module.training for module in outer]
        try:
            for module in outer:
                module.training = True
            yield
        finally:
            for module, mode in zip(outer, modes):
                module.training = mode
            if not was_on:
                self.model.gradient_checkpointing_disable()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out figures, always on the same contexts: ``kl`` over all tails, ``kl_KIND`` and ``right_KIND`` (share of
        tails whose scored tokens are all the most likely ones) per kind, and ``none_...`` for no context at all."""
        kinds = [kind for kind in KINDS if self.options.mix.get(kind, 0) > 0]
        sums: dict[str, list[float]] = {}
        none: dict[str, list[float]] = {}
        for index in range(self.options.held_out_contexts):
            draw = random.Random(f"held out {index}")
            chunks, ratio = self.plans.draw(draw)
            tails = [kinds[i % len(kinds)] for i in range(max(self.options.tails, len(kinds)))]
            example = make_example(self.corpus, self.corpus.held, self.recipe, chunks[-1][1], draw, tails)
            found = [tail.kind for tail in example.tails]
            full = self.read(torch.tensor([example.context], device=self.device))
            batch = collate(example.tails, self.device)
            targets = self.teach(full, batch)
            _gather(sums, found, *self.learn(self.compacted(full, chunks, ratio), batch, targets, len(found)))
            if self._none is None:
                _gather(none, found, *self.learn(None, batch, targets, len(found)))
        if self._none is None:
            self._none = {f"none_{name}": sum(x) / len(x) for name, x in none.items()}
        return {name: sum(x) / len(x) for name, x in sums.items()} | self._none


def _gather(sums: dict[str, list[float]], kinds: list[str], kl: Tensor, cross_entropy: Tensor, right: Tensor) -> None:
    for kind, loss, whole in zip(kinds, kl.tolist(), right.tolist()):
        for name in ("kl", f"kl_{kind}"):
            sums.setdefault(name, []).append(loss)
        if kind != "continuation":
            sums.setdefault(f"right_{kind}", []).append(whole)


def parameter_groups(compactor: Any, scales: Mapping[str, float]) -> list[ParameterGroup]:
    """The compactor's parameters by learning rate: the first pattern that fits a name gives its factor, else 1."""
    groups: dict[float, dict[str, Tensor]] = {}
    for name, parameter in compactor.named_parameters():
        if parameter.requires_grad:
            scale = next((s for pattern, s in scales.items() if fnmatchcase(name, pattern)), 1.0)
            groups.setdefault(float(scale), {})[name] = parameter
    return [ParameterGroup(parameters, scale) for scale, parameters in sorted(groups.items())]


def _rows(cache: CompactCache, owner: Sequence[int]) -> CompactCache:
    """The cache with these batch elements; a single context serves any number of tails as it is."""
    if cache.batch_size == 1:
        return cache
    index = torch.tensor(owner, device=cache.device)
    layers = tuple(block.index_batch(index) for block in cache.layers)
    return CompactCache(layers, cache.logical_length, cache.fingerprint, cache.ropes, None, cache.method, {})


def _compactor(spec, options, slots, config, start, seed) -> StillCompactor:
    if start is not None:
        if slots is not None or config:
            raise ValueError("slots and config must be left out with start: it has its own")
        # a copy: the caller's own stays as it is
        made = copy.deepcopy(start) if isinstance(start, torch.nn.Module) else StillCompactor.load(start)
        made.check_model(spec, "start")
        made.float().requires_grad_(True)
        return made
    fixed = {"slots", "head_dim", "num_kv_heads"} & set(config or {})
    if fixed:
        raise ValueError(f"config must leave out {', '.join(sorted(fixed))}: give slots as an argument of its own")
    if slots is None:
        slots = default_slots(options)
    fields = {"sink": 1, **(config or {})}
    made = StillConfig(slots=slots, head_dim=spec.head_dim, num_kv_heads=spec.num_kv_heads, **fields)
    generator = torch.Generator().manual_seed(seed)
    return StillCompactor(made, spec.layer_kinds.count("full"), spec.fingerprint, generator=generator)


def default_slots(options: StillOptions) -> int:
    """Slots of a chunk: four chunks of the smallest ratio make the longest context, one of the largest fits into it."""
    longest = max(options.contexts)
    return max(2, min(int(longest / 4 / min(options.ratios)), int(longest / max(options.ratios))))


def _digest(compactor: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, x in compactor.named_parameters():
        digest.update(name.encode() + x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def with_changes(options: Any, **changes: Any) -> Any:
    """The options with those changes that are not None."""
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(options, **given) if given else options


def several(value: Any) -> tuple | None:
    """A number as a tuple of one, a sequence as a tuple."""
    if value is None:
        return None
    return (value,) if isinstance(value, (int, float)) else tuple(value)


def _numbers(name: str, values: Any) -> tuple:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of numbers, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{name} must not be empty")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must hold numbers, got {value!r}")
    return tuple(values)
