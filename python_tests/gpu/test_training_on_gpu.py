# SPDX-License-Identifier: Apache-2.0
"""Training of a STILL compactor on a GPU: it learns, resumes, and agrees with the CPU."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from kvcompact_kernels.training.loop import LoopConfig
from kvcompact_kernels.training.still import StillOptions, train_still

pytestmark = pytest.mark.gpu

IDS = torch.randint(3, 97, (400,), generator=torch.Generator().manual_seed(0))
OPTIONS = StillOptions(
    ratios=(4.0,), contexts=(128,), tails=3, continuation=12, recall=10, cue=3, held_out=0.0,
    mix={"recall": 1.0, "continuation": 1.0},
)  # fmt: skip
LOOP = LoopConfig(8, lr=1e-3, warmup=1, checkpoint_every=2)


def run(folder, device, loop=LOOP, options=OPTIONS, dtype=torch.float32):
    model = tiny_model("llama", dtype, max_position_embeddings=1024, head_dim=64).to(device)
    return train_still(model, None, [IDS], out=folder / "c", options=options, loop=loop, config={"num_blocks": 1})


def state(result):
    return torch.cat([x.detach().double().cpu().flatten() for x in result.compactor.parameters()])


def test_a_gpu_trains_as_the_cpu_does(tmp_path):
    for name in ("cpu", "cuda"):
        (tmp_path / name).mkdir()
    cpu, gpu = run(tmp_path / "cpu", "cpu"), run(tmp_path / "cuda", "cuda")
    assert gpu.run.losses == pytest.approx(cpu.run.losses, rel=2e-2)


@pytest.mark.parametrize("options", [OPTIONS, replace(OPTIONS, gradient_checkpointing=True, batch=2)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "whole", "cuda", options=options, dtype=torch.bfloat16)
    run(tmp_path / "parts", "cuda", replace(LOOP, max_steps=3), options, torch.bfloat16)
    parts = run(tmp_path / "parts", "cuda", LOOP, options, torch.bfloat16)
    assert parts.run.start == 3
    assert torch.allclose(state(whole), state(parts), rtol=1e-3, atol=1e-5)
