# SPDX-License-Identifier: Apache-2.0
"""A model of Qwen3-4B's shape with random weights: one decoded token over a full cache, and over 8x and 32x compact ones.

Keys and values are random, nothing is prefilled. ``full`` is the same kernel over a block of all tokens; ``DynamicCache`` is
transformers' own, whose step copies the cache (its ``update`` concatenates). Each step is one CUDA graph, and so without the
host's share, which ``generate`` has: see the rows "launched". Weights are 8 GB in bf16 and are read in every step, so at
batch 1 and below some 32k tokens they bound the step, whatever the cache holds.
"""

from __future__ import annotations

from functools import partial

import torch
from lab import Bench, Goal, Work, relative_error
from torch import Tensor

from kvcompact_kernels.cache import CompactBlock, CompactCache
from kvcompact_kernels.patch import cache_argument
from kvcompact_kernels.testing.memory import requested_bytes

SIZES = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
}
SMOKE_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
CONTEXTS = [(32768, 1), (32768, 8), (131072, 1), (32768, 32), (131072, 8), (131072, 32)]  # tokens, batch
RATIOS = (8, 32, 1)
TAIL = 64
SPARE = 6 << 30  # bytes beside weights and cache: logits, workspaces, the graph's own pool
LOGITS_TOLERANCE = 0.1  # relative: 36 layers of bf16 rounding between two kernels, of which only one is under test


def build(bench: Bench):
    """The model, patched."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from kvcompact_kernels import patch_model

    config = Qwen3Config(**(SMOKE_SIZES if bench.smoke else SIZES), attention_bias=False)
    config._attn_implementation = "sdpa"
    dtype = torch.float32 if bench.smoke else torch.bfloat16
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(bench.device):
            model = Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return patch_model(model, method="snapkv")


def cache_of(model, tokens: int, batch: int, ratio: int) -> CompactCache:
    """Random slots for every layer, with a bias where they stand for more than themselves."""
    from kvcompact_kernels.patch.families import model_spec

    spec = model_spec(model)
    weight = model.get_input_embeddings().weight
    shape = (batch, spec.num_kv_heads, tokens // ratio, spec.head_dim)

    def block() -> CompactBlock:
        keys, values = (torch.empty(shape, dtype=weight.dtype, device=weight.device).normal_() for _ in range(2))
        beta = torch.randn(shape[:3], device=weight.device) if ratio > 1 else None
        return CompactBlock(keys, values, beta)

    layers = [block() for _ in range(spec.num_layers)]
    return CompactCache(layers, tokens, spec.fingerprint, spec.ropes, method="random")


def session_of(model, cache: CompactCache, ids: Tensor):
    """A session with a tail of ``ids``, which later passes see and do not lengthen."""
    from kvcompact_kernels.patch.model import _state, new_session

    session = new_session(model, _state(model), cache)
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(model, session))
    session.functional = True
    return session


def fits(bench: Bench, needed: float) -> bool:
    if bench.device == "cpu":
        return True
    return needed + SPARE <= torch.cuda.mem_get_info()[0]


def measure(bench: Bench, model, tokens: int, batch: int) -> None:
    config, device = model.config, bench.device
    weight = model.get_input_embeddings().weight
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.dtype.itemsize
    weights = sum(p.nbytes for p in model.parameters())
    products = sum(p.numel() for p in model.parameters())  # the embedding is the head as well
    ids = torch.randint(3, config.vocab_size, (batch, TAIL), device=device)
    token = ids[:, :1].contiguous()
    held: dict[int, int] = {}
    for ratio in RATIOS:
        shape = f"{_name(config)} {tokens} tokens B{batch} {'full' if ratio == 1 else f'{ratio}x'}"
        size = batch * tokens / ratio * per_token
        if not fits(bench, size):
            print(f"  {shape}: {size / 2**30:.1f} GiB do not fit beside the weights", flush=True)
            bench.file.add(
                device,
                part=bench.part,
                op="decode_step",
                shape=shape,
                dtype=str(weight.dtype).removeprefix("torch."),
                role="kernel",
                backend="none",
                note=f"a cache of {size / 2**30:.1f} GiB does not fit beside the weights",
            )
            continue
        before = _allocated(device)
        cache = cache_of(model, tokens, batch, ratio)
        held[ratio] = (_allocated(device) - before) or cache.nbytes
        session = session_of(model, cache, ids)
        step = partial(_step, model, token, session)
        if ratio == max(RATIOS):
            bench.verify(check, model, step)
        ours = {"patched": step}
        work = Work(weights + cache.nbytes, batch * 2.0 * products + _attention(config, batch, tokens // ratio + TAIL))
        times = bench.time(ours, {})
        notes = {"patched": _note(times, "patched", batch, held, ratio, size)}
        goals = [Goal("memory_percent", 100 / ratio * 1.02)] if ratio > 1 else []
        bench.record(
            "decode_step",
            shape,
            weight.dtype,
            times,
            ours,
            work,
            goals=goals,
            memory={"patched": held[ratio]},
            memory_base=size * ratio,
            notes=notes,
        )
        if batch == 1 and device != "cpu" and not bench.warm:
            launched = bench.time({"patched, launched": step}, {}, graphs=False)
            note = {name: f"{batch / t.p50 * 1e3:.0f} tokens/s with the host's share" for name, t in launched.items()}
            bench.record("decode_step", f"{shape}, no graph", weight.dtype, launched, list(launched), work, notes=note)
        del session, step, ours, cache
        if ratio == 1 and fits(bench, 2 * size):
            ordinary(bench, model, shape, tokens, batch, token, work)
        bench._release()


def ordinary(bench: Bench, model, shape: str, tokens: int, batch: int, token: Tensor, work: Work) -> None:
    """transformers' own cache and attention, same model, same length."""
    from transformers import DynamicCache

    config, weight = model.config, model.get_input_embeddings().weight
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        size = (batch, config.num_key_value_heads, tokens, config.head_dim)
        cache.update(*(torch.empty(size, dtype=weight.dtype, device=weight.device).normal_() for _ in range(2)), layer)

    def step() -> Tensor:
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        logits = model(input_ids=token, use_cache=True, **cache_argument(model, cache)).logits
        for layer, (keys, values) in zip(cache.layers, kept):
            layer.keys, layer.values = keys, values
        return logits

    times = bench.time({}, {"DynamicCache": step})
    notes = {name: f"{batch / t.p50 * 1e3:.0f} tokens/s" for name, t in times.items()}
    bench.record("decode_step", shape, weight.dtype, times, [], work, notes=notes)


