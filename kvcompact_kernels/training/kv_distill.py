# SPDX-License-Identifier: Apache-2.0
"""Training of KV-Distill's scorer and adapter (arXiv 2503.10337) for one frozen model.

Contexts, tails, teacher, loop and files are those of STILL's training (``training/still.py``). What differs: a context is
compacted at once, the loss is a weighted sum of the forward and the reverse KL, and the choice of tokens is learned through
a gate. The kept tokens carry a bias that is 0, whose gradient says which of them should be attended to more, and goes to
the scores that chose them (a straight-through estimator); noise on the scores lets others have their turn.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache import CompactBlock, CompactCache
from ..kv_distiller import DistillerConfig, KVDistiller
from ..methods import LayerInput, Method
from ..methods.attention_matching import own_attention
from ..model_spec import ModelSpec
from ..patch.model import compact
from ..token_selector import MAX_QUERIES, token_features
from .loop import LoopConfig, TrainResult
from .still import StillOptions, StillTrainer, check_teacher, several, train_compactor, with_changes

_MEASURED = 8  # contexts that the features' mean and deviation are taken from


@dataclass(frozen=True)
class KVDistillOptions(StillOptions):
    """What scorer and adapter are trained on and how: the fields of ``StillOptions``, and two more.

    Attributes:
        max_chunks: 1, for a context is compacted at once.
        reverse: in [0, 1]: share of KL(student || teacher) in the loss, the rest being KL(teacher || student).
        noise: scale of the Gumbel noise on the scores in training, in nats of attention; 0 keeps the best tokens always.
    """

    max_chunks: int | None = 1
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    reverse: float = 0.5
    noise: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.max_chunks != 1:
            raise ValueError(f"max_chunks must be 1, for a context is compacted at once; got {self.max_chunks}")
        for name in ("reverse", "noise"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 <= self.reverse <= 1:
            raise ValueError(f"reverse must be in [0, 1], got {self.reverse}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be finite and at least 0, got {self.noise}")


@dataclass(frozen=True)
class KVDistillResult:
    """What :func:`train_kv_distill` made: scorer and adapter, their file, and how the loop ended (``run.finished``)."""

    distiller: KVDistiller
    path: Path
    run: TrainResult


def train_kv_distill(
    model: Any,
    tokenizer: Any,
    data: Any,
    *,
    out: str | Path,
    ratios: Sequence[float] | float | None = None,
    contexts: Sequence[int] | int | None = None,
    steps: int | None = None,
    options: KVDistillOptions | None = None,
    loop: LoopConfig | None = None,
    config: Mapping[str, Any] | None = None,
    start: KVDistiller | str | Path | None = None,
    run_folder: str | Path | None = None,
    data_cache: str | Path | None = None,
    progress: bool = False,
) -> KVDistillResult:
    """Trains scorer and adapter for a model, or goes on with the training that ``run_folder`` holds.

    Args:
        model: of a supported family, on the device to train on; it stays as it is, bit for bit.
        tokenizer: the model's; None when ``data`` are token ids (then only "recall" and "continuation" are trained).
        data: a folder of .txt and .md files, a file, or a sequence of texts or of 1-D tensors of token ids.
        out: the file, for ``KVDistiller.load`` and ``patch_model(model, "kv_distill", weights=out)``; good for any ratio,
            best for those that were drawn.
        ratios, contexts, steps: shorthands for these fields of ``options`` and ``loop``.
        options: what is trained on and how; default ``KVDistillOptions()``.
        loop: optimizer, schedule, checkpoints; default :func:`default_loop`.
        config: fields of ``DistillerConfig`` but those of the model's shape.
        start: scorer and adapter, or their file, whose parameters are the start (then no ``config``).
        run_folder: for checkpoints and log; default is ``out`` with ``.run`` behind it.
        data_cache: folder for tokens and written questions, which several runs may share; default is ``run_folder``.
        progress: show progress bars.

    Raises:
        UnsupportedModelError: a model of another family, without full-attention layers, or with another kind of RoPE.
        ValueError, TypeError: bad options or data, a context longer than the texts, a start for another model.
        CheckpointError, TrainingError, TrainingInterrupted, OSError: see :func:`kvcompact_kernels.training.loop.train`.
    """
    spec = check_teacher(model)
    options = with_changes(options or KVDistillOptions(), ratios=several(ratios), contexts=several(contexts))
    loop = with_changes(loop or default_loop(), steps=steps)
    distiller = _distiller(spec, config, start, loop.seed)
    path, run = train_compactor(
        partial(KVDistillTrainer, measure=start is None), model, tokenizer, data, distiller, options, loop, out=out,
        run_folder=run_folder, data_cache=data_cache, started=start is not None, progress=progress,
        description="kv_distill",
    )  # fmt: skip
    return KVDistillResult(distiller, path, run)


def default_loop(**changes: Any) -> LoopConfig:
    """The loop's options for scorer and adapter, with changes."""
    return LoopConfig(**({"steps": 1000, "lr": 1e-3, "warmup": 50, "evaluate_every": 100} | changes))


