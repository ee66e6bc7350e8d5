# SPDX-License-Identifier: Apache-2.0
"""From texts to contexts and what is asked of them.

A *context* is a window of the texts, perhaps with facts planted in it. Its *tails* are what may follow it, each by itself:
a question with its answer, the text's own continuation, or a passage of the context once more. Some tokens of a tail are
*scored*: those the loss looks at.
"""

import hashlib
import json
import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache import load_safetensors, save_safetensors
from ..prompt import PromptFormat, document_ids, prompt_format, question_ids
from .facts import make_facts

KINDS = ("facts", "questions", "recall", "continuation")
FORMAT, FORMAT_VERSION = "kvcompact-training-data", 1
_PLACES = (" {} ", "\n\n{}\n\n")  # within a paragraph, or one of its own
_INSTRUCTIONS = ("", "", " Answer briefly.", " Answer with a few words only.", " Give the answer only.")


@dataclass(frozen=True)
class Item:
    """A question that the model wrote about a passage of the stream, and its own answer.

    Attributes:
        start, end: of the passage, in the stream.
        question: the text.
        answer: token ids, the end of the turn included.
    """

    start: int
    end: int
    question: str
    answer: tuple[int, ...]


@dataclass
class Stream:
    """Texts one after the other, as token ids.

    Attributes:
        ids: int32 ``[N]``.
        names, starts: of the documents, in order.
        items: questions about it, by place.
    """

    ids: Tensor
    names: list[str]
    starts: list[int]
    items: list[Item] = field(default_factory=list)

    def where(self, place: int) -> str:
        """Names a place for a message."""
        document = max(0, bisect_right(self.starts, place) - 1)
        return f"{self.names[document]} at token {place - self.starts[document]}"


