# SPDX-License-Identifier: Apache-2.0
"""Self-study (Cartridges, arXiv 2506.06266, section 4): the model writes conversations about a text, piece by piece.

A chunk of the text is read once; behind its cache the model writes requests of five kinds and answers them, and what it
held likely at each answer token is kept. Chunks, requests and answers of one *unit* depend on the text, the options and
the unit's number alone, so preparation goes on where it was interrupted, and files are read back piece by piece.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._checks import check_choice, check_int
from ..cache import CompactCache, load_safetensors, save_safetensors
from ..evaluation.metrics import stop_ids
from ..evaluation.store import write_atomically
from ..prompt import PromptFormat, document_ids, prompt_format, question_ids
from .distill import Targets, hidden_states, pad_answers, teacher_targets
from .generation import generate
from .loop import stable_number

FORMAT = "kvcompact-self-study"
FORMAT_VERSION = 4
NOTE = "conversations.json"

# what the model is asked to write about a passage, and the words that its request begins with: put into its mouth, for
# small models that are merely asked for a question often write something else
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "structuring": (
        "Write a request, in one sentence, that asks for the facts of this passage in good order. Name the subject.",
        ("List", "Give me a list of", "Make a table of", "Give me a timeline of", "Give, as JSON,", "Outline"),
    ),
    "summarisation": (
        "Write a request, in one sentence, that asks for a summary of what this passage is about. Name the subject.",
        ("Summarise", "Tell me in two sentences", "Explain shortly", "Describe"),
    ),
    "question": (
        "Write one short question that this passage answers.",
        (
            "What",
            "What is",
            "Which",
            "Who",
            "When",
            "Where",
            "How many",
            "In what year",
            "How",
            "Why",
            "In which",
            "By which",
            "Of which",
            "From what",
            "What percentage",
            "How much",
            "Since when",
            "With whom",
        ),
    ),
    "use_case": (
        "Somebody needs this for a piece of work. Write their message: what they do, and what they need to know.",
        ("I am writing", "I am preparing", "I need to know", "For my class,", "We are planning"),
    ),
    "creative": (
        "Write a playful request, in one sentence, that somebody who knows this passage can fulfil. Name the subject.",
        ("Write a riddle about", "Write a short poem about", "Write a letter", "Imagine"),
    ),
}
# kinds that are made of the text, and not written: a passage that is to be continued, and one whose gap is to be filled
RECALL, GAP = "recall", "gap"
_SEED = 'Passage: "{passage}"\n\n{task}'
_RECALL = 'Continue this passage of the text: "{}"'
_GAP = 'Which words of the text are missing here? "{}"'
_MARK = "____"
_AROUND = 8  # words on either side of a gap that are shown, where it is not the whole passage
# how a short answer is asked for, whatever the question, and by the words that it begins with. Several ways: a reader has
# others again
_SHORT = (
    "Answer in a few words.",
    "Answer briefly.",
    "Give only the answer.",
    "Answer with a name or a word only.",
    "Reply with the answer alone, no sentence.",
    "Keep the answer as short as possible.",
)
_NAME, _DATE = (
    ("Give only the name.", "Answer with just the name."),
    ("Answer with just the date.", "Give only the year."),
)
_SHORT_BY_OPENING = {
    "Who": _NAME,
    "With whom": _NAME,
    "Where": ("Answer with just the place.", "Only name the place."),
    "When": _DATE,
    "Since when": _DATE,
    "In what year": ("Give only the year.", "Answer with just the year."),
    "How many": ("Answer with just the number.", "Give only the number."),
    "How much": ("Answer with just the number.", "Give only the amount."),
    "What percentage": ("Answer with just the number.", "Give only the percentage."),
}
_WORDINGS = sorted({*_SHORT, *(wording for own in _SHORT_BY_OPENING.values() for wording in own)})
# what gaps are made of: numbers, and names; a capital that begins a sentence makes none
_SPAN = re.compile(
    r"\d[\d.,:/]*\d%?|\d%?|(?<!^)(?<![.!?=]\s)(?<![\w'’-])[A-Z][\w'’-]*(?:\s+(?:(?:of|the|de)\s+)*[A-Z][\w'’-]*)*"
)
# a request that names the passage cannot be understood without it
_POINTS_BACK = re.compile(r"\b(?:passage|this (?:question|text|sentence)|the (?:question|sentence))\b", re.IGNORECASE)

# kind, request, prompt ids, answer ids, and the teacher's distribution where each answer token stands
Row = tuple[str, str, list[int], list[int], Targets]


@dataclass(frozen=True)
class SelfStudyConfig:
    """What the model is made to write.

    Attributes:
        conversations: one request with its answer each. Fewer come of it where the model writes nothing, or a request
            that cannot be understood without its passage.
        chunk_tokens: tokens of the text that are in context while it writes; each pass over the text cuts it elsewhere.
        kinds: taken in turn, so a kind that stands there twice is drawn twice as often. The default asks more questions
            than the paper, which draws its five kinds alike.
        recall: passages of the text beside them, which are to be continued from their beginnings: the answer is the text
            itself, so nothing needs to be written. Not in the paper; a cheap way to touch every sentence.
        gaps: passages beside them in which a number or a name is missing that is to be filled in, marked in one half of them
            and with a question word in its place in the other; on one chunk none is missing twice before each was once. Not
            in the paper either. A small model that writes questions asks for the same facts again and again, and never for
            others; here all are asked for.
        writer_sees: what is in context while requests are written: the "passage" alone that they shall be about, or the
            whole "chunk", as in the paper. Answers are always written with the chunk in context.
        batch: conversations on one chunk, written together.
        request_tokens, answer_tokens: at most so many of each.
        request_temperature, answer_temperature: of the sampling; 0 takes the likeliest token.
        short_answers: share of the questions that ask for a few words.
        top_k: of the teacher's log-probabilities that are kept for each answer token, beside the token itself.
        held_out: conversations that are kept from training, spread over the text; none of their requests is trained.
        seed: of everything random.
    """

    conversations: int = 512
    chunk_tokens: int = 512
    kinds: tuple[str, ...] = (
        "question",
        "structuring",
        "question",
        "summarisation",
        "question",
        "use_case",
        "creative",
    )
    recall: int = 0
    gaps: int = 0
    writer_sees: str = "passage"
    batch: int = 16
    request_tokens: int = 64
    answer_tokens: int = 96
    request_temperature: float = 0.7
    answer_temperature: float = 0.0
    short_answers: float = 0.5
    top_k: int = 20
    held_out: int = 32
    seed: int = 0

    def __post_init__(self):
        for name, least in (("conversations", 2), ("chunk_tokens", 8), ("batch", 1), ("request_tokens", 1)):
            check_int(name, getattr(self, name), minimum=least)
        for name in ("answer_tokens", "top_k", "held_out"):
            check_int(name, getattr(self, name), minimum=1)
        for name in ("recall", "gaps", "seed"):
            check_int(name, getattr(self, name), minimum=0)
        if self.held_out >= self.conversations:
            raise ValueError(
                f"held_out must be less than the {self.conversations} conversations, got {self.held_out}: nothing would be trained"
            )
        check_choice("writer_sees", self.writer_sees, ("passage", "chunk"))
        object.__setattr__(self, "kinds", tuple(self.kinds))
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"kinds must be some of {', '.join(map(repr, KINDS))}, got {self.kinds!r}")
        for name, most in (("request_temperature", 10.0), ("answer_temperature", 10.0), ("short_answers", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not 0 <= value <= most:
                raise ValueError(f"{name} must be in [0, {most}], got {value}")

    @property
    def parts(self) -> tuple[tuple[str | None, int], ...]:
        """Kind and number of what a file may hold, in order; None: what is written."""
        return (None, self.conversations), (RECALL, self.recall), (GAP, self.gaps)

    @property
    def units(self) -> int:
        """Files: a chunk each, on which up to ``batch`` conversations of one part are made."""
        return sum(-(-count // self.batch) for _, count in self.parts)


@dataclass(frozen=True)
class Conversation:
    """A request, its answer, and what the teacher held likely where each answer token stands.

    Attributes:
        prompt: int64 ``[q]``: what follows the compacted tokens, the opening of the answer included.
        answer: int64 ``[a]``, the end token included if the answer came to its end.
        targets: the teacher's distribution at each token of the answer.
        kind: of the request, or "recall".
    """

    prompt: Tensor
    answer: Tensor
    targets: Targets
    kind: str

    @property
    def tokens(self) -> Tensor:
        """int64 ``[q + a - 1]``: what is read to predict the answer; its last ``a`` places predict one token each."""
        return torch.cat([self.prompt, self.answer[:-1]])


class Conversations(Sequence):
    """Prepared conversations of one text. Only their lengths are in memory: each is read from its file when asked for.

    Attributes:
        lengths: tokens of request and answer together, by conversation.
        train, held_out: indices.
        digest: of what they were made from.
    """

    def __init__(self, folder: Path, digest: str, units: int, held_out: int):
        self.folder, self.digest = folder, digest
        self._places: list[tuple[int, int, int, int, int]] = []
        self._kinds: list[str] = []
        requests: list[bytes] = []
        for unit in range(units):
            header = _unit_header(folder, unit)
            prompt_start = answer_start = 0
            for kind, prompt, answer, text in zip(*(header[n] for n in ("kinds", "prompts", "answers", "requests"))):
                self._places.append((unit, prompt_start, prompt, answer_start, answer))
                self._kinds.append(kind)
                asked = " ".join(_without_wording(text).lower().split())
                requests.append(hashlib.sha256(asked.encode()).digest()[:8])
                prompt_start, answer_start = prompt_start + prompt, answer_start + answer
        self.lengths = [prompt + answer for _, _, prompt, _, answer in self._places]
        count = len(self._places)
        held = min(held_out, max(1, count // 2))
        self.held_out = sorted({(2 * i + 1) * count // (2 * held) for i in range(held)}) if count > 1 else []
        taken = {requests[i] for i in self.held_out}
        self.train = [i for i in range(count) if requests[i] not in taken]
        if not self.train:
            raise ValueError(
                f"the model wrote {count} conversations, {len(set(requests))} of them different, about this text: too few to "
                "keep some from training; ask for more, or raise request_temperature"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Conversation:
        unit, prompt_start, prompt, answer_start, answer = self._places[index]
        path = _unit_path(self.folder, unit)
        try:
            with safe_open(path, framework="pt") as file:
                prompts, answers = (
                    slice(prompt_start, prompt_start + prompt),
                    slice(answer_start, answer_start + answer),
                )
                part = {name: file.get_slice(name) for name in ("prompt", "answer", "top_ids", "top_logs")}
                return Conversation(
                    part["prompt"][prompts].long(),
                    part["answer"][answers].long(),
                    Targets(part["top_ids"][answers].long(), part["top_logs"][answers]),
                    self._kinds[index],
                )
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or gone: {error}; prepare the conversations again") from error


def prepare_conversations(
    model: Any,
    tokenizer: Any,
    document: str,
    config: SelfStudyConfig,
    folder: str | Path,
    *,
    progress: bool = False,
    description: str = "self-study",
) -> Conversations:
    """Has the model write what is not there yet, and opens the conversations.

    Args:
        model: patched, with its tokenizer.
        document: the text.
        folder: conversations of one text, model and set of options take a folder of their own in it.

    Raises:
        ValueError: an empty text, a chunk that the model has too few positions for, a damaged file, or a model that
            writes nothing.
        OSError: the folder cannot be written to; what was written before is kept.
    """
    from tqdm import tqdm

    from ..patch import model_spec

    form = prompt_format(tokenizer)
    spec = model_spec(model)
    pieces = split_text(document)
    if not pieces:
        raise ValueError("the document holds no text")
    identity = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": spec.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "document": hashlib.sha256(document.encode()).hexdigest(),
        "prompt": form.to_json(),
        "config": json.loads(json.dumps(asdict(config))),
        "seeds": hashlib.sha256(
            json.dumps([KINDS, _SEED, _SHORT, _SHORT_BY_OPENING, _RECALL, _GAP]).encode()
        ).hexdigest()[:16],
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    own = Path(folder) / f"conversations-{digest}"
    own.mkdir(parents=True, exist_ok=True)
    if not (own / NOTE).is_file():
        write_atomically(own / NOTE, (json.dumps(identity, indent=1, ensure_ascii=False) + "\n").encode())
    missing = [unit for unit in range(config.units) if not _unit_path(own, unit).is_file()]
    if missing:
        writer = _Writer(model, tokenizer, form, config, pieces)
        bar = tqdm(
            total=config.units,
            initial=config.units - len(missing),
            desc=description,
            unit="chunk",
            disable=not progress,
        )
        try:
            for unit in missing:
                _save_unit(own, unit, writer.write(unit))
                bar.update()
        finally:
            bar.close()
    return Conversations(own, digest, config.units, config.held_out)


def split_text(text: str) -> list[str]:
    """Sentences and lines, with what stands between them; long ones are cut. Joined they are the text, stripped."""
    pieces = []
    for piece in re.findall(r"[^\n.!?]*(?:[.!?](?!\s)[^\n.!?]*)*(?:[.!?]+\s+|\n\s*|[.!?]*$)", text.strip()):
        words = re.findall(r"\S{1,200}\s*", piece)
        if not words:
            continue
        pieces += ["".join(words[i : i + 60]) for i in range(0, len(words), 60)]
    return pieces


def chunk_spans(lengths: Sequence[int], size: int, count: int) -> list[tuple[int, int]]:
    """``count`` spans of pieces, of about ``size`` tokens each, that cover the text again and again.

    Args:
        lengths: tokens of each piece.

    Each pass cuts the text elsewhere (by multiples of the golden section). A pass that is not complete takes spans from
    all over the text.
    """
    spans: list[tuple[int, int]] = []
    passes = 0
    while len(spans) < count:
        share = passes * 0.6180339887 % 1.0  # of the first chunk that is left out
        found, first, used = [], 0, int(size * min(share, 2 / 3))
        for i, length in enumerate(lengths):
            if i > first and used + length > size:
                found.append((first, i))
                first, used = i, 0
            used += length
        if found and used < size / 3:  # the rest is no chunk of its own
            first, _ = found.pop()
        found.append((first, len(lengths)))
        open_spans = count - len(spans)
        if open_spans < len(found):
            found = [found[(2 * i + 1) * len(found) // (2 * open_spans)] for i in range(open_spans)]
        spans += found
        passes += 1
    return spans


def draw_starts(draw: random.Random, first: int, last: int, count: int) -> list[int]:
    """``count`` pieces of a span that passages begin at: none twice before each was there once."""
    starts: list[int] = []
    while len(starts) < count:
        starts += draw.sample(range(first, last), min(count - len(starts), last - first))
    return starts


class _Writer:
    """Writes the conversations of one unit."""

    def __init__(self, model: Any, tokenizer: Any, form: PromptFormat, config: SelfStudyConfig, pieces: list[str]):
        self.model, self.tokenizer, self.form, self.config, self.pieces = model, tokenizer, form, config, pieces
        lengths = [len(self._encode(piece)) for piece in pieces]
        size = config.batch
        self.units = [
            (kind, number, min(size, count - number), span)
            for kind, count in config.parts
            for number, span in zip(range(0, count, size), chunk_spans(lengths, config.chunk_tokens, -(-count // size)))
        ]
        self.stops = stop_ids(model)
        limit = getattr(model.config, "max_position_embeddings", None)
        longest = max(sum(lengths[a:b]) for *_, (a, b) in self.units) + max(lengths) + 128
        longest += config.request_tokens + config.answer_tokens
        if limit is not None and longest > limit:
            raise ValueError(
                f"chunk_tokens {config.chunk_tokens} is too much for this model: with request and answer it takes up to "
                f"{longest} positions, the model has {limit}"
            )

    def write(self, unit: int) -> list[Row]:
        """Rows of the file."""
        config, device = self.config, self.model.device
        kind, number, count, (first, last) = self.units[unit]
        draw = random.Random(stable_number(config.seed, unit, "self-study"))
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(stable_number(config.seed, unit, "sampling"))
            cache = self._read("".join(self.pieces[first:last]).strip())
            if kind is None:
                starts = draw_starts(draw, first, last, count)
                seeds = [self._seed(draw, start, last, number + i) for i, start in enumerate(starts)]
                return self._converse(cache, seeds, draw)
            make = self._recall if kind == RECALL else self._gaps
            rows = [
                (kind, request, question_ids(self.tokenizer, self.form, request), self._answer(answer))
                for request, answer in make(draw, first, last, count)
            ]
            return [(*row, targets) for row, targets in zip(rows, self._teach([row[2:] for row in rows], cache))]

    def _converse(
        self, cache: CompactCache | None, seeds: list[tuple[str, str, str]], draw: random.Random
    ) -> list[Row]:
        """What the model writes and answers itself."""
        config = self.config
        rows = self._requests(cache if config.writer_sees == "chunk" else self._read(""), seeds, draw)
        if not rows:
            return []
        answers = generate(
            self.model,
            [row[2] for row in rows],
            config.answer_tokens,
            past=cache,
            temperature=config.answer_temperature,
            top_k=config.top_k,
        )
        return [
            (*row, answer.ids, answer.targets) for row, answer in zip(rows, answers) if set(answer.ids) - self.stops
        ]

    def _recall(self, draw: random.Random, first: int, last: int, count: int) -> list[tuple[str, str]]:
        """Passages that are to be continued, and how they go on."""
        rows = []
        for start in sorted(draw_starts(draw, first, last, count)):
            words = self._passage(start, last).split()
            if len(words) >= 6:
                cut = draw.randint(len(words) // 3, 2 * len(words) // 3)
                rows.append((_RECALL.format(" ".join(words[:cut])), " ".join(words[cut:])))
        return rows

    def _gaps(self, draw: random.Random, first: int, last: int, count: int) -> list[tuple[str, str]]:
        """Passages with a gap, and what belongs there; half of them are shown whole, and half have a question word there."""
        found = []
        for start in range(first, last):
            passage, own = self._passage(start, last), len(" ".join(self.pieces[start].split()))
            spans = (span for span in _SPAN.finditer(passage) if span.end() <= own)
            found += [(passage, span) for span in spans if passage.count(span.group()) == 1]
        rows = []
        for i in draw_starts(draw, 0, len(found), count) if found else []:
            passage, span = found[i]
            before, after = passage[: span.start()], passage[span.end() :]
            if draw.random() < 0.5:
                before = "".join(re.findall(r"\S*\s*", before)[-1 - _AROUND :])
                after = "".join(re.findall(r"\S*\s*", after)[: 1 + _AROUND]).rstrip()
            marked = draw.random() < 0.5
            asked = _GAP.format(before + _MARK + after) if marked else _ask_in_place(draw, before, span.group(), after)
            rows.append((asked, span.group()))
        return rows

    def _answer(self, text: str) -> list[int]:
        """An answer's tokens, with the end token if it is not too long."""
        ids, end = self._encode(text)[: self.config.answer_tokens], self.tokenizer.eos_token_id
        return ids + ([end] if end in self.stops and len(ids) < self.config.answer_tokens else [])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _read(self, text: str) -> CompactCache | None:
        """The full cache of the prompt's opening and a text; None when there is nothing to read."""
        ids = document_ids(self.tokenizer, self.form, text)
        if not ids:
            return None
        return self.model.compact(torch.tensor([ids], device=self.model.device), method="full", ratio=1)

    def _seed(self, draw: random.Random, start: int, last: int, number: int) -> tuple[str, str, str]:
        """Kind, seed prompt, and the words that the request begins with."""
        kind = self.config.kinds[number % len(self.config.kinds)]
        passage = self._passage(start, last)
        task, openings = KINDS[kind]
        return kind, _SEED.format(passage=passage, task=task), draw.choice(openings)

    def _passage(self, start: int, last: int) -> str:
        """A piece of the text on one line, with what follows it if it is short."""
        passage = " ".join(self.pieces[start].split())
        while len(passage) < 60 and start + 1 < last:
            start += 1
            passage = f"{passage} {' '.join(self.pieces[start].split())}"
        return passage

    def _requests(
        self, cache: CompactCache | None, seeds: list[tuple[str, str, str]], draw: random.Random
    ) -> list[tuple[str, str, list[int]]]:
        """Kind, request and prompt ids of what the model writes for each seed."""
        gap = "" if self.form.after[-1:].isspace() else " "
        prompts = [
            question_ids(self.tokenizer, self.form, seed) + self._encode(gap + opening) for _, seed, opening in seeds
        ]
        written = generate(
            self.model, prompts, self.config.request_tokens, past=cache, temperature=self.config.request_temperature
        )
        rows = []
        for (kind, _, opening), one in zip(seeds, written):
            text = tidy_request(opening + self.tokenizer.decode(one.ids, skip_special_tokens=True), kind)
            short = kind == "question" and draw.random() < self.config.short_answers
            if text and not _POINTS_BACK.search(text):
                text += f" {_short_wording(draw, opening)}" if short else ""
                rows.append((kind, text, question_ids(self.tokenizer, self.form, text)))
        return rows

    def _teach(self, rows: list[tuple[list[int], list[int]]], cache: CompactCache | None) -> list[Targets]:
        """The teacher's distribution at the answers of prompts and answers."""
        if not rows:
            return []
        ids, places = (x.to(self.model.device) for x in pad_answers(rows))
        hidden = hidden_states(self.model, ids, cache, places)
        all_targets = teacher_targets(self.model, hidden, ids[places], self.config.top_k)
        counts = [len(answer) for _, answer in rows]
        return [Targets(*pair) for pair in zip(all_targets.ids.split(counts), all_targets.logs.split(counts))]


