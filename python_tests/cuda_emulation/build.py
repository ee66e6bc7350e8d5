# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources as C++ against the emulation of this folder."""

import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("c++")


def compile_emulated(source: Path, library: Path, *, with_torch: bool = True) -> Path:
    """Builds ``source`` (a ``.cu`` or ``.cpp`` of csrc or of this folder) into the shared ``library``."""
    # Fortified longjmp refuses to change stacks, which is what fibers do.
    command = [COMPILER, "-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    link = []
    if with_torch:
        torch_folder = Path(torch.__file__).parent
        command += ["-DTORCH_TARGET_VERSION=0x020A000000000000", "-isystem", str(torch_folder / "include")]
        link = ["-Wl,--no-as-needed", f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu"]
    command += ["-x", "c++", str(source), "-x", "none", "-o", str(library), *link]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")
    return library
