# SPDX-License-Identifier: Apache-2.0
"""Training of a token selector for one frozen model.

Contexts with facts planted in them are read once. What follows each of them, a continuation of the text or a question with
its answer, is read behind the full cache, and the attention that its queries give to the context's tokens is what the
selector learns to predict from keys and values alone. No gradient passes through the model, so this takes minutes where
distillation takes hours.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int
from ..cache import CompactBlock, load_safetensors, save_safetensors
from ..evaluation.store import Store
from ..head_shares import HeadShares
from ..methods import LayerInput, Method, get_method
from ..methods.attention_matching import own_attention
from ..model_spec import ModelSpec
from ..patch.compaction import check_compactable
from ..patch.families import model_spec, read_tokens
from ..patch.model import compact
from ..token_selector import MAX_QUERIES, SelectorConfig, TokenSelector, token_features
from .attention import Recorder, received_attention
from .common import check_output, frozen, training_note
from .data import KINDS, Corpus, Recipe, Tail, collate, make_example, read_texts
from .head_shares import SharesOptions, measure_shares
from .loop import LoopConfig, ParameterGroup, Step, StepOutput, TrainingInterrupted, TrainResult, train
from .questions import add_questions

FORMAT, FORMAT_VERSION = "kvcompact-selector-data", 1
_MEASURED = 12  # examples that the features' mean and deviation are taken from


@dataclass(frozen=True)
class SelectorOptions:
    """What a selector is trained on. All of it is part of a run's identity.

    Attributes:
        contexts: tokens of a context; each example draws one, so a length that stands there twice comes twice as often.
        examples: contexts that are read, once, before training. Each takes ``4 * head_dim * num_kv_heads`` bytes per token
            and compacted layer in the run's folder.
        held_out_examples: contexts of the held-out figures.
        facts: planted facts per 512 tokens, at most; the number is drawn, and all are asked for.
        questions: passages that the model is made to write a question about, before training; 0 for none.
        continuation: tokens of the continuation whose attention is predicted.
        chat: share of contexts in the chat template, for models that have one.
        held_out: share of each document's end that is not trained on.
        sinks: first tokens of a context that are left out: they are kept in any case.
        batch: contexts of a step.
        shares: contexts on which it is measured, after training, how many slots each KV head needs, three times: once with
            the selector, and in two rounds with ``attention_matching``; 0 for equal numbers.
    """

    contexts: tuple[int, ...] = (256, 384, 512, 512, 768, 1024, 2048)
    examples: int = 400
    held_out_examples: int = 12
    facts: int = 4
    questions: int = 0
    continuation: int = 64
    chat: float = 0.7
    held_out: float = 0.05
    sinks: int = 4
    batch: int = 2
    shares: int = 8

    def __post_init__(self):
        object.__setattr__(self, "contexts", tuple(self.contexts))
        if not self.contexts:
            raise ValueError("contexts must not be empty")
        for length in self.contexts:
            check_int("contexts", length, minimum=16)
        for name, least in (("examples", 1), ("held_out_examples", 0), ("facts", 1), ("continuation", 2), ("batch", 1)):
            check_int(name, getattr(self, name), minimum=least)
        for name in ("questions", "sinks", "shares"):
            check_int(name, getattr(self, name), minimum=0)
        for name, below in (("chat", False), ("held_out", True)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not 0 <= value <= 1 or (below and value == 1):
                raise ValueError(f"{name} must be a share in [0, 1{')' if below else ']'}, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class SelectorResult:
    """What :func:`train_selector` made: the selector, its file, and how the loop ended (``run.finished``)."""

    selector: TokenSelector
    path: Path
    run: TrainResult


@dataclass(frozen=True)
class SelectorExample:
    """A context as the network sees it, and what it should say.

    Attributes:
        keys, values: un-rotated, ``[L, Hkv, T, d]`` over the compacted layers.
        attention: ``[L, Hkv, T]``, see ``token_selector.token_features``.
        continuation: ``[L, Hkv, T]``, root mean square of the attention that the continuation's queries give a token: what
            leaving it out costs on average.
        recall: ``[L, Hkv, T]``, the most that a query of a question or its answer gives, summed over the questions: what one
            answer needs it does not need on average. 0 without a question.
    """

    keys: Tensor
    values: Tensor
    attention: Tensor
    continuation: Tensor
    recall: Tensor


def train_selector(
    model: Any,
    tokenizer: Any,
    data: Any,
    *,
    out: str | Path,
    options: SelectorOptions | None = None,
    loop: LoopConfig | None = None,
    config: SelectorConfig | None = None,
    run_folder: str | Path | None = None,
    progress: bool = False,
) -> SelectorResult:
    """Trains a selector for a model, or goes on with the training that ``run_folder`` holds.

    Args:
        model: of a supported family, on the device to read contexts on; it stays as it is.
        tokenizer: the model's.
        data: a folder of .txt and .md files, a file, or a sequence of texts.
        out: the selector's file, for ``patch_model(model, "still", weights=out)``.
        options: what is read and asked; default ``SelectorOptions()``.
        loop: optimizer, schedule, checkpoints; default :func:`default_loop`.
        config: of the network; default ``SelectorConfig`` with the model's sizes.
        run_folder: for checkpoints, log and prepared contexts; default is ``out`` with ``.run`` behind it.
        progress: show progress bars.

    Raises:
        UnsupportedModelError: a model of another family, without full-attention layers, or with another kind of RoPE.
        ValueError, TypeError: bad options or data, texts that are too short.
        CheckpointError, TrainingError, TrainingInterrupted, OSError: see :func:`kvcompact_kernels.training.loop.train`.
    """
    spec = model_spec(model)
    check_compactable(spec)
    options, loop = options or SelectorOptions(), loop or default_loop()
    config = config or SelectorConfig(spec.head_dim, spec.num_kv_heads)
    if (config.head_dim, config.num_kv_heads) != (spec.head_dim, spec.num_kv_heads):
        raise ValueError(
            f"config must be for {spec.num_kv_heads} KV heads of {spec.head_dim}, got {config.num_kv_heads} of {config.head_dim}"
        )
    if tokenizer is None:
        raise ValueError("tokenizer must be given: facts and questions are made of text")
    out = check_output(out)
    folder = Path(f"{out}.run") if run_folder is None else Path(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = read_texts(data)
    corpus = Corpus(texts, tokenizer, spec.fingerprint["vocab_size"], options.held_out, folder, progress)
    corpus.check_length(max(options.contexts) + options.continuation)
    device = next(model.parameters()).device
    with frozen(model):
        asked = None
        if options.questions:
            asked = add_questions(
                model, corpus, options.questions, spec.fingerprint, folder, seed=loop.seed, progress=progress
            )
        identity = {
            "model": spec.fingerprint,
            "options": options.to_dict(),
            "data": {"texts": corpus.digest, "tokenizer": corpus.key, "questions": asked},
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        key = hashlib.sha256(json.dumps([identity, loop.seed], sort_keys=True).encode()).hexdigest()[:16]
        reader = _Reader(model, spec, corpus, options, folder / f"contexts-{key}", loop.seed)
        reader.prepare(progress)
    generator = torch.Generator().manual_seed(loop.seed)
    selector = TokenSelector(config, spec.layer_kinds.count("full"), spec.fingerprint, generator=generator).to(device)
    trainer = SelectorTrainer(selector, reader, options)
    trainer.measure_features()
    parameters = {name: x for name, x in selector.named_parameters() if x.requires_grad}
    run = train(
        trainer,
        [ParameterGroup(parameters)],
        loop,
        folder,
        identity=identity | {"selector": config.to_dict()},
        evaluate=trainer.evaluate if corpus.held.ids.numel() and options.held_out_examples else None,
        progress=progress,
        description="selector",
        shown="loss",
    )
    selector.info = training_note(run, loop, options, identity["data"], corpus, device)
    selector.save(out, torch.bfloat16)
    if run.finished and options.shares:
        with frozen(model):
            shares = _measured_shares(model, spec, corpus, out, folder, options, loop, identity, progress)
        selector.config = replace(selector.config, shares=shares.shares)
        selector.save(out, torch.bfloat16)
    return SelectorResult(selector, out, run)


def _measured_shares(
    model: Any,
    spec: ModelSpec,
    corpus: Corpus,
    out: Path,
    folder: Path,
    options: SelectorOptions,
    loop: LoopConfig,
    identity: dict[str, Any],
    progress: bool,
) -> HeadShares:
    """The mean of two measurements, for either alone is noisy: with the selector, and with a method that is none (for which a
    second round matters)."""
    found = []
    for method, rounds in ((get_method("still", weights=str(out)), 1), (get_method("attention_matching"), 2)):
        measured = SharesOptions(
            rounds=rounds,
            contexts=options.shares,
            lengths=options.contexts,
            continuation=options.continuation,
            chat=options.chat,
            seed=loop.seed,
        )
        note = identity | {"method": method.name, "loop": asdict(loop), "rounds": rounds}
        key = hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()[:16]
        with Store(folder / f"shares-{key}", note) as store:
            try:
                shares = measure_shares(model, spec, method, corpus, measured, progress=progress, store=store)
            except KeyboardInterrupt as stop:
                raise TrainingInterrupted(
                    f"interrupted while the slots of each head were measured; the same call goes on from {folder}"
                ) from stop
        found.append(HeadShares(shares, spec.fingerprint))
    return HeadShares.mean(found)


def default_loop(**changes: Any) -> LoopConfig:
    """The loop's options that work for selectors, with changes."""
    usual = {
        "steps": 1200,
        "lr": 2e-3,
        "betas": (0.9, 0.98),
        "weight_decay": 1e-2,
        "warmup": 50,
        "schedule": "linear",
        "final": 0.03,
        "evaluate_every": 200,
    }
    return LoopConfig(**(usual | changes))


