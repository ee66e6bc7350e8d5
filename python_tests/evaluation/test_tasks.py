# SPDX-License-Identifier: Apache-2.0
import json
import re
from collections import Counter

import pytest

from kvcompact_kernels.evaluation.metrics import found
from kvcompact_kernels.evaluation.tasks import Continuation, Question, Room, get_task, list_tasks
from kvcompact_kernels.evaluation.tasks.base import Case, Task, register_task

GENERATED = [
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "variable_tracking",
    "common_words",
    "frequent_words",
    "qa",
    "summarise",
]


def encode(text):
    """Words, and what stands between them, as numbers: nothing joins over a blank."""
    return [hash(part) for part in re.findall(r"\w+|[^\w\s]|\n", text)]


def room(length=600, index=0, seed=0, texts=(), opening=7):
    return Room(length, index, seed, encode, opening, texts)


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("length", [400, 1500])
def test_contexts_fill_the_room_and_depend_on_the_seed_alone(name, length):
    task = get_task(name)
    case = task.make(room(length))
    size = len(encode(case.context)) + 7
    assert 0.85 * length <= size <= length
    assert task.make(room(length)) == case == get_task(name).make(room(length))
    for other in (room(length, index=1), room(length, seed=1)):
        assert task.make(other).context != case.context


@pytest.mark.parametrize("name", [n for n in GENERATED if n != "summarise"])
@pytest.mark.parametrize("index", range(3))
def test_answers_stand_in_the_context_and_not_in_the_question(name, index):
    case = get_task(name).make(room(index=index))
    for probe in case.probes:
        assert isinstance(probe, Question) and probe.answers
        for answer in probe.answers:
            assert found(answer, case.context)
            assert not found(answer, probe.text) and not found(answer, probe.prefix)
        # a perfect answer fits into the room for it
        assert len(encode(", ".join(probe.answers))) <= probe.max_new_tokens


@pytest.mark.parametrize("haystack", ["reference", "filler", "stories", "texts"])
@pytest.mark.parametrize("template", [0, 1, 2])
@pytest.mark.parametrize("values", ["numbers", "words"])
def test_needles_stand_at_their_depth(haystack, template, values):
    task = get_task("niah_single", haystack=haystack, template=template, values=values, depths=3)
    texts = ("\n\n".join(f"Paragraph {i} of a long document, which says little." for i in range(400)),)
    for index, depth in enumerate((0.0, 0.5, 1.0, 0.0)):
        case = task.make(room(800, index, texts=texts))
        (probe,) = case.probes
        assert probe.meta == {"depth": depth}
        place = case.context.index(probe.answers[0]) / len(case.context)
        assert abs(place - depth) < 0.25
        assert len(re.findall(re.escape(probe.answers[0]), case.context)) == 1


def test_template_minus_one_takes_turns():
    task = get_task("niah_single", template=-1)
    assert len({task.make(room(index=i)).probes[0].text.split()[0] for i in range(3)}) > 1


def test_multikey_asks_for_one_of_many_and_multiquery_for_each():
    case = get_task("niah_multikey", needles=5).make(room())
    numbers = re.findall(r"magic number for (\w+) is (\d{5})", case.context)
    assert len(numbers) == len(dict(numbers)) == 5 and len(case.probes) == 1
    assert any(key in case.probes[0].text and value == case.probes[0].answers[0] for key, value in numbers)
    case = get_task("niah_multiquery", needles=3).make(room())
    assert [p.meta["depth"] for p in case.probes] == [0, 0.5, 1] and len({p.text for p in case.probes}) == 3


def test_multivalue_has_one_key():
    case = get_task("niah_multivalue", needles=4).make(room())
    numbers = re.findall(r"magic number for (\w+) is (\d{5})", case.context)
    assert len({key for key, _ in numbers}) == 1
    assert sorted(value for _, value in numbers) == sorted(case.probes[0].answers)


