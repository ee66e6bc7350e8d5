# SPDX-License-Identifier: Apache-2.0
"""generate() and forward passes on compact caches: batches, padding, beams, sampling, chunks, conversations."""

import pytest
import torch
import transformers
from tiny_models import FAMILIES, tiny_ids, tiny_model
from toy_methods import Chosen, Every

import kvcompact_kernels as kc
from kvcompact_kernels.patch import CompactSession

CONTEXT, QUESTION, NEW = 41, 5, 7
OLD_ASSISTANTS = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 16)
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def padded_question(rows=3, length=9, pads=(0, 4, 7)):
    ids = tiny_ids(rows, length, 7)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return ids, mask


@pytest.fixture(params=FAMILIES)
def model(request):
    return kc.patch_model(tiny_model(request.param), "snapkv", ratio=4)


def snapshot(cache):
    return [x.clone() for block in cache.layers for x in block.tensors().values()]


def test_questions_leave_the_cache_as_it_is(model):
    cache = model.compact(tiny_ids(1, CONTEXT))
    before = snapshot(cache)
    question = tiny_ids(1, QUESTION, 2)
    first = model.generate(question, past_key_values=cache, **GREEDY)
    model.generate(tiny_ids(1, 30, 3), past_key_values=cache, **GREEDY)
    model.generate(tiny_ids(4, 3, 4), past_key_values=cache, num_beams=2, **GREEDY)
    model(question, past_key_values=cache)
    assert torch.equal(model.generate(question, past_key_values=cache, **GREEDY), first)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(cache), before))


def test_the_cache_is_one_argument_of_two_names(model):
    """transformers renamed past_key_values to cache in 5.24; either is taken by every version."""
    cache, question = model.compact(tiny_ids(1, CONTEXT)), tiny_ids(1, QUESTION, 2)
    wanted = model(question, past_key_values=cache).logits
    assert not torch.allclose(wanted, model(question).logits)
    assert torch.equal(model(question, cache=cache).logits, wanted)
    text = model.generate(question, past_key_values=cache, **GREEDY)
    assert torch.equal(model.generate(question, cache=cache, **GREEDY), text)
    plain = model.generate(question, **GREEDY)
    for name in ("past_key_values", "cache"):
        own = transformers.DynamicCache(config=model.config)
        assert torch.equal(model.generate(question, **{name: own}, **GREEDY), plain)
        assert own.get_seq_length() == QUESTION + NEW - 1
        assert torch.equal(model.generate(question, **{name: None}, **GREEDY), plain)
    # not the model with its head: transformers itself takes the new name there, and warns
    for use in (model.model, model.generate):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
            use(question, past_key_values=cache, cache=cache)


def test_a_session_is_of_no_use_to_a_model_that_is_not_patched(model):
    """Its slots would go unseen, and the answer would be another one without a word."""
    session = CompactSession(kc.patch.model_spec(model), model.compact(tiny_ids(1, CONTEXT)))
    question = tiny_ids(1, QUESTION, 2)
    wanted = model(question, past_key_values=session).logits
    session.reset()
    with pytest.raises(ValueError, match="no new tokens"):
        model(question[:, :0], past_key_values=session)
    kc.unpatch_model(model)
    with pytest.raises(TypeError, match="CompactSession, whose slots this model would not see"):
        model(question, past_key_values=session)
    kc.patch_model(model)
    session.reset()
    assert torch.equal(model(question, past_key_values=session).logits, wanted)


def test_one_context_with_many_left_padded_questions(model):
    cache = model.compact(tiny_ids(1, CONTEXT))
    ids, mask = padded_question()
    together = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    for row in range(3):
        pad = int((mask[row] == 0).sum())
        alone = model.generate(ids[row : row + 1, pad:], past_key_values=cache, **GREEDY)
        assert torch.equal(together[row, pad:], alone[0])
        single = model(ids[row : row + 1, pad:], past_key_values=cache).logits
        torch.testing.assert_close(logits[row, pad:], single[0], rtol=0, atol=1e-10)


