# SPDX-License-Identifier: Apache-2.0
"""Runs the demo: one document, read once per method and ratio, then asked what was planted in it."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..evaluation.metrics import TokenClock, kl_divergence
from ..methods.still import packaged_selector
from ..patch.families import cache_argument, model_spec
from ..prompt import PromptFormat, document_ids, prompt_format, question_ids
from .document import Document, Needle

METHODS = ("full", "streaming_llm", "h2o", "snapkv", "pyramidkv", "attention_matching", "still", "cartridge")
NO_DOCUMENT = "(no document)"
ANSWER_TOKENS = 16
CONTINUATION_TOKENS = 128


@dataclass
class Answer:
    """One question's answer, and whether it holds the planted string."""

    question: str
    expected: str
    text: str
    right: bool


@dataclass
class Row:
    """One method at one ratio.

    Attributes:
        slots: per KV head and layer, their mean.
        ratio: tokens per slot.
        logical_bytes, physical_bytes: of the KV cache with every token kept, and as it is.
        kl_answers: mean over the answer tokens of the full-cache model, KL(full || this), nats per token.
        kl_text: the same over the tokens that follow the document in the reference.
        needles_right, needles: answers that hold the planted string, and questions.
        compact_seconds: reading the document included.
        decode_ms: median time of a decoded token, batch 1.
        error: why the row holds no figures.
    """

    method: str
    trained: bool
    slots: int | None = None
    ratio: float | None = None
    logical_bytes: int | None = None
    physical_bytes: int | None = None
    kl_answers: float | None = None
    kl_text: float | None = None
    needles_right: int | None = None
    needles: int = 0
    compact_seconds: float | None = None
    decode_ms: float | None = None
    error: str | None = None
    answers: list[Answer] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.method if self.trained else f"{self.method} (untrained)"


@dataclass
class Outcome:
    """What the demo found, complete or up to an interruption.

    Attributes:
        settings: model, document, machine: what a reader needs to judge the rows.
        rows: in the order in which they were measured.
        complete: False after Ctrl-C.
    """

    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Demo:
    """The model, the document as tokens, and what the full cache answers.

    Args:
        model, tokenizer: an unpatched model of a supported family.
        document: see :func:`make_document`.
    """

    def __init__(self, model: Any, tokenizer: Any, document: Document):
        self.model, self.tokenizer, self.document = model, tokenizer, document
        self.form: PromptFormat = prompt_format(tokenizer)
        self.ids = self._tensor(document_ids(tokenizer, self.form, document.text))
        self.questions = [self._tensor(question_ids(tokenizer, self.form, n.question)) for n in document.needles]
        following = tokenizer("\n\n" + document.continuation, add_special_tokens=False).input_ids
        self.continuation = self._tensor(following[:CONTINUATION_TOKENS])
        stop = model.generation_config.eos_token_id
        self.stop = {stop} if isinstance(stop, int) else set(stop or ())
        self.answer_ids: list[Tensor] = []
        self.answer_logs: list[Tensor] = []
        self.text_logs: Tensor | None = None
        self.read_seconds = 0.0

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[1]

    def read_in_full(self) -> list[Answer]:
        """The reference: the unpatched model with transformers' own cache answers, and its distributions are kept."""
        start = time.perf_counter()
        with torch.no_grad():
            past = self._read(self.ids)
        self.read_seconds = time.perf_counter() - start
        answers = []
        for question, needle in zip(self.questions, self.document.needles):
            whole = torch.cat([self.ids, question], 1)
            out = self._generate(whole, copy.deepcopy(past))
            self.answer_ids.append(out[:, whole.shape[1] :])
            self.answer_logs.append(self._answer_logs(question, self.answer_ids[-1], copy.deepcopy(past)))
            answers.append(self._answer(needle, self.answer_ids[-1]))
        self.text_logs = self._logs(self.continuation, past)
        return answers

    def _read(self, ids: Tensor) -> DynamicCache:
        """Transformers' own cache of ``ids``."""
        past = DynamicCache(config=self.model.config)
        self.model(ids, use_cache=True, logits_to_keep=1, **cache_argument(self.model, past))
        return past

    def _is_trained(self, name: str) -> bool:
        """False for a method that learns and is here as initialised."""
        if name == "still":
            return packaged_selector(model_spec(self.model)) is not None
        return name != "cartridge"

    def run_method(self, name: str, ratio: float, stage: Callable[[str], None] = lambda s: None) -> Row:
        """Compacts the document with one method and asks everything of the cache. The model must be patched.

        Errors of the method land in ``Row.error``.
        """
        from .. import compact

        row = Row(name, self._is_trained(name), ratio=ratio, needles=len(self.questions))
        try:
            stage("compacting")
            start = time.perf_counter()
            cache = compact(self.model, self.ids, name, ratio=ratio)
            row.compact_seconds = time.perf_counter() - start
            row.slots, row.ratio = cache.num_slots, cache.logical_length / cache.num_slots
            row.logical_bytes, row.physical_bytes = cache.logical_nbytes, cache.nbytes
            stage("comparing")
            row.kl_answers, row.kl_text = self._divergences(lambda: cache)
            stage("answering")
            self._ask(row, lambda: cache, prefix=None)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            row.error = f"{type(error).__name__}: {error}"
        return row

    def run_without_document(self) -> Row:
        """The same questions without the document: what the model knows or guesses."""
        row = Row(NO_DOCUMENT, True, slots=0, physical_bytes=0, needles=len(self.questions))
        opening = self._tensor(document_ids(self.tokenizer, self.form, ""))
        if opening.shape[1] == 0:
            row.error = "the prompt format has no text before the document"
            return row
        with torch.no_grad():
            past = self._read(opening)
        row.kl_answers, row.kl_text = self._divergences(lambda: copy.deepcopy(past))
        self._ask(row, lambda: copy.deepcopy(past), prefix=opening)
        return row

    def _ask(self, row: Row, past: Callable[[], Any], prefix: Tensor | None) -> None:
        gaps: list[float] = []
        for question, needle in zip(self.questions, self.document.needles):
            ids = question if prefix is None else torch.cat([prefix, question], 1)
            clock = TokenClock()
            out = self._generate(ids, past(), clock)
            gaps += clock.gaps()
            row.answers.append(self._answer(needle, out[:, ids.shape[1] :]))
        row.needles_right = sum(a.right for a in row.answers)
        row.decode_ms = 1000 * statistics.median(gaps) if gaps else None

    def _divergences(self, past: Callable[[], Any]) -> tuple[float | None, float | None]:
        total, tokens = 0.0, 0
        for question, answer, full in zip(self.questions, self.answer_ids, self.answer_logs):
            total += kl_divergence(full, self._answer_logs(question, answer, past())).sum().item()
            tokens += full.shape[0]
        text = None
        if self.continuation.shape[1] > 1:
            text = kl_divergence(self.text_logs, self._logs(self.continuation, past())).mean().item()
        return (total / tokens if tokens else None), text

    def _answer_logs(self, question: Tensor, answer: Tensor, past: Any) -> Tensor:
        """Log-probabilities ``[answer tokens, vocabulary]`` with the answer teacher-forced behind the question."""
        logs = self._logs(torch.cat([question, answer], 1), past)
        return logs[question.shape[1] - 1 :]

    def _logs(self, ids: Tensor, past: Any) -> Tensor:
        """Log-probabilities of every token of ``ids`` but the first: fp32 ``[len - 1, vocabulary]``."""
        with torch.no_grad():
            logits = self.model(ids, use_cache=True, **cache_argument(self.model, past)).logits
        return logits[0, :-1].float().log_softmax(-1)

    def _generate(self, ids: Tensor, past: Any, clock: TokenClock | None = None) -> Tensor:
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            streamer=clock,
            pad_token_id=next(iter(self.stop), 0),
            **cache_argument(self.model, past),
        )

    def _answer(self, needle: Needle, ids: Tensor) -> Answer:
        text = " ".join(self.tokenizer.decode(ids[0], skip_special_tokens=True).split())
        return Answer(needle.question, needle.answer, text, needle.answer.lower() in text.lower())

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self.model.device)


