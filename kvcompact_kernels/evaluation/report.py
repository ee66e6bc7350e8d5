# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves in its folder: CSV, Markdown, pictures, and one HTML page that holds them all."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from . import plots, tables
from .aggregate import aggregate, to_csv
from .specs import parse_spec
from .store import CONFIG, StoreError, read_rows, write_atomically
from .tasks import list_tasks

_STYLE = """
body { font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.6rem 0; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
div.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; margin: 0.6rem 0; }
p.note, li { color: #444; font-size: 0.9rem; }
"""


def headlines(tasks: list[str]) -> dict[str, str]:
    """Task label -> its leading figure; "score" for a task that is not registered here."""
    known = list_tasks()
    found = {}
    for label in tasks:
        cls = known.get(parse_spec(label)[0])
        found[label] = "score" if cls is None else cls.headline
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that the folder's rows were made with.

    Raises:
        StoreError: there is none.
    """
    path = folder / CONFIG
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder} holds no results of an evaluation: {error}") from error


def write_report(folder: Path, pictures: bool = True) -> tuple[list[dict[str, Any]], list[Path]]:
    """Makes tables and pictures of the rows in a folder, be they complete or not.

    Returns:
        The aggregated lines, and the files written.

    Raises:
        StoreError: no rows, or damaged ones.
        PlotError: pictures are wanted and matplotlib is missing.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    config = read_config(folder)
    rows = read_rows(folder)
    if not rows:
        raise StoreError(f"{folder} holds no results yet")
    lines = aggregate(rows, config.get("seed", 0))
    drawn = []
    if pictures:
        drawn = plots.draw_all(rows, lines, headlines(list(dict.fromkeys(r["task"] for r in rows))), folder)
    files = {
        folder / "results.csv": to_csv(lines),
        folder / "results.md": tables.markdown(lines, config),
        folder / "index.html": page(lines, config, drawn),
    }
    for path, text in files.items():
        write_atomically(path, text.encode())
    return lines, [*files, *drawn]


def page(lines: list[dict[str, Any]], config: dict[str, Any], pictures: list[Path]) -> str:
    """One HTML page that needs no other file and no network."""
    body = ["<h1>Evaluation</h1>", f"<p>{html.escape(tables.settings(config))}</p>"]
    used = set()
    for task, length, group in tables.blocks(lines):
        body.append(f"<h2>{html.escape(tables.heading(task, length, group))}</h2>")
        body.append(f'<p class="note">{html.escape(tables.when_known(group[0]["query_aware"]))}</p>')
        body.append(_table(list(tables.COLUMNS), tables.cells_of(group)))
        cost = tables.cost_cells_of(group)
        if cost:
            body.append(_table(list(tables.COST_COLUMNS), cost))
        own = [p for p in pictures if p not in used and p.stem.split("_", 1)[1] == plots.slug(task)]
        if length == max(line["length"] for line in lines if line["task"] == task):
            for path in own:
                used.add(path)
                data = base64.b64encode(path.read_bytes()).decode()
                words = path.stem.replace("_", " ")
                body.append(f'<img src="data:image/png;base64,{data}" alt="{html.escape(words)}">')
    body.append("<h2>How to read the tables</h2><ul>")
    body += [f"<li>{html.escape(line)}</li>" for line in tables.LEGEND]
    body.append("</ul><h2>Settings</h2>")
    body.append(f"<pre>{html.escape(json.dumps(config, indent=1, ensure_ascii=False))}</pre>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Evaluation</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"
