# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of an evaluation."""

from typing import Any

from ..cli.common import bytes_text
from .aggregate import leading_utilisation
from .runner import FULL, NO_CONTEXT

COLUMNS = (
    "method",
    "ratio",
    "slots",
    "score",
    "utilisation",
    "KL",
    "perplexity",
    "agreement",
    "KV physical",
    "temporary",
    "peak",
    "compact s",
    "first token s",
    "tokens/s",
)
COST_COLUMNS = (
    "method",
    "ratio",
    "utilisation",
    "KV physical",
    "utilisation per MiB",
    "compact s",
    "utilisation per s",
)
_LEGEND = """\
Figures in brackets: 95% bootstrap interval over contexts.
score: accuracy as the task counts it. utilisation: (method - no_context) / (full - no_context), of scores; where the
  task has no score, of cross-entropies (marked ce).
KL: KL(full || method) per token, nats: on the full cache's own answers, or on the text. perplexity: of the expected
  answers, or of the text. agreement: share of those tokens that both caches put first.
ratio: bytes of the full cache per byte of the method's, asked for; biases and offsets count, so that methods of one
  ratio are compared at equal bytes. slots: per KV head and layer, mean.
KV physical: bytes that the cache holds. temporary: most that the method needs beside its block while it compacts a
  layer (on the CPU without scratch memory inside one operator). peak: blocks, one layer's keys, values and queries,
  and temporary memory, without weights and activations.
compact s: the method's own time, without reading the context. first token s: reading the question. tokens/s:
  decoding, batch 1. Medians, on the machine at hand.
utilisation per MiB, per s: utilisation divided by the bytes that the cache holds, and by the method's own time. Both
  favour caches that are small or made fast, however little they know: read them beside the utilisation itself.
"""
LEGEND = tuple(_LEGEND.replace("\n  ", " ").splitlines())


def when_known(query_aware: bool) -> str:
    """The sentence that every table carries."""
    if query_aware:
        return "Query-aware: the question was known when the context was compacted, and was compacted with it."
    return "Query-agnostic: the context was compacted before the question was known."


def _number(value: float | None, form: str = ".3f") -> str:
    if value is None:
        return "–"
    text = format(value, form)
    return text.lstrip("-") if float(text) == 0 else text


def _with_interval(line: dict[str, Any], name: str, form: str = ".2f") -> str:
    text = _number(line[name], form)
    if line[name] is None or line.get(f"{name}_low") is None:
        return text
    return f"{text} [{_number(line[f'{name}_low'], form)}, {_number(line[f'{name}_high'], form)}]"


def _label(line: dict[str, Any]) -> list[str]:
    return [
        line["method"] + (f" ({line['failed']} failed)" if line["failed"] else ""),
        "–" if line["ratio"] is None else f"{line['ratio']:g}",
    ]


def _used(line: dict[str, Any]) -> str:
    name = leading_utilisation(line)
    return _with_interval(line, name) + (" ce" if name == "entropy_utilisation" else "")


def _cells(line: dict[str, Any]) -> list[str]:
    if line["samples"] == 0:
        rest = ["–"] * (len(COLUMNS) - 4)
        return [line["method"], f"{line['ratio']:g}", "–", f"failed: {line['error']}".replace("|", "/"), *rest]
    return [
        *_label(line),
        _number(line["slots"], ".0f"),
        _with_interval(line, "score"),
        _used(line),
        _with_interval(line, "kl", ".3f"),
        _number(line["perplexity"], ".2f"),
        _with_interval(line, "agreement"),
        *("–" if line[n] is None else bytes_text(line[n]) for n in ("physical_bytes", "temporary_bytes", "peak_bytes")),
        _number(line["compact_seconds"]),
        _number(line["first_token_seconds"]),
        _number(line["decode_tokens_per_second"], ".1f"),
    ]


def ordered(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ends first, then by ratio, then by method as they came."""
    place = {line["method"]: i for i, line in reversed(list(enumerate(lines)))}

    def key(line: dict[str, Any]) -> tuple:
        end = {FULL: 0, NO_CONTEXT: 1}.get(line["method"], 2)
        return end, line["ratio"] or 0.0, place[line["method"]]

    return sorted(lines, key=key)


def blocks(lines: list[dict[str, Any]]) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """Lines of each (task, length), in order."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault((line["task"], line["length"]), []).append(line)
    return [(task, length, ordered(group)) for (task, length), group in found.items()]


def cells_of(group: list[dict[str, Any]]) -> list[list[str]]:
    """The table of one task and length, without its header :data:`COLUMNS`."""
    return [_cells(line) for line in group]


def cost_cells_of(group: list[dict[str, Any]]) -> list[list[str]]:
    """What the bytes and the seconds of a method buy, under :data:`COST_COLUMNS`; empty where there is no utilisation."""
    shown = [line for line in group if line["utilisation_per_mib"] is not None]
    return [
        [
            *_label(line),
            _used(line),
            bytes_text(line["physical_bytes"]),
            _number(line["utilisation_per_mib"]),
            _number(line["compact_seconds"]),
            _number(line["utilisation_per_second"], ".2f"),
        ]
        for line in shown
    ]


def heading(task: str, length: int, group: list[dict[str, Any]]) -> str:
    """Caption of a table."""
    cases = max(line["cases"] for line in group)
    samples = max(line["samples"] for line in group)
    counts = f"{cases} context{'s' * (cases != 1)}, {samples} sample{'s' * (samples != 1)}"
    return f"{task}, {length} tokens ({counts})"


def markdown(lines: list[dict[str, Any]], config: dict[str, Any] | None = None) -> str:
    """All tables, each with its caption; the legend once at the end."""
    out = ["# Evaluation", ""]
    if config:
        out += [settings(config), ""]
    for task, length, group in blocks(lines):
        out += [f"## {heading(task, length, group)}", "", when_known(group[0]["query_aware"]), ""]
        for columns, cells in ((COLUMNS, cells_of(group)), (COST_COLUMNS, cost_cells_of(group))):
            if cells:
                rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *cells]
                out += ["| " + " | ".join(row) + " |" for row in rows]
                out.append("")
    out += [f"- {line}" for line in LEGEND]
    return "\n".join(out) + "\n"


def settings(config: dict[str, Any]) -> str:
    """One line on what was run."""
    return (
        f"Model {config.get('model')}, {config.get('dtype')}, {config.get('device')}; seed {config.get('seed')}; "
        f"kvcompact-kernels {config.get('version')}."
    )
