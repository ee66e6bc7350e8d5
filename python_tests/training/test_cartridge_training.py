# SPDX-License-Identifier: Apache-2.0
"""Training of cartridges: the loss falls, resuming is exact, memory follows the slots, and cartridges compose."""

import errno
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import transformers
from tiny_folder import tiny_tokenizer
from tiny_models import tiny_model

from kvcompact_kernels import UnsupportedModelError
from kvcompact_kernels.cache import CompactCache
from kvcompact_kernels.evaluation.memory import peak_bytes
from kvcompact_kernels.methods.cartridge import Cartridge
from kvcompact_kernels.patch import is_patched, model_spec, patch_model
from kvcompact_kernels.training import cartridge as training
from kvcompact_kernels.training import train_cartridge
from kvcompact_kernels.training.cartridge import BatchPlan, CartridgeConfig, cartridge_bytes, default_loop
from kvcompact_kernels.training.checkpoint import CheckpointError
from kvcompact_kernels.training.distill import Targets
from kvcompact_kernels.training.loop import Step, TrainingError, TrainingInterrupted
from kvcompact_kernels.training.self_study import Conversation, SelfStudyConfig

TEXT = "The lantern is green. The bell rings at noon. Nobody knows why. Seven ships left. " * 3
OTHER = "A baker sold bread to the king. He was paid in salt and in wool. The king was tall. " * 3
STUDY = SelfStudyConfig(
    conversations=12, batch=6, chunk_tokens=120, request_tokens=5, answer_tokens=8, held_out=2, top_k=12
)
CONFIG = CartridgeConfig(slots=40, tokens=400)
LOOP = default_loop(12, checkpoint_every=4, evaluate_every=6)


