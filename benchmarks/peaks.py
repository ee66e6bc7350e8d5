# SPDX-License-Identifier: Apache-2.0
"""Ceilings of this machine, measured: read bandwidth of main memory, and products per second.

    python benchmarks/peaks.py

The read bandwidth comes from a kernel that reads and does nothing else (csrc/read_probe; on a GPU read_kernel.py), not
from a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import Timing, arguments, cpu_name, last_level_cache, measure, measure_cuda

from kvcompact_kernels.backends.cpu import library


class ReadProbe:
    """A callable for ``measure``: reads a buffer of several times the last-level cache."""

    def __init__(self) -> None:
        library.load()
        self.data = torch.ones(max(8 * last_level_cache(), 64 << 20), dtype=torch.uint8)

    def __call__(self, call: int) -> int:
        return torch.ops.kvcompact.read_probe(self.data)

    def gigabytes_per_second(self, milliseconds: float) -> float:
        return self.data.numel() / milliseconds / 1e6


class CudaReadProbe:
    """Reads ``size`` bytes of device memory in several ways; the fastest counts."""

    WAYS = tuple((block, ahead, per_sm) for block in (1024, 2048, 4096) for ahead in (2, 4) for per_sm in (2, 4, 8))

    def __init__(self, device: str = "cuda", size: int = 2 << 30, sms: int | None = None) -> None:
        self.sms = sms or torch.cuda.get_device_properties(device).multi_processor_count
        self.data = torch.randint(-(1 << 30), 1 << 30, (size // 4,), dtype=torch.int32, device=device)
        self.out = torch.zeros(self.sms * max(way[2] for way in self.WAYS), dtype=torch.int32, device=device)

    def launch(self, block: int, ahead: int, per_sm: int) -> int:
        """Runs one way; returns the bytes that it reads."""
        from read_kernel import read_only

        programs = self.sms * per_sm
        steps = self.data.numel() // (block * ahead * programs)
        read_only[(programs,)](self.data, self.out, steps, programs, BLOCK=block, AHEAD=ahead, num_warps=block // 256)
        return 4 * block * ahead * programs * steps

    def fastest(self, seconds: float = 0.05) -> tuple[float, Timing]:
        """``(TB/s, times)`` of the fastest way."""
        bytes_read = {str(way): self.launch(*way) for way in self.WAYS}
        times = measure_cuda({str(way): partial(self.launch, *way) for way in self.WAYS}, seconds, graphs=False)
        best = min(times, key=lambda way: times[way].p50 / bytes_read[way])
        return bytes_read[best] / times[best].p50 / 1e9, times[best]


def matmul(dtype: torch.dtype, size: int = 1024, device: str = "cpu") -> tuple[Callable[[int], object], float]:
    """A square matrix product of torch, and its floating-point operations."""
    a, b = (torch.empty(size, size, dtype=dtype, device=device).normal_() for _ in range(2))
    return lambda call=0: a @ b, 2.0 * size**3


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    probe = ReadProbe()
    products = {str(dtype).removeprefix("torch."): matmul(dtype) for dtype in (torch.float32, torch.bfloat16)}
    times = measure({"read": probe, **{name: function for name, (function, _) in products.items()}}, args.seconds)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads")
    print(f"read     {probe.gigabytes_per_second(times['read'].p50):8.1f} GB/s")
    for name, (_, operations) in products.items():
        print(f"{name:8s} {operations / times[name].p50 / 1e6:8.1f} GFLOP/s (torch.matmul)")
    if torch.cuda.is_available():
        function, operations = matmul(torch.bfloat16, 8192, "cuda")
        product = measure_cuda({"product": function}, graphs=False)["product"]
        print(torch.cuda.get_device_name())
        print(f"read     {CudaReadProbe().fastest()[0]:8.3f} TB/s")
        print(f"bfloat16 {operations / product.p50 / 1e9:8.1f} TFLOP/s (torch.matmul)")


if __name__ == "__main__":
    main()
