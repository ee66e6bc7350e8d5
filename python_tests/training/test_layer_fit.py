# SPDX-License-Identifier: Apache-2.0
"""Slots that are fitted a layer at a time to what the whole text's attention gives."""

import random
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from kvcompact_kernels.cache import CompactBlock, CompactCache
from kvcompact_kernels.methods.cartridge import Cartridge
from kvcompact_kernels.patch import model_spec
from kvcompact_kernels.training import layer_fit
from kvcompact_kernels.training.checkpoint import CheckpointError
from kvcompact_kernels.training.common import frozen
from kvcompact_kernels.training.distill import Targets
from kvcompact_kernels.training.layer_fit import Asked, behind_slots, fit_layers, record
from kvcompact_kernels.training.self_study import Conversation

TEXT = list(range(3, 43))
NOTHING = Targets(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1))


class Talks(list):
    """Random conversations, every seventh of them held out."""

    def __init__(self, count=28, seed=0):
        draw = random.Random(seed)
        super().__init__(
            Conversation(
                torch.tensor([draw.randrange(3, 97) for _ in range(draw.randrange(1, 6))]),
                torch.tensor([draw.randrange(3, 97) for _ in range(draw.randrange(1, 9))]),
                NOTHING,
                "question",
            )
            for _ in range(count)
        )
        self.held_out = list(range(0, count, 7))
        self.train = [i for i in range(count) if i % 7]
        self.digest = f"talks-{count}-{seed}"


def compacted(model, method="full", **options):
    with frozen(model):
        return model.compact(torch.tensor([TEXT]), method=method, **options)


def packed(cache):
    """The same slots with two of the second head's left out, as ragged heads."""
    layers = []
    for block in cache.layers:
        if not isinstance(block, CompactBlock):
            layers.append(block)
            continue
        heads = [(block.keys[0, h], block.values[0, h], None) for h in range(block.num_kv_heads)]
        heads[1] = (heads[1][0][:-2], heads[1][1][:-2], None)
        layers.append(CompactBlock.pack([heads]))
    return replace(cache, layers=tuple(layers))


def fit(model, cartridge, folder, steps=60, talks=None, **options):
    with frozen(model):
        return fit_layers(model, model_spec(model), TEXT, talks or Talks(), cartridge, steps, folder, **options)


def held_out_error(model, cartridge, talks):
    """sum |y - o|^2 / sum |own - o|^2 by layer, from the model's own eager attention in fp64."""
    spec, found = model_spec(model), {}
    full = compacted(model)
    for number in talks.held_out:
        ids = talks[number].tokens
        seen = {}

        def hook(i, seen=seen):
            return lambda module, args: seen.__setitem__(i, args[0][0])

        handles = [x.self_attn.o_proj.register_forward_pre_hook(hook(i)) for i, x in enumerate(model.model.layers)]
        with torch.no_grad():
            model(torch.cat([torch.tensor(TEXT), ids])[None])
        for handle in handles:
            handle.remove()
        wanted = {i: x[len(TEXT) :].double() for i, x in seen.items()}
        with frozen(model), torch.no_grad():
            behind = record(model, spec, full, [talks[number]], 10**6, random.Random(0))
        for i, asked in behind.items():
            kept = len(asked.queries)
            got = behind_slots(cartridge.block(i).to(dtype=model.dtype), asked, spec.num_kv_heads, spec.scales[i])
            # answers' places are the last ones, and all of them are recorded
            last = len(talks[number].answer)
            target = wanted[i][-last:].view(last, -1, got.shape[-1])
            off = (got.detach().double()[kept - last :] - target).square().sum()
            nothing = (asked.own.double()[kept - last :] - target).square().sum()
            total = found.setdefault(i, [0.0, 0.0])
            total[0], total[1] = total[0] + float(off), total[1] + float(nothing)
    return {i: off / nothing for i, (off, nothing) in found.items()}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.no_grad()
def test_what_is_recorded_is_what_the_model_does(family):
    """With every token as a slot nothing differs from the model's attention over text and conversation."""
    model = tiny_model(family, torch.float64)
    talks, spec = Talks(), model_spec(model)
    cartridge = Cartridge.from_cache(compacted(model, ratio=1), sinks=1, dtype=torch.float64)
    errors = held_out_error(model, cartridge, talks)
    assert list(errors) == [i for i, kind in enumerate(spec.layer_kinds) if kind == "full"]
    assert max(errors.values()) < 1e-12
    some = Cartridge.from_cache(compacted(model, "h2o", slots=8), dtype=torch.float64)
    assert min(held_out_error(model, some, talks).values()) > 1e-3


@torch.no_grad()
def test_answers_come_first_and_the_limit_holds(monkeypatch):
    model = tiny_model("llama", torch.float64)
    spec, full, talks = model_spec(model), compacted(model), Talks()
    with frozen(model):
        every = record(model, spec, full, talks, 10**6, random.Random(0))[0]
        few = record(model, spec, full, talks, 17, random.Random(0))[0]
        monkeypatch.setattr(layer_fit, "BATCH", 3)  # in ten passes and not one
        parts = record(model, spec, full, talks, 10**6, random.Random(0))[0]
    for name in ("queries", "outputs", "own", "own_lse"):
        torch.testing.assert_close(getattr(parts, name), getattr(every, name))
    answers = sum(len(t.answer) for t in talks)
    requests = sum(len(t.prompt) - 1 for t in talks)
    assert answers < len(every.queries) < answers + 0.6 * requests
    assert len(few.queries) == len(few.own_lse) == 17
    # the few are among them
    same = (few.queries[:, None, 0] - every.queries[None, :, 0]).abs().amax(-1) < 1e-5
    assert same.any(1).all()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("train_beta", [False, True])
