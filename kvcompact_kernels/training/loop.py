# SPDX-License-Identifier: Apache-2.0
"""The training loop that cartridges and STILL share.

The caller supplies parameters and a function that makes one batch's loss; the loop does the rest: optimizer, schedule,
clipping, checkpoints, the log and the progress bar. A run is a function of its options, its seed and the number of the
step: whatever is random comes from :class:`Step`, so a run that was interrupted and resumed ends with the same bits as one
that was not (on one device and number of threads; CUDA kernels that add atomically can differ in the last bit).
"""

import hashlib
import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_int
from ..evaluation.store import write_atomically
from .checkpoint import CheckpointError, check_identity, load_checkpoint, save_checkpoint

LOG = "metrics.jsonl"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and batch, and what is kept."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C: the step was finished and a checkpoint written; the message says where."""


@dataclass(frozen=True)
class LoopConfig:
    """Options of a run. All but the last five are part of its identity: a checkpoint of other ones is refused.

    Attributes:
        steps: optimizer steps of the whole run.
        lr: learning rate after warm-up; a group's ``lr_scale`` multiplies it.
        optimizer: "adamw" or "adam".
        betas, eps, weight_decay: of the optimizer; a group may have a weight decay of its own.
        warmup: steps in which the learning rate rises linearly from ``warmup_from * lr`` to ``lr``.
        schedule: "cosine" or "linear", down to ``final * lr`` at the last step, or "constant". With "constant" a finished
            run may be continued with more steps; the others depend on ``steps``.
        clip: largest norm of all gradients together, or None.
        accumulate: calls of the step function whose gradients are averaged to one optimizer step.
        seed: of the data order and of everything random.
        checkpoint_every: steps between checkpoints; one is also written at the end and on Ctrl-C.
        evaluate_every: steps between calls of ``evaluate``, which also runs before the first step and after the last;
            None never calls it.
        piece_bytes: largest file of a checkpoint, for what moves files of limited size; None writes one.
        max_seconds: stop, with a checkpoint, when a call has trained for so long; None never.
        max_steps: stop, with a checkpoint, after so many steps of this call; None never.
    """

    steps: int
    lr: float = 1e-3
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    warmup_from: float = 0.025
    schedule: str = "cosine"
    final: float = 0.05
    clip: float | None = 1.0
    accumulate: int = 1
    seed: int = 0
    checkpoint_every: int = 200
    evaluate_every: int | None = None
    piece_bytes: int | None = None
    max_seconds: float | None = None
    max_steps: int | None = None

    def __post_init__(self):
        for name in ("steps", "accumulate", "checkpoint_every"):
            check_int(name, getattr(self, name), minimum=1)
        check_int("warmup", self.warmup, minimum=0)
        check_int("seed", self.seed, minimum=0)
        for name in ("evaluate_every", "max_steps"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), minimum=1)
        if self.piece_bytes is not None:
            check_int("piece_bytes", self.piece_bytes, minimum=1 << 10)
        check_choice("optimizer", self.optimizer, ("adamw", "adam"))
        check_choice("schedule", self.schedule, ("cosine", "linear", "constant"))
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas!r}")
        limits = {"lr": (0, None), "eps": (0, None), "weight_decay": (0, None), "warmup_from": (0, 1), "final": (0, 1)}
        limits |= {name: (0, None) for name in ("clip", "max_seconds") if getattr(self, name) is not None}
        values = {name: (getattr(self, name), *limit) for name, limit in limits.items()}
        values |= {f"betas[{i}]": (beta, 0, 1) for i, beta in enumerate(self.betas)}
        for name, (value, low, high) in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value) or value < low or (high is not None and value > high):
                raise ValueError(
                    f"{name} must be at least {low}{'' if high is None else f' and at most {high}'}, got {value}"
                )
        if self.lr == 0:
            raise ValueError("lr must be above 0")

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share, as JSON values."""
        options = json.loads(json.dumps(asdict(self)))
        for name in ("checkpoint_every", "evaluate_every", "piece_bytes", "max_seconds", "max_steps"):
            del options[name]
        if self.schedule == "constant":
            del options["steps"]
        return options

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (from 0)."""
        rise = 1.0
        if step < self.warmup:
            rise = self.warmup_from + (1 - self.warmup_from) * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr * rise
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        fall = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * rise * (self.final + (1 - self.final) * fall)