def check(model, step) -> None:
    """The logits against those of the same model through PyTorch's attention: the ops have their own budget."""
    from kvcompact_kernels.patch.model import _state

    state = _state(model)
    logits = step()
    chosen, state.backend = state.backend, "torch"
    try:
        error = relative_error(logits, step())
    finally:
        state.backend = chosen
    if not error < LOGITS_TOLERANCE:
        raise AssertionError(f"logits err by {error:.2g} against PyTorch's attention")


def _step(model, token: Tensor, session) -> Tensor:
    return model(input_ids=token, use_cache=True, **cache_argument(model, session)).logits


def _attention(config, batch: int, keys: int) -> float:
    return 4.0 * batch * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys


def _allocated(device: str) -> int:
    return 0 if device == "cpu" else requested_bytes()


def _note(times, name: str, batch: int, held: dict[int, int], ratio: int, size: float) -> str:
    if name not in times:
        return ""
    share = "" if ratio == 1 else f" ({100 * held[ratio] / (size * ratio):.2f}%)"
    return f"{batch / times[name].p50 * 1e3:.0f} tokens/s {held[ratio] / 2**30:.2f} GiB{share}"


def _name(config) -> str:
    return "Qwen3-4B" if config.hidden_size == SIZES["hidden_size"] else "tiny"


def run(bench: Bench) -> None:
    model = build(bench)
    contexts = [(64, 1), (64, 3)] if bench.smoke else CONTEXTS
    for tokens, batch in contexts:
        bench.attempt(f"model, {tokens} tokens, batch {batch}", measure, bench, model, tokens, batch)