def _short_wording(draw: random.Random, opening: str) -> str:
    """How a question that begins with ``opening`` asks for few words: as any question may, or as its kind does."""
    own = _SHORT_BY_OPENING.get(opening)
    return draw.choice(own if own and draw.random() < 0.5 else _SHORT)


def _ask_in_place(draw: random.Random, before: str, span: str, after: str) -> str:
    """A passage as a question for one of its words: "The river is how many miles long? Give only the number."

    Closer to what a reader asks than a gap is, and asks for what a small model's own questions leave out.
    """
    if re.fullmatch(r"1\d{3}|20\d\d", span):
        opening, word = "In what year", "what year"
    elif "%" in span:
        opening, word = "What percentage", "what percentage"
    elif span[0].isdigit():
        opening, word = "How many", "how many" if after[:1].isspace() else "what"
    else:
        opening, word = "", "what"
    text = f"{before}{word}{after}".strip().rstrip(".,;:!?")
    return f"{text[:1].upper()}{text[1:]}? {_short_wording(draw, opening)}"


def _without_wording(request: str) -> str:
    """A request, without what it says of a short answer."""
    return next((request.removesuffix(f" {w}") for w in _WORDINGS if request.endswith(f" {w}")), request)


def tidy_request(text: str, kind: str) -> str:
    """What the model wrote, on one line and without quotation marks; a question ends with its question mark."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    text = lines[0] if kind == "question" else " ".join(lines)
    text = text.strip().strip("\"'“”*").strip()
    if kind == "question" and "?" in text:
        text = text[: text.index("?") + 1]
    return text


def _unit_path(folder: Path, unit: int) -> Path:
    return folder / f"unit-{unit:05d}.safetensors"


def _save_unit(folder: Path, unit: int, rows: list[Row]) -> None:
    kinds, requests, prompts, answers, targets = zip(*rows) if rows else ((),) * 5
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "kinds": kinds,
        "requests": requests,
        "prompts": [len(p) for p in prompts],
        "answers": [len(a) for a in answers],
    }
    tensors = {
        "prompt": torch.tensor([t for p in prompts for t in p], dtype=torch.int32),
        "answer": torch.tensor([t for a in answers for t in a], dtype=torch.int32),
        "top_ids": torch.cat([t.ids for t in targets]).int().cpu() if rows else torch.zeros(0, 1, dtype=torch.int32),
        "top_logs": torch.cat([t.logs for t in targets]).float().cpu() if rows else torch.zeros(0, 1),
    }
    save_safetensors(_unit_path(folder, unit), tensors, {FORMAT: json.dumps(header)})


def _unit_header(folder: Path, unit: int) -> dict[str, Any]:
    path = _unit_path(folder, unit)
    try:
        header, tensors = load_safetensors(path, FORMAT, FORMAT_VERSION)
        if sum(header["prompts"]) != tensors["prompt"].numel() or sum(header["answers"]) != len(tensors["top_logs"]):
            raise ValueError(f"{path} is damaged: its lengths do not fit its tensors")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return header
