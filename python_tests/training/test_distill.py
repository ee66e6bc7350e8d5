# SPDX-License-Identifier: Apache-2.0
"""The distillation loss against plain definitions."""

import pytest
import torch
from tiny_models import VOCABULARY, tiny_ids, tiny_model

from kvcompact_kernels import patch_model
from kvcompact_kernels.training.distill import (
    Targets,
    distillation_loss,
    hidden_states,
    teacher_targets,
    vocabulary_logits,
)


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request):
    options = {"final_logit_softcapping": 3.0} if request.param == "gemma3_text" else {}
    return patch_model(tiny_model(request.param, torch.float32, **options)).requires_grad_(False)


def hidden_of(model, seed, count=11):
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


def test_hidden_states_predict_what_the_model_predicts(model):
    ids = tiny_ids(2, 9)
    rows = torch.zeros(2, 9, dtype=torch.bool)
    rows[0, 3], rows[0, 8], rows[1, 1] = True, True, True
    logits = vocabulary_logits(model, hidden_states(model, ids, None, rows))
    whole = model(ids).logits
    assert torch.allclose(logits, torch.stack([whole[0, 2], whole[0, 7], whole[1, 0]]), atol=1e-5)
    rows[1, 0] = True
    with pytest.raises(ValueError, match="first column"):
        hidden_states(model, ids, None, rows)


def test_the_teachers_tokens_and_the_one_that_came(model):
    hidden, gold = hidden_of(model, 1).detach(), torch.arange(11)
    logs = vocabulary_logits(model, hidden).double().log_softmax(-1)
    targets = teacher_targets(model, hidden, gold, top_k=7, rows=4)
    for i in range(11):
        best = logs[i].argsort(descending=True)[:7]
        assert targets.ids[i].tolist() == [*best.tolist(), i]
        assert torch.allclose(targets.logs[i, :7].double(), logs[i, best], atol=1e-5)
        if i in best:
            assert targets.logs[i, 7] == -float("inf")
        else:
            assert abs(targets.logs[i, 7].double() - logs[i, i]) < 1e-5
    assert torch.equal(targets.gold, gold) and torch.equal(targets.top, logs.argmax(1))


@pytest.mark.parametrize("rest", ["lump", "renormalise"])
@pytest.mark.parametrize("top_k", [5, VOCABULARY])
@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_the_definitions_in_any_chunks(model, rest, top_k, reverse):
    gold = torch.arange(3, 14)
    targets = teacher_targets(model, hidden_of(model, 1), gold, top_k)
    student = hidden_of(model, 2)
    kl, cross_entropy, right = distillation_loss(model, student, targets, rest=rest, reverse=reverse, rows=4)
    # the definition: a distribution over the kept tokens and, lumped, one outcome for all others
    p_all = vocabulary_logits(model, hidden_of(model, 1)).double().softmax(-1).detach()
    q_all = vocabulary_logits(model, student).double().softmax(-1)
    wanted = []
    for i in range(11):
        kept = sorted({*p_all[i].argsort(descending=True)[:top_k].tolist(), int(gold[i])})
        p, q = p_all[i, kept], q_all[i, kept]
        if rest == "renormalise":
            p, q = p / p.sum(), q / q.sum()
        elif len(kept) < VOCABULARY:
            p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
        wanted.append((1 - reverse) * (p * (p / q).log()).sum() + reverse * (q * (q / p).log()).sum())
    assert torch.allclose(kl.double(), torch.stack(wanted), atol=2e-5)
    assert (kl >= -1e-5).all()
    assert torch.allclose(cross_entropy.double(), -q_all[torch.arange(11), gold].log(), atol=1e-5)
    assert torch.equal(right.bool(), q_all.argmax(1) == gold)
    (found,) = torch.autograd.grad(kl.sum() + cross_entropy.sum(), student)
    (expected,) = torch.autograd.grad(torch.stack(wanted).sum() - q_all[torch.arange(11), gold].log().sum(), student)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_perfect_student_has_no_loss_and_a_sure_teacher_gives_finite_gradients(model):
    hidden = hidden_of(model, 1)
    targets = teacher_targets(model, hidden, torch.arange(11), 9)
    kl, _, _ = distillation_loss(model, hidden, targets)
    assert kl.abs().max() < 1e-5
    sure = Targets(targets.ids, torch.full_like(targets.logs, -float("inf")).index_fill(1, torch.tensor(0), 0.0))
    for reverse in (0.0, 0.5):
        kl, _, _ = distillation_loss(model, hidden, sure, reverse=reverse)
        (gradient,) = torch.autograd.grad(kl.sum(), hidden)
        assert gradient.isfinite().all() and kl.isfinite().all()


def test_bad_arguments(model):
    hidden = hidden_of(model, 1)
    targets = teacher_targets(model, hidden, torch.arange(11), 3)
    with pytest.raises(ValueError, match="rest must be one of"):
        distillation_loss(model, hidden, targets, rest="drop")
    with pytest.raises(ValueError, match=r"reverse must be in \[0, 1\], got 1.5"):
        distillation_loss(model, hidden, targets, reverse=1.5)
    with pytest.raises(ValueError, match="targets are of 11 positions, hidden of 5"):
        distillation_loss(model, hidden[:5], targets)
    with pytest.raises(ValueError, match="at least one position"):
        teacher_targets(model, hidden[:0], torch.arange(0), 3)
