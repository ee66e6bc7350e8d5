# SPDX-License-Identifier: Apache-2.0
"""What the subcommands share: errors, messages, loading a model, parsing a method's options."""

import argparse
import hashlib
import json
import logging
import os
import runpy
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
DEMO_MODEL = "demo"


class CliError(Exception):
    """A failure that is explained in its message; exit code 1. ``result`` is what there is in spite of it."""

    def __init__(self, message: str, result: dict[str, Any] | None = None):
        super().__init__(message)
        self.result = result or {}


class UsageError(CliError):
    """The command line asks for something that does not exist; exit code 2."""


def say(line: str = "") -> None:
    """A message for people: on stderr, for stdout may carry JSON."""
    print(line, file=sys.stderr, flush=True)


def reporter(args: argparse.Namespace):
    """``say``, or nothing with --quiet."""
    return (lambda line="": None) if args.quiet else say


@contextmanager
def explained(*errors: type[BaseException], prefix: str = ""):
    """Turns the library's own errors about wrong input into a CliError with the same message."""
    try:
        yield
    except CliError:
        raise
    except errors as error:
        text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
        raise CliError(f"{prefix}{text or type(error).__name__}") from error


@contextmanager
def usage_errors():
    """Turns refused options into a UsageError, and a file that an option names and that cannot be used into a CliError."""
    from .._checks import BadFileError

    try:
        with explained(OSError, BadFileError):
            yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and where they came from."""

    model: Any
    tokenizer: Any
    path: str
    source: str
    dtype_note: str


def add_model_arguments(parser: argparse.ArgumentParser, default: str | None = DEMO_MODEL) -> None:
    """--model, --dtype, --device."""
    fallback = f"default {default!r}" if default else "default: the one that the file was made with"
    parser.add_argument(
        "--model",
        default=default,
        metavar="M",
        help=f"a model folder, a name on the hub, or 'demo' (SmolLM2-135M-Instruct, fetched when needed); {fallback}",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model; auto takes what this machine multiplies faster",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU when torch has one")


def pick_device(name: str) -> str:
    """The device to use.

    Raises:
        UsageError: torch does not know it, or cannot use it here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def pick_dtype(name: str, device: str) -> tuple[Any, str]:
    """The dtype to load a model in, and why."""
    import torch

    if name != "auto":
        return getattr(torch, name), f"{name} (asked for)"
    if device != "cpu":
        return torch.bfloat16, "bfloat16"
    from .speed import matmul_seconds

    single, half = matmul_seconds(torch.float32), matmul_seconds(torch.bfloat16)
    dtype = torch.bfloat16 if half < single else torch.float32
    faster = max(single, half) / min(single, half)
    return dtype, f"{str(dtype).removeprefix('torch.')} (matrix products are {faster:.1f}x faster than in the other)"


def load_model(
    name: str, dtype: str = "auto", device: str = "auto", *, quiet: bool = False, local_only: bool = False
) -> Loaded:
    """Loads a model and its tokenizer; weights are read from safetensors only, and no code that comes with a model runs.

    Args:
        name: a folder, a hub name, or "demo".
        local_only: never ask the hub.

    Raises:
        CliError: there is no such model, or it cannot be read.
    """
    device = pick_device(device)
    source = name
    if name == DEMO_MODEL:
        from ..demo.model import ModelFetchError, fetch_demo_model

        with explained(ModelFetchError, OSError):
            fetched = fetch_demo_model(say if not quiet else lambda line: None)
        name, source = str(fetched.path), fetched.source
    elif os.path.sep in name and (name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") != 1):
        name = str(Path(name).expanduser())
        if not os.path.isdir(name):
            raise CliError(f"there is no model folder {name}")
    if os.path.isdir(name):
        name = os.path.abspath(name)
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise CliError(f"{name} is not a model folder: it holds no config.json")
        local_only = True
    if not local_only:
        _check_hub(name)
    quieten_libraries()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch_dtype, note = pick_dtype(dtype, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_only)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch_dtype, local_files_only=local_only, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError) as error:
        text = " ".join(str(error).split())
        raise CliError(f"could not load the model {name!r}: {text[:400]}") from error
    except Exception as error:  # a damaged weight file raises safetensors' own error
        raise CliError(f"could not load the model {name!r}: {type(error).__name__}: {error}") from error
    return Loaded(model.to(device).eval(), tokenizer, name, source, note)


def _check_hub(name: str) -> None:
    """Raises CliError for a name that is not in the hub's cache while no connection to the hub can be made.

    Its client would try again, file by file, for most of a minute. Whatever the hub answers is left to the client to explain.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from ..demo.model import ask_hub

    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError as error:
        raise CliError(f"there is no model folder {name!r}, and the hub has no such names: {error}") from error
    error = ask_hub(name)
    if error is not None and not isinstance(error, (HfHubHTTPError, TimeoutError)):
        raise CliError(
            f"there is no model folder {name!r}, it is not in the hub's cache, and the hub cannot be reached: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def quieten_libraries() -> None:
    """Keeps transformers' bars and advice off the terminal; errors are still raised."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")


def read_text(path: str) -> str:
    """The text of a UTF-8 file, or of stdin for "-".

    Raises:
        CliError: missing, unreadable, not UTF-8 text, or empty.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CliError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error
    if not text.strip():
        raise CliError(f"{path} is empty")
    return text


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``["window=64", "pooling=max"]`` as keyword arguments; values are JSON where they parse as JSON, else strings.

    Raises:
        UsageError: an entry without "=".
    """
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--option takes NAME=VALUE, got {pair!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return options


def check_fields(cls: type, pairs: list[str], flag: str) -> dict[str, Any]:
    """What :func:`parse_options` makes of ``pairs``, for fields of a dataclass.

    Raises:
        UsageError: an entry without "=", or of another name.
    """
    options, known = parse_options(pairs), [f.name for f in fields(cls) if f.init]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UsageError(f"{flag}: {cls.__name__} has no field {unknown[0]!r}; its fields are: {', '.join(known)}")
    return options


def make_method(name: str, options: dict[str, Any]) -> Any:
    """The method with its options.

    Raises:
        UsageError: an unknown method or option, or a value that the method refuses.
        CliError: a file that an option names is missing or damaged.
    """
    from ..methods import get_method

    with usage_errors():
        return get_method(name, **options)


def add_plugin_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """--plugin."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help=f"a Python file that registers {what} (repeatable)",
    )


def run_plugins(args: argparse.Namespace) -> list[dict[str, str]]:
    """Runs the user's files; returns their names and digests.

    Raises:
        CliError: a file is missing, or fails.
    """
    return [_run_plugin(given) for given in args.plugin]


def _run_plugin(given: str) -> dict[str, str]:
    path = Path(given)
    if not path.is_file():
        raise CliError(f"--plugin {given}: there is no such file")
    try:
        runpy.run_path(str(path), run_name=f"kvcompact_plugin_{path.stem}")
    except Exception as error:  # it is the user's own program
        raise CliError(f"--plugin {given}: {type(error).__name__}: {error}") from error
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def plain_table(header: list[str], rows: list[list[str]], right: set[int] = frozenset()) -> str:
    """Rows under a header, columns padded with blanks; the columns in ``right`` are aligned right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def pad(line: list[str]) -> str:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))]
        return "  ".join(cells).rstrip()

    return "\n".join([pad(header), "  ".join("-" * w for w in widths), *map(pad, rows)])


def bytes_text(count: float) -> str:
    """A number of bytes in KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
