# SPDX-License-Identifier: Apache-2.0
"""The ceilings of this machine, for every share that the other parts report. Measured at the start and once more at the end
of a visit: a difference says that clocks or neighbours moved."""

from __future__ import annotations

import torch
from lab import Bench, measure_ceilings


def run(bench: Bench) -> None:
    def measure() -> None:
        ceilings, times = measure_ceilings(bench.device, bench.smoke)
        first = not (bench.out / "ceilings.json").exists()
        if first:
            bench.save_ceilings(ceilings)
        when = "start" if first else "end"
        for name, figure, value in (("read", "tb_s", ceilings.read), ("matmul", "tflop_s", ceilings.matmul)):
            t = times[name]
            bench.file.add(
                bench.device,
                part=bench.part,
                op="ceiling",
                shape=f"{name} ({when})",
                dtype=str(torch.bfloat16 if bench.device != "cpu" else torch.float32).removeprefix("torch."),
                role="ceiling",
                backend=name,
                how=t.how,
                ms_p20=t.p20,
                ms_p50=t.p50,
                ms_p80=t.p80,
                calls=t.calls,
                **{figure: value},
            )
        print(f"read {ceilings.read:.3f} TB/s, bf16 product {ceilings.matmul:.1f} TFLOP/s ({when})", flush=True)

    bench.attempt("ceilings", measure)
