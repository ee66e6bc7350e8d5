# SPDX-License-Identifier: Apache-2.0
"""The rows of a GPU visit as a table of at most 40 lines, and as a picture: ``python benchmarks/gpu/table.py FOLDER``."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

MOST_LINES = 40
WIDTH = 175
SHORT = {
    "best SDPA without a bias": "sdpa",
    "best route with a bias": "biased",
    "best composed route": "composed",
    "flex + beta": "flex",
    "sdpa + mask": "masked",
    "eager compiled": "compiled",
}
NO_GRAPH = ", no graph"  # the end of the shapes whose rows say what the host adds: they are not in the table
# peers that the table names: the fastest of a group speaks for its members, which rows.csv has
SHOWN = (
    "best SDPA without a bias",
    "best route with a bias",
    "best composed route",
    "flex + beta",
    "eager",
    "eager compiled",
)


def cases(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], list[dict[str, str]]]:
    """Rows of kernels by what was measured, in order of appearance."""
    found = defaultdict(list)
    for row in rows:
        if row["role"] == "kernel":
            found[row["op"], row["shape"], row["dtype"]].append(row)
    return dict(found)


def fastest(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those rows that are of the fastest kernel."""
    timed = [r for r in rows if r["ms_p50"]]
    if not timed:
        return []
    best = min(timed, key=lambda r: float(r["ms_p50"]))["backend"]
    return [r for r in timed if r["backend"] == best]


def report(rows: list[dict[str, str]], outcomes: list[tuple[str, str, float, str]]) -> str:
    """The table: where it was measured, ceilings, a line per case with the ratios to its peers, then what went wrong."""
    from kvcompact_kernels.cli.common import plain_table

    head, tail = _heading(rows), _endings(outcomes)
    lines, met, goals = [], 0, 0
    steps = defaultdict(list)
    for (op, shape, dtype), group in cases(rows).items():
        if shape.endswith(NO_GRAPH):
            continue
        best = fastest(group)
        judged = [r["met"] for r in best if r["met"]]
        met, goals = met + judged.count("yes"), goals + len(judged)
        if op == "decode_step":
            context, which = shape.rsplit(" ", 1)
            steps[context, dtype].append(f"{which} {best[0]['note'] if best else 'does not fit'}")
            continue
        first = best[0]
        peers = {r["peer"]: float(r["ratio"]) for r in best if _is_shown(r["peer"])}
        ratios = [f"{_short_peer(peer)} {ratio:.3g}x" for peer, ratio in peers.items()]
        lines.append(
            [
                shape,
                _short_dtype(dtype),
                first["backend"],
                _milliseconds(first["ms_p50"]),
                f"{float(first['tb_s']):.2f}",
                f"{float(first['tflop_s']):.0f}",
                f"{float(first['percent']):.0f}% {first['ceiling']}",
                f"{judged.count('yes')}/{len(judged)}" if judged else "",
                ", ".join(ratios),
            ]
        )
    tail = [
        *(f"{context} {_short_dtype(dtype)}: {' | '.join(parts)}" for (context, dtype), parts in steps.items()),
        *tail,
    ]
    left = MOST_LINES - len(head) - len(tail) - 3
    more = len(lines) - left
    if more > 0:
        lines = lines[:left]
    header = ["shape", "dtype", "kernel", "ms", "TB/s", "TFLOP/s", "ceiling", "goals", "times faster than"]
    body = plain_table(header, lines, {3, 4, 5}).split("\n") if lines else ["no rows"]
    closing = f"goals met: {met} of {goals}" + (f"; {more} more cases in rows.csv" if more > 0 else "")
    return "\n".join(line[:WIDTH] for line in [*head, *body, closing, *tail])


def _is_shown(peer: str) -> bool:
    return peer in SHOWN or peer.endswith((" unshared", " without beta", " layer by layer"))


def _short_peer(peer: str) -> str:
    return SHORT.get(peer, peer.split(" ", 1)[-1])