def new_model(seed=0):
    return tiny_model("llama", torch.float32, seed, vocab_size=261, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def model():
    return new_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Conversations are prepared once for all tests; checkpoints go elsewhere."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def run_folder(work, tmp_path):
    for path in work.glob("conversations-*"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / path.name).symlink_to(path)
    yield tmp_path / "run"
    for path in (tmp_path / "run").glob("conversations-*"):
        if not path.is_symlink():
            path.rename(work / path.name)


def fit(model, tokenizer, out, run_folder, documents=TEXT, config=CONFIG, study=STUDY, loop=LOOP, **options):
    return train_cartridge(model, tokenizer, documents, out, config, study, loop, run_folder=run_folder, **options)


def tensors_of(path):
    return {f"{i}.{n}": x for i, b in enumerate(CompactCache.load(path).layers) for n, x in b.tensors().items()}


def assert_same(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_falls_and_the_model_stays(tokenizer, tmp_path, run_folder):
    model = new_model().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    out = tmp_path / "notes.kvc"
    lines = []
    (made,) = fit(model, tokenizer, out, run_folder, loop=replace(LOOP, steps=40), report=lines.append)
    assert made.finished and made.steps == 40 and made.path == out and not lines
    assert sum(made.losses[-5:]) < 0.7 * sum(made.losses[:5])
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    held = [row["evaluation"]["kl"] for row in rows if "evaluation" in row]
    assert held[-1] < held[0] and made.evaluation["kl"] == held[-1]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training and all(x.requires_grad for x in model.parameters()) and not is_patched(model)
    # what came out: the sink as it was, everything else moved, positions right behind the slots
    cache = CompactCache.load(out, model)
    ids = torch.tensor([training.document_ids(tokenizer, training.prompt_format(tokenizer), TEXT.strip())])
    patch_model(model.eval(), "full")
    start = model.compact(ids, method="cartridge", slots=40)
    assert cache.logical_length == 40 and cache.num_slots == 40
    for block, first in zip(cache.layers, start.layers):
        assert torch.equal(block.keys[:, :, :1], first.keys[:, :, :1])
        assert torch.equal(block.values[:, :, :1], first.values[:, :, :1])
        assert (block.keys[:, :, 1:] != first.keys[:, :, 1:]).any(-1).all()
    assert cache.info["training"]["step"] == 40 and cache.info["prompt"]["document"] == "document"
    assert Cartridge.load(out, model).sinks == 1


def test_the_untrained_start_is_where_the_held_out_figure_starts(model, tokenizer, tmp_path, run_folder):
    """The figure of step 0, against whole prompts and full distributions, without cache, compaction or padding."""
    out = tmp_path / "notes.kvc"
    study = replace(STUDY, top_k=261)
    fit(model, tokenizer, out, run_folder, study=study, loop=replace(LOOP, max_steps=1))
    row = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[0])
    data = training.prepare_conversations(patch_model(model, "full"), tokenizer, TEXT, study, run_folder)
    first = training.document_ids(tokenizer, training.prompt_format(tokenizer), TEXT.strip())[:40]
    total, count = 0.0, 0
    for one in (data[i] for i in data.held_out):
        ids = torch.cat([torch.tensor(first), one.prompt, one.answer])[None]
        with torch.no_grad():
            student = model(ids).logits[0, -1 - len(one.answer) : -1].double().log_softmax(-1)
        teacher = torch.zeros_like(student).scatter(1, one.targets.ids[:, :261], one.targets.logs[:, :261].double())
        total += (teacher.exp() * (teacher - student)).sum().item()
        count += len(one.answer)
    assert row["evaluation"]["kl"] == pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("documents", [TEXT, {"one": TEXT, "two": OTHER}])
def test_resuming_is_exact(model, tokenizer, tmp_path, run_folder, documents):
    config = replace(CONFIG, distractors=0.0 if isinstance(documents, str) else 0.5)
    fit(model, tokenizer, tmp_path / "a", run_folder / "a", documents, config)
    for _ in range(3):
        made = fit(
            model, tokenizer, tmp_path / "b", run_folder / "b", documents, config, loop=replace(LOOP, max_steps=9)
        )
        if made[-1].finished:
            break
    for name in (".",) if isinstance(documents, str) else ("one.kvc", "two.kvc"):
        assert_same(tmp_path / "a" / name, tmp_path / "b" / name)
    # a finished run trains no more, and writes its file again
    again = fit(model, tokenizer, tmp_path / "b", run_folder / "b", documents, config)
    assert all(one.finished and one.losses == [] and one.evaluation for one in again)


def test_ctrl_c_saves_the_step_and_the_rest_is_the_same(model, tokenizer, tmp_path, run_folder, monkeypatch):
    plain = training.distillation_loss
    calls, before = [], is_patched(model)

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **options)

    fit(model, tokenizer, tmp_path / "a.kvc", run_folder / "a")
    with monkeypatch.context() as patch:
        patch.setattr(training, "distillation_loss", interrupted)
        with pytest.raises(TrainingInterrupted, match=r"interrupted after step \d of 12"):
            fit(model, tokenizer, tmp_path / "b.kvc", run_folder / "b")
    assert is_patched(model) == before
    fit(model, tokenizer, tmp_path / "b.kvc", run_folder / "b")
    assert_same(tmp_path / "a.kvc", tmp_path / "b.kvc")


def test_an_unfinished_run_leaves_a_usable_file_and_says_so(model, tokenizer, tmp_path, run_folder):
    lines = []
    (made,) = fit(
        model, tokenizer, tmp_path / "a.kvc", run_folder, loop=replace(LOOP, max_steps=5), report=lines.append
    )
    assert not made.finished and made.steps == 5 and "stopped after step 5 of 12" in lines[0]
    assert CompactCache.load(made.path).info["training"]["finished"] is False


class Made:
    """Conversations that are made when they are asked for."""

    digest = "made"

    def __init__(self, count):
        self.train, self.held_out = list(range(2, count)), [0, 1]
        self.lengths = [20 + i % 7 for i in range(count)]

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        size = self.lengths[i] - 12
        ids = torch.randint(5, 261, (size, 9), generator=generator)
        logs = torch.rand(size, 9, generator=generator).log_softmax(-1)
        return Conversation(torch.arange(10, 22), ids[:, -1].clone(), Targets(ids, logs), "question")


