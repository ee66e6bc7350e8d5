# SPDX-License-Identifier: Apache-2.0
"""Devices, waiting and graphs on a stand-in for a GPU: no tensor of the CPU creeps in, and what is captured waits for nothing.

The tests run in a process of their own, which the first one starts: see cuda_stand_in.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcompact_kernels.testing.budget import assert_within_budget
from kvcompact_kernels.testing.draws import draws

HERE = Path(__file__).parent
INSIDE = os.environ.get("KVCOMPACT_TEST_STAND_IN") == "1"
if INSIDE:
    import cuda_stand_in  # before Triton
pytest.importorskip("triton")

inside = pytest.mark.skipif(not INSIDE, reason="test_on_the_stand_in runs it")


@pytest.mark.skipif(INSIDE, reason="this is the process that it starts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_the_stand_in():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "KVCOMPACT_TEST_STAND_IN": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    for name in ("PYTEST_ADDOPTS", "TRITON_INTERPRET"):
        environment.pop(name, None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.fixture
def gpu():
    with cuda_stand_in.DEVICE:
        yield
    cuda_stand_in.STATE.debug = "default"


def replayed(function, *inputs):
    """``(results of a captured call, replayed on doubled inputs; the same call's, launched)``; neither waits."""
    function()
    torch.cuda.set_sync_debug_mode("error")
    function()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = function()
    torch.cuda.set_sync_debug_mode("default")
    for x in inputs:
        x.mul_(2)
    captured.replay()
    return got, function()


def rand(*shape):
    return torch.randn(*shape, device="cuda")


@inside
def test_the_stand_in_finds_mistakes(gpu):
    from kvcompact_kernels.backends.triton import compact_attention

    x = rand(3, 4)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(4)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    args = [rand(1, 2, 1, 64), [rand(1, 2, 5, 64)], [rand(1, 2, 5, 64)], [torch.zeros(1, 2, 5)], [None]]
    with pytest.raises(AssertionError, match="Beta is Tensor"):
        compact_attention.forward(*args, None, None, None, 0.125, True, -1, 2)
    for mistake in (x.sum().item, lambda: x[:, [0, 1]], lambda: torch.tensor([1], device="cuda"), x.cpu, x.tolist):
        mistake()
        with pytest.raises(RuntimeError, match="synchronizing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            mistake()


@inside
@pytest.mark.parametrize("shared,ragged", [(False, False), (True, False), (False, True)])
@draws(3)
def test_attention(gpu, shared, ragged):
    from kvcompact_kernels import explain
    from kvcompact_kernels.ops import compact_attention

    rows = 1 if shared else 2
    query, tail = rand(2, 4, 1, 64), [rand(2, 2, 7, 64) for _ in "kv"]
    keys, values, beta = rand(rows, 2, 20, 64), rand(rows, 2, 20, 64), rand(rows, 2, 20)
    options = {
        "tail_keys": tail[0],
        "tail_values": tail[1],
        "tail_mask": torch.arange(7, device="cuda").expand(2, 7) > 1,
    }
    if ragged:
        keys, values, beta = (x.flatten(0, 2) for x in (keys, values, beta))
        options["offsets"] = torch.tensor([0, 3, 40, 41, 80], device="cuda")
    assert explain("compact_attention", query, keys, values, beta, **options).chosen == "triton"
    got, wanted = replayed(lambda: compact_attention(query, keys, values, beta, **options), query, keys)
    assert torch.equal(got, wanted)

    def plain(dtype):
        def there(x):
            return x.cpu().to(dtype) if x.is_floating_point() else x.cpu()

        options_there = {name: there(x) for name, x in options.items()}
        return compact_attention(*map(there, (query, keys, values, beta)), **options_there, backend="torch")

    assert_within_budget(got.cpu(), plain(torch.float32), plain(torch.float64))


@inside
@draws(3)
def test_gradients(gpu):
    from kvcompact_kernels.ops import compact_attention, key_scores

    leaves = [rand(2, 4, 5, 64), rand(1, 2, 9, 64), rand(1, 2, 9, 64), rand(1, 2, 9)]

    def gradients(backend, move):
        q, k, v, b = (move(x).detach().requires_grad_() for x in leaves)
        total = compact_attention(q, k, v, b, backend=backend).square().sum()
        total = total + key_scores(q[:1], k, causal=False, backend=backend).square().sum()
        return [x.cpu() for x in torch.autograd.grad(total, [q, k, v, b])]

    found = gradients("auto", lambda x: x)
    naive, truth = (
        gradients("torch", lambda x, dtype=dtype: x.cpu().to(dtype)) for dtype in (torch.float32, torch.float64)
    )
    for name, *three in zip(("query", "keys", "values", "beta"), found, naive, truth):
        assert_within_budget(*three, factor=3.0, name=name)


@inside
def test_scores_and_packing(gpu):
    from kvcompact_kernels.ops import key_scores, pack_slots

    query, keys = rand(1, 4, 9, 64), [rand(1, 2, n, 64) for n in (9, 30)]
    got, wanted = replayed(lambda: key_scores(query, keys[0]), query)
    assert torch.equal(got, wanted)
    kept = [torch.arange(3, device="cuda").expand(1, 2, 3), torch.arange(29, 20, -1, device="cuda")]
    got, wanted = replayed(lambda: pack_slots(keys, keys, kept), *keys)
    for x, y, k, i in zip(got[0], wanted[1], keys, kept):
        assert torch.equal(x, y) and torch.equal(x, k[:, :, i if i.ndim == 1 else i[0, 0]])


@inside
@pytest.mark.parametrize("chunk", [None, 16])
def test_still(gpu, chunk):
    from kvcompact_kernels.ops import still_compaction, still_compaction_chunked
    from kvcompact_kernels.rope import Rope
    from kvcompact_kernels.still_config import StillConfig, init_still_parameters

    config, rope = StillConfig(slots=5, head_dim=32, num_blocks=1), Rope(Rope.default(32).inv_freq.cuda())
    params = [init_still_parameters(config, device="cuda") for _ in range(2)]
    keys, values = ([rand(1, 1, 32, 32) for _ in params] for _ in "kv")

    def compacted():
        if chunk is None:
            return still_compaction(keys, values, params, config, rope)
        return still_compaction_chunked(keys, values, params, config, rope, chunk)

    for got, wanted in zip(*replayed(compacted, *keys)):
        for x, y in zip(got, wanted):
            torch.testing.assert_close(x, y)
    if chunk is not None:
        return
    params[0]["latents"].requires_grad_()
    total = sum(x.square().sum() for block in compacted() for x in block)
    assert torch.autograd.grad(total, params[0]["latents"])[0].is_cuda


@inside
def test_inputs_of_the_tuner(gpu, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parents[1] / "benchmarks"))
    from bench_still_compaction import Case, Layer

    from kvcompact_kernels.still_config import StillConfig

    layer = Layer(Case("SmolLM2-135M", 12, 4, torch.float32), StillConfig(slots=4, head_dim=64, num_blocks=1), "cuda")
    tensors, tables = layer.cross_attention_arguments()
    assert all(x.is_cuda for x in (*tensors, *tables.values()))


METHODS = {
    "adakv": {},
    "attention_matching": {},
    "compose": {"first": "uniform"},
    "expected_attention": {},
    "finch": {},
    "h2o": {},
    "kv_distill": {},
    "magicpig": {},
    "minicache": {"start": 0.0},
    "random": {},
    "snapkv": {},
    "still": {"weights": "identity"},
    "streaming_llm": {},
    "zsmerge": {},
}


@pytest.fixture(scope="module")
def model():
    from tiny_models import tiny_model

    with cuda_stand_in.DEVICE:
        return tiny_model("llama", dtype=torch.float32).to("cuda")


@inside
@pytest.mark.filterwarnings("ignore:the package has no weights")
@pytest.mark.parametrize("name", METHODS)
def test_methods(gpu, model, name):
    from kvcompact_kernels import compact

    ids = torch.arange(3, 23, device="cuda")[None]
    block = compact(model, ids, name, ratio=2.0, **METHODS[name]).layers[0]
    assert block.keys.is_cuda and (block.beta is None or block.beta.is_cuda)


@inside
def test_a_model(gpu, model):
    """Padded prompts and questions, generation, and one decoded token in a graph."""
    from kvcompact_kernels import patch_model, unpatch_model
    from kvcompact_kernels.patch.model import _state, new_session

    ids = torch.arange(3, 23, device="cuda").expand(2, 20).contiguous()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    patch_model(model, method="snapkv", ratio=2.0)
    try:
        with torch.no_grad():
            padded = model.compact(ids, attention_mask=mask)
            assert model(input_ids=ids[:, :3], past_key_values=padded).logits.is_cuda
            cache = model.compact(ids[:1])
            assert model.generate(ids[:1, :3], past_key_values=cache, max_new_tokens=2, num_beams=2).is_cuda
            session = new_session(model, _state(model), cache)
            model(input_ids=ids[:, :4], past_key_values=session, use_cache=True)
            session.functional = True
            token = ids[:, :1].contiguous()
            got, wanted = replayed(
                lambda: model(input_ids=token, past_key_values=session, use_cache=True).logits, token
            )
            torch.testing.assert_close(got, wanted)
    finally:
        unpatch_model(model)