@dataclass(frozen=True)
class Tail:
    """What may follow a context.

    Attributes:
        ids: token ids.
        scored: for each of them, whether the loss looks at it; never the first.
        kind: one of ``KINDS``.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    kind: str


@dataclass(frozen=True)
class Example:
    """A context of exactly the wanted number of tokens, its tails, and a name for messages."""

    context: tuple[int, ...]
    tails: tuple[Tail, ...]
    name: str


def read_texts(data: Any) -> list[tuple[str, Any]]:
    """Names and texts (or token ids) of what a caller gave as data.

    Args:
        data: a folder (its .txt and .md files, also in folders inside, by name), a file, or a sequence of texts or of 1-D
            tensors of token ids.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: an empty folder or text, or a file that is not UTF-8.
        TypeError: anything else.
    """
    if isinstance(data, (str, Path)):
        path = Path(data).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
            if not found:
                raise ValueError(f"data: the folder {path} holds no .txt or .md file")
            return [(str(p.relative_to(path)), _read(p)) for p in found]
        if not path.is_file():
            raise FileNotFoundError(f"data: there is no file or folder {path}")
        return [(path.name, _read(path))]
    if not isinstance(data, Sequence):
        raise TypeError(f"data must be a path, or a sequence of texts or tensors, got {type(data).__name__}")
    if not data:
        raise ValueError("data must hold at least one text, got none")
    for i, text in enumerate(data):
        if isinstance(text, Tensor):
            if text.ndim != 1 or text.is_floating_point() or text.dtype == torch.bool:
                raise TypeError(f"data[{i}] must be a 1-D tensor of token ids, got {list(text.shape)} of {text.dtype}")
        elif not isinstance(text, str):
            raise TypeError(f"data[{i}] must be a str or a tensor of token ids, got {type(text).__name__}")
        elif not text.strip():
            raise ValueError(f"data[{i}] is empty")
    return [(f"text {i}", text) for i, text in enumerate(data)]


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise ValueError(f"data: {path} is empty")
    return text


def digest_of(texts: Sequence[tuple[str, Any]]) -> str:
    """Identity of texts and their order; their names do not count."""
    digest = hashlib.sha256()
    for _, text in texts:
        data = text.encode() if isinstance(text, str) else text.to("cpu", torch.int64).contiguous().numpy().tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


class Corpus:
    """The texts of a run in two parts, one to train on and one held out, with the tokenizer's way of asking.

    Args:
        texts: from :func:`read_texts`.
        tokenizer: None when all texts are token ids; then nothing can be asked, only continued and recalled.
        vocabulary: size of the model's.
        held_out: share of each document, its end, that is never trained on.
        folder: where prepared tokens are kept, so that they are made once; None keeps nothing.

    Raises:
        ValueError: texts without a tokenizer, or ids beyond the vocabulary.
    """

    def __init__(
        self,
        texts: Sequence[tuple[str, Any]],
        tokenizer: Any,
        vocabulary: int,
        held_out: float,
        folder: Path | None = None,
        progress: bool = False,
    ):
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must be at least 0 and below 1, got {held_out}")
        if tokenizer is None and any(isinstance(text, str) for _, text in texts):
            raise ValueError("tokenizer must be given, for the data are texts and not token ids")
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.digest, self.documents = digest_of(texts), len(texts)
        self.form = None if tokenizer is None else prompt_format(tokenizer)
        self.can_chat = self.form is not None and self.form.chat
        self.plain = PromptFormat("", "", "", False)
        self.key = hashlib.sha256(
            json.dumps([self.digest, held_out, self._tokenizer_digest(), vocabulary]).encode()
        ).hexdigest()[:16]
        self.train, self.held = self._streams(texts, held_out, folder, progress)
        self._ends: Tensor | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def opening(self, chat: bool) -> list[int]:
        """Tokens that a context starts with."""
        if self.tokenizer is None:
            return []
        return document_ids(self.tokenizer, self.form if chat else self.plain, "")

    def _tokenizer_digest(self) -> str:
        if self.tokenizer is None:
            return "none"
        probe = "The quick brown fox, 12345 — naïve.\n\n\tx = f(y); # ok"
        seen = [len(self.tokenizer), self.encode(probe), self.opening(True), self.opening(False)]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]

    def _streams(self, texts, held_out, folder, progress) -> tuple[Stream, Stream]:
        path = None if folder is None else folder / f"tokens-{self.key}.safetensors"
        if path is not None and path.is_file():
            header, tensors = load_safetensors(path, FORMAT, FORMAT_VERSION)
            return tuple(
                Stream(tensors[part], header[part]["names"], header[part]["starts"]) for part in ("train", "held")
            )
        from tqdm import tqdm

        parts: dict[str, list] = {"train": [], "held": []}
        for name, text in tqdm(texts, desc="encoding the texts", unit="text", disable=not progress):
            ids = torch.tensor(self.encode(text)) if isinstance(text, str) else text.to("cpu", torch.int64)
            if ids.numel() == 0:
                continue
            if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
                raise ValueError(
                    f"data: {name} holds token ids from {int(ids.min())} to {int(ids.max())}, the model has "
                    f"{self.vocabulary}: is this the model's own tokenizer?"
                )
            cut = ids.numel() - round(held_out * ids.numel())
            parts["train"].append((name, ids[:cut].to(torch.int32)))
            if cut < ids.numel():
                parts["held"].append((name, ids[cut:].to(torch.int32)))
        between = torch.tensor(self.encode("\n\n") if self.tokenizer is not None else [], dtype=torch.int32)
        train, held = (_join(parts[part], between) for part in ("train", "held"))
        if path is not None:
            streams = (("train", train), ("held", held))
            header = {name: {"names": s.names, "starts": s.starts} for name, s in streams}
            note = {"format": FORMAT, "version": FORMAT_VERSION, **header}
            save_safetensors(path, {name: s.ids for name, s in streams}, {FORMAT: json.dumps(note)})
        return train, held

    def check_length(self, needed: int) -> None:
        """Raises ValueError when no window of ``needed`` tokens fits into both parts."""
        for what, stream in (("to train on", self.train), ("held out", self.held)):
            if stream is self.held and stream.ids.numel() == 0:
                continue
            if stream.ids.numel() < needed:
                raise ValueError(
                    f"data: the texts have {self.train.ids.numel() + self.held.ids.numel()} tokens, {stream.ids.numel()} "
                    f"of them {what}, but a context and what follows it take {needed}: give more text, shorter contexts, "
                    "or another share to hold out"
                )

    def sentence_ends(self) -> Tensor:
        """bool ``[vocabulary]``: tokens that end a sentence or a line."""
        if self._ends is None:
            ends = torch.zeros(self.vocabulary, dtype=torch.bool)
            if self.tokenizer is not None:
                there = torch.cat([self.train.ids, self.held.ids]).unique().tolist()
                for number, text in zip(there, self.tokenizer.batch_decode([[i] for i in there])):
                    ends[number] = bool(re.search(r"[.!?]['\")\]]?$|\n$", text))
            self._ends = ends
        return self._ends


def _join(parts: list[tuple[str, Tensor]], between: Tensor) -> Stream:
    names, starts, pieces, place = [], [], [], 0
    for name, ids in parts:
        if pieces and between.numel():
            pieces.append(between)
            place += between.numel()
        names.append(name)
        starts.append(place)
        pieces.append(ids)
        place += ids.numel()
    ids = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
    return Stream(ids, names, starts)


@dataclass(frozen=True)
class Recipe:
    """What examples are made of.

    Attributes:
        mix: weight of each kind in ``KINDS``.
        tails: per context.
        continuation: tokens of a continuation; all but the first are scored.
        recall: tokens of a passage that is to be recalled.
        cue: tokens of it that are given.
        distractors: planted facts that nobody asks for, at most; the number is drawn.
        chat: share of the contexts without self-written questions that stand in the chat template.
        lead: share of the questions on facts whose answer is opened with the wording of the question.
    """

    mix: dict[str, float]
    tails: int = 8
    continuation: int = 64
    recall: int = 48
    cue: int = 8
    distractors: int = 4
    chat: float = 0.5
    lead: float = 0.5


def make_example(
    corpus: Corpus, stream: Stream, recipe: Recipe, length: int, draw: random.Random, kinds: Sequence[str] | None = None
) -> Example:
    """One context of exactly ``length`` tokens and its tails.

    Args:
        kinds: of the tails; None draws them by ``recipe.mix``. Where a context has no room for facts, or holds no passage
            that was asked about, "recall" takes their place.

    Raises:
        ValueError: the length leaves no room behind the prompt's opening.
    """
    if kinds is None:
        names = [kind for kind in KINDS if recipe.mix.get(kind, 0) > 0]
        kinds = draw.choices(names, [recipe.mix[name] for name in names], k=recipe.tails)
    kinds = list(kinds)
    chosen = draw.choice(stream.items) if "questions" in kinds and stream.items else None
    if chosen is None:  # nothing was written about this part
        kinds = ["facts" if kind == "questions" else kind for kind in kinds]
    chat = corpus.can_chat and (chosen is not None or draw.random() < recipe.chat)
    opening = corpus.opening(chat)
    wanted = kinds.count("facts")
    facts = make_facts(draw, wanted + draw.randint(0, recipe.distractors)) if wanted else []
    planted = [corpus.encode(draw.choice(_PLACES).format(fact.statement)) for fact in facts]
    room = length - len(opening) - sum(map(len, planted))
    while planted and room < length // 2:  # a short context stays a text with facts in it
        room += len(planted.pop())
        facts.pop()
    if room < 8:
        raise ValueError(f"a context of {length} tokens has no room behind the {len(opening)} of the prompt's opening")
    behind = recipe.continuation if "continuation" in kinds else 0
    start = _window(stream, room, behind, chosen, draw)
    text = stream.ids[start : start + room].tolist()
    context = opening + _plant(text, planted, corpus, draw)
    inside = [item for item in stream.items if start <= item.start and item.end <= start + room]
    draw.shuffle(inside)
    tails = []
    for kind in kinds:
        asked = len([tail for tail in tails if tail.kind == kind])
        if kind == "facts" and asked < len(facts):
            tails.append(_ask_fact(corpus, recipe, facts[asked], chat, draw))
        elif kind == "questions" and inside:
            item = inside[asked % len(inside)]  # when all on this window have been asked, they start again
            tails.append(_ask(corpus, corpus.form, item.question, list(item.answer), "questions"))
        elif kind != "continuation":  # also where a short context has no room for a fact or a question's passage
            tails.append(_recall(context[len(opening) :], recipe, draw))
        else:
            ids = stream.ids[start + room : start + room + recipe.continuation].tolist()
            tails.append(Tail(tuple(ids), (False,) + (True,) * (len(ids) - 1), kind))
    return Example(tuple(context), tuple(tails), stream.where(start))


def _window(stream: Stream, room: int, behind: int, item: Item | None, draw: random.Random) -> int:
    """Where a window of ``room`` tokens starts that leaves ``behind`` more, and holds the item if it can."""
    last = stream.ids.numel() - room - behind
    if last < 0:
        raise ValueError(f"a window of {room + behind} tokens does not fit into {stream.ids.numel()}")
    if item is not None:
        low, high = max(0, item.end - room), min(last, item.start)
        if low <= high:
            return draw.randint(low, high)
    return draw.randint(0, last)


def _plant(text: list[int], planted: list[list[int]], corpus: Corpus, draw: random.Random) -> list[int]:
    """The text with the statements behind ends of sentences, evenly drawn places in any order."""
    if not planted:
        return text
    ends = corpus.sentence_ends()[torch.tensor(text)].nonzero().flatten().tolist()
    places = []
    for _ in planted:
        place = draw.randint(0, len(text))
        near = bisect_right(ends, place - 1)
        if near < len(ends) and ends[near] + 1 - place < 64:
            place = ends[near] + 1
        places.append(place)
    out, last = [], 0
    for place, statement in sorted(zip(places, planted), key=lambda pair: pair[0]):
        out += text[last:place] + statement
        last = place
    return out + text[last:]


def _ask(
    corpus: Corpus, form: PromptFormat, question: str, answer: list[int], kind: str, lead: Sequence[int] = ()
) -> Tail:
    asked = question_ids(corpus.tokenizer, form, question) + list(lead)
    return Tail(tuple(asked + answer), (False,) * len(asked) + (True,) * len(answer), kind)


def _ask_fact(corpus: Corpus, recipe: Recipe, fact: Any, chat: bool, draw: random.Random) -> Tail:
    answer = corpus.encode(f" {fact.value}.")
    if not chat:
        lead = corpus.encode(draw.choice(("\n\n", "\n", " ")) + fact.lead)
        return Tail(tuple(lead + answer), (False,) * len(lead) + (True,) * len(answer), "facts")
    question = fact.question + draw.choice(_INSTRUCTIONS)
    if draw.random() < recipe.lead:
        return _ask(corpus, corpus.form, question, answer, "facts", corpus.encode(fact.lead))
    return _ask(corpus, corpus.form, question, corpus.encode(f"{fact.value}"), "facts")


def _recall(text: list[int], recipe: Recipe, draw: random.Random) -> Tail:
    size = min(recipe.recall, len(text))
    cue = min(recipe.cue, size - 1)
    place = draw.randint(0, len(text) - size)
    return Tail(tuple(text[place : place + size]), (False,) * cue + (True,) * (size - cue), "recall")


def collate(tails: Sequence[Tail], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Tails of unequal length as one batch, padded on the right (causal attention never looks there).

    Returns:
        ``(ids [R, n] int64, scored [R, n] bool, tail [N] int64)``: the tail that each scored token belongs to, in the order
        in which ``ids[scored]`` takes them.
    """
    longest = max(len(tail.ids) for tail in tails)
    ids = torch.zeros(len(tails), longest, dtype=torch.int64)
    scored = torch.zeros(len(tails), longest, dtype=torch.bool)
    for row, tail in enumerate(tails):
        ids[row, : len(tail.ids)] = torch.tensor(tail.ids)
        scored[row, : len(tail.ids)] = torch.tensor(tail.scored)
    return ids.to(device), scored.to(device), scored.nonzero()[:, 0].to(device)


def tail_means(values: Tensor, tail: Tensor, count: int) -> Tensor:
    """Mean of ``values [N]`` over the scored tokens of each of ``count`` tails."""
    # a product and not index_add, whose sums on a GPU differ from run to run
    member = (tail[None] == torch.arange(count, device=tail.device)[:, None]).to(values.dtype)
    return member @ values / member.sum(1).clamp(min=1)
