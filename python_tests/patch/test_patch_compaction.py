# SPDX-License-Identifier: Apache-2.0
"""The compaction pass, automatic compaction, rotary embeddings, fingerprints, files, and bad input."""

import json
import math
import re

import pytest
import torch
import transformers
from tiny_models import FAMILIES, VOCABULARY, WINDOW, tiny_ids, tiny_model
from toy_methods import Chosen, Every, Recorder
from transformers import DynamicCache

import kvcompact_kernels as kc
from kvcompact_kernels.cache import CompactBlock, CompactCache
from kvcompact_kernels.model_spec import UnsupportedModelError, fingerprint_differences
from kvcompact_kernels.patch import CompactSession, check_fingerprint, model_spec
from kvcompact_kernels.patch.families import read_ropes

CONTEXT = 40


def raw_cache(model, ids):
    """Keys and values of an unpatched model, per layer."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_see_the_models_keys_values_and_queries(family):
    model = tiny_model(family)
    ids = tiny_ids(2, CONTEXT)
    raw = raw_cache(model, ids)
    method = Chosen(needed=7)
    cache = kc.compact(model, ids, method, ratio=3)
    spec = model_spec(model)
    full = [i for i, kind in enumerate(spec.layer_kinds) if kind == "full"]
    assert [layer.layer_idx for layer, _ in method.seen] == list(range(len(full)))
    for (layer, slots), index in zip(method.seen, full):
        assert slots == math.ceil(CONTEXT / 3) and layer.num_layers == len(full)
        assert torch.equal(layer.keys, raw[index][0]) and torch.equal(layer.values, raw[index][1])
        assert layer.queries.shape == (2, 6, 7, 16) and torch.equal(layer.positions, torch.arange(CONTEXT))
        assert layer.scale == pytest.approx(model_attention(model, index).scaling)
        # the queries' own attention gives what the layer put out: they are rotated and aligned with the last keys
        free = layer.rope.unrotate(layer.queries, layer.positions[-7:])
        assert not torch.allclose(free, layer.queries)
    for index, block in enumerate(cache.layers):
        if index not in full:
            assert torch.equal(block.keys, raw[index][0][:, :, -(WINDOW - 1) :])
            assert torch.equal(block.values, raw[index][1][:, :, -(WINDOW - 1) :])
    assert cache.logical_length == CONTEXT and cache.lengths is None and cache.info["ratio"] == 3


def model_attention(model, index):
    return kc.patch.families.decoder(model).layers[index].self_attn


def test_recorded_queries_are_those_that_attend():
    """Attention recomputed from the recorded queries is the layer's own."""
    model = tiny_model("llama")
    ids = tiny_ids(1, CONTEXT)
    outputs = []
    attention = model_attention(model, 0)
    hook = attention.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    method = Chosen(needed=-1)
    kc.compact(model, ids, method, ratio=2)
    hook.remove()
    layer = method.seen[0][0]
    assert layer.queries.shape[2] == CONTEXT
    wanted = torch.nn.functional.scaled_dot_product_attention(
        layer.queries,
        layer.keys.repeat_interleave(3, 1),
        layer.values.repeat_interleave(3, 1),
        is_causal=True,
        scale=layer.scale,
    )
    torch.testing.assert_close(outputs[0], wanted.transpose(1, 2).flatten(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_twice_gives_the_second_readings_queries(family):
    model = tiny_model(family)
    ids = tiny_ids(1, CONTEXT)
    twice = Chosen(needed=-1)
    kc.compact(model, torch.cat([ids, ids], 1), twice, ratio=2)
    method = Recorder(needed=-1)
    cache = kc.compact(model, ids, method, ratio=2)
    raw = raw_cache(model, ids)
    assert cache.logical_length == CONTEXT
    for (layer, _), (long, _), index in zip(method.seen, twice.seen, [1] if family == "gemma3_text" else [0, 1]):
        torch.testing.assert_close(layer.keys, raw[index][0], rtol=0, atol=1e-11)
        torch.testing.assert_close(layer.queries, long.queries[:, :, CONTEXT:], rtol=0, atol=1e-10)
        assert torch.equal(layer.positions, torch.arange(CONTEXT))
    if family == "gemma3_text":
        torch.testing.assert_close(cache.layers[0].keys, raw[0][0][:, :, -(WINDOW - 1) :], rtol=0, atol=1e-11)


def test_reading_padded_rows_twice():
    model = tiny_model("qwen3")
    ids, mask = tiny_ids(2, CONTEXT), torch.ones(2, CONTEXT, dtype=torch.long)
    mask[1, :13] = 0
    for needed in (-1, 5):
        method, alone = Recorder(needed=needed), Recorder(needed=needed)
        kc.compact(model, ids, method, attention_mask=mask, ratio=2)
        kc.compact(model, ids[1:, 13:], alone, ratio=2)
        rows = [layer for layer, _ in method.seen if layer.num_tokens == CONTEXT - 13]
        for layer, (single, _) in zip(rows, alone.seen):
            torch.testing.assert_close(layer.keys, single.keys, rtol=0, atol=1e-10)
            torch.testing.assert_close(layer.queries, single.queries, rtol=0, atol=1e-10)


def test_only_one_layers_keys_live_at_a_time():
    model = tiny_model("llama", num_hidden_layers=6)
    alive = []

    class Watch(Every):
        def compact_layer(self, layer, slots):
            import gc

            gc.collect()
            shape = layer.keys.shape
            storages = {
                x.untyped_storage().data_ptr()
                for x in gc.get_objects()
                if type(x) is torch.Tensor and x.shape == shape and not x.requires_grad
            }
            alive.append(len(storages))
            return super().compact_layer(layer, slots)

    kc.compact(model, tiny_ids(1, 64), Watch(), ratio=8)
    assert max(alive) <= alive[0]  # no more in the last layer than in the first


def test_blocks_do_not_keep_the_context_alive():
    cache = kc.compact(tiny_model("llama"), tiny_ids(1, 64), "streaming_llm", slots=8)
    for block in cache.layers:
        assert block.keys.untyped_storage().nbytes() == block.keys.nbytes
        assert block.values.untyped_storage().nbytes() == block.values.nbytes


def test_compact_leaves_an_unpatched_model_unpatched():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    before = dict(model.__dict__)
    kc.compact(model, tiny_ids(1, CONTEXT), "full")
    assert model.__dict__.keys() == before.keys() and model.training and not model.model.layers[0].training
    with pytest.raises(ValueError, match="slots"):
        kc.compact(model, tiny_ids(1, CONTEXT), "snapkv", slots=CONTEXT + 1)
    assert model.config._attn_implementation == "sdpa" and not model.model._forward_pre_hooks


def test_sizes_and_defaults():
    model = tiny_model("llama")
    ids = tiny_ids(1, CONTEXT)
    assert kc.compact(model, ids, Every()).num_slots == 5  # ratio 8
    assert kc.compact(model, ids, Every(), ratio=1000).num_slots == 1
    assert kc.compact(model, ids, Every(), ratio=1).num_slots == CONTEXT
    kc.patch_model(model, Every(), slots=9)
    assert model.compact(ids).num_slots == 9 and model.compact(ids, ratio=4).num_slots == 10
    assert model.compact(ids, "streaming_llm", sinks=2).method == "streaming_llm"  # as in compact()
    assert kc.compact(model, ids).method == "every"
    with pytest.raises(TypeError, match="method must be a name or a Method with its options, got a Tensor$"):
        model.compact(ids, torch.ones_like(ids))  # a mask has its name


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda r: r["rope_type"],
)
def test_ropes_are_the_models_own(rope):
    """Un-rotated keys are what the projection put out, and rotating them again gives the cached keys."""
    model = tiny_model("llama", rope=rope, max_position_embeddings=64)
    ids = tiny_ids(1, 100)  # beyond max_position_embeddings: dynamic scaling changes the frequencies
    before = read_ropes(model)["full"].inv_freq
    projected = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, a, out: projected.append(out))
    method = Chosen()
    cache = kc.compact(model, ids, method, ratio=2)
    hook.remove()
    layer = method.seen[0][0]
    assert layer.rope.rope_type == rope["rope_type"]
    assert torch.equal(layer.rope.inv_freq, before) == (rope["rope_type"] != "dynamic")
    assert torch.equal(cache.ropes["full"].inv_freq, layer.rope.inv_freq)
    if rope["rope_type"] == "yarn":
        assert layer.rope.attention_scaling != 1.0
    free = projected[0].view(1, 100, 2, 16).transpose(1, 2)
    # the model's tables are fp32: an angle of 100 radians is off by half a unit in its last place
    bound = 100 * torch.finfo(torch.float32).eps * 4 * free.abs().max()
    assert (layer.rope.unrotate(layer.keys, layer.positions) - free).abs().max() < bound
    assert (layer.rope.rotate(free, layer.positions) - layer.keys).abs().max() < bound


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "llama3", "dynamic"])
def test_composed_caches_stand_one_after_the_other(rope_type):
    rope = {"rope_type": rope_type, "factor": 4.0, "original_max_position_embeddings": 64}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type in ("default", "linear", "dynamic"):
        rope.pop("original_max_position_embeddings")
    if rope_type == "default":
        rope.pop("factor")
    model = kc.patch_model(tiny_model("llama", rope=rope, num_hidden_layers=1), "full")
    first, second = model.compact(tiny_ids(1, 30)), model.compact(tiny_ids(1, 25, 5))
    if rope_type == "dynamic":
        with pytest.raises(ValueError, match="dynamic"):
            CompactCache.compose([first, second])
        return
    # with one layer keys depend on position alone, so composing is reading both texts in a row
    composed, whole = (
        CompactCache.compose([first, second]),
        model.compact(torch.cat([tiny_ids(1, 30), tiny_ids(1, 25, 5)], 1)),
    )
    assert composed.logical_length == 55
    question = tiny_ids(1, 4, 9)
    got, wanted = (model(question, past_key_values=c).logits for c in (composed, whole))
    keys, reference = composed.layers[0].keys, whole.layers[0].keys
    assert (keys - reference).abs().max() < 55 * torch.finfo(torch.float32).eps * 4 * reference.abs().max()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    in_place = CompactCache.compose([first, second], reposition=False)
    assert in_place.logical_length == 30
    assert torch.equal(in_place.layers[0].keys, torch.cat([first.layers[0].keys, second.layers[0].keys], 2))


