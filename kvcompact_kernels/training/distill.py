# SPDX-License-Identifier: Apache-2.0
"""KL between a teacher's distribution and a student's, over the tokens that matter and a few rows at a time.

Teacher and student are the same frozen model on different caches. What is kept of the teacher is its ``top_k`` tokens and
the token that really came, per position (STILL, arXiv 2606.07878; Cartridges, arXiv 2506.06266): rows of the vocabulary's
width exist for ``rows`` positions at a time, in the backward pass too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from .._checks import check_choice, check_int, check_tensor
from ..patch.families import read_tokens

RESTS = ("lump", "renormalise")


@dataclass(frozen=True)
class Targets:
    """The teacher's distribution at N positions.

    Attributes:
        ids: int64 ``[N, k + 1]``: its k most likely tokens, and last the token that really came.
        logs: fp32 ``[N, k + 1]`` log-probabilities (natural log) over the whole vocabulary; -inf in the last column where
            that token is among the k.
    """

    ids: Tensor
    logs: Tensor

    @property
    def gold(self) -> Tensor:
        """int64 ``[N]``: the tokens that really came."""
        return self.ids[:, -1]

    @property
    def top(self) -> Tensor:
        """int64 ``[N]``: the teacher's most likely tokens."""
        return self.ids[:, 0]


def pad_answers(pairs: Sequence[tuple[Sequence[int] | Tensor, Sequence[int] | Tensor]]) -> tuple[Tensor, Tensor]:
    """Prompts, each with the answer behind it, as one batch.

    Args:
        pairs: token ids of prompt and answer.

    Returns:
        ``(ids [B, n] int64, places [B, n] bool)``: shorter rows end in zeros, and ``places`` is True where answers stand. The
        zeros need no mask: they stand behind every token that counts, and attention is causal.
    """
    rows = [torch.cat([torch.as_tensor(part, dtype=torch.int64) for part in pair]) for pair in pairs]
    places = [torch.arange(len(row)) >= len(prompt) for row, (prompt, _) in zip(rows, pairs)]
    return pad_sequence(rows, batch_first=True), pad_sequence(places, batch_first=True)


def hidden_states(model: nn.Module, ids: Tensor, past: Any, rows: Tensor) -> Tensor:
    """Final hidden states that predict chosen tokens.

    Args:
        model: a patched model with a vocabulary head.
        ids: int64 ``[B, n]`` new tokens.
        past: a ``CompactCache`` or ``CompactSession``, or None.
        rows: bool ``[B, n]``: tokens to predict; the first column must be False, for nothing in ``ids`` predicts it.

    Returns:
        ``[N, hidden]``, the N chosen tokens row by row.
    """
    check_tensor("rows", rows, shape=tuple(ids.shape), dtypes=(torch.bool,))
    if bool(rows[:, 0].any()):
        raise ValueError("rows must be False in its first column: the token before it is in the cache")
    out = read_tokens(model, ids, past, use_cache=False).last_hidden_state
    return out[:, :-1][rows[:, 1:]]


