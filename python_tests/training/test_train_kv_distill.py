# SPDX-License-Identifier: Apache-2.0
"""Training of KV-Distill's scorer and adapter on tiny random models: loss, gradients, resume, the command, bad input."""

import json
import random
from dataclasses import replace

import pytest
import torch
from tiny_folder import save_tiny_folder, tiny_tokenizer
from tiny_models import tiny_model

from kvcompact_kernels import patch_model
from kvcompact_kernels.cache import CompactBlock
from kvcompact_kernels.cli import main
from kvcompact_kernels.kv_distiller import DistillerConfig, KVDistiller
from kvcompact_kernels.patch import is_patched
from kvcompact_kernels.patch.families import model_spec
from kvcompact_kernels.training import train_kv_distill
from kvcompact_kernels.training.data import Corpus, make_example, read_texts
from kvcompact_kernels.training.kv_distill import KVDistillOptions, KVDistillTrainer, default_loop
from kvcompact_kernels.training.loop import CheckpointError, Step
from kvcompact_kernels.training.still import Plans

TEXT = " ".join(f"Sentence number {i} says that the bell rings {i * 7} times." for i in range(120))
OPTIONS = KVDistillOptions(
    ratios=(4.0, 8.0), contexts=(120, 160), tails=3, continuation=12, recall=10, cue=3, distractors=1, questions=0,
    held_out=0.2, held_out_contexts=1,
)  # fmt: skip
LOOP = default_loop(steps=4, warmup=1, checkpoint_every=2, evaluate_every=4)
CONFIG = {"hidden": 16, "rank": 2}


def new_model(family="llama", **overrides):
    return tiny_model(family, torch.float32, vocab_size=261, max_position_embeddings=4096, **overrides)


@pytest.fixture(scope="module")
def corpus():
    return Corpus(read_texts([TEXT]), tiny_tokenizer(), 261, 0.2)


def new_trainer(corpus, family="llama", options=OPTIONS, measure=True):
    model = patch_model(new_model(family)).requires_grad_(False)
    spec = model_spec(model)
    generator = torch.Generator().manual_seed(7)
    config = DistillerConfig(16, 2, **CONFIG)
    distiller = KVDistiller(config, spec.layer_kinds.count("full"), spec.fingerprint, generator=generator)
    return KVDistillTrainer(model, spec, distiller, corpus, options, Plans(distiller, options), measure=measure)