def test_the_error_falls_and_nothing_else_moves(family, ragged, train_beta, tmp_path):
    model, talks = tiny_model(family, torch.float32), Talks()
    start = compacted(model, "h2o", slots=8)
    cartridge = Cartridge.from_cache(packed(start) if ragged else start, sinks=2, train_beta=train_beta)
    first = cartridge.to_cache()
    before = held_out_error(model, cartridge, talks)
    result = fit(model, cartridge, tmp_path / "layers", 80)
    after = held_out_error(model, cartridge, talks)
    assert result.finished and result.step == 80
    assert all(after[i] < 0.7 * before[i] for i in before), (before, after)
    assert result.evaluation["error"] < 0.75 * result.losses[0]
    for kind, old, new in zip(cartridge.kinds, first.layers, cartridge.to_cache().layers):
        if kind == "sliding":
            assert torch.equal(old.keys, new.keys) and torch.equal(old.values, new.values)
            continue
        for head in range(2):
            begin = 0 if not ragged else int(old.offsets[head])
            at = (slice(begin, begin + 2),) if ragged else (0, head, slice(0, 2))
            assert torch.equal(old.keys[at], new.keys[at]) and torch.equal(old.values[at], new.values[at])
        assert not torch.equal(old.keys, new.keys) and not torch.equal(old.values, new.values)
        if train_beta:
            assert (new.beta != old.beta).any()
        else:
            assert (old.beta is None) == (new.beta is None)


def test_a_step_is_the_mean_of_the_layers_errors(tmp_path, monkeypatch):
    """The first loss, from its definition; and each layer's gradient is its own, whatever the others do."""
    monkeypatch.setattr(layer_fit, "POSITIONS", 10**6)
    model, talks = tiny_model("llama", torch.float64), Talks()
    start = compacted(model, "h2o", slots=8)
    cartridge = Cartridge.from_cache(start, dtype=torch.float64)
    spec = model_spec(model)
    with frozen(model), torch.no_grad():
        # as fit_layers draws: the places of those that are trained first
        asked = record(model, spec, compacted(model), [talks[i] for i in talks.train], 10**6, random.Random(0))
        wanted = []
        for i, one in asked.items():
            got = behind_slots(cartridge.block(i), one, spec.num_kv_heads, spec.scales[i]).double()
            off, nothing = (x - one.outputs for x in (got, one.own))
            wanted.append(float(off.square().sum() / nothing.square().sum()))
    both = fit(model, cartridge, tmp_path / "both", 3)
    assert both.losses[0] == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    disturbed = start.layers[0]
    disturbed = replace(start, layers=(replace(disturbed, values=disturbed.values * 2), *start.layers[1:]))
    other = Cartridge.from_cache(disturbed, dtype=torch.float64)
    fit(model, other, tmp_path / "other", 3)
    assert torch.equal(cartridge.keys[1], other.keys[1]) and torch.equal(cartridge.values[1], other.values[1])
    assert not torch.equal(cartridge.keys[0], other.keys[0])


def test_a_run_goes_on_where_it_stopped_and_is_not_read_again(tmp_path, monkeypatch):
    model = tiny_model("llama", torch.float32)
    start = compacted(model, "h2o", slots=8)
    whole, parts = Cartridge.from_cache(start), Cartridge.from_cache(start)
    fit(model, whole, tmp_path / "whole", 12)
    stopped = fit(model, parts, tmp_path / "parts", 12, max_seconds=0)
    assert not stopped.finished and stopped.step == 1
    again = Cartridge.from_cache(start)
    assert fit(model, again, tmp_path / "parts", 12).finished
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), again.parameters()))
    # finished: parameters come from the checkpoint, and no conversation is read
    monkeypatch.setattr(layer_fit, "record", None)
    last = Cartridge.from_cache(start)
    assert fit(model, last, tmp_path / "parts", 12).losses == []
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), last.parameters()))
    with pytest.raises(CheckpointError, match="talks-9"):
        fit(model, last, tmp_path / "parts", 12, talks=Talks(9))


def test_no_more_conversations_are_read_than_allowed(tmp_path, monkeypatch):
    model = tiny_model("llama", torch.float32)
    monkeypatch.setattr(layer_fit, "MAX_CONVERSATIONS", 5)
    seen, own = [], layer_fit.record

    def spy(model, spec, full, conversations, limit, draw, **options):
        seen.append((len(conversations), limit))
        return own(model, spec, full, conversations, limit, draw, **options)

    monkeypatch.setattr(layer_fit, "record", spy)
    fit(model, Cartridge.from_cache(compacted(model, "h2o", slots=8)), tmp_path, 1)
    assert seen == [(5, layer_fit.MAX_POSITIONS), (4, layer_fit.HELD_OUT_POSITIONS)]


def test_positions_are_taken_together():
    x = torch.randn(7, 3, 4)
    asked = Asked(x, x + 1, x + 2, torch.randn(7, 3))
    some = asked.take(torch.tensor([4, 1]), torch.device("cpu"))
    assert torch.equal(some.own, asked.own[[4, 1]]) and torch.equal(some.own_lse, asked.own_lse[[4, 1]])
    assert torch.equal(some.queries, x[[4, 1]]) and torch.equal(some.outputs, x[[4, 1]] + 1)


def test_slots_that_stand_for_another_text_are_refused(tmp_path):
    model = tiny_model("llama", torch.float32)
    cartridge = Cartridge.from_cache(compacted(model, "h2o", slots=8), logical_length=8)
    with pytest.raises(ValueError, match=r"must stand for the 40 tokens of ids, got 8"):
        fit(model, cartridge, tmp_path)
    assert isinstance(cartridge.to_cache(), CompactCache) and not any(tmp_path.iterdir())
