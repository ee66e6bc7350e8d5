# SPDX-License-Identifier: Apache-2.0
"""What ``kvcompact doctor`` tells about a GPU, and about why there is none."""

from types import SimpleNamespace

import pytest
import torch

from kvcompact_kernels.backends.triton import runtime
from kvcompact_kernels.cli import doctor


@pytest.fixture
def hopper(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        total_memory=80 << 30,
        multi_processor_count=132,
        shared_memory_per_block_optin=227 * 1024,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    caches = (runtime.arch_name, runtime.device_problem)
    for cache in caches:
        cache.cache_clear()
    yield properties
    for cache in caches:
        cache.cache_clear()


def test_a_gpu_and_the_table_of_its_kernels(hopper, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "triton_problem", lambda: None)
    found = doctor._gpus()[0]
    assert (found["kernel_table"], found["triton_kernels"], found["multiprocessors"]) == ("sm90.json", "run", 132)
    monkeypatch.setattr(runtime, "CONFIGS", tmp_path)
    (tmp_path / "nvidia_h100_80gb_hbm3.json").write_text("{}")
    runtime.arch_name.cache_clear()
    assert doctor._gpus()[0]["kernel_table"] == "nvidia_h100_80gb_hbm3.json"


@pytest.mark.parametrize(
    ("major", "kib", "table"),
    [
        (9, 227, "sm90"),
        (9, 226, "sm80"),
        (8, 163, "sm80"),
        (8, 162, "sm89"),
        (8, 99, "sm89"),
        (10, 227, "sm100"),
        (10, 226, "sm80"),
        (11, 227, "sm80"),
        (12, 99, "sm120"),
        (12, 163, "sm80"),
        (13, 99, "sm89"),
    ],
)
def test_the_table_fits_the_version_and_the_shared_memory(hopper, monkeypatch, major, kib, table):
    monkeypatch.setattr(runtime, "triton_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    hopper.name, hopper.shared_memory_per_block_optin = "a card that nobody measured", kib * 1024
    found = doctor._gpus()[0]
    assert (found["kernel_table"], found["triton_kernels"]) == (f"{table}.json", "run")


def test_a_gpu_that_is_too_small(hopper, monkeypatch):
    monkeypatch.setattr(runtime, "triton_problem", lambda: None)
    hopper.shared_memory_per_block_optin = 64 * 1024
    assert "needs 99 KiB of shared memory per block, the device allows 64 KiB" in doctor._gpus()[0]["triton_kernels"]


@pytest.mark.parametrize(
    ("built", "visible", "reason"),
    [(None, None, "without CUDA"), ("13.0", "-1", "CUDA_VISIBLE_DEVICES=-1"), ("13.0", None, "finds no device")],
)
def test_why_there_is_no_gpu(monkeypatch, built, visible, reason):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert reason in doctor._no_gpu()
