# SPDX-License-Identifier: Apache-2.0
"""``kvcompact train cartridge`` on a tiny random model."""

import json

import pytest
from tiny_folder import save_tiny_folder

from kvcompact_kernels import CompactCache
from kvcompact_kernels.cli import main
from kvcompact_kernels.head_shares import HeadShares

TEXT = "The lantern is green. The bell rings at noon. Nobody knows why. Seven ships left. " * 3
OTHER = "A baker sold bread to the king. He was paid in salt and in wool. The king was tall. " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def test_the_command_from_a_text_to_an_answer(folder, tmp_path, capsys):
    document = tmp_path / "my notes.txt"
    document.write_text(TEXT)
    out = tmp_path / "notes.kvc"
    command = ["train", "cartridge", document, "--model", folder, "--out", out, "--slots", 40, "--dtype", "float32"]
    command += ["--steps", 6, "--conversations", 8, "--held-out", 2, "--request-tokens", 5, "--answer-tokens", 5]
    command += ["--chunk-tokens", 100, "--batch-tokens", 300, "--quiet", "--json", "--evaluate-every", 3]
    command = [str(part) for part in command]
    assert main(command) == 0
    (entry,) = json.loads(capsys.readouterr().out)["cartridges"]
    assert entry["document"] == "my_notes" and entry["steps"] == 6 and entry["evaluation"]["kl"] > 0
    assert entry["file_bytes"] == out.stat().st_size
    assert main(["ask", str(out), "Which colour?", "--max-new-tokens", "3", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "cartridge"
    others = tmp_path / "others.json"
    HeadShares(((1.0, 2.0),), {"family": "qwen2"}).save(others)
    assert main([*command, "--lr", "0.5"]) == 1
    assert "loop.lr was 0.02, now 0.5" in capsys.readouterr().err
    for extra, code, words in [
        (["--slots", "4000"], 1, "fewer than the 4000 slots"),
        (["--init", "magic"], 2, "method must be one of"),
        (["--init", "cartridge:file=nowhere.kvc"], 1, "there is no file nowhere.kvc"),
        (["--init", "self_study:weights=nowhere"], 1, "there is no file nowhere"),
        (["--init", "self_study:weight=x"], 2, "init 'self_study' has the options weights and shares; got weight"),
        (["--init", "self_study:shares=nowhere"], 1, "there is no file nowhere"),
        (["--init", f"self_study:shares={document}"], 1, "is damaged, or holds no shares of slots"),
        (["--init", f"self_study:shares={others}"], 1, f"shares {others} was made for another model"),
        (["--kinds", "question,riddle"], 2, "kinds must be some of 'structuring'"),
        (["--short-answers", "2"], 2, "short_answers must be in [0, 1.0], got 2.0"),
        (["--layer-steps", "5"], 2, "init 'cartridge' reads the first tokens only: give another init"),
        (["--distractors", "0.5"], 1, "one document alone has none"),
        (["--reposition"], 2, "give --distractors or --distractor"),
        (["--memory-gb", "-1"], 2, "--memory-gb"),
    ]:
        assert main([*command, *extra]) == code
        assert words in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "none.txt"), *command[3:]]) == 1
    assert "none.txt" in capsys.readouterr().err


def test_the_command_on_several_documents(folder, tmp_path, capsys):
    paths = []
    for i, text in enumerate((TEXT, OTHER)):
        (tmp_path / str(i)).mkdir()
        paths.append(tmp_path / str(i) / "same.txt")
        paths[-1].write_text(text)
    command = ["train", "cartridge", *paths, "--model", folder, "--out", tmp_path / "all", "--slots", 40, "--steps", 2]
    command += ["--conversations", 6, "--held-out", 1, "--request-tokens", 4, "--answer-tokens", 4, "--quiet"]
    command += ["--chunk-tokens", 100, "--dtype", "float32", "--distractors", 0.5, "--reposition"]
    command += ["--init", "self_study", "--layer-steps", 3]
    assert main([str(part) for part in command]) == 0
    config = CompactCache.load(tmp_path / "all" / "same.kvc").info["training"]["config"]
    assert config["distractors"] == 0.5 and config["reposition"] is True
    assert config["layer_steps"] == 3
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"same.kvc", "same-2.kvc"}
    assert "same-2.kvc: " in capsys.readouterr().out