def test_gemma_has_two_ropes():
    spec = model_spec(tiny_model("gemma3_text"))
    assert spec.layer_kinds == ("sliding", "full") and spec.sliding_window == WINDOW
    assert not torch.equal(spec.ropes["full"].inv_freq, spec.ropes["sliding"].inv_freq)
    assert spec.scales == (24**-0.5,) * 2


def manual_chunks(model, prompt, limit, new_tokens):
    """Automatic compaction by hand: an exact cache that is compacted whenever its tail passes the limit."""
    session = CompactSession(model_spec(model))
    compactor = kc.patch.compaction.Compactor(model, session.spec, Every(), 4.0, None, None)
    session.compactor = compactor
    ids, out = prompt, prompt
    for _ in range(new_tokens):
        compactor.limit = 0 if session.tail_length + ids.shape[1] > limit else None
        with torch.no_grad():
            logits = model(ids, past_key_values=session).logits
        ids = logits[:, -1:].argmax(-1)
        out = torch.cat([out, ids], 1)
    return out, session


def test_budgets_know_what_prepare_has_read():
    """A method may read its weights, which say how many slots a layer gets, when it meets the model."""

    class Prepared(Every):
        def prepare(self, spec):
            self.read = True

        def budgets(self, slots, num_tokens, num_layers):
            return [slots + 4, slots - 4] if hasattr(self, "read") else [slots, slots]

    model = tiny_model("llama")
    cache = kc.compact(model, tiny_ids(1, CONTEXT), Prepared(), slots=10)
    assert [block.num_slots for block in cache.layers] == [14, 6]
    kc.patch_model(model, Prepared(), slots=10, compact_over=30)
    out = model.generate(tiny_ids(1, CONTEXT), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert [layer.block.num_slots for layer in out.past_key_values.layers] == [14, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_automatic_compaction(family):
    model = tiny_model(family)
    prompt = tiny_ids(2, 33)
    exact = model.generate(prompt, max_new_tokens=4, do_sample=False)
    kc.patch_model(model, Every(), ratio=4)
    wanted, session = manual_chunks(model, prompt, 20, 30)
    kc.patch_model(model, Every(), ratio=4, compact_over=20)
    out = model.generate(prompt, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, wanted)
    got = out.past_key_values
    assert torch.equal(out.sequences[:, :34], exact[:, :34])  # the first token is exact
    assert got.context_length == 33 + 21 == session.context_length and got.tail_length == 8
    block = next(layer.block for layer in got.layers if not layer.is_sliding)
    assert block.num_slots == math.ceil(33 / 4) + math.ceil(21 / 4)
    short = model.generate(prompt[:, :8], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert short.past_key_values.context_length == 0  # under the limit nothing happens


@pytest.mark.parametrize("family", FAMILIES)
def test_automatic_compaction_is_compact_then_generate(family):
    """After the prompt's compaction decoding goes on as from model.compact(prompt)."""
    model = kc.patch_model(tiny_model(family), "snapkv", ratio=3, compact_over=30)
    prompt = tiny_ids(1, 45)
    out = model.generate(prompt, max_new_tokens=6, do_sample=False)
    cache = model.compact(prompt)
    rest = model.generate(out[:, 45:46], past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(rest, out[:, 45:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_automatic_compaction_of_padded_batches_and_beams(family, beams):
    model = kc.patch_model(tiny_model(family), "snapkv", ratio=3, compact_over=15, window=4)
    prompt, mask = tiny_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    prompt[1, :11], mask[1, :11] = 0, 0
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": beams}
    together = model.generate(prompt, attention_mask=mask, **options)
    if beams == 1:
        for row, pad in ((0, 0), (1, 11)):
            assert torch.equal(together[row, pad:], model.generate(prompt[row : row + 1, pad:], **options)[0])
    else:
        assert torch.equal(together, model.generate(prompt, attention_mask=mask, **options))


def test_automatic_compaction_in_prompt_chunks():
    """Chunks of a prompt are compacted one by one."""
    model = kc.patch_model(tiny_model("llama"), Every(), ratio=4, compact_over=9)
    prompt = tiny_ids(1, 40)
    out = model.generate(prompt, max_new_tokens=3, do_sample=False, prefill_chunk_size=10, return_dict_in_generate=True)
    assert [layer.block.num_slots for layer in out.past_key_values.layers] == [12, 12]
    session = CompactSession(model_spec(model))
    session.compactor = kc.patch.compaction.Compactor(model, session.spec, Every(), 4.0, None, 0)
    with torch.no_grad():
        for chunk in prompt.split(10, 1):
            logits = model(chunk, past_key_values=session).logits
    assert logits[0, -1].argmax() == out.sequences[0, 40]


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tmp_path):
    model = kc.patch_model(tiny_model(family, torch.float32), "snapkv", ratio=4)
    ids, mask = tiny_ids(2, CONTEXT), torch.ones(2, CONTEXT, dtype=torch.long)
    mask[1, :9] = 0
    question = tiny_ids(2, 5, 3)
    for cache in (model.compact(ids), model.compact(ids, attention_mask=mask)):
        cache.save(tmp_path / "cache.safetensors")
        loaded = CompactCache.load(tmp_path / "cache.safetensors", model)
        assert (loaded.method, loaded.info, loaded.logical_length) == (cache.method, cache.info, cache.logical_length)
        a, b = (model.generate(question, past_key_values=c, max_new_tokens=4, do_sample=False) for c in (cache, loaded))
        assert torch.equal(a, b)


def test_fingerprint_tells_models_apart(tmp_path):
    model = kc.patch_model(tiny_model("llama", torch.float32), "full")
    cache = model.compact(tiny_ids(1, CONTEXT))
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    other = tiny_model("llama", torch.float32, seed=1)
    with pytest.raises(ValueError, match="weights"):
        CompactCache.load(path, other)
    with pytest.raises(ValueError, match=r"cache\.safetensors was made by another model.*num_layers is 2, expected 4"):
        CompactCache.load(path, tiny_model("llama", num_hidden_layers=4))
    with pytest.raises(ValueError, match="rope"):
        CompactCache.load(path, tiny_model("llama", rope={"rope_type": "linear", "factor": 2.0}), check_weights=False)
    kc.patch_model(other, "full")
    with pytest.raises(ValueError, match="another model"):
        other.generate(tiny_ids(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="another model"):
        other(tiny_ids(1, 3), past_key_values=cache)
    half = tiny_model("llama", torch.bfloat16)
    exact = tiny_model("llama", torch.bfloat16).float()  # the same weights, loaded wider
    assert model_spec(half).fingerprint == model_spec(exact).fingerprint
    json.dumps(model_spec(half).fingerprint)
    check_fingerprint(kc.compact(half, tiny_ids(1, 9), "full"), exact, "x")


def test_a_fine_tuned_sibling_uses_the_cache(tmp_path):
    model, sibling = (tiny_model("llama", torch.float32) for _ in range(2))
    path = tmp_path / "cache.safetensors"
    cache = kc.compact(model, tiny_ids(1, CONTEXT), "full")
    cache.save(path)
    with torch.no_grad():
        sibling.model.layers[0].self_attn.q_proj.weight += 0.01
    sibling.resize_token_embeddings(VOCABULARY + 3)
    kc.patch_model(sibling, "full")
    with pytest.raises(ValueError, match="vocab_size is 97, expected 100"):
        CompactCache.load(path, sibling)
    loaded = CompactCache.load(path, sibling, check_weights=False)
    assert loaded.fingerprint == model_spec(sibling).fingerprint
    question = tiny_ids(1, 3)
    out = sibling.generate(question, past_key_values=loaded, max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 5)
    CompactCache.compose([loaded, sibling.compact(tiny_ids(1, CONTEXT))])


def test_differences_are_said_once():
    found = model_spec(tiny_model("llama")).fingerprint
    one = fingerprint_differences(found, {**found, "weights": "x"})
    assert len(one) == 1 and one[0].startswith("weights is ")
    wanted = model_spec(tiny_model("llama", num_hidden_layers=4)).fingerprint
    assert fingerprint_differences(found, {**wanted, "weights": "x"}) == ["num_layers is 2, expected 4"]


class Adapted(torch.nn.Linear):
    """What PEFT's layers show of themselves."""

    adapter_layer_names = ("lora_A", "lora_B")
    active_adapters = ("mine",)
    disable_adapters = False

    def __init__(self, linear, rank=2):
        super().__init__(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
        self.weight = linear.weight
        sizes = {"lora_A": (self.in_features, rank), "lora_B": (rank, self.out_features)}
        for name, (width, out) in sizes.items():
            adapters = {key: torch.nn.Linear(width, out, bias=False) for key in ("mine", "yours")}
            setattr(self, name, torch.nn.ModuleDict(adapters))


def test_adapters_are_part_of_the_fingerprint():
    model = tiny_model("llama")
    bare = model_spec(model).fingerprint
    for layer in model.model.layers:
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj)
    digests = {model_spec(model).fingerprint["weights"] for _ in range(2)}
    digests.add(bare["weights"])
    for layer in model.model.layers:
        layer.mlp.up_proj.active_adapters = ("yours",)
    digests.add(model_spec(model).fingerprint["weights"])
    with torch.no_grad():
        model.model.layers[-1].mlp.up_proj.lora_B["yours"].weight += 1
    digests.add(model_spec(model).fingerprint["weights"])
    assert len(digests) == 4
    for layer in model.model.layers:
        layer.mlp.up_proj.disable_adapters = True
    assert model_spec(model).fingerprint == bare


def test_quantised_weights_are_part_of_the_fingerprint():
    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.register_buffer("qweight", (linear.weight * 16).round().to(torch.int8))
            self.register_buffer("scales", torch.full((1,), 1 / 16, dtype=linear.weight.dtype))

        def forward(self, x):
            return x @ (self.qweight * self.scales).T

    digests = set()
    for seed in (0, 0, 1):
        model, plain = tiny_model("llama", seed=0), tiny_model("llama", seed=seed)
        for layer, other in zip(model.model.layers, plain.model.layers):
            layer.self_attn.k_proj = Packed(other.self_attn.k_proj)
        digests.add(model_spec(model).fingerprint["weights"])
        kc.patch_model(model, "full")
        cache = model.compact(tiny_ids(1, CONTEXT))
        assert model.generate(tiny_ids(1, 3), past_key_values=cache, max_new_tokens=2).shape == (1, 5)
    assert len(digests) == 2

    class Hidden(torch.nn.Module):
        def weight(self):
            return None

    model.model.layers[0].self_attn.k_proj = Hidden()
    with pytest.raises(UnsupportedModelError, match="Hidden shows no weights"):
        model_spec(model)


def test_wrappers_are_named():
    model = tiny_model("llama")

    class Peft(torch.nn.Module):
        def get_base_model(self):
            return model

    wrapped = {
        "get_base_model()": Peft(),
        "_orig_mod": torch.compile(model),
        "module": torch.nn.DataParallel(model),
    }
    for name, wrapper in wrapped.items():
        with pytest.raises(TypeError, match=re.escape(f"which wraps one: give model.{name} instead")):
            kc.patch_model(wrapper)


def test_truncated_tampered_and_foreign_files(tmp_path):
    model = kc.patch_model(tiny_model("llama", torch.float32), "full")
    path = tmp_path / "cache.safetensors"
    model.compact(tiny_ids(1, CONTEXT)).save(path)
    data = path.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for cut in (0, 5, 100, len(data) // 2, len(data) - 1):
        broken.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="broken"):
            CompactCache.load(broken, model)
    broken.write_bytes(data.replace(b'"layers.0.keys"', b'"layers.0.kexs"'))
    with pytest.raises(ValueError, match="broken"):
        CompactCache.load(broken, model)
    broken.write_bytes(b"\x80\x04pickled" * 30)
    with pytest.raises(ValueError, match="broken"):
        CompactCache.load(broken, model)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, broken)
    with pytest.raises(ValueError, match="not a kvcompact-cache"):
        CompactCache.load(broken, model)
    with pytest.raises(FileNotFoundError):
        CompactCache.load(tmp_path / "missing", model)


def test_bad_models():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)
    with pytest.raises(kc.UnsupportedModelError, match=r"GPT2LMHeadModel.*supported are Llama"):
        kc.patch_model(transformers.GPT2LMHeadModel(config))
    with pytest.raises(TypeError, match="PreTrainedModel"):
        kc.patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(kc.UnsupportedModelError, match="soft-capping"):
        kc.patch_model(tiny_model("gemma3_text", attn_logit_softcapping=30.0))
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}
    longrope["original_max_position_embeddings"] = 128
    with pytest.raises(kc.UnsupportedModelError, match="longrope"):
        kc.patch_model(tiny_model("llama", rope=longrope))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "nothing"}, ValueError, "method must be one of"),
        ({"method": "snapkv", "windows": 3}, TypeError, "has no option 'windows'"),
        ({"ratio": 2, "slots": 3}, ValueError, "ratio or slots, not both"),
        ({"ratio": 0.5}, ValueError, "ratio must be a finite number >= 1, got 0.5"),
        ({"ratio": float("nan")}, ValueError, "ratio"),
        ({"ratio": "8"}, TypeError, "ratio must be a number"),
        ({"slots": 0}, ValueError, "slots must be >= 1, got 0"),
        ({"slots": 2.5}, TypeError, "slots must be an int"),
        ({"backend": "fast"}, ValueError, "backend must be one of 'auto'"),
        ({"compact_over": 0}, ValueError, "compact_over must be >= 1"),
        ({"compact_over": 10, "slots": 20}, ValueError, "slots must be at most compact_over"),
        ({"compact_over": 10, "method": Recorder()}, ValueError, "reads the context twice"),
    ],
    ids=str,
)
def test_bad_patch_options(options, error, words):
    model = tiny_model("llama")
    with pytest.raises(error, match=words):
        kc.patch_model(model, **options)
    assert not kc.patch.is_patched(model) and model.config._attn_implementation == "sdpa"


