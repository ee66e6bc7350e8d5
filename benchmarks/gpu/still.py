# SPDX-License-Identifier: Apache-2.0
"""STILL over all layers of a model, and chunk by chunk over a long context.

``default`` is two blocks with self-attention over the latents, ``one_block`` cross-attention and heads alone. Peers: the
definition (eager), the definition compiled, and the composed route (projections by cuBLAS, SDPA at head dim 2d) with each SDPA
backend. Layers are different tensors. A kernel has two rows: all layers in one call, and a call a layer ("layer by layer"),
one behind the other in one graph, as the peers run; a row's time is that of all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import routes
import torch
from bench_still_compaction import CONFIGS, MODELS, Case, Layer, check_block
from common import temporary_bytes
from lab import Bench, Goal, Work
from torch.nn.attention import sdpa_kernel

from kvcompact_kernels.ops import still_compaction, still_compaction_chunked
from kvcompact_kernels.reference import still_compaction as reference
from kvcompact_kernels.still_config import StillConfig

CHUNK = 8192
LONG = 131072
GOALS = {"default": [Goal("ms", 18.0)], "one_block": []}
RATIOS = [
    Goal("ratio", 10, "eager"),
    Goal("ratio", 2, "eager compiled"),
    Goal("ratio", 1.3, "best composed route"),
]


def operations(config: StillConfig, tokens: int, heads: int) -> float:
    """Floating-point operations of one layer: matrix products only."""
    width, double, n, d = config.d_latent, 2 * config.head_dim, config.num_latents, config.head_dim
    total = 0.0
    for i in range(config.num_blocks):
        total += (1 if i == 0 else heads) * 2 * n * width * width  # the first block's queries are one table
        total += heads * 2 * tokens * (width * double + n * (width + double))
        total += 2 * width * width * double + heads * 2 * n * double * width  # Wo Wv folded, then applied to n rows
        if config.self_attention:
            total += heads * (4 * 2 * n * width * width + 4 * n * n * width)
    return total + heads * 2 * n * width * 2 * d


def bytes_moved(case: Case, config: StillConfig) -> float:
    """Keys and values of one layer once per block, slots written once, parameters once."""
    _, heads, d = MODELS[case.model]
    size = case.dtype.itemsize
    weights = config.num_latents * config.d_latent + config.num_blocks * 8 * config.d_latent**2
    return size * (heads * 2 * d * (case.tokens * config.num_blocks + case.slots) + weights) + 4 * heads * case.slots


def of_layer(layer: Layer, backend: str) -> tuple:
    return still_compaction(layer.keys, layer.values, layer.params, layer.config, layer.rope, backend=backend)


def together(layers: list[Layer], backend: str) -> list[tuple]:
    keys, values, params = zip(*((x.keys, x.values, x.params) for x in layers))
    return still_compaction(keys, values, params, layers[0].config, layers[0].rope, backend=backend)


def both_ways(names: list[str], layers: list[Layer], at_once: Callable, one: Callable) -> dict[str, Callable[[], list]]:
    """Calls that give ``[keys, values, bias, keys, ...]``: of all layers in one call, and of a call a layer."""
    calls = {}
    for name in names:
        calls[name] = lambda name=name: [x for block in at_once(layers, name) for x in block]
        calls[f"{name}, layer by layer"] = partial(of_all, layers, partial(one, backend=name))
    return calls


def check_one(layers: list[Layer], check: Callable[[Layer, tuple], None], call: Callable[[], list]) -> None:
    """Checks what a call gives for one of the layers, taken at random."""
    i = int(torch.randint(len(layers), ()))
    check(layers[i], tuple(call()[3 * i : 3 * i + 3]))


def composed(layer: Layer, name: str) -> tuple:
    with sdpa_kernel(routes.BACKENDS[name]):
        return of_layer(layer, "torch")


def of_all(layers: list[Layer], function: Callable[[Layer], tuple]) -> list:
    return [x for layer in layers for x in function(layer)]


def eager(layer: Layer) -> tuple:
    return reference.still_compaction(layer.keys, layer.values, layer.params, layer.config, layer.rope)


def layers_of(bench: Bench, case: Case, config: StillConfig) -> list[Layer]:
    layers = [Layer(case, config, bench.device) for _ in range(2 if bench.smoke else MODELS[case.model][0])]
    for layer in layers:
        layer.rope = layers[
            0
        ].rope  # as in a model; and one object, so that a compiler makes one program for all layers
    return layers


def whole(bench: Bench, case: Case, name: str) -> None:
    config = StillConfig(slots=case.slots, head_dim=MODELS[case.model][2], **CONFIGS[name])
    layers = layers_of(bench, case, config)
    names = bench.kernels("still_cross_attention", lambda backend: of_layer(layers[0], backend))
    ours = both_ways(list(names), layers, together, of_layer)
    ours = bench.right(ours, lambda name: check_one(layers, check_block, ours[name]))
    compiled = routes.compiled(reference.still_compaction, bench.smoke)

    def run_compiled(layer: Layer) -> tuple:
        return compiled(layer.keys, layer.values, layer.params, layer.config, layer.rope)

    peers = {"eager": partial(of_all, layers, eager), "eager compiled": partial(of_all, layers, run_compiled)}
    routes_composed = {f"composed {n}": partial(of_all, layers, partial(composed, name=n)) for n in routes.BACKENDS}
    peers |= routes_composed
    wanted = next(iter(ours.values()))()[1]  # values: keys and bias alike, but only one can be named
    expected = dict.fromkeys(peers, wanted)
    second = {n: (lambda f=f: _values_first(f())) for n, f in peers.items()}
    memory = {n: temporary_bytes(f, bench.device) for n, f in {**ours, "eager": peers["eager"]}.items()}
    times = bench.time(ours, second, expected)
    heads = MODELS[case.model][1]
    work = Work(bytes_moved(case, config) * len(layers), operations(config, case.tokens, heads) * len(layers))
    kv = 2 * heads * case.tokens * MODELS[case.model][2] * case.dtype.itemsize * len(layers)
    bench.record(
        "still_compaction",
        f"STILL {case.model} {len(layers)} layers {case.tokens}->{case.slots} {name}",
        case.dtype,
        times,
        ours,
        work,
        groups={"best composed route": list(routes_composed)},
        goals=[*GOALS[name], *RATIOS, Goal("memory_percent", 5)],
        memory=memory,
        memory_base=kv,
    )
    if bench.warm or bench.device == "cpu":
        return
    launched = bench.time({f"{b}, launched": f for b, f in ours.items()}, {}, graphs=False)
    bench.record(
        "still_compaction",
        f"STILL {case.model} {len(layers)} layers {case.tokens}->{case.slots} {name}, no graph",
        case.dtype,
        launched,
        list(launched),
        work,
        notes=dict.fromkeys(launched, "what the host adds where no graph is used"),
    )


def _values_first(results: list) -> list:
    return [results[1], *results]


def chunked(bench: Bench, case: Case, chunk: int) -> None:
    slots = case.slots * chunk // case.tokens
    config = StillConfig(slots=slots, head_dim=MODELS[case.model][2])
    layers = layers_of(bench, case, config)

    def of_chunks(layer: Layer, backend: str) -> tuple:
        return still_compaction_chunked(
            layer.keys, layer.values, layer.params, layer.config, layer.rope, chunk, backend=backend
        )

    names = bench.kernels("still_cross_attention", lambda backend: of_layer_head(layers[0], chunk, backend))

    def at_once(layers: list[Layer], backend: str) -> list[tuple]:
        keys, values, params = zip(*((x.keys, x.values, x.params) for x in layers))
        return still_compaction_chunked(keys, values, params, config, layers[0].rope, chunk, backend=backend)

    ours = both_ways(list(names), layers, at_once, of_chunks)
    ours = bench.right(ours, lambda name: check_one(layers, partial(check_chunk, chunk=chunk), ours[name]))
    wanted = next(iter(ours.values()))()[1]
    peers = {"composed": lambda: _values_first(of_all(layers, partial(of_chunks, backend="torch")))}
    memory = {n: temporary_bytes(f, bench.device) for n, f in ours.items()}
    times = bench.time(ours, peers, {"composed": wanted}, graphs=False, least_calls=3)
    chunks = case.tokens // chunk
    work = Work(
        len(layers) * chunks * bytes_moved(Case(case.model, chunk, slots, case.dtype), config),
        len(layers) * chunks * operations(config, chunk, MODELS[case.model][1]),
    )
    bench.record(
        "still_compaction_chunked",
        f"STILL {case.model} {len(layers)} layers {case.tokens}->{case.slots} in {chunks}",
        case.dtype,
        times,
        ours,
        work,
        goals=[Goal("ms", 350.0)],
        memory=memory,
    )


def of_layer_head(layer: Layer, tokens: int, backend: str) -> tuple:
    keys, values = (x[:, :, :tokens] for x in (layer.keys, layer.values))
    return still_compaction(keys, values, layer.params, layer.config, layer.rope, backend=backend)


def check_chunk(layer: Layer, got: tuple, chunk: int) -> None:
    """The error budget of one chunk, taken at random."""
    from kvcompact_kernels.testing.budget import assert_within_budget

    number = int(torch.randint(layer.keys.shape[2] // chunk, ()))
    piece = slice(number * chunk, (number + 1) * chunk)
    slots = slice(number * layer.config.slots, (number + 1) * layer.config.slots)
    positions = torch.arange(piece.start, piece.stop, device=layer.keys.device)
    keys, values = layer.keys[:, :, piece], layer.values[:, :, piece]
    wide = {name: p.double() for name, p in layer.params.items()}
    naive = reference.still_compaction(keys, values, layer.params, layer.config, layer.rope, positions)
    truth = reference.still_compaction(keys.double(), values.double(), wide, layer.config, layer.rope, positions)
    for name, x, y, z in zip(("keys", "values", "beta"), got, naive, truth):
        assert_within_budget(x[:, :, slots], y, z, name=f"chunk {number}: {name}")


def run(bench: Bench) -> None:
    case, long = Case("Qwen3-4B", 8192, 1024, torch.bfloat16), Case("Qwen3-4B", LONG, LONG // 8, torch.bfloat16)
    chunk = CHUNK
    if bench.smoke:
        case, long, chunk = Case("Qwen3-4B", 24, 4, torch.float32), Case("Qwen3-4B", 32, 8, torch.float32), 16
    for name in ("default", "one_block"):
        bench.attempt(f"STILL, {name}", whole, bench, case, name)
    if not bench.warm:  # it compiles nothing new, and needs 20 GB beside the tests
        bench.attempt("STILL in chunks", chunked, bench, long, chunk)