@dataclass(frozen=True)
class Step:
    """Where a run stands, and its only source of randomness.

    Attributes:
        index: optimizer step, from 0.
        micro: call within the step, from 0, when gradients are accumulated.
        seed: of the run.
        accumulate: calls per step.
    """

    index: int
    micro: int
    seed: int
    accumulate: int = 1

    @property
    def cursor(self) -> int:
        """Number of this call in the run, from 0."""
        return self.index * self.accumulate + self.micro

    def random(self, purpose: str = "") -> random.Random:
        """A generator that depends on seed, step and ``purpose`` alone."""
        return random.Random(self.number(purpose))

    def generator(self, purpose: str = "", device: torch.device | str = "cpu") -> torch.Generator:
        """The same for torch."""
        return torch.Generator(device).manual_seed(self.number(purpose))

    def number(self, purpose: str = "") -> int:
        """A 63-bit number that depends on seed, step and ``purpose`` alone."""
        return stable_number(self.seed, self.cursor, purpose)

    def batch(self, size: int, count: int) -> list[int]:
        """``count`` indices of ``size`` items: the items in a new random order each time all have been taken."""
        return epoch_batch(size, count, self.cursor, self.seed)


@dataclass
class StepOutput:
    """What the step function makes of one batch.

    Attributes:
        loss: scalar, with its graph; the loop calls ``backward``.
        metrics: figures for the log.
        batch: names the batch in an error message.
    """

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    batch: str = ""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        parameters: by name; names are unique over all groups.
        lr_scale: factor on the run's learning rate.
        weight_decay: None takes the run's.
    """

    parameters: Mapping[str, Tensor]
    lr_scale: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """How a call of :func:`train` ended.

    Attributes:
        step: optimizer steps done, over all calls.
        finished: False when ``max_seconds`` or ``max_steps`` ended it before the run's last step.
        start: step at which this call began: 0, or that of the checkpoint.
        seconds: that this call took.
        evaluation: what ``evaluate`` returned last, or None.
        losses: mean loss of each step of this call.
    """

    step: int
    finished: bool
    start: int
    seconds: float
    evaluation: dict[str, float] | None
    losses: list[float]


def train(
    step_function: Callable[[Step], StepOutput],
    groups: Sequence[ParameterGroup],
    config: LoopConfig,
    folder: str | Path,
    *,
    identity: Mapping[str, Any] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    progress: bool = False,
    description: str = "training",
    shown: str = "kl",
    prepare: Callable[[], None] | None = None,
    on_checkpoint: Callable[[int], None] | None = None,
) -> TrainResult:
    """Trains parameters in place; goes on from the folder's checkpoint when there is one.

    Args:
        step_function: makes the loss of one batch. It must take whatever is random from its :class:`Step` (or from
            torch's global generators, which the loop seeds and keeps), and keep nothing between calls.
        groups: leaf tensors with ``requires_grad``; fp32 is wise whatever the model's dtype.
        config: of the run.
        folder: for checkpoint and log; made when it is not there. One run, one folder.
        identity: JSON-able description of what is trained on what (model fingerprint, options, digest of the data). A
            checkpoint with another one is refused, and the message names the field.
        evaluate: figures on held-out data; runs without gradients and does not disturb the run's randomness.
        progress: show a bar with loss, the held-out figure ``shown`` and the time that is left.
        prepare: called once the checkpoint has been found to be of this run, unless it is finished: what the steps need and
            takes long to get. Ctrl-C stops it at once; its time does not count.
        on_checkpoint: called with the step after each checkpoint.

    Returns:
        TrainResult

    Raises:
        TrainingError: a loss or gradient is NaN or infinite. The parameters are those before that step; the last
            checkpoint is kept.
        TrainingInterrupted: Ctrl-C, after the step was finished and saved. A second Ctrl-C stops at once.
        CheckpointError: the folder's checkpoint is damaged or belongs to another run.
        OSError: the folder cannot be written to; its last checkpoint is intact.
    """
    named = _named(groups)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"loop": config.identity(), "run": json.loads(json.dumps(dict(identity or {})))}
    optimizer = _optimizer(groups, config)
    devices = sorted({x.device.index or 0 for x in named.values() if x.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        _seed_everything(stable_number(config.seed, 0, "global"), devices)
        found = load_checkpoint(folder)
        start, last = 0, None
        if found is not None:
            start, last = _restore(found, named, optimizer, wanted, devices, folder), found[0].get("evaluation")
        if start > config.steps:
            raise CheckpointError(f"{folder} holds a run of {start} steps, more than the {config.steps} asked for")
        if prepare is not None and start < config.steps:
            with torch.random.fork_rng(devices=devices):
                prepare()
        run = _Run(named, optimizer, config, folder, wanted, devices, evaluate, on_checkpoint, start, last)
        with _ctrl_c() as interrupted:
            return run.go(step_function, start, interrupted, progress, description, shown)


class _Run:
    """The state of one call of :func:`train`."""

    def __init__(self, named, optimizer, config, folder, wanted, devices, evaluate, on_checkpoint, start, last):
        self.named, self.optimizer, self.config, self.folder = named, optimizer, config, folder
        self.wanted, self.devices, self.evaluate, self.on_checkpoint = wanted, devices, evaluate, on_checkpoint
        self.saved: int | None = start if start else None
        self.last: dict[str, float] | None = last
        self.log = _Log(folder / LOG, start)

    def go(self, step_function, start, interrupted, progress, description, shown) -> TrainResult:
        from tqdm import tqdm

        config, began, losses = self.config, time.monotonic(), []
        step = start
        bar = tqdm(total=config.steps, initial=start, desc=description, unit="step", disable=not progress)
        try:
            if start == 0:
                self._evaluate(0)
            while step < config.steps:
                row = self._step(step_function, step)
                step += 1
                losses.append(row["loss"])
                self.log.write(row)
                last = step == config.steps
                if last or (config.evaluate_every is not None and step % config.evaluate_every == 0):
                    self._evaluate(step)
                figures = {"loss": f"{sum(losses[-50:]) / len(losses[-50:]):.4f}"}
                if self.last and shown in self.last:
                    figures[f"held-out {shown}"] = f"{self.last[shown]:.4f}"
                bar.set_postfix(figures, refresh=False)
                bar.update()
                timed_out = config.max_seconds is not None and time.monotonic() - began >= config.max_seconds
                enough = config.max_steps is not None and step - start >= config.max_steps
                stop = timed_out or enough or interrupted.is_set()
                if last or stop or step % config.checkpoint_every == 0:
                    self._save(step)
                if interrupted.is_set() and not last:
                    raise TrainingInterrupted(
                        f"interrupted after step {step} of {config.steps}; {self.folder} holds it, and the same command "
                        "goes on from there"
                    )
                if stop:
                    break
        finally:
            bar.close()
            self.log.close()
        return TrainResult(step, step == config.steps, start, time.monotonic() - began, self.last, losses)

    def _step(self, step_function, index: int) -> dict[str, Any]:
        config = self.config
        began = time.monotonic()
        self.optimizer.zero_grad(set_to_none=True)
        total, sums = 0.0, {}
        for micro in range(config.accumulate):
            out = step_function(Step(index, micro, config.seed, config.accumulate))
            loss = out.loss
            value = float(loss.detach())
            if not math.isfinite(value):
                raise self._diverged(f"the loss is {value}", index, out.batch)
            (loss / config.accumulate if config.accumulate > 1 else loss).backward()
            total += value / config.accumulate
            for name, figure in out.metrics.items():
                sums.setdefault(name, []).append(float(figure))
        parameters = [x for x in self.named.values() if x.grad is not None]
        if not parameters:
            raise TrainingError(f"step {index + 1}: no parameter got a gradient from the loss")
        total_norm = nn.utils.get_total_norm([x.grad for x in parameters])
        norm = float(total_norm)
        if not math.isfinite(norm):
            raise self._diverged(f"the gradient's norm is {norm}", index, out.batch)
        if config.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, config.clip, total_norm)
        rate = config.lr_at(index)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.step()
        row = {"step": index + 1, "loss": total, "lr": rate, "gradient_norm": norm}
        figures = {name: sum(values) / len(values) for name, values in sums.items()}
        return row | figures | {"seconds": round(time.monotonic() - began, 4)}

    def _diverged(self, what: str, index: int, batch: str) -> TrainingError:
        kept = f"the checkpoint of step {self.saved} is kept" if self.saved else "there is no checkpoint yet"
        where = f" (batch: {batch})" if batch else ""
        return TrainingError(
            f"{what} at step {index + 1}{where}; {kept} in {self.folder}. A smaller learning rate, a longer warm-up or "
            "smaller clip may help"
        )

    def _evaluate(self, step: int) -> None:
        if self.evaluate is None or self.config.evaluate_every is None:
            return
        with torch.random.fork_rng(devices=self.devices), torch.no_grad():
            self.last = {name: float(x) for name, x in self.evaluate().items()}
        self.log.write({"step": step, "evaluation": self.last})

    def _save(self, step: int) -> None:
        tensors = {f"parameters.{name}": x for name, x in self.named.items()}
        for name, x in self.named.items():
            for key, value in self.optimizer.state.get(x, {}).items():
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
        tensors["random.cpu"] = torch.get_rng_state()
        for device in self.devices:
            tensors[f"random.cuda{device}"] = torch.cuda.get_rng_state(device)
        header = {"identity": self.wanted, "evaluation": self.last}
        self.log.sync()
        save_checkpoint(self.folder, tensors, header, step, self.config.piece_bytes)
        self.saved = step
        if self.on_checkpoint is not None:
            self.on_checkpoint(step)


class _Log:
    """Rows of figures, one JSON object a line: those of the steps that a checkpoint covers survive a resume, once each."""

    def __init__(self, path: Path, start: int):
        self.path = path
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if start and json.loads(line)["step"] <= start:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):  # cut off by a crash
                    continue
        write_atomically(path, "".join(line + "\n" for line in kept).encode())
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the run)

    def write(self, row: dict[str, Any]) -> None:
        # a held-out figure may be infinite; JSON has no word for it
        plain = {k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
        self.file.write(json.dumps(plain) + "\n")
        self.sync()

    def sync(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            raise OSError(f"could not write to {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        try:
            self.file.close()
        except OSError:  # a full disk: the error that stopped the run is the one to see
            pass


def epoch_batch(size: int, count: int, cursor: int, seed: int) -> list[int]:
    """Indices of batch ``cursor`` of ``count`` out of ``size`` items, in a fresh random order each epoch.

    A batch that reaches over the end of an epoch goes on with the next one's order.
    """
    check_int("size", size, minimum=1)
    check_int("count", count, minimum=1)
    picked, position = [], cursor * count
    while len(picked) < count:
        epoch, offset = divmod(position + len(picked), size)
        order = list(range(size))
        random.Random(stable_number(seed, epoch, "order")).shuffle(order)
        picked += order[offset : offset + count - len(picked)]
    return picked


def stable_number(seed: int, index: int, purpose: str) -> int:
    """A 63-bit number that is the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}:{purpose}".encode()).digest()[:8], "little") >> 1


