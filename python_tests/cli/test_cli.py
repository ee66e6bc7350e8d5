# SPDX-License-Identifier: Apache-2.0
"""The command through ``main(argv)`` and as a process, on a tiny random model."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_folder import save_tiny_folder

import kvcompact_kernels
from kvcompact_kernels.cache import CompactCache
from kvcompact_kernels.cli import main
from kvcompact_kernels.methods import list_methods

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "a document.txt"
    path.write_text("The lantern is green. The bell rings at noon. Nobody knows why. " * 4)
    return path


@pytest.fixture(scope="module")
def cache_file(folder, document, tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "notes.kvc"
    arguments = ["compact", document, "--model", folder, "--method", "snapkv", "-O", "window=8", "--ratio", "4"]
    assert call(*arguments, "--out", path, "--dtype", "float32", "--quiet") == 0
    return path


def call(*argv):
    return main([str(a) for a in argv])


def call_json(capsys, *argv):
    capsys.readouterr()
    code = call(*argv, "--json")
    return code, json.loads(capsys.readouterr().out)


def failure(capsys, *argv):
    """Exit code and message of a call that must fail, without a traceback."""
    capsys.readouterr()
    code = call(*argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return code, captured.err


def process(*argv, **options):
    command = [sys.executable, "-m", "kvcompact_kernels.cli", *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= options.pop("env", {})
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False, **options)


def test_compact_writes_a_cache_that_ask_answers_from(capsys, folder, document, cache_file):
    cache = CompactCache.load(cache_file)
    assert cache.method == "snapkv"
    assert cache.info["options"]["window"] == 8
    assert cache.info["prompt"]["document"] == document.name
    assert cache.num_slots == -(-cache.logical_length // 4)
    code, result = call_json(capsys, "ask", cache_file, "Which colour?", "When?", "--max-new-tokens", 5, "--quiet")
    assert code == 0
    assert [a["question"] for a in result["answers"]] == ["Which colour?", "When?"]
    assert all(a["tokens"] == 5 for a in result["answers"])
    assert result["model"] == str(folder)


def test_ask_is_generate_on_the_whole_prompt_when_every_token_is_kept(capsys, folder, document, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvcompact_kernels.prompt import document_ids, prompt_format, question_ids

    path = tmp_path / "full.kvc"
    common = ("--model", folder, "--dtype", "float32", "--quiet")
    assert call("compact", document, "--method", "full", "--ratio", 1, "--out", path, *common) == 0
    code, result = call_json(capsys, "ask", path, "Which colour?", "--max-new-tokens", 12, *common)
    assert code == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    form = prompt_format(tokenizer)
    ids = document_ids(tokenizer, form, document.read_text()) + question_ids(tokenizer, form, "Which colour?")
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert result["answers"][0]["answer"] == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch):
    import transformers
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    from kvcompact_kernels.cli import common
    from kvcompact_kernels.demo import model as fetching

    class Reached(Exception):
        pass

    def load(*args, **kwargs):
        raise Reached

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def answer(error):
        monkeypatch.setattr(fetching, "ask_hub", lambda name: asked.append(name) or error)

    answer(OSError("Name or service not known"))
    with pytest.raises(common.CliError, match="'nobody/nothing'.*cannot be reached: Name or service not known"):
        common.load_model("nobody/nothing", "float32", "cpu")
    # whatever the hub says itself, or has no time to say, transformers explains
    for error in (None, HfHubHTTPError.__new__(HfHubHTTPError), TimeoutError()):
        answer(error)
        with pytest.raises(common.CliError, match="Reached"):
            common.load_model("nobody/nothing", "float32", "cpu")
    assert asked == ["nobody/nothing"] * 4
    with pytest.raises(common.CliError, match="the hub has no such names"):
        common.load_model("no name at all", "float32", "cpu")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(common.CliError, match="Reached"):
        common.load_model("nobody/nothing", "float32", "cpu")
    assert len(asked) == 4


def test_compact_result_and_plain_output(capsys, folder, document, tmp_path):
    path = tmp_path / "x.kvc"
    code, result = call_json(
        capsys,
        "compact",
        document,
        "--model",
        folder,
        "--method",
        "streaming_llm",
        "--slots",
        20,
        "--out",
        path,
        "--quiet",
    )
    assert code == 0
    assert (result["slots"], result["file_bytes"], result["file"]) == (20, path.stat().st_size, str(path))
    assert result["nbytes"] * result["ratio"] == pytest.approx(result["logical_nbytes"], rel=1e-6)
    assert os.listdir(tmp_path) == ["x.kvc"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compact", "{missing}", "--method", "snapkv", "--out", "{out}"], 1, "cannot read"),
        (["compact", "{empty}", "--method", "snapkv", "--out", "{out}"], 1, "is empty"),
        (["compact", "{binary}", "--method", "snapkv", "--out", "{out}"], 1, "not UTF-8"),
        (["compact", "{doc}", "--method", "magic", "--out", "{out}"], 2, "'magic'"),
        (["compact", "{doc}", "--method", "snapkv", "-O", "windows=3", "--out", "{out}"], 2, "'windows'"),
        (["compact", "{doc}", "--method", "snapkv", "-O", "window=0", "--out", "{out}"], 2, "window"),
        (["compact", "{doc}", "--method", "snapkv", "-O", "window", "--out", "{out}"], 2, "NAME=VALUE"),
        (["compact", "{doc}", "--method", "still", "-O", "weights={missing}", "--out", "{out}"], 1, "no file"),
        (["compact", "{doc}", "--method", "still", "-O", "weights={doc}", "--out", "{out}"], 1, "truncated or damaged"),
        (["compact", "{doc}", "--method", "snapkv", "-O", "shares={missing}", "--out", "{out}"], 1, "no file"),
        (["compact", "{doc}", "--method", "snapkv", "-O", "shares={folder}", "--out", "{out}"], 1, "is a folder"),
        (["compact", "{doc}", "--method", "snapkv", "-O", "shares={doc}", "--out", "{out}"], 1, "is damaged"),
        (["compact", "{doc}", "--method", "snapkv", "-O", "shares={cache}", "--out", "{out}"], 1, "not a kvcompact"),
        (["compact", "{doc}", "--method", "snapkv", "-O", "shares=3", "--out", "{out}"], 2, "shares must be a path"),
        (["compact", "{doc}", "--method", "snapkv", "--plugin", "{missing}", "--out", "{out}"], 1, "no such file"),
        (["compact", "{doc}", "--method", "minicache", "--out", "{out}"], 1, "fewer than two to pair"),
        (["compact", "{doc}", "--method", "snapkv", "--ratio", "0.5", "--out", "{out}"], 2, "--ratio"),
        (["compact", "{doc}", "--method", "snapkv", "--ratio", "nan", "--out", "{out}"], 2, "--ratio"),
        (["compact", "{doc}", "--method", "snapkv", "--slots", "0", "--out", "{out}"], 2, "--slots"),
        (["compact", "{doc}", "--method", "snapkv", "--slots", "9999", "--out", "{out}"], 1, "9999 slots"),
        (["compact", "{doc}", "--method", "snapkv", "--out", "{missing}/x"], 1, "does not exist"),
        (["compact", "{doc}", "--method", "snapkv", "--out", "{folder}"], 1, "is a folder"),
        (["compact", "{doc}", "--method", "snapkv", "--out", "{out}", "--model", "{missing}"], 1, "no model folder"),
        (["compact", "{doc}", "--method", "snapkv", "--out", "{out}", "--model", "nowhere/"], 1, "no model folder"),
        (["compact", "{doc}", "--method", "snapkv", "--out", "{out}", "--model", "{tmp}"], 1, "config.json"),
        (["compact", "{doc}", "--method", "snapkv", "--out", "{out}", "--device", "tpu9"], 2, "--device"),
        (
            ["compact", "{doc}", "--method", "snapkv", "--ratio", "2", "--slots", "9", "--out", "{out}"],
            2,
            "not allowed",
        ),
        (["ask", "{missing}", "Why?"], 1, "no file"),
        (["ask", "{doc}", "Why?"], 1, "truncated or damaged"),
        (["ask", "{folder}", "Why?"], 1, "is a folder"),
        (["ask", "{cache}", " "], 2, "empty"),
        (["ask", "{cache}", "Why?", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["ask", "{cache}"], 2, "QUESTION"),
        (["methods", "magic"], 2, "'magic'"),
        (
            ["train", "still", "--data", "{doc}", "--out", "{out}", "-O", "x=1"],
            2,
            "train still: --option: StillOptions has",
        ),
        (["train", "still", "--data", "{doc}", "--out", "{out}", "-C", "x=1"], 2, "its fields are: slots, "),
        (["train", "selector", "--data", "{doc}", "--out", "{out}", "-O", "x=1"], 2, "no field 'x'; its fields are: "),
        (["train", "selector", "--data", "{doc}", "--out", "{out}", "-C", "x=1"], 2, "SelectorConfig has no field 'x'"),
        (["train", "kv_distill", "--data", "{doc}", "--out", "{out}", "-O", "x=1"], 2, "KVDistillOptions has no field"),
        (["train", "kv_distill", "--data", "{doc}", "--out", "{out}", "-C", "x=1"], 2, "DistillerConfig has no field"),
        (["train", "shares", "--data", "{doc}", "--out", "{out}", "-O", "x=1"], 2, "SharesOptions has no field 'x'"),
        (["demo", "--methods", "magic"], 2, "'magic'"),
        (["demo", "--ratios", "2,x"], 2, "--ratios"),
        (["demo", "--ratios", "0"], 2, "--ratios"),
        (["bench", "--quick", "--slots", "0"], 2, "--slots"),
        ([], 2, "COMMAND"),
        (["fly"], 2, "fly"),
    ],
)
def test_mistakes(capsys, folder, document, cache_file, tmp_path, arguments, code, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    places = {
        "missing": tmp_path / "missing",
        "empty": tmp_path / "empty.txt",
        "binary": tmp_path / "binary.txt",
        "doc": document,
        "cache": cache_file,
        "out": tmp_path / "out.kvc",
        "folder": folder,
        "tmp": tmp_path,
    }
    arguments = [a.format(**places) for a in arguments]
    if arguments[:1] == ["compact"] and "--model" not in arguments:
        arguments += ["--model", str(folder)]
    found, text = failure(capsys, *arguments)
    assert (found, message in text) == (code, True), text
    assert not (tmp_path / "out.kvc").exists()


def test_an_error_is_json_too(capsys, tmp_path):
    code, result = call_json(capsys, "ask", tmp_path / "missing", "Why?")
    assert code == 1
    assert "no file" in result["error"]


def test_unsupported_family(capsys, document, tmp_path):
    import transformers
    from tiny_folder import tiny_tokenizer

    config = transformers.GPT2Config(vocab_size=261, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    code, text = failure(
        capsys,
        "compact",
        document,
        "--method",
        "snapkv",
        "--model",
        tmp_path / "gpt2",
        "--out",
        tmp_path / "x",
        "--quiet",
    )
    assert code == 1
    assert "gpt2" in text and "llama" in text.lower()


def test_damaged_and_foreign_caches(capsys, cache_file, tmp_path):
    whole = cache_file.read_bytes()
    (tmp_path / "short.kvc").write_bytes(whole[: len(whole) // 2])
    code, text = failure(capsys, "ask", tmp_path / "short.kvc", "Why?")
    assert code == 1 and "damaged" in text
    other = save_tiny_folder(tmp_path / "other", seed=5)
    code, text = failure(capsys, "ask", cache_file, "Why?", "--model", other, "--quiet")
    assert code == 1 and str(cache_file) in text


def test_ask_does_not_fetch_a_model_that_a_file_names(capsys, cache_file, tmp_path, monkeypatch):
    from dataclasses import replace

    cache = CompactCache.load(cache_file)
    for stored, message in (("/no/such/model", "not there"), ("someone/else", "could not load"), (7, "pass --model")):
        note = {**cache.info["prompt"], "model": stored}
        path = tmp_path / "named.kvc"
        replace(cache, info={**cache.info, "prompt": note}).save(path)
        code, text = failure(capsys, "ask", path, "Why?", "--quiet")
        assert code in (1, 2) and message in text


def test_full_disk(capsys, folder, document, tmp_path, monkeypatch):
    def no_space(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(CompactCache, "save", no_space)
    out = tmp_path / "x.kvc"
    code, text = failure(
        capsys, "compact", document, "--model", folder, "--method", "full", "--ratio", 1, "--out", out, "--quiet"
    )
    assert code == 1 and "No space left" in text


def test_methods_says_what_every_option_is(capsys):
    for name in list_methods():
        code, result = call_json(capsys, "methods", name)
        assert code == 0
        options = result["methods"][0]["options"]
        assert all(o["help"].strip() for o in options), name
        assert call("methods", name) == 0
        out = capsys.readouterr().out.splitlines()
        assert all(any(line.split()[:1] == [o["name"]] for line in out[3:]) for o in options)
        assert max(map(len, out[3:]), default=0) <= 112


def test_methods_lists_the_registry(capsys):
    code, result = call_json(capsys, "methods")
    assert code == 0
    assert [m["name"] for m in result["methods"]] == list(list_methods())
    assert all(m["summary"] and m["source"] for m in result["methods"])
    assert call("methods", "snapkv") == 0
    text = capsys.readouterr().out
    assert "window=32" in text and "h2o" not in text


def test_doctor(capsys):
    code, result = call_json(capsys, "doctor")
    assert code == 0
    assert result["packages"]["torch"] == torch.__version__
    assert set(result["backends"]) == {"compact_attention", "key_scores", "still_cross_attention", "pack_slots"}
    assert result["cuda_library"]["usable"] != bool(result["cuda_library"]["reason"])
    for cases in result["backends"].values():
        for found in cases.values():
            assert found["chosen"] and found["chosen"] not in found["others"]
    assert call("doctor") == 0
    text = capsys.readouterr().out
    assert "compact_attention:" in text and torch.__version__ in text


def test_doctor_tells_of_a_broken_library(capsys, monkeypatch):
    from kvcompact_kernels.backends.cpu import library

    monkeypatch.setattr(library, "available", lambda: (False, "it is broken"))
    code, result = call_json(capsys, "doctor")
    assert code == 0 and result["native_library"]["reason"] == "it is broken"
    code, result = call_json(capsys, "doctor", "--strict")
    assert code == 1 and "it is broken" in result["error"]


def test_bench_quick(capsys):
    code, result = call_json(capsys, "bench", "--quick", "--slots", 64)
    assert code == 0
    assert {r["backend"] for r in result["rows"]} >= {"torch"}
    assert all(r["microseconds"] > 0 for r in result["rows"])


def test_version_and_help(capsys):
    assert call("--version") == 0
    assert kvcompact_kernels.__version__ in capsys.readouterr().out
    for command in ("demo", "compact", "ask", "methods", "doctor", "bench"):
        assert call(command, "--help") == 0
        assert "exit codes" in capsys.readouterr().out


def test_interrupt_is_130(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvcompact_kernels.methods.list_methods", interrupted)
    code, text = failure(capsys, "methods")
    assert code == 130 and "interrupted" in text


def test_as_a_process(folder, document, tmp_path):
    out = tmp_path / "p.kvc"
    done = process(
        "compact", "-", "--model", folder, "--method", "h2o", "--out", out, "--json", input=document.read_text()
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "h2o"
    assert "tokens" in done.stderr
    done = process("ask", out, "Why?", "--max-new-tokens", "3", "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    done = process("ask", tmp_path / "missing", "Why?")
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m kvcompact_kernels.cli methods | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
def test_ctrl_c_while_a_library_is_imported(handler, tmp_path):
    """The library swallows the exception, as C modules that import others do; where SIGINT is ignored it stays so."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    sum(range(99))\n"
        "except KeyboardInterrupt:\n    pass\nprint('went on')\nraise SystemExit(5)\n"
    )
    run = f"import signal, sys; signal.signal(signal.SIGINT, signal.{handler}); "
    run += "from kvcompact_kernels.cli import main; sys.exit(main(['methods']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    command = [sys.executable, "-c", run]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    wanted = (130, "") if handler == "default_int_handler" else (5, "went on\n")
    assert (done.returncode, done.stdout) == wanted and "Traceback" not in done.stderr


def test_ctrl_c_in_the_demo_keeps_the_rows(folder, tmp_path):
    """The process gets SIGINT once rows are on disk: it ends with 130 and they, and the picture, are there."""
    out = tmp_path / "out"
    # a shell's background jobs ignore SIGINT, and what they start inherits that
    run = "import signal, sys; from kvcompact_kernels.cli import main; "
    run += "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "demo", "--model", str(folder), "--out", str(out)]
    command += ["--tokens", "700", "--needles", "2", "--methods", "full,snapkv", "--dtype", "float32"]
    command += ["--ratios", ",".join(f"{2 + i / 100:.2f}" for i in range(800))]  # more than it can do meanwhile
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 90
        rows = 0
        while rows < 4 and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.1)
            if (out / "results.csv").exists():
                rows = len((out / "results.csv").read_text().splitlines())
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "Interrupted" in stdout
    saved = json.loads((out / "results.json").read_text())
    assert not saved["complete"] and len(saved["rows"]) >= 3
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