@dataclass(frozen=True)
class ReadContext(CompactCache):
    """A full cache, and for each compacted layer what ``own_attention`` says of it, ``[B, Hkv, T]``."""

    attention: tuple[Tensor, ...] = ()


class _Reader(Method):
    """Keeps every token, and notes what attention each gets."""

    name, summary, source = "reader", "notes the attention", "none"
    queries_needed = -1

    def __init__(self):
        self.attention: list[Tensor] = []

    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        self.attention.append(own_attention(layer, MAX_QUERIES))
        return CompactBlock(layer.keys.clone(), layer.values.clone())


class KVDistillTrainer(StillTrainer):
    """The step function of :func:`train_kv_distill`, and its held-out figures.

    Args:
        measure: set what features are measured in from contexts of the training; False leaves the distiller's own.
    """

    def __init__(self, *args: Any, measure: bool):
        super().__init__(*args)
        self.reverse = self.options.reverse
        if measure:
            self.measure_features()

    @torch.no_grad()
    def read(self, ids: Tensor) -> ReadContext:
        reader = _Reader()
        full = compact(self.model, ids, reader, ratio=1)
        return ReadContext(**{f.name: getattr(full, f.name) for f in fields(full)}, attention=tuple(reader.attention))

    def arguments(self, full: ReadContext, layer: int, start: int, end: int, ratio: float) -> dict[str, Any]:
        noise = self.options.noise if torch.is_grad_enabled() else 0.0
        given = super().arguments(full, layer, start, end, ratio)
        return given | {"attention": full.attention[layer][:, :, start:end], "noise": noise}

    @torch.no_grad()
    def measure_features(self) -> None:
        """Sets what the features of each layer are measured in, from contexts that depend on nothing but the options."""
        rows: list[list[Tensor]] = [[] for _ in self.compactor.layers]
        for index in range(_MEASURED):
            draw = random.Random(f"measure {index}")
            chunks, _ = self.plans.draw(draw)
            example = self._example(self.corpus.train, chunks, draw)
            full = self.read(torch.tensor([example.context], device=self.device))
            blocks = [block for block in full.layers if isinstance(block, CompactBlock)]
            positions = torch.arange(full.logical_length, device=self.device)
            for layer, (block, attention) in enumerate(zip(blocks, full.attention)):
                free = full.ropes["full"].unrotate(block.keys, positions)
                rows[layer].append(token_features(free, block.values, attention)[0][0])
        for layer, found in zip(self.compactor.layers, rows):
            features = torch.cat(found)
            layer["mean"].copy_(features.mean(0))
            layer["deviation"].copy_(features.std(0) + 1e-3)


def _distiller(
    spec: ModelSpec, config: Mapping[str, Any] | None, start: KVDistiller | str | Path | None, seed: int
) -> KVDistiller:
    if start is not None:
        if config:
            raise ValueError("config must be left out with start: it has its own")
        # a copy: the caller's own stays as it is
        made = copy.deepcopy(start) if isinstance(start, torch.nn.Module) else KVDistiller.load(start)
        made.check_model(spec, "start")
        for name, x in made.float().named_parameters():
            x.requires_grad_(name.rpartition(".")[2] not in ("mean", "deviation"))
        return made
    fixed = {"head_dim", "num_kv_heads"} & set(config or {})
    if fixed:
        raise ValueError(f"config must leave out {', '.join(sorted(fixed))}: they follow from the model")
    made = DistillerConfig(head_dim=spec.head_dim, num_kv_heads=spec.num_kv_heads, **(config or {}))
    generator = torch.Generator().manual_seed(seed)
    return KVDistiller(made, spec.layer_kinds.count("full"), spec.fingerprint, generator=generator)
