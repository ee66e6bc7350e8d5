# SPDX-License-Identifier: Apache-2.0
"""Bytes of a CUDA device that were asked of PyTorch's allocator, to the byte."""

import torch


def requested_bytes(which: str = "current") -> int:
    """Bytes of the current device that tensors hold now, or with ``"peak"`` the most at once since
    ``torch.cuda.reset_peak_memory_stats()``.

    ``torch.cuda.memory_allocated`` counts the allocator's blocks instead, and one that is used again may be larger than what
    is asked of it, by up to 1 MiB.
    """
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]
