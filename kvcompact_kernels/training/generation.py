# SPDX-License-Identifier: Apache-2.0
"""What the model writes itself, for trainings: many prompts together, and what it held likely at each token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..evaluation.metrics import stop_ids
from ..patch.families import cache_argument
from .distill import Targets, likeliest_tokens

TOP_P = 0.95
CANDIDATES = 256


@dataclass(frozen=True)
class Written:
    """What followed a prompt.

    Attributes:
        ids: up to the end token, which stays.
        targets: what the model held likely where each of them stands, if that was asked for.
    """

    ids: list[int]
    targets: Targets | None = None


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    past: Any = None,
    temperature: float = 0.0,
    top_k: int = 0,
) -> list[Written]:
    """Answers to prompts of unequal length.

    Args:
        model: with a vocabulary head.
        past: a ``CompactCache`` that all prompts stand behind, or None.
        temperature: of the sampling, from the tokens that hold ``TOP_P`` of the mass, ``CANDIDATES`` of them at most, with
            torch's own random numbers. 0: the likeliest token.
        top_k: tokens kept for ``targets``; 0 keeps none.
    """
    device = model.device
    stop = stop_ids(model)
    pad = min(stop, default=0)
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    chooser = _Chooser(temperature, top_k)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        # of what a model's own settings may hold, all that would change its distribution or warn of sampling
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
        logits_processor=LogitsProcessorList([chooser]),
        **cache_argument(model, past),
    )
    kept = [torch.stack(x, 1) for x in zip(*((step.ids, step.logs) for step in chooser.kept))]  # [B, steps, top_k + 1]
    written = []
    for number, row in enumerate(out[:, longest:].tolist()):
        end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
        written.append(Written(row[:end], Targets(*(x[number, :end] for x in kept)) if kept else None))
    return written


class _Chooser(LogitsProcessor):
    """Chooses each token itself, and leaves nothing else for greedy decoding to take.

    ``generate``'s own sampling sorts the whole vocabulary at each token and draws a random number for each of its entries:
    with a vocabulary of 150 thousand a third of all time on a CPU.
    """

    def __init__(self, temperature: float, top_k: int):
        self.temperature, self.top_k = temperature, top_k
        self.kept: list[Targets] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = draw_tokens(scores, self.temperature) if self.temperature else scores.argmax(-1)
        if self.top_k:
            self.kept.append(likeliest_tokens(scores, chosen, self.top_k))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw_tokens(logits: Tensor, temperature: float) -> Tensor:
    """int64 ``[N]``, one drawn from each row of ``[N, vocabulary]``: nucleus sampling among the likeliest ``CANDIDATES``."""
    scaled = logits.float() / temperature
    best, index = scaled.topk(min(CANDIDATES, scaled.shape[-1]), -1)
    mass = (best - scaled.logsumexp(-1, keepdim=True)).exp()
    mass = mass.masked_fill(mass.cumsum(-1) - mass >= TOP_P, 0.0)
    return index.gather(1, torch.multinomial(mass, 1))[:, 0]