def test_bad_contexts():
    model = kc.patch_model(tiny_model("llama", torch.float32), Every(), ratio=4)
    ids = tiny_ids(2, 12)
    for bad, error, words in [
        ([1, 2, 3], TypeError, "input_ids must be a torch.Tensor, got list"),
        (ids[0], ValueError, "input_ids must have 2 dimensions"),
        (ids.float(), TypeError, "integers"),
        (ids[:, :0], ValueError, "at least one token"),
        (ids + VOCABULARY, ValueError, rf"\[0, {VOCABULARY - 1}\]"),
        (-ids, ValueError, "got values from"),
    ]:
        with pytest.raises(error, match=words):
            model.compact(bad)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 12\]"):
        model.compact(ids, attention_mask=torch.ones(2, 11))
    with pytest.raises(ValueError, match=r"rows \[1\]: an empty context"):
        model.compact(ids, attention_mask=torch.tensor([[1] * 12, [0] * 12]))
    with pytest.raises(ValueError, match=r"12 tokens, fewer than the 13 slots"):
        model.compact(ids[:1], slots=13)
    with pytest.raises(ValueError, match=r"\(row 1\) has 4 tokens, fewer than the 5 slots"):
        model.compact(ids, attention_mask=torch.tensor([[1] * 12, [0] * 8 + [1] * 4]), slots=5)
    with pytest.raises(ValueError, match="method 'snapkv' needs at least"):
        model.compact(ids, method="snapkv", slots=1)
    with pytest.raises(TypeError, match="no option 'backend'"):  # reading a context leaves nothing to choose
        kc.compact(model, ids, "full", backend="torch")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1: its values hold NaN"):
        model.compact(ids)


