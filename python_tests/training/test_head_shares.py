# SPDX-License-Identifier: Apache-2.0
"""What each KV head's slots are worth, measured on tiny models."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_folder import save_tiny_folder, tiny_tokenizer
from tiny_models import tiny_model

from kvcompact_kernels import compact, patch_model
from kvcompact_kernels.cache import CompactBlock
from kvcompact_kernels.cli import main
from kvcompact_kernels.evaluation.store import StoreError
from kvcompact_kernels.head_shares import HeadShares
from kvcompact_kernels.methods import get_method
from kvcompact_kernels.methods._shares import WithShares
from kvcompact_kernels.patch import is_patched
from kvcompact_kernels.patch.families import model_spec
from kvcompact_kernels.token_selector import SelectorConfig, TokenSelector
from kvcompact_kernels.training import head_shares, train_shares
from kvcompact_kernels.training.data import Corpus, collate, make_example, read_texts
from kvcompact_kernels.training.head_shares import (
    LARGEST_COST,
    SharesOptions,
    _recorded,
    _starting,
    _Student,
    measure_shares,
)
from kvcompact_kernels.training.loop import TrainingInterrupted

TEXT = " ".join(f"Sentence number {i} says that the bell rings {i * 7} times." for i in range(160))
OPTIONS = SharesOptions(rounds=2, contexts=1, lengths=(160, 200), continuation=12, chat=0.5)


def save_selector(spec, path):
    config = SelectorConfig(spec.head_dim, spec.num_kv_heads, hidden=8, kernel=3)
    TokenSelector(config, spec.layer_kinds.count("full"), spec.fingerprint).save(path)


@pytest.fixture(params=["llama", "gemma3_text"])
def parts(request, tmp_path):
    """A model, its description, a selector's file, and texts."""
    model = tiny_model(request.param, torch.float32, vocab_size=261, max_position_embeddings=4096)
    patch_model(model).requires_grad_(False)
    spec = model_spec(model)
    save_selector(spec, tmp_path / "s.safetensors")
    corpus = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.2)
    return model, spec, tmp_path / "s.safetensors", corpus


def measured(parts, contexts=2):
    model, spec, weights, corpus = parts
    still = get_method("still", weights=str(weights))
    return measure_shares(model, spec, still, corpus, replace(OPTIONS, rounds=1, contexts=contexts))


def test_a_head_that_the_model_does_not_listen_to_gets_the_least(parts):
    model, spec, _, _ = parts
    full = [i for i, kind in enumerate(spec.layer_kinds) if kind == "full"]
    layer = full[-1]
    # what the query heads of KV head 1 found goes nowhere
    group = spec.num_heads // spec.num_kv_heads
    out = model.model.layers[layer].self_attn.o_proj.weight
    with torch.no_grad():
        for q in range(group, 2 * group):
            out[:, q * spec.head_dim : (q + 1) * spec.head_dim] = 0
            # the other head is all the louder
            out[:, (q - group) * spec.head_dim : (q - group + 1) * spec.head_dim] *= 4
    save_selector(model_spec(model), parts[2])  # for the weights as they are now
    shares = measured((model, model_spec(model), *parts[2:]))
    assert len(shares) == len(full) and all(len(row) == spec.num_kv_heads for row in shares)
    flat = [x for row in shares for x in row]
    assert sum(flat) / len(flat) == pytest.approx(1, abs=0.01)
    deaf, loud = shares[-1][1], shares[-1][0]
    assert deaf == min(flat) and loud > 1.5 * deaf


def test_it_depends_on_nothing_but_its_arguments_and_leaves_the_model_alone(parts):
    before = [dict(layer.__dict__) for layer in parts[0].model.layers]
    first = measured(parts, contexts=1)
    assert measured(parts, contexts=1) == first
    for layer, was in zip(parts[0].model.layers, before):
        assert "forward" not in layer.__dict__ and not layer._forward_hooks
        assert layer.__dict__.keys() == was.keys()


