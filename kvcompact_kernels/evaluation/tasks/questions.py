# SPDX-License-Identifier: Apache-2.0
"""``questions``: a document of the user's with questions that have short, exact answers."""

from dataclasses import dataclass
from pathlib import Path

from ..._checks import BadFileError
from ..metrics import found
from ._files import beginning, check_path, read_json, take
from .base import Case, Question, Room, Task, register_task


@register_task
@dataclass
class Questions(Task):
    """One document, compacted once, and a JSON list of questions on it.

    Each entry has ``query``, ``answers`` (accepted strings) and, if wanted, ``id`` and ``answer_prompt`` (an instruction).
    A document that is longer than the length is cut at its end, and only the questions one of whose answers still stands in
    the text are asked.

    Attributes:
        file: the questions.
        document: the text; by default the file beside it without ``_questions``: ``x_questions.json`` -> ``x.txt``.
    """

    name = "questions"
    summary = "a document of yours with exact-answer questions: file=QUESTIONS.json, document=TEXT"

    file: str
    document: str | None = None

    def __post_init__(self):
        path = check_path("file", self.file, "give the JSON list of questions as questions:file=PATH")
        document = self.document
        if document is None:
            document = str(path.with_name(path.stem.removesuffix("_questions") + ".txt"))
        self._document = check_path("document", document, "give the text as questions:file=...:document=PATH")
        self._entries = _entries(path)

    def num_cases(self) -> int:
        return 1

    def make(self, room: Room) -> Case:
        text = beginning(room, self._document.read_text(encoding="utf-8").strip())
        probes = []
        for entry in self._entries:
            if any(found(answer, text) for answer in entry["answers"]):
                ask = f"{entry['query'].strip()} {entry.get('answer_prompt') or ''}".strip()
                longest = max(room.count(answer) for answer in entry["answers"])
                meta = {"id": entry["id"]} if isinstance(entry.get("id"), str) else {}
                probes.append(Question(ask, tuple(entry["answers"]), "any", "", (), longest + 12, meta))
        if not probes:
            raise ValueError(f"no answer of {self.file} stands in the first {room.length} tokens of {self._document}")
        return Case(tuple(probes), text)


def _entries(path: Path) -> list[dict]:
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise BadFileError(f"{path} must hold a list of questions")
    for i, entry in enumerate(entries):
        where = f"{path}, question {i + 1}"
        take(entry, "query", str, where)
        answers = take(entry, "answers", list, where)
        if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise BadFileError(f"{where}: answers must be a list of strings, got {answers!r}")
    return entries