def _short_dtype(name: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, name)


def _milliseconds(text: str) -> str:
    value = float(text)
    return f"{value:.4f}" if value < 1 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _heading(rows: list[dict[str, str]]) -> list[str]:
    if not rows:
        return []
    first = rows[0]
    ceilings = [
        f"{r['shape']} {float(r['tb_s']):.3g} TB/s" if r["tb_s"] else f"{r['shape']} {float(r['tflop_s']):.0f} TFLOP/s"
        for r in rows
        if r["role"] == "ceiling"
    ]
    driver = f", driver {first['driver']}" if first["driver"] else ""
    return [
        f"{first['device']}{driver}, commit {first['commit']}, {first['versions']}",
        f"ceilings: {', '.join(ceilings) or 'not measured'}",
    ]


def _endings(outcomes: list[tuple[str, str, float, str]]) -> list[str]:
    good = [f"{name} {seconds:.0f} s" for name, status, seconds, _ in outcomes if status in ("ok", "ended")]
    lines = [f"done: {', '.join(good) or 'nothing'}"] if outcomes else []
    for name, status, seconds, detail in outcomes:
        if status not in ("ok", "ended"):
            lines.append(f"{status.upper()}: {name} after {seconds:.0f} s: {detail}")
        elif detail and (name in ("tests", "sanitizer") or "CUT" in detail):
            lines.append(f"{name}: {detail}")
    return lines[: MOST_LINES // 2]


def draw(rows: list[dict[str, str]], path: Path) -> bool:
    """A picture of every case: its share of the binding ceiling, and beside it how many times faster than each peer.

    Returns:
        Whether there was something to draw, and matplotlib to draw it.
    """
    from importlib.util import find_spec

    chosen = [(key, fastest(group)) for key, group in cases(rows).items()]
    chosen = [(key, best) for key, best in chosen if best and best[0]["percent"]]
    if not chosen or find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    from kvcompact_kernels.evaluation.plots import styles

    figure = Figure(figsize=(13, max(4.5, 1.6 + 0.34 * len(chosen))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    places = range(len(chosen))
    names = [f"{shape} {_short_dtype(dtype)}" for (_, shape, dtype), _ in chosen]
    shares = [float(best[0]["percent"]) for _, best in chosen]
    left.barh(places, shares, color="#0072B2", height=0.6)
    for place, share, (_, best) in zip(places, shares, chosen):
        first = best[0]
        text = f"{share:.0f}% {first['ceiling']}, {_milliseconds(first['ms_p50'])} ms, {float(first['tb_s']):.2f} TB/s"
        left.text(share + 1, place, f"{text}, {float(first['tflop_s']):.0f} TFLOP/s", va="center", fontsize=7)
    left.set_yticks(places, names, fontsize=8)
    left.set_xlim(0, 190)
    left.set_xlabel("% of the binding ceiling measured in the same visit")
    left.invert_yaxis()
    peers = sorted({r["peer"] for _, best in chosen for r in best if r["peer"]})
    for peer, look in styles(peers).items():
        points = [(float(r["ratio"]), i) for i, (_, best) in enumerate(chosen) for r in best if r["peer"] == peer]
        look = {"color": look["color"], "marker": look["marker"], "linestyle": "none", "markersize": 5}
        right.plot(*zip(*points), label=peer, **look)
    right.axvline(1, color="#555555", linewidth=0.8)
    right.set_xscale("log")
    right.set_xlabel("times faster than the peer (log)")
    right.grid(axis="y", linewidth=0.3)
    if peers:
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['date']}, commit {rows[0]['commit']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent), str(here.parents[1])]
    from lab import read_rows

    rows = read_rows(Path(argv[0]) / "rows.csv")
    print(report(rows, []))
    if draw(rows, Path(argv[0]) / "rows.png"):
        print(f"drawn in {Path(argv[0]) / 'rows.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
