# SPDX-License-Identifier: Apache-2.0
"""A cartridge's slots, fitted one layer at a time before they are trained together.

The model reads the conversations of :mod:`.self_study` behind the whole text, and what each layer's attention was asked and
gave is kept. Then each layer's slots are trained by themselves to give the same to the same queries: as in Attention Matching
(arXiv 2602.16284), but on attention as the query meets it, with its own conversation behind the slots, and by gradient descent
on keys and values. No pass through the model is needed for a step, and every layer learns from what it itself should do, which
the loss at the model's end tells only through all layers above.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache import CompactBlock
from ..methods.cartridge import Cartridge
from ..model_spec import ModelSpec
from ..ops import compact_attention
from .attention import Recorder, read_behind
from .loop import LoopConfig, ParameterGroup, Step, StepOutput, TrainResult, train
from .self_study import Conversation, Conversations

BATCH = 32
# of one layer's slots in a step: positions, each of which gives a query to every head
POSITIONS = 288
MAX_POSITIONS = 16384  # that are kept, of MAX_CONVERSATIONS; 6 bytes for each element of a layer's queries
MAX_CONVERSATIONS = 1024
HELD_OUT_POSITIONS = 1024
PROMPT_SHARE = 0.25  # of the requests' places, whose queries matter less than those that answers are predicted from
RATE = 0.07  # times the spread of what is trained; 0.05 to 0.1 were alike, 0.2 worse


@dataclass
class Asked:
    """What a layer's attention was asked and gave, at P positions behind the whole text.

    Attributes:
        queries: ``[P, H, d]``, rotated.
        outputs: ``[P, H, d]``: attention over the text and the conversation.
        own, own_lse: ``[P, H, d]`` and fp32 ``[P, H]``: attention over the conversation alone.
    """

    queries: Tensor
    outputs: Tensor
    own: Tensor
    own_lse: Tensor

    def take(self, places: Tensor, device: torch.device) -> "Asked":
        """Those positions, on a device."""
        return Asked(*(x[places].to(device) for x in (self.queries, self.outputs, self.own, self.own_lse)))


def behind_slots(block: CompactBlock, asked: Asked, kv_heads: int, scale: float) -> Tensor:
    """Attention over a block of slots and the conversation: ``[P, H, d]``, fp32, differentiable in the slots."""
    there, lse = compact_attention(
        asked.queries.transpose(0, 1)[None],
        [block.keys],
        [block.values],
        [block.beta],
        offsets=[block.offsets],
        num_kv_heads=kv_heads,
        scale=scale,
        causal=False,
        return_lse=True,
    )
    share = torch.sigmoid(lse[0].T - asked.own_lse)[..., None]
    return share * there[0].transpose(0, 1).float() + (1 - share) * asked.own.float()


def fit_layers(
    model: Any,
    spec: ModelSpec,
    ids: Sequence[int],
    conversations: Conversations,
    cartridge: Cartridge,
    steps: int,
    folder: str | Path,
    *,
    seed: int = 0,
    max_seconds: float | None = None,
    piece_bytes: int | None = None,
    identity: dict[str, Any] | None = None,
    progress: bool = False,
    description: str = "layers",
) -> TrainResult:
    """Fits all layers of a cartridge in place; goes on from the folder's checkpoint.

    The error of a layer is what the squared difference of its outputs is of what the text adds to them:
    ``sum |y - o|^2 / sum |own - o|^2``. A step lowers the mean over layers on ``POSITIONS`` positions; its gradients do not
    mix layers. The log's held-out figure ``error`` is that mean for the conversations that are not trained on.

    Args:
        model: patched and frozen.
        ids: the text; the model must have as many positions, and the cartridge must stand for all of it.
        conversations: on it. Of more than ``MAX_CONVERSATIONS`` so many are drawn, once and for all.
        cartridge: its trained slots, and biases if it trains them, change; sliding-window layers stay as they are.
        steps: optimizer steps.
        folder: of checkpoint and log.
        max_seconds: as in :class:`.loop.LoopConfig`.
        identity: what else a checkpoint must agree with.

    Raises:
        ValueError: the cartridge stands for another number of tokens than the text has.
        TrainingError, TrainingInterrupted, CheckpointError, OSError: see :func:`.loop.train`.
    """
    if cartridge.logical_length != len(ids):
        raise ValueError(f"the cartridge must stand for the {len(ids)} tokens of ids, got {cartridge.logical_length}")
    task = _Task(model, spec, list(ids), conversations, cartridge, seed, progress)
    loop = LoopConfig(
        steps=steps,
        lr=RATE,
        optimizer="adam",
        betas=(0.9, 0.99),
        eps=1e-10,
        warmup=min(10, steps // 4),
        clip=None,
        seed=seed,
        evaluate_every=max(1, steps // 8) if conversations.held_out else None,
        checkpoint_every=100,
        max_seconds=max_seconds,
        piece_bytes=piece_bytes,
    )
    return train(
        task.step,
        task.groups(),
        loop,
        folder,
        identity=task.identity() | (identity or {}),
        evaluate=task.evaluate,
        progress=progress,
        description=description,
        shown="error",
        prepare=task.read,
    )


class _Task:
    """Loss and held-out error of what :meth:`read` was given to see."""

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        ids: list[int],
        conversations: Conversations,
        cartridge: Cartridge,
        seed: int,
        progress: bool,
    ):
        self.model, self.spec, self.ids, self.conversations, self.cartridge = model, spec, ids, conversations, cartridge
        self.layers = [i for i, kind in enumerate(cartridge.kinds) if kind == "full"]
        self.seed, self.progress = seed, progress
        self.trained: dict[int, Asked] = {}
        self.held_out: dict[int, Asked] = {}
        self._norms: dict[int, float] = {}

    def groups(self) -> list[ParameterGroup]:
        """Keys and values learn in units of their spread over a head's slots, biases in their own."""
        groups = []
        for number, i in enumerate(self.layers):
            block = self.cartridge.block(i)
            groups.append(ParameterGroup({f"keys.{i}": self.cartridge.keys[number]}, _spread(block, block.keys)))
            groups.append(ParameterGroup({f"values.{i}": self.cartridge.values[number]}, _spread(block, block.values)))
            if self.cartridge.train_beta:
                groups.append(ParameterGroup({f"beta.{i}": self.cartridge.beta[number]}))
        return groups

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "layer_fit",
            "model": self.spec.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "documents": self.conversations.digest,
        }

    def step(self, step: Step) -> StepOutput:
        count = len(self.trained[self.layers[0]].queries)
        places = torch.tensor(step.batch(count, min(POSITIONS, count)))
        errors = [self._error(i, self.trained[i], places) for i in self.layers]
        error = torch.stack(errors).mean()
        worst = max(float(x.detach()) for x in errors)
        return StepOutput(error, {"worst_layer": worst}, f"positions {places[:8].tolist()}, ...")

    def evaluate(self) -> dict[str, float]:
        count, total = len(self.held_out[self.layers[0]].queries), 0.0
        for places in torch.arange(count).split(POSITIONS):
            total += len(places) * sum(float(self._error(i, self.held_out[i], places)) for i in self.layers)
        return {"error": total / count / len(self.layers)}

    def _error(self, layer: int, asked: Asked, places: Tensor) -> Tensor:
        """Of one layer at ``places``, relative to what the text adds at all positions that are trained on."""
        asked = asked.take(places, self.model.device)
        block = self.cartridge.block(layer).to(dtype=self.model.dtype)
        found = behind_slots(block, asked, self.spec.num_kv_heads, self.spec.scales[layer])
        return (found - asked.outputs.float()).square().sum() / len(places) / self._norms[layer]

    @torch.no_grad()
    def read(self) -> None:
        """Has the model read text and conversations; what it was asked stays in main memory."""
        full = self.model.compact(torch.tensor([self.ids], device=self.model.device), method="full", ratio=1)
        draw, data = random.Random(self.seed), self.conversations
        chosen = data.train
        if len(chosen) > MAX_CONVERSATIONS:
            chosen = sorted(draw.sample(chosen, MAX_CONVERSATIONS))
        self.trained, self.held_out = (
            record(self.model, self.spec, full, [data[i] for i in part], limit, draw, progress=self.progress)
            for part, limit in ((chosen, MAX_POSITIONS), (data.held_out, HELD_OUT_POSITIONS))
        )
        for i, asked in self.trained.items():
            difference = (asked.own.float() - asked.outputs.float()).square().sum()
            self._norms[i] = float(difference / len(asked.queries))


