# SPDX-License-Identifier: Apache-2.0
"""Loading of the native library ``_C_cuda.so``, where torch has CUDA."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ..cpu import library as cpu_library

LIBRARY_PATH = Path(__file__).resolve().parents[2] / "_C_cuda.so"


@functools.cache
def available() -> tuple[bool, str]:
    """Load ``_C_cuda.so`` once; return ``(True, "")``, or ``(False, reason)`` when it cannot be used here."""
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} was built without CUDA"
    usable, reason = cpu_library.available()  # it holds the schemas
    if not usable:
        return False, reason
    if not LIBRARY_PATH.exists():
        return False, (
            f"{LIBRARY_PATH} does not exist: build it with nvcc, `KVCOMPACT_CUDA=1 python setup.py build_ext --inplace`"
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return False, f"{LIBRARY_PATH} does not load with torch {torch.__version__}: {error}"
    return True, ""


def runs_on(code: str, major: int, minor: int) -> bool:
    """Whether one of ``"sm_80+sm_90a+compute_80"`` runs on a GPU of compute capability ``major.minor``.

    Machine code (``sm_*``) runs within its major version, from its own minor version on; PTX (``compute_*``), which the
    driver compiles, on its own version and all later ones; what is named with an ``a`` on its own version alone.
    """
    for part in code.split("+"):
        kind, arch = part.split("_")
        built = divmod(int(arch.rstrip("af")), 10)
        if arch.endswith("a"):
            fits = (major, minor) == built
        elif kind == "compute" and not arch.endswith("f"):
            fits = (major, minor) >= built
        else:
            fits = major == built[0] and minor >= built[1]
        if fits:
            return True
    return False


@torch.compiler.assume_constant_result  # whether a file loads is not for Dynamo to trace
def missing() -> str | None:
    """None when the library is loaded, else the reason why it is not."""
    return available()[1] or None