def test_first_tokens_of_a_batch_meet_the_output_weight_once(model):
    """``linear`` of a slice with gaps goes row by row (600 ms instead of 4 for 8 rows and 49k words in bf16)."""
    cache = model.compact(tiny_ids(1, CONTEXT))
    seen = []
    watch = model.get_output_embeddings().register_forward_hook(lambda head, args, out: seen.append(args[0]))
    ids, mask = padded_question()
    model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert len(seen) == NEW and all(x.shape[:2] == (3, 1) and x.is_contiguous() for x in seen)
    plain = model(ids, logits_to_keep=1)
    watch.remove()
    assert not seen[-1].is_contiguous()  # without a compact cache nothing is touched
    kc.unpatch_model(model)
    assert torch.equal(model(ids, logits_to_keep=1).logits, plain.logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_contexts_equal_each_context_alone(model, side):
    ids, mask = tiny_ids(3, CONTEXT), torch.ones(3, CONTEXT, dtype=torch.long)
    real = []
    for row, pad in enumerate((0, 13, 20)):
        where = slice(0, pad) if side == "left" else slice(CONTEXT - pad, CONTEXT)
        real.append(ids[row : row + 1, pad:] if side == "left" else ids[row : row + 1, : CONTEXT - pad])
        ids[row, where], mask[row, where] = 0, 0
    cache = model.compact(ids, attention_mask=mask)
    assert cache.lengths.tolist() == [41, 28, 21]
    questions, padding = padded_question()
    together = model.generate(questions, attention_mask=padding, past_key_values=cache, **GREEDY)
    beams = model.generate(questions, attention_mask=padding, past_key_values=cache, num_beams=3, **GREEDY)
    logits = model(questions, attention_mask=padding, past_key_values=cache).logits
    for row in range(3):
        alone = model.compact(real[row])
        pad = int((padding[row] == 0).sum())
        question = questions[row : row + 1, pad:]
        for b in range(len(alone.layers)):
            if isinstance(alone.layers[b], kc.CompactBlock):
                for one, other in zip(alone.layers[b].heads()[0], cache.layers[b].heads()[row]):
                    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-10)
        assert torch.equal(together[row, pad:], model.generate(question, past_key_values=alone, **GREEDY)[0])
        assert torch.equal(beams[row, pad:], model.generate(question, past_key_values=alone, num_beams=3, **GREEDY)[0])
        single = model(question, past_key_values=alone).logits
        torch.testing.assert_close(logits[row, pad:], single[0], rtol=0, atol=1e-10)


def test_equal_rows_stay_rectangular_and_unequal_ones_are_packed():
    model = kc.patch_model(tiny_model("llama"), Every(), ratio=4)
    ids, mask = tiny_ids(2, CONTEXT), torch.ones(2, CONTEXT, dtype=torch.long)
    assert all(b.offsets is None for b in model.compact(ids, attention_mask=mask).layers)
    mask[1, :20] = 0
    cache = model.compact(ids, attention_mask=mask)
    block = cache.layers[0]
    assert block.offsets is not None and block.slot_counts.tolist() == [[11, 11], [6, 6]]
    assert block.keys.shape[0] == 2 * (11 + 6)  # no padding in memory


def test_beams_sampling_and_sequences(model):
    ids, question = tiny_ids(1, CONTEXT), tiny_ids(1, QUESTION, 2)
    prompt = torch.cat([ids, question], 1)
    kc.unpatch_model(model)
    beams = model.generate(prompt, num_beams=4, num_return_sequences=2, **GREEDY)
    torch.manual_seed(0)
    sampled = model.generate(prompt, max_new_tokens=NEW, do_sample=True, num_return_sequences=3)
    kc.patch_model(model, "full", backend="torch")
    cache = model.compact(ids)
    got = model.generate(question, past_key_values=cache, num_beams=4, num_return_sequences=2, **GREEDY)
    assert torch.equal(got, beams[:, CONTEXT:])
    torch.manual_seed(0)
    got = model.generate(question, past_key_values=cache, max_new_tokens=NEW, do_sample=True, num_return_sequences=3)
    assert torch.equal(got, sampled[:, CONTEXT:])


@pytest.mark.parametrize("size", [1, 2, 7, 8, 100])
def test_prompt_chunks(model, size):
    cache = model.compact(tiny_ids(1, CONTEXT))
    question = tiny_ids(2, 15, 2)
    mask = torch.ones_like(question)
    mask[1, :4] = 0
    wanted = model.generate(question, attention_mask=mask, past_key_values=cache, **GREEDY)
    got = model.generate(question, attention_mask=mask, past_key_values=cache, prefill_chunk_size=size, **GREEDY)
    assert torch.equal(got, wanted)
    model.generation_config.prefill_chunk_size = size
    assert torch.equal(model.generate(question, attention_mask=mask, past_key_values=cache, **GREEDY), wanted)
    assert model.generation_config.prefill_chunk_size == size