def test_layers_before_the_changed_one_need_not_run_again(parts):
    model, spec, weights, corpus = parts
    example = make_example(corpus, corpus.train, OPTIONS.recipe(), 160, random.Random(3), ["facts", "continuation"])
    student = _Student(model, spec, collate(example.tails, "cpu"), [t.kind for t in example.tails])
    ids = torch.tensor([example.context])
    with torch.no_grad():
        full = compact(model, ids, "full", ratio=1)
        student.teach(full)
        assert student.kl(full).abs().max() < 1e-5
        usual, other = (compact(model, ids, "still", weights=str(weights), slots=n) for n in (20, 9))
        with _recorded(student.layers) as outputs:
            student.kl(usual)
        last = max(i for i, block in enumerate(usual.layers) if isinstance(block, CompactBlock))
        changed = replace(usual, layers=(*usual.layers[:last], other.layers[last], *usual.layers[last + 1 :]))
        whole = student.kl(changed)
        with _starting(student.layers, last, outputs):
            assert torch.equal(student.kl(changed), whole)
            assert not torch.equal(whole, student.kl(usual))


def test_where_nothing_depends_on_slots_all_heads_get_the_same(parts):
    model, spec, weights, corpus = parts
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    save_selector(model_spec(model), weights)
    shares = measured((model, model_spec(model), weights, corpus), contexts=1)
    assert shares == ((1.0,) * spec.num_kv_heads,) * spec.layer_kinds.count("full")


@pytest.fixture
def tiny():
    return tiny_model("llama", torch.float32, vocab_size=261, max_position_embeddings=4096)


def test_a_measurement_is_the_same_after_an_interruption(tiny, tmp_path, monkeypatch):
    def train(out, **more):
        return train_shares(tiny, tiny_tokenizer(), [TEXT], out=tmp_path / out, options=OPTIONS, **more)

    whole = train("whole.json")
    assert HeadShares.load(tmp_path / "whole.json") == whole and whole.info["method"] == "attention_matching"
    assert not is_patched(tiny)
    costs = _Student.costs
    calls = []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return costs(self, *args)

    monkeypatch.setattr(_Student, "costs", interrupted)
    with pytest.raises(TrainingInterrupted, match="after 1 of 2 contexts"):
        train("part.json")
    assert not (tmp_path / "part.json").exists() and not is_patched(tiny)
    assert train("part.json").shares == whole.shares and len(calls) == 3
    # what was measured in another way is no beginning
    with pytest.raises(StoreError, match="another configuration"):
        train("part.json", method="snapkv")
    assert HeadShares.load(tmp_path / "part.json").shares == whole.shares


@pytest.mark.filterwarnings("ignore:the package has no weights")
@pytest.mark.parametrize("method", ["pyramidkv", "still", "full", "adakv"])
def test_methods_whose_heads_do_not_stand_apart_are_refused(tiny, tmp_path, method):
    with pytest.raises(ValueError, match="each head's slots by themselves|with a selector only"):
        train_shares(tiny, tiny_tokenizer(), [TEXT], out=tmp_path / "s.json", method=method, options=OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"contexts": 0}, "contexts"),
        ({"lengths": ()}, "lengths must not be empty"),
        ({"lengths": (8,)}, "lengths"),
        ({"chat": 1.5}, "chat must be a share"),
        ({"continuation": 1}, "continuation"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **change)


