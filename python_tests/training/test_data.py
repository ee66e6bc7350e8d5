# SPDX-License-Identifier: Apache-2.0
"""Contexts, planted facts and tails."""

import random
from dataclasses import replace

import pytest
import torch
from tiny_folder import tiny_tokenizer

from kvcompact_kernels.evaluation.tasks import _needles, _words
from kvcompact_kernels.training import facts as facts_module
from kvcompact_kernels.training.data import (
    KINDS,
    Corpus,
    Item,
    Recipe,
    collate,
    make_example,
    read_texts,
    tail_means,
)
from kvcompact_kernels.training.facts import make_facts

TEXT = " ".join(f"Sentence number {i} says that the bell rings {i * 7} times." for i in range(120))
RECIPE = Recipe({kind: 1.0 for kind in KINDS}, tails=6, continuation=20, recall=16, cue=4)


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "plain"])
def corpus(request):
    return Corpus(read_texts([TEXT, TEXT[::-1]]), tiny_tokenizer(request.param), 261, 0.2)


def decode(corpus, ids):
    return corpus.tokenizer.decode(list(ids))


def test_held_out_ends_are_never_trained_on(corpus):
    train, held = corpus.train, corpus.held
    whole = [corpus.encode(text) for text in (TEXT, TEXT[::-1])]
    cuts = [len(ids) - round(0.2 * len(ids)) for ids in whole]
    assert train.ids.tolist() == [*whole[0][: cuts[0]], *corpus.encode("\n\n"), *whole[1][: cuts[1]]]
    assert held.ids.tolist() == [*whole[0][cuts[0] :], *corpus.encode("\n\n"), *whole[1][cuts[1] :]]
    assert train.where(3) == "text 0 at token 3" and train.where(cuts[0] + 5) == "text 1 at token 3"


@pytest.mark.parametrize("seed", range(8))
def test_contexts_have_the_wanted_length_and_tails_are_true(corpus, seed):
    length = random.Random(seed).choice((700, 901))
    example = make_example(corpus, corpus.train, RECIPE, length, random.Random(seed))
    assert len(example.context) == length and len(example.tails) == 6
    context = decode(corpus, example.context)
    for tail in example.tails:
        assert len(tail.ids) == len(tail.scored) and not tail.scored[0] and any(tail.scored)
        text = decode(corpus, tail.ids)
        scored = decode(corpus, [i for i, s in zip(tail.ids, tail.scored) if s])
        assert text.endswith(scored)
        if tail.kind == "facts":
            assert scored.strip().rstrip(".") in context and scored.strip().rstrip(".") not in TEXT
        elif tail.kind == "recall":
            assert text in context and len(tail.ids) == 16 and sum(tail.scored) == 12
        elif tail.kind == "continuation":
            planted = any(t.kind == "facts" for t in example.tails)
            assert (text if planted else context[-40:] + text) in decode(corpus, corpus.train.ids)
            assert len(tail.ids) == 20
    again = make_example(corpus, corpus.train, RECIPE, length, random.Random(seed))
    assert again == example


def test_a_short_context_recalls_what_it_has_no_room_to_plant(corpus):
    for seed in range(10):
        example = make_example(corpus, corpus.train, RECIPE, 100, random.Random(seed), ["facts"] * 5)
        assert len(example.context) == 100 and {tail.kind for tail in example.tails} <= {"facts", "recall"}
        assert [tail.kind for tail in example.tails].count("facts") < 2


def test_statements_stand_between_sentences(corpus):
    recipe = Recipe({"facts": 1.0}, tails=3, distractors=2, chat=0.0)
    for seed in range(5):
        example = make_example(corpus, corpus.held, recipe, 900, random.Random(seed))
        context = decode(corpus, example.context)
        pieces = [f.statement for f in make_facts(random.Random(0), 1)]
        assert pieces[0] not in context
        for tail in example.tails:
            value = decode(corpus, [i for i, s in zip(tail.ids, tail.scored) if s]).strip().rstrip(".")
            assert context.count(value) >= 1


def test_questions_are_asked_about_windows_that_hold_their_passage():
    corpus = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.2)
    end = corpus.train.ids.numel()
    answer = tuple(corpus.encode("seven times"))
    corpus.train.items = [Item(p, p + 60, f"What is at {p}?", answer) for p in (0, 500, end - 60)]
    asked = set()
    for seed in range(30):
        example = make_example(corpus, corpus.train, RECIPE, 600, random.Random(seed), ["questions", "recall"])
        context, text = decode(corpus, example.context), decode(corpus, example.tails[0].ids)
        place = int(text.split("What is at ")[1].split("?")[0])
        assert decode(corpus, corpus.train.ids[place : place + 60]) in context or example.tails[0].kind != "questions"
        assert text.endswith("<|im_start|>assistant\nseven times")
        asked.add(place)
    assert asked == {0, 500, end - 60}
    # a continuation of 20 tokens cannot follow a window with the last passage
    corpus.train.items = corpus.train.items[2:]
    example = make_example(corpus, corpus.train, RECIPE, 600, random.Random(0), ["questions", "continuation"])
    assert [tail.kind for tail in example.tails] == ["recall", "continuation"]


