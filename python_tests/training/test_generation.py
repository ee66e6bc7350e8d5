# SPDX-License-Identifier: Apache-2.0
"""What the model writes for trainings: ends, chance, and what is kept of its distribution."""

import pytest
import torch
from tiny_models import tiny_ids, tiny_model
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from kvcompact_kernels import patch_model
from kvcompact_kernels.training import generation
from kvcompact_kernels.training.generation import TOP_P, draw_tokens, generate

PROMPTS = [[5, 6, 7, 8, 9], [10, 11]]


@pytest.fixture
def model():
    return patch_model(tiny_model("llama", torch.float32, vocab_size=261), "full")


def test_answers_end_at_their_end_token(model):
    found = generate(model, PROMPTS, 6)
    for prompt, answer in zip(PROMPTS, found):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
        assert answer.ids == alone and answer.targets is None
    model.generation_config.eos_token_id = end = found[0].ids[2]
    assert generate(model, PROMPTS, 6)[0].ids == found[0].ids[: found[0].ids.index(end) + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("behind", [False, True])
def test_what_is_kept_is_the_distribution_that_tokens_were_chosen_from(model, temperature, behind):
    context = tiny_ids(1, 20) % 261
    cache = model.compact(context, method="full", ratio=1) if behind else None
    torch.manual_seed(1)
    found = generate(model, PROMPTS, 8, past=cache, temperature=temperature, top_k=5)
    model.double()  # so that what follows is the truth, not a second opinion
    for prompt, answer in zip(PROMPTS, found):
        before = context[0].tolist() if behind else []
        ids = torch.tensor([before + prompt + answer.ids])
        logs = model(ids).logits[0, -1 - len(answer.ids) : -1].log_softmax(-1)
        best, where = logs.topk(5, -1)
        assert torch.equal(answer.targets.ids[:, :5], where)
        torch.testing.assert_close(answer.targets.logs[:, :5], best.float())
        assert answer.targets.gold.tolist() == answer.ids
        for step, token in enumerate(answer.ids):
            own = answer.targets.logs[step, 5].item()
            if token in where[step]:
                assert own == -torch.inf
            else:
                assert own == pytest.approx(logs[step, token].item(), rel=1e-5)
    greedy = [answer.targets.top.tolist() == answer.ids for answer in found]
    assert all(greedy) if temperature == 0 else not all(greedy)


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_tokens_are_drawn_as_transformers_draws_them(temperature, monkeypatch):
    monkeypatch.setattr(generation, "CANDIDATES", 80)
    logits = 3 * torch.randn(1, 500, generator=torch.Generator().manual_seed(2))
    scores = TopPLogitsWarper(TOP_P)(None, TemperatureLogitsWarper(temperature)(None, logits))
    expected = scores.softmax(-1)[0]
    assert 5 < int((expected > 0).sum()) <= 80  # all that may be drawn is among the candidates
    torch.manual_seed(3)
    draws = 100_000
    times = torch.bincount(draw_tokens(logits.expand(draws, -1), temperature), minlength=500)
    assert not times[expected == 0].any()
    # five standard errors
    assert ((times / draws - expected).abs() <= 5 * (expected / draws).sqrt() + 1e-9).all()


def test_a_models_own_settings_do_not_change_what_it_holds_likely(model):
    expected = generate(model, PROMPTS, 12)
    model.generation_config.update(repetition_penalty=1e9, do_sample=True, temperature=3.0, top_k=2, top_p=0.1)
    assert [answer.ids for answer in generate(model, PROMPTS, 12)] == [answer.ids for answer in expected]
    # it is a setting that shows
    changed = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=12, do_sample=False)[0, 5:].tolist()
    assert changed != expected[0].ids
