# SPDX-License-Identifier: Apache-2.0
"""Training of a STILL compactor on tiny random models: the teacher, the gradients, resume, and what is refused."""

import math
import random
from dataclasses import replace

import pytest
import torch
from tiny_folder import tiny_tokenizer
from tiny_models import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from kvcompact_kernels import UnsupportedModelError, patch_model
from kvcompact_kernels.cache import CompactBlock
from kvcompact_kernels.methods.still import StillCompactor
from kvcompact_kernels.patch import is_patched
from kvcompact_kernels.patch.families import model_spec
from kvcompact_kernels.still_config import StillConfig
from kvcompact_kernels.training import questions as questions_module
from kvcompact_kernels.training.data import Corpus, collate, make_example, read_texts
from kvcompact_kernels.training.generation import Written
from kvcompact_kernels.training.loop import CheckpointError, LoopConfig, Step, StepOutput, TrainingError
from kvcompact_kernels.training.still import (
    Plans,
    StillOptions,
    StillTrainer,
    default_slots,
    parameter_groups,
    train_still,
)

TEXT = " ".join(f"Sentence number {i} says that the bell rings {i * 7} times." for i in range(120))
OPTIONS = StillOptions(
    ratios=(4.0,), contexts=(240,), tails=3, continuation=12, recall=10, cue=3, distractors=1, questions=0, held_out=0.2,
    held_out_contexts=1,
)  # fmt: skip
LOOP = LoopConfig(4, lr=1e-3, warmup=1, checkpoint_every=2, evaluate_every=4)
CONFIG = {"num_blocks": 1}


def new_model(family="llama", **overrides):
    return tiny_model(family, torch.float32, vocab_size=261, max_position_embeddings=4096, **overrides)


@pytest.fixture(scope="module")
def corpus():
    return Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.2)


def new_trainer(corpus, family="llama", options=OPTIONS, sink=1, **overrides):
    model = patch_model(new_model(family, **overrides)).requires_grad_(False)
    spec = model_spec(model)
    config = StillConfig(slots=15, head_dim=16, sink=sink, num_blocks=1, latent_std=0.5)
    generator = torch.Generator().manual_seed(7)
    compactor = StillCompactor(config, spec.layer_kinds.count("full"), spec.fingerprint, generator=generator)
    return StillTrainer(model, spec, compactor, corpus, options, Plans(compactor, options))


def tensors_of(cache):
    return [x for block in cache.layers for x in block.tensors().values()]


def gradients(trainer, loss):
    parameters = dict(trainer.compactor.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: x for name, x in zip(parameters, found) if x is not None}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_students_pass_leaves_the_teachers_cache_alone(corpus, family):
    trainer = new_trainer(corpus, family)
    example = make_example(corpus, corpus.train, OPTIONS.recipe(), 180, random.Random(1))
    batch = collate(example.tails, "cpu")
    full = trainer.read(torch.tensor([example.context]))
    assert full.logical_length == 180 and all(not x.requires_grad for x in tensors_of(full))
    before = [x.clone() for x in tensors_of(full)]
    targets = trainer.teach(full, batch)
    chunks = [(0, 60), (60, 120), (120, 180)]
    for _ in range(2):
        kl, _, _ = trainer.learn(trainer.compacted(full, chunks, 4.0), batch, targets, 3)
        gradients(trainer, kl.mean())
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(full), before))
        again = trainer.teach(full, batch)
        assert torch.equal(again.ids, targets.ids) and torch.equal(again.logs, targets.logs)
    # the model behind the teacher's cache is the teacher, also after the student has run
    kl, _, _ = trainer.learn(full, batch, targets, 3)
    assert kl.abs().max() < 1e-4
    assert trainer.model.model.layers[0].self_attn.q_proj.weight.grad is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_teacher_and_targets_are_the_plain_model(corpus, family):
    trainer = new_trainer(corpus, family)
    example = make_example(corpus, corpus.train, OPTIONS.recipe(), 120, random.Random(5))
    targets = trainer.teach(trainer.read(torch.tensor([example.context])), collate(example.tails, "cpu"))
    plain, row = new_model(family), 0
    for tail in example.tails:
        logs = plain(torch.tensor([example.context + tail.ids])).logits[0].float().log_softmax(-1)
        for i, scored in enumerate(tail.scored):
            if scored:
                assert int(targets.gold[row]) == tail.ids[i]
                wanted = logs[119 + i, targets.ids[row, :-1]]
                assert torch.allclose(targets.logs[row, :-1], wanted, atol=2e-4)
                row += 1
    assert row == targets.ids.shape[0]


