# SPDX-License-Identifier: Apache-2.0
"""A cache that keeps every token, and one that keeps some, against the unpatched model."""

import copy
import dataclasses
import pickle

import pytest
import torch
from tiny_models import FAMILIES, WINDOW, tiny_ids, tiny_model
from toy_methods import Chosen
from transformers import DynamicCache

import kvcompact_kernels as kc
from kvcompact_kernels.patch import attention

CONTEXT, QUESTION = 37, 6


def full_cache_logits(model, ids, question, steps=3):
    """Logits of an unpatched model: the question as a block, then token by token."""
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        out = [model(question, past_key_values=cache).logits]
        out += [model(question[:, i : i + 1], past_key_values=cache).logits for i in range(steps)]
    return out


def compact_logits(model, cache, question, steps=3):
    with torch.no_grad():
        out = model(question, past_key_values=cache)
        logits, session = [out.logits], out.past_key_values
        logits += [model(question[:, i : i + 1], past_key_values=session).logits for i in range(steps)]
    return logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_identity_compaction_is_bit_for_bit(family, dtype):
    model = tiny_model(family, dtype)
    ids, question = tiny_ids(1, CONTEXT), tiny_ids(1, QUESTION, 2)
    wanted = full_cache_logits(model, ids, question)
    kc.patch_model(model, "full", backend="torch")
    got = compact_logits(model, model.compact(ids), question)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_generation(family):
    model = tiny_model(family)
    ids, question = tiny_ids(1, CONTEXT), tiny_ids(1, QUESTION, 2)
    prompt = torch.cat([ids, question], 1)
    wanted = model.generate(prompt, max_new_tokens=8, do_sample=False)
    kc.patch_model(model, "full", backend="torch")
    cache = model.compact(ids)
    got = model.generate(question, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, wanted[:, CONTEXT:])
    # the full prompt, as transformers' own caches want it
    assert torch.equal(model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False), wanted)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_without_compact_cache_is_unpatched(family, implementation):
    model = tiny_model(family, torch.float32)
    model.set_attn_implementation(implementation)
    ids, mask = tiny_ids(2, CONTEXT), torch.ones(2, CONTEXT, dtype=torch.long)
    mask[0, :9] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        kc.patch_model(model, "full")
        assert torch.equal(model(ids, attention_mask=mask).logits, wanted)
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), generated)


