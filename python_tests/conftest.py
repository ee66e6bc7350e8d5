# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: helper modules of this folder can be imported; tests marked gpu need one."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
MOST_KEPT = 1 << 30  # bytes


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_runtest_setup(item):
    """After an illegal access every call fails that needs the GPU: another process goes on, where there are several."""
    if "gpu" not in item.keywords or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # xdist says that this test ended the process, and starts a new one
        else:
            pytest.exit(f"the CUDA context is lost: {error}", returncode=1)


def pytest_runtest_teardown(item):
    """Several processes test on one GPU: none keeps for itself what a large test has needed."""
    if "gpu" in item.keywords and torch.cuda.is_available() and torch.cuda.memory_reserved() > MOST_KEPT:
        torch.cuda.empty_cache()
