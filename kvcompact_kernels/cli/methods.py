# SPDX-License-Identifier: Apache-2.0
"""``kvcompact methods``: what ``--method`` takes."""

import argparse
import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from typing import Any

from .common import UsageError, add_plugin_argument, run_plugins

NAME = "methods"
HELP = "list the compaction methods, their options and sources"
DESCRIPTION = "Lists every registered compaction method."


_SHARES = (
    "file of kvcompact train shares: each KV head gets as many slots as it was measured to need; None: equal numbers."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", nargs="?", help="only this one, and what its options are")
    add_plugin_argument(parser, "methods")


def describe(cls: type) -> dict[str, Any]:
    """A method's name, summary, source and options with their help (a default of None means that there is none or that it is None)."""
    from ..methods.base import SHARES

    said, options = _attributes(cls), []
    for field in fields(cls):
        if field.init:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
            options.append(
                {
                    "name": field.name,
                    "type": kind,
                    "required": default is MISSING,
                    "default": None if default is MISSING else _plain(default),
                    "help": said.get(field.name, ""),
                }
            )
    if cls.separate_heads:
        options.append({"name": SHARES, "type": "str | None", "required": False, "default": None, "help": _SHARES})
    return {"name": cls.name, "summary": cls.summary, "source": cls.source, "options": options}


def _attributes(cls: type) -> dict[str, str]:
    """What the docstrings of the class and its bases say of its fields, under "Attributes:"."""
    found = {}
    for one in reversed(cls.__mro__):
        text = inspect.cleandoc(one.__dict__.get("__doc__") or "").partition("Attributes:\n")[2]
        for names, words in re.findall(r"^    ([\w, ]+): (.*(?:\n {8,}.*)*)", text, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(words.replace("``", "").split()))
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..methods import list_methods

    run_plugins(args)
    known = list_methods()
    if args.method is not None and args.method not in known:
        raise UsageError(f"there is no method {args.method!r}; there are: {', '.join(known)}")
    found = [describe(cls) for name, cls in known.items() if args.method in (None, name)]
    if not args.json:
        for entry in found:
            print(f"{entry['name']}: {entry['summary']}")
            print(f"    source:  {entry['source']}")
            options = [o["name"] if o["required"] else f"{o['name']}={o['default']!r}" for o in entry["options"]]
            print(f"    options: {', '.join(options) or 'none'}")
            if args.method is not None:
                width = max((len(o["name"]) for o in entry["options"]), default=0)
                for o in entry["options"]:
                    print(
                        textwrap.fill(
                            o["help"],
                            112,
                            initial_indent=f"      {o['name']:{width}}  ",
                            subsequent_indent=" " * (8 + width),
                        )
                    )
    return {"methods": found}
