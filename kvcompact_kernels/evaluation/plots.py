# SPDX-License-Identifier: Apache-2.0
"""Pictures of an evaluation: quality over ratio, needles over depth and length, memory and time beside quality.

Needs matplotlib (the optional extra ``demo``); nothing else in the package does.
"""

import io
import math
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .runner import FULL, NO_CONTEXT
from .store import write_atomically
from .tables import when_known

# Okabe and Ito's palette without its yellow, which vanishes on paper; marker and dash differ as well, so that neither
# colour-blindness nor a grey print makes two methods alike
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
_DASHES = ("-", "--", "-.", ":")
_GREY = "#555555"

# figure of a line -> (label of the axis, whether more is better)
FIGURES = {
    "score": ("score", True),
    "utilisation": ("utilisation of the context", True),
    "kl": ("KL(full || method), nats/token", False),
    "perplexity": ("perplexity", False),
}


class PlotError(RuntimeError):
    """Pictures were asked for and cannot be drawn."""


def check_plots() -> None:
    """Raises PlotError when matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise PlotError("pictures need matplotlib: pip install 'kvcompact-kernels[demo]', or ask for none")


def styles(methods: list[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of each method, the same in every picture of an evaluation."""
    return {
        name: {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)],
        }
        for i, name in enumerate(methods)
    }


def draw_all(
    rows: list[dict[str, Any]], lines: list[dict[str, Any]], headlines: dict[str, str], folder: Path
) -> list[Path]:
    """Draws all pictures that the results allow and returns their files.

    Args:
        rows, lines: samples, and what ``aggregate`` made of them.
        headlines: task label -> figure that leads: "score", "kl" or "perplexity".

    Raises:
        PlotError: matplotlib is missing.
        OSError: the folder cannot be written to.
    """
    check_plots()
    files = []
    methods = list(dict.fromkeys(line["method"] for line in lines if line["ratio"] is not None))
    look = styles(methods)
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        # scores have a floor and a ceiling where the KL still tells methods apart
        figures = [headlines.get(task, "score"), "kl"]
        figures = [f for f in dict.fromkeys(figures) if any(line[f] is not None for line in own)]
        if figures[:1] == ["perplexity"]:
            figures = figures[:1]
        pictures = {
            "quality": quality_over_ratio(own, figures, look),
            "needles": needle_map([row for row in rows if row["task"] == task]),
            "cost": cost_beside_quality(own, figures, look),
        }
        for name, picture in pictures.items():
            if picture is not None:
                files.append(_save(picture, folder / f"{name}_{slug(task)}.png"))
    return files


def slug(task: str) -> str:
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in task)[:80]


def _save(figure: Any, path: Path) -> Path:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomically(path, data.getvalue())
    return path


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axes: Any) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _title(figure: Any, lines: list[dict[str, Any]], what: str) -> None:
    counts = sorted({line["cases"] for line in lines if line["cases"]})
    cases = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    aware = when_known(lines[0]["query_aware"])
    figure.suptitle(f"{lines[0]['task']}: {what} (contexts: {cases})\n{aware}", fontsize=11)


def _ends(axes: Any, lines: list[dict[str, Any]], figure: str) -> None:
    """Horizontal lines for the full cache and for no context."""
    for method, style in ((FULL, "-"), (NO_CONTEXT, (0, (1, 1.5)))):
        value = next((line[figure] for line in lines if line["method"] == method), None)
        if value is None or (method == FULL and figure == "kl"):  # the KL from itself is the axis
            continue
        axes.axhline(value, color=_GREY, linewidth=1.1, linestyle=style, zorder=1)
        axes.annotate(
            "full cache" if method == FULL else "no context",
            (0.99, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=_GREY,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )


def _bars(line: dict[str, Any], figure: str) -> tuple[float, float]:
    low, high = line.get(f"{figure}_low"), line.get(f"{figure}_high")
    if low is None or high is None:
        return 0.0, 0.0
    return max(0.0, line[figure] - low), max(0.0, high - line[figure])


def _quality_axis(axes: Any, figure: str) -> None:
    label, more = FIGURES[figure]
    axes.set_ylabel(f"{label}\n({'higher' if more else 'lower'} is better)")
    if figure in ("score", "utilisation"):
        axes.set_ylim(-0.05, 1.12)
    elif figure == "kl":
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.05)


