# SPDX-License-Identifier: Apache-2.0
"""``longhealth``: multiple choice on patients' records."""

from dataclasses import dataclass

from ..._checks import BadFileError, check_int
from ._files import LETTERS, both_ends, check_path, multiple_choice, read_json, take
from .base import Case, Question, Room, Task, register_task


@register_task
@dataclass
class LongHealth(Task):
    """LongHealth (arXiv 2401.14490), first task: questions with five options on one patient's documents.

    The benchmark's file is not part of this package: it is ``benchmark_v5.json`` of its authors' repository. Records that are
    longer than the length lose their middle, and with it perhaps an answer, for the full cache too.

    Attributes:
        file: the benchmark.
        questions: of each patient, at most.
    """

    name = "longhealth"
    summary = "LongHealth, from its file benchmark_v5.json: file=PATH"

    file: str
    questions: int = 20

    def __post_init__(self):
        check_int("questions", self.questions, minimum=1)
        path = check_path(
            "file", self.file, "LongHealth's benchmark_v5.json comes from its authors, longhealth:file=PATH"
        )
        patients = read_json(path)
        if not isinstance(patients, dict) or not patients:
            raise BadFileError(f"{path} must hold an object of patients")
        self._patients = []
        for name, patient in patients.items():
            texts = take(patient, "texts", dict, f"{path}, {name}")
            asked = take(patient, "questions", list, f"{path}, {name}")
            self._patients.append(("\n\n".join(texts.values()), [_probe(q, f"{path}, {name}") for q in asked]))

    def num_cases(self) -> int:
        return len(self._patients)

    def make(self, room: Room) -> Case:
        text, probes = self._patients[room.index]
        return Case(tuple(probes[: self.questions]), both_ends(room, text))


def _probe(question: dict, where: str) -> Question:
    options = [take(question, f"answer_{letter.lower()}", str, where) for letter in LETTERS[:5]]
    right = take(question, "correct", str, where)
    if right not in options:
        raise BadFileError(f"{where}: the correct answer is none of the options")
    text = multiple_choice(take(question, "question", str, where), options)
    return Question(text, (LETTERS[options.index(right)],), "choice", "", tuple(LETTERS[:5]))
