# SPDX-License-Identifier: Apache-2.0
"""Training of a token selector on tiny random models: its targets, that it learns, resume, the command, bad input."""

import json

import pytest
import torch
from tiny_folder import tiny_tokenizer
from tiny_models import tiny_model

from kvcompact_kernels import UnsupportedModelError, compact, patch_model
from kvcompact_kernels.cli import main
from kvcompact_kernels.head_shares import HeadShares
from kvcompact_kernels.patch import is_patched
from kvcompact_kernels.patch.families import model_spec
from kvcompact_kernels.token_selector import SelectorConfig, TokenSelector
from kvcompact_kernels.training import head_shares, selector, train_selector
from kvcompact_kernels.training.data import Corpus, Tail, read_texts
from kvcompact_kernels.training.loop import CheckpointError, TrainingInterrupted
from kvcompact_kernels.training.selector import (
    SelectorExample,
    SelectorOptions,
    _Reader,
    default_loop,
    received_attention,
)

TEXT = " ".join(f"Sentence number {i} says that the bell rings {i * 7} times." for i in range(160))
OPTIONS = SelectorOptions(
    contexts=(150, 200), examples=4, held_out_examples=2, facts=2, continuation=12, held_out=0.2, batch=2, shares=1
)
LOOP = default_loop(steps=6, warmup=1, checkpoint_every=3, evaluate_every=3)


def new_model(family="llama", **overrides):
    return tiny_model(family, torch.float32, vocab_size=261, max_position_embeddings=4096, **overrides)


def trained(out, model=None, **changes):
    given = {"options": OPTIONS, "loop": LOOP, **changes}
    return train_selector(model or new_model(), tiny_tokenizer(), [TEXT], out=out, **given)


@pytest.mark.parametrize("all_queries", [True, False])
def test_received_attention_is_the_softmax_over_context_and_tail(all_queries):
    queries, tail = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    keys = torch.randn(1, 2, 9, 8)
    begins = None if all_queries else [2, 1]
    most, rms = received_attention(queries, tail, keys, [5, 3], 0.4, begins)
    for row, count in enumerate((5, 3)):
        for head in range(2):
            seen = []
            for q in queries[row, 2 * head : 2 * head + 2, :count]:
                for i in range(begins[row] if begins else 0, count):
                    logits = torch.cat([keys[0, head], tail[row, head, : i + 1]]) @ q[i] * 0.4
                    seen.append(logits.softmax(0)[:9])
            seen = torch.stack(seen)
            torch.testing.assert_close(most[row, head], seen.amax(0))
            torch.testing.assert_close(rms[row, head], seen.square().mean(0).sqrt())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_it_learns_and_leaves_the_model_alone(tmp_path, family):
    model = new_model(family)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    result = trained(tmp_path / "s.safetensors", model, loop=default_loop(steps=30, warmup=2, evaluate_every=30))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not is_patched(model) and all(p.requires_grad for p in model.parameters())
    assert sum(result.run.losses[-4:]) < sum(result.run.losses[:4])
    evaluation = result.run.evaluation
    assert set(evaluation) == {"loss", "continuation", "continuation_without", "recall", "recall_without"}
    saved = TokenSelector.load(result.path)
    assert saved.info["steps"] == 30 and saved.info["finished"] and saved.info["held_out"] == evaluation
    # how many slots each head needs was measured, and is in the file
    layers = model_spec(model).layer_kinds.count("full")
    assert [len(row) for row in saved.config.shares] == [2] * layers and saved.config == result.selector.config
    # the file is of use to the model, at a ratio that nobody named
    patch_model(model, "still", weights=str(result.path))
    cache = model.compact(torch.randint(0, 250, (1, 90)), ratio=5)
    assert cache.num_slots == 18


def test_resume_ends_with_the_same_bits(tmp_path):
    whole = trained(tmp_path / "a.safetensors")
    first = trained(tmp_path / "b.safetensors", loop=default_loop(steps=6, warmup=1, checkpoint_every=3, max_steps=4))
    assert not first.run.finished and first.run.step == 4
    second = trained(tmp_path / "b.safetensors")
    assert second.run.start == 4 and second.run.finished
    for (name, a), (_, b) in zip(whole.selector.named_parameters(), second.selector.named_parameters()):
        assert torch.equal(a, b), name


def test_shares_are_the_mean_of_two_measurements_and_go_on_after_an_interrupt(tmp_path, monkeypatch):
    whole = trained(tmp_path / "a.safetensors").selector.config.shares
    measure, found, calls = selector.measure_shares, {}, []

    def recorded(model, spec, method, corpus, options, **more):
        found[method.name, options.rounds] = measure(model, spec, method, corpus, options, **more)
        return found[method.name, options.rounds]

    costs = head_shares._Student.costs

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return costs(self, *args)

    monkeypatch.setattr(selector, "measure_shares", recorded)
    monkeypatch.setattr(head_shares._Student, "costs", interrupted)
    with pytest.raises(TrainingInterrupted, match="while the slots of each head were measured"):
        trained(tmp_path / "b.safetensors")
    assert TokenSelector.load(tmp_path / "b.safetensors").config.shares is None
    again = trained(tmp_path / "b.safetensors").selector.config.shares
    assert len(calls) == 4  # one context with the selector, one in each round with the other method, one of them twice
    assert set(found) == {("still", 1), ("attention_matching", 2)}
    assert again == whole == HeadShares.mean([HeadShares(x, {}) for x in found.values()]).shares