def record(
    model: Any,
    spec: ModelSpec,
    full: Any,
    conversations: Sequence[Conversation],
    limit: int,
    draw: random.Random,
    *,
    progress: bool = False,
) -> dict[int, Asked]:
    """What the compacted layers are asked by conversations behind the full cache, in main memory.

    Positions are those that predict a token of an answer, and ``PROMPT_SHARE`` of the others; ``limit`` of them at most.
    """
    from tqdm import tqdm

    rows = [c.tokens for c in conversations]
    places = [
        (number, place)
        for number, c in enumerate(conversations)
        for place in range(len(rows[number]))
        if place >= len(c.prompt) - 1 or draw.random() < PROMPT_SHARE
    ]
    if len(places) > limit:
        places = draw.sample(places, limit)
    wanted: list[list[int]] = [[] for _ in rows]
    for number, place in places:
        wanted[number].append(place)
    kept = [i for i, kind in enumerate(spec.layer_kinds) if kind == "full"]
    found: dict[int, Asked] = {}
    filled = 0
    quiet = not progress or not rows
    with tqdm(total=len(rows), desc="reading conversations", unit="conversation", leave=False, disable=quiet) as bar:
        for numbers, session in read_behind(model, spec, full, rows, BATCH):
            row = torch.tensor([r for r, number in enumerate(numbers) for _ in wanted[number]], device=model.device)
            place = torch.tensor([p for number in numbers for p in wanted[number]], device=model.device)
            for i in kept:
                parts = _attention_of(session, i, spec.scales[i], row.long(), place.long())
                if i not in found:  # one piece of memory for each layer
                    found[i] = Asked(*(x.new_empty(len(places), *x.shape[1:], device="cpu") for x in parts))
                asked = found[i]
                for whole, part in zip((asked.queries, asked.outputs, asked.own, asked.own_lse), parts):
                    whole[filled : filled + len(place)] = part
            filled += len(place)
            bar.update(len(numbers))
    return found


def _attention_of(session: Recorder, layer: int, scale: float, row: Tensor, place: Tensor) -> tuple[Tensor, ...]:
    """The four of :class:`Asked` at ``place`` of ``row``."""
    queries = session.queries[layer]
    own, lse = compact_attention(
        queries,
        [],
        [],
        tail_keys=session.tail_keys[layer],
        tail_values=session.tail_values[layer],
        scale=scale,
        return_lse=True,
    )
    return (
        queries[row, :, place],
        session.outputs[layer][row, place],
        own[row, :, place],
        lse[row, :, place],
    )


def _spread(block: CompactBlock, x: Tensor) -> float:
    """Standard deviation of keys or values over a head's slots, on average."""
    heads = x[0] if block.offsets is None else [x[a:b] for a, b in zip(block.offsets[:-1], block.offsets[1:])]
    return float(torch.stack([h.detach().float().std(0, correction=0).mean() for h in heads]).mean())
