# SPDX-License-Identifier: Apache-2.0
"""``longbench``: questions of LongBench's files."""

from dataclasses import dataclass

from ..._checks import BadFileError, check_int
from ._files import both_ends, check_path, read_lines, take
from .base import Case, Question, Room, Task, register_task


@register_task
@dataclass
class LongBench(Task):
    """LongBench (arXiv 2308.14508): one question for each context, scored by word F1.

    The files are not part of this package: ``data/hotpotqa.jsonl`` and the like, one JSON object per line. Word F1 is the
    benchmark's own figure for its question answering sets; for the other sets it is a stand-in. The prompt is one for all
    sets, so scores are comparable between methods here, not with published ones.

    Attributes:
        file: one of them.
        tokens: of an answer, at most.
    """

    name = "longbench"
    summary = "LongBench, from one of its .jsonl files: file=PATH"

    file: str
    tokens: int = 32

    def __post_init__(self):
        check_int("tokens", self.tokens, minimum=1)
        self._path = check_path(
            "file", self.file, "LongBench's .jsonl files come from its authors, longbench:file=PATH"
        )
        self._rows = read_lines(self._path)
        for i, row in enumerate(self._rows):
            where = f"{self._path}, line {i + 1}"
            take(row, "context", str, where)
            take(row, "input", str, where)
            if not all(isinstance(a, str) and a for a in take(row, "answers", list, where)) or not row["answers"]:
                raise BadFileError(f"{where}: answers must be a list of strings")

    def num_cases(self) -> int:
        return len(self._rows)

    def make(self, room: Room) -> Case:
        row = self._rows[room.index]
        ask = row["input"].strip() or "Summarise the text above."
        question = Question(f"{ask}\nAnswer in a few words.", tuple(row["answers"]), "f1", "", (), self.tokens)
        return Case((question,), both_ends(room, row["context"]))
