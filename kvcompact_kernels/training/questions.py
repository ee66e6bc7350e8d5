# SPDX-License-Identifier: Apache-2.0
"""Questions that the model writes about its texts, and answers itself.

A compactor is trained on answers of the model that it compacts (STILL, arXiv 2606.07878). What was written is kept in a
file line by line, so an interrupted preparation goes on where it stopped.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._checks import check_int
from ..evaluation.metrics import stop_ids
from ..prompt import document_ids, question_ids
from .data import Corpus, Item, Stream
from .generation import generate

WRITE = "Write one short question that this text answers."
# Put into the model's mouth: small models left to themselves ask "What is the answer to this question?".
OPENINGS = ("What", "Who", "When", "Where", "How many", "Which", "Why", "How")
BRIEF = ("", " Answer briefly.", " Answer in a few words.")
MAX_QUESTION, MAX_ANSWER = 32, 40


def add_questions(
    model: Any,
    corpus: Corpus,
    count: int,
    fingerprint: dict[str, Any],
    folder: Path | None = None,
    *,
    passage: int = 128,
    batch: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> str:
    """Has the model write questions about both parts of a corpus; the held-out part gets a tenth as many.

    Args:
        model: reads and writes; in eval mode.
        count: passages of the part to train on that are tried; not every passage gives a usable question.
        fingerprint: of the model: questions of another one are not used.
        folder: where they are kept; None keeps nothing.
        passage: tokens that a question is about.
        batch: passages at a time.
        seed: of the choice of passages.

    Returns:
        Digest of the questions and answers.
    """
    check_int("questions", count, minimum=0)
    check_int("passage", passage, minimum=8)
    check_int("batch", batch, minimum=1)
    key = json.dumps(
        [corpus.key, fingerprint, passage, seed, WRITE, OPENINGS, BRIEF, MAX_QUESTION, MAX_ANSWER], sort_keys=True
    )
    path = None if folder is None else folder / f"questions-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
    rows = _read(path)
    wanted = [(part, i) for part, n in (("train", count), ("held", -(-count // 10))) for i in range(n)]
    streams = {"train": corpus.train, "held": corpus.held}
    wanted = [(part, i) for part, i in wanted if streams[part].ids.numel() >= 2 * passage]
    missing = [entry for entry in wanted if entry not in rows]
    from tqdm import tqdm

    file = None if path is None else open(path, "a", encoding="utf-8")  # noqa: SIM115  (open while rows come in)
    try:
        with tqdm(total=len(missing), desc="questions", unit="passage", disable=not progress) as bar:
            for first in range(0, len(missing), batch):
                entries = missing[first : first + batch]
                places = [_place(corpus, streams[part], passage, f"{seed}:{part}:{i}") for part, i in entries]
                passages = [streams[part].ids[a:b].tolist() for (part, _), (a, b) in zip(entries, places)]
                draws = [random.Random(f"{seed}:{part}:{i}:question") for part, i in entries]
                found = _write(model, corpus, passages, draws)
                for (part, i), (start, end), pair in zip(entries, places, found):
                    question, answer = pair if pair else (None, None)
                    row = {"part": part, "index": i, "start": start, "end": end, "question": question, "answer": answer}
                    rows[part, i] = row
                    if file is not None:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if file is not None:
                    file.flush()
                bar.update(len(entries))
    finally:
        if file is not None:
            file.close()
    digest = hashlib.sha256()
    for part, i in wanted:
        row = rows[part, i]
        digest.update(json.dumps(row, sort_keys=True).encode())
        if row["question"] is not None:
            streams[part].items.append(Item(row["start"], row["end"], row["question"], tuple(row["answer"])))
    return digest.hexdigest()[:32]


def _read(path: Path | None) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of earlier calls; a line that a crash cut off is removed."""
    if path is None or not path.is_file():
        return {}
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if len(complete) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(complete))
    rows = {}
    for number, line in enumerate(complete.decode().splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["part"], row["index"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}): remove that line, or the file") from error
    return rows


def _place(corpus: Corpus, stream: Stream, passage: int, name: str) -> tuple[int, int]:
    """A passage that begins behind a sentence's end, if one is near."""
    start = random.Random(name).randint(0, stream.ids.numel() - 2 * passage)
    ends = corpus.sentence_ends()[stream.ids[start : start + passage].long()].nonzero().flatten()
    if ends.numel():
        start += int(ends[0]) + 1
    return start, start + passage


def _write(
    model: Any, corpus: Corpus, passages: Sequence[Sequence[int]], draws: Sequence[random.Random]
) -> list[tuple[str, list[int]] | None]:
    """Question and answer ids for each passage, or None where nothing usable came."""
    tokenizer, form = corpus.tokenizer, corpus.form
    texts = [tokenizer.decode(passage) for passage in passages]
    sentences = [telling_sentence(text) for text in texts]
    openings = [draw.choice(OPENINGS) for draw in draws]
    asked = []
    for sentence, opening in zip(sentences, openings):
        if form.chat:
            start = document_ids(tokenizer, form, f'Text: "{sentence}"') + question_ids(tokenizer, form, WRITE)
            asked.append(start + corpus.encode(opening))
        else:
            asked.append(document_ids(tokenizer, form, sentence) + corpus.encode(form.between + opening))
    questions = []
    for sentence, opening, written in zip(sentences, openings, generate(model, asked, MAX_QUESTION)):
        line = _first_line(opening + tokenizer.decode(written.ids, skip_special_tokens=True))
        question = line[: line.index("?") + 1] if "?" in line else ""
        about = _words(question) & _words(sentence) - _words(WRITE)
        questions.append(question if about and len(question.split()) >= 3 else None)
    good = [i for i, question in enumerate(questions) if question is not None]
    found: list[tuple[str, list[int]] | None] = [None] * len(passages)
    if not good:
        return found
    whole = {i: questions[i] + draws[i].choice(BRIEF) for i in good}
    prompts = [document_ids(tokenizer, form, texts[i]) + question_ids(tokenizer, form, whole[i]) for i in good]
    stop = stop_ids(model)
    for i, written in zip(good, generate(model, prompts, MAX_ANSWER)):
        ids = written.ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if form.chat:
            answer = ids if ids and ids[-1] in stop else _whole_sentences(corpus, ids)
            ended = len(answer) > 1
        else:
            ended, answer = "\n" in text.lstrip(), corpus.encode(f" {_first_line(text)}\n")
        words = _words(_first_line(text))
        if ended and words and 2 * len(words & _words(texts[i])) >= len(words):
            found[i] = (whole[i], list(answer))
    return found


def _whole_sentences(corpus: Corpus, ids: list[int]) -> list[int]:
    """An answer that was too long, up to the end of its last whole sentence; nothing if it has none."""
    ends = corpus.sentence_ends()[torch.tensor(ids, dtype=torch.int64)].nonzero().flatten()
    return ids[: int(ends[-1]) + 1] if ends.numel() else []


def telling_sentence(text: str) -> str:
    """The sentence of a passage with the most numbers and names, for there is something to ask about in it."""
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text)]
    whole = sentences[1:-1] or sentences  # the first and the last are cut off
    fitting = [s for s in whole if 6 <= len(s.split()) <= 40] or [text.strip()]
    return max(fitting, key=lambda s: len(re.findall(r"\d+|(?<=\s)[A-Z]\w+", s)))


def _words(text: str) -> set[str]:
    """Words that say something: longer ones, and numbers."""
    return {word.lower() for word in re.findall(r"\w+", text) if len(word) > 3 or word.isdigit()}


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip().strip('"') if lines else ""