def test_slots_for_every_token_at_the_start_give_no_loss(corpus):
    """A student whose slots are the tokens themselves is the teacher: positions, sinks and chunks fit together."""
    trainer = new_trainer(corpus, options=replace(OPTIONS, ratios=(1.0,), contexts=(60,)))
    config = StillConfig(slots=15, head_dim=16, sink=1, num_blocks=1, routing_gap=400.0)
    trainer.compactor = StillCompactor(config, 2, {})
    example = make_example(corpus, corpus.train, OPTIONS.recipe(), 60, random.Random(2), ["recall", "continuation"])
    kl, _, _ = trainer.compare([example], [(i, i + 15) for i in range(0, 60, 15)], 1.0)
    assert kl.max() < 1e-3
    half, _, _ = trainer.compare([example], [(i, i + 30) for i in range(0, 60, 30)], 2.0)
    assert half.min() > 10 * kl.max()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradient_checkpointing_changes_no_gradient(corpus, family):
    found = []
    for flag in (False, True):
        trainer = new_trainer(corpus, family, replace(OPTIONS, gradient_checkpointing=flag), attention_dropout=0.5)
        out = trainer(Step(0, 0, 3))
        found.append((out.loss.detach(), gradients(trainer, out.loss)))
        assert not any(module.training for module in trainer.model.modules())
        assert not trainer.model.is_gradient_checkpointing
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].keys() == found[1][1].keys()
    for name, x in found[0][1].items():
        assert torch.allclose(x, found[1][1][name], rtol=1e-4, atol=1e-7), name
    assert any("latents" in name and x.abs().max() > 0 for name, x in found[0][1].items())


def test_a_batch_of_contexts_is_its_members(corpus):
    trainer = new_trainer(corpus, options=replace(OPTIONS, mix={"recall": 1.0, "facts": 1.0}))
    draws = [make_example(corpus, corpus.train, trainer.recipe, 120, random.Random(i)) for i in range(3)]
    chunks = [(0, 60), (60, 120)]
    together = trainer.compare(draws, chunks, 4.0)
    apart = [trainer.compare([example], chunks, 4.0) for example in draws]
    for i, x in enumerate(together):
        assert torch.allclose(x, torch.cat([parts[i] for parts in apart]), atol=1e-4)


def test_autocast_stays_near_the_wide_result(corpus):
    wide, narrow = (
        float(new_trainer(corpus, options=replace(OPTIONS, autocast=dtype))(Step(0, 0, 3)).loss.detach())
        for dtype in (None, "bfloat16")
    )
    assert wide != narrow and abs(wide - narrow) < 0.2 * wide


def test_the_number_of_chunks_is_drawn_and_covers_what_fits():
    options = replace(OPTIONS, ratios=(4.0, 8.0), contexts=(240, 120))
    compactor = StillCompactor(StillConfig(slots=15, head_dim=16), 1, {})
    plans = Plans(compactor, options)
    seen = set()
    for seed in range(300):
        chunks, ratio = plans.draw(random.Random(seed))
        assert all(end - start == 15 * ratio for start, end in chunks)
        assert [start for start, _ in chunks[1:]] == [end for _, end in chunks[:-1]]
        seen.add((ratio, len(chunks)))
    assert seen == {(4.0, 1), (4.0, 2), (4.0, 3), (4.0, 4), (8.0, 1), (8.0, 2)}
    assert Plans(compactor, replace(options, max_chunks=1)).draw(random.Random(0))[0][0][0] == 0
    with pytest.raises(ValueError, match="the 15 slots of a chunk at ratio 8 stand for 120 tokens, more than the 100"):
        Plans(compactor, replace(options, contexts=(100,)))
    assert default_slots(replace(options, contexts=(2048,))) == 128
    assert default_slots(replace(options, contexts=(2048,), ratios=(4.0, 8.0, 32.0))) == 64


