# SPDX-License-Identifier: Apache-2.0
"""The demo on a tiny random model: document, rows, files, picture."""

import csv
import json
import math

import pytest
import torch
from tiny_folder import save_tiny_folder, tiny_tokenizer
from tiny_models import tiny_model

from kvcompact_kernels import patch_model, unpatch_model
from kvcompact_kernels.cli import main
from kvcompact_kernels.demo import report, runner
from kvcompact_kernels.demo.document import FACTS, make_document, reference_paragraphs
from kvcompact_kernels.demo.runner import NO_DOCUMENT, Answer, Demo, Outcome, Row
from kvcompact_kernels.methods import list_methods


def test_document_has_its_size_and_its_facts_in_order():
    document = make_document(len, tokens=20_000, needles=6, seed=3)
    assert 15_000 < len(document.text) <= 20_000
    places = [document.text.index(n.fact) for n in document.needles]
    assert places == sorted(places)
    depths = [place / len(document.text) for place in places]
    assert max(abs(d - n.depth) for d, n in zip(depths, document.needles)) < 0.1
    for needle in document.needles:
        assert needle.answer in needle.fact and needle.answer not in needle.question
        assert document.text.count(needle.fact) == 1
    assert document.continuation and document.continuation not in document.text


def test_document_is_seeded_and_real():
    assert make_document(len, 9000, 4, 1) == make_document(len, 9000, 4, 1)
    assert make_document(len, 9000, 4, 1) != make_document(len, 9000, 4, 2)
    text = make_document(len, 9000, 4, 1).text
    assert all(p in text for p in reference_paragraphs()[:5])


def test_document_without_needles_and_with_all():
    assert make_document(len, 5000, 0).needles == ()
    assert len({n.fact for n in make_document(len, 9000, len(FACTS)).needles}) == len(FACTS)


@pytest.mark.parametrize(
    ("tokens", "needles", "message"), [(9000, len(FACTS) + 1, "needles"), (9000, -1, "needles"), (10**9, 2, "only")]
)
def test_document_refuses(tokens, needles, message):
    with pytest.raises(ValueError, match=message):
        make_document(len, tokens, needles)
    with pytest.raises(ValueError, match="tokens"):
        make_document(len, 100, 2)


@pytest.fixture(scope="module")
def demo():
    model = tiny_model("llama", torch.float32, vocab_size=261, max_position_embeddings=8192)
    tokenizer = tiny_tokenizer()
    made = Demo(model, tokenizer, make_document(lambda text: len(text.encode()), 900, 3))
    made.reference = made.read_in_full()
    return made


@pytest.fixture
def patched(demo):
    patch_model(demo.model)
    yield demo
    unpatch_model(demo.model)


def test_every_method_of_the_library_is_in_the_demo():
    assert sorted(runner.METHODS) == sorted(name for name in list_methods() if name in runner.METHODS)
    assert set(list_methods()) >= set(runner.METHODS)


def test_full_row_is_the_unpatched_model(patched):
    row = patched.run_method("full", 1)
    assert row.error is None
    assert [a.text for a in row.answers] == [a.text for a in patched.reference]
    assert (row.kl_answers, row.kl_text) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5))
    assert row.logical_bytes == row.physical_bytes == 2 * 2 * 2 * 16 * 4 * patched.num_tokens
    assert row.slots == patched.num_tokens and row.compact_seconds > 0 and row.decode_ms > 0