def test_bad_blocks_of_methods():
    model = tiny_model("llama")

    class Bad(Every):
        how = ""

        def compact_layer(self, layer, slots):
            block = super().compact_layer(layer, slots)
            if self.how == "type":
                return block.keys
            if self.how == "nan":
                return CompactBlock(block.keys * float("nan"), block.values)
            if self.how == "heads":
                return CompactBlock(block.keys[:, :1], block.values[:, :1])
            if self.how == "empty":
                return CompactBlock(block.keys[:, :, :0], block.values[:, :, :0])
            return CompactBlock(block.keys.float(), block.values.float())

    for how, error, words in [
        ("type", TypeError, "must return a CompactBlock"),
        ("nan", ValueError, "NaN"),
        ("heads", ValueError, "must return"),
        ("empty", ValueError, "without slots"),
        ("dtype", ValueError, "float32"),
    ]:
        method = Bad()
        method.how = how
        with pytest.raises(error, match=words):
            kc.compact(model, tiny_ids(1, 12), method)


def test_bad_questions():
    model = kc.patch_model(tiny_model("llama"), Every(), ratio=4)
    cache = model.compact(tiny_ids(2, CONTEXT))
    question = tiny_ids(3, 4, 5)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="batch size 3, but the compact cache has 2"):
            call(question, past_key_values=cache)
        with pytest.raises(ValueError, match="no new tokens"):
            call(question[:2, :0], past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 4\] or \[2, 44\]"):
            call(question[:2], attention_mask=torch.ones(2, 7), past_key_values=cache)
        with pytest.raises(ValueError, match="2-D"):
            call(question[:2], attention_mask=torch.ones(2, 1, 4, 44), past_key_values=cache)
    with pytest.raises(ValueError, match="output_attentions"):
        model(question[:2], past_key_values=cache, output_attentions=True)
    with pytest.raises(ValueError, match=r"cache.to"):
        model(question[:2], past_key_values=cache.to(dtype=torch.float32))
    with pytest.raises(ValueError, match="another model"):
        model(question[:2], past_key_values=kc.compact(tiny_model("llama", seed=3), tiny_ids(2, CONTEXT), Every()))
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout"):
        model(question[:2], past_key_values=cache)


def test_full_prompt_is_known_by_its_ids_not_its_length():
    model = kc.patch_model(tiny_model("llama"), Every(), ratio=2)
    ids = tiny_ids(1, 6)
    cache = model.compact(ids)
    longer = tiny_ids(1, 20, 8)  # a question longer than the context is a question
    options = {"max_new_tokens": 4, "do_sample": False, "past_key_values": cache}
    out = model.generate(longer, **options)
    step = model(longer, past_key_values=cache).logits[:, -1].argmax(-1)
    assert torch.equal(out[:, 20], step)
    whole = model.generate(torch.cat([ids, longer], 1), **options)
    assert torch.equal(whole[:, 6:], out)
    with pytest.raises(ValueError, match="no new tokens"):
        model.generate(longer[:, :0], **options)
