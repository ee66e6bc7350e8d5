# SPDX-License-Identifier: Apache-2.0
"""``quality``: multiple choice on long articles."""

import re
from dataclasses import dataclass

from ..._checks import BadFileError
from ._files import LETTERS, both_ends, check_path, multiple_choice, read_lines, take
from .base import Case, Question, Room, Task, register_task


@register_task
@dataclass
class Quality(Task):
    """QuALITY (arXiv 2112.08608): questions with four options on one article.

    The files are not part of this package: ``QuALITY.v1.0.1.htmlstripped.dev`` and the like, one JSON object per line.
    Questions without a gold label (the test split) are left out.

    Attributes:
        file: one of them.
    """

    name = "quality"
    summary = "QuALITY, from one of its files: file=PATH"

    file: str

    def __post_init__(self):
        path = check_path("file", self.file, "QuALITY's files come from its authors, quality:file=PATH")
        articles: dict[str, list[Question]] = {}
        for i, row in enumerate(read_lines(path)):
            where = f"{path}, line {i + 1}"
            text = re.sub(r"<[^>]*>", " ", take(row, "article", str, where)).strip()
            probes = articles.setdefault(text, [])
            for question in take(row, "questions", list, where):
                options = take(question, "options", list, where)
                if "gold_label" in question:
                    gold = take(question, "gold_label", int, where)
                    if not 1 <= gold <= len(options) <= len(LETTERS):
                        raise BadFileError(f"{where}: gold_label {gold} is none of the {len(options)} options")
                    ask = multiple_choice(take(question, "question", str, where), options)
                    letters = tuple(LETTERS[: len(options)])
                    probes.append(Question(ask, (letters[gold - 1],), "choice", "", letters))
        self._articles = [(text, probes) for text, probes in articles.items() if probes]
        if not self._articles:
            raise BadFileError(f"{path} holds no question with a gold label")

    def num_cases(self) -> int:
        return len(self._articles)

    def make(self, room: Room) -> Case:
        text, probes = self._articles[room.index]
        return Case(tuple(probes), both_ends(room, text))