def test_compacted_row_measures_what_is_lost(patched):
    mild, hard = patched.run_method("streaming_llm", 1.05), patched.run_method("streaming_llm", 30)
    assert 0 < mild.kl_answers < hard.kl_answers
    assert hard.physical_bytes < mild.physical_bytes < mild.logical_bytes == hard.logical_bytes
    assert hard.slots == -(-patched.num_tokens // 30)


def test_kl_against_the_definition(patched):
    """KL of one answer from scratch: the unpatched full prompt against the compact cache."""
    from kvcompact_kernels import compact

    row = patched.run_method("snapkv", 4)
    total = tokens = 0
    cache = compact(patched.model, patched.ids, "snapkv", ratio=4)
    for question, answer in zip(patched.questions, patched.answer_ids):
        n = answer.shape[1]
        with torch.no_grad():
            new = patched.model(torch.cat([question, answer], 1), past_key_values=cache).logits[0, -n - 1 : -1]
            unpatch_model(patched.model)
            full = patched.model(torch.cat([patched.ids, question, answer], 1)).logits[0, -n - 1 : -1]
            patch_model(patched.model)
        p, q = full.double().log_softmax(-1), new.double().log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
        tokens += n
    assert row.kl_answers == pytest.approx(total / tokens, rel=1e-3)


def test_no_document_row(demo):
    row = demo.run_without_document()
    assert row.error is None and row.method == NO_DOCUMENT and row.kl_answers > 0 and len(row.answers) == 3


def test_a_failing_method_is_a_row_with_its_reason(patched):
    row = patched.run_method("snapkv", 10**6)
    assert "slots" in row.error and row.kl_answers is None


def test_answers_are_matched_without_case(demo):
    needle = demo.document.needles[0]
    ids = torch.tensor([demo.tokenizer(f"It is {needle.answer.upper()}!").input_ids])
    assert demo._answer(needle, ids).right
    assert not demo._answer(needle, ids[:, :4]).right


def test_token_clock():
    clock = runner.TokenClock()
    clock.times = [0.0, 5.0, 6.0, 8.0]
    assert clock.gaps() == [1.0, 2.0]
    clock.times = [0.0]
    assert clock.gaps() == []


def outcome():
    rows = [Row(NO_DOCUMENT, True, 0, None, None, 0, 1.0, 0.5, 0, 2, None, 3.0, None, answers("no", False))]
    rows.append(Row("full", True, 100, 1.0, 4096, 4096, 0.0, 0.0, 2, 2, 1.0, 9.0, None, answers("yes", True)))
    for name in ("streaming_llm", "snapkv", "still", "attention_matching", "somebody_elses"):
        for ratio in (2.0, 4.0, 8.0):
            right = int(name == "attention_matching" and ratio == 2)
            row = Row(name, name != "still", int(100 / ratio), ratio, 4096, 512, ratio / 10, 0.1, right, 2, 1.5, 8.0)
            row.answers = answers(f"{name} says a very long thing " * 5, bool(right))
            rows.append(row)
    rows.append(Row("h2o", True, ratio=8.0, needles=2, error="ValueError: no"))
    settings = {"model_name": "Tiny", "tokens": 100, "full_cache_answers": [{"text": "yes"}, {"text": "other"}]}
    return Outcome(settings, rows, True)


def answers(text, right):
    return [Answer("Why?", "because", text, right), Answer("When?", "now", text, False)]


def test_table():
    lines = report.table(outcome()).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["full", "(no", "streaming_llm"]
    assert lines[10].startswith("still (untrained)")
    assert lines[-1].split()[:1] == ["h2o"] and "failed" in lines[-1]
    assert len({line.index("KL") for line in lines if "KL answers" in line}) == 1
    assert any("0.200" in line and "2.0x" in line and "4.0 KiB" in line and "512 B" in line for line in lines)


def test_findings_say_what_the_rows_say():
    text = "\n".join(report.findings(outcome()))
    assert "1 of 2 answers are word for word" in text
    assert (
        "At 2x: streaming_llm, snapkv keep 0 of 4 needles together; most needles: attention_matching (1 of 2)." in text
    )
    assert "At 8x: streaming_llm, snapkv keep 0 of 4 needles together; no method answers any." in text
    assert report.findings(Outcome({})) == []


def test_side_by_side():
    text = report.side_by_side(outcome())
    assert text.startswith("Answers at 4x")
    assert text.index("full") < text.index(NO_DOCUMENT)
    assert max(map(len, text.splitlines())) < 120
    assert report.side_by_side(Outcome({})) == ""


def test_picture_and_files(tmp_path):
    pytest.importorskip("matplotlib")
    assert report.picture(outcome(), tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert not report.picture(Outcome({}), tmp_path / "none.png")
    report.write_files(outcome(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.png", "results.csv", "results.json"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == len(outcome().rows) and rows[1]["method"] == "full" and rows[-1]["error"]
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["answers"][0]["question"] == "Why?"


def test_styles_differ_in_marker_as_well():
    styles = [*report.STYLES.values(), *report.SPARE_STYLES]
    assert len({marker for _, marker in styles}) == len(styles)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    report.write_atomically(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError):
        report.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_plan():
    assert runner.plan(["full", "a", "b"], [8, 2, 2]) == [("full", 1.0), ("a", 2), ("a", 8), ("b", 2), ("b", 8)]


def test_demo_command_runs_every_method(tmp_path, capsys):
    folder = save_tiny_folder(tmp_path / "tiny")
    out = tmp_path / "deep" / "out"
    arguments = ["demo", "--model", folder, "--out", out, "--tokens", 700, "--needles", 2, "--ratios", "2,4", "--quiet"]
    assert main([*map(str, arguments), "--dtype", "float32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["complete"]
    methods = {row["method"] for row in result["rows"]}
    assert methods == {*runner.METHODS, NO_DOCUMENT}
    assert len(result["rows"]) == 2 + 2 * (len(runner.METHODS) - 1)
    for row in result["rows"]:
        assert row["error"] is None
        assert math.isfinite(row["kl_answers"]) and row["needles"] == len(row["answers"]) == 2
    assert {r["method"] for r in result["rows"] if not r["trained"]} == {"still", "cartridge"}
    assert sorted(p.name for p in out.iterdir()) == ["quality.png", "results.csv", "results.json"]


def test_demo_command_without_matplotlib_and_with_a_failing_method(tmp_path, capsys, monkeypatch):
    def missing(*args):
        raise ImportError("no matplotlib")

    monkeypatch.setattr(report, "picture", missing)
    folder = save_tiny_folder(tmp_path / "tiny")
    arguments = ["demo", "--model", folder, "--out", tmp_path / "out", "--tokens", 700, "--needles", 2]
    code = main([*map(str, arguments), "--methods", "snapkv", "--ratios", "2,700", "--dtype", "float32"])
    captured = capsys.readouterr()
    assert code == 1
    assert "matplotlib is not installed" in captured.err and "snapkv failed" in captured.err
    assert "failed" in captured.out and "Traceback" not in captured.err
