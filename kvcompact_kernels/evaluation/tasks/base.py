# SPDX-License-Identifier: Apache-2.0
"""What a task is, and the registry that ``--tasks`` names them through.

A task makes *cases*: a context, which is compacted once, and *probes*, which are asked of what is left of it.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

SCORINGS = ("all", "any", "f1", "choice", "like_full")


@dataclass(frozen=True)
class Question:
    """A question on the context.

    Attributes:
        text: the question, with all instructions.
        answers: the expected strings.
        scoring: "all": share of ``answers`` found in the generated text; "any": one of them is found; "f1": best word F1;
            "choice": the most likely of ``choices`` after the prompt is ``answers[0]``; "like_full": word F1 with what the
            full cache answers.
        prefix: opening of the answer, put into the model's mouth.
        choices: for "choice".
        max_new_tokens: of the generated answer.
        meta: JSON-able facts for tables and pictures, such as ``depth`` in [0, 1].
    """

    text: str
    answers: tuple[str, ...]
    scoring: str = "all"
    prefix: str = ""
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 32
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Continuation:
    """Token ids that follow the context's own in the text. All but the first are predicted."""

    ids: tuple[int, ...]
    meta: dict[str, Any] = field(default_factory=dict)


Probe = Question | Continuation


@dataclass(frozen=True)
class Case:
    """A context and what is asked of it: a text (``context``), or token ids taken as they are (``context_ids``)."""

    probes: tuple[Probe, ...]
    context: str = ""
    context_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Room:
    """What a task makes a case from.

    Attributes:
        length: tokens that the context may have, the prompt's opening included.
        index: number of the case, from 0.
        seed: of the evaluation.
        encode: text to token ids, without special tokens.
        opening: tokens that the prompt puts before a context that is a text.
        texts: the user's documents (empty: none given).
    """

    length: int
    index: int
    seed: int
    encode: Callable[[str], list[int]]
    opening: int = 0
    texts: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens left for a context that is a text."""
        return self.length - self.opening

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def draw(self, task: str) -> random.Random:
        """Randomness of this case: the same in every process."""
        return random.Random(f"{task}/{self.length}/{self.index}/{self.seed}")


@dataclass
class Task(ABC):
    """One kind of test; subclasses are dataclasses whose fields are the task's options.

    Class attributes:
        name: what ``--tasks`` takes.
        summary: one line for the list of tasks.
        headline: the figure that tables and pictures lead with: "score", "kl" or "perplexity".
        needs: the figure needs a file of the user's; an option names it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    headline: ClassVar[str] = "score"

    @abstractmethod
    def make(self, room: Room) -> Case:
        """The case number ``room.index``.

        Raises:
            ValueError: the length is too small for the task, or a file is missing or not in its format.
        """

    def num_cases(self) -> int | None:
        """How many cases there are; None for as many as one likes."""
        return None


_TASKS: dict[str, type[Task]] = {}


def register_task(cls: type[Task]) -> type[Task]:
    """Class decorator: makes a task known under ``cls.name``. A name can be registered once."""
    for attribute in ("name", "summary"):
        if not isinstance(getattr(cls, attribute, None), str):
            raise TypeError(f"{cls.__name__}.{attribute} must be a string")
    if cls.name in _TASKS and _TASKS[cls.name] is not cls:
        raise ValueError(f"a task named {cls.name!r} is registered already: {_TASKS[cls.name].__qualname__}")
    _TASKS[cls.name] = cls
    return cls


def list_tasks() -> dict[str, type[Task]]:
    """All registered tasks by name."""
    return dict(sorted(_TASKS.items()))


def get_task(name: str, **options: Any) -> Task:
    """The task named ``name`` with the given options.

    Raises:
        ValueError: no task of that name, or a value that it refuses.
        TypeError: an option that it does not have, or one that it needs and was not given.
    """
    if name not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(map(repr, sorted(_TASKS)))}, got {name!r}")
    cls = _TASKS[name]
    allowed = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls) if f.init}
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        known = ", ".join(map(repr, allowed)) or "none"
        raise TypeError(f"task {name!r} has no option {', '.join(map(repr, unknown))}; its options are: {known}")
    missing = [option for option, needed in allowed.items() if needed and option not in options]
    if missing:
        raise TypeError(
            f"task {name!r} needs the option {', '.join(map(repr, missing))}, as in {name}:{missing[0]}=..."
        )
    return cls(**options)