class SelectorTrainer:
    """The step function of :func:`train_selector`, and its held-out figures."""

    def __init__(self, selector: TokenSelector, reader: "_Reader", options: SelectorOptions):
        self.selector, self.reader, self.options = selector, reader, options
        self.device = next(selector.parameters()).device

    @torch.no_grad()
    def measure_features(self) -> None:
        """Sets what the features of each layer are measured in, from the first examples."""
        first = [self.reader.load("train", i) for i in range(min(_MEASURED, self.options.examples))]
        for number, layer in enumerate(self.selector.layers):
            rows = torch.cat([self._features(example, number)[0][0] for example in first])
            layer["mean"].copy_(rows.mean(0))
            layer["deviation"].copy_(rows.std(0) + 1e-3)

    def __call__(self, step: Step) -> StepOutput:
        chosen = step.batch(self.options.examples, self.options.batch)
        loss = torch.stack([self.loss(self.reader.load("train", i)) for i in chosen]).mean()
        return StepOutput(loss, batch=f"contexts {', '.join(map(str, chosen))}")

    def loss(self, example: SelectorExample) -> Tensor:
        """Mean over layers and heads of both Poisson likelihoods: their minimum is at the expected attention itself."""
        losses = []
        for number in range(len(self.selector.layers)):
            said = self.selector(number, *self._features(example, number))
            for log, wanted in zip(said, (example.continuation[number], example.recall[number])):
                log, wanted = log[0, :, self.options.sinks :], wanted[:, self.options.sinks :].to(log.device).float()
                losses.append((log.exp() - wanted * log).sum(-1).mean())
        return torch.stack(losses).mean() * 2

    def _features(self, example: SelectorExample, number: int) -> tuple[Tensor, Tensor]:
        parts = (example.keys[number], example.values[number], example.attention[number])
        return token_features(*(x[None].to(self.device) for x in parts))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out text: ``loss``, and the share of either kind of attention that an eighth of the tokens keeps, chosen
        by the selector (``recall``, ``continuation``) and by the context's own queries (``..._without``)."""
        sums: dict[str, list[float]] = {}
        for index in range(self.options.held_out_examples):
            example = self.reader.load("held", index)
            sums.setdefault("loss", []).append(float(self.loss(example)))
            kept: dict[str, list[Tensor]] = {}
            for number in range(len(self.selector.layers)):
                features, log_attention = self._features(example, number)
                said = dict(zip(("continuation", "recall"), self.selector(number, features, log_attention)))
                for name, log in said.items():
                    wanted = getattr(example, name)[number].to(log.device).float()
                    for title, score in ((name, log[0]), (f"{name}_without", log_attention[0])):
                        kept.setdefault(title, []).append(self._kept(score, wanted))
            for title, parts in kept.items():
                part, whole = torch.stack(parts).sum(0).tolist()
                if whole:
                    sums.setdefault(title, []).append(part / whole)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def _kept(self, score: Tensor, wanted: Tensor) -> Tensor:
        score, wanted = score[:, self.options.sinks :], wanted[:, self.options.sinks :]
        best = score.topk(max(1, score.shape[1] // 8), -1).indices
        return torch.stack([wanted.gather(1, best).sum(), wanted.sum()])


class _Reader:
    """Reads contexts with the model, once, and keeps what the selector is trained on in a folder, a file for each."""

    def __init__(self, model: Any, spec: ModelSpec, corpus: Corpus, options: SelectorOptions, folder: Path, seed: int):
        self.model, self.spec, self.corpus, self.options = model, spec, corpus, options
        self.folder, self.seed = folder, seed
        self.recipe = Recipe(
            dict.fromkeys(KINDS, 1.0), continuation=options.continuation, distractors=0, chat=options.chat
        )
        self.device = next(model.parameters()).device

    def _path(self, part: str, index: int) -> Path:
        return self.folder / f"{part}-{index:05d}.safetensors"

    def prepare(self, progress: bool) -> None:
        """Reads the contexts that the folder does not hold yet."""
        from tqdm import tqdm

        self.folder.mkdir(parents=True, exist_ok=True)
        held = self.options.held_out_examples if self.corpus.held.ids.numel() else 0
        wanted = [("held", i) for i in range(held)] + [("train", i) for i in range(self.options.examples)]
        missing = [which for which in wanted if not self._path(*which).is_file()]
        bar = tqdm(missing, desc="reading contexts", unit="context", disable=not progress)
        for part, index in bar:
            example = self.read(part, index)
            tensors = {name: getattr(example, name) for name in SelectorExample.__annotations__}
            header = {"format": FORMAT, "version": FORMAT_VERSION}
            save_safetensors(self._path(part, index), tensors, {FORMAT: json.dumps(header)})

    def load(self, part: str, index: int) -> SelectorExample:
        return SelectorExample(**load_safetensors(self._path(part, index), FORMAT, FORMAT_VERSION)[1])

    @torch.no_grad()
    def read(self, part: str, index: int) -> SelectorExample:
        """Example ``index`` of a part, which depends on these two, the seed and the options alone."""
        draw = random.Random(f"{self.seed} {part} {index}")
        length = draw.choice(self.options.contexts)
        kinds = ["facts"] * draw.randint(0, self.options.facts * max(1, length // 512))
        if self.corpus.train.items:
            kinds += ["questions"] * draw.randint(0, 2)
        stream = self.corpus.train if part == "train" else self.corpus.held
        example = make_example(self.corpus, stream, self.recipe, length, draw, [*kinds, "continuation"])
        capture = _Capture()
        past = compact(self.model, torch.tensor([example.context], device=self.device), capture, ratio=1)
        most, rms = self._received(past, example.tails)
        recall = [x for tail, x in zip(example.tails, most) if tail.kind in ("facts", "questions")]
        behind = [x for tail, x in zip(example.tails, rms) if tail.kind == "continuation"]
        nothing = torch.zeros_like(most[0])
        keys, values, attention = (torch.cat(parts) for parts in zip(*capture.layers))
        return SelectorExample(
            keys.to(torch.bfloat16),
            values.to(torch.bfloat16),
            attention,
            sum(behind, nothing).to(torch.bfloat16),
            sum(recall, nothing).to(torch.bfloat16),
        )

    def _received(self, past: Any, tails: Sequence[Tail]) -> list[Tensor]:
        """What :func:`received_attention` says of all compacted layers, twice ``[tails, L, Hkv, T]``."""
        ids, _, _ = collate(tails, self.device)
        session = Recorder(self.spec, past)
        read_tokens(self.model, ids, session)
        full = [i for i, kind in enumerate(self.spec.layer_kinds) if kind == "full"]
        parts = [
            received_attention(
                session.queries[i],
                session.tail_keys[i],
                past.layers[i].keys,
                [len(tail.ids) for tail in tails],
                self.spec.scales[i],
            )
            for i in full
        ]
        return [torch.stack(kind, 1) for kind in zip(*parts)]


class _Capture(Method):
    """Keeps every token, and notes what a selector sees of each layer."""

    name, summary, source = "capture", "notes what passes", "none"
    queries_needed = -1

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []

    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        attention = own_attention(layer, MAX_QUERIES)
        self.layers.append((layer.rope.unrotate(layer.keys, layer.positions), layer.values, attention))
        return CompactBlock(layer.keys.clone(), layer.values.clone())
