# SPDX-License-Identifier: Apache-2.0
"""The start of a cartridge from its conversations' answers."""

import math
import random

import pytest
import torch
from tiny_models import tiny_model

from kvcompact_kernels.cache import CompactBlock, WindowBlock
from kvcompact_kernels.methods import LayerInput, Method
from kvcompact_kernels.methods.attention_matching import BETA_LIMIT, fit_slots, queries_from_behind
from kvcompact_kernels.patch import model_spec
from kvcompact_kernels.reference import matching
from kvcompact_kernels.token_selector import MAX_QUERIES, SelectorConfig, TokenSelector, token_features
from kvcompact_kernels.training import study_start as study_start_module
from kvcompact_kernels.training.attention import Recorder
from kvcompact_kernels.training.common import frozen
from kvcompact_kernels.training.distill import Targets
from kvcompact_kernels.training.self_study import Conversation
from kvcompact_kernels.training.study_start import MASS_RIDGE, VALUE_RIDGE, study_start

TEXT = list(range(3, 40))
NOTHING = Targets(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1))


def conversation(prompt, answer, kind="question"):
    return Conversation(torch.tensor(prompt), torch.tensor(answer), NOTHING, kind)


TALKS = [conversation([50, 51, 52], [60, 61]), conversation([53], [62, 63, 64, 65]), conversation([54, 55], [66])]


def started(model, talks, slots, **options):
    with frozen(model):
        return study_start(model, model_spec(model), TEXT, talks, slots, **options)


def attention_of_answers(model, talks):
    """By the model's own eager attention: [conversation][layer] -> [H, T], the most that a query of its answer gives."""
    model.set_attn_implementation("eager")
    found = []
    for talk in talks:
        ids = torch.cat([torch.tensor(TEXT), talk.prompt, talk.answer[:-1]])[None]
        maps = model(ids, output_attentions=True).attentions
        found.append([x[0, :, -len(talk.answer) :, : len(TEXT)].amax(1) for x in maps])
    return found


@torch.no_grad()
def test_the_tokens_that_answers_look_at_are_kept():
    model = tiny_model("llama", torch.float32, max_position_embeddings=128)
    cache = started(model, TALKS, 9, sinks=2)
    with frozen(model):
        full = model.compact(torch.tensor([TEXT]), method="full", ratio=1)
    attention = attention_of_answers(model, TALKS)
    assert cache.logical_length == len(TEXT) and cache.num_slots == 9
    for number, block in enumerate(cache.layers):
        heads = block.num_kv_heads
        scores = sum(talk[number].view(heads, -1, len(TEXT)).amax(1) for talk in attention)
        scores[:, :2] = math.inf
        for head in range(heads):
            wanted = scores[head].topk(9).indices.sort().values
            torch.testing.assert_close(block.keys[0, head], full.layers[number].keys[0, head, wanted])
        assert block.beta is not None and block.beta.abs().max() > 1e-3


@torch.no_grad()
def test_biases_and_values_are_fitted_to_the_answers_queries():
    model = tiny_model("llama", torch.float64, max_position_embeddings=128)
    spec = model_spec(model)
    cache = started(model, TALKS, 9)
    with frozen(model):
        full = model.compact(torch.tensor([TEXT]), method="full", ratio=1)
        asked = [[] for _ in full.layers]
        for talk in TALKS:  # one at a time, and in this order: the fit does not depend on it
            session = Recorder(spec, full)
            model(torch.cat([talk.prompt, talk.answer])[None], past_key_values=session, use_cache=True)
            for number, found in enumerate(asked):
                found.append(session.queries[number][:, :, len(talk.prompt) - 1 : -1])
    for block, whole, found, scale in zip(cache.layers, full.layers, asked, spec.scales):
        queries = matching.reference_queries(torch.cat(found, 2), whole.num_kv_heads)
        outputs, lse, _ = matching.full_attention(queries, whole.keys, whole.values, scale)
        indices = (block.keys[:, :, :, None] == whole.keys[:, :, None]).all(-1).int().argmax(-1)
        layer = LayerInput(0, 1, whole.keys, whole.values, None, torch.arange(len(TEXT)), full.ropes["full"], scale)
        wanted = fit_slots(layer, queries, outputs, lse, indices, MASS_RIDGE, VALUE_RIDGE, BETA_LIMIT)
        torch.testing.assert_close(block.beta, wanted.beta)
        torch.testing.assert_close(block.values, wanted.values)