def test_nothing_held_out_is_no_figures_and_no_shares_are_equal_ones(tmp_path):
    options = SelectorOptions(**{**OPTIONS.to_dict(), "held_out": 0.0, "shares": 0})
    result = trained(tmp_path / "a.safetensors", options=options)
    assert result.run.finished and result.run.evaluation is None and result.selector.config.shares is None


def test_contexts_are_read_once(tmp_path, monkeypatch):
    trained(tmp_path / "a.safetensors")
    monkeypatch.setattr(selector._Reader, "read", lambda *a: pytest.fail("it was read before"))
    trained(tmp_path / "a.safetensors")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_targets_are_the_models_own_attention(tmp_path, family):
    model = new_model(family)
    corpus = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.2)
    context = corpus.train.ids[:40].tolist()
    tails = [Tail(tuple(corpus.train.ids[a:b].tolist()), (True,) * (b - a), "facts") for a, b in ((90, 97), (200, 211))]
    wanted = []
    model.set_attn_implementation("eager")
    for tail in tails:
        with torch.no_grad():
            out = model(torch.tensor([[*context, *tail.ids]]), output_attentions=True)
        wanted.append([a[0, :, 40:, :40].unflatten(0, (2, -1)) for a in out.attentions])
    model.set_attn_implementation("sdpa")
    patch_model(model)
    spec = model_spec(model)
    reader = _Reader(model, spec, corpus, OPTIONS, tmp_path, seed=3)
    with torch.no_grad():
        most, rms = reader._received(compact(model, torch.tensor([context]), "full", ratio=1), tails)
    full = [i for i, kind in enumerate(spec.layer_kinds) if kind == "full"]
    assert most.shape == rms.shape == (2, len(full), 2, 40)
    for row in range(2):
        for place, layer in enumerate(full):
            prob = wanted[row][layer]
            torch.testing.assert_close(most[row, place], prob.amax((1, 2)), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(rms[row, place], prob.square().mean((1, 2)).sqrt(), rtol=1e-4, atol=1e-6)


def test_an_example_depends_on_its_number_alone(tmp_path):
    model = patch_model(new_model())
    corpus = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.2)
    reader = _Reader(model, model_spec(model), corpus, OPTIONS, tmp_path, seed=3)
    example, other, again = reader.read("train", 1), reader.read("train", 2), reader.read("train", 1)
    assert all(torch.equal(getattr(example, n), getattr(again, n)) for n in SelectorExample.__annotations__)
    assert example.keys.shape != other.keys.shape or not torch.equal(example.keys, other.keys)
    assert example.keys.shape[2] in OPTIONS.contexts and (example.continuation > 0).any()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"contexts": ()}, ValueError, "contexts must not be empty"),
        ({"contexts": (8,)}, ValueError, "contexts must be >= 16"),
        ({"examples": 0}, ValueError, "examples must be >= 1"),
        ({"held_out": 1.0}, ValueError, r"held_out must be a share in \[0, 1\)"),
        ({"chat": "yes"}, TypeError, "chat must be a number"),
    ],
)
def test_bad_options(changes, error, message):
    with pytest.raises(error, match=message):
        SelectorOptions(**changes)


def test_bad_input(tmp_path):
    out = tmp_path / "s.safetensors"
    with pytest.raises(ValueError, match="give more text"):
        trained(out, options=SelectorOptions(contexts=(100000,)))
    with pytest.raises(ValueError, match="tokenizer must be given"):
        train_selector(new_model(), None, [TEXT], out=out)
    with pytest.raises(ValueError, match="config must be for 2 KV heads"):
        trained(out, config=SelectorConfig(4, 4))
    with pytest.raises(OSError, match="does not exist"):
        trained(tmp_path / "no" / "s.safetensors")
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(UnsupportedModelError):
        trained(out, GPT2LMHeadModel(GPT2Config(vocab_size=261, n_embd=16, n_layer=1, n_head=2)))
    trained(out)
    with pytest.raises(CheckpointError, match="facts"):
        trained(out, options=SelectorOptions(**{**OPTIONS.to_dict(), "facts": 1}))


def test_the_command(tmp_path, capsys):
    new_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    out = tmp_path / "s.safetensors"
    words = [
        "train",
        "selector",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "texts"),
        "--out",
        str(out),
    ]
    sizes = ["--context", "150", "--examples", "2", "-O", "held_out_examples=1", "-O", "held_out=0.2", "-C", "hidden=8"]
    assert main([*words, *sizes, "--steps", "2", "--warmup", "1", "--json", "--quiet"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["finished"] and made["step"] == 2 and TokenSelector.load(out).config.hidden == 8
    assert main([*words, *sizes, "-O", "examples=none"]) == 2
    assert "examples" in capsys.readouterr().err