def test_embeddings_instead_of_ids(model):
    cache, question = model.compact(tiny_ids(1, CONTEXT)), tiny_ids(2, QUESTION, 2)
    embeds = model.get_input_embeddings()(question)
    wanted = model.generate(question, past_key_values=cache, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=embeds, past_key_values=cache, **GREEDY), wanted[:, QUESTION:])
    torch.testing.assert_close(
        model(inputs_embeds=embeds, past_key_values=cache).logits, model(question, past_key_values=cache).logits
    )


def test_assisted_generation_rolls_back(model):
    """Speculation changes nothing in greedy answers."""
    ids, question = tiny_ids(1, CONTEXT), tiny_ids(1, QUESTION, 2)
    cache = model.compact(ids)
    wanted = model.generate(question, past_key_values=cache, **GREEDY)
    draft = tiny_model(model.config.model_type, seed=3)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        if OLD_ASSISTANTS:
            with pytest.raises(ValueError, match=r"needs transformers >= 5\.16"):
                model.generate(question, past_key_values=cache, **options, **GREEDY)
        else:
            assert torch.equal(model.generate(question, past_key_values=cache, **options, **GREEDY), wanted)


def test_static_caches_pass_by(model):
    ids = tiny_ids(2, CONTEXT)
    with_patch = model.generate(ids, cache_implementation="static", **GREEDY)
    kc.unpatch_model(model)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), with_patch)


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_torch_compile():
    """Both ways of compiling a patched model; the graph breaks at the cache, the logits are the same."""
    model = kc.patch_model(tiny_model("gemma3_text"), "snapkv", ratio=4)
    cache, question = model.compact(tiny_ids(1, CONTEXT)), tiny_ids(1, QUESTION, 2)
    wanted = model(question, past_key_values=cache).logits
    text = model.generate(question, past_key_values=cache, **GREEDY)
    try:
        got = torch.compile(model, backend="eager")(question, past_key_values=cache).logits
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
        model.compile(backend="eager")
        torch.testing.assert_close(model(question, past_key_values=cache).logits, wanted, rtol=0, atol=1e-11)
        assert torch.equal(model.generate(question, past_key_values=cache, **GREEDY), text)
    finally:
        torch.compiler.reset()


