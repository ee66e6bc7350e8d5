# SPDX-License-Identifier: Apache-2.0
import csv
import io
import math
import random

import pytest

from kvcompact_kernels.evaluation.aggregate import FIELDS, aggregate, to_csv
from kvcompact_kernels.evaluation.runner import _NO_FIGURES
from kvcompact_kernels.evaluation.tables import COLUMNS, COST_COLUMNS, cost_cells_of, markdown

SIZES = dict.fromkeys(
    (
        "read_seconds",
        "compact_seconds",
        "slots",
        "budget_bytes",
        "logical_bytes",
        "physical_bytes",
        "temporary_bytes",
        "peak_bytes",
    ),
    1,
)


def row(method, case, score=None, ratio=None, probe=0, **more):
    base = {"task": "t", "length": 100, "case": case, "probe": probe, "method": method, "ratio": ratio, "tokens": 99}
    return {**base, "query_aware": False, "meta": {}, **SIZES, **_NO_FIGURES, "score": score, **more}


def line_of(rows, method="m"):
    (line,) = [x for x in aggregate(rows) if x["method"] == method]
    return line


def ends(cases, none=0.0, full=1.0):
    return [row(name, c, score) for c in range(cases) for name, score in (("no_context", none), ("full", full))]


def test_means_and_utilisation():
    rows = ends(4, 0.25, 0.75) + [row("m", c, s, 4.0) for c, s in enumerate((0, 0.5, 0.5, 1))]
    line = line_of(rows)
    assert line["score"] == 0.5 and line["utilisation"] == pytest.approx(0.5) and line["samples"] == line["cases"] == 4
    assert line_of(rows, "full")["utilisation"] == 1 and line_of(rows, "no_context")["utilisation"] == 0


def test_interval_covers_what_it_should():
    # 200 experiments of 40 coin tosses: the interval must hold 0.3 in about 95 of 100
    draw = random.Random(0)
    inside = 0
    for _ in range(200):
        rows = [row("m", c, float(draw.random() < 0.3), 4.0) for c in range(40)]
        line = line_of(rows)
        inside += line["score_low"] <= 0.3 <= line["score_high"]
    assert 176 <= inside <= 199


def test_questions_on_one_context_are_drawn_together():
    # ten equal answers in each of four cases say no more than one answer each
    scores = (0, 1, 1, 0)
    many = line_of([row("m", c, s, 4.0, p) for c, s in enumerate(scores) for p in range(10)])
    few = line_of([row("m", c, s, 4.0) for c, s in enumerate(scores)])
    assert many["samples"] == 40 and many["cases"] == 4
    assert (many["score_low"], many["score_high"]) == (few["score_low"], few["score_high"])
    assert few["score_low"] == 0 and few["score_high"] == 1


def test_one_context_draws_its_questions():
    line = line_of([row("m", 0, float(p % 2), 4.0, p) for p in range(20)])
    assert line["cases"] == 1 and 0.2 < line["score_low"] < 0.45 and 0.55 < line["score_high"] < 0.8


def test_perplexity_weighs_tokens():
    rows = [
        row("m", 0, ratio=2.0, cross_entropy=1.0, predicted_tokens=30),
        row("m", 1, ratio=2.0, cross_entropy=3.0, predicted_tokens=10),
    ]
    line = line_of(rows)
    assert line["perplexity"] == pytest.approx(math.exp(1.5)) and line["score"] is None
    assert line["perplexity_low"] == pytest.approx(math.exp(1)) and line["perplexity_high"] == pytest.approx(
        math.exp(3)
    )


def test_entropy_utilisation_is_paired():
    rows = []
    for case, hard in enumerate((0.0, 5.0, 1.0, 3.0)):  # cases differ much, methods little
        for name, ratio, extra in (("full", None, 1.0), ("no_context", None, 2.0), ("m", 4.0, 1.25)):
            rows.append(row(name, case, ratio=ratio, cross_entropy=hard + extra, predicted_tokens=8))
    line = line_of(rows)
    for name in ("entropy_utilisation", "entropy_utilisation_low", "entropy_utilisation_high"):
        assert line[name] == pytest.approx(0.75)


def test_a_context_worth_nothing_has_no_utilisation():
    line = line_of(ends(3, 0.5, 0.5) + [row("m", c, 1.0, 4.0) for c in range(3)])
    assert line["utilisation"] is None and line["utilisation_low"] is None


def test_failed_rows_are_counted_and_left_out():
    rows = [
        row("m", 0, 1.0, 4.0),
        row("m", 1, None, 4.0, error="ValueError: no"),
        row("n", 0, None, 4.0, error="x | y"),
    ]
    line = line_of(rows)
    assert line["score"] == 1 and line["failed"] == 1 and line["samples"] == 1 and line["score_low"] is None
    text = markdown(aggregate(rows))
    assert "m (1 failed)" in text and "failed: x / y" in text


def test_csv_and_markdown_hold_every_line():
    rows = ends(3) + [row("m", c, 0.5, r) for c in range(3) for r in (2.0, 4.0)]
    lines = aggregate(rows)
    back = list(csv.DictReader(io.StringIO(to_csv(lines))))
    assert [tuple(x) for x in back] == [FIELDS] * 4 and {x["ratio"] for x in back} == {"", "2", "4"}
    text = markdown(lines)
    assert "Query-agnostic" in text and "Query-aware" not in text
    body = [line for line in text.splitlines() if line.startswith("|")]
    assert len(body) == 2 + 4 + 2 + 2
    assert [line.count("|") for line in body] == [len(COLUMNS) + 1] * 6 + [len(COST_COLUMNS) + 1] * 4
    aware = markdown(aggregate([{**r, "query_aware": True} for r in rows]))
    assert "Query-aware" in aware and "Query-agnostic" not in aware


def test_what_a_byte_and_a_second_buy():
    sizes = {"physical_bytes": 2**19, "compact_seconds": 0.25}
    rows = ends(4, 0.25, 0.75) + [row("m", c, s, 4.0, **sizes) for c, s in enumerate((0, 0.5, 0.5, 1))]
    line = line_of(rows)
    assert line["utilisation_per_mib"] == pytest.approx(1.0) and line["utilisation_per_second"] == pytest.approx(2.0)
    assert line_of(rows, "full")["utilisation_per_mib"] is None
    ((*_, size, per_mib, seconds, per_second),) = cost_cells_of(aggregate(rows))
    assert (size, per_mib, seconds, per_second) == ("512.0 KiB", "1.000", "0.250", "2.00")
    # a task without scores is judged by cross-entropy; one that the context is worth nothing to is not judged
    by_entropy = [
        row("no_context", 0, cross_entropy=3.0, predicted_tokens=4),
        row("full", 0, cross_entropy=1.0, predicted_tokens=4),
        row("m", 0, None, 4.0, cross_entropy=1.5, predicted_tokens=4, **sizes),
    ]
    assert line_of(by_entropy)["utilisation_per_mib"] == pytest.approx(1.5)
    assert cost_cells_of(aggregate(by_entropy))[0][2].endswith(" ce")
    assert cost_cells_of(aggregate(ends(3, 0.5, 0.5) + [row("m", c, 1.0, 4.0) for c in range(3)])) == []