@torch.no_grad()
def test_a_question_that_comes_often_counts_more_than_a_long_answer():
    model = tiny_model("llama", torch.float32, max_position_embeddings=128)
    often = started(model, TALKS[:1] * 50 + TALKS[1:2], 8)
    alone = started(model, TALKS[:1], 8)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(often.layers, alone.layers))
    other = started(model, TALKS[1:2], 8)
    assert any(not torch.equal(a.keys, b.keys) for a, b in zip(other.layers, alone.layers))


@torch.no_grad()
def test_passages_to_continue_count_only_where_there_is_nothing_else():
    model = tiny_model("llama", torch.float32, max_position_embeddings=128)
    passage = conversation([56, 57], [67, 68, 69], "recall")
    beside = started(model, [*TALKS, passage], 8)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(beside.layers, started(model, TALKS, 8).layers))
    assert started(model, [passage], 8).num_slots == 8


@torch.no_grad()
def test_gaps_rank_tokens_but_are_not_what_a_selectors_choice_is_fitted_to():
    model = tiny_model("llama", torch.float32, max_position_embeddings=128)
    gaps = [conversation([56 + i, 57], [67, 68 + i], "gap") for i in range(6)]
    asked = [conversation(talk.prompt.tolist(), talk.answer.tolist()) for talk in gaps]
    for one, other in ((gaps, asked), ([*TALKS, *gaps], [*TALKS, *asked])):
        found, wanted = started(model, one, 8), started(model, other, 8)
        for a, b in zip(found.layers, wanted.layers):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    alone = started(model, TALKS, 8)
    assert any(not torch.equal(a.keys, b.keys) for a, b in zip(found.layers, alone.layers))
    selector = new_selector(model_spec(model))
    with_gaps, without = (started(model, talks, 8, selector=selector) for talks in ([*TALKS, *gaps], TALKS))
    assert all(torch.equal(a.values, b.values) for a, b in zip(with_gaps.layers, without.layers))


@torch.no_grad()
def test_all_slots_are_the_text_itself():
    model = tiny_model("llama", torch.float64, max_position_embeddings=128)
    cache = started(model, TALKS, len(TEXT))
    talk = torch.tensor([[50, 51, 52, 60, 61]])
    whole = model(torch.cat([torch.tensor([TEXT]), talk], 1)).logits[:, len(TEXT) :]
    with frozen(model):
        torch.testing.assert_close(model(talk, past_key_values=cache).logits, whole)


@torch.no_grad()
def test_sliding_layers_keep_their_window():
    model = tiny_model("gemma3_text", torch.float32, max_position_embeddings=128)
    cache = started(model, TALKS, 8)
    spec = model_spec(model)
    assert "sliding" in spec.layer_kinds
    for kind, block in zip(spec.layer_kinds, cache.layers):
        assert isinstance(block, WindowBlock) == (kind == "sliding")
        if kind == "full":
            assert block.num_slots == 8


@pytest.mark.parametrize("slots", [1, 3])
@torch.no_grad()
def test_few_slots(slots):
    model = tiny_model("llama", torch.float32, max_position_embeddings=128)
    assert started(model, TALKS, slots).num_slots == slots


@torch.no_grad()
def test_a_selector_chooses_and_the_answers_fit():
    """Tokens by what the selector expects of questions, from the definition; biases and values as for these tokens anyway."""
    model = tiny_model("llama", torch.float32, max_position_embeddings=128)
    spec = model_spec(model)
    selector = new_selector(spec)
    for layer in selector.layers:
        layer["out_weight"].normal_(generator=torch.Generator().manual_seed(2))
    cache = started(model, TALKS, 9, sinks=2, selector=selector)
    own = started(model, TALKS, 9, sinks=2)
    with frozen(model):
        full = model.compact(torch.tensor([TEXT]), method="full", ratio=1)
        seen = {}
        model.compact(torch.tensor([TEXT]), method=Looks(seen, selector), ratio=1)
    chosen = []
    for number, block in enumerate(cache.layers):
        scores = seen[number].clone()
        scores[:, :, :2] = math.inf
        for head in range(block.num_kv_heads):
            wanted = scores[0, head].topk(9).indices.sort().values
            torch.testing.assert_close(block.keys[0, head], full.layers[number].keys[0, head, wanted])
            chosen.append(torch.equal(block.keys[0, head], own.layers[number].keys[0, head]))
        assert block.beta.abs().max() > 1e-3 and not torch.equal(
            block.values[0, 0, 2:], full.layers[number].values[0, 0, 2:9]
        )
    assert not all(chosen)