def _legend(picture: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = 0.75 + 0.075 * max(map(len, labels))  # inches: a line with its marker, and 9 point letters
    columns = max(1, min(5, len(labels), int(picture.get_figwidth() / longest)))
    picture.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def quality_over_ratio(lines: list[dict[str, Any]], figures: list[str], look: dict[str, dict[str, Any]]) -> Any:
    """One row per figure, one panel per length: each method over the ratio, with 95% bootstrap intervals."""
    drawn = [line for line in lines if line["ratio"] is not None and line["samples"]]
    if not drawn or not figures:
        return None
    lengths = sorted({line["length"] for line in lines})
    ratios = sorted({line["ratio"] for line in drawn})
    picture = _figure(max(6.5, 4.6 * len(lengths)), 1.6 + 3.4 * len(figures))
    grid = picture.subplots(len(figures), len(lengths), sharex=True, sharey="row", squeeze=False)
    names = [name for name in look if any(line["method"] == name for line in drawn)]
    for figure, panels in zip(figures, grid):
        for axes, length in zip(panels, lengths):
            _ends(axes, [line for line in lines if line["length"] == length], figure)
            for i, name in enumerate(names):
                own = [x for x in drawn if x["length"] == length and x["method"] == name and x[figure] is not None]
                own.sort(key=lambda line: line["ratio"])
                # a step aside for each method, for equal values would lie on one another; a tenth at most, to stay at the ratio
                middle = (len(names) - 1) / 2
                aside = 1 + (i - middle) * min(0.03, 0.1 / max(1, middle))
                axes.errorbar(
                    [line["ratio"] * aside for line in own],
                    [line[figure] for line in own],
                    yerr=list(zip(*(_bars(line, figure) for line in own))) or None,
                    label=name,
                    capsize=2.5,
                    elinewidth=1,
                    linewidth=1.6,
                    markersize=6,
                    markeredgecolor="white",
                    **look[name],
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(ratios, [f"{r:g}×" for r in ratios])
            axes.minorticks_off()
            _tidy(axes)
        _quality_axis(panels[0], figure)
    for axes, length in zip(grid[0], lengths):
        axes.set_title(f"{length} tokens", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("compression (bytes of the full cache / bytes)")
    _legend(picture, grid[0][0])
    intervals = any(line[f"{figure}_low"] is not None for line in drawn for figure in figures)
    _title(picture, lines, "quality at equal bytes" + (", with 95% bootstrap intervals" if intervals else ""))
    return picture


def needle_map(rows: list[dict[str, Any]]) -> Any:
    """One panel per method and ratio: mean score over depth of the fact and length; None without depths."""
    rows = [row for row in rows if row["score"] is not None and "depth" in (row["meta"] or {})]
    if not rows:
        return None
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["meta"]["depth"] for row in rows})
    ratios = sorted({row["ratio"] for row in rows if row["ratio"] is not None})
    methods = list(dict.fromkeys(row["method"] for row in rows if row["ratio"] is not None))
    cells: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        cells[row["method"], row["ratio"], row["meta"]["depth"], row["length"]].append(row["score"])
    grid = [[(name, ratio) for ratio in ratios] for name in methods]
    columns = max(2, len(ratios))
    grid = [[(FULL, None), (NO_CONTEXT, None)], *grid]
    wide = 1.0 + columns * max(1.9, 0.75 * len(lengths) + 0.7)
    picture = _figure(max(6.0, wide + 1.0), 0.9 + len(grid) * (0.28 * len(depths) + 0.75))
    panels = picture.subplots(len(grid), columns, squeeze=False)
    image = None
    for i, line in enumerate(grid):
        for j in range(columns):
            axes = panels[i][j]
            if j >= len(line):
                axes.set_visible(False)
                continue
            name, ratio = line[j]
            values = [[_mean(cells.get((name, ratio, depth, length))) for length in lengths] for depth in depths]
            image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    if not math.isnan(value):
                        colour = "black" if value > 0.55 else "white"
                        axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
            axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths], fontsize=7)
            axes.set_title(name if ratio is None else f"{name} {ratio:g}×", fontsize=8)
            if i == len(grid) - 1:
                axes.set_xlabel("tokens of the context", fontsize=8)
            if j == 0:
                axes.set_ylabel("depth", fontsize=8)
    bar = picture.colorbar(image, ax=panels, shrink=min(1.0, 2.4 / len(grid)), fraction=0.05)
    bar.set_label("mean score")
    picture.suptitle(
        f"{rows[0]['task']}: score by depth of the fact and length\n{when_known(rows[0]['query_aware'])}", fontsize=10
    )
    return picture


def _mean(values: list[float] | None) -> float:
    return sum(values) / len(values) if values else math.nan


def cost_beside_quality(lines: list[dict[str, Any]], figures: list[str], look: dict[str, dict[str, Any]]) -> Any:
    """Quality at the longest length over bytes held, over the highest memory, and over seconds spent to compact."""
    length = max(line["length"] for line in lines)
    here = [line for line in lines if line["length"] == length and line["samples"]]
    drawn = [line for line in here if line["ratio"] is not None]
    costs = (
        ("physical_bytes", 2.0**20, "cache (MiB)", True),
        ("peak_bytes", 2.0**20, "peak while compacting (MiB)", True),
        ("compact_seconds", 1.0, "time to compact, reading left out (s)", True),
        ("decode_tokens_per_second", 1.0, "decoding (tokens/s)", False),
    )
    shown = [x for x in costs if any(line[x[0]] for line in drawn)]
    if not shown or not figures:
        return None
    picture = _figure(3.7 * len(shown) + 0.6, 1.4 + 3.2 * len(figures))
    grid = picture.subplots(len(figures), len(shown), sharex="col", sharey="row", squeeze=False)
    for figure, panels in zip(figures, grid):
        for axes, (name, unit, _, logarithmic) in zip(panels, shown):
            _ends(axes, here, figure)
            for method, style in look.items():
                own = [x for x in drawn if x["method"] == method and x[name] and x[figure] is not None]
                own.sort(key=lambda line: line["ratio"])
                axes.plot(
                    [line[name] / unit for line in own],
                    [line[figure] for line in own],
                    label=method,
                    linewidth=1.2,
                    markersize=6,
                    markeredgecolor="white",
                    **style,
                )
            if logarithmic:
                axes.set_xscale("log")
                _plain_ticks(axes)
            _tidy(axes)
        _quality_axis(panels[0], figure)
    for axes, (_, _, label, _) in zip(grid[-1], shown):
        axes.set_xlabel(label)
    _legend(picture, grid[0][0])
    _title(picture, here, f"memory and time beside quality, {length} tokens, one point per ratio")
    return picture


def _plain_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    many = high / low < 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if many else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