def test_a_compactor_of_any_number_of_slots_is_asked_for_it(corpus):
    asked = []

    class Any(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def slots_for(self, tokens, ratio):
            return math.ceil(tokens / ratio)

        def forward(self, layer_idx, keys, values, rope, positions, slots):
            asked.append((layer_idx, keys.shape[2], slots, int(positions[0])))
            return CompactBlock(keys[:, :, -slots:] * self.scale, values[:, :, -slots:])

    options = replace(OPTIONS, contexts=(131, 240), ratios=(3.0, 8.0))
    trainer = new_trainer(corpus, options=OPTIONS)
    compactor = Any()
    trainer.compactor, trainer.plans = compactor, Plans(compactor, options)
    for index in range(6):
        out = trainer(Step(index, 0, 1))
        assert torch.autograd.grad(out.loss, compactor.scale)[0].abs() > 0
    assert {layer for layer, *_ in asked} == {0, 1}
    assert {round(tokens / slots) for _, tokens, slots, _ in asked} == {3, 8}
    assert any(first for *_, first in asked)


def run(folder, model=None, loop=LOOP, options=OPTIONS, data=(TEXT,), tokenizer="own", name="c", **more):
    model = new_model() if model is None else model
    tokenizer = tiny_tokenizer() if tokenizer == "own" else tokenizer
    return train_still(
        model, tokenizer, list(data) if isinstance(data, tuple) else data, out=folder / name, options=options, loop=loop,
        **({"config": CONFIG} if "start" not in more else {}), **more,
    )  # fmt: skip


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resume_is_exact_to_the_bit_and_the_model_stays_as_it_was(tmp_path):
    model = new_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.lm_head.weight.requires_grad_(False)
    whole = run(tmp_path, model, name="whole")
    assert not is_patched(model) and not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad and model.model.norm.weight.grad is None
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for steps in (1, 1, None):
        parts = run(tmp_path, name="parts", loop=replace(LOOP, max_steps=steps))
    assert parts.run.start == 2 and parts.run.finished and parts.run.evaluation == whole.run.evaluation
    assert same(whole.compactor, parts.compactor)
    loaded = StillCompactor.load(parts.path, model_spec(model))
    assert same(loaded, whole.compactor) and loaded.info["steps"] == 4 and loaded.info["finished"]
    assert loaded.info["held_out"]["none_kl"] > 0 and loaded.config.sink == 1


def test_the_loss_falls(tmp_path):
    """One window, again and again: what is seen is learned, if every step of the way carries a gradient."""
    ids = torch.randint(3, 261, (64 + 12,), generator=torch.Generator().manual_seed(0))
    options = replace(OPTIONS, mix={"continuation": 1.0}, contexts=(64,), ratios=(8.0,), tails=1, held_out=0.0)
    loop = LoopConfig(40, lr=3e-3, warmup=2, schedule="constant", evaluate_every=5)
    result = run(tmp_path, options=replace(options, max_chunks=1), loop=loop, data=[ids], tokenizer=None, slots=8)
    assert result.run.losses[-1] < 0.6 * result.run.losses[0]
    assert result.run.evaluation is None and sum(result.run.losses[-5:]) < 0.7 * sum(result.run.losses[:5])


def test_runs_share_prepared_data(tmp_path):
    shared = tmp_path / "prepared"
    run(tmp_path, loop=replace(LOOP, max_steps=1), data_cache=shared)
    (file,) = shared.iterdir()
    made = file.stat().st_mtime_ns
    run(tmp_path, name="d", loop=replace(LOOP, max_steps=1), data_cache=shared)
    assert list(shared.iterdir()) == [file] and file.stat().st_mtime_ns == made
    assert not [path for name in ("c.run", "d.run") for path in (tmp_path / name).glob("tokens-*")]


def test_a_trained_file_is_a_start(tmp_path):
    first = run(tmp_path, loop=replace(LOOP, max_steps=2))
    second = run(tmp_path, name="d", start=first.path, loop=replace(LOOP, max_steps=1))
    assert second.run.start == 0 and not same(first.compactor, second.compactor)
    with pytest.raises(ValueError, match="was trained for another model"):
        run(tmp_path, new_model(seed=1), name="e", start=first.path)
    with pytest.raises(ValueError, match="slots and config must be left out"):
        run(tmp_path, name="e", start=first.path, slots=15)
    with pytest.raises(CheckpointError, match="run.start was"):
        run(tmp_path, name="d", start=second.path)


def test_checkpoints_of_something_else_are_refused_by_field(tmp_path):
    run(tmp_path, loop=replace(LOOP, max_steps=1))
    with pytest.raises(CheckpointError, match=r"run\.model\.weights was"):
        run(tmp_path, new_model(seed=1))
    with pytest.raises(CheckpointError, match=r"run\.compactor\.slots was 15, now 13"):
        run(tmp_path, slots=13)
    with pytest.raises(CheckpointError, match=r"run\.data\.texts was"):
        run(tmp_path, data=(TEXT + " More.",))
    with pytest.raises(CheckpointError, match=r"run\.options\.gold_weight was 0\.0, now 0\.5"):
        run(tmp_path, options=replace(OPTIONS, gold_weight=0.5))


def test_a_loss_that_is_no_number_names_the_text(tmp_path, monkeypatch):
    real = StillTrainer.__call__

    def broken(self, step):
        out = real(self, step)
        return StepOutput(out.loss * (math.nan if step.index == 2 else 1.0), out.metrics, out.batch)

    monkeypatch.setattr(StillTrainer, "__call__", broken)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3 \(batch: \d+ tokens of text 0 at token"):
        run(tmp_path)
    assert not (tmp_path / "c").exists() and (tmp_path / "c.run" / "checkpoint.json").exists()


def test_token_ids_train_without_a_tokenizer(tmp_path):
    ids = torch.randint(3, 261, (2000,), generator=torch.Generator().manual_seed(0))
    mix = {"recall": 1.0, "continuation": 1.0}
    result = run(tmp_path, options=replace(OPTIONS, mix=mix), data=[ids], tokenizer=None, loop=replace(LOOP, steps=2))
    assert result.run.finished
    with pytest.raises(ValueError, match='mix must leave out "facts" and "questions"'):
        run(tmp_path, data=[ids], tokenizer=None, name="d")


def test_groups_have_the_rates_of_their_patterns(corpus):
    trainer = new_trainer(corpus)
    groups = parameter_groups(trainer.compactor, OPTIONS.lr_scales)
    scale = {name: group.lr_scale for group in groups for name in group.parameters}
    assert scale["layers.0.latents"] == 8.0 and scale["layers.1.value_head"] == 0.25
    assert scale["layers.1.block0_cross_v_weight"] == 0.25 and scale["layers.0.block0_cross_q_weight"] == 1.0
    assert set(scale) == {name for name, _ in trainer.compactor.named_parameters()}


def test_the_model_writes_questions_once_and_interruptions_lose_none(tmp_path, monkeypatch):
    corpus = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.2)
    model = patch_model(new_model())
    model.generation_config.eos_token_id = 4
    calls = []

    def generate(model, prompts, limit):
        calls.append(len(prompts))
        asking = questions_module.WRITE in corpus.tokenizer.decode(prompts[0])
        if len(calls) == 5:
            raise KeyboardInterrupt
        text = " bell rings? Maybe.\n" if asking else "the bell"  # without a sentence's end
        return [
            Written(corpus.encode(text) + ([] if i == 1 and len(prompts) == 3 and not asking else [4]))
            for i in range(len(prompts))
        ]

    monkeypatch.setattr(questions_module, "generate", generate)
    options = {"passage": 64, "batch": 3, "seed": 2}
    with pytest.raises(KeyboardInterrupt):
        questions_module.add_questions(model, corpus, 10, {"w": "1"}, tmp_path, **options)
    (file,) = tmp_path.glob("questions-*.jsonl")
    assert len(file.read_text().splitlines()) == 6
    file.write_text(file.read_text() + '{"part": "tr')  # a crash in the middle of a line
    calls[:] = [0] * 10
    first = questions_module.add_questions(model, corpus, 10, {"w": "1"}, tmp_path, **options)
    assert sum(calls) == 2 * 5 and len(file.read_text().splitlines()) == 11
    # of each three answers the second never ended
    assert len(corpus.train.items) == 10 - 3 and len(corpus.held.items) == 1
    item = corpus.train.items[0]
    assert item.question.split("?")[0] in [f"{word} bell rings" for word in questions_module.OPENINGS]
    assert list(item.answer) == [*corpus.encode("the bell"), 4]
    assert item.end - item.start == 64
    other = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.2)
    calls[:] = [0] * 10
    assert questions_module.add_questions(model, other, 10, {"w": "1"}, tmp_path, **options) == first
    assert sum(calls) == 0 and other.train.items == corpus.train.items