def new_selector(spec, **options):
    config = SelectorConfig(spec.head_dim, spec.num_kv_heads, hidden=8, kernel=3, **options)
    return TokenSelector(config, spec.num_layers, spec.fingerprint, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_some_of_many_conversations_are_read(monkeypatch):
    model = tiny_model("llama", torch.float32, max_position_embeddings=128)
    selector = new_selector(model_spec(model))
    talks = [conversation([50 + i, 70 + i], [60 + i, 90 - i, 40 + i]) for i in range(9)]
    every = started(model, talks, 9, selector=selector)
    monkeypatch.setattr(study_start_module, "FIT_CONVERSATIONS", 4)
    some, again = (started(model, talks, 9, selector=selector) for _ in range(2))
    for one, other, whole in zip(some.layers, again.layers, every.layers):
        assert torch.equal(one.keys, whole.keys)  # which the selector chose
        assert torch.equal(one.values, other.values) and not torch.equal(one.values, whole.values)
    few = random.Random(0).sample(talks, 4)
    for one, wanted in zip(some.layers, started(model, few, 9, selector=selector).layers):
        torch.testing.assert_close(one.values, wanted.values)
    # where conversations choose, it has a limit of its own
    monkeypatch.setattr(study_start_module, "RANKING_CONVERSATIONS", 6)
    kept, ranked = started(model, talks, 9), started(model, random.Random(0).sample(talks, 6), 9)
    monkeypatch.undo()
    whole = started(model, talks, 9)
    for one, wanted, other in zip(kept.layers, ranked.layers, whole.layers):
        assert torch.equal(one.keys, wanted.keys) and not torch.equal(one.values, other.values)


@pytest.mark.parametrize("of", ["the selector", "a file, beside a selector", "a file"])
@torch.no_grad()
def test_shares_hold_for_the_slots(of):
    model = tiny_model("llama", torch.float32, max_position_embeddings=128)
    spec = model_spec(model)

    def chosen(slots, shares=None):
        if of == "the selector":
            options = {"selector": new_selector(spec, shares=shares)}
        elif of == "a file":
            options = {"shares": shares}
        else:  # whose own shares do not count then
            own = ((5.0, 1.0),) * spec.num_layers
            options = {"selector": new_selector(spec, shares=shares and own), "shares": shares}
        return started(model, TALKS, slots, sinks=2, **options)

    shares = tuple((1.0 + number, 3.0) for number in range(spec.num_layers))
    cache = chosen(9, shares)
    counts = torch.cat([block.slot_counts for block in cache.layers])
    assert counts.sum() == 9 * counts.numel() and counts[0, 1] > 2 * counts[0, 0] and counts.min() >= 3
    for number, block in enumerate(cache.layers):
        for head, count in enumerate(counts[number].tolist()):
            alone = chosen(count).layers[number].heads()[0][head]
            for got, wanted in zip(block.heads()[0][head], alone):
                torch.testing.assert_close(got, wanted)


class Looks(Method):
    name, summary, source = "looks", "for a test", "none"
    queries_needed = -1

    def __init__(self, seen, selector):
        self.seen, self.selector = seen, selector

    def compact_layer(self, layer, slots):
        queries = queries_from_behind(layer, MAX_QUERIES)
        _, _, attention = matching.full_attention(queries, layer.keys, layer.values, layer.scale)
        keys = layer.rope.unrotate(layer.keys, layer.positions)
        _, recall = self.selector(layer.layer_idx, *token_features(keys, layer.values, attention))
        self.seen[layer.layer_idx] = recall
        return CompactBlock(layer.keys.clone(), layer.values.clone())
