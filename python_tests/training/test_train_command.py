# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train still`` from end to end, and what stops it."""

import errno
import json
import os
import signal

import pytest
from tiny_folder import save_tiny_folder

from kvcompact_kernels.cli import main
from kvcompact_kernels.methods.still import StillCompactor
from kvcompact_kernels.training import checkpoint
from kvcompact_kernels.training.still import StillTrainer

TEXT = " ".join(f"Sentence number {i} says that the bell rings {i * 7} times." for i in range(120))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("some texts")
    (path / "one.txt").write_text(TEXT)
    (path / "two.md").write_text(TEXT.upper())
    return path


def train_still(folder, data, out, *more):
    small = [
        "--dtype",
        "float32",
        "--ratio",
        "4",
        "--context",
        "240,160",
        "--steps",
        "3",
        "--warmup",
        "1",
        "--accumulate",
        "1",
        "--evaluate-every",
        "3",
    ]
    options = [
        "-O",
        "tails=2",
        "-O",
        "continuation=12",
        "-O",
        "questions=2",
        "-O",
        "held_out=0.2",
        "-O",
        "held_out_contexts=1",
        "-C",
        "num_blocks=1",
    ]
    fixed = ["train", "still", "--model", folder, "--data", data, "--out", out, *small, *options]
    return main([str(a) for a in (*fixed, *more)])


def test_train_still_makes_a_compactor_that_the_method_takes(capsys, folder, data, tmp_path):
    out = tmp_path / "c.safetensors"
    assert train_still(folder, data, out, "--json", "--quiet") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == "" and result["step"] == 3 and result["finished"] and result["slots"] == 15
    assert result["held_out"]["kl"] > 0 and result["chunk_tokens"] == {"4": 60}
    assert sorted(path.suffix for path in (tmp_path / "c.safetensors.run").iterdir() if path.stem != "checkpoint-00000003") == [
        ".json", ".jsonl", ".jsonl", ".safetensors",
    ]  # fmt: skip
    assert StillCompactor.load(out).config.num_blocks == 1
    document = tmp_path / "d.txt"
    document.write_text("a" * 174)
    weights = f"weights={json.dumps(str(out))}"
    arguments = ["compact", document, "--model", folder, "--method", "still", "-O", weights, "-O", "chunk=60"]
    assert main([str(a) for a in (*arguments, "--slots", 45, "--out", tmp_path / "d.kvc", "--quiet")]) == 0
    capsys.readouterr()
    # the same command again has nothing to do; other options are refused by name
    assert train_still(folder, data, out, "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["loss"] is None
    assert train_still(folder, data, out, "--lr", "1", "--quiet") == 1
    assert "loop.lr was 0.0003, now 1.0" in capsys.readouterr().err


def test_ctrl_c_saves_ends_with_130_and_the_command_goes_on(capsys, folder, data, tmp_path, monkeypatch):
    real = StillTrainer.__call__

    def interrupted(self, step):
        if step.index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step)

    monkeypatch.setattr(StillTrainer, "__call__", interrupted)
    out = tmp_path / "c"
    assert train_still(folder, data, out) == 130
    error = capsys.readouterr().err
    assert "interrupted after step 2 of 3" in error and "Traceback" not in error and not out.exists()
    monkeypatch.undo()
    assert train_still(folder, data, out, "--json", "--quiet") == 0
    cut = json.loads(capsys.readouterr().out)
    assert train_still(folder, data, tmp_path / "whole", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["held_out"] == cut["held_out"]


def test_a_full_disk_is_said_plainly(capsys, folder, data, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    assert train_still(folder, data, tmp_path / "c", "--quiet") == 1
    error = capsys.readouterr().err
    assert "could not write the checkpoint of step 3" in error and "No space left" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "more,code,words",
    [
        (["--ratio", "0.5"], 2, "at least 1"),
        (["--steps", "0"], 2, "steps must be >= 1"),
        (["-O", "poems=1"], 2, "poems"),
        (["--slots", "200"], 1, "more than the 240 of the longest context"),
        (["--context", "4k"], 1, "give more text, shorter contexts"),
        (["--data", "nowhere"], 1, "there is no file or folder nowhere"),
        (["--out", "no/such/folder/c"], 1, "does not exist"),
        (["--start", "nothing"], 2, "--start comes without --slots and --config"),
    ],
)
def test_bad_input(capsys, folder, data, tmp_path, more, code, words):
    found = train_still(folder, data, tmp_path / "c", "--quiet", *more)
    error = capsys.readouterr().err
    assert (found, "Traceback" in error) == (code, False) and words in error


def test_an_empty_folder(capsys, folder, tmp_path):
    assert train_still(folder, tmp_path, tmp_path / "c", "--quiet") == 1
    assert "holds no .txt or .md file" in capsys.readouterr().err