def test_useless_questions_and_answers_are_left_out(monkeypatch):
    corpus = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.0)
    model = patch_model(new_model())
    model.generation_config.eos_token_id = 4
    said = iter([" bell rings?", " is the answer to this question?", " bell rings", " bell?"])
    answers = iter(["the bell", "unheard of things"])

    def generate(model, prompts, limit):
        asking = questions_module.WRITE in corpus.tokenizer.decode(prompts[0])
        return [Written(corpus.encode(next(said if asking else answers)) + [4]) for _ in prompts]

    monkeypatch.setattr(questions_module, "generate", generate)
    questions_module.add_questions(model, corpus, 4, {}, None, passage=64, batch=4, seed=3)
    # left over: the first. No word of the sentence; no question mark; too short or answered out of thin air
    assert len(corpus.train.items) == 1


def test_a_long_answer_is_cut_behind_its_last_sentence():
    corpus = Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.0)
    ids = corpus.encode("It rings. Then it rings. And th")
    assert corpus.tokenizer.decode(questions_module._whole_sentences(corpus, ids)) == "It rings. Then it rings."
    assert questions_module._whole_sentences(corpus, corpus.encode("It ri")) == []


def test_the_sentence_with_names_and_numbers_is_asked_about():
    text = (
        "cut off here. It was a day like any other day there. In 1907 Anna Berg sold the mill to her cousin. So it wa"
    )
    assert questions_module.telling_sentence(text) == "In 1907 Anna Berg sold the mill to her cousin."
    assert questions_module.telling_sentence("one two") == "one two"