def test_facts_do_not_contradict_one_another_and_are_not_the_evaluations():
    draw = random.Random(4)
    for _ in range(200):
        found = make_facts(draw, draw.randint(1, 12))
        assert len({fact.subject for fact in found}) == len(found)
        for fact in found:
            assert fact.value in fact.statement and fact.value not in fact.question
    names = set(facts_module._FIRST) | set(facts_module._LAST)
    theirs = {*_words.FIRST_NAMES, *_words.LAST_NAMES, *_words.CITIES}
    assert not names & theirs
    assert not {s + e for s in facts_module._START for e in facts_module._END} & theirs
    wordings = [text for kind in facts_module._KINDS for text in (*kind.statements, *kind.questions, *kind.leads)]
    for template in _needles.TEMPLATES:
        for words in ("special magic number", "opens with the code", "keeps the password", "locker", "password"):
            assert not any(words in text for text in wordings), template


def test_prepared_tokens_are_made_once(tmp_path, monkeypatch):
    made = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.2, tmp_path)
    tokenizer = tiny_tokenizer()
    calls = []
    real = Corpus.encode
    monkeypatch.setattr(Corpus, "encode", lambda self, text: calls.append(len(text)) or real(self, text))
    again = Corpus(read_texts([TEXT]), tokenizer, 261, 0.2, tmp_path)
    assert max(calls) < 200 and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(again.train.ids, made.train.ids) and again.held.starts == made.held.starts
    other = Corpus(read_texts([TEXT + "x"]), tokenizer, 261, 0.2, tmp_path)
    assert other.key != made.key and len(list(tmp_path.iterdir())) == 2


def test_token_ids_need_no_tokenizer():
    ids = torch.arange(400) % 97
    corpus = Corpus(read_texts([ids]), None, 97, 0.25)
    recipe = Recipe({"recall": 1.0, "continuation": 1.0}, tails=2, continuation=9, recall=7, cue=2)
    example = make_example(corpus, corpus.train, recipe, 50, random.Random(0))
    assert len(example.context) == 50 and corpus.held.ids.numel() == 100
    with pytest.raises(ValueError, match="from 0 to 96, the model has 90"):
        Corpus(read_texts([ids]), None, 90, 0.25)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        Corpus(read_texts(["text"]), None, 97, 0.25)


def test_bad_data(tmp_path):
    with pytest.raises(ValueError, match="holds no .txt or .md file"):
        read_texts(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        read_texts(tmp_path / "nowhere")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="bad.txt is not UTF-8"):
        read_texts(str(tmp_path))
    (tmp_path / "bad.txt").write_text(" \n")
    with pytest.raises(ValueError, match="bad.txt is empty"):
        read_texts(tmp_path)
    for data, error in (([], "at least one text"), ([""], r"data\[0\] is empty")):
        with pytest.raises(ValueError, match=error):
            read_texts(data)
    for data, error in ((5, "must be a path"), ([5], r"data\[0\] must be a str"), ([torch.zeros(3)], "1-D tensor")):
        with pytest.raises(TypeError, match=error):
            read_texts(data)
    corpus = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.2)
    corpus.check_length(1000)
    with pytest.raises(ValueError, match=r"of them held out, but a context and what follows it take 2000"):
        corpus.check_length(2000)
    with pytest.raises(ValueError, match="a context of 12 tokens has no room behind the"):
        make_example(corpus, corpus.train, replace(RECIPE, chat=1.0), 12, random.Random(0), ["recall"])


def test_collated_tails_keep_their_order():
    corpus = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.0)
    example = make_example(corpus, corpus.train, RECIPE, 700, random.Random(3))
    ids, scored, tail = collate(example.tails, "cpu")
    assert ids.shape == scored.shape == (6, max(len(t.ids) for t in example.tails))
    wanted = [i for t in example.tails for i, s in zip(t.ids, t.scored) if s]
    assert ids[scored].tolist() == wanted
    assert tail.tolist() == [row for row, t in enumerate(example.tails) for s in t.scored if s]
    means = tail_means(torch.arange(len(wanted)).float(), tail, 6)
    assert means[1] == torch.arange(len(wanted)).float()[tail == 1].mean()
