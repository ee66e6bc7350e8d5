# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path

import pytest
from tiny_folder import save_tiny_folder

from kvcompact_kernels.cli import main
from kvcompact_kernels.evaluation.tasks import base as tasks_registry
from kvcompact_kernels.methods import base as methods_registry

DOCS = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"

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

BAD_PLUGIN = """
from kvcompact_kernels.methods import Method, register_method
from kvcompact_kernels.evaluation.tasks import Case, Task, register_task

@register_method
class NoneMade(Method):
    name = "none_made"
    summary = source = "test"
    def compact_layer(self, layer, slots):
        return None

@register_method
class Index(Method):
    name = "index_error"
    summary = source = "test"
    def compact_layer(self, layer, slots):
        raise IndexError("no such layer")

@register_task
class NoCase(Task):
    name, summary = "no_case", "test"
    def make(self, room):
        return "nothing"

@register_task
class NoProbe(Task):
    name, summary = "no_probe", "test"
    def make(self, room):
        return Case((3,), "x")

@register_task
class Divides(Task):
    name, summary = "divides", "test"
    def make(self, room):
        return 1 / 0
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


@pytest.fixture
def own_registries(monkeypatch):
    """What a plugin registers is forgotten afterwards, and whenever the test calls this."""
    methods, tasks = dict(methods_registry._METHODS), dict(tasks_registry._TASKS)

    def forget():
        monkeypatch.setattr(methods_registry, "_METHODS", dict(methods))
        monkeypatch.setattr(tasks_registry, "_TASKS", dict(tasks))

    forget()
    return forget


def test_plugin_brings_a_method_and_a_task(folder, tmp_path, own_registries):
    (tmp_path / "mine.py").write_text(PLUGIN)
    more = ("--plugin", str(tmp_path / "mine.py"), "--no-plots")
    assert run(folder, tmp_path / "x", *more, methods="mine_from_a_plugin:sinks=2", tasks="task_from_a_plugin") == 0
    rows = [json.loads(line) for line in (tmp_path / "x" / "samples.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"full", "no_context", "mine_from_a_plugin:sinks=2"}


def test_the_plugin_in_the_docs(folder, tmp_path, own_registries):
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "class Mine" in block
    ]
    (tmp_path / "mine.py").write_text(code)
    methods = "mine,mine:power=2,adakv:scorer=mine,compose:first=mine:second=zsmerge,minicache:scorer=mine:start=0"
    more = ("--plugin", str(tmp_path / "mine.py"), "--no-plots")
    assert run(folder, tmp_path / "x", *more, methods=methods, tasks="my_task,continuation_kl:tokens=9") == 0
    rows = [json.loads(line) for line in (tmp_path / "x" / "samples.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"full", "no_context", *methods.split(",")}
    assert {row["task"] for row in rows} == {"my_task", "continuation_kl:tokens=9"}
    # the shortest context of my_task holds 23 tokens: a quarter of it is fewer than zsmerge's five slots take
    assert all(row["error"] is None or "at least" in row["error"] for row in rows)
    assert not [row for row in rows if row["error"] and row["method"].startswith(("mine", "adakv"))]


def test_a_plugin_with_faults_harms_nobody_else(folder, tmp_path, capsys, own_registries):
    (tmp_path / "bad.py").write_text(BAD_PLUGIN)
    more = ("--plugin", str(tmp_path / "bad.py"), "--no-plots")
    args = {"methods": "none_made,index_error,uniform", "tasks": "continuation_kl:tokens=9"}
    assert run(folder, tmp_path / "x", *more, **args) == 1
    assert "nothing but failures of none_made, index_error; the other rows are in" in capsys.readouterr().err
    assert (tmp_path / "x" / "results.md").is_file()
    rows = [json.loads(line) for line in (tmp_path / "x" / "samples.jsonl").read_text().splitlines()]
    errors = {row["method"]: row["error"] for row in rows}
    assert errors["uniform"] is None and errors["full"] is None
    assert "must return a CompactBlock, got NoneType" in errors["none_made"]
    assert errors["index_error"] == "IndexError: no such layer"
    for task, message in (
        ("no_case", "task no_case: make must return a Case, got str"),
        ("no_probe", "task no_probe: probes must be Questions or Continuations, got int"),
        ("divides", "task divides: ZeroDivisionError"),
    ):
        own_registries()
        capsys.readouterr()
        assert run(folder, tmp_path / "y", *more, methods="uniform", tasks=task) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def test_plugins_that_cannot_be_loaded(folder, tmp_path, capsys, own_registries):
    for name, code, message in (
        ("raises.py", "raise RuntimeError('boom')", "raises.py: RuntimeError: boom"),
        ("syntax.py", "def f(:", "syntax.py: SyntaxError"),
        ("twice.py", PLUGIN.replace("mine_from_a_plugin", "snapkv"), "a method named 'snapkv' is registered already"),
        ("nameless.py", PLUGIN.replace('name = "task_from_a_plugin"', "name = 3"), "MyTask.name must be a string"),
        ("missing.py", None, "there is no such file"),
    ):
        if code is not None:
            (tmp_path / name).write_text(code)
        for command in (("eval", "--out", str(tmp_path / "x")), ("methods",)):
            own_registries()
            capsys.readouterr()
            assert main([*command, "--plugin", str(tmp_path / name)]) == 1
            error = capsys.readouterr().err
            assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "x").exists()


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
        (("--methods", "snapkv:windw=3"), "'windw'"),
        (("--methods", "snapkv:window"), "NAME=VALUE"),
        (("--out", __file__), "is a file; a folder is needed"),
    ],
)
def test_wrong_usage(more, message, folder, tmp_path, capsys):
    assert run(folder, tmp_path / "x", "--no-plots", *more) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--methods", "cartridge:file="),
        ("--methods", "still:weights="),
        ("--methods", "snapkv:shares="),
        ("--tasks", "quality:file="),
        ("--tasks", "questions:file="),
    ],
)
def test_files_that_are_missing_or_damaged(option, value, folder, tmp_path, capsys):
    (tmp_path / "damaged").write_text('{"format": "kvc')
    cases = (("no_file", "there is no file no_file"), (tmp_path / "damaged", "damaged"), (tmp_path, "a"))
    for file, message in cases:
        assert run(folder, tmp_path / "x", "--no-plots", option, f"{value}{file}") == 1
        error = capsys.readouterr().err
        assert (
            message in error and str(file) in error and len(error.splitlines()) == 1 and not (tmp_path / "x").exists()
        )


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
        "compose,kv_distill:weights=identity,adakv:scorer=h2o,minicache:start=0,attention_matching:max_queries=64"
    )
    # a character is a token here
    size = ("--lengths", "900", "--ratios", "4", "--samples", "1")
    for extra, chosen in (((), tasks), (("--query-aware",), "niah_single,qa:questions=1")):
        out = tmp_path / f"out{len(extra)}"
        assert run(folder, out, *size, *extra, methods=methods, tasks=chosen) == 0
        rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert not [row["error"] for row in rows if row["error"]]
        assert {row["task"] for row in rows} == set(chosen.split(",")) and len({row["method"] for row in rows}) == 19
        assert all(row["physical_bytes"] <= row["budget_bytes"] for row in rows if row["ratio"])


def test_the_legend_of_many_methods_stays_within_the_picture():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from kvcompact_kernels.evaluation import plots

    picture = plots._figure(6.5, 5.0)
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    for number in range(16):
        axes.plot([1, 2], [number, number], label=f"expected_attention {number}")
    plots._legend(picture, axes)
    picture.draw_without_rendering()
    box = picture.legends[0].get_window_extent()
    assert 0 <= box.x0 and box.x1 <= picture.bbox.width
