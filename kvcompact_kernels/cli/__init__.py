# SPDX-License-Identifier: Apache-2.0
"""The ``kvcompact`` command."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command with ``argv`` (default: the process's arguments) and returns its exit code."""
    try:
        from .app import main as run

        return run(argv)
    except KeyboardInterrupt:  # while modules are imported
        return 130
