# SPDX-License-Identifier: Apache-2.0
"""Entry point: the parser, and what an outcome means for the exit code."""

import argparse
import json
import os
import signal
import sys
import threading
from typing import Any

from ..version import __version__
from . import ask, bench, compact, demo, doctor, methods, train
from . import eval as evaluate
from .common import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, CliError, UsageError, say

COMMANDS = (demo, compact, ask, evaluate, train, methods, doctor, bench)
EPILOG = "exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C)"


def build_parser() -> argparse.ArgumentParser:
    """The parser with one subparser per module of :data:`COMMANDS`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="machine-readable result on stdout (messages on stderr)")
    common.add_argument("--quiet", action="store_true", help="no messages and no progress bars")
    parser = argparse.ArgumentParser(
        prog="kvcompact", description="Compact the KV cache of a long document, and ask questions of it.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"kvcompact-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        sub = commands.add_parser(
            module.NAME,
            parents=[common],
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; every outcome ends here as an exit code, never as a traceback for a user's mistake."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse: --help, --version and wrong usage
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    try:
        _import_torch()
        result, code = args.run(args), EXIT_OK
    except KeyboardInterrupt:
        result, code = _failed(args, "interrupted"), EXIT_INTERRUPTED
    except CliError as error:
        result = {**error.result, **_failed(args, str(error))}
        code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILURE
    except BrokenPipeError:
        return _pipe_closed()
    try:
        if args.json:
            print(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
        sys.stdout.flush()
    except BrokenPipeError:
        return _pipe_closed()
    return code


def _import_torch() -> None:
    """Imports what every command needs; Ctrl-C ends the process at once meanwhile.

    Modules in C swallow a KeyboardInterrupt while they import others: the command would go on, or break somewhere later.
    """
    if "torch" in sys.modules or threading.current_thread() is not threading.main_thread():
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as in a shell's background jobs, or the caller's own
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    try:
        import torch  # noqa: F401
    finally:
        signal.signal(signal.SIGINT, before)


def _failed(args: argparse.Namespace, message: str) -> dict[str, Any]:
    say(f"kvcompact {' '.join(filter(None, (args.command, getattr(args, 'kind', None))))}: {message}")
    return {"error": message}


def _pipe_closed() -> int:
    """The reader of stdout has gone (``| head``); the interpreter must not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK
