# SPDX-License-Identifier: Apache-2.0
"""STILL's forward pass on the CPU, over all layers of a model, against the eager routes.

    python benchmarks/bench_still_compaction.py [--full] [--out FOLDER] [--threads N]

Each shape is first held to the error budget on one of the layers that are then timed. ``op`` says what a row is about:
``still_cross_attention``, the kernel (one call per layer), or ``still_compaction``, whole layers in two configurations:
``one_block`` (cross-attention, heads) and ``default`` (two blocks, each with self-attention over the latents). Peers, same
dtype, same run, call by call in turn:

- ``eager``: the definition as written (kvcompact_kernels/reference): projections, scores, softmax and average one after the
  other, each in memory.
- ``torch``: the PyTorch backend, which projects and then calls ``scaled_dot_product_attention``.

A call is one layer, and the layers take turns, so that none finds its keys in the cache; ``ms_model`` is the median call
times the model's layers.

``temporary_mib`` is the most memory that a call holds at once from PyTorch's CPU allocator, its results not included, as the
profiler reports it; what MKL or oneDNN allocate by themselves is not in it, for no backend. What a row does not show: reading
the cache's bytes is free beside this work, so the figures bound nothing about decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from common import Rows, arguments, machine, measure, temporary_bytes
from torch import Tensor

from kvcompact_kernels.backends.cpu import library
from kvcompact_kernels.ops import still_compaction, still_cross_attention
from kvcompact_kernels.reference import still_compaction as reference
from kvcompact_kernels.rope import Rope
from kvcompact_kernels.still_config import StillConfig, init_still_parameters
from kvcompact_kernels.testing.budget import assert_within_budget

MODELS = {  # layers, KV heads, head dim
    "SmolLM2-135M": (30, 3, 64),
    "Qwen3-4B": (36, 8, 128),
}
TURNS = 4  # layers that take turns
CONFIGS = {"one_block": {"num_blocks": 1, "self_attention": False}, "default": {}}


@dataclass(frozen=True)
class Case:
    model: str
    tokens: int
    slots: int
    dtype: torch.dtype


def cases(full: bool) -> list[Case]:
    shapes = [("SmolLM2-135M", 4096, 512)]
    if full:
        shapes += [("SmolLM2-135M", 1024, 128), ("SmolLM2-135M", 16384, 1024), ("Qwen3-4B", 4096, 512)]
    return [Case(*shape, dtype) for dtype in (torch.bfloat16, torch.float32) for shape in shapes]


class Layer:
    """A layer's cache and parameters, with weights that route by content as well as by position."""

    def __init__(self, case: Case, config: StillConfig, device: str = "cpu") -> None:
        _, kv_heads, d = MODELS[case.model]
        # the rotation's frequencies lie where the keys do, as a model's: to copy them there would end a graph capture
        self.config, self.rope = config, Rope(Rope.default(d, 100000.0).inv_freq.to(device))
        shape = (1, kv_heads, case.tokens, d)
        self.keys, self.values = (torch.empty(shape, dtype=case.dtype, device=device).normal_() for _ in range(2))
        params = init_still_parameters(config, device=device)
        self.params = {n: (p + torch.randn_like(p) / math.sqrt(p.shape[-1])).to(case.dtype) for n, p in params.items()}

    def cross_attention_arguments(self) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        config, p = self.config, self.params
        positions = torch.arange(self.keys.shape[2], device=self.keys.device)
        where = reference.latent_positions(positions, config.num_latents)
        tables = reference.int_tables(config, where, where[0], torch.float32)
        query = reference.latent_queries(p["latents"][None, None], p, "block0_", config, tables)
        names = ("cos", "sin", "int_cos", "int_sin")
        values = (*self.rope.tables(positions), *reference.int_tables(config, positions, positions[0], torch.float32))
        tensors = [query, self.keys, self.values, *(p[f"block0_cross_k_{n}"] for n in ("weight", "bias", "norm"))]
        return tensors, dict(zip(names, values))


def check_layer(layer: Layer, backend: str = "cpu") -> None:
    check_block(
        layer, still_compaction(layer.keys, layer.values, layer.params, layer.config, layer.rope, backend=backend)
    )


def check_block(layer: Layer, got: tuple) -> None:
    """The error budget of a layer's keys, values and bias."""
    args = (layer.config, layer.rope)
    naive = reference.still_compaction(layer.keys, layer.values, layer.params, *args)
    wide = {name: p.double() for name, p in layer.params.items()}
    truth = reference.still_compaction(layer.keys.double(), layer.values.double(), wide, *args)
    for name, a, b, c in zip(("keys", "values", "beta"), got, naive, truth):
        assert_within_budget(a, b, c, name=name)


def check_cross_attention(layer: Layer) -> None:
    tensors, tables = layer.cross_attention_arguments()
    scale = tensors[0].shape[-1] ** -0.5
    got = still_cross_attention(*tensors, **tables, return_lse=True, backend="cpu")
    naive = reference.still_cross_attention(*tensors, *tables.values(), scale, 1e-6)
    truth = reference.still_cross_attention(*(x.double() for x in (*tensors, *tables.values())), scale, 1e-6)
    for name, a, b, c in zip(("pooled", "lse"), got, naive, truth):
        assert_within_budget(a, b, c, name=name)


def operations(case: Case, blocks: int) -> float:
    """Floating-point operations of the cross-attentions of one layer."""
    _, kv_heads, d = MODELS[case.model]
    width = 2 * d
    return blocks * kv_heads * 2.0 * case.tokens * (width * 2 * d + case.slots * (width + 2 * d))


def cross_attention_functions(layer: Layer) -> dict[str, Callable[[], object]]:
    tensors, tables = layer.cross_attention_arguments()
    scale = tensors[0].shape[-1] ** -0.5
    return {
        "cpu": lambda: (still_cross_attention(*tensors, **tables, backend="cpu"),),
        "torch": lambda: (still_cross_attention(*tensors, **tables, backend="torch"),),
        "eager": lambda: reference.still_cross_attention(*tensors, *tables.values(), scale, 1e-6),
    }


def layer_functions(layer: Layer) -> dict[str, Callable[[], object]]:
    args = (layer.keys, layer.values, layer.params, layer.config, layer.rope)
    return {
        "cpu": lambda: still_compaction(*args, backend="cpu"),
        "torch": lambda: still_compaction(*args, backend="torch"),
        "eager": lambda: reference.still_compaction(*args),
    }


def take_turn(functions: list[dict[str, Callable[[], object]]], backend: str, call: int) -> object:
    return functions[call % len(functions)][backend]()


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    library.load()
    shown = (
        "op",
        "config",
        "model",
        "tokens",
        "slots",
        "dtype",
        "backend",
        "ms_p50",
        "ms_model",
        "gflops",
        "temporary_mib",
        "ratio",
    )
    rows, where = Rows(args.out / "still_compaction_cpu.csv", shown), machine()
    for case in cases(args.full):
        for op, name in [("still_cross_attention", "-"), *(("still_compaction", name) for name in CONFIGS)]:
            config = StillConfig(slots=case.slots, head_dim=MODELS[case.model][2], **CONFIGS.get(name, {}))
            layers = [Layer(case, config) for _ in range(TURNS)]
            whole = op == "still_compaction"
            with torch.inference_mode():
                (check_layer if whole else check_cross_attention)(layers[0])
                functions = [(layer_functions if whole else cross_attention_functions)(layer) for layer in layers]
                memory = {backend: temporary_bytes(function) for backend, function in functions[0].items()}
                turns = {backend: partial(take_turn, functions, backend) for backend in functions[0]}
                times = measure(turns, args.seconds)
            for backend, time in times.items():
                blocks = config.num_blocks if whole else 1
                rows.add(
                    op=op,
                    config=name,
                    model=case.model,
                    layers=MODELS[case.model][0],
                    kv_heads=MODELS[case.model][1],
                    head_dim=MODELS[case.model][2],
                    tokens=case.tokens,
                    slots=case.slots,
                    dtype=str(case.dtype).removeprefix("torch."),
                    backend=backend,
                    ms_p20=time.p20,
                    ms_p50=time.p50,
                    ms_p80=time.p80,
                    ms_model=time.p50 * MODELS[case.model][0],
                    calls=time.calls,
                    gflops=operations(case, blocks) / time.p50 / 1e6,
                    temporary_mib=memory[backend] / 2**20,
                    temporary_share=memory["cpu"] / memory[backend],
                    ratio=time.p50 / times["cpu"].p50,
                    **where,
                )
    rows.save()


if __name__ == "__main__":
    main()