def masked_oracle(model, family, ids, question, per_head, betas):
    """An unpatched model whose full-attention layers see only the chosen keys, through an additive 4-D mask."""
    heads, group = 2, 3
    new = question.shape[1]
    bias = torch.full((1, heads, 1, CONTEXT), float("-inf"), dtype=torch.float64)
    for h in range(heads):
        index = torch.as_tensor(per_head[h])
        bias[0, h, 0, index] = betas[h] if betas is not None else 0.0
    bias = bias.repeat_interleave(group, 1).expand(1, heads * group, new, CONTEXT)
    causal = torch.full((new, new), float("-inf"), dtype=torch.float64).triu(1)
    mask = torch.cat([bias, causal.expand(1, heads * group, new, new)], -1)
    if family == "gemma3_text":
        held = min(CONTEXT, WINDOW - 1)
        row = torch.arange(new)[:, None] + held
        column = torch.arange(held + new)[None]
        mask = {"full_attention": mask, "sliding_attention": ((column <= row) & (column > row - WINDOW))[None, None]}
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        positions = torch.arange(CONTEXT, CONTEXT + new)[None]
        return model(question, past_key_values=cache, attention_mask=mask, position_ids=positions).logits


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_some_slots_are_a_full_cache_with_the_others_masked(family, backend, ragged, biased):
    model = tiny_model(family, num_hidden_layers=2)
    ids, question = tiny_ids(1, CONTEXT), tiny_ids(1, QUESTION, 2)
    per_head = [[0, 3, 4, 11, 36], [1, 2, 20, 21, 22, 30, 35] if ragged else [1, 2, 20, 21, 35]]
    layers = 1 if family == "gemma3_text" else 2
    method = Chosen(index=[per_head] * layers, biased=biased)
    cache = kc.compact(model, ids, method, slots=6)
    betas = None
    if biased:  # one bias for all layers, so that one mask serves them all
        first = cache.compact_layers[0]
        betas = [beta for _, _, beta in first.heads()[0]]
        shared = tuple(
            kc.CompactBlock(b.keys, b.values, first.beta, b.offsets, b.num_kv_heads)
            if isinstance(b, kc.CompactBlock)
            else b
            for b in cache.layers
        )
        cache = kc.CompactCache(shared, cache.logical_length, cache.fingerprint, cache.ropes)
    wanted = masked_oracle(model, family, ids, question, per_head, betas)
    kc.patch_model(model, "full", backend=backend)
    with torch.no_grad():
        got = model(question, past_key_values=cache).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_stepwise_equals_block(family):
    model = kc.patch_model(tiny_model(family), "streaming_llm", ratio=3)
    question = tiny_ids(1, 17, 2)
    cache = model.compact(tiny_ids(1, CONTEXT))
    with torch.no_grad():
        block = model(question, past_key_values=cache).logits
        session, steps = cache, []
        for i in range(question.shape[1]):
            out = model(question[:, i : i + 1], past_key_values=session)
            session = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), block, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_everything(family):
    model = tiny_model(family, torch.float32)
    ids = tiny_ids(1, CONTEXT)
    before, config = dict(model.__dict__), model.config
    configs = [getattr(m, "config", None) for m in model.modules()]
    hooks = {id(m): (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()}
    wanted = model(ids).logits
    kc.patch_model(model, "snapkv", ratio=4)
    model.generate(ids, past_key_values=model.compact(ids), max_new_tokens=3)
    model.config.use_cache = True
    kc.unpatch_model(model)
    assert model.config is config and config._attn_implementation == "sdpa"
    assert all(getattr(m, "config", None) is c for m, c in zip(model.modules(), configs))
    assert model.__dict__.keys() == before.keys() and all(model.__dict__[k] is before[k] for k in before)
    assert hooks == {id(m): (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()}
    assert torch.equal(model(ids).logits, wanted)
    with pytest.raises(ValueError, match="not patched"):
        kc.unpatch_model(model)
    with pytest.raises(AttributeError):
        model.compact(ids)


def test_two_models_with_one_config_do_not_meet():
    first = tiny_model("llama", torch.float32)
    config = first.config
    second = type(first)(config).eval()
    second.load_state_dict(first.state_dict())
    third = type(first)(config).eval()
    third.load_state_dict(first.state_dict())
    ids, question = tiny_ids(1, CONTEXT), tiny_ids(1, QUESTION, 2)
    kc.patch_model(first, "snapkv", ratio=4)
    kc.patch_model(second, "streaming_llm", slots=5)
    assert config._attn_implementation == "sdpa"
    a, b = first.compact(ids), second.compact(ids)
    assert (a.method, a.num_slots, b.method, b.num_slots) == ("snapkv", 10, "streaming_llm", 5)
    kc.unpatch_model(first)
    wanted = second.generate(question, past_key_values=b, max_new_tokens=4, do_sample=False)
    kc.patch_model(first, "full")
    assert torch.equal(second.generate(question, past_key_values=b, max_new_tokens=4, do_sample=False), wanted)
    assert torch.equal(third(ids).logits, first(ids).logits)
    assert "compact" not in third.__dict__ and not hasattr(type(first), "compact")


@pytest.mark.parametrize("family", FAMILIES)
def test_another_attention_implementation_after_patching(family):
    """It is the one of ordinary passes; slots are attended to as before."""
    model, other = tiny_model(family), tiny_model(family)
    context, question = tiny_ids(1, CONTEXT), tiny_ids(1, 4, seed=3)
    kc.patch_model(model, "uniform", ratio=4)
    cache = model.compact(context)
    with torch.no_grad():
        before = model(question, past_key_values=cache).logits
        model.set_attn_implementation("eager")
        other.set_attn_implementation("eager")
        assert torch.equal(model(question, past_key_values=cache).logits, before)
        assert torch.equal(model(context).logits, other(context).logits)
        assert torch.equal(model.compact(context).layers[-1].keys, cache.layers[-1].keys)
    model.set_attn_implementation("eager")
    kc.unpatch_model(model)
    assert model.config._attn_implementation == "eager"
    # some parts have a copy of the config, which transformers leaves as it is
    said = [
        [part.config._attn_implementation for part in m.modules() if hasattr(part, "config")] for m in (model, other)
    ]
    assert said[0] == said[1] and said[0].count("eager") > len(said[0]) // 2


def test_a_model_that_is_not_patched_says_so():
    model = tiny_model("llama")
    cache = kc.compact(model, tiny_ids(1, CONTEXT), "full")
    for use in (model.generate, model):
        with pytest.raises(TypeError, match=r"before kvcompact_kernels.patch_model\(model\)"):
            use(tiny_ids(1, 3), past_key_values=cache)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.method = "other"
    kc.patch_model(model)
    for wrong in ("notes.kvc", [cache], {}):
        with pytest.raises(TypeError, match="past_key_values must be a CompactCache or a cache of transformers, got"):
            model.generate(tiny_ids(1, 3), past_key_values=wrong)


def test_patching_again_replaces_the_method():
    model = kc.patch_model(tiny_model("llama"), "snapkv", ratio=4)
    original = model.config
    assert kc.patch_model(model, "streaming_llm", slots=7) is model
    cache = model.compact(tiny_ids(1, CONTEXT))
    assert (cache.method, cache.num_slots) == ("streaming_llm", 7)
    with pytest.raises(ValueError, match="method must be one of"):
        kc.patch_model(model, "no such method")
    assert model.compact(tiny_ids(1, CONTEXT)).method == "streaming_llm"  # a failed patch changes nothing
    kc.unpatch_model(model)
    assert model.config is not original and model.config._attn_implementation == "sdpa"


def test_copies_of_a_patched_model_are_their_own():
    model = kc.patch_model(tiny_model("qwen3"), "streaming_llm", ratio=4)
    ids, question = tiny_ids(1, CONTEXT), tiny_ids(1, QUESTION, 2)
    wanted = model.generate(question, past_key_values=model.compact(ids), max_new_tokens=4, do_sample=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.generate.args[0] is copied and copied.config is not model.config
        with torch.no_grad():
            copied.lm_head.weight.zero_()
        assert not torch.equal(
            copied.generate(question, past_key_values=copied.compact(ids), max_new_tokens=4, do_sample=False), wanted
        )
        kc.unpatch_model(copied)
        assert "generate" not in copied.__dict__
    assert torch.equal(
        model.generate(question, past_key_values=model.compact(ids), max_new_tokens=4, do_sample=False), wanted
    )


def test_import_registers_nothing():
    import subprocess
    import sys

    code = (
        "import transformers, kvcompact_kernels.patch as p\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as M\n"
        f"assert {attention.NAME!r} not in A and {attention.NAME!r} not in M\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_save_pretrained_of_a_patched_model(tmp_path):
    model = kc.patch_model(tiny_model("llama"), "full")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa" and "kvcompact" not in (tmp_path / "config.json").read_text()