def _named(groups: Sequence[ParameterGroup]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for i, group in enumerate(groups):
        for name, x in group.parameters.items():
            if name in named:
                raise ValueError(f"groups[{i}] holds a second parameter called {name!r}")
            if not isinstance(x, Tensor) or not x.is_leaf or not x.requires_grad or not x.is_floating_point():
                raise ValueError(f"groups[{i}]: {name!r} must be a floating leaf tensor with requires_grad")
            if any(x is y for y in named.values()):
                raise ValueError(f"groups[{i}]: {name!r} is a parameter that another name already has")
            named[name] = x
    if not named:
        raise ValueError("groups must hold at least one parameter")
    return named


def _optimizer(groups: Sequence[ParameterGroup], config: LoopConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    entries = [
        {
            "params": list(group.parameters.values()),
            "lr_scale": float(group.lr_scale),
            "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
        if group.parameters
    ]
    return kind(entries, lr=config.lr, betas=config.betas, eps=config.eps)


def _restore(found, named, optimizer, wanted, devices, folder) -> int:
    note, tensors = found
    check_identity(note.get("identity", {}), wanted, f"the checkpoint in {folder}")
    held = {n.removeprefix("parameters."): x for n, x in tensors.items() if n.startswith("parameters.")}
    expected = {name: [str(x.dtype), list(x.shape)] for name, x in named.items()}
    check_identity(
        {name: [str(x.dtype), list(x.shape)] for name, x in held.items()}, expected, f"the checkpoint in {folder}"
    )
    with torch.no_grad():
        for name, x in named.items():
            x.copy_(held[name])
            prefix = f"optimizer.{name}."
            state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            for key, value in state.items():
                # the count of steps lives on the CPU, the moments beside the parameter
                optimizer.state[x][key] = value.clone() if key == "step" else value.to(x.device)
    torch.set_rng_state(tensors["random.cpu"])
    for device in devices:
        if f"random.cuda{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda{device}"], device)
    return int(note["step"])


def _seed_everything(number: int, devices: list[int]) -> None:
    torch.default_generator.manual_seed(number)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """The event that Ctrl-C sets; a second Ctrl-C raises. Outside the main thread it stays with whoever handles it."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