def test_the_loss_is_the_weighted_sum_of_both_kl(corpus):
    """Teacher and student from two plain caches and the model's own logits, in fp64."""
    trainer = new_trainer(corpus, options=replace(OPTIONS, reverse=0.3, noise=0.0, top_k=261))
    example = make_example(corpus, corpus.train, trainer.recipe, 120, random.Random(3))
    kl, _, _ = trainer.compare([example], [(0, 120)], 4.0)
    full = trainer.read(torch.tensor([example.context]))
    with torch.no_grad():
        held_out, _, _ = trainer.compare([example], [(0, 120)], 4.0)
        compacted = trainer.compacted(full, [(0, 120)], 4.0)
    assert compacted.num_slots == 30
    with torch.no_grad():
        for found, reverse in ((kl, 0.3), (held_out, 0.0)):
            for tail, value in zip(example.tails, found):
                logs = []
                for cache in (full, compacted):
                    out = trainer.model(torch.tensor([tail.ids]), past_key_values=trainer._session(cache))
                    rows = [i - 1 for i, scored in enumerate(tail.scored) if scored]
                    logs.append(out.logits[0, rows].double().log_softmax(-1))
                p, q = logs
                wanted = (1 - reverse) * (p.exp() * (p - q)).sum(-1) + reverse * (q.exp() * (q - p)).sum(-1)
                assert abs(wanted.mean() - value.double()) < 1e-3 * max(1.0, float(wanted.mean())), tail.kind


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_scorer_and_adapter_get_gradients_and_nothing_else_does(corpus, family):
    trainer = new_trainer(corpus, family)
    parameters = dict(trainer.compactor.named_parameters())
    fixed = {name for name, p in parameters.items() if not p.requires_grad}
    assert {name.rpartition(".")[2] for name in fixed} == {"mean", "deviation"}
    # away from the start, where the zero of a product hides the other factor's gradient
    with torch.no_grad():
        for name, p in parameters.items():
            if name.endswith(("_up", "score_weight")):
                p.add_(0.05 * torch.randn(p.shape))
    full = trainer.read(torch.tensor([corpus.train.ids[:120].tolist()]))
    before = [x.clone() for block in full.layers for x in block.tensors().values()]
    trainer(Step(0, 0, 3)).loss.backward()
    for name, p in parameters.items():
        assert (p.grad is None) == (name in fixed), name
        assert name in fixed or (p.grad.isfinite().all() and p.grad.abs().max() > 0), name
    assert all(p.grad is None for p in trainer.model.parameters())
    after = [x for block in full.layers for x in block.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_gradient_checkpointing_changes_no_gradient(corpus):
    found = []
    for flag in (False, True):
        trainer = new_trainer(corpus, options=replace(OPTIONS, gradient_checkpointing=flag), measure=False)
        torch.manual_seed(3)  # of the noise, which is drawn once more when the forward pass is repeated
        out = trainer(Step(0, 0, 3))
        parameters = [p for p in trainer.compactor.parameters() if p.requires_grad]
        found.append([out.loss.detach(), *torch.autograd.grad(out.loss, parameters)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_at_the_start_the_student_is_the_untrained_method(corpus):
    trainer = new_trainer(corpus)
    ids = corpus.train.ids[:120].long()[None]
    with torch.no_grad():
        made = trainer.compacted(trainer.read(ids), [(0, 120)], 8.0)
    wanted = patch_model(new_model(), "kv_distill", weights="identity").compact(ids, ratio=8)
    for a, b in zip(made.layers, wanted.layers):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_method_with_the_file_is_the_student(tmp_path, corpus, family):
    trainer = new_trainer(corpus, family)
    with torch.no_grad():
        for p in trainer.compactor.parameters():
            p.add_(0.1 * torch.randn(p.shape).abs())
    trainer.compactor.save(tmp_path / "d.safetensors")
    ids = corpus.train.ids[:130].long()[None]
    with torch.no_grad():
        made = trainer.compacted(trainer.read(ids), [(0, 130)], 8.0)
    patched = patch_model(new_model(family), "kv_distill", weights=str(tmp_path / "d.safetensors"))
    for a, b in zip(made.layers, patched.compact(ids, ratio=8).layers):
        if isinstance(b, CompactBlock):
            assert b.num_slots == 17
            torch.testing.assert_close(a.keys, b.keys)
            torch.testing.assert_close(a.values, b.values)


def test_features_are_measured_in_what_they_vary_by(corpus):
    trainer = new_trainer(corpus)
    again = new_trainer(corpus)
    for layer, other in zip(trainer.compactor.layers, again.compactor.layers):
        assert torch.equal(layer["mean"], other["mean"]) and torch.equal(layer["deviation"], other["deviation"])
        assert (layer["deviation"] > 0).all() and layer["mean"].abs().max() > 0
    untouched = new_trainer(corpus, measure=False)
    assert all(layer["mean"].abs().max() == 0 for layer in untouched.compactor.layers)


def run(folder, model=None, loop=LOOP, options=OPTIONS, data=(TEXT,), tokenizer="own", name="d", **more):
    model = new_model() if model is None else model
    tokenizer = tiny_tokenizer() if tokenizer == "own" else tokenizer
    given = {} if "start" in more else {"config": CONFIG}
    return train_kv_distill(
        model, tokenizer, list(data), out=folder / name, options=options, loop=loop, **(given | more)
    )


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resume_is_exact_to_the_bit_and_the_model_stays_as_it_was(tmp_path):
    model = new_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    whole = run(tmp_path, model, name="whole")
    assert not is_patched(model) and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for steps in (1, 1, None):
        parts = run(tmp_path, name="parts", loop=replace(LOOP, max_steps=steps))
    assert parts.run.start == 2 and parts.run.finished and parts.run.evaluation == whole.run.evaluation
    assert same(whole.distiller, parts.distiller)
    loaded = KVDistiller.load(parts.path, model_spec(model))
    assert same(loaded, whole.distiller) and loaded.info["steps"] == 4 and loaded.info["options"]["reverse"] == 0.5
    assert loaded.info["held_out"]["none_kl"] > 0 and "chunk_tokens" not in loaded.info
    # a file is a start, which is not measured again; one of another model is not
    second = run(tmp_path, name="e", start=loaded.requires_grad_(False), loop=replace(LOOP, max_steps=1))
    moved = [
        n for n, x in second.distiller.named_parameters() if not torch.equal(x, dict(loaded.named_parameters())[n])
    ]
    assert second.run.start == 0 and moved and not any(n.endswith(("mean", "deviation")) for n in moved)
    with pytest.raises(ValueError, match="was trained for another model"):
        run(tmp_path, new_model(seed=1), name="f", start=parts.path)
    with pytest.raises(CheckpointError, match="reverse was 0.5, now 0.1"):
        run(tmp_path, name="parts", options=replace(OPTIONS, reverse=0.1))


def test_the_loss_falls(tmp_path):
    """One window, again and again: what is seen is learned, if scorer and adapter get gradients that lead somewhere."""
    ids = torch.randint(3, 261, (64 + 12,), generator=torch.Generator().manual_seed(0))
    options = replace(
        OPTIONS, mix={"continuation": 1.0}, contexts=(64,), ratios=(8.0,), tails=1, held_out=0.0, noise=0.0
    )
    loop = default_loop(steps=40, lr=5e-3, warmup=2, schedule="constant")
    result = run(tmp_path, options=options, loop=loop, data=[ids], tokenizer=None)
    assert sum(result.run.losses[-5:]) < 0.7 * sum(result.run.losses[:5])
    assert result.run.evaluation is None


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"max_chunks": 2}, ValueError, "max_chunks must be 1"),
        ({"max_chunks": None}, ValueError, "max_chunks must be 1"),
        ({"reverse": 1.2}, ValueError, r"reverse must be in \[0, 1\], got 1.2"),
        ({"noise": -1}, ValueError, "noise must be finite and at least 0"),
        ({"noise": "much"}, TypeError, "noise must be a number"),
        ({"ratios": (0.5,)}, ValueError, "ratios must be at least 1"),
    ],
)
def test_bad_options(changes, error, message):
    with pytest.raises(error, match=message):
        KVDistillOptions(**changes)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="give more text"):
        run(tmp_path, options=replace(OPTIONS, contexts=(100000,)))
    with pytest.raises(ValueError, match="mix must leave out"):
        run(tmp_path, tokenizer=None, data=[torch.arange(261).repeat(10)])
    with pytest.raises(ValueError, match="config must leave out head_dim"):
        run(tmp_path, config={"head_dim": 16})
    with pytest.raises(ValueError, match="config must be left out with start"):
        run(tmp_path, start="nothing", config=CONFIG)
    with pytest.raises(OSError, match="does not exist"):
        run(tmp_path / "no")


