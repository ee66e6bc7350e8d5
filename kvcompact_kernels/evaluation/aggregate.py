# SPDX-License-Identifier: Apache-2.0
"""From rows to one line per task, length, method and ratio, with 95% bootstrap intervals.

What is drawn again is the *case*, not the probe: questions on one context are not independent of each other. Where there is
one case only, its probes are drawn, and the interval holds for that context. Utilisation is a ratio of means over the same
draws for the method and for both ends.
"""

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .metrics import utilisation

DRAWS = 2000
LEVEL = 0.95
_MEDIANS = (
    "read_seconds",
    "compact_seconds",
    "first_token_seconds",
    "decode_tokens_per_second",
    "slots",
    "budget_bytes",
    "logical_bytes",
    "physical_bytes",
    "temporary_bytes",
    "peak_bytes",
)
FIELDS = (
    "task",
    "length",
    "method",
    "ratio",
    "query_aware",
    "cases",
    "samples",
    "failed",
    "score",
    "score_low",
    "score_high",
    "utilisation",
    "utilisation_low",
    "utilisation_high",
    "kl",
    "kl_low",
    "kl_high",
    "agreement",
    "agreement_low",
    "agreement_high",
    "same_answer",
    "cross_entropy",
    "perplexity",
    "perplexity_low",
    "perplexity_high",
    "entropy_utilisation",
    "entropy_utilisation_low",
    "entropy_utilisation_high",
    "tokens",
    *_MEDIANS,
    "utilisation_per_mib",
    "utilisation_per_second",
    "error",
)


def _draws(units: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(units, (DRAWS, units), generator=generator)


def interval(values: Iterable[float | None]) -> tuple[float, float] | None:
    """The middle 95% of what the draws gave; None when fewer than half of them are defined."""
    found = sorted(v for v in values if v is not None and math.isfinite(v))
    if len(found) < DRAWS / 2:
        return None
    tail = (1 - LEVEL) / 2
    return found[int(tail * (len(found) - 1))], found[math.ceil((1 - tail) * (len(found) - 1))]


class _Sums:
    """Per unit (a case or a probe): sum of a figure and its weight, so that any draw of units has its mean at once."""

    def __init__(self, rows: list[dict[str, Any]], units: list[Any], unit: str, figure: str, weight: str | None = None):
        total = dict.fromkeys(units, 0.0)
        weights = dict.fromkeys(units, 0.0)
        for row in rows:
            if row[figure] is not None and row[unit] in total:
                share = 1.0 if weight is None else float(row[weight])
                total[row[unit]] += share * float(row[figure])
                weights[row[unit]] += share
        self.total = torch.tensor([total[u] for u in units], dtype=torch.float64)
        self.weight = torch.tensor([weights[u] for u in units], dtype=torch.float64)

    def mean(self) -> float | None:
        weight = self.weight.sum().item()
        return self.total.sum().item() / weight if weight else None

    def means(self, draws: torch.Tensor) -> list[float | None]:
        totals, weights = self.total[draws].sum(1), self.weight[draws].sum(1)
        return [t / w if w else None for t, w in zip(totals.tolist(), weights.tolist())]


def aggregate(rows: list[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One line per (task, length, method, ratio), in the order in which they first come.

    Means are over probes that did not fail; perplexity is over all predicted tokens. Intervals are None with one sample.
    """
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["length"], row["method"], row["ratio"]].append(row)
    return [_line(key, group, groups, seed) for key, group in groups.items()]


def _line(key: tuple, group: list[dict], groups: dict[tuple, list[dict]], seed: int) -> dict[str, Any]:
    task, length, method, ratio = key
    good = [row for row in group if not row["error"]]
    line: dict[str, Any] = dict.fromkeys(FIELDS)
    line |= {
        "task": task,
        "length": length,
        "method": method,
        "ratio": ratio,
        "query_aware": group[0]["query_aware"],
        "cases": len({row["case"] for row in good}),
        "samples": len(good),
        "failed": len(group) - len(good),
        "error": next((row["error"] for row in group if row["error"]), None),
    }
    if not good:
        return line
    unit = "case" if line["cases"] > 1 else "probe"
    units = sorted({row[unit] for row in good})
    draws = _draws(len(units), seed) if len(units) > 1 else None
    ends = [groups.get((task, length, end, None), []) for end in ("no_context", "full")]
    line["tokens"] = statistics.median(row["tokens"] for row in good)

    def put(name: str, sums: _Sums, change: Callable[[float], float] = lambda x: x) -> None:
        value = sums.mean()
        if value is None:
            return
        line[name] = change(value)
        if draws is not None and f"{name}_low" in line:
            found = interval(sums.means(draws))
            if found is not None:
                line[f"{name}_low"], line[f"{name}_high"] = change(found[0]), change(found[1])

    score, entropy = _Sums(good, units, unit, "score"), _Sums(good, units, unit, "cross_entropy", "predicted_tokens")
    put("score", score)
    put("kl", _Sums(good, units, unit, "kl"))
    put("agreement", _Sums(good, units, unit, "agreement"))
    put("same_answer", _Sums(good, units, unit, "same_answer"))
    put("cross_entropy", entropy)
    put("perplexity", entropy, math.exp)
    for name, figure, own, weight in (
        ("utilisation", "score", score, None),
        ("entropy_utilisation", "cross_entropy", entropy, "predicted_tokens"),
    ):
        none, full = (_Sums(end, units, unit, figure, weight) for end in ends)
        means = (own.mean(), none.mean(), full.mean())
        if None in means:
            continue
        line[name] = utilisation(*means)
        if draws is not None and line[name] is not None:
            triples = zip(own.means(draws), none.means(draws), full.means(draws))
            found = interval(None if None in t else utilisation(*t) for t in triples)
            if found is not None:
                line[f"{name}_low"], line[f"{name}_high"] = found
    for name in _MEDIANS:
        values = [row[name] for row in good if row[name] is not None]
        line[name] = statistics.median(values) if values else None
    used = line[leading_utilisation(line)]
    # the ends hold everything or nothing, and compact nothing: there is no trade to speak of
    if used is not None and ratio is not None:
        if line["physical_bytes"]:
            line["utilisation_per_mib"] = used / (line["physical_bytes"] / 2**20)
        if line["compact_seconds"]:
            line["utilisation_per_second"] = used / line["compact_seconds"]
    return line


def leading_utilisation(line: dict[str, Any]) -> str:
    """Which utilisation a line is judged by: that of scores, or of cross-entropies where the task has no score."""
    by_entropy = line["utilisation"] is None and line["entropy_utilisation"] is not None and line["score"] is None
    return "entropy_utilisation" if by_entropy else "utilisation"


def to_csv(lines: list[dict[str, Any]]) -> str:
    """The lines under a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: _cell(name, value) for name, value in line.items()})
    return out.getvalue()


def _cell(name: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value) if name.endswith("_bytes") else f"{value + 0.0:.6g}"
