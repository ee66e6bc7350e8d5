# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
from tiny_folder import save_tiny_folder

from kvcompact_kernels.cli import main

PLUGIN = """
from kvcompact_kernels.methods import register_method, get_method
from kvcompact_kernels.methods.uniform import Uniform
from kvcompact_kernels.evaluation.tasks import Case, Question, Task, register_task
from dataclasses import dataclass

@register_method
@dataclass
class Mine(Uniform):
    name = "mine_from_a_plugin"
    summary = source = "test"

@register_task
@dataclass
class MyTask(Task):
    name = "task_from_a_plugin"
    summary = "test"
    def make(self, room):
        return Case((Question("What?", ("x",), max_new_tokens=4),), "x" * (room.tokens - 3))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("model"))


def run(
    folder, out, *more, methods="snapkv,streaming_llm", tasks="niah_single:haystack=filler,continuation_kl:tokens=9"
):
    args = ["eval", "--model", str(folder), "--dtype", "float32", "--device", "cpu", "--quiet", "--out", str(out)]
    args += ["--methods", methods, "--tasks", tasks, "--lengths", "300", "--ratios", "2,4", "--samples", "2"]
    return main([*args, *more])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("out") / "results"
    assert run(folder, out) == 0
    return out


def test_one_command_leaves_tables_pictures_and_a_page(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"samples.jsonl", "config.json", "results.csv", "results.md", "index.html"} <= names
    pictures = sorted(n for n in names if n.endswith(".png"))
    assert [re.sub("_niah.*|_continuation.*", "", n) for n in pictures] == [
        "cost",
        "cost",
        "needles",
        "quality",
        "quality",
    ]
    assert not [n for n in names if n.startswith(".")], "temporary files are left"
    page = (finished / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and page.count("Query-agnostic") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert len((finished / "results.csv").read_text().splitlines()) == 1 + 2 * (2 + 2 * 2)


def test_same_command_again_adds_nothing_and_another_is_refused(finished, folder, capsys):
    before = (finished / "samples.jsonl").read_bytes()
    assert run(folder, finished) == 0
    assert (finished / "samples.jsonl").read_bytes() == before
    assert run(folder, finished, "--seed", "5") == 1
    assert "seed was 0, now 5" in capsys.readouterr().err
    assert (finished / "samples.jsonl").read_bytes() == before


def test_report_needs_no_model(finished, capsys):
    (finished / "results.md").unlink()
    assert main(["eval", "--report", "--out", str(finished), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["lines"]) == 12 and (finished / "results.md").exists()


def test_report_of_nothing(tmp_path, capsys):
    assert main(["eval", "--report", "--out", str(tmp_path), "--no-plots"]) == 1
    assert "no results" in capsys.readouterr().err


def test_missing_matplotlib_is_said_before_any_work(folder, tmp_path, capsys, monkeypatch):
    from kvcompact_kernels.evaluation import plots

    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert run(folder, tmp_path / "x") == 1
    assert "kvcompact-kernels[demo]" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert run(folder, tmp_path / "x", "--no-plots", tasks="continuation_kl:tokens=9") == 0
    assert not list((tmp_path / "x").glob("*.png"))


def test_plugin_brings_a_method_and_a_task(folder, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    more = ("--plugin", str(tmp_path / "mine.py"), "--no-plots")
    try:
        code = run(folder, tmp_path / "x", *more, methods="mine_from_a_plugin:sinks=2", tasks="task_from_a_plugin")
    finally:
        from kvcompact_kernels.evaluation.tasks import base as tasks
        from kvcompact_kernels.methods import base as methods

        methods._METHODS.pop("mine_from_a_plugin", None)
        tasks._TASKS.pop("task_from_a_plugin", None)
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "x" / "samples.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"full", "no_context", "mine_from_a_plugin:sinks=2"}


def test_texts(folder, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("word " * 200)
    more = ("--no-plots", "--texts", str(tmp_path / "texts"))
    assert run(folder, tmp_path / "x", *more, tasks="perplexity:tokens=9") == 0
    (tmp_path / "texts" / "a.txt").write_text("other " * 200)
    assert run(folder, tmp_path / "x", *more, tasks="perplexity:tokens=9") == 1
    assert "texts was" in capsys.readouterr().err
    (tmp_path / "texts" / "a.txt").unlink()
    assert run(folder, tmp_path / "x", *more) == 1
    assert "no .txt or .md" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (("--methods", "no_such"), "no_such"),
        (("--tasks", "no_such"), "no_such"),
        (("--tasks", "longhealth"), "needs the option 'file'"),
        (("--lengths", "many"), "lengths"),
        (("--ratios", "0.5"), "at least 1"),
        (("--samples", "0"), "samples"),
    ],
)
def test_wrong_usage(more, message, folder, tmp_path, capsys):
    assert run(folder, tmp_path / "x", "--no-plots", *more) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "x").exists()


def test_lengths_beyond_the_model(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "x", "--no-plots", "--lengths", "16k") == 1
    assert "at most 8192" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_list_and_missing_out(capsys):
    assert main(["eval", "--list"]) == 0
    out = capsys.readouterr().out
    assert "variable_tracking" in out and "hops=3" in out
    assert main(["eval"]) == 2


@pytest.mark.slow
def test_every_generated_task_and_every_untrained_method(folder, tmp_path):
    """The smoke run: all of it on a random model, within a few minutes."""
    pytest.importorskip("matplotlib")
    tasks = (
        "niah_single,niah_multikey,niah_multivalue,niah_multiquery,variable_tracking,common_words,frequent_words,"
        "qa:questions=1,perplexity:tokens=16,continuation_kl:tokens=16,summarise:tokens=8"
    )
    methods = (
        "random,uniform,streaming_llm,h2o,snapkv,pyramidkv,scissorhands,finch,zsmerge,expected_attention,adakv,magicpig,"
        "compose,kv_distill:weights=identity,adakv:scorer=h2o,attention_matching:max_queries=64"
    )
    # a character is a token here
    size = ("--lengths", "900", "--ratios", "4", "--samples", "1")
    for extra, chosen in (((), tasks), (("--query-aware",), "niah_single,qa:questions=1")):
        out = tmp_path / f"out{len(extra)}"
        assert run(folder, out, *size, *extra, methods=methods, tasks=chosen) == 0
        rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert not [row["error"] for row in rows if row["error"]]
        assert {row["task"] for row in rows} == set(chosen.split(",")) and len({row["method"] for row in rows}) == 18
        assert all(row["physical_bytes"] <= row["budget_bytes"] for row in rows if row["ratio"])