def task_of(model, tokenizer, count, slots=40, tokens=400, text=TEXT):
    patch_model(model.eval().requires_grad_(False), "full")
    config = CartridgeConfig(slots=slots, tokens=tokens)
    ids = training.document_ids(tokenizer, training.prompt_format(tokenizer), text)
    start = training._start(model, model_spec(model), ids, Made(count), config, None)
    return training._Task(model, model_spec(model), ["a"], [start], [Made(count)], config, 0, [])


def test_memory_follows_the_slots_and_the_batch_and_not_the_corpus(tokenizer):
    model = new_model()

    def peak(count, slots=40, tokens=400, text=TEXT):
        task = task_of(model, tokenizer, count, slots, tokens, text)
        task.plans[0].batch(0)

        def once():
            task.step(Step(0, 0, 0)).loss.backward()

        once()  # what is made once is no part of a step
        for x in task.parameters().values():
            x.grad = None
        return peak_bytes(once, torch.device("cpu"))[1]

    # every batch is a full one, of rows as long
    small = peak(200)
    assert peak(3200, text=TEXT * 8) == pytest.approx(small, rel=0.1)
    assert peak(200, tokens=800) > 1.5 * small
    assert peak(200, slots=160) > small


def test_padding_and_batching_change_nothing(tokenizer):
    task = task_of(new_model(), tokenizer, 20)
    cache = task.cartridges[0].to_cache()
    together = task._compare(0, [3, 9, 5, 6], cache)[0]
    apart = torch.cat([task._compare(0, [i], cache)[0] for i in (3, 9, 5, 6)])
    assert torch.allclose(together, apart, atol=1e-5)


