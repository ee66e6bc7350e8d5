# SPDX-License-Identifier: Apache-2.0
"""Runs an evaluation: cases, readings, questions; one row per probe, method and ratio."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache import CompactCache
from ..methods import Method, get_method
from ..prompt import PromptFormat, document_ids, prompt_format, question_ids
from ..version import __version__
from . import metrics
from .reading import Compacted, EqualBytes, byte_budget, read
from .specs import parse_spec
from .store import Store
from .tasks import Case, Continuation, Question, Room, Task, get_task
from .tasks.base import SCORINGS

FULL, NO_CONTEXT = "full", "no_context"


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated.

    Attributes:
        methods, tasks: names with options, see :func:`parse_spec`. The ends, "full" and "no_context", are always run.
        lengths: tokens of the contexts.
        ratios: each method gets 1/ratio of the full cache's bytes.
        samples: cases of each task and length.
        seed: of all that is generated.
        query_aware: the question is known when the context is compacted (and compacted with it).
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (1024,)
    ratios: tuple[float, ...] = (4.0, 8.0, 16.0)
    samples: int = 20
    seed: int = 0
    query_aware: bool = False

    def __post_init__(self):
        for name in ("methods", "tasks", "lengths", "ratios"):
            values = getattr(self, name)
            if not values and name != "methods":
                raise ValueError(f"{name} must not be empty")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} holds something twice: {', '.join(map(str, values))}")
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths must be positive, got {self.lengths}")
        if any(not 1 <= ratio < float("inf") for ratio in self.ratios):
            raise ValueError(f"ratios must be at least 1, got {self.ratios}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def make_methods(self) -> dict[str, Method]:
        """Label -> method, without the ends."""
        made = {}
        for spec in self.methods:
            name, options = parse_spec(spec)
            if name != NO_CONTEXT:
                method = get_method(name, **options)
                if name != FULL:
                    made[spec] = method
        return made

    def make_tasks(self) -> dict[str, Task]:
        """Label -> task."""
        made = {}
        for spec in self.tasks:
            name, options = parse_spec(spec)
            made[spec] = get_task(name, **options)
        return made


@dataclass
class _Reference:
    """What the full cache says to one probe."""

    logs: Tensor
    answer_ids: Tensor | None = None
    text: str = ""


class Evaluation:
    """The model with its prompts, and the loop over everything.

    Args:
        model, tokenizer: a supported model (patched for the duration of :meth:`run`) and its tokenizer.
        config: what to run.
        texts: the user's documents.

    Raises:
        ValueError, TypeError: unknown names or options, lengths that a task or the model cannot take.
    """

    def __init__(self, model: Any, tokenizer: Any, config: EvalConfig, texts: Iterable[str] = ()):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.texts = tuple(texts)
        self.methods = config.make_methods()
        self.tasks = config.make_tasks()
        self.form = prompt_format(tokenizer)
        self._plain = PromptFormat("", "", "", False)
        self._equal = EqualBytes()
        self._check_lengths()

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def describe(self, model_name: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the rows depend on, for the result folder."""
        from ..patch import model_spec

        return {
            "version": __version__,
            "model": model_name,
            "fingerprint": model_spec(self.model).fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            **asdict(self.config),
            **(extra or {}),
        }

    def room(self, length: int, index: int) -> Room:
        opening = len(document_ids(self.tokenizer, self.form, ""))
        return Room(length, index, self.config.seed, self.encode, opening, self.texts)

    def cases(self, task: Task) -> int:
        """Cases that are run of a task."""
        there = task.num_cases()
        return self.config.samples if there is None else min(self.config.samples, there)

    def num_rows_per_probe(self) -> int:
        return 2 + len(self.methods) * len(self.config.ratios)

    def _check_lengths(self) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and max(self.config.lengths) > limit:
            raise ValueError(
                f"lengths must be at most {limit}, the positions of this model; got {max(self.config.lengths)}"
            )
        for label, task in self.tasks.items():
            for length in self.config.lengths:
                case = self._case(label, task, length, 0)
                needed = 0
                for probe in case.probes:
                    context, head, rest = self._ids(case, probe)
                    after = len(probe.ids) if isinstance(probe, Continuation) else probe.max_new_tokens
                    needed = max(needed, len(context) + len(head) + len(rest) + after)
                if limit is not None and needed > limit:
                    raise ValueError(
                        f"task {label} at length {length} needs {needed} positions with question and answer, "
                        f"the model has {limit}: take a smaller length"
                    )

    def _case(self, label: str, task: Task, length: int, index: int) -> Case:
        """Raises ValueError for whatever goes wrong: a task may be the user's own program."""
        try:
            case = task.make(self.room(length, index))
        except (ValueError, OSError) as error:
            raise ValueError(f"task {label}: {error}") from error
        except Exception as error:
            raise ValueError(f"task {label}: {type(error).__name__}: {error}") from error
        if not isinstance(case, Case):
            raise TypeError(f"task {label}: make must return a Case, got {type(case).__name__}")
        for probe in case.probes:
            if not isinstance(probe, (Question, Continuation)):
                raise TypeError(f"task {label}: probes must be Questions or Continuations, got {type(probe).__name__}")
        return case

    def warnings(self) -> list[str]:
        """What a reader of the results ought to know before they are there."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        twice = [label for label, method in self.methods.items() if method.prefill_passes == 2]
        if limit is None or not twice or 2 * max(self.config.lengths) <= limit:
            return []
        last = 2 * max(self.config.lengths)
        return [f"{', '.join(twice)} read the context twice, in positions up to {last}; the model was made for {limit}"]

    def run(self, store: Store, progress: bool = False, report: Callable[[str], None] = lambda line: None) -> None:
        """Adds to the store all rows that are not there yet."""
        from tqdm import tqdm

        from ..patch import is_patched, patch_model, unpatch_model

        done = {row_key(row) for row in store.rows}
        # the first case of everything, then the second: an unfinished run is balanced
        plan = [
            (label, task, length, index)
            for index in range(self.config.samples)
            for label, task in self.tasks.items()
            for length in self.config.lengths
            if index < self.cases(task)
        ]
        own = not is_patched(self.model)
        if own:
            patch_model(self.model, FULL)
        bar = tqdm(total=len(plan), unit="case", disable=not progress, dynamic_ncols=True)
        failed: set[str] = set()
        try:
            for label, task, length, index in plan:
                bar.set_description(f"{label} {length}")
                case = self._case(label, task, length, index)
                open_probes = [
                    i
                    for i in range(len(case.probes))
                    if any(k not in done for k in self._keys(label, length, index, i))
                ]
                if open_probes:
                    for row in self._run_case(label, length, index, case, open_probes, bar.set_postfix_str):
                        if row_key(row) not in done:
                            done.add(row_key(row))
                            store.append(row)
                        if row["error"] and row["method"] not in failed:
                            failed.add(row["method"])
                            report(f"{row['method']} failed ({label}, {length}, {row['ratio']}x): {row['error']}")
                bar.set_postfix_str("")
                bar.update()
        finally:
            bar.close()
            if own:
                unpatch_model(self.model)

    def _keys(self, label: str, length: int, index: int, probe: int) -> list[tuple]:
        base = (label, length, index, probe)
        ends = [(*base, FULL, None), (*base, NO_CONTEXT, None)]
        return ends + [(*base, name, ratio) for name in self.methods for ratio in self.config.ratios]

    def _ids(self, case: Case, probe: Any) -> tuple[list[int], list[int], list[int]]:
        """Token ids of the context, of what of the question is compacted with it, and of what is read afterwards."""
        if isinstance(probe, Continuation):
            context = list(case.context_ids)
            bos = document_ids(self.tokenizer, self._plain, "")
            if bos:
                context[: len(bos)] = bos
            return context, [], []
        if case.context_ids is not None:
            context = list(case.context_ids)
        else:
            context = document_ids(self.tokenizer, self.form, case.context)
        question = question_ids(self.tokenizer, self.form, probe.text)
        prefix = self.encode(probe.prefix) if probe.prefix else []
        if not self.config.query_aware:
            return context, [], question + prefix
        closing = len(self.tokenizer(self.form.after, add_special_tokens=False).input_ids)
        closing = min(max(closing, 1), len(question))
        return context, question[:-closing], question[-closing:] + prefix

    def _opening(self, probe: Any) -> list[int]:
        form = self._plain if isinstance(probe, Continuation) else self.form
        return document_ids(self.tokenizer, form, "")

    def _tensor(self, ids: Iterable[int]) -> Tensor:
        return torch.tensor([list(ids)], dtype=torch.int64, device=self.model.device)

    def _run_case(
        self, label: str, length: int, index: int, case: Case, probes: list[int], stage: Callable[[str], None]
    ) -> Iterable[dict[str, Any]]:
        """Rows of one case; its context is compacted once unless the question is compacted with it."""
        groups = [[i] for i in probes] if self.config.query_aware else [probes]
        for group in groups:
            context, head, _ = self._ids(case, case.probes[group[0]])
            ids = self._tensor(context + head)
            stage("reading")
            (full,) = read(self.model, ids, [(get_method(FULL), 1)])
            if full.cache is None:
                raise ValueError(f"task {label}, length {length}: the full cache failed: {full.error}")
            wanted = [(name, method, ratio) for name, method in self.methods.items() for ratio in self.config.ratios]
            made = self._equal.read(self.model, ids, full.cache, wanted) if wanted else []
            opening = self._opening(case.probes[group[0]]) + head
            none = Compacted(None)
            if opening:
                (none,) = read(self.model, self._tensor(opening), [(get_method(FULL), 1)])
            for i in group:
                probe = case.probes[i]
                _, _, rest = self._ids(case, probe)
                base = {
                    "task": label,
                    "length": length,
                    "case": index,
                    "probe": i,
                    "query_aware": self.config.query_aware,
                    "tokens": ids.shape[1],
                    "read_seconds": full.read_seconds,
                    "meta": probe.meta,
                }
                stage(f"{FULL}, {NO_CONTEXT}")
                reference, row = self._measure(probe, rest, full.cache, None)
                yield {**base, "method": FULL, "ratio": None, **_sizes(full, full.cache, None), **row}
                _, row = self._measure(probe, rest, none.cache, reference)
                yield {**base, "method": NO_CONTEXT, "ratio": None, **_sizes(none, full.cache, None), **row}
                for (name, _, ratio), result in zip(wanted, made):
                    stage(f"{name} {ratio:g}x")
                    row = {**base, "method": name, "ratio": ratio, **_sizes(result, full.cache, ratio)}
                    row["read_seconds"] = result.read_seconds
                    if result.error is None:
                        try:
                            _, figures = self._measure(probe, rest, result.cache, reference)
                        except (ValueError, RuntimeError) as error:
                            figures = {**_NO_FIGURES, "error": f"{type(error).__name__}: {error}"}
                    else:
                        figures = {**_NO_FIGURES, "error": result.error}
                    yield {**row, **figures}

    def _measure(
        self, probe: Any, rest: list[int], past: CompactCache | None, reference: _Reference | None
    ) -> tuple[_Reference, dict[str, Any]]:
        """Figures of one probe on one cache; without a reference the cache becomes the reference."""
        if isinstance(probe, Continuation):
            return self._measure_continuation(probe, past, reference)
        if probe.scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {probe.scoring!r}")
        if probe.scoring == "choice":
            return self._measure_choice(probe, rest, past, reference)
        return self._measure_answer(probe, rest, past, reference)

    def _measure_continuation(self, probe, past, reference):
        ids = self._tensor(probe.ids)
        start = time.perf_counter()
        logs = metrics.next_token_logs(self.model, ids, past)
        seconds = time.perf_counter() - start
        reference = reference or _Reference(logs)
        return reference, {
            **_NO_FIGURES,
            **self._against(reference, logs),
            **_entropy(logs, ids[:, 1:]),
            "first_token_seconds": seconds,
        }

    def _measure_answer(self, probe: Question, rest, past, reference):
        prompt = self._tensor(rest)
        answer = metrics.generate(self.model, prompt, past, probe.max_new_tokens)
        text = self.tokenizer.decode(answer.ids[0], skip_special_tokens=True).strip()
        forced = answer.ids if reference is None else reference.answer_ids
        logs = self._logs_after(prompt, forced, past)
        reference = reference or _Reference(logs, answer.ids, text)
        score = {
            "all": lambda: metrics.score_all(probe.answers, text),
            "any": lambda: metrics.score_any(probe.answers, text),
            "f1": lambda: metrics.score_f1(probe.answers, text),
            "like_full": lambda: 1.0 if text == reference.text else metrics.word_f1(reference.text, text),
        }[probe.scoring]()
        entropy = {}
        if probe.answers:
            gold = self._tensor(self.encode(self._lead(probe) + ", ".join(probe.answers)))
            size = gold.shape[1]
            # where the full cache answers with the expected string, one reading serves both
            same = torch.equal(forced[:, :size], gold)
            entropy = _entropy(logs[:size] if same else self._logs_after(prompt, gold, past), gold)
        return reference, {
            **_NO_FIGURES,
            **self._against(reference, logs),
            **entropy,
            "score": score,
            "answer": text,
            "expected": list(probe.answers),
            "same_answer": answer.ids.shape == reference.answer_ids.shape
            and torch.equal(answer.ids, reference.answer_ids),
            "first_token_seconds": answer.first_token_seconds,
            "decode_tokens_per_second": answer.decode_tokens_per_second,
        }

    def _measure_choice(self, probe: Question, rest, past, reference):
        prompt = self._tensor(rest)
        options = [self.encode(self._lead(probe) + choice)[0] for choice in probe.choices]
        if len(set(options)) != len(options):
            raise ValueError(f"the choices {probe.choices} do not differ in their first token")
        right = probe.choices.index(probe.answers[0])
        start = time.perf_counter()
        logs = self._logs_after(prompt, self._tensor([options[right]]), past)
        seconds = time.perf_counter() - start
        likely = logs[0, torch.tensor(options, device=logs.device)]
        picked = int(likely.argmax())
        fresh = reference is None
        reference = reference or _Reference(logs, None, probe.choices[picked])
        return reference, {
            **_NO_FIGURES,
            **self._against(reference, logs),
            **_entropy(logs, self._tensor([options[right]])),
            "score": float(picked == right),
            "answer": probe.choices[picked],
            "expected": list(probe.answers),
            "same_answer": fresh or probe.choices[picked] == reference.text,
            "first_token_seconds": seconds,
        }

    def _lead(self, probe: Question) -> str:
        """What stands between the prompt and the first word of the answer."""
        before = probe.prefix or self.form.after
        return "" if before[-1:].isspace() else " "

    def _logs_after(self, prompt: Tensor, answer: Tensor, past: CompactCache | None) -> Tensor:
        return metrics.next_token_logs(self.model, torch.cat([prompt, answer], 1), past, first=prompt.shape[1])

    @staticmethod
    def _against(reference: _Reference, logs: Tensor) -> dict[str, float]:
        return {
            "kl": max(0.0, metrics.kl_divergence(reference.logs, logs).mean().item()),
            "agreement": metrics.top_agreement(reference.logs, logs),
        }


_NO_FIGURES: dict[str, Any] = {
    "score": None,
    "kl": None,
    "agreement": None,
    "cross_entropy": None,
    "predicted_tokens": 0,
    "answer": None,
    "expected": None,
    "same_answer": None,
    "first_token_seconds": None,
    "decode_tokens_per_second": None,
    "error": None,
}


def _entropy(logs: Tensor, ids: Tensor) -> dict[str, Any]:
    return {"cross_entropy": metrics.cross_entropy(logs, ids).double().mean().item(), "predicted_tokens": ids.shape[1]}


def _sizes(result: Compacted, full: CompactCache, ratio: float | None) -> dict[str, Any]:
    cache = result.cache
    return {
        "slots": None if cache is None else cache.num_slots,
        "budget_bytes": None if ratio is None else byte_budget(full, ratio),
        "logical_bytes": full.logical_nbytes,
        "physical_bytes": 0 if cache is None and result.error is None else None if cache is None else cache.nbytes,
        "temporary_bytes": result.temporary_bytes,
        "peak_bytes": result.peak_bytes,
        "compact_seconds": result.compact_seconds,
    }


def row_key(row: dict[str, Any]) -> tuple:
    """What a row is about."""
    return row["task"], row["length"], row["case"], row["probe"], row["method"], row["ratio"]


def run_evaluation(
    model: Any,
    tokenizer: Any,
    config: EvalConfig,
    folder: str | Path,
    *,
    model_name: str = "model",
    texts: Iterable[str] = (),
    extra: dict[str, Any] | None = None,
    progress: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Runs what is missing in a result folder and returns all of its rows.

    Args:
        model, tokenizer: see :class:`Evaluation`.
        folder: made when it is not there; a second call with the same arguments goes on where the first one stopped.
        model_name: written down with the results.
        texts: the user's documents, for the tasks that take any text.
        extra: more entries of the configuration, JSON-able.
        report: called with a line for what a reader ought to know.

    Raises:
        ValueError, TypeError: a configuration that cannot be run, or is not that of the folder.
        OSError: the folder cannot be written to.
    """
    evaluation = Evaluation(model, tokenizer, config, texts)
    for line in evaluation.warnings():
        report(f"warning: {line}")
    with Store(Path(folder), evaluation.describe(model_name, extra)) as store:
        evaluation.run(store, progress, report)
        return list(store.rows)
