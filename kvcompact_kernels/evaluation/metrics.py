# SPDX-License-Identifier: Apache-2.0
"""Figures of one sample: plain functions on a patched model, token ids and a cache.

``past`` is a ``CompactCache``, which is never changed, or None for no context at all. Ids are int64 ``[1, n]``. Logs are
log-probabilities in fp32, natural log, on the model's device.
"""

import itertools
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def next_token_logs(model: Any, ids: Tensor, past: Any, first: int = 1) -> Tensor:
    """Log-probabilities ``[n - first, vocabulary]`` of ``ids[:, first:]``, each given the context and the ids before it.

    Args:
        first: first position that is predicted; 0 is not possible, for a cache does not hold its last token's logits.
    """
    from ..patch import cache_argument

    if not 1 <= first < ids.shape[1]:
        raise ValueError(f"first must be in [1, {ids.shape[1] - 1}], got {first}")
    with torch.no_grad():
        keep = ids.shape[1] - first + 1
        logits = model(ids, use_cache=past is not None, logits_to_keep=keep, **cache_argument(model, past)).logits
    return logits[0, :-1].float().log_softmax(-1)


def cross_entropy(logs: Tensor, ids: Tensor) -> Tensor:
    """``-log p`` of each of ``ids [1, n]`` under ``logs [n, vocabulary]``: fp32 ``[n]``, nats."""
    return -logs.gather(1, ids[0, :, None])[:, 0]


def kl_divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) of each row of two ``[n, vocabulary]`` logs: fp64 ``[n]``, nats per token."""
    return (full.exp() * (full - other)).double().sum(-1)


def top_agreement(full: Tensor, other: Tensor) -> float:
    """Share of rows in which both put the same token first."""
    return (full.argmax(-1) == other.argmax(-1)).double().mean().item()


def utilisation(value: float, none: float, full: float) -> float | None:
    """How much of what the context is worth is left: ``(value - none) / (full - none)``.

    Takes accuracies as they are and cross-entropies too (the signs cancel). None when the context is worth nothing:
    ``full`` and ``none`` are closer than 1e-9.
    """
    return None if abs(full - none) < 1e-9 else (value - none) / (full - none)


class TokenClock:
    """A streamer for ``generate`` that notes when each token came."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def gaps(self) -> list[float]:
        """Seconds between generated tokens; the first, which comes with reading the prompt, is left out."""
        return [b - a for a, b in itertools.pairwise(self.times[1:])]


@dataclass(frozen=True)
class Generated:
    """Greedy answer ids ``[1, n]`` and how fast they came."""

    ids: Tensor
    first_token_seconds: float
    decode_tokens_per_second: float | None


def stop_ids(model: Any) -> set[int]:
    """Ids that end an answer."""
    stop = getattr(model.generation_config, "eos_token_id", None)
    return {stop} if isinstance(stop, int) else set(stop or ())


def generate(model: Any, ids: Tensor, past: Any, max_new_tokens: int) -> Generated:
    """The greedy continuation of ``ids`` behind a cache; an end token stays part of it."""
    from ..patch import cache_argument

    clock = TokenClock()
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=clock,
        pad_token_id=min(stop_ids(model), default=0),
        **cache_argument(model, past),
    )
    gaps = clock.gaps()
    first = clock.times[1] if len(clock.times) > 1 else time.perf_counter()
    speed = 1.0 / statistics.median(gaps) if gaps else None
    return Generated(out[:, ids.shape[1] :], first - start, speed)


def found(answer: str, text: str) -> bool:
    """Whether ``answer`` stands in ``text`` as whole words, upper and lower case alike."""
    words = [re.escape(word) for word in answer.split()]
    return bool(words) and re.search(r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)", text, re.IGNORECASE) is not None


def score_all(answers: tuple[str, ...], text: str) -> float:
    """Share of the answers that ``text`` holds (RULER, arXiv 2404.06654, section 3: recall of the expected strings)."""
    return sum(found(answer, text) for answer in answers) / len(answers)


def score_any(answers: tuple[str, ...], text: str) -> float:
    """1 when ``text`` holds one of the answers."""
    return float(any(found(answer, text) for answer in answers))


def word_f1(answer: str, text: str) -> float:
    """F1 of the words of two texts, with their numbers of occurrences, without case and punctuation."""
    one, two = (Counter(re.findall(r"\w+", x.lower())) for x in (answer, text))
    both = sum((one & two).values())
    return 0.0 if both == 0 else 2 * both / (sum(one.values()) + sum(two.values()))


def score_f1(answers: tuple[str, ...], text: str) -> float:
    """The best F1 that ``text`` has with any of the answers."""
    return max(word_f1(answer, text) for answer in answers)