def test_autocast():
    model = kc.patch_model(tiny_model("llama", torch.float32), Every(), ratio=4)
    question = tiny_ids(2, QUESTION, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model.compact(tiny_ids(1, CONTEXT))
        got = model(question, past_key_values=cache).logits
    assert cache.dtype == torch.float32
    exact = model(question, past_key_values=cache).logits
    assert got.dtype == torch.bfloat16 and not torch.equal(got.float(), exact)
    assert (got.float() - exact).norm() < 0.05 * exact.norm()


def test_a_session_goes_on(model):
    """Two turns through one session equal one long question."""
    cache = model.compact(tiny_ids(1, CONTEXT))
    question, mask = padded_question()
    out = model.generate(question, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
    session, said = out.past_key_values, out.sequences
    assert isinstance(session, CompactSession) and session.get_seq_length() == CONTEXT + said.shape[1] - 1
    more = torch.cat([said[:, -1:], tiny_ids(3, 4, 9)], 1)
    second = model.generate(more, past_key_values=session, **GREEDY)
    whole = torch.cat([said, more[:, 1:]], 1)
    whole_mask = torch.cat([mask, torch.ones(3, whole.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    wanted = model.generate(whole, attention_mask=whole_mask, past_key_values=cache, **GREEDY)
    assert torch.equal(second[:, 1:], wanted[:, said.shape[1] :])


def test_session_crop_reset_and_rows(model):
    cache = model.compact(tiny_ids(1, CONTEXT))
    question = tiny_ids(2, QUESTION, 2)
    wanted = model(question, past_key_values=cache).logits
    for crop in (-3, CONTEXT + 2):
        session = CompactSession(kc.patch.model_spec(model), cache)
        for layer in session.layers:
            if layer.is_sliding:
                layer.activate_past_recording()
        model(question, past_key_values=session)
        session.crop(crop)
        assert session.get_seq_length() == CONTEXT + 2
        torch.testing.assert_close(model(question[:, 2:], past_key_values=session).logits, wanted[:, 2:])
    with pytest.raises(ValueError, match="cannot crop"):
        session.crop(-session.tail_length - 1)
    with pytest.raises(ValueError, match="cannot crop"):
        session.crop(CONTEXT - 1)
    session.reset()
    assert session.get_seq_length() == CONTEXT
    torch.testing.assert_close(model(question, past_key_values=session).logits, wanted)
    session.batch_select_indices(torch.tensor([1]))
    more = tiny_ids(1, 3, 8)
    single = model(question[1:], past_key_values=cache).past_key_values
    torch.testing.assert_close(model(more, past_key_values=session).logits, model(more, past_key_values=single).logits)
    session.batch_repeat_interleave(3)
    assert session.batch_size == 3


def test_tail_appends_without_copies():
    model = kc.patch_model(tiny_model("llama", torch.float32), Every(), slots=6)
    session = CompactSession(kc.patch.model_spec(model), model.compact(tiny_ids(1, CONTEXT)))
    storages = set()
    with torch.no_grad():
        for i in range(60):
            model(tiny_ids(1, 1, i), past_key_values=session)
            storages.add(session.layers[0].keys.data_ptr())
    assert len(storages) == 1 and session.tail_length == 60


def test_tail_survives_inference_mode():
    model = kc.patch_model(tiny_model("llama"), Every(), slots=6)
    question = tiny_ids(1, QUESTION, 2)
    cache = model.compact(tiny_ids(1, CONTEXT))
    with torch.inference_mode():
        session = model(question[:, :1], past_key_values=cache).past_key_values
    got = [model(question[:, i : i + 1], past_key_values=session).logits for i in range(1, QUESTION)]
    wanted = model(question, past_key_values=cache).logits
    torch.testing.assert_close(torch.cat(got, 1), wanted[:, 1:], rtol=0, atol=1e-11)


def trainable(cache):
    """A copy of the cache whose blocks are leaves."""
    layers = []
    for block in cache.layers:
        if isinstance(block, kc.CompactBlock):
            parts = {
                n: x.detach().clone().requires_grad_() if n != "offsets" else x for n, x in block.tensors().items()
            }
            block = kc.CompactBlock(**parts, num_kv_heads=block.num_kv_heads)
        layers.append(block)
    return kc.CompactCache(tuple(layers), cache.logical_length, cache.fingerprint, cache.ropes)


def leaves(cache):
    return [x for block in cache.compact_layers for x in (block.keys, block.values, block.beta)]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_keys_values_and_beta(family, ragged):
    model = kc.patch_model(tiny_model(family), "full").requires_grad_(False)
    index = [[0, 5, 9, 20], [1, 2, 30, 31, 32] if ragged else [3, 4, 5, 6]]
    cache = trainable(model.compact(tiny_ids(1, CONTEXT), method=Chosen(index=[index] * 2, biased=True)))
    question = tiny_ids(2, QUESTION, 2)

    def objective(cache):  # not transformers' loss, which is fp32
        logits = model(question, past_key_values=cache).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), question.flatten())

    def loss(which, x):
        block = cache.compact_layers[0]
        tensors = {"keys": block.keys, "values": block.values, "beta": block.beta, which: x}
        changed = kc.CompactBlock(**tensors, offsets=block.offsets, num_kv_heads=2)
        layers = tuple(changed if b is block else b for b in cache.layers)
        replaced = kc.CompactCache(layers, cache.logical_length, cache.fingerprint, cache.ropes)
        return objective(replaced)

    objective(cache).backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in leaves(cache))
    got = [x.grad for x in leaves(cache)]
    kc.patch_model(model, "full", backend="torch")  # PyTorch's own autograd through scaled_dot_product_attention
    other = trainable(cache)
    objective(other).backward()
    for mine, x in zip(got, leaves(other)):
        torch.testing.assert_close(mine, x.grad, rtol=1e-6, atol=1e-7)  # norms inside the model are fp32
    for which, grad in zip(("keys", "values", "beta"), got):  # and against differences along one direction
        block = cache.compact_layers[0]
        x = getattr(block, which).detach()
        step = 1e-3 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            difference = (loss(which, x + step) - loss(which, x - step)) / 2
        assert abs((grad * step).sum() - difference) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_and_functional_sessions(family):
    model = kc.patch_model(tiny_model(family), "full").requires_grad_(False)
    index = [[[0, 5, 9, 20], [1, 2, 30, 31]]] * 2
    cache = trainable(model.compact(tiny_ids(1, CONTEXT), method=Chosen(index=index, biased=True)))
    question = tiny_ids(2, QUESTION, 2)
    model(question, past_key_values=cache, labels=question).loss.backward()
    wanted = [x.grad.clone() for x in leaves(cache)]
    for x in leaves(cache):
        x.grad = None
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    out = model(question, past_key_values=cache, labels=question)
    out.loss.backward()
    for x, y in zip(leaves(cache), wanted):
        torch.testing.assert_close(x.grad, y, rtol=1e-9, atol=1e-12)
    with torch.no_grad():  # since transformers 5.24 layers keep their cache here
        first = CompactSession(kc.patch.model_spec(model), cache)
        for tokens in (question[:, :2], question[:, 2:]):
            logits = model(tokens, past_key_values=first).logits
        if first.get_seq_length() > CONTEXT:
            torch.testing.assert_close(logits, out.logits[:, 2:])
        else:  # before, nothing is stored
            assert torch.equal(logits, model(question[:, 2:], past_key_values=cache).logits)
    model.gradient_checkpointing_disable()
    model.eval()
    session = CompactSession(kc.patch.model_spec(model), cache)
    session.functional = True
    first = model(question, past_key_values=session).logits
    assert session.get_seq_length() == CONTEXT and torch.equal(model(question, past_key_values=session).logits, first)


@pytest.mark.parametrize("family", FAMILIES)
def test_per_layer_and_per_head_slots(family):
    layers = 1 if family == "gemma3_text" else 2
    model = kc.patch_model(
        tiny_model(family), Chosen(index=[[[0, 9], [3, 4, 5]], [[7], [1, 2, 3, 4]]][:layers]), slots=3
    )
    cache = model.compact(tiny_ids(1, CONTEXT))
    assert [b.slot_counts.tolist() for b in cache.compact_layers] == [[[2, 3]], [[1, 4]]][:layers]
    width = 2 * 16 * 8  # keys and values of one fp64 slot
    assert sum(b.keys.nbytes + b.values.nbytes for b in cache.compact_layers) == width * 5 * layers
    together = model.generate(tiny_ids(3, QUESTION, 2), past_key_values=cache, **GREEDY)
    for row in range(3):
        alone = model.generate(tiny_ids(3, QUESTION, 2)[row : row + 1], past_key_values=cache, **GREEDY)
        assert torch.equal(together[row], alone[0])


def test_long_gemma_conversation_slides_its_window():
    """Tails several windows long, in turns, against the same ids in one pass."""
    model = kc.patch_model(tiny_model("gemma3_text", sliding_window=8, num_hidden_layers=4), "full", backend="torch")
    ids = tiny_ids(1, 90)
    with torch.no_grad():
        wanted = model(ids).logits
        session, got = model.compact(ids[:, :20]), []
        for start, end in ((20, 23), (23, 24), (24, 50), (50, 51), (51, 90)):
            out = model(ids[:, start:end], past_key_values=session)
            session = out.past_key_values
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), wanted[:, 20:], rtol=0, atol=1e-11)
    assert [layer.keys.shape[2] for layer in session.layers if layer.is_sliding] == [7, 7]


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_sliding_layers_of_other_families(family):
    if family == "qwen2":
        model = tiny_model(family, use_sliding_window=True, sliding_window=9, max_window_layers=1)
        assert kc.patch.model_spec(model).layer_kinds == ("full", "sliding")
        ids = tiny_ids(1, 60)
        kc.patch_model(model, "full", backend="torch")
        with torch.no_grad():
            wanted = model(ids).logits[:, 30:]
            cache = model.compact(ids[:, :30])
            assert isinstance(cache.layers[1], kc.WindowBlock) and cache.layers[1].keys.shape[2] == 8
            torch.testing.assert_close(model(ids[:, 30:], past_key_values=cache).logits, wanted, rtol=0, atol=1e-11)
    else:
        model = tiny_model(family, sliding_window=9)
        kc.patch_model(model, "full")
        with pytest.raises(kc.UnsupportedModelError, match="nothing to compact"):
            model.compact(tiny_ids(1, 30))