def test_every_conversation_once_an_epoch_and_no_batch_too_large():
    lengths = [5 + i * 37 % 90 for i in range(200)]
    plan, again = BatchPlan(range(3, 200), lengths, 300, 7), BatchPlan(range(3, 200), lengths, 300, 7)
    number, batches = 0, []
    for _ in range(3):
        epoch = []
        while sum(map(len, epoch)) < 197:
            epoch.append(plan.batch(number))
            number += 1
        assert sorted(i for batch in epoch for i in batch) == list(range(3, 200))
        assert all(len(b) * max(lengths[i] for i in b) <= 300 for b in epoch)
        padded = sum(len(b) * max(lengths[i] for i in b) for b in epoch)
        assert padded < 1.35 * sum(lengths[3:])
        batches += epoch
    assert batches[:5] != batches[len(batches) // 3 :][:5]
    assert [again.batch(i) for i in (number - 1, 0, number // 2)] == [batches[i] for i in (number - 1, 0, number // 2)]
    assert BatchPlan([1], [0, 9], 4, 0).batch(5) == [1]


def test_distractors_make_cartridges_compose(model, tokenizer, tmp_path, run_folder):
    """Beside the other one, those trained with distractors are nearer to the teacher than those trained alone."""
    documents = {"one": TEXT, "two": OTHER}
    loop = replace(LOOP, steps=30, evaluate_every=30)
    figures = {}
    for share in (0.0, 0.7):
        config = replace(CONFIG, distractors=share)
        made = fit(model, tokenizer, tmp_path / f"{share}", run_folder / f"{share}", documents, config, loop=loop)
        composed = []
        caches = [CompactCache.load(one.path) for one in made]
        patch_model(model, "full")
        for which, text in enumerate(documents.values()):
            data = training.prepare_conversations(model, tokenizer, text, STUDY, run_folder / f"{share}")
            task = training._Task(model, model_spec(model), ["x"], [], [data], config, 0, [])
            both = CompactCache.compose([caches[which], caches[1 - which]], reposition=False)
            with torch.no_grad():
                composed.append(torch.cat([task._compare(0, [i], both)[0] for i in data.train]).mean().item())
        figures[share] = sum(composed) / 2
        assert ("kl_composed" in made[0].evaluation) == (share > 0)
        assert {"kl", "kl_one", "kl_two"} <= made[0].evaluation.keys()
    assert figures[0.7] < 0.9 * figures[0.0]


def test_a_given_file_and_a_memory_limit(model, tokenizer, tmp_path, run_folder):
    (given,) = fit(model, tokenizer, tmp_path / "given.kvc", run_folder / "given")
    texts = {name: f"{OTHER} {name}" for name in ("one", "two", "three")}
    one = cartridge_bytes(model_spec(model), 40, 4)
    seen = []
    made = fit(
        model,
        tokenizer,
        tmp_path / "folder",
        run_folder / "folder",
        texts,
        replace(CONFIG, distractors=1.0),
        loop=replace(LOOP, steps=4),
        distractors=[given.path],
        memory_bytes=2 * one + 5,
        report=seen.append,
    )
    assert [m.name for m in made] == ["one", "two", "three"] and [m.steps for m in made] == [8, 8, 4]
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["one.kvc", "three.kvc", "two.kvc"]
    assert (run_folder / "folder" / "group-2" / "checkpoint.json").is_file()
    # one at a time: the first has nothing beside it, the second the first's file
    made = fit(
        model,
        tokenizer,
        tmp_path / "turns",
        run_folder / "turns",
        {"one": TEXT, "two": OTHER},
        replace(CONFIG, distractors=1.0),
        loop=replace(LOOP, steps=2),
        memory_bytes=one,
    )
    assert ["kl_composed" in m.evaluation for m in made] == [False, True]
    with pytest.raises(ValueError, match=f"memory_bytes must be at least the {one}"):
        fit(model, tokenizer, tmp_path / "f", run_folder, texts, memory_bytes=one - 1)
    another = tmp_path / "another.kvc"
    cache = CompactCache.load(given.path)
    replace(cache, fingerprint={**cache.fingerprint, "weights": "of another"}).save(another)
    with pytest.raises(ValueError, match="another.kvc was made by another model"):
        fit(model, tokenizer, tmp_path / "f", run_folder, texts, distractors=[another])


@pytest.mark.parametrize("init", ["snapkv:window=4", "attention_matching", "self_study"])
def test_other_starts(model, tokenizer, tmp_path, run_folder, init):
    (made,) = fit(
        model,
        tokenizer,
        tmp_path / "a.kvc",
        run_folder,
        config=replace(CONFIG, init=init, train_beta=True),
        loop=replace(LOOP, steps=2),
    )
    cache = CompactCache.load(made.path)
    assert cache.logical_length == made.tokens > 40 and cache.info["init"] == init
    assert all(block.beta is not None and (block.beta != 0).any() for block in cache.layers)


FITTED = replace(CONFIG, init="self_study", layer_steps=8)


@pytest.mark.parametrize("documents", [TEXT, {"one": TEXT, "two": OTHER}])
def test_fitted_layers_are_where_the_training_starts(model, tokenizer, tmp_path, run_folder, documents, monkeypatch):
    """Stopped in the middle of either part and gone on with: the same bits, and the start is made once."""
    lines, starts, make = [], [], training.study_start
    monkeypatch.setattr(training, "study_start", lambda *a, **k: starts.append(1) or make(*a, **k))
    whole = fit(model, tokenizer, tmp_path / "a", run_folder / "a", documents, FITTED)
    count = len(whole)
    assert len(starts) == count and all(one.finished for one in whole)
    parts = run_folder / "b"
    (made, *_) = fit(
        model,
        tokenizer,
        tmp_path / "b",
        parts,
        documents,
        FITTED,
        loop=replace(LOOP, max_seconds=0),
        report=lines.append,
    )
    assert made.steps == 0 and not made.finished and made.evaluation is None and made.losses == []
    assert "stopped after step 0 of" in lines[0] and "(1 of 8 of the layers)" in lines[0]
    assert CompactCache.load(made.path).info["training"]["step"] == 0
    while not made.finished:  # the fit of each document, then a piece of the training
        loop = replace(LOOP, max_steps=9, max_seconds=None)
        (made, *_) = fit(model, tokenizer, tmp_path / "b", parts, documents, FITTED, loop=loop)
    assert len(starts) == 2 * count
    for name in (".",) if count == 1 else ("one.kvc", "two.kvc"):
        assert_same(tmp_path / "a" / name, tmp_path / "b" / name)
    # what the training starts from is what the fit ended with
    name = "document" if count == 1 else "one"
    rows = [json.loads(line) for line in (parts / "layers" / name / "metrics.jsonl").read_text().splitlines()]
    held = [row["evaluation"]["error"] for row in rows if "evaluation" in row]
    assert held[-1] < held[0] and rows[-1]["step"] == 8
    plain = replace(FITTED, layer_steps=0)
    fit(model, tokenizer, tmp_path / "c", run_folder / "c", documents, plain, loop=replace(LOOP, max_steps=1))
    first = []
    for folder in (run_folder / "a", run_folder / "c"):
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        first.append(next(row["evaluation"]["kl"] for row in rows if "evaluation" in row and row["step"] == 0))
    assert first[0] != first[1]


def test_a_start_that_was_kept_is_used_for_the_same_run_only(model, tokenizer, tmp_path, run_folder, monkeypatch):
    starts, make = [], training.study_start
    monkeypatch.setattr(training, "study_start", lambda *a, **k: starts.append(1) or make(*a, **k))
    config, once = replace(CONFIG, init="self_study"), replace(LOOP, max_steps=1)

    def made(folder, config=config, study=STUDY):
        before = len(starts)
        fit(model, tokenizer, tmp_path / "a.kvc", run_folder, config=config, study=study, loop=once)
        for path in [*run_folder.glob("checkpoint*"), *run_folder.glob("metrics.jsonl")]:
            path.unlink()
        return len(starts) - before

    assert made(run_folder) == 1 and made(run_folder) == 0
    assert made(run_folder, config=replace(config, slots=41)) == 1
    assert made(run_folder, study=replace(STUDY, held_out=3)) == 1
    file = run_folder / "start-document.kvc"
    assert made(run_folder) == 1 and made(run_folder) == 0
    file.write_bytes(file.read_bytes()[:1000])
    assert made(run_folder) == 1 and made(run_folder) == 0


def test_a_file_is_trained_further(model, tokenizer, tmp_path, run_folder):
    (first,) = fit(model, tokenizer, tmp_path / "a.kvc", run_folder, config=replace(CONFIG, init="self_study"))
    folder = tmp_path / "more"
    folder.mkdir()
    for path in run_folder.glob("conversations-*"):
        (folder / path.name).symlink_to(path.resolve())
    config = replace(CONFIG, init=f"cartridge:file={first.path}")
    fit(model, tokenizer, tmp_path / "b.kvc", folder, config=config, loop=replace(LOOP, max_steps=1))
    rows = [json.loads(line) for line in next(folder.rglob("metrics.jsonl")).read_text().splitlines()]
    start = next(row["evaluation"]["kl"] for row in rows if "evaluation" in row and row["step"] == 0)
    assert start == pytest.approx(first.evaluation["kl"], rel=1e-3)
    with pytest.raises(ValueError, match="slots"):
        fit(model, tokenizer, tmp_path / "c.kvc", tmp_path / "other", config=replace(config, slots=39))


def test_gemma_with_its_sliding_layers(tokenizer, tmp_path):
    model = tiny_model("gemma3_text", torch.float32, vocab_size=261, max_position_embeddings=2048)
    (made,) = fit(model, tokenizer, tmp_path / "a.kvc", tmp_path / "run", loop=replace(LOOP, steps=12))
    (log,) = (tmp_path / "run").rglob("metrics.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    # of one and the same conversations: those of two steps differ more from one another than training moves them
    assert made.evaluation["kl"] < 0.9 * next(row["evaluation"]["kl"] for row in rows if "evaluation" in row)


def test_bad_documents_and_models(model, tokenizer, tmp_path):
    def refused(match, documents=TEXT, error=ValueError, subject=model, out="a.kvc", **options):
        with pytest.raises(error, match=match):
            fit(subject, tokenizer, tmp_path / out, tmp_path / "run", documents, **options)
        assert not (tmp_path / "run").exists()

    refused("'document' is empty", "  \n")
    refused("fewer than the 40 slots", "short")
    refused("at least one document", {})
    refused("plain file name", {"x/y": TEXT, "z": TEXT})
    refused("must map names to texts", {"x": 3}, TypeError)
    refused("one document alone has none", config=replace(CONFIG, distractors=0.5))
    refused("folder .* does not exist", out="nowhere/a.kvc", error=FileNotFoundError)
    refused("2048 positions", TEXT * 20, config=replace(CONFIG, init="snapkv:window=4"))
    refused("2048 positions", TEXT * 20, config=replace(CONFIG, init="self_study"))
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=261))
    refused("supported are", error=UnsupportedModelError, subject=other)
    sliding = tiny_model("mistral", torch.float32, vocab_size=261, max_position_embeddings=2048, sliding_window=16)
    refused("nothing to compact", error=UnsupportedModelError, subject=sliding)
    for name, value in {"slots": 0, "sinks": 600, "rest": "none", "distractors": 2, "init": "magic"}.items():
        with pytest.raises(ValueError):
            CartridgeConfig(**{name: value})
    with pytest.raises(ValueError, match="layer_steps must be >= 0, got -1"):
        CartridgeConfig(init="self_study", layer_steps=-1)
    with pytest.raises(ValueError, match="layer_steps fits slots to the whole text"):
        CartridgeConfig(layer_steps=1)


def test_a_checkpoint_of_something_else_is_refused(model, tokenizer, tmp_path, run_folder):
    fit(model, tokenizer, tmp_path / "a.kvc", run_folder, loop=replace(LOOP, max_steps=4))
    with pytest.raises(CheckpointError, match="config.slots was 40, now 50"):
        fit(model, tokenizer, tmp_path / "a.kvc", run_folder, config=replace(CONFIG, slots=50))
    with pytest.raises(CheckpointError, match="documents.document was"):
        fit(model, tokenizer, tmp_path / "a.kvc", run_folder, OTHER)
    with pytest.raises(CheckpointError, match="run.model.weights was"):
        fit(new_model(seed=9), tokenizer, tmp_path / "a.kvc", run_folder)
    (made,) = fit(model, tokenizer, tmp_path / "a.kvc", run_folder)
    assert made.finished


def test_a_loss_that_is_no_number_stops_the_run(model, tokenizer, tmp_path, run_folder, monkeypatch):
    plain = training.distillation_loss
    calls = []

    def broken(*args, **options):
        calls.append(1)
        kl, *rest = plain(*args, **options)
        return (kl * (float("nan") if torch.is_grad_enabled() and len(calls) > 9 else 1), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "distillation_loss", broken)
        with pytest.raises(
            TrainingError, match=r"loss is nan at step \d+ \(batch: document, conversations \d+.*step 8 is kept"
        ):
            fit(model, tokenizer, tmp_path / "a.kvc", run_folder, loop=replace(LOOP, evaluate_every=None))
    assert not (tmp_path / "a.kvc").exists()
    fit(model, tokenizer, tmp_path / "a.kvc", run_folder, loop=replace(LOOP, evaluate_every=None))
    fit(model, tokenizer, tmp_path / "b.kvc", run_folder / "b", loop=replace(LOOP, evaluate_every=None))
    assert_same(tmp_path / "a.kvc", tmp_path / "b.kvc")


def test_a_full_disk_loses_nothing(model, tokenizer, tmp_path, run_folder, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CompactCache, "save", full)
        with pytest.raises(OSError, match="a.kvc .*No space left on device.*the checkpoint holds the cartridge"):
            fit(model, tokenizer, tmp_path / "a.kvc", run_folder)
    (made,) = fit(model, tokenizer, tmp_path / "a.kvc", run_folder)
    assert made.losses == [] and made.path.is_file()
