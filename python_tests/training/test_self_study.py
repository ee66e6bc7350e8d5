# SPDX-License-Identifier: Apache-2.0
"""Self-study: what is written, what is kept of the teacher, and that preparation is done once."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from tiny_folder import tiny_tokenizer
from tiny_models import tiny_model

from kvcompact_kernels import patch_model
from kvcompact_kernels.prompt import document_ids, prompt_format
from kvcompact_kernels.training import self_study
from kvcompact_kernels.training.self_study import (
    KINDS,
    SelfStudyConfig,
    chunk_spans,
    draw_starts,
    prepare_conversations,
    split_text,
    tidy_request,
)

SMALL = SelfStudyConfig(
    conversations=10, batch=4, chunk_tokens=60, request_tokens=5, answer_tokens=6, held_out=2, top_k=7, seed=3
)
TEXT = "The lantern is green. The bell rings at noon!\nNobody knows why: 3.5 reasons were given. " * 3


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", torch.float32, vocab_size=261, max_position_embeddings=2048)
    return patch_model(model.requires_grad_(False), "full")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(
    "text", [TEXT, "one line", "no end\n\n\nand then. Some? more!", "x" * 1000, "a " * 300, "...", "漢字。" * 100]
)
def test_pieces_are_the_text(text):
    pieces = split_text(text)
    assert "".join(pieces) == text.strip()
    assert all(piece.strip() for piece in pieces)


def test_sentences_are_pieces_and_numbers_are_not_cut():
    assert split_text("It is 3.5 m. Is it? Yes.\nSo.") == ["It is 3.5 m. ", "Is it? ", "Yes.\n", "So."]
    assert split_text("  \n ") == []


@pytest.mark.parametrize("count", [1, 3, 7, 20, 61])
def test_spans_cover_the_text_evenly(count):
    draw = random.Random(count)
    lengths = [draw.randrange(1, 40) for _ in range(100)]
    size = 150
    spans = chunk_spans(lengths, size, count)
    assert len(spans) == count
    assert all(0 <= a < b <= 100 and sum(lengths[a:b]) <= 1.4 * size for a, b in spans)
    seen = [sum(a <= i < b for a, b in spans) for i in range(100)]
    whole = len(chunk_spans(lengths, size, 1000)) // 1000 * count // (sum(lengths) // size + 2)
    assert min(seen) >= whole and max(seen) <= min(seen) + 2 + count // 10
    # a few spans are taken from all over the text, not from its beginning
    if count == 3:
        assert spans[-1][1] > 70 and spans[0][1] < 40


@pytest.mark.parametrize(("first", "last", "count"), [(3, 10, 4), (3, 10, 7), (0, 5, 13), (6, 7, 3)])
def test_passages_begin_everywhere_before_they_begin_anywhere_twice(first, last, count):
    starts = draw_starts(random.Random(count), first, last, count)
    times = [starts.count(piece) for piece in range(first, last)]
    assert len(starts) == sum(times) == count and max(times) - min(times) <= 1
    assert len({tuple(draw_starts(random.Random(seed), 0, 9, 9)) for seed in range(5)}) > 1


def test_targets_are_the_teachers_with_the_chunk_in_context(model, tokenizer, tmp_path):
    data = prepare_conversations(model, tokenizer, TEXT, SMALL, tmp_path)
    form = prompt_format(tokenizer)
    pieces = split_text(TEXT)
    spans = chunk_spans([len(piece) for piece in pieces], SMALL.chunk_tokens, SMALL.units)
    assert 5 <= len(data) <= 10 and len(data.folder.name) > 20
    for i in range(len(data)):
        one = data[i]
        first, last = spans[data._places[i][0]]
        context = document_ids(tokenizer, form, "".join(pieces[first:last]).strip())
        ids = torch.cat([torch.tensor(context), one.prompt, one.answer])[None]
        logs = model(ids).logits[0, -1 - len(one.answer) : -1].log_softmax(-1)
        # greedy answers: the likeliest token each time
        assert torch.equal(one.answer, logs.argmax(-1))
        best, where = logs.topk(7, -1)
        assert torch.equal(one.targets.ids[:, :7], where)
        assert torch.allclose(one.targets.logs[:, :7], best, atol=1e-4)
        assert torch.equal(one.targets.gold, one.answer)
        assert data.lengths[i] == len(one.prompt) + len(one.answer)
        assert one.kind in KINDS


def test_passages_to_be_continued(model, tokenizer, tmp_path):
    config = replace(SMALL, recall=7, answer_tokens=40, chunk_tokens=150)
    data = prepare_conversations(model, tokenizer, TEXT, config, tmp_path)
    recalled = [data[i] for i in range(len(data)) if data[i].kind == "recall"]
    assert 3 <= len(recalled) <= 7 and len(data) > len(recalled)
    flat = " ".join(TEXT.split())
    for one in recalled:
        asked, answer = tokenizer.decode(one.prompt), tokenizer.decode(one.answer)
        begun = asked.split('"')[1]
        assert f"{begun} {answer}" in flat
        assert torch.equal(one.targets.gold, one.answer)
    # what is written does not change with it
    alone = prepare_conversations(model, tokenizer, TEXT, replace(config, recall=0), tmp_path)
    for i in range(len(alone)):
        assert torch.equal(alone[i].prompt, data[i].prompt) and torch.equal(alone[i].targets.logs, data[i].targets.logs)

    # more than the chunk has pieces: some begin twice
    many = prepare_conversations(model, tokenizer, TEXT, replace(config, recall=30, batch=30), tmp_path)
    assert sum(many[i].kind == "recall" for i in range(len(many))) > len(split_text(TEXT))


FACTS = (
    "In 1971 Anna Berg sold 12.5% of the Mill of Tore to Olaf. Olaf paid 1,200 crowns, says Olaf.\n"
    "The river is 97 miles long and falls into the Sea of Glass. Nobody knows why."
)


@pytest.mark.parametrize(
    ("passage", "spans"),
    [
        ("In 1971 Anna Berg sold 12.5% of the Mill of Tore.", ["1971", "Anna Berg", "12.5%", "Mill of Tore"]),
        ("Prices rose 3.5, to 1,200; then 7%.", ["3.5", "1,200", "7%"]),
        (
            "The town lies by the Sea of the Glass Kings, near Rhône-sur-Mer.",
            ["Sea of the Glass Kings", "Rhône-sur-Mer"],
        ),
        ("The whole begins with a capital and no name. Nor has this one. The next is Ada's.", ["Ada's"]),
    ],
)
def test_gaps_are_numbers_and_names(passage, spans):
    assert [found.group() for found in self_study._SPAN.finditer(passage)] == spans


@pytest.mark.parametrize(
    ("before", "span", "after", "asked"),
    [
        ("The Mill was sold in ", "1971", ".", "The Mill was sold in what year?"),
        ("The river is ", "97", " miles long.", "The river is how many miles long?"),
        ("the mill (", "97", ") was sold", "The mill (what) was sold?"),
        ("She sold ", "12.5%", " of it;", "She sold what percentage of it?"),
        ("", "Olaf", " paid 1,200 crowns, says Olaf's", "What paid 1,200 crowns, says Olaf's?"),
    ],
)
def test_a_gap_as_a_question(before, span, after, asked):
    kind = {"1971": "In what year", "97": "How many", "12.5%": "What percentage"}.get(span)
    endings = {
        self_study._ask_in_place(random.Random(i), before, span, after).removeprefix(f"{asked} ") for i in range(40)
    }
    assert len(endings) > 4 and endings <= {*self_study._SHORT, *self_study._SHORT_BY_OPENING.get(kind, ())}


def test_passages_with_gaps(model, tokenizer, tmp_path):
    config = replace(SMALL, gaps=37, batch=16, answer_tokens=40, chunk_tokens=170)
    data = prepare_conversations(model, tokenizer, FACTS, config, tmp_path)
    requests = [r for unit in range(config.units) for r in self_study._unit_header(data.folder, unit)["requests"]]
    flat = " ".join(FACTS.split())
    filled, questions = [], 0
    for i in range(len(data)):
        one = data[i]
        if one.kind != self_study.GAP:
            continue
        asked, answer = requests[i], tokenizer.decode(one.answer)
        assert asked in tokenizer.decode(one.prompt) and torch.equal(one.targets.gold, one.answer)
        if "____" in asked:
            begun, mark, rest = asked.split('"')[1].partition("____")
            assert mark and f"{begun}{answer}{rest}" in flat
        else:  # a question word stands there
            bare = self_study._without_wording(asked)
            assert bare.endswith("?") and bare != asked
            begun, rest = re.split(
                r"\b(?:what year|what percentage|how many|what)\b", bare[:-1], maxsplit=1, flags=re.IGNORECASE
            )
            assert f"{begun[1:]}{answer}{rest}" in flat  # the first letter may have become a capital
            questions += 1
        assert answer not in begun + rest
        filled.append((i, answer, begun + rest))
    assert 10 < questions < 27
    answers = [answer for _, answer, _ in filled]
    assert set(answers) == {"1971", "Anna Berg", "12.5%", "Mill of Tore", "Olaf", "1,200", "97", "Sea of Glass"}
    # it stands twice in the second sentence, and would be read off it
    assert not any("crowns" in rest for _, answer, rest in filled if answer == "Olaf")
    assert len(answers) == 37
    by_unit = [[a for i, a, _ in filled if data._places[i][0] == unit] for unit in range(config.units)]
    for unit in by_unit:
        times = [unit.count(answer) for answer in set(unit)]
        assert not times or max(times) - min(times) <= 1
    # shown whole, or a few words on either side
    shown = {rest for _, answer, rest in filled if answer == "12.5%"}
    assert len(shown) >= 2
    alone = prepare_conversations(model, tokenizer, FACTS, replace(config, gaps=0), tmp_path)
    for i in range(len(alone)):
        assert torch.equal(alone[i].prompt, data[i].prompt)


def test_prepared_once_and_again_only_for_something_else(model, tokenizer, tmp_path, monkeypatch):
    first = prepare_conversations(model, tokenizer, TEXT, SMALL, tmp_path)
    before = [first[i] for i in range(len(first))]
    with monkeypatch.context() as patch:
        patch.setattr(self_study._Writer, "write", lambda *a: pytest.fail("written again"))
        again = prepare_conversations(model, tokenizer, TEXT, SMALL, tmp_path)
    assert again.digest == first.digest and again.train == first.train and again.held_out == first.held_out
    # interrupted after the second unit: the rest is what it would have been
    (first.folder / "unit-00002.safetensors").unlink()
    more = prepare_conversations(model, tokenizer, TEXT, SMALL, tmp_path)
    for old, new in zip(before, (more[i] for i in range(len(more)))):
        assert torch.equal(old.prompt, new.prompt) and torch.equal(old.answer, new.answer)
        assert torch.equal(old.targets.logs, new.targets.logs)
    other = prepare_conversations(model, tokenizer, TEXT + " More.", SMALL, tmp_path)
    assert other.digest != first.digest and other.folder != first.folder


def test_the_global_randomness_is_left_alone(model, tokenizer, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prepare_conversations(model, tokenizer, TEXT, SMALL, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_no_held_out_request_is_trained(model, tokenizer, tmp_path, monkeypatch):
    config = SelfStudyConfig(conversations=24, batch=6, chunk_tokens=60, request_tokens=3, answer_tokens=2, held_out=5)
    names = iter(f"Who is number {i % 9}?" for i in range(1000))
    monkeypatch.setattr(self_study, "tidy_request", lambda text, kind: next(names))
    data = prepare_conversations(model, tokenizer, TEXT, config, tmp_path)
    requests = []
    for unit in range(config.units):
        requests += self_study._unit_header(data.folder, unit)["requests"]
    assert len({request.partition("? ")[2] for request in requests}) > 3  # the same question in several wordings
    bare = [request[: request.index("?") + 1] for request in requests]
    assert len(data.held_out) == 5 and data.train
    assert not {bare[i] for i in data.held_out} & {bare[i] for i in data.train}


def test_short_answers_are_asked_for_in_many_wordings(model, tokenizer, tmp_path):
    config = SelfStudyConfig(48, 60, ("question",), batch=12, request_tokens=3, answer_tokens=2, short_answers=1.0)
    data = prepare_conversations(model, tokenizer, TEXT, config, tmp_path)
    requests = [r for unit in range(config.units) for r in self_study._unit_header(data.folder, unit)["requests"]]
    by_opening = {"": self_study._SHORT, **self_study._SHORT_BY_OPENING}
    known = {w for wordings in by_opening.values() for w in wordings}
    endings = [max((w for w in known if request.endswith(f" {w}")), key=len) for request in requests]  # each has one
    assert len(set(endings)) >= 8
    for request, ending in zip(requests, endings):
        bare = self_study._without_wording(request)
        assert bare == request.removesuffix(f" {ending}") != request
        kinds = [k for k, wordings in by_opening.items() if ending in wordings]
        assert any(bare.startswith(kind) for kind in kinds), (request, kinds)


def test_the_writer_may_see_the_chunk(model, tokenizer, tmp_path):
    chunk = replace(SMALL, writer_sees="chunk")
    with_chunk = prepare_conversations(model, tokenizer, TEXT, chunk, tmp_path)
    alone = prepare_conversations(model, tokenizer, TEXT, SMALL, tmp_path)
    one, other = (self_study._unit_header(d.folder, 0)["requests"] for d in (with_chunk, alone))
    assert one != other


def test_a_tokenizer_without_a_chat_template(model, tmp_path):
    data = prepare_conversations(model, tiny_tokenizer(chat=False), TEXT, SMALL, tmp_path)
    assert len(data) >= 5


def test_tidy_requests():
    assert tidy_request(' "Who built it?" Answer: Ada', "question") == "Who built it?"
    assert tidy_request("Who built it\nand why?", "question") == "Who built it"
    assert tidy_request("Make a table\nof towns.", "structuring") == "Make a table of towns."
    assert tidy_request("  \n", "question") == ""


def test_damaged_files_are_named(model, tokenizer, tmp_path):
    data = prepare_conversations(model, tokenizer, TEXT, SMALL, tmp_path)
    path = data.folder / "unit-00001.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="unit-00001.safetensors is truncated or damaged"):
        prepare_conversations(model, tokenizer, TEXT, SMALL, tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="damaged or gone"):
        [data[i] for i in range(len(data))]


def test_bad_options_and_texts(model, tokenizer, tmp_path):
    bad = {
        "conversations": 1,
        "held_out": 512,
        "kinds": ("poem",),
        "short_answers": 1.5,
        "request_temperature": -1,
        "writer_sees": "all",
        "top_k": 0,
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            SelfStudyConfig(**{name: value})
    with pytest.raises(TypeError, match="answer_temperature"):
        SelfStudyConfig(answer_temperature="hot")
    with pytest.raises(ValueError, match="no text"):
        prepare_conversations(model, tokenizer, " \n", SMALL, tmp_path)
    large = replace(SMALL, chunk_tokens=4000)
    with pytest.raises(ValueError, match="chunk_tokens 4000 is too much"):
        prepare_conversations(model, tokenizer, TEXT * 20, large, tmp_path)


def test_a_model_that_writes_nothing(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(self_study, "tidy_request", lambda text, kind: "")
    with pytest.raises(ValueError, match="the model wrote 0 conversations"):
        prepare_conversations(model, tokenizer, TEXT, SMALL, tmp_path)


def test_the_note_says_what_they_were_made_from(model, tokenizer, tmp_path):
    data = prepare_conversations(model, tokenizer, TEXT, SMALL, tmp_path)
    note = json.loads((data.folder / "conversations.json").read_text())
    assert note["config"]["seed"] == 3 and note["dtype"] == "float32" and len(note["document"]) == 64
