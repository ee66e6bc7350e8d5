# SPDX-License-Identifier: Apache-2.0
"""What each KV head's slots are worth, measured on tiny models."""

import random
from dataclasses import replace

import pytest
import torch
from tiny_folder import tiny_tokenizer
from tiny_models import tiny_model

from kvcompact_kernels import compact, patch_model
from kvcompact_kernels.cache import CompactBlock
from kvcompact_kernels.patch.families import model_spec
from kvcompact_kernels.token_selector import SelectorConfig, TokenSelector
from kvcompact_kernels.training.data import KINDS, Corpus, Recipe, collate, make_example, read_texts
from kvcompact_kernels.training.head_shares import _recorded, _starting, _Student, measure_shares

TEXT = " ".join(f"Sentence number {i} says that the bell rings {i * 7} times." for i in range(160))
RECIPE = Recipe(dict.fromkeys(KINDS, 1.0), continuation=12, distractors=0, chat=0.5)


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
    return measure_shares(*parts, RECIPE, (160, 200), contexts)


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
    example = make_example(corpus, corpus.train, RECIPE, 160, random.Random(3), ["facts", "continuation"])
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