@pytest.mark.parametrize("template", [0, 1])
def test_variables_of_the_chain_are_the_answers(template):
    case = get_task("variable_tracking", hops=4, chains=3, template=template).make(room(900))
    (probe,) = case.probes
    value = re.search(r"\d{5}", probe.text)[0]
    steps = {
        0: r"VAR (\w+) = (?:VAR )?(\w+)",
        1: r"box (\w+) is filled with (?:as many beads as the box )?(\w+)",
    }
    assigned = {}
    for name, source in re.findall(steps[template], case.context):  # in the order of the text
        assigned[name] = assigned.get(source, source)
    assert len(assigned) == 15
    assert {name for name, v in assigned.items() if v == value} == set(probe.answers)


@pytest.mark.parametrize("length", [200, 700, 3000])
def test_common_words_come_several_times_as_often(length):
    case = get_task("common_words").make(room(length))
    counts = Counter(line.split(". ")[1] for line in case.context.splitlines())
    top = counts.most_common(5)
    assert {word for word, _ in top[:4]} == set(case.probes[0].answers)
    assert top[3][1] >= 4 * top[4][1]


@pytest.mark.parametrize("index", range(8))
def test_frequent_words_have_no_tie(index):
    case = get_task("frequent_words", exponent=0.5).make(room(150, index))
    top = Counter(case.context.split()).most_common(4)
    assert {word for word, _ in top[:3]} == set(case.probes[0].answers) and top[2][1] > top[3][1]


def test_qa_asks_about_different_people():
    case = get_task("qa", questions=4).make(room(1200))
    assert len(case.probes) == 4 == len({p.text for p in case.probes})
    for probe in case.probes:
        name = re.search(r"[A-Z]\w+ [A-Z]\w+", probe.prefix)[0]
        (paragraph,) = [p for p in case.context.split("\n\n") if p.startswith(name)]
        assert found(probe.answers[0], paragraph)


@pytest.mark.parametrize("name", ["perplexity", "continuation_kl"])
def test_continuations_follow_their_context(name):
    text = " ".join(f"w{i}" for i in range(3000))
    where = room(300, texts=(text, "too short"))
    case = get_task(name, tokens=20).make(where)
    assert isinstance(case.probes[0], Continuation)
    whole = encode(text)
    start = whole.index(case.context_ids[0])
    assert list(case.context_ids + case.probes[0].ids) == whole[start : start + 320]
    assert len(case.context_ids) == 300 and len(case.probes[0].ids) == 20
    with pytest.raises(ValueError, match="no document has"):
        get_task(name, tokens=20).make(room(300, texts=("too short",)))
    assert get_task(name).make(room(300)).context_ids  # Python's own reference


def test_both_continuation_tasks_take_the_same_stretches():
    first, second = (get_task(n).make(room(300, 3)) for n in ("perplexity", "continuation_kl"))
    assert first == second


@pytest.mark.parametrize("name", GENERATED)
def test_too_small_lengths_are_refused(name):
    with pytest.raises(ValueError, match="too small"):
        get_task(name).make(room(18))


def test_questions_file(tmp_path):
    (tmp_path / "x.txt").write_text("The tower is red. " + "It rains. " * 200 + "The bridge is blue.")
    entries = [
        {"id": "a", "query": "Which colour is the tower?", "answer_prompt": "One word only.", "answers": ["RED"]},
        {"query": "Which colour is the bridge?", "answers": ["azure", "blue"]},
    ]
    (tmp_path / "x_questions.json").write_text(json.dumps(entries))
    task = get_task("questions", file=str(tmp_path / "x_questions.json"))
    assert task.num_cases() == 1
    whole = task.make(room(2000))
    assert [p.text for p in whole.probes] == [
        "Which colour is the tower? One word only.",
        "Which colour is the bridge?",
    ]
    assert whole.probes[0].scoring == "any" and whole.probes[1].answers == ("azure", "blue")
    short = task.make(room(60))
    assert len(short.probes) == 1 and len(encode(short.context)) <= 53, "the bridge does not stand in the text any more"
    (tmp_path / "x_questions.json").write_text('[{"query": "?"}]')
    with pytest.raises(ValueError, match="question 1: expected 'answers'"):
        get_task("questions", file=str(tmp_path / "x_questions.json"))