def test_the_command(tmp_path, capsys):
    folder = save_tiny_folder(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    out = tmp_path / "d.safetensors"
    words = ["train", "kv_distill", "--model", folder, "--data", tmp_path / "texts", "--out", out, "--dtype", "float32"]
    sizes = [
        "--ratio",
        "4,8",
        "--context",
        "120,160",
        "--steps",
        "2",
        "--warmup",
        "1",
        "--accumulate",
        "1",
        "-C",
        "rank=2",
        "-O",
        "continuation=12",
    ]
    options = ["-O", "tails=2", "-O", "questions=0", "-O", "held_out=0.2", "-O", "held_out_contexts=1"]

    def command(*more):
        return main([str(word) for word in (*words, *sizes, *options, *more)])

    capsys.readouterr()
    assert command("--json", "--quiet") == 0
    captured = capsys.readouterr()
    made = json.loads(captured.out)
    assert captured.err == "" and made["finished"] and made["step"] == 2 and made["held_out"]["kl"] > 0
    assert KVDistiller.load(out).config.rank == 2
    # another ratio than it was trained for, with the file that was just made
    (tmp_path / "d.txt").write_text("a" * 174)
    weights = f"weights={json.dumps(str(out))}"
    arguments = ["compact", tmp_path / "d.txt", "--model", folder, "--method", "kv_distill", "-O", weights]
    assert main([str(a) for a in (*arguments, "--ratio", "5", "--out", tmp_path / "d.kvc", "--quiet")]) == 0
    capsys.readouterr()
    for more, code, said in (
        (("--lr", "1"), 1, "loop.lr was 0.001, now 1.0"),
        (("-O", "reverse=2"), 2, "reverse must be in [0, 1]"),
        (("-C", "rank=0"), 2, "rank must be >= 1"),
        (("--start", "nothing"), 2, "--start comes without --config"),
        (("--data", "nowhere"), 1, "there is no file or folder nowhere"),
    ):
        assert command("--quiet", *more) == code
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
