# SPDX-License-Identifier: Apache-2.0
"""The shared training loop: resume to the bit, what stops it, and what it leaves behind then."""

import errno
import json
import math
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from kvcompact_kernels.training import checkpoint
from kvcompact_kernels.training.checkpoint import CheckpointError, load_checkpoint
from kvcompact_kernels.training.loop import (
    LoopConfig,
    ParameterGroup,
    Step,
    StepOutput,
    TrainingError,
    TrainingInterrupted,
    epoch_batch,
    train,
)

CONFIG = LoopConfig(steps=12, lr=0.05, warmup=3, checkpoint_every=4, seed=5, weight_decay=0.01)


class Fit:
    """A regression with two groups of parameters whose data, order and noise come from the step."""

    def __init__(self, fail_at=None, fail_how="nan"):
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(10, 4, generator=generator), torch.randn(10, 2, generator=generator)
        self.weight = torch.zeros(2, 4, requires_grad=True)
        self.bias = torch.zeros(2, requires_grad=True)
        self.seen: list[int] = []
        self.fail_at, self.fail_how = fail_at, fail_how

    def groups(self):
        return [ParameterGroup({"weight": self.weight}), ParameterGroup({"bias": self.bias}, lr_scale=0.5)]

    def __call__(self, step: Step) -> StepOutput:
        rows = step.batch(len(self.x), 3)
        self.seen += rows
        noise = 0.1 * torch.randn(3, 2) + 0.1 * torch.randn(3, 2, generator=step.generator("noise"))
        loss = (self.x[rows] @ self.weight.T + self.bias - self.y[rows] + noise).pow(2).mean()
        if step.index == self.fail_at:
            if self.fail_how == "nan":
                loss = loss * math.nan
            elif self.fail_how == "gradient":
                loss = loss + (self.weight * 0).sum().sqrt()  # finite, with an infinite slope
            elif self.fail_how == "ctrl-c":
                os.kill(os.getpid(), signal.SIGINT)
        return StepOutput(loss, {"rows": float(sum(rows))}, f"rows {rows}")

    def state(self):
        return torch.cat([self.weight.detach().flatten(), self.bias.detach()])


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("piece_bytes", [None, 1 << 10])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, accumulate, piece_bytes):
    config = replace(CONFIG, accumulate=accumulate, piece_bytes=piece_bytes)
    whole = Fit()
    train(whole, whole.groups(), config, tmp_path / "whole")
    first, seen = Fit(), []
    for steps in (5, 1, None):  # each call starts from fresh objects, as a new process would
        part = Fit()
        result = train(part, part.groups(), replace(config, max_steps=steps), tmp_path / "parts")
        seen += part.seen
    assert result.finished and result.step == 12 and result.start == 6
    assert torch.equal(part.state(), whole.state()) and not torch.equal(first.state(), whole.state())
    assert seen == whole.seen
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    saved = [load_checkpoint(tmp_path / name)[1] for name in ("whole", "parts")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][n], saved[1][n]) for n in saved[0])


def test_the_loss_falls_and_groups_have_their_own_rates(tmp_path):
    fit = Fit()
    result = train(fit, fit.groups(), replace(CONFIG, steps=60, warmup=0, weight_decay=0.0, lr=0.02), tmp_path)
    assert sum(result.losses[-10:]) < 0.7 * sum(result.losses[:10])
    one = Fit()
    train(one, one.groups(), replace(CONFIG, steps=1, warmup=0, lr=0.02), tmp_path / "one")
    # Adam's first step has the size of the rate
    assert torch.allclose(one.weight.abs(), torch.full((2, 4), 0.02), rtol=1e-3)
    assert torch.allclose(one.bias.abs(), torch.full((2,), 0.01), rtol=1e-3)


def test_gradients_are_averaged_over_micro_batches(tmp_path):
    weight = torch.zeros(1, requires_grad=True)
    seen = []

    def step_function(step):
        if step.micro:
            seen.append(float(weight.grad))
        return StepOutput((weight * (2.0 if step.micro else 4.0)).sum())

    result = train(step_function, [ParameterGroup({"w": weight})], LoopConfig(1, accumulate=2), tmp_path)
    assert seen == [2.0] and result.losses == [0.0] and rows_of(tmp_path)[0]["gradient_norm"] == 3.0