def plan(methods: Iterable[str], ratios: Iterable[float]) -> list[tuple[str, float]]:
    """(method, ratio) pairs: the full cache once, the others at each ratio."""
    ratios = sorted(set(ratios))
    return [(name, ratio) for name in methods for ratio in ([1.0] if name == "full" else ratios)]


def run_demo(
    demo: Demo,
    outcome: Outcome,
    methods: Iterable[str],
    ratios: Iterable[float],
    keep: Callable[[Outcome], None],
    report: Callable[[str], None],
    progress: bool = True,
) -> Outcome:
    """Fills ``outcome`` row by row and hands it to ``keep`` after each, so that an interruption loses one row at most."""
    from tqdm import tqdm

    from .. import patch_model, unpatch_model

    steps = plan(methods, ratios)
    bar = tqdm(total=len(steps) + 2, unit="row", disable=not progress, dynamic_ncols=True, leave=False)
    try:
        bar.set_description("reading in full")
        full_answers = demo.read_in_full()
        outcome.settings["full_cache_answers"] = [asdict(a) for a in full_answers]
        outcome.settings["read_seconds"] = demo.read_seconds
        bar.update()
        bar.set_description("no document")
        outcome.rows.append(demo.run_without_document())
        keep(outcome)
        bar.update()
        patch_model(demo.model)
        try:
            for name, ratio in steps:
                bar.set_description(f"{name} {ratio:g}x")
                row = demo.run_method(name, ratio, lambda stage: bar.set_postfix_str(stage))
                outcome.rows.append(row)
                keep(outcome)
                bar.update()
                if row.error:
                    report(f"{name} at {ratio:g}x failed: {row.error}")
        finally:
            unpatch_model(demo.model)
        outcome.complete = True
        keep(outcome)
    finally:
        bar.close()
    return outcome
