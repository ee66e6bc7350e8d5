# SPDX-License-Identifier: Apache-2.0
"""Cartridges (arXiv 2506.06266): slots that are trained to answer as the model does with the text before it.

Data are conversations that the model wrote about the text (:mod:`.self_study`). The student is the same frozen model with
the slots as its only context; the loss is the divergence of its next-token distribution from the teacher's, at the
answers' tokens. What a step needs does not depend on the length of the text: slots, their gradients and moments, and the
activations of one batch.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, check_int
from ..cache import CompactCache
from ..evaluation.specs import parse_spec
from ..head_shares import HeadShares
from ..methods import Method, get_method
from ..methods.cartridge import Cartridge
from ..model_spec import ModelSpec
from ..prompt import document_ids, prompt_format
from ..token_selector import TokenSelector
from ..version import __version__
from .common import frozen
from .distill import RESTS, Targets, distillation_loss, hidden_states, pad_answers
from .layer_fit import fit_layers
from .loop import LoopConfig, ParameterGroup, Step, StepOutput, TrainResult, stable_number, train
from .self_study import Conversation, Conversations, SelfStudyConfig, prepare_conversations
from .study_start import study_start

FIRST_TOKENS = "cartridge"
LAYERS = "layers"
SELF_STUDY = "self_study"
SUFFIX = ".kvc"


@dataclass(frozen=True)
class CartridgeConfig:
    """What is trained.

    Attributes:
        slots: per KV head and layer.
        init: method whose slots training starts from, with its options as in ``attention_matching:queries=repeat``.
            "cartridge": the text's first tokens, of which nothing else is read. "self_study": the tokens that the answers of
            the conversations look at (:func:`.study_start.study_start`); "self_study:weights=F" leaves the choice to the
            selector of that file, whose shares of the slots its KV heads get; "self_study:shares=F" takes the shares of a
            file of ``train_shares``. "cartridge:file=F": the slots of a file, to train them further. All but the first read
            the whole text, which must fit into the model's positions and, once, into memory.
        sinks: leading slots that stay as they are (the attention sink).
        train_beta: also train a bias per slot.
        tokens: of requests and answers in one batch; conversations of similar length share one, and the padding counts.
        rest: what the loss does with tokens that the teacher holds unlikely, see :func:`.distill.distillation_loss`.
            "renormalise" is what Cartridges' code does, but does not see mass that the student puts on other tokens.
        distractors: share of the steps in which another cartridge stands beside the one that is asked, so that they can
            be composed: another document's of this run, or one that was given.
        reposition: how they are composed, as in ``CompactCache.compose``.
        layer_steps: steps in which each layer's slots are fitted by themselves to what the whole text's attention gives, before
            they are trained together (:func:`.layer_fit.fit_layers`).
    """

    slots: int = 512
    init: str = FIRST_TOKENS
    sinks: int = 1
    train_beta: bool = False
    tokens: int = 2048
    rest: str = "lump"
    distractors: float = 0.0
    reposition: bool = False
    layer_steps: int = 0

    def __post_init__(self):
        check_int("slots", self.slots, minimum=1)
        check_int("sinks", self.sinks, minimum=0)
        if self.sinks >= self.slots:
            raise ValueError(f"sinks must be less than the {self.slots} slots, got {self.sinks}")
        check_int("tokens", self.tokens, minimum=1)
        check_choice("rest", self.rest, RESTS)
        if isinstance(self.distractors, bool) or not isinstance(self.distractors, (int, float)):
            raise TypeError(f"distractors must be a number, got {type(self.distractors).__name__}")
        if not 0 <= self.distractors <= 1:
            raise ValueError(f"distractors must be in [0, 1], got {self.distractors}")
        check_int("layer_steps", self.layer_steps, minimum=0)
        if self.layer_steps and self.init == FIRST_TOKENS:
            raise ValueError(
                f"layer_steps fits slots to the whole text, of which init {FIRST_TOKENS!r} reads the first tokens only: give "
                f"another init, such as {SELF_STUDY!r}"
            )
        self.method()

    def method(self) -> Method | None:
        """The method of ``init``; None for "self_study", which is no method, for it needs conversations.

        Raises:
            ValueError, TypeError: there is none of that name, or it refuses an option.
            FileNotFoundError: a file that an option names.
        """
        name, options = parse_spec(self.init)
        if name != SELF_STUDY:
            return get_method(name, **options)
        self.study_options()
        return None

    def study_options(self, spec: ModelSpec | None = None) -> dict[str, Any]:
        """What "self_study:weights=F:shares=F" gives :func:`.study_start.study_start` beside the text.

        Raises:
            ValueError: another option, or a file that is damaged or for another model.
            FileNotFoundError: there is none.
        """
        name, options = parse_spec(self.init)
        if name != SELF_STUDY:
            return {}
        if not options.keys() <= {"weights", "shares"}:
            raise ValueError(f"init {SELF_STUDY!r} has the options weights and shares; got {', '.join(options)}")
        made: dict[str, Any] = {}
        if "weights" in options:
            made["selector"] = TokenSelector.load(str(options["weights"]), spec)
        if "shares" in options:
            given = HeadShares.load(str(options["shares"]))
            if spec is not None:
                given.check_model(spec, f"shares {options['shares']}")
            made["shares"] = given.shares
        return made


@dataclass(frozen=True)
class TrainedCartridge:
    """Where a cartridge lies and how far it came.

    Attributes:
        name: of the document.
        path: ``CompactCache.load`` reads it, and ``Cartridge.load`` to train it further.
        tokens: of the document.
        steps: optimizer steps that it got, or that its group has done when several were trained together.
        finished: False when the run was stopped by its limit of time or steps.
        evaluation: held-out figures: ``kl`` (nats per answer token), ``kl_<name>`` when there are several documents, and
            ``kl_composed`` beside another cartridge.
        losses: of each step of this call.
        seconds: of training in this call.
    """

    name: str
    path: Path
    tokens: int
    steps: int
    finished: bool
    evaluation: dict[str, float] | None
    losses: list[float]
    seconds: float


def default_loop(steps: int = 240, **options: Any) -> LoopConfig:
    """The recipe of Cartridges' code: Adam with learning rate 0.02, which falls after a short rise."""
    values = {"lr": 2e-2, "optimizer": "adam", "warmup": min(10, steps // 4), "final": 0.05}
    values |= {"checkpoint_every": 40, "evaluate_every": 40}
    return LoopConfig(steps=steps, **{**values, **options})


def train_cartridge(
    model: Any,
    tokenizer: Any,
    documents: str | Mapping[str, str],
    out: str | Path,
    config: CartridgeConfig | None = None,
    study: SelfStudyConfig | None = None,
    loop: LoopConfig | None = None,
    *,
    run_folder: str | Path | None = None,
    distractors: Sequence[str | Path] = (),
    memory_bytes: int | None = None,
    model_name: str | None = None,
    progress: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> list[TrainedCartridge]:
    """Trains a cartridge for each document; goes on where an earlier call with the same arguments stopped.

    Args:
        model, tokenizer: of a supported family; its weights do not change.
        documents: a text, or texts by name (a name becomes a file name).
        out: the file for one document, the folder for several: ``NAME.kvc`` each.
        config, study, loop: what is trained, on what, and how; ``loop.steps`` are those of each document.
        run_folder: for conversations and checkpoints; default ``OUT.run``. Conversations of a document are written once,
            and serve every run with that folder.
        distractors: cartridge files (of this model) to train beside, if ``config.distractors`` is above 0.
        memory_bytes: for slots, gradients and moments. As many documents as fit are trained together, one group after
            the other; a later group has the earlier ones' cartridges as distractors. None: all together.
        model_name: written into the files, for ``kvcompact ask``.
        report: called with a line for what a user ought to know.

    Returns:
        One entry for each document whose training has begun, in order.

    Raises:
        UnsupportedModelError: the model's family or a feature of it is not supported.
        ValueError, TypeError: bad options, a document that is empty or shorter than the slots, a memory limit below one
            cartridge, a checkpoint of another run, a distractor of another model.
        TrainingError: the loss is NaN or infinite: parameters and the last checkpoint are kept.
        TrainingInterrupted: Ctrl-C, after the step was finished and saved.
        OSError: a file could not be written; checkpoint and conversations are intact.
    """
    from ..patch import model_spec
    from ..patch.compaction import check_compactable

    config, study, loop = config or CartridgeConfig(), study or SelfStudyConfig(), loop or default_loop()
    spec = model_spec(model)
    check_compactable(spec)
    config.study_options(spec)
    out = Path(out)
    single = isinstance(documents, str) or len(documents) == 1
    texts = {"document": documents} if isinstance(documents, str) else dict(documents)
    paths = _output_paths(texts, out, single)
    work = Path(run_folder) if run_folder is not None else out.with_name(out.name + ".run")
    form = prompt_format(tokenizer)
    ids = {name: _check_document(tokenizer, form, name, text, config, model) for name, text in texts.items()}
    groups = _groups(list(texts), spec, model, config, memory_bytes)
    given = [_check_distractor(Path(path), model) for path in distractors]
    if config.distractors and not given and len(texts) == 1:
        raise ValueError("distractors: one document alone has none; give cartridge files, or train several documents")
    if not single:
        out.mkdir(parents=True, exist_ok=True)
    done: list[TrainedCartridge] = []
    spent = 0.0  # seconds of training
    with frozen(model):
        for number, names in enumerate(groups):
            conversations = [
                prepare_conversations(
                    model, tokenizer, texts[name], study, work, progress=progress, description=f"{name}: self-study"
                )
                for name in names
            ]
            cartridges = [
                _start(model, spec, ids[name], data, config, work / f"start-{name}{SUFFIX}")
                for name, data in zip(names, conversations)
            ]
            files = [*given, *(entry.path for entry in done)]
            task = _Task(model, spec, names, cartridges, conversations, config, loop.seed, files)
            folder = work if len(groups) == 1 else work / f"group-{number + 1}"
            fitted, spent = _fit_layers(task, ids, work / LAYERS, config, loop, spent, progress)
            if fitted is not None and not fitted.finished:
                result = TrainResult(0, False, 0, fitted.seconds, None, [])
            else:
                result = train(
                    task.step,
                    [ParameterGroup(task.parameters())],
                    replace(loop, steps=loop.steps * len(names), max_seconds=_left(loop, spent)),
                    folder,
                    identity=task.identity(given),
                    evaluate=task.evaluate,
                    progress=progress,
                    description=names[0] if len(names) == 1 else f"{len(names)} cartridges",
                )
                spent += result.seconds
            for name, text, cartridge, data in zip(names, map(texts.get, names), cartridges, conversations):
                note = _note(form, name, text, model_name, config, study, loop, data, result)
                _save(cartridge, paths[name], model.dtype, note)
                done.append(_entry(name, paths[name], len(ids[name]), result))
            if not result.finished:
                left = sum(map(len, groups[number + 1 :]))
                layers = f" ({fitted.step} of {config.layer_steps} of the layers)" if fitted and not result.step else ""
                report(
                    f"stopped after step {result.step} of {loop.steps * len(names)}{layers}"
                    + (f"; {left} documents have not begun" if left else "")
                    + f"; the same call goes on from {folder}"
                )
                break
    return done


class BatchPlan:
    """Which conversations a batch holds: a function of seed and the batch's number alone.

    A batch is filled up to a number of tokens, counted as rows times the longest. Each epoch shuffles the conversations,
    sorts stretches of them by length (so that little is padding), cuts these into batches and shuffles the batches.

    Args:
        items: indices of the conversations.
        lengths: tokens, by index. One that is longer than ``tokens`` makes a batch of its own.
    """

    POOL = 16

    def __init__(self, items: Sequence[int], lengths: Sequence[int], tokens: int, seed: int):
        self.items, self.lengths, self.tokens, self.seed = list(items), lengths, tokens, seed
        self._ends: list[int] = []
        self._latest: tuple[int, list[list[int]]] = (-1, [])

    def batch(self, number: int) -> list[int]:
        """Indices of the conversations of batch ``number``, counted over all epochs."""
        while not self._ends or self._ends[-1] <= number:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._epoch(len(self._ends))))
        epoch = next(e for e, end in enumerate(self._ends) if number < end)
        return self._epoch(epoch)[number - (self._ends[epoch - 1] if epoch else 0)]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if self._latest[0] == epoch:
            return self._latest[1]
        draw = random.Random(stable_number(self.seed, epoch, "batches"))
        order = list(self.items)
        draw.shuffle(order)
        mean = sum(self.lengths[i] for i in order) / len(order)
        pool = max(1, round(self.POOL * self.tokens / mean))
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            batch: list[int] = []
            for i in sorted(order[start : start + pool], key=lambda i: self.lengths[i]):
                if batch and (len(batch) + 1) * self.lengths[i] > self.tokens:
                    batches.append(batch)
                    batch = []
                batch.append(i)
            batches.append(batch)
        draw.shuffle(batches)
        self._latest = (epoch, batches)
        return batches


class _Task:
    """Loss and held-out figures of cartridges that are trained together."""

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        names: list[str],
        cartridges: list[Cartridge],
        conversations: list[Conversations],
        config: CartridgeConfig,
        seed: int,
        files: list[Path],
    ):
        self.model, self.spec, self.names, self.config, self.seed = model, spec, names, config, seed
        self.cartridges, self.conversations, self.files = cartridges, conversations, files
        self.plans = [
            BatchPlan(data.train, data.lengths, config.tokens, stable_number(seed, 0, data.digest))
            for data in conversations
        ]
        self._loaded: tuple[Path, CompactCache] | None = None

    def parameters(self) -> dict[str, Tensor]:
        """Trained tensors by name."""
        return {f"{i}.{name}": x for i, c in enumerate(self.cartridges) for name, x in c.named_parameters()}

    def identity(self, given: list[Path]) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {
            "kind": "cartridge",
            "model": self.spec.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "documents": {name: data.digest for name, data in zip(self.names, self.conversations)},
            "config": json.loads(json.dumps(asdict(self.config))),
            "distractors": [_sha256(path.read_bytes())[:32] for path in given],
        }

    def step(self, step: Step) -> StepOutput:
        which, number = step.cursor % len(self.names), step.cursor // len(self.names)
        items = self.plans[which].batch(number)
        cache = self.cartridges[which].to_cache(dtype=self.model.dtype)
        draw = step.random("distractors")
        beside = None
        if draw.random() < self.config.distractors:
            # the choice stays for some steps, so that a file is not read in each of them
            beside = self._beside(which, random.Random(stable_number(self.seed, step.index // 8, "beside")))
        if beside is not None:
            cache = self._compose([cache, beside] if draw.random() < 0.5 else [beside, cache])
        kl, cross_entropy, right = self._compare(which, items, cache)
        shown = ", ".join(map(str, items[:8])) + (", ..." if len(items) > 8 else "")
        return StepOutput(
            kl.mean(),
            {"cross_entropy": cross_entropy.mean().item(), "right": right.mean().item(), "tokens": kl.numel()},
            f"{self.names[which]}, conversations {shown}",
        )

    def evaluate(self) -> dict[str, float]:
        """Divergence from the teacher on the held-out conversations, alone and, if trained so, beside another cartridge."""
        alone, composed = {}, []
        for which, name in enumerate(self.names):
            cache = self.cartridges[which].to_cache(dtype=self.model.dtype)
            alone[name] = self._held_out(which, cache)
            if self.config.distractors:
                beside = self._beside(which, random.Random(stable_number(self.seed, which, "held-out")))
                if beside is not None:
                    composed.append(self._held_out(which, self._compose([cache, beside])))
        figures = {"kl": sum(alone.values()) / len(alone)}
        if len(alone) > 1:
            figures |= {f"kl_{name}": value for name, value in alone.items()}
        if composed:
            figures["kl_composed"] = sum(composed) / len(composed)
        return figures

    def _held_out(self, which: int, cache: CompactCache) -> float:
        data = self.conversations[which]
        plan = BatchPlan(data.held_out, data.lengths, self.config.tokens, 0)
        total, count, number = 0.0, 0, 0
        for items in plan._epoch(0):
            kl, _, _ = self._compare(which, items, cache)
            total, count, number = total + kl.sum().item(), count + kl.numel(), number + 1
        return total / count

    def _compare(self, which: int, items: list[int], cache: CompactCache) -> tuple[Tensor, Tensor, Tensor]:
        ids, rows, targets = collate([self.conversations[which][i] for i in items], self.model.device)
        from ..patch import CompactSession

        session = CompactSession(self.spec, cache)
        session.functional = True  # nothing is stored, so nothing keeps a step's graph alive
        hidden = hidden_states(self.model, ids, session, rows)
        return distillation_loss(self.model, hidden, targets, rest=self.config.rest)

    def _beside(self, which: int, draw: random.Random) -> CompactCache | None:
        """Another cartridge of this group, which is trained along, or one of the files; None while there is no other."""
        others = [i for i in range(len(self.cartridges)) if i != which]
        if not others and not self.files:
            return None
        chosen = draw.randrange(len(others) + len(self.files))
        if chosen < len(others):
            return self.cartridges[others[chosen]].to_cache(dtype=self.model.dtype)
        path = self.files[chosen - len(others)]
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = (path, CompactCache.load(path, self.model))
        return self._loaded[1]

    def _compose(self, caches: list[CompactCache]) -> CompactCache:
        return CompactCache.compose(caches, reposition=self.config.reposition)


def collate(conversations: Sequence[Conversation], device: torch.device | str) -> tuple[Tensor, Tensor, Targets]:
    """One batch: ids ``[B, n]`` and the answers' places in it as :func:`.pad_answers` makes them, and the targets there."""
    ids, rows = pad_answers([(c.prompt, c.answer) for c in conversations])
    targets = Targets(
        torch.cat([c.targets.ids for c in conversations]).to(device),
        torch.cat([c.targets.logs for c in conversations]).to(device),
    )
    return ids.to(device), rows.to(device), targets


def cartridge_bytes(spec: ModelSpec, slots: int, itemsize: int) -> int:
    """Memory of one cartridge in training: fp32 slots, gradients and two moments, and slots and gradients as the model uses
    them, ``itemsize`` bytes an element."""
    elements = 2 * spec.layer_kinds.count("full") * spec.num_kv_heads * spec.head_dim * slots
    return elements * (16 + 2 * itemsize)


def _groups(
    names: list[str], spec: ModelSpec, model: Any, config: CartridgeConfig, memory_bytes: int | None
) -> list[list[str]]:
    """Documents that are trained together, in order."""
    if memory_bytes is None:
        return [names]
    check_int("memory_bytes", memory_bytes, minimum=1)
    one = cartridge_bytes(spec, config.slots, torch.finfo(model.dtype).bits // 8)
    together = memory_bytes // one
    if together < 1:
        raise ValueError(
            f"memory_bytes must be at least the {one} that one cartridge of {config.slots} slots takes, got {memory_bytes}"
        )
    return [names[i : i + together] for i in range(0, len(names), together)]


def _fit_layers(
    task: _Task,
    ids: Mapping[str, list[int]],
    folder: Path,
    config: CartridgeConfig,
    loop: LoopConfig,
    spent: float,
    progress: bool,
) -> tuple[TrainResult | None, float]:
    """Fits the layers of each cartridge of a group, up to one for which no time was left: how that or the last one ended, and
    the seconds spent in all."""
    result = None
    for name, data, cartridge in zip(task.names, task.conversations, task.cartridges):
        if not config.layer_steps or (result is not None and not result.finished):
            break
        result = fit_layers(
            task.model,
            task.spec,
            ids[name],
            data,
            cartridge,
            config.layer_steps,
            folder / name,
            seed=loop.seed,
            max_seconds=_left(loop, spent),
            piece_bytes=loop.piece_bytes,
            identity={"config": task.identity([])["config"]},
            progress=progress,
            description=f"{name}: layers",
        )
        spent += result.seconds
    return result, spent


def _left(loop: LoopConfig, spent: float) -> float | None:
    """Of the seconds that a call may train; the loop does one step even if none are left."""
    return None if loop.max_seconds is None else max(0.0, loop.max_seconds - spent)


def _output_paths(texts: Mapping[str, str], out: Path, single: bool) -> dict[str, Path]:
    if not texts:
        raise ValueError("documents must hold at least one document")
    for name, text in texts.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"documents must map names to texts, got {type(name).__name__}: {type(text).__name__}")
        if not single and (not name or Path(name).name != name):
            raise ValueError(f"{name!r} cannot be a document's name: it must be a plain file name")
    if single:
        if out.is_dir():
            raise ValueError(f"out must be a file for one document, but {out} is a folder")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"the folder {out.parent} does not exist")
        return {name: out for name in texts}
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder for {len(texts)} documents, but {out} is a file")
    return {name: out / f"{name}{SUFFIX}" for name in texts}


def _check_document(tokenizer: Any, form: Any, name: str, text: str, config: CartridgeConfig, model: Any) -> list[int]:
    if not text.strip():
        raise ValueError(f"the document {name!r} is empty")
    ids = document_ids(tokenizer, form, text.strip())
    if len(ids) < config.slots:
        raise ValueError(
            f"the document {name!r} has {len(ids)} tokens, fewer than the {config.slots} slots: nothing would be saved"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    whole = config.init != FIRST_TOKENS
    if limit is not None and (len(ids) if whole else config.slots) > limit:
        raise ValueError(
            f"init {config.init!r} reads {len(ids) if whole else config.slots} tokens of {name!r}, but the model has {limit} "
            f"positions{f'; init {FIRST_TOKENS!r} reads the first tokens only' if whole else ''}"
        )
    return ids


def _check_distractor(path: Path, model: Any) -> Path:
    cache = CompactCache.load(path, model)
    if cache.batch_size != 1 or cache.lengths is not None:
        raise ValueError(f"{path} holds {cache.batch_size} contexts; a distractor must hold one")
    return path


def _start(
    model: Any, spec: ModelSpec, ids: list[int], data: Conversations, config: CartridgeConfig, file: Path
) -> Cartridge:
    """The untrained cartridge. One that takes the whole text to make is kept in ``file``, so that a run that goes on has it."""
    if config.init == FIRST_TOKENS:
        cache = _make_start(model, spec, ids, data, config)
    else:
        made_of = {"start": _digest(data, config)}
        cache = _kept(file, made_of, model)
        if cache is None:
            cache = replace(_make_start(model, spec, ids, data, config), info=made_of)
            cache.save(file)
    # the digest of the context would have a prompt that begins with it taken for the cached one
    cache = replace(cache, info={"init": config.init, "slots": config.slots})
    return Cartridge.from_cache(cache, sinks=config.sinks, train_beta=config.train_beta)


def _make_start(
    model: Any, spec: ModelSpec, ids: list[int], data: Conversations, config: CartridgeConfig
) -> CompactCache:
    method, device = config.method(), model.device
    if method is None:
        talks, sinks = [data[i] for i in data.train], max(4, config.sinks)
        return study_start(model, spec, ids, talks, config.slots, sinks, **config.study_options(spec))
    if config.init == FIRST_TOKENS:  # later tokens do not change earlier ones, so they are not read
        return model.compact(torch.tensor([ids[: config.slots]], device=device), method="full", ratio=1)
    return model.compact(torch.tensor([ids], device=device), method=method, slots=config.slots)


def _digest(data: Conversations, config: CartridgeConfig) -> str:
    """Of all that a start depends on: model, text and conversations, options, and the files that these name."""
    _, options = parse_spec(config.init)
    files = [Path(x).read_bytes() for x in options.values() if isinstance(x, str) and Path(x).is_file()]
    parts = [__version__, data.digest, config.init, config.slots, config.sinks, *map(_sha256, files)]
    return _sha256(json.dumps(parts).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _kept(file: Path, made_of: dict[str, str], model: Any) -> CompactCache | None:
    """The cache of ``file``, if there is one of that and it is whole."""
    if not file.is_file():
        return None
    try:
        cache = CompactCache.load(file, model)
    except (OSError, ValueError):
        return None
    return cache if cache.info == made_of else None


def _note(
    form, name, text, model_name, config, study, loop, data: Conversations, result: TrainResult
) -> dict[str, Any]:
    prompt = {
        "model": model_name,
        "prompt": form.to_json(),
        "document": name,
        "document_sha256": _sha256(text.encode()),
    }
    training = {
        "step": result.step,
        "finished": result.finished,
        "evaluation": result.evaluation,
        "conversations": {"digest": data.digest, "trained": len(data.train), "held_out": len(data.held_out)},
        "config": asdict(config),
        "self_study": asdict(study),
        "loop": loop.identity(),
    }
    return {"prompt": prompt, "training": json.loads(json.dumps(training))}


def _save(cartridge: Cartridge, path: Path, dtype: torch.dtype, note: dict[str, Any]) -> None:
    with torch.no_grad():
        cache = cartridge.to_cache(dtype=dtype)
    try:
        replace(cache, info={**cache.info, **note}).save(path)
    except OSError as error:
        raise OSError(
            f"could not write {path} ({error}); the checkpoint holds the cartridge: run again to write it"
        ) from error


def _entry(name: str, path: Path, tokens: int, result: TrainResult) -> TrainedCartridge:
    return TrainedCartridge(
        name, path, tokens, result.step, result.finished, result.evaluation, result.losses, result.seconds
    )