def test_what_cannot_be_trained_is_refused(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=261, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        run(tmp_path, gpt2)
    with pytest.raises(UnsupportedModelError, match="nothing to compact"):
        run(tmp_path, new_model("mistral", sliding_window=12))
    with pytest.raises(ValueError, match="must have a vocabulary head"):
        run(tmp_path, new_model().model)
    with pytest.raises(ValueError, match="give more text, shorter contexts"):
        run(tmp_path, data=("Too short.",))
    with pytest.raises(OSError, match="does not exist"):
        run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="config must leave out head_dim"):
        train_still(new_model(), tiny_tokenizer(), [TEXT], out=tmp_path / "c", config={"head_dim": 4})
    model = new_model()
    assert not list(tmp_path.glob("c")) and not is_patched(model)


@pytest.mark.parametrize(
    "options,error",
    [
        ({"ratios": (0.5,)}, "ratios must be at least 1"),
        ({"contexts": ()}, "contexts must not be empty"),
        ({"mix": {"poems": 1.0}}, "there is no kind 'poems'"),
        ({"mix": {"facts": 0.0}}, "some kind a weight above 0"),
        ({"mix": {"facts": -1}}, r"mix\['facts'\] must be a number and at least 0"),
        ({"cue": 50}, "cue must be less than recall"),
        ({"held_out": 1.0}, "held_out must be a share"),
        ({"autocast": "int8"}, "autocast must be one of"),
        ({"rest": "drop"}, "rest must be one of"),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(ValueError, match=error):
        StillOptions(**options)