def test_warm_up_and_schedules():
    cosine = LoopConfig(110, lr=2.0, warmup=10, warmup_from=0.1, final=0.2)
    assert cosine.lr_at(0) == pytest.approx(2 * (0.1 + 0.9 / 10)) and cosine.lr_at(9) == pytest.approx(2.0)
    assert cosine.lr_at(60) == pytest.approx(2 * 0.6) and cosine.lr_at(110) == pytest.approx(0.4)
    assert LoopConfig(100, lr=1.0, schedule="linear", final=0.0).lr_at(25) == pytest.approx(0.75)
    assert LoopConfig(100, lr=1.0, schedule="constant").lr_at(99) == 1.0


def test_epochs_take_every_item_once_in_new_orders():
    picked = [epoch_batch(7, 3, cursor, 1) for cursor in range(14)]
    flat = [i for batch in picked for i in batch]
    epochs = [flat[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert picked == [epoch_batch(7, 3, cursor, 1) for cursor in range(14)]
    assert picked != [epoch_batch(7, 3, cursor, 2) for cursor in range(14)]


@pytest.mark.parametrize("how,words", [("nan", "the loss is nan"), ("gradient", "the gradient's norm is")])
def test_a_loss_that_is_no_number_stops_and_names_step_and_batch(tmp_path, how, words):
    fit = Fit(fail_at=9, fail_how=how)
    with pytest.raises(TrainingError, match=words) as error:
        train(fit, fit.groups(), CONFIG, tmp_path)
    assert f"at step 10 (batch: rows {fit.seen[-3:]})" in str(error.value) and "step 8 is kept" in str(error.value)
    assert load_checkpoint(tmp_path)[0]["step"] == 8
    assert fit.state().isfinite().all()
    again = Fit()
    assert train(again, again.groups(), CONFIG, tmp_path).start == 8


def test_ctrl_c_finishes_the_step_saves_and_resumes(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    fit, whole = Fit(fail_at=6, fail_how="ctrl-c"), Fit()
    with pytest.raises(TrainingInterrupted, match="interrupted after step 7 of 12"):
        train(fit, fit.groups(), CONFIG, tmp_path / "cut")
    assert signal.getsignal(signal.SIGINT) is handler
    assert load_checkpoint(tmp_path / "cut")[0]["step"] == 7
    rest = Fit()
    train(rest, rest.groups(), CONFIG, tmp_path / "cut")
    train(whole, whole.groups(), CONFIG, tmp_path / "whole")
    assert torch.equal(rest.state(), whole.state())


@pytest.mark.parametrize("which", ["checkpoint-00000008.001", "checkpoint.json"])
def test_a_full_disk_leaves_the_old_checkpoint_as_it_was(tmp_path, monkeypatch, which):
    real = checkpoint.write_atomically

    def full(path, data):
        if path.name == which and (which != "checkpoint.json" or b'"step": 8' in data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    fit = Fit()
    config = replace(CONFIG, piece_bytes=1 << 10)
    with pytest.raises(OSError, match=r"step 8 to .*No space left.*; the checkpoint of step 4 is intact"):
        train(fit, fit.groups(), config, tmp_path)
    monkeypatch.undo()
    note, _ = load_checkpoint(tmp_path)
    assert note["step"] == 4
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [p["file"] for p in note["pieces"]]
    again, whole = Fit(), Fit()
    train(again, again.groups(), config, tmp_path)
    train(whole, whole.groups(), config, tmp_path / "whole")
    assert torch.equal(again.state(), whole.state())


def test_a_checkpoint_of_another_run_is_refused_by_field(tmp_path):
    fit = Fit()
    train(fit, fit.groups(), replace(CONFIG, max_steps=2), tmp_path, identity={"model": {"weights": "a"}, "data": "d"})

    def refused(match, config=CONFIG, identity=None, groups=None):
        other = Fit()
        before = other.state()
        with pytest.raises(CheckpointError, match=match):
            train(other, groups or other.groups(), config, tmp_path, identity=identity or {})
        assert torch.equal(other.state(), before)

    same = {"model": {"weights": "a"}, "data": "d"}
    refused(r"run\.model\.weights was 'a', now 'b'", identity={**same, "model": {"weights": "b"}})
    refused(r"loop\.lr was 0\.05, now 0\.5", replace(CONFIG, lr=0.5), same)
    refused(r"loop\.steps was 12, now 13", replace(CONFIG, steps=13), same)
    longer = {"weight": torch.zeros(2, 5, requires_grad=True), "bias": torch.zeros(2, requires_grad=True)}
    refused(r"weight was \['torch.float32', \[2, 4\]\]", identity=same, groups=[ParameterGroup(longer)])
    other = Fit()
    changed = replace(CONFIG, checkpoint_every=1, evaluate_every=3)
    assert train(other, other.groups(), changed, tmp_path, identity=same).start == 2


def test_damaged_checkpoints_are_named(tmp_path):
    fit = Fit()
    train(fit, fit.groups(), replace(CONFIG, max_steps=2), tmp_path)
    (piece,) = tmp_path.glob("checkpoint-*")
    data = piece.read_bytes()
    with safe_open(piece, framework="pt") as file:  # one piece is an ordinary safetensors file
        assert "parameters.weight" in set(file.keys())
    for bad, match in ((data[:-1] + b"x", "digest"), (None, "missing")):
        piece.write_bytes(bad) if bad else piece.unlink()
        other = Fit()
        with pytest.raises(CheckpointError, match=match):
            train(other, other.groups(), CONFIG, tmp_path)
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path)


def test_evaluation_disturbs_nothing_and_is_logged(tmp_path):
    plain, watched = Fit(), Fit()
    train(plain, plain.groups(), CONFIG, tmp_path / "plain")
    calls = []

    def evaluate():
        assert not torch.is_grad_enabled()
        calls.append(float(torch.randn(())))
        return {"kl": float(len(calls))}

    result = train(watched, watched.groups(), replace(CONFIG, evaluate_every=5), tmp_path / "w", evaluate=evaluate)
    assert torch.equal(plain.state(), watched.state())
    assert result.evaluation == {"kl": 4.0}
    rows = [row for row in rows_of(tmp_path / "w") if "evaluation" in row]
    assert [(row["step"], row["evaluation"]["kl"]) for row in rows] == [(0, 1.0), (5, 2.0), (10, 3.0), (12, 4.0)]


def test_the_callers_randomness_is_left_alone(tmp_path):
    torch.manual_seed(1)
    wanted = torch.randn(3)
    torch.manual_seed(1)
    fit = Fit()
    train(fit, fit.groups(), CONFIG, tmp_path)
    assert torch.equal(torch.randn(3), wanted)


def test_what_steps_need_is_got_once_the_checkpoint_is_known_to_fit(tmp_path):
    """And not at all where there is no step to do; Ctrl-C does not wait for it."""
    plain, prepared, got = Fit(), Fit(), []

    def get():
        got.append(float(torch.randn(())))

    train(plain, plain.groups(), CONFIG, tmp_path / "plain")
    train(prepared, prepared.groups(), replace(CONFIG, max_steps=5), tmp_path / "p", prepare=get)
    assert len(got) == 1
    with pytest.raises(CheckpointError):
        train(prepared, prepared.groups(), replace(CONFIG, lr=0.5), tmp_path / "p", prepare=get)
    assert len(got) == 1

    def interrupted():
        got.append(0.0)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        got.append(1.0)

    with pytest.raises(KeyboardInterrupt):
        train(prepared, prepared.groups(), CONFIG, tmp_path / "p", prepare=interrupted)
    assert got[-1] == 0.0
    train(prepared, prepared.groups(), CONFIG, tmp_path / "p", prepare=get)
    assert len(got) == 3 and torch.equal(plain.state(), prepared.state())
    assert train(prepared, prepared.groups(), CONFIG, tmp_path / "p", prepare=get).finished and len(got) == 3


def test_a_constant_schedule_can_be_prolonged_and_time_ends_a_call(tmp_path):
    config = replace(CONFIG, schedule="constant", warmup=0)
    fit = Fit()
    assert train(fit, fit.groups(), config, tmp_path).finished
    longer = Fit()
    result = train(longer, longer.groups(), replace(config, steps=20, max_seconds=1e-9), tmp_path)
    assert (result.start, result.step, result.finished) == (12, 13, False)
    shorter = Fit()
    with pytest.raises(CheckpointError, match="a run of 13 steps, more than the 12"):
        train(shorter, shorter.groups(), config, tmp_path)


@pytest.mark.parametrize(
    "options,error",
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"lr": math.nan}, "lr must be"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"betas": (0.9, 1.5)}, r"betas\[1\] must be at least 0 and at most 1"),
        ({"piece_bytes": 10}, "piece_bytes must be"),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(ValueError, match=error):
        LoopConfig(**{"steps": 1, **options})


def test_bad_parameters(tmp_path):
    fit = Fit()
    frozen = torch.zeros(2)
    for groups, error in (
        ([], "at least one parameter"),
        ([ParameterGroup({"w": frozen})], "'w' must be a floating leaf"),
        ([ParameterGroup({"w": fit.weight}), ParameterGroup({"w": fit.bias})], "a second parameter called 'w'"),
        ([ParameterGroup({"w": fit.weight, "v": fit.weight})], "another name already has"),
    ):
        with pytest.raises(ValueError, match=error):
            train(fit, groups, CONFIG, tmp_path)