def test_longhealth_file(tmp_path):
    options = {f"answer_{letter}": f"option {letter}" for letter in "abcde"}
    question = {"No": 1, "question": "Which?", **options, "correct": "option c"}
    data = {"patient_01": {"texts": {"text_0": "first " * 90, "text_1": "last " * 90}, "questions": [question] * 3}}
    (tmp_path / "b.json").write_text(json.dumps(data))
    task = get_task("longhealth", file=str(tmp_path / "b.json"), questions=2)
    case = task.make(room(100))
    assert task.num_cases() == 1 and len(case.probes) == 2
    assert case.probes[0].answers == ("C",) and case.probes[0].scoring == "choice"
    assert "C. option c" in case.probes[0].text and len(case.probes[0].choices) == 5
    assert case.context.startswith("first") and case.context.rstrip().endswith("last")
    assert len(encode(case.context)) == 93
    question["correct"] = "option x"
    (tmp_path / "b.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="none of the options"):
        get_task("longhealth", file=str(tmp_path / "b.json"))


def test_quality_file(tmp_path):
    questions = [
        {"question": "Who?", "options": ["w", "x", "y", "z"], "gold_label": 4},
        {"question": "Secret?", "options": ["w", "x", "y", "z"]},
    ]
    rows = [
        {"article": "<p>One</p> text", "questions": questions},
        {"article": "<p>One</p> text", "questions": questions},
    ]
    (tmp_path / "q").write_text("\n".join(map(json.dumps, rows)))
    task = get_task("quality", file=str(tmp_path / "q"))
    case = task.make(room(100))
    assert task.num_cases() == 1 and len(case.probes) == 2 and case.probes[0].answers == ("D",)
    assert "<p>" not in case.context and "One" in case.context
    (tmp_path / "q").write_text("{}\nnonsense")
    with pytest.raises(ValueError, match="line 2"):
        get_task("quality", file=str(tmp_path / "q"))


def test_longbench_file(tmp_path):
    row = {"input": "Who?", "context": "Ada did. " * 100, "answers": ["Ada"], "all_classes": None, "dataset": "x"}
    (tmp_path / "l.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "input": ""}))
    task = get_task("longbench", file=str(tmp_path / "l.jsonl"))
    assert task.num_cases() == 2
    case = task.make(room(100, 1))
    assert case.probes[0].scoring == "f1" and "Summarise" in case.probes[0].text and len(encode(case.context)) <= 93
    (tmp_path / "l.jsonl").write_text(json.dumps({**row, "answers": []}))
    with pytest.raises(ValueError, match="answers"):
        get_task("longbench", file=str(tmp_path / "l.jsonl"))


@pytest.mark.parametrize("name", ["questions", "longhealth", "quality", "longbench"])
def test_absent_files_are_named(name):
    with pytest.raises(FileNotFoundError, match="there is no file /nowhere/x"):
        get_task(name, file="/nowhere/x")
    with pytest.raises(TypeError, match=f"needs the option 'file', as in {name}:file="):
        get_task(name)


def test_a_task_is_one_class():
    @register_task
    class Echo(Task):
        name = "echo_for_this_test"
        summary = "says it back"

        def make(self, room):
            return Case((Question("What?", ("x",)),), "x")

    assert list_tasks()["echo_for_this_test"] is Echo
    assert get_task("echo_for_this_test").make(room()).context == "x"
    with pytest.raises(ValueError, match="registered already"):
        register_task(type("Other", (Echo,), {}))
    from kvcompact_kernels.evaluation.tasks import base

    del base._TASKS["echo_for_this_test"]