def test_the_command_writes_a_file_that_methods_take(tmp_path, capsys):
    folder, out = save_tiny_folder(tmp_path / "tiny"), tmp_path / "shares.json"
    (tmp_path / "text.txt").write_text(TEXT)
    fixed = ["train", "shares", "--model", folder, "--dtype", "float32", "--data", tmp_path / "text.txt", "--out", out]
    small = ["--rounds", "1", "--contexts", "1", "--context", "160", "-O", "continuation=12"]
    assert main([str(a) for a in (*fixed, *small, "--json", "--quiet")]) == 0
    result = json.loads(capsys.readouterr().out)
    shares = HeadShares.load(out)
    assert result["heads"] == sum(map(len, shares.shares)) and result["contexts"] == 1
    assert result["smallest"] <= 1 <= result["largest"] and 1 <= result["heads_with_half"] <= result["heads"]
    (tmp_path / "d.txt").write_text("a" * 174)
    command = ["compact", tmp_path / "d.txt", "--model", folder, "--method", "snapkv", "-O", f"shares={out}"]
    assert main([str(a) for a in (*command, "--slots", "16", "--out", tmp_path / "d.kvc", "--quiet")]) == 0
    assert "shares=None" not in capsys.readouterr().err
    for wrong, message in ((["--method", "pyramidkv"], "each head's slots"), (["--context", "8"], "lengths")):
        assert main([str(a) for a in (*fixed, *small, *wrong)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_cost_is_what_a_head_adds_to_the_kl(parts, monkeypatch):
    """With a KL that is a sum of ``c / slots`` over the heads the measurement finds each summand, also of heads whose slots
    are bounded by the tokens that there are, or by the fewest that a method works with."""
    model, spec, _, _ = parts
    full = [i for i, kind in enumerate(spec.layer_kinds) if kind == "full"]
    each = 1e-3 * (1 + torch.arange(len(full) * spec.num_kv_heads, dtype=torch.float64).reshape(len(full), -1))

    def kl(self, cache):
        counts = torch.stack([cache.layers[i].slot_counts[0] for i in full])
        return (each / counts).sum().reshape(1)

    monkeypatch.setattr(_Student, "kl", kl)
    shares = HeadShares(((4.0, 0.1),) + ((1.0, 1.0),) * (len(full) - 1), spec.fingerprint)
    method, ids = WithShares(get_method("snapkv"), shares), torch.arange(1, 61)[None]
    caches = [compact(model, ids, method, slots=n) for n in (6, 15, 37)]
    counts = torch.stack([caches[1].layers[i].slot_counts[0] for i in full])
    assert caches[2].layers[full[0]].slot_counts.max() == 60 and caches[0].layers[full[0]].slot_counts.min() == 5
    assert counts.max() > 3 * counts.min()
    student = _Student(model, spec, (torch.zeros(1, 2, dtype=torch.int64),) * 3, ["facts"])
    wanted = each / counts / (each / counts).sum()
    got = student.costs(caches, SimpleNamespace(update=lambda: None))
    torch.testing.assert_close(got, wanted.clamp(max=LARGEST_COST).float())


def test_a_round_begins_with_the_shares_of_the_one_before(parts, monkeypatch):
    model, spec, _, corpus = parts
    each = torch.arange(1.0, 41).reshape(20, 2) ** 2
    each[0, 0] = 2 * each.sum()  # more than one context may say of a head, at equal numbers
    given, method = [], get_method("snapkv")

    def with_shares(shares):
        given.append(shares and shares.shares)
        return method

    def costs(*args):
        adds = each if given[-1] is None else each / torch.tensor(given[-1])
        return (adds / adds.sum()).clamp(max=LARGEST_COST)

    monkeypatch.setattr(head_shares, "_context_costs", costs)
    monkeypatch.setattr(method, "with_shares", with_shares)
    found = [measure_shares(model, spec, method, corpus, replace(OPTIONS, rounds=rounds)) for rounds in (1, 2)]
    assert given == [None, None, found[0]]
    best = torch.tensor(head_shares._shares(each))
    assert best[0, 0] < head_shares.LARGEST_SHARE
    errors = [(torch.tensor(x).log() - best.log()).abs().max() for x in found]
    assert errors[0] > 0.1 and errors[1] < 0.01


def test_a_selector_with_shares_of_its_own_starts_from_equal_heads_too(parts, tmp_path):
    model, spec, weights, corpus = parts
    equal = measured(parts, contexts=1)
    selector = TokenSelector.load(weights)
    uneven = [[5.0] + [0.5] * (spec.num_kv_heads - 1)] * spec.layer_kinds.count("full")
    selector.config = replace(selector.config, shares=uneven)
    selector.save(tmp_path / "uneven.safetensors")
    assert measured((model, spec, tmp_path / "uneven.safetensors", corpus), contexts=1) == equal
    options = replace(OPTIONS, rounds=2)
    made = train_shares(
        model, tiny_tokenizer(), [TEXT], out=tmp_path / "f.json",
        method=get_method("still", weights=str(weights)), options=options,
    )  # fmt: skip
    assert made.info["method"] == "still" and made.info["options"]["rounds"] == 2
    block = compact(model, torch.arange(1, 200)[None], "still", slots=20, weights=str(weights), shares=made).layers[-1]
    assert block.slot_counts.shape == (1, spec.num_kv_heads)


def test_shares_have_bounds():
    cost = torch.tensor([[1e6, 1.0], [1.0, -1.0]]).expand(20, 2, 2).reshape(40, 2).clone()
    cost[1:, 0] = 1.0
    shares = torch.tensor(head_shares._shares(cost.clamp(min=0)))
    assert shares.mean().item() == pytest.approx(1, abs=0.01)
    assert shares.max() / shares.min() <= head_shares.LARGEST_SHARE / head_shares.SMALLEST_SHARE * 1.01