def vocabulary_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """fp32 logits ``[N, vocabulary]`` of hidden states ``[N, hidden]``, as the model's own forward pass makes them."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def teacher_targets(model: nn.Module, hidden: Tensor, gold: Tensor, top_k: int = 200, rows: int = 256) -> Targets:
    """The teacher's distribution at N positions.

    Args:
        hidden: ``[N, hidden]`` of the teacher's pass.
        gold: int64 ``[N]``: the tokens that really came.
        top_k: tokens kept (all of the vocabulary when it is smaller).
        rows: positions whose logits exist at a time.
    """
    check_int("top_k", top_k, minimum=1)
    check_int("rows", rows, minimum=1)
    check_tensor("gold", gold, shape=(hidden.shape[0],), dtypes=(torch.int64,))
    if hidden.shape[0] == 0:
        raise ValueError("hidden must hold at least one position, got none")
    parts = [
        likeliest_tokens(vocabulary_logits(model, part), came, top_k)
        for part, came in zip(hidden.split(rows), gold.split(rows))
    ]
    return Targets(torch.cat([part.ids for part in parts]), torch.cat([part.logs for part in parts]))


def likeliest_tokens(logits: Tensor, gold: Tensor, top_k: int) -> Targets:
    """What is kept of logits ``[N, vocabulary]`` where the tokens ``gold`` (int64 ``[N]``) came."""
    all_logs = logits.float().log_softmax(-1)
    best, index = all_logs.topk(min(top_k, all_logs.shape[-1]), -1)
    own = all_logs.gather(1, gold[:, None])
    own = own.masked_fill((index == gold[:, None]).any(1, keepdim=True), float("-inf"))
    return Targets(torch.cat([index, gold[:, None]], 1), torch.cat([best, own], 1))


def distillation_loss(
    model: nn.Module, hidden: Tensor, targets: Targets, *, rest: str = "lump", reverse: float = 0.0, rows: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student) at each position, and how the student did otherwise.

    Args:
        model: its vocabulary head is used; the head's own parameters get no gradient unless they require one.
        hidden: ``[N, hidden]`` of the student's pass.
        targets: of the same positions.
        rest: "lump": all other tokens count as one, which makes a lower bound of the full KL; "renormalise": both
            distributions are scaled to the kept tokens, as Cartridges' code does.
        reverse: in [0, 1]: share of KL(student || teacher) in ``kl``, the rest being KL(teacher || student).
        rows: positions whose logits exist at a time.

    Returns:
        ``(kl [N], cross_entropy [N], right [N])``, fp32: nats; cross-entropy of the tokens that came; 1 where the student's
        most likely token is that token. ``kl`` and ``cross_entropy`` are differentiable.
    """
    check_choice("rest", rest, RESTS)
    check_int("rows", rows, minimum=1)
    if not 0 <= reverse <= 1:
        raise ValueError(f"reverse must be in [0, 1], got {reverse}")
    if targets.ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"targets are of {targets.ids.shape[0]} positions, hidden of {hidden.shape[0]}")
    parts = []
    for part, ids, logs in zip(hidden.split(rows), targets.ids.split(rows), targets.logs.split(rows)):
        if torch.is_grad_enabled() and part.requires_grad:
            parts.append(checkpoint(_compare, model, part, ids, logs, rest, reverse, use_reentrant=False))
        else:
            parts.append(_compare(model, part, ids, logs, rest, reverse))
    kl, cross_entropy, right = zip(*parts)
    return torch.cat(kl), torch.cat(cross_entropy), torch.cat(right)


def _compare(
    model: nn.Module, hidden: Tensor, ids: Tensor, logs: Tensor, rest: str, reverse: float
) -> tuple[Tensor, Tensor, Tensor]:
    student = vocabulary_logits(model, hidden).log_softmax(-1)
    kept = student.gather(1, ids)
    counted = logs > float("-inf")
    if rest == "renormalise":
        p = logs - logs.logsumexp(1, keepdim=True)
        q = kept - kept.masked_fill(~counted, float("-inf")).logsumexp(1, keepdim=True)
    else:
        # beyond the kept tokens little mass is left, and what 1 - sum loses to rounding must not become -inf
        smallest = 1e-6
        other = (1 - logs.exp().sum(1, keepdim=True)).clamp(min=smallest).log()
        seen = (1 - (kept.exp() * counted).sum(1, keepdim=True)).clamp(min=smallest).log()
        p, q = torch.cat([logs, other], 1), torch.cat([kept, seen], 1)
        counted = torch.cat([counted, torch.ones_like(other, dtype=torch.bool)], 1)
    # the mask keeps 0 * inf out of the backward pass
    difference = p.masked_fill(~counted, 0.0) - q
    weight = (1 - reverse) * p.exp()
    if reverse:
        weight = weight - reverse * q.exp()
    kl = torch.where(counted, weight * difference, 0.0).sum(1)
    right = (student.argmax(1) == ids[:, -1]).float()
    return kl, -kept[:, -1], right.detach()
